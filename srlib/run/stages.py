"""The stages: what each notebook depends on, and the artefacts between them.

`--help` names the stages, so what takes time to import is imported where an artefact is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from typing_extensions import TypedDict

from srlib import SrlibError

if TYPE_CHECKING:
    from srlib.decoding.policies import Policy
    from srlib.params.data import Source
    from srlib.params.models import ModelSpec
    from srlib.params.run import Params

NOTEBOOKS = Path(__file__).resolve().parents[2] / "notebooks"


@dataclass(frozen=True)
class Stage:
    """What a notebook depends on: the params it reads, and artefacts of earlier stages.

    The first is all a notebook reads of them, and what it calls: a test looks through their code. The seed and
    the number of threads count everywhere; where a run lies and what a machine has, nowhere.

    Args:
        settings: sections of the params, or single settings of some.
        reads: names of artefacts.
        sometimes: settings that are read only where the params say so.
    """

    name: str
    settings: tuple[str, ...]
    reads: tuple[str, ...] = ()
    sometimes: dict[str, Callable[[Params], object]] = field(default_factory=dict)


PAIR = ("pair.small", "pair.big")
TUNED = ("pair.small", "pair.tuned", "sft.method")
# The set arith, where the params name it, is that of the section.
TRACES: dict[str, Callable[[Params], object]] = {"arith": lambda p: p.data.traces and p.data.traces.path == "arith"}
TEST: dict[str, Callable[[Params], object]] = {"arith": lambda p: p.data.test and p.data.test.path == "arith"}
APART: dict[str, Callable[[Params], object]] = {"data.test": lambda p: p.kept_apart}
# The adapter that stage 03 lays on a model all of whose weights were trained.
FRESH: dict[str, Callable[[Params], object]] = dict.fromkeys(
    ("sft.lora_rank", "sft.lora_alpha", "sft.lora"), lambda p: p.sft.method == "full"
)
STAGES = {
    stage.name: stage
    for stage in (
        Stage("00_arith_pair", ("arith", *PAIR, "data.test")),
        Stage(
            "01_annotate",
            ("annotate", *PAIR, "data.traces", "data.decontaminate", "offload.hint", "sft.max_length"),
            ("pair", "traces", "test"),
            {"offload": lambda p: p.annotate.tries or "worth" in p.annotate.methods, **TRACES, **APART},
        ),
        Stage(
            "02_sft", ("sft", "offload", "pair.small", "pair.tuned", "data.test"), ("pair", "annotated", "test"), TEST
        ),
        Stage(
            "03_grpo",
            ("grpo", "latency", "offload", *TUNED, "pair.big", "data.traces", "data.decontaminate"),
            ("pair", "adapter", "traces", "test"),
            {**TRACES, **APART, **FRESH},
        ),
        Stage("04_offload", ("offload", *TUNED, "pair.big", "data.test"), ("pair", "adapter", "test"), TEST),
        Stage(
            "05_evaluate",
            ("offload", "evaluate", *TUNED, "pair.big", "data.test"),
            ("pair", "adapter", "reinforced", "test", "traces"),
            {
                "data.traces": lambda p: p.to_tune,
                "data.decontaminate": lambda p: p.to_tune,
                "arith": lambda p: TEST["arith"](p) or (p.to_tune and TRACES["arith"](p)),
            },
        ),
        Stage("06_reward_ablation", (), ("sweep",)),
        Stage(
            "07_latency",
            ("offload", "latency", "bench", *TUNED, "pair.big", "data.test"),
            ("pair", "adapter", "test", "results"),
            TEST,
        ),
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


def settings(p: Params, stage: str) -> list[str]:
    """Sections and settings that a stage reads under these params, by their dotted names."""
    declared = STAGES[stage]
    return ["seed", "threads", *declared.settings, *(key for key, reads in declared.sometimes.items() if reads(p))]


def require(p: Params, stage: str, made_now: Sequence[str] = ()) -> None:
    """Check that all a stage reads is there and whole, before any work.

    Args:
        made_now: stages that run before this one, whose artefacts need not be there yet.

    Raises:
        SrlibError: something is missing or damaged; the sentence names it and the stage that makes it. Or vLLM
            refuses a model's settings, or a library those of a training, or `base` names no stage.
    """
    for name in p.base.stages if p.base else ():
        if name not in STAGES:
            from srlib.params.names import unknown

            raise SrlibError(f"base.stages: {unknown(name, list(STAGES))}")
    for name in needed(p, stage):
        if MAKERS[name] not in made_now or artefacts(p)[name].given:
            require_artefact(p, name, stage)
    try:
        _whole(*_others(p, stage, made_now))
        _passed_on(p, stage)
    except SrlibError as error:
        raise SrlibError(f"{stage}: {error}") from None


def own_of(p: Params, stage: str) -> list[str]:
    """What a stage uses of the user's own, as `path.py:name`; the files are part of what it depends on."""
    from srlib.params.own import named

    names: dict[str, list[str]] = {
        "01_annotate": [p.annotate.method],
        "03_grpo": [*p.grpo.reward_weights],
        "05_evaluate": [*p.evaluate.policies],
    }
    return [name for name in names.get(stage, []) if named(name)]


def _own_policies(p: Params) -> list[Policy]:
    names = own_of(p, "05_evaluate")
    if not names:
        return []
    from srlib.decoding import policies

    return [policies.named(name) for name in names]


