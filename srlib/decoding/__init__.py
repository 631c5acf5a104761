"""Two engines and a policy write traces.

- `trace`: what they wrote
- `policies`: who writes what
- `published`: the way of the public code, to be measured beside ours
- `writer`: the writing of one trace, what a policy may do with it
- `steps`: a trace in steps; one that the big model judges
- `scheduler`: many traces at a time, the `Offloader`
- `translate`: how two models of different vocabularies meet
"""

from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import Trace

__all__ = ["Offloader", "Trace"]
