"""What it takes, in memory, seconds and money.

- `memory`: whether a run fits; `shapes`: the sizes of a model
- `costs`: seconds of one forward pass
- `latency`: seconds of a trace, in rewards and beside the clock
- `simulation`: the pipeline on a virtual clock
- `planning`: what to buy
"""

from srlib.cost.latency import simulate

__all__ = ["simulate"]
