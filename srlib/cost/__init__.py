"""What it takes, in memory, seconds and money.

- `memory`: whether a run fits; `shapes`: the sizes of a model
- `costs`: seconds of one forward pass; `hours`: of each stage, from a data sheet
- `latency`: seconds of a trace, in rewards and beside the clock
- `simulation`: the pipeline on a virtual clock
- `speed`: seconds with a big model of any cost, beside the simulation and a limit
- `planning`: what to buy
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srlib.cost.latency import simulate as simulate

__all__ = ["simulate"]


def __getattr__(name: str) -> Any:
    """`simulate`, imported when it is asked for: whoever plans memory, as every run does, needs no models."""
    if name == "simulate":
        return import_module("srlib.cost.latency").simulate
    raise AttributeError(f"module 'srlib.cost' has no attribute {name!r}")
