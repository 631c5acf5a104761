"""srlib: a small reasoning model that hands the hard parts of its thinking to a big one.

One noun a module; `params`, `spans`, `problems` and `grade` know nobody above them,
`engine` knows no tags, `offload` knows no training, `pipeline` is at the top.
"""

import logging
import os

# Two OpenMP threads that spin make each other ten times slower on a busy CPU;
# this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # `rollout_func` is new in TRL, and says so every time
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # names a faster kernel, at every import

__version__ = "0.1.0"


class SrlibError(Exception):
    """A mistake the user can mend; its message says what is wrong and what would be right."""
