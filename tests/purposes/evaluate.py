"""The section `evaluate`: what notebook 05 has written, and how often."""

import inspect
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from srlib import Offloader, engine
from srlib.data import problems
from srlib.decoding.policies import Learned, Unsure
from srlib.engine.transformers import TransformersEngine
from srlib.evaluation import completions, counterfactual, tuning
from srlib.evaluation.stats import Estimate
from srlib.evaluation.tuning import Tuned
from tests.cells import run_cells
from tests.purposes import Case, shows

LEARNED_SHARE = 0.25


def measured(case: Case, test: str = "arith", cells: Sequence[str] = (), **settings: Any) -> list[dict[str, Any]]:
    """What notebook 05 measures: for each row its policy, and how it is written."""
    found: list[dict[str, Any]] = []

    def run(small: Any, big: Any, policy: Any, test: list, config: Any, **how: Any) -> tuple[dict, list]:
        found.append({"policy": policy, "n": len(test), "config": config, **how})
        return {"policy": policy.name, "offload_share": LEARNED_SHARE}, []

    changes = {"data.test": test, **{f"evaluate.{name}": value for name, value in settings.items()}}
    if settings.get("samples_per_problem"):
        changes["offload.temperature"] = 1.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load", lambda *_: None)
        patch.setattr(completions, "run", run)
        if test != "arith":  # it is on the hub
            patch.setattr(problems, "load", lambda source, n, seed: [None] * (n or 500))
        scope = {"p": case.params(changes), "folder": case.folder, "fingerprint": lambda *_: ""}
        run_cells(
            "05_evaluate",
            scope,
            *("protocol(p)", "def measure(", "measure(p.tuned", 'measure(p.small,\n        ("random', *cells),
        )
    return found


def policies(case: Case, **settings: Any) -> dict[str, Any]:
    return {row["policy"].name: row["policy"] for row in measured(case, **settings)}


def stretches(case: Case, policy: Any) -> list[Any]:
    """Of the big model, in traces that the policy has written."""
    engines = [TransformersEngine(model, case.fixture("tokenizer")) for model in case.fixture("pair")]
    traces = Offloader(*engines, policy, max_tokens=60).run(case.fixture("prompts")[:8])
    return [handover for trace in traces for handover in trace.handovers]


@shows("evaluate.protocol")
def how_accuracies_are_published(case: Case) -> None:
    for protocol, samples, tokens, n in (("published", 4, 32_768, 500), ("quick", 1, 4096, 50)):
        (row,) = measured(case, "math500", protocol=protocol, policies=["small"])
        config = row["config"]
        assert (row["samples"], config.max_tokens, row["n"]) == (samples, tokens, n)
        assert (config.temperature, config.top_p) == (0.6, 0.95)


@shows("evaluate.n_problems")
def problems_each_policy_writes(case: Case) -> None:
    assert {row["n"] for row in measured(case, n_problems=7)} == {7}


@shows("evaluate.samples_per_problem")
def traces_of_a_problem(case: Case) -> None:
    assert {row["samples"] for row in measured(case, samples_per_problem=3)} == {3}


@shows("evaluate.policies")
def which_policies_write(case: Case) -> None:
    some = ["speculative", "grpo", "learned_off", "small"]
    assert set(policies(case, policies=some)) == set(policies(case, policies=some[::-1])) == set(some)
    mine = case.folder / "mine.py"
    mine.write_text("from srlib.decoding.policies import Never\nwaits = Never('waits')\n")
    assert set(policies(case, policies=["small", f"{mine}:waits"])) == {"small", "waits"}


@shows("evaluate.random_shares")
def points_of_the_random_curve(case: Case) -> None:
    shares = {x.name: x.share for x in policies(case, random_shares=[0.15, 0.5]).values() if "random" in x.name}
    assert shares == {"random_0.15": 0.15, "random_0.50": 0.5, "random_matched": LEARNED_SHARE}


@shows("evaluate.random_chunk")
def tokens_in_a_row(case: Case) -> None:
    found = policies(case, random_chunk=3)
    spans = [span for span in stretches(case, found["random_0.20"]) if span.closed_by == "chunk"]
    assert spans and {span.tokens % 3 for span in spans} == {0}


@shows("evaluate.rejections")
def points_of_the_rejection_curve(case: Case) -> None:
    found = policies(case, rejections=[0.3, 0.9]).values()
    assert {x.name: x.reject for x in found if "rejection" in x.name} == {"rejection_0.30": 0.3, "rejection_0.90": 0.9}
    few, many = (len(stretches(case, Learned(reject))) for reject in (0.9, 0.0))
    assert few < many


def tuned(case: Case, **settings: Any) -> dict[str, Any]:
    """What notebook 05 hands to `tuning.tune`, by name."""
    given: dict[str, Any] = {}
    taken = inspect.signature(tuning.tune)

    def tune(*args: Any) -> list[Any]:
        given.update(taken.bind(*args).arguments)
        return [Tuned(Unsure(x, 1.0, 2, x), 0.2, Estimate(0.5, 0.4, 0.6, 8, 1)) for x in given["names"]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "tune", tune)
        patch.setattr(problems, "traces", lambda p, n: [None] * n)
        measured(case, cells=["tuning.tune("], **settings)
    return given


@shows("evaluate.chunks")
def tokens_where_the_small_model_is_unsure(case: Case) -> None:
    assert tuned(case, chunks=[3, 5])["chunks"] == [3, 5]


@shows("evaluate.n_tuned")
def problems_that_thresholds_are_set_by(case: Case) -> None:
    assert len(tuned(case, n_tuned=11)["problems"]) == 11


@shows("evaluate.draft_tokens")
def tokens_of_a_draft(case: Case) -> None:
    written: list[int] = []

    class Drafts(TransformersEngine):
        def submit(self, request: Any) -> Any:
            written.append(request.max_new)
            return super().submit(request)

    small, big = (
        kind(m, case.fixture("tokenizer")) for kind, m in zip((Drafts, TransformersEngine), case.fixture("pair"))
    )
    policy = policies(case, draft_tokens=2)["speculative"]
    Offloader(small, big, policy, max_tokens=20).run(case.fixture("prompts")[:4])
    assert max(written) == 2


@shows("evaluate.n_refused")
def problems_whose_requests_are_refused(case: Case) -> None:
    asked: list[str] = []

    def run(small: Any, big: Any, policy: Any, test: list, records: list[dict], *_: Any, **how: Any) -> list:
        asked.extend(record["id"] for record in records)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load", lambda *_: None)
        patch.setattr(counterfactual, "run", run)
        for n in (3, 0):
            scope = {"p": case.params({"evaluate.n_refused": n}), "folder": case.folder, "engine": engine}
            scope |= {"test": [SimpleNamespace(key=str(i)) for i in range(9)], "slots": 1, "big": None, "how": Mock()}
            scope |= {"records": {"learned": [{"id": str(i)} for i in range(9)]}, "Learned": Learned}
            run_cells("05_evaluate", scope, "counterfactual.run(")
            assert asked == ["0", "1", "2"]
