"""Which parts of a worked trace the big model should write.

- `traces`: the traces, given or written here
- `annotators`: gap, entropy, random, given; a run of any of them
- `worth`: what a step is worth, by what becomes of a trace without it
- `own`: an annotator of one's own
- `readings`: what models read of the traces, kept
- `judge`: a language model is asked about each trace once
- `answers`: what it is asked, and how its answer is read
- `endpoint`, `batch`: a judge that is a server, asked one by one or by its batch API; whose a fault is
- `alignment`: quotes found again in a text
- `agreement`: how far two annotators mark the same
"""

from srlib.annotation.alignment import align

__all__ = ["align"]
