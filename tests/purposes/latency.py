"""The section `latency`: the reward's seconds, and what notebook 07 simulates."""

from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from srlib import engine
from srlib.cost import costs, latency, planning, speed
from srlib.cost.latency import TABLES, PairSpeed, Speed
from srlib.data.rows import read_json
from tests.cells import run_cells
from tests.purposes import Case, shows


class _Simulated(Exception):
    """Raised in place of a simulation, with its pipeline."""

    @classmethod
    def by(cls, pipeline: Any, **_: Any) -> None:
        raise cls(pipeline)


def speeds(case: Case, **settings: Any) -> PairSpeed:
    """The latency model of the reward."""
    return latency.pair_speed(case.params({f"latency.{name}": value for name, value in settings.items()}).latency)


def simulated(case: Case, **settings: Any) -> list[dict[str, Any]]:
    """What notebook 07 simulates under load: for each, the pipeline and how it is asked."""
    found: list[dict[str, Any]] = []
    p = case.params({f"latency.{name}": value for name, value in settings.items()})

    def simulate(pipeline: Any, **asked: Any) -> Any:
        found.append({"pipeline": pipeline, **asked})
        return SimpleNamespace(per_request=1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "simulate", simulate)
        patch.setattr(
            planning,
            "groups",
            lambda *_: [planning.Group("g", 2, 8, 1.0, 1.0, {"small": 1.0, "big": 1.0}, p.latency.devices, 1)],
        )
        scope = {"p": p, "share": 0.1, "planning": planning, "folder": case.folder, "figures": Mock()}
        run_cells("07_latency", scope, "costs.roofline(", "planning.groups(", "latency_by_load(")
    return found


def planned(case: Case, **settings: Any) -> tuple[tuple, list[dict[str, Any]]]:
    """What notebook 07 asks of its groups of GPUs, and the rows of its plan with three groups as they may be."""
    asked: list[Any] = []
    some = [planning.Group(name, n, 8, float(n), 1.0, {"small": 1.0, "big": 1.0}) for name, n in (("a", 2), ("b", 3))]

    def groups(*given: Any) -> list[planning.Group]:
        asked.extend(given)
        return [*some, planning.Group("alone", 1, 8, 0.5, 1.0, {"small": 0.0, "big": 1.0})]

    p = case.params({f"latency.{name}": value for name, value in settings.items()})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "groups", groups)
        scope: dict[str, Any] = {"p": p, "share": 0.1, "folder": case.folder, "planning": planning}
        exec("from srlib.data.rows import write_json", scope)
        run_cells("07_latency", scope, "costs.roofline(", "planning.groups(", "planning.plan(")
    return tuple(asked), scope["rows"]


@shows("latency.source")
def where_seconds_come_from(case: Case) -> None:
    table, sheet = speeds(case, source="a6000", gpu="a6000"), speeds(case, source="roofline", gpu="a6000")
    assert table.big.decode == 1 / TABLES["a6000"]["32B"][0]
    assert sheet.big.decode == costs.roofline("a6000", "32B").seconds(1, 1)
    p = case.params({"latency.source": "calibrate"})
    assert latency.pair_speed(p.latency, Speed(1, 2), Speed(3, 4)) == PairSpeed(Speed(1, 2), Speed(3, 4))


@shows("latency.small", "latency.big")
def which_models_stand_for_the_pair(case: Case) -> None:
    side = case.key.removeprefix("latency.")
    for size in ("7B", "8B", "70B"):
        assert getattr(speeds(case, **{side: size}), side).decode == 1 / TABLES["a6000"][size][0]
        sheet = speeds(case, source="roofline", **{side: size})
        assert getattr(sheet, side).decode == costs.roofline("h100", size).seconds(1, 1)
        assert getattr(simulated(case, **{side: size})[0]["pipeline"], side) == costs.roofline("h100", size)


@shows("latency.gpu")
def whose_data_sheet_it_is(case: Case) -> None:
    assert speeds(case, source="roofline", gpu="l40s").big.decode == costs.roofline("l40s", "32B").seconds(1, 1)
    assert simulated(case, gpu="l40s")[0]["pipeline"].small == costs.roofline("l40s", "1.5B")
    assert planned(case, gpu="l40s")[0][0] == "l40s"


