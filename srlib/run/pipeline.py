"""Run the notebooks in order through papermill: manifest, skips, and one line a stage.

A stage is a notebook. It is skipped when its parameters, its notebook and the artefacts it
reads are those of its last complete run and what it wrote is still as it was. A stage that
fails or is killed is not complete; it runs again, and finds its folder as it left it if nothing
it depends on has changed (a checkpoint is taken up), else empty.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from srlib import SrlibError, engine, journal, memory, problems
from srlib.params import ROOT, Params, Source, find, from_notebook, nearest

NOTEBOOKS = ROOT / "notebooks"
IGNORED = {".ipynb_checkpoints", "merged"}  # folders; vLLM serves an adapter merged into its model
PACKAGES = ("torch", "transformers", "trl", "peft", "papermill", "srlib")


@dataclass(frozen=True)
class Stage:
    """What a notebook depends on: sections of the params, and artefacts of earlier stages."""

    name: str
    sections: tuple[str, ...]
    reads: tuple[str, ...] = ()


STAGES = {
    stage.name: stage
    for stage in (
        Stage("00_arith_pair", ("arith",)),
        Stage("01_annotate", ("annotate",), ("pair", "traces")),
        Stage("02_sft", ("sft", "offload"), ("pair", "annotated", "test")),
        Stage("03_grpo", ("grpo", "latency", "offload"), ("pair", "adapter", "traces", "test")),
        Stage("04_offload", ("offload",), ("pair", "adapter", "test")),
        Stage("05_evaluate", ("offload", "evaluate"), ("pair", "adapter", "reinforced", "test")),
        Stage("06_reward_ablation", (), ("sweep",)),
        Stage("07_latency", ("offload", "latency", "bench"), ("pair", "adapter", "test", "results")),
    )
}
MAKERS = {
    "pair": "00_arith_pair",
    "traces": "00_arith_pair",
    "test": "00_arith_pair",
    "annotated": "01_annotate",
    "adapter": "02_sft",
    "reinforced": "03_grpo",
    "sweep": "sweep",
    "results": "05_evaluate",
}
# The policies of stage 05 that a trained model writes with; without them it is not needed.
WRITTEN_WITH = {"adapter": {"learned", "learned_off", "rejection"}, "reinforced": {"grpo"}}


def require(p: Params, stage: str, made_now: Sequence[str] = ()) -> None:
    """Check that all a stage reads is there and whole, before any work.

    Args:
        made_now: stages that run before this one, whose artefacts need not be there yet.

    Raises:
        SrlibError: something is missing or damaged; the sentence names it and the stage that makes it.
    """
    for name in STAGES[stage].reads:
        policies = WRITTEN_WITH.get(name) if stage == "05_evaluate" else None
        if policies and not policies & {*p.evaluate.policies}:
            continue
        if MAKERS[name] not in made_now or _artefacts(p)[name].given:
            require_artefact(p, name, stage)


def require_artefact(p: Params, name: str, reader: str) -> None:
    """Check that one artefact is there and whole; the error names its `reader` and what makes it.

    Raises:
        SrlibError: it is not.
    """
    artefact, maker = _artefacts(p)[name], MAKERS[name]
    try:
        artefact.check()
    except SrlibError as error:
        mend = f" Stage {maker} makes it: python -m srlib run … --only {maker}"
        if maker not in STAGES:
            mend = " This makes it: python -m srlib sweep params/ablations/latency.yaml"
        raise SrlibError(f"{reader}: {error}{'' if artefact.given else mend}") from None


def begin(stage: str, scope: dict[str, Any]) -> tuple[Params, Path]:
    """First line of every notebook: parameters, checks, seed, versions.

    Args:
        stage: name of the notebook.
        scope: its `globals()`, with what the `parameters` cell and papermill put there.

    Returns:
        the parameters, and the folder for the stage's artefacts.

    Raises:
        SrlibError: a bad parameter, an artefact of an earlier stage is missing or damaged, or the
            models do not fit.
    """
    p = from_notebook(scope)
    require(p, stage)
    memory.check(p, stage)
    import torch
    from transformers import set_seed

    if p.threads:
        torch.set_num_threads(p.threads)
    set_seed(p.seed)
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    print(f"run {p.run}, seed {p.seed}, {torch.get_num_threads()} thread(s)\n{packages}")
    return p, p.stage_dir(stage)


def run(p: Params, first: str | None = None, only: str | None = None, until: str | None = None) -> int:
    """Run the stages, but those that `base` has done; returns the exit status.

    Args:
        first: redo from this stage on.
        only: redo this stage alone.
        until: end with this stage.

    Raises:
        SrlibError: no such stage, or an input is missing or damaged (before any stage runs).
    """
    for name in (first, only, until):
        if name is not None and name not in STAGES:
            near = nearest(name, list(STAGES))
            raise SrlibError(f"There is no stage {name!r}{f'; did you mean {near!r}?' if near else '.'}")
    names = list(STAGES)
    chosen = [only] if only else names[names.index(first or names[0]) : names.index(until or names[-1]) + 1]
    artefacts = _artefacts(p)
    if all(artefacts[name].given for name, maker in MAKERS.items() if maker == "00_arith_pair"):
        chosen = [name for name in chosen if name != "00_arith_pair"]  # all it would make is given
    chosen = [name for name in chosen if name not in p.left_out]
    if not only:
        others = p.base.stages if p.base else []
        swept = (p.run_dir / "sweep.json").is_file()  # else there is nothing to compare
        chosen = [name for name in chosen if name not in others and (swept or "sweep" not in STAGES[name].reads)]
        if "grpo" not in p.evaluate.policies and first != "03_grpo":  # nothing would read what it makes
            chosen = [name for name in chosen if name != "03_grpo"]
    manifest = Manifest(p)
    to_make: list[str] = []
    for name in chosen:
        # What a complete stage left behind is checked too: a damaged file is reported, not built on.
        require(p, name, to_make)
        memory.check(p, name)
        if first or only or not manifest.complete(name):
            to_make.append(name)
    print(f"{p.run}: {', '.join(chosen)} → {here(p.run_dir)}", flush=True)
    forced = bool(first or only)
    for name in chosen:
        if not forced and manifest.unchanged(name):
            print(f"{name:<16} unchanged, skipped ({manifest.stages[name]['seconds']:.0f} s when it ran)", flush=True)
            continue
        if not run_stage(p, name, manifest):
            return 1
    _last_screen(p)
    return 0


def run_stage(p: Params, name: str, manifest: Manifest) -> bool:
    """Execute one notebook; returns whether it went through."""
    import papermill

    folder = p.stage_dir(name)
    journal.check_idle(folder)
    if not manifest.resumable(name):
        _clear(folder)
    executed = folder / f"{name}.ipynb"
    manifest.start(name)
    start = time.perf_counter()
    terminal = sys.stderr.isatty()  # there papermill's bar shows how far it is; else the line itself grows
    print("" if terminal else f"{name:<16} ", end="", flush=True)
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb",
            executed,
            parameters=p.model_dump(),
            cwd=NOTEBOOKS,
            kernel_name="python3",
            # The kernel's own notes, such as on the interrupt with which it is ended, are nobody's concern.
            extra_arguments=["--log-level=CRITICAL"],
            progress_bar={"desc": name, "leave": False, "disable": not terminal},
        )
    except papermill.PapermillExecutionError as error:
        manifest.finish(name, "failed", time.perf_counter() - start)
        last_line = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        print(f"{f'{name:<16} ' if terminal else ''}failed after {time.perf_counter() - start:.0f} s", flush=True)
        print(f"{name}: {last_line}\nThe executed notebook is {here(executed)}", file=sys.stderr)
        return False
    except BaseException:
        manifest.finish(name, "stopped", time.perf_counter() - start)
        raise
    seconds = time.perf_counter() - start
    manifest.finish(name, "complete", seconds)
    print(f"{f'{name:<16} ' if terminal else ''}done in {seconds:.0f} s", flush=True)
    return True


def _clear(folder: Path) -> None:
    """Empty a stage's folder, but for what a judge was paid for: its journal is named after what it was asked."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.match("judge-*.journal.jsonl"):
            path.unlink()


