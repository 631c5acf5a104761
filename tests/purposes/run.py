"""What stands above the sections, and `base` and `hardware`."""

import random
from typing import Any

import pytest
import torch

from srlib import SrlibError
from srlib.cost import hours, memory
from srlib.cost.costs import roofline
from srlib.params import Params
from srlib.run import pipeline
from tests.purposes import Case, shows


def begun(p: Params) -> tuple[Params, Any]:
    """The first line of a notebook, as papermill has it run."""
    values = p.model_dump()
    cell = "".join(["# Parameters\n", *(f"{name} = {value!r}\n" for name, value in values.items())])
    return pipeline.begin("00_arith_pair", {"In": [cell], **values})


@shows("run", "outputs")
def the_folder_of_a_run(case: Case) -> None:
    value = "mine" if case.key == "run" else str(case.folder / "elsewhere")
    _, folder = begun(case.params({case.key: value}))
    wanted = case.folder / "mine" if case.key == "run" else case.folder / "elsewhere" / "smoke"
    assert folder == wanted / "00_arith_pair" and folder.is_dir()


@shows("seed")
def every_draw(case: Case) -> None:
    begun(case.params({"seed": 7}))
    drawn = torch.rand(3), random.random()
    begun(case.params({"seed": 7}))
    assert torch.equal(torch.rand(3), drawn[0]) and random.random() == drawn[1]
    assert torch.initial_seed() == 7


@shows("threads")
def threads_of_torch(case: Case) -> None:
    try:
        begun(case.params({"threads": 2}))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


@shows("base.folder", "base.stages")
def what_another_run_has_done(case: Case) -> None:
    other = case.folder / "other"
    try:
        p = case.params({"base.folder": str(other), "base.stages": ["00_arith_pair"]})
    except SrlibError as error:  # without one of them the other is refused
        pytest.fail(str(error))
    assert p.big.path == str(other / "00_arith_pair" / "big")
    assert p.where("01_annotate") == p.run_dir / "01_annotate"
    assert "00_arith_pair" not in pipeline.choose(p)


@shows("hardware.gpus", "hardware.gpu_gb")
def what_a_stage_may_use(case: Case) -> None:
    p = case.params({"hardware.gpus": 1, "hardware.gpu_gb": 0.5})
    with pytest.raises(SrlibError, match="are needed on cuda:0 .*, and there are 0.5"):
        memory.check(p, "04_offload")


@shows("hardware.gpu")
def whose_data_sheet_hours_come_from(case: Case) -> None:
    p = case.params({"hardware.gpus": 1, "hardware.gpu": "a6000"})
    assert hours.cost(p, memory.models(p, "04_offload")["big"]).token == pytest.approx(
        roofline("a6000", memory.models(p, "04_offload")["big"].shape).token
    )
    assert "1 × a6000" in hours.table(p)