@shows("latency.devices")
def gpus_of_the_big_model(case: Case) -> None:
    several = costs.roofline("h100", "32B", 8)
    assert speeds(case, source="roofline", devices=8).big.decode == several.seconds(1, 1)
    pipeline = simulated(case, devices=8)[0]["pipeline"]
    assert (pipeline.small, pipeline.big) == (costs.roofline("h100", "1.5B"), several)
    assert planned(case, devices=8)[0][4] == [1, 2, 4, 8]


@shows("latency.handover_s")
def seconds_of_a_handover(case: Case) -> None:
    free = latency.pair_speed(case.params().latency).seconds(10, 100, 5, 3)
    assert speeds(case, handover_s=0.5).seconds(10, 100, 5, 3) == pytest.approx(free + 3 * 0.5)
    assert {each["pipeline"].switch_s for each in simulated(case, handover_s=0.5)} == {0.25}
    asked = planned(case, handover_s=0.5)[0]
    with pytest.raises(_Simulated) as simulated_group, pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "simulate", _Simulated.by)
        planning.group("h100", "1.5B", "32B", asked[3], 1, 1)
    assert simulated_group.value.args[0].switch_s == 0.25


@shows("latency.prompt", "latency.decode", "latency.span")
def what_is_asked_in_what_is_simulated(case: Case) -> None:
    name = case.key.removeprefix("latency.")
    assert {each[name] for each in simulated(case, **{name: 77})} == {77}
    assert getattr(planned(case, **{name: 77})[0][3], name) == 77


@shows("latency.gpu_hour")
def what_an_hour_costs(case: Case) -> None:
    for price in (1.0, 3.0):
        (row, *_) = planned(case, gpu_hour=price)[1]
        assert row["a thousand problems"] == pytest.approx(1000 / row["problems / s"] * row["GPUs"] / 3600 * price)


@shows("latency.gpus")
def how_many_gpus_are_planned_for(case: Case) -> None:
    rows = planned(case, gpus=[2, 7])[1]
    assert [(row["GPUs"], row["groups"]) for row in rows if row["groups"][-6:] != "alone)"] == [
        (2, "1 × (a)"),
        (7, "3 × (a)"),
    ]


@shows("latency.n_check")
def problems_against_the_clock(case: Case) -> None:
    (_, _, prompts, *_), rows = against_the_clock(case, {"latency.n_check": 5})
    assert len(prompts) == 5 and rows == [{"ratio": 1.0}]


def against_the_clock(case: Case, changes: dict[str, Any]) -> tuple[tuple, list[dict[str, Any]]]:
    """How notebook 07 has its predictions checked, and the rows it keeps of that."""
    asked: list[tuple] = []

    def check(*given: Any) -> list[dict]:
        asked.append(given)
        return [{"ratio": 1.0}]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "load", lambda *_: SimpleNamespace(running=False))
        patch.setattr(latency, "check", check)
        p = case.params({**changes, "data.test": "arith"})
        scope = {"p": p, "folder": case.folder, "latency": latency}
        exec("from srlib.show import timing\nfrom srlib.show.tables import table", scope)
        run_cells("07_latency", scope, "latency.check(")
    return asked[0], read_json(case.folder / "check.json", list)


@shows("latency.cost_ratios")
def costs_that_are_measured(case: Case) -> None:
    asked: list[tuple] = []
    p = case.params({"latency.cost_ratios": [3.0]})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "run", lambda *given, **_: asked.append(given) or [])
        scope = {
            "p": p,
            "folder": case.folder,
            "small": SimpleNamespace(running=False),
            "big": SimpleNamespace(running=False),
        }
        exec(
            "from srlib.data.rows import write_json\nfrom srlib.show import timing\nfrom srlib.show.tables import table",
            scope,
        )
        run_cells("07_latency", scope, "speed.run(")
    assert asked == [(p, [3.0], p.latency.n_check)]
