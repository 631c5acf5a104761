"""The section `bench`: what `python -m srlib bench` measures."""

from typing import Any

import pytest

from srlib.cost import latency, speed
from srlib.data.rows import Problem, write_jsonl
from srlib.decoding.scheduler import Offloader
from srlib.run import bench
from tests.purposes import Case, shows
from tests.purposes.latency import against_the_clock

COSTS = latency.Speed(1.0, 1.0)  # in place of measured ones, which take longer than what is shown here


def measured(case: Case, **settings: Any) -> tuple[list[dict[str, Any]], list[tuple[Offloader, int]]]:
    """The rows of a measurement, and each run of it: who wrote, and how many prompts."""
    small, big = case.fixture("folders")
    test = case.folder / "test.jsonl"
    write_jsonl(test, [Problem(id=str(i), prompt=f"{i}+2?", answer="3") for i in range(4)])
    changes = {"pair.small.path": small, "pair.big.path": big, "data.test": str(test)}
    least: dict[str, Any] = {
        "batch_sizes": [1],
        "min_traces": 1,
        "traces_per_slot": 1,
        "max_tokens": 4,
        "policies": ["random"],
    }
    changes |= {f"bench.{name}": value for name, value in {**least, **settings}.items()}
    runs: list[tuple[Offloader, int]] = []
    measure = bench._measure

    def noted(writer: Offloader, prompts: list) -> dict[str, float]:
        runs.append((writer, len(prompts)))
        return measure(writer, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "_measure", noted)
        rows = bench.run(case.params(changes))["rows"]
    return rows, runs


def policy(runs: list[tuple[Offloader, int]], name: str) -> Any:
    return next(writer.policy for writer, _ in runs if writer.policy.name == name)


@shows("bench.policies")
def policies_beside_each_alone(case: Case) -> None:
    rows, _ = measured(case, policies=["speculative"])
    assert [row["policy"] for row in rows] == ["small", "big", "speculative", "generate"]


@shows("bench.batch_sizes")
def batches_one_after_the_other(case: Case) -> None:
    rows, runs = measured(case, batch_sizes=[2, 3], policies=[], max_tokens=2)
    assert {row["batch"] for row in rows} == {writer.batch_size for writer, _ in runs} == {2, 3}


@shows("bench.repeats")
def rounds(case: Case) -> None:
    _, runs = measured(case, repeats=2)
    assert len(runs) == 3 * (1 + 2)  # of three policies, one to warm up
    assert against_the_clock(case, {"bench.repeats": 2})[0][6] == 2


@shows("bench.max_tokens")
def most_tokens_of_a_trace(case: Case) -> None:
    rows, runs = measured(case, max_tokens=3, traces_per_slot=4)
    assert {writer.max_tokens for writer, _ in runs} == {3}
    assert all(row["small_tokens"] + row.get("big_tokens", 0) <= 4 * 3 for row in rows)
    for most in (3, 99):
        settings = against_the_clock(case, {"bench.max_tokens": most, "offload.max_tokens": 48})[0][3]
        assert settings["max_tokens"] == min(most, 48)


@shows("bench.traces_per_slot")
def traces_of_a_place(case: Case) -> None:
    _, runs = measured(case, batch_sizes=[2], traces_per_slot=3, policies=[])
    assert {n for _, n in runs} == {6}


@shows("bench.min_traces")
def traces_at_least(case: Case) -> None:
    _, runs = measured(case, min_traces=5, policies=[])
    assert {n for _, n in runs} == {5}


@shows("bench.random_share", "bench.random_chunk", "bench.draft_tokens")
def how_the_policies_write(case: Case) -> None:
    name = case.key.removeprefix("bench.")
    value = 0.6 if name == "random_share" else 3
    who, what = name.split("_")
    _, runs = measured(case, policies=["random", "speculative"], **{name: value})
    if who == "draft":
        assert policy(runs, "speculative").draft == value
    else:
        assert getattr(policy(runs, "random"), what) == value
        assert getattr(against_the_clock(case, {case.key: value})[0][4][-1], what) == value


def at_costs(case: Case, changes: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Offloader], list[int]]:
    """The rows of the measured speed-up, who wrote them in the order of writing, and how many prompts each had."""
    small, big = case.fixture("folders")
    test = case.folder / "test.jsonl"
    write_jsonl(test, [Problem(id=str(i), prompt=f"{i}+2?", answer="3") for i in range(4)])
    least = {"bench.batch_sizes": [], "bench.speed_batches": [1], "bench.speed_traces": 2, "bench.cost_ratios": [1.0]}
    least |= {"bench.max_tokens": 4, "bench.repeats": 1, "pair.tuned.path": small, "pair.big.path": big}
    wrote: list[Offloader] = []
    numbers: list[int] = []
    write = Offloader.run

    def noted(writer: Offloader, prompts: list) -> list:
        wrote.append(writer)
        numbers.append(len(prompts))
        return write(writer, prompts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Offloader, "run", noted)
        patch.setattr(speed, "dial", lambda *_: speed.Dial(1.0, 1.0, 1.0))
        patch.setattr(speed, "_costs", lambda *_: (None, (COSTS, COSTS)))
        patch.setattr(speed, "_predicted", lambda *_: 1.0)
        rows = bench.run(case.params({**least, "data.test": str(test), **changes}))["speed"]
    return rows, wrote, numbers


@shows("bench.cost_ratios")
def costs_of_the_big_model(case: Case) -> None:
    rows, *_ = at_costs(case, {"bench.cost_ratios": [1.0, 3.0]})
    assert [(row["ratio"], row["layers"]) for row in rows if row["policy"] == "big"] == [(1.0, 0), (3.0, 2)]


@shows("bench.speed_batches")
def batches_at_each_cost(case: Case) -> None:
    rows, wrote, _ = at_costs(case, {"bench.speed_batches": [2, 3]})
    assert {row["batch"] for row in rows} == {writer.batch_size for writer in wrote} == {2, 3}


@shows("bench.speed_traces")
def traces_at_each_cost(case: Case) -> None:
    assert set(at_costs(case, {"bench.speed_traces": 7})[2]) == {7}


@shows("bench.stream_chunk")
def reading_along_at_each_cost(case: Case) -> None:
    _, wrote, _ = at_costs(case, {"bench.stream_chunk": 3})
    assert {writer.stream_chunk for writer in wrote} == {3}


@shows("bench.peek_tokens")
def looking_as_the_public_code_does(case: Case) -> None:
    _, wrote, _ = at_costs(case, {"bench.peek_tokens": 3})
    assert policy([(writer, 0) for writer in wrote], "published").peek == 3
