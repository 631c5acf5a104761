"""One run for every combination of some values and seeds: the ablations.

A sweep is a params file and the values to vary. For each seed the stages that none of the
values touch are done once, in the base run; each combination has a run folder of its own in
the sweep's folder, and does only the rest. What is complete and unchanged is left alone, so a
sweep that was killed, or had a failure, goes on where it was.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from tqdm.auto import tqdm

from srlib import SrlibError, params, visible
from srlib.data.rows import read_json, read_jsonl, whole, write_json
from srlib.evaluation import stats
from srlib.params import Params, Section, paths
from srlib.params.written import typed
from srlib.run import locks, pipeline, stages

NOTEBOOK = "06_reward_ablation"
OF_THE_BASE = ("run", "outputs", "pair.big.process")  # where runs lie, and on how many cores; changes no token
OF_A_RUN = ("run", "outputs", "seed", "base")  # what a sweep sets for each of its runs
MEASURED = ["big", "learned", "grpo"]  # what stage 05 measures in a combination; the rest does not change


class Plan(Section):
    """A file in `params/ablations/`: what is varied, and over which seeds."""

    params: str
    name: str
    vary: dict[str, list[Any]] = {}
    fix: dict[str, Any] = {}
    seeds: list[int] = [0]
    about: str = ""


@dataclass
class Combination:
    """One run of a sweep."""

    label: str
    values: dict[str, Any]
    seed: int
    folder: str
    state: str = "waiting"  # complete, failed


class Kept(BaseModel):
    """What `sweep.json` holds."""

    plan: Plan
    runs: list[Combination]


def plan(path: str, sets: Sequence[str] = (), seeds: Sequence[int] | None = None, name: str | None = None) -> Plan:
    """A sweep from a params file or from a file of `params/ablations/`.

    Args:
        sets: `key=v1,v2,…` as on the command line; one value fixes a key, several vary it.
        seeds, name: in place of the file's.

    Raises:
        SrlibError: a file or key is wrong, a list is empty or holds a value twice.
    """
    values = params.read_file(path)
    if "vary" not in values:
        values = {"params": path, "name": ""}
    chosen = params.build({"name": Path(path).stem, **values}, path, Plan)
    for text in sets:
        key, several = params.parse_override(text, several=True)
        if not several:
            raise SrlibError(f"--set {text!r} names no value; give one or several: {key}=1,2")
        chosen.vary.pop(key, None)
        if len(several) > 1:
            chosen.vary[key] = several
        else:
            chosen.fix[key] = several[0]
    chosen.seeds = list(chosen.seeds if seeds is None else seeds)
    for key, several in {**{f"vary.{key}": some for key, some in chosen.vary.items()}, "seeds": chosen.seeds}.items():
        if not several:
            raise SrlibError(f"{path}: {key} is an empty list; give it the values to try.")
        if twice := [value for at, value in enumerate(several) if value in several[:at]]:
            raise SrlibError(f"{path}: {key} holds {twice[0]!r} twice; once is enough.")
    for key in (*chosen.vary, *chosen.fix):
        if key in OF_A_RUN and not (key in chosen.fix and key in OF_THE_BASE):
            raise SrlibError(
                f"{path}: {key} cannot be set here: each run of a sweep has its own; seeds are in `seeds`."
            )
    chosen.name = name or chosen.name or "-".join(key.rpartition(".")[2] for key in chosen.vary) or "fixed"
    return chosen


def combinations(chosen: Plan) -> tuple[Params, dict[int, Params], list[tuple[Combination, Params]]]:
    """All parameters of a sweep, checked.

    Returns:
        parameters of the sweep's own notebook, of the base run by seed, and of every combination.

    Raises:
        SrlibError: any of the combinations has a bad value.
    """
    for_base = {key: value for key, value in chosen.fix.items() if key in OF_THE_BASE}
    plain = params.load(chosen.params, **for_base)
    top = params.load(chosen.params, **{**for_base, "run": f"{plain.run}-{chosen.name}"})
    names = [key.rpartition(".")[2] for key in chosen.vary]
    names = names if len(set(names)) == len(names) else list(chosen.vary)
    changed = {*chosen.vary, *chosen.fix} - set(for_base)
    own = _own(changed, plain)
    shared = [name for name in stages.STAGES if name not in own]
    bases: dict[int, Params] = {}
    runs: list[tuple[Combination, Params]] = []
    for seed in chosen.seeds:
        run = plain.run if seed == plain.seed else f"{plain.run}-seed{seed}"
        bases[seed] = params.load(chosen.params, **{**for_base, "run": run, "seed": seed})
        base = {"folder": str(bases[seed].run_dir), "stages": shared} if _needed(shared) else None
        for point in itertools.product(*chosen.vary.values()):
            values = dict(zip(chosen.vary, point))
            label = visible(", ".join(f"{name}={_plain(value)}" for name, value in zip(names, point))) or "fixed"
            folder = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{label}-seed{seed}".replace("=", "-"))
            if any(p.run == folder for _, p in runs):  # of values that differ in signs alone
                folder += f"-{hashlib.sha256(label.encode()).hexdigest()[:6]}"
            given = {"evaluate.policies": MEASURED, "evaluate.n_refused": 0, **chosen.fix, **values}
            place = {"seed": seed, "run": folder, "outputs": str(top.run_dir), "base": base}
            p = params.load(chosen.params, **{**given, **place})
            runs.append((Combination(label, typed(values), seed, str(p.run_dir)), p))
    return top, bases, runs


def run(chosen: Plan, jobs: int = 1) -> int:
    """Run a sweep, `jobs` runs at the same time, and its notebook; returns the exit status.

    A combination that fails is reported, and the others go on.
    """
    top, bases, runs = combinations(chosen)
    with ExitStack() as held:
        held.enter_context(locks.writing(top.run_dir, "srlib sweep"))
        return _run_all(chosen, jobs, top, bases, runs, held)


def _run_all(
    chosen: Plan,
    jobs: int,
    top: Params,
    bases: dict[int, Params],
    runs: list[tuple[Combination, Params]],
    held: ExitStack,
) -> int:
    """`run` in a folder that is held; so are the bases once they are made."""
    shared = runs[0][1].base.stages if runs[0][1].base else []
    last = [name for name in stages.STAGES if name in _needed(shared)][-1:]
    print(f"{top.run}: {len(runs)} runs, {jobs} at a time → {paths.here(top.run_dir)}", flush=True)

    def base_of(seed: int) -> str:
        return _run(bases[seed], top.run_dir / f"base-seed{seed}", *(["--until", last[0]] if last else []))

    def one(p: Params) -> str:
        return errors.get(p.seed) or _run(p, p.run_dir, "--until", "05_evaluate")

    with ThreadPoolExecutor(jobs) as pool:
        errors = dict(zip(bases, pool.map(base_of, bases))) if last else {}
        for seed in (seed for seed, error in errors.items() if not error):
            held.enter_context(locks.reading(bases[seed].run_dir, shared))
        work = {pool.submit(one, p): combination for combination, p in runs}
        bar = tqdm(total=len(runs), desc=top.run, unit="run", disable=not sys.stderr.isatty())
        try:
            for future in as_completed(work):
                combination = work[future]
                error = future.result()
                combination.state = "failed" if error else "complete"
                bar.update()
                bar.write(f"{combination.label}, seed {combination.seed}: {error or 'complete'}")
                _write(top.run_dir, chosen, [c for c, _ in runs])
        finally:  # interrupted: those that wait are not begun
            for future in work:
                future.cancel()
            bar.close()
    failed = [c for c, _ in runs if c.state == "failed"]
    status = 0
    if len(failed) < len(runs):
        status = pipeline.run(top, only=NOTEBOOK)
    if failed:
        names = "; ".join(f"{c.label}, seed {c.seed}" for c in failed)
        print(f"{len(failed)} of {len(runs)} failed: {names}. Mend it and run the sweep again.", file=sys.stderr)
    return 1 if failed else status


def read(folder: Path) -> tuple[Plan, list[Combination]]:
    """The plan and the runs of a sweep's folder.

    Raises:
        SrlibError: there is no sweep, or its `sweep.json` is damaged.
    """
    path = Path(folder) / "sweep.json"
    if not path.is_file():
        raise SrlibError(f"There is no sweep in {folder}: {path.name} is not there.")
    kept = read_json(path, Kept, "run the sweep again")
    return kept.plan, kept.runs


Records = dict[tuple[str, str], list[dict[str, Any]]]  # by label and policy


def collect(folder: Path) -> tuple[list[dict[str, Any]], Records]:
    """Rows and graded completions of the complete runs of a sweep, the seeds of a combination together.

    Returns:
        a row for each label and policy, with `by_seed` a list of (accuracy, offload share), and
        the records behind it with their `seed`, by which `ci95` is clustered (see `srlib.evaluation.stats`).

    Raises:
        SrlibError: no run is complete.
    """
    _, runs = read(folder)
    runs = [c for c in runs if c.state == "complete"]
    if not runs:
        raise SrlibError(f"No run of the sweep in {folder} is complete.")
    pooled: dict[tuple[str, str], list[dict[str, Any]]] = {}
    records: Records = {}
    for c in runs:
        stage = Path(c.folder) / "05_evaluate"
        for row in read_json(stage / "results.json", list[dict[str, Any]]):
            key = c.label, row["policy"]
            pooled.setdefault(key, []).append({**row, "values": c.values})
            kept = read_jsonl(stage / "completions" / f"{row['policy']}.jsonl", dict)
            records.setdefault(key, []).extend({**r, "seed": c.seed} for r in kept)
    rows = []
    for (label, policy), parts in pooled.items():
        estimate = stats.accuracy(records[label, policy])
        big, small = (sum(r[f"{side}_tokens"] for r in records[label, policy]) for side in ("big", "small"))
        rows.append(
            {
                "label": label,
                "policy": policy,
                "accuracy": estimate.value,
                "ci95": [estimate.low, estimate.high],
                "offload_share": big / max(1, big + small),
                "n_seeds": estimate.n_seeds,
                "by_seed": [(part["accuracy"], part["offload_share"]) for part in parts],
                "n_problems": estimate.n_problems,
                "samples_per_problem": estimate.samples_per_problem,
                "max_tokens": parts[0]["max_tokens"],
                "values": parts[0]["values"],
            }
        )
    return rows, records


def same_problems(records: Records, one: tuple[str, str], other: tuple[str, str]) -> bool:
    """Whether two entries can be paired: a failed seed leaves one of them with fewer problems."""
    return stats.same_problems(records[one], records[other])


def logs(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Log of stage 03 for each combination, averaged over its seeds step by step."""
    by_label: dict[str, list[list[dict]]] = {}
    for c in read(folder)[1]:
        path = Path(c.folder) / "03_grpo" / "log.json"
        if c.state == "complete" and path.is_file():
            by_label.setdefault(c.label, []).append(read_json(path, list[dict[str, Any]]))
    return {
        label: [
            {key: sum(r[key] for r in step) / len(step) for key in step[0] if all(key in r for r in step)}
            for step in zip(*several)
        ]
        for label, several in by_label.items()
    }