class Manifest:
    """`manifest.json` of a run: for each stage parameters, inputs, outputs, versions, seconds and state."""

    def __init__(self, p: Params) -> None:
        self.p = p
        self.path = p.run_dir / "manifest.json"
        self.stages: dict[str, dict[str, Any]] = {}
        if self.path.is_file():
            try:
                self.stages = json.loads(self.path.read_text())["stages"]
            except (json.JSONDecodeError, KeyError):
                raise SrlibError(f"{self.path} is damaged; remove it, and every stage is done again.") from None

    def complete(self, name: str) -> bool:
        """Whether the stage's last run went through."""
        return self.stages.get(name, {}).get("state") == "complete"

    def unchanged(self, name: str) -> bool:
        """Whether the stage is complete and would do the same again."""
        return self.complete(name) and self._same_key(name) and self.stages[name]["outputs"] == self._outputs(name)

    def resumable(self, name: str) -> bool:
        """Whether the stage's last run ended before its time, and would be the same again."""
        return name in self.stages and not self.complete(name) and self._same_key(name)

    def _same_key(self, name: str) -> bool:
        return all(self.stages[name].get(field) == value for field, value in self._key(name).items())

    def start(self, name: str) -> None:
        self.stages[name] = {"state": "running", **self._key(name)}
        self._write()

    def finish(self, name: str, state: str, seconds: float) -> None:
        record = self.stages[name]
        record.update(state=state, seconds=round(seconds, 1), versions={k: version(k) for k in PACKAGES})
        record["outputs"] = self._outputs(name)
        self._write()

    def _key(self, name: str) -> dict[str, Any]:
        """What decides whether a stage has to run again."""
        stage = STAGES[name]
        values = self.p.model_dump()
        sections = ("seed", "threads", "pair", "data", *stage.sections)
        return {
            "parameters": {section: values[section] for section in sections},
            "notebook": _digest(NOTEBOOKS / f"{name}.ipynb"),
            "inputs": {path: _digest(find(path)) for path in self._inputs(stage)},
        }

    def _inputs(self, stage: Stage) -> list[str]:
        """Files and folders a stage reads, as far as they are here."""
        artefacts = _artefacts(self.p)
        return [here(path) for name in stage.reads for path in artefacts[name].paths if Path(path).exists()]

    def _outputs(self, name: str) -> dict[str, str]:
        """Digest of each file of a stage but its notebook and figures, which a hand may make again."""
        folder = self.p.stage_dir(name)
        files = [f for f in _files(folder) if f.suffix not in (".ipynb", ".png")]
        return {str(f.relative_to(folder)): _digest(f) for f in files}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, {"run": self.p.run, "seed": self.p.seed, "stages": self.stages})


