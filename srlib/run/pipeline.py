"""Run the notebooks in order through papermill: manifest, skips, and one line a stage.

A stage is a notebook. It is skipped when its parameters, its notebook, the code it uses and the
artefacts it reads are those of its last complete run and what it wrote is still as it was. A stage
that fails or is killed is not complete; it runs again, and finds its folder as it left it if
nothing it depends on has changed (a checkpoint is taken up), else empty but for journals.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from contextlib import ExitStack, suppress
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from srlib import SrlibError, visible
from srlib.cost import memory
from srlib.data import journal
from srlib.data.rows import read_json, unwritten
from srlib.params import Params, from_notebook, nearest
from srlib.params.paths import ROOT, here
from srlib.run import locks
from srlib.run.manifest import PACKAGES, Manifest
from srlib.run.stages import MAKERS, NOTEBOOKS, STAGES, artefacts, needed, require


def begin(stage: str, scope: dict[str, Any]) -> tuple[Params, Path]:
    """First line of every notebook: parameters, checks, seed, versions.

    Args:
        stage: name of the notebook.
        scope: its `globals()`, with what the `parameters` cell and papermill put there.

    Returns:
        the parameters, and the folder for the stage's artefacts.

    Raises:
        SrlibError: a bad parameter, an artefact of an earlier stage is missing or damaged, a run or another
            notebook is at work there, or the models do not fit.
    """
    p = from_notebook(scope)
    base = (ROOT / p.base.folder, p.base.stages) if p.base is not None else ()
    by_hand = locks.begin(p.run_dir, stage, *base)
    require(p, stage)
    manifest = Manifest(p) if by_hand else None  # a run looks after its own
    if manifest:
        manifest.check_inputs(stage)
    memory.check(p, stage)
    if manifest:
        manifest.by_hand(stage)
    import torch
    from transformers import set_seed

    if p.threads:
        torch.set_num_threads(p.threads)
    set_seed(p.seed)
    packages = ", ".join(f"{name} {version(name)}" for name in ("srlib", *PACKAGES))
    print(f"run {p.run}, seed {p.seed}, {torch.get_num_threads()} thread(s)\n{packages}")
    return p, p.stage_dir(stage)


def run(
    p: Params, first: str | None = None, only: str | None = None, until: str | None = None, dry: bool = False
) -> int:
    """Run the stages, but those that `base` has done; returns the exit status.

    Args:
        first: redo from this stage on.
        only: redo this stage alone.
        until: end with this stage.
        dry: say what would run and why; nothing is run, and nothing written.

    Raises:
        SrlibError: no such stage, an input is missing or damaged (before any stage runs), or another
            process is at work there.
    """
    chosen = choose(p, first, only, until)
    with ExitStack() as held:
        if not dry:
            held.enter_context(locks.writing(p.run_dir, "srlib run"))
            if p.base is not None:
                held.enter_context(locks.reading(ROOT / p.base.folder, p.base.stages))
        return _run(p, chosen, first, only, dry)


def _run(p: Params, chosen: list[str], first: str | None, only: str | None, dry: bool) -> int:
    """`run` of stages, in a folder that is held."""
    manifest = Manifest(p)
    to_make: list[str] = []
    for name in chosen:
        # What a complete stage left behind is checked too: a damaged file is reported, not built on.
        require(p, name, to_make)
        manifest.check_inputs(name, chosen)
        memory.check(p, name)
        if first or only or not manifest.complete(name):
            to_make.append(name)
    print(f"{p.run}: {', '.join(chosen)} → {here(p.run_dir)}", flush=True)
    asked = ["asked for (--only)"] if only else [f"asked for (--from {first})"] if first else []
    made_new: list[str] = []  # in a dry run, as if
    for name in chosen:
        causes = asked or manifest.why(name)
        if dry and not asked:
            found = artefacts(p)
            makers = {MAKERS[artefact] for artefact in STAGES[name].reads if not found[artefact].given}
            causes += [f"after {earlier}" for earlier in made_new if earlier in makers]
        if not causes:
            seconds = f"{manifest.stages[name]['seconds']:.0f} s when it ran"
            print(f"{name:<16} {f'unchanged ({seconds})' if dry else f'unchanged, skipped ({seconds})'}", flush=True)
            continue
        made_new.append(name)
        print(f"{name:<16} {'would run' if dry else 'runs'}: {visible(_told(causes))}", flush=True)
        if not dry and not run_stage(p, name, manifest):
            return 1
    if not dry and "05_evaluate" in chosen:  # else what is there may be as old as it likes
        _last_screen(p)
    return 0


def choose(p: Params, first: str | None = None, only: str | None = None, until: str | None = None) -> list[str]:
    """The stages that are asked for and have something to do, in order."""
    for name in (first, only, until):
        if name is not None and name not in STAGES:
            near = nearest(name, list(STAGES))
            raise SrlibError(f"There is no stage {name!r}{f'; did you mean {near!r}?' if near else '.'}")
    if only:
        return [name for name in (only,) if name not in p.left_out]
    idle = {*p.left_out, *(p.base.stages if p.base else [])}
    if p.sft.annotated is not None:  # nothing would read what it makes
        idle.add("01_annotate")
    if "grpo" not in p.evaluate.policies and first != "03_grpo":  # nor here
        idle.add("03_grpo")
    if not (p.run_dir / "sweep.json").is_file():  # there is nothing to compare
        idle |= {name for name, stage in STAGES.items() if "sweep" in stage.reads}
    found = artefacts(p)
    read = {artefact for name in STAGES if name not in idle for artefact in needed(p, name)}
    if all(found[name].given for name in read if MAKERS[name] == "00_arith_pair"):
        idle.add("00_arith_pair")  # all that is read of what it would make is given
    names = list(STAGES)
    asked = names[names.index(first or names[0]) : names.index(until or names[-1]) + 1]
    return [name for name in asked if name not in idle]


def _told(causes: list[str]) -> str:
    """The first few of them."""
    more = [f"and {len(causes) - 3} more"] if len(causes) > 3 else []
    return "; ".join(causes[:3] + more)


def run_stage(p: Params, name: str, manifest: Manifest) -> bool:
    """Execute one notebook; returns whether it went through.

    Raises:
        KeyboardInterrupt: it was interrupted. The manifest has it as stopped, and the notebook is kept as far
            as it was executed.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError

    folder = p.stage_dir(name)
    journal.check_idle(folder)
    if not manifest.resumable(name):
        _clear(folder)
    executed = folder / f"{name}.ipynb"
    manifest.start(name)
    start = time.perf_counter()
    logging.getLogger("papermill").setLevel(logging.ERROR)  # it warns of each section: the notebook checks their names
    try:
        papermill.execute_notebook(
            NOTEBOOKS / f"{name}.ipynb",
            executed,
            parameters=p.model_dump(),
            cwd=NOTEBOOKS,
            kernel_name="python3",
            # The kernel's own notes, such as on the interrupt with which it is ended, are nobody's concern.
            extra_arguments=["--log-level=CRITICAL"],
            progress_bar={"desc": name, "leave": False, "disable": not sys.stderr.isatty()},
        )
        seconds = time.perf_counter() - start
        manifest.finish(name, "complete", seconds)
    except (papermill.PapermillExecutionError, DeadKernelError) as error:
        with suppress(SrlibError):  # of a full disk, which would hide the error in hand
            manifest.finish(name, "failed", time.perf_counter() - start)
        print(f"{name:<16} failed after {time.perf_counter() - start:.0f} s", flush=True)
        print(f"{name}: {visible(_cause(error, folder))}\nThe executed notebook is {here(executed)}", file=sys.stderr)
        return False
    except BaseException as error:
        with suppress(SrlibError):
            manifest.finish(name, "stopped", time.perf_counter() - start)
        if isinstance(error, OSError):  # papermill writes the notebook
            raise unwritten(error, here(executed)) from None
        raise
    print(f"{name:<16} done in {seconds:.0f} s", flush=True)
    return True