def _write(folder: Path, chosen: Plan, runs: Sequence[Combination]) -> None:
    kept = {"plan": typed(chosen.model_dump()), "runs": [asdict(c) for c in runs]}
    write_json(folder / "sweep.json", kept)


def _run(p: Params, folder: Path, *options: str) -> str:
    """One run in a process of its own, its screen in `folder/log.txt`; returns what went wrong, if anything did."""
    folder.mkdir(parents=True, exist_ok=True)
    file, screen = folder / "params.yaml", folder / "log.txt"
    with whole(file) as written:
        written.write(yaml.safe_dump(p.model_dump(), sort_keys=False))
    command = [sys.executable, "-m", "srlib", "run", str(file), *options]
    with screen.open("w") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.PIPE, text=True)
    with suppress(OSError), screen.open("a") as log:  # on a full disk that is what `done` tells
        log.write(done.stderr)
    lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
    return f"failed: {lines[0]} (all of it: {paths.here(folder / 'log.txt')})" if done.returncode else ""


def _own(changed: set[str], p: Params) -> set[str]:
    """Stages that a combination does itself: those `changed` touches, and all that read from them."""
    own: set[str] = set()
    for name, stage in stages.STAGES.items():
        read = [f"{key}." for key in stages.settings(p, name)]
        touched = any(f"{key}.".startswith(of) or of.startswith(f"{key}.") for key in changed for of in read)
        if touched or own & {stages.MAKERS[artefact] for artefact in stage.reads}:
            own.add(name)
    return own | {"03_grpo", "05_evaluate"}


def _needed(shared: Sequence[str]) -> set[str]:
    """Of the shared stages, those that others read from."""
    return {stages.MAKERS[a] for stage in stages.STAGES.values() for a in stage.reads} & set(shared)


def _plain(value: Any) -> str:
    return json.dumps(typed(value)) if isinstance(value, dict | list) else str(value)