def fingerprint(p: Params, stage: str) -> str:
    """What a stage's results depend on, its notebook apart: parameters and what it reads, as 16 hex digits."""
    key = {name: value for name, value in Manifest(p)._key(stage).items() if name != "notebook"}
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class _Artefact:
    """What stages read: where it lies, how it is checked, and whether the user named it instead."""

    paths: tuple[str | Path, ...]
    check: Callable[[], object]
    given: bool = False


def _artefacts(p: Params) -> dict[str, _Artefact]:
    from srlib.annotate import Annotated

    results = p.where("05_evaluate") / "results.json"
    own_pair = p.pair.small.path is not None and p.pair.big.path is not None
    return {
        "pair": _Artefact((p.small.path, p.big.path), lambda: (engine.check(p.small), engine.check(p.big)), own_pair),
        "traces": _Artefact((p.traces.file or p.traces.path,), lambda: _usable(p.traces), p.data.traces is not None),
        "test": _Artefact((p.test.file or p.test.path,), lambda: _readable(p.test), p.data.test is not None),
        "annotated": _Artefact((p.annotated,), lambda: problems.read_jsonl(p.annotated, Annotated)),
        "adapter": _Artefact(
            (p.tuned.adapter or p.tuned.path,), lambda: engine.check(p.tuned), p.pair.tuned is not None
        ),
        "reinforced": _Artefact((p.reinforced.adapter,), lambda: engine.check(p.reinforced)),
        "results": _Artefact((results,), lambda: _there(results)),
        "sweep": _Artefact((p.run_dir / "sweep.json",), lambda: _there(p.run_dir / "sweep.json")),
    }


def _readable(source: Source) -> None:
    problems.load(source, None if source.file else 1)  # of a data set on the hub one row will do


def _usable(source: Source) -> None:
    if source.columns or not source.file:
        from srlib import traces  # here, as it takes seconds to import what it needs

        traces.load(source, 1, worked=False)  # damaged rows are left out, and one will do
    else:
        _readable(source)


def _there(path: Path) -> None:
    if not path.is_file():
        raise SrlibError(f"There is no {path.name} in {path.parent}.")


def write_json(path: Path, content: object) -> None:
    """Whole or not at all: a temporary file takes the place of the old one."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=1))
    os.replace(part, path)


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder and their names."""
    total = hashlib.sha256()
    for file in _files(path) if path.is_dir() else [path]:
        total.update(str(file.relative_to(path)).encode())
        total.update(hashlib.file_digest(file.open("rb"), "sha256").digest())
    return total.hexdigest()[:16]


def _files(folder: Path) -> list[Path]:
    """All files below a folder, but for those in `IGNORED` ones."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and not IGNORED & set(f.relative_to(folder).parts))


def here(path: str | Path) -> str:
    """A path as the user sees it: from the clone, if it lies in it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _last_screen(p: Params) -> None:
    folder = p.run_dir / "05_evaluate"
    results = folder / "results.json"
    if not results.is_file():
        return
    rows = json.loads(results.read_text())
    print(f"\n{'policy':<16}{'accuracy':>9}  {'95 % interval':<16}{'offload share':>13}{'hand-overs':>11}")
    for row in rows:
        low, high = row["ci95"]
        print(
            f"{row['policy']:<16}{row['accuracy']:>9.1%}  {f'{low:.1%} – {high:.1%}':<16}"
            f"{row['offload_share']:>13.1%}{row['handovers']:>11.2f}"
        )
    first = rows[0]
    print(
        f"{first['dataset']}: n = {first['n_problems']}, {first['samples_per_problem']} sample(s) a problem, "
        f"≤ {first['max_tokens']} tokens\n\nresults  {here(results)}\nfigure   {here(folder / 'accuracy_by_share.png')}"
    )
