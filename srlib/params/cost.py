"""What a trace takes in seconds, and the hardware there is."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from srlib.params.models import Section

ModelSize = Literal["1.5B", "7B", "8B", "14B", "32B", "70B"]
GpuName = Literal["t4", "a6000", "rtx4090", "l40s", "a100", "h100", "h200"]


class Latency(Section):
    """Where the seconds of the latency model come from."""

    source: Literal["a6000", "calibrate", "roofline"] = Field(
        "a6000",
        description="of the seconds in the reward of 03: a named table, measured on this machine, or the data sheet "
        "of a GPU",
    )
    small: ModelSize = Field("1.5B", description="a6000, roofline, and 07: the model that stands for the small one")
    big: ModelSize = Field("32B", description="a6000, roofline, and 07: the model that stands for the big one")
    gpu: GpuName = Field("h100", description="roofline, and 07: the GPU whose data sheet it is")
    devices: int = Field(1, ge=1, description="roofline, and 07: GPUs that share every layer of the big model")
    handover_s: float = Field(
        0.0, ge=0, description="seconds a hand-over costs on top, to the big model and back; 07: in what is simulated"
    )
    prompt: int = Field(512, ge=1, description="07: tokens of a prompt in what is simulated")
    decode: int = Field(4096, ge=16, description="07: tokens of a trace")
    span: int = Field(128, ge=1, description="07: tokens the big model writes in a row")
    gpu_hour: float = Field(2.0, gt=0, description="07: price of a GPU for an hour, in any currency")
    gpus: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 8, 1000], min_length=1, description="07: numbers of GPUs to plan for"
    )
    n_check: int = Field(12, ge=1, description="07: problems on which prediction and clock are compared")
    cost_ratios: list[Annotated[float, Field(ge=1)]] = Field(
        [], description="07: as bench.cost_ratios, on n_check problems, once; empty: not measured"
    )


class Hardware(Section):
    """What a run may use; `python -m srlib plan` compares the needs with it."""

    gpus: int = Field(0, ge=0, description="number of GPUs; 0: the CPU and its memory")
    gpu_gb: float = Field(24.0, gt=0, description="memory of one GPU, in GiB")
    gpu: GpuName = Field("h100", description="the GPU whose data sheet `plan` takes hours from")