def _passed_on(p: Params, stage: str) -> None:
    """Have the libraries check what a training passes on to them; where that is nothing they are not imported.

    And see to it that what is the user's own can be used.
    """
    if own_of(p, "01_annotate") and stage == "01_annotate":
        from srlib.annotation import own

        own.annotator(p.annotate.method)
    if stage == "03_grpo":
        for name in own_of(p, stage):
            from srlib.training import rewards

            rewards.named(name)
    if stage == "02_sft" and (p.sft.trainer or p.sft.lora or p.sft.report_to != "none"):
        from srlib.training import sft

        sft.check(p)
    if stage == "03_grpo" and (p.grpo.trainer or p.grpo.report_to != "none"):
        from srlib.training import grpo

        grpo.check(p)


def _others(p: Params, stage: str, made_now: Sequence[str]) -> list[ModelSpec]:
    """Models that a stage loads and no artefact names: a judge; the copy that writes rollouts, if its base is there."""
    if stage == "01_annotate" and p.annotate.method == "judge" and p.annotate.judge.local is not None:
        return [p.annotate.judge.local]
    there = MAKERS["pair"] not in made_now or artefacts(p)["pair"].given
    if stage == "03_grpo" and p.grpo.use_vllm and there:
        return [p.rollout_small.model_copy(update={"path": p.small.path, "adapter": None})]
    return []


def needed(p: Params, stage: str) -> list[str]:
    """The artefacts that a stage reads under these params.

    Stage 05 needs no model that no policy writes with, and no traces to tune nothing; 01 and 03 need test problems only
    to keep traces apart from them.
    """
    idle: set[str] = set()
    if stage == "05_evaluate":
        policies: set[str] = {*p.evaluate.policies}
        if any(policy.tags for policy in _own_policies(p)):
            policies.add("learned")  # it writes with the tuned model, too
        idle = {name for name, with_it in WRITTEN_WITH.items() if not policies & with_it}
        idle |= set() if p.to_tune else {"traces"}
    if stage in ("01_annotate", "03_grpo") and not p.kept_apart:
        idle = {"test"}
    return [name for name in STAGES[stage].reads if name not in idle]


def require_artefact(p: Params, name: str, reader: str) -> None:
    """Check that one artefact is there and whole; the error names its `reader` and what makes it.

    Raises:
        SrlibError: it is not.
    """
    artefact, maker = artefacts(p)[name], MAKERS[name]
    try:
        artefact.check()
    except SrlibError as error:
        mend = f" Stage {maker} makes it: python -m srlib run … --only {maker}"
        if maker not in STAGES:
            mend = " This makes it: python -m srlib sweep params/ablations/latency.yaml"
        raise SrlibError(f"{reader}: {error}{'' if artefact.given else mend}") from None


@dataclass(frozen=True)
class Artefact:
    """What stages read: where it lies, how it is checked, and whether the user named it instead."""

    paths: tuple[str | Path, ...]
    check: Callable[[], object]
    given: bool = False


def artefacts(p: Params) -> dict[str, Artefact]:
    from srlib.data import problems
    from srlib.data.rows import Annotated, read_jsonl

    results, completions = (p.where("05_evaluate") / name for name in ("results.json", "completions"))
    merged = p.learner.path if p.pair.small.adapter is not None else None
    tuned = (p.tuned.path,) if p.tuned.adapter is None else (p.tuned.adapter, merged)
    own_pair = p.pair.small.path is not None and p.pair.big.path is not None
    return {
        "pair": Artefact(_named(p.small.path, p.small.adapter, p.big.path), lambda: _whole(p.small, p.big), own_pair),
        "traces": Artefact((p.traces.file or p.traces.path,), lambda: problems.traces(p, 1), p.data.traces is not None),
        "test": Artefact((p.test.file or p.test.path,), lambda: _readable(p.test), p.data.test is not None),
        "annotated": Artefact((p.annotated,), lambda: read_jsonl(p.annotated, Annotated), p.sft.annotated is not None),
        "adapter": Artefact(_named(*tuned), lambda: _whole(p.tuned), p.pair.tuned is not None),
        "reinforced": Artefact(_named(p.reinforced.adapter), lambda: _whole(p.reinforced)),
        "results": Artefact((results, completions), lambda: _measured(results, completions)),
        "sweep": Artefact((p.run_dir / "sweep.json",), lambda: _there(p.run_dir / "sweep.json")),
    }


def _named(*paths: str | None) -> tuple[str, ...]:
    """Those of `paths` that are set."""
    return tuple(path for path in paths if path is not None)


def _whole(*specs: ModelSpec) -> None:
    from srlib import engine

    for spec in specs:
        engine.check(spec)


def _readable(source: Source) -> None:
    from srlib.data import problems

    problems.load(source, None if source.file else 1)  # of a data set on the hub one row will do


def _there(path: Path) -> None:
    if not path.is_file():
        raise SrlibError(f"There is no {path.name} in {path.parent}.")


class Measured(TypedDict):
    """What every row of results has."""

    policy: str


def _measured(results: Path, completions: Path) -> None:
    from srlib.data.rows import read_json, read_jsonl

    _there(results)
    rows = read_json(results, list[Measured], "make it again")
    if not rows:
        raise SrlibError(f"{results} holds no row.")
    for row in rows:
        read_jsonl(completions / f"{row['policy']}.jsonl", dict)