def _cause(error: Exception, folder: Path) -> str:
    """What ended a notebook, in a line: that nothing can be written in `folder`, whatever a library made of it, or `error`."""
    import papermill

    try:
        with TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))
    except OSError as full:
        return str(unwritten(full, here(folder)))
    told = f"its kernel ended: {error}"
    if isinstance(error, papermill.PapermillExecutionError):  # it tells of what was raised in a cell, and is not it
        told = f"{error.ename}: {error.evalue}"
    return told.strip().splitlines()[0]


def _clear(folder: Path) -> None:
    """Empty a stage's folder, but for journals: they are named after all that decides what is in them."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.match("*.journal.jsonl"):
            path.unlink()


def _last_screen(p: Params) -> None:
    folder = p.run_dir / "05_evaluate"
    results = folder / "results.json"
    rows = read_json(results, list[dict[str, Any]])
    print(f"\n{'policy':<16}{'accuracy':>9}  {'95 % interval':<16}{'offload share':>13}{'hand-overs':>11}")
    for row in rows:
        low, high = row["ci95"]
        print(
            f"{visible(row['policy']):<16}{row['accuracy']:>9.1%}  {f'{low:.1%} – {high:.1%}':<16}"
            f"{row['offload_share']:>13.1%}{row['handovers']:>11.2f}"
        )
    first = rows[0]
    print(
        f"{visible(first['dataset'])}: n = {first['n_problems']}, {first['samples_per_problem']} sample(s) a problem, "
        f"≤ {first['max_tokens']} tokens\n\nresults  {here(results)}\nfigure   {here(folder / 'accuracy_by_share.png')}"
    )
