"""srlib: a small reasoning model that hands the hard parts of its thinking to a big one.

Rooms, from the top; each may use those below it, and none above:

    run          the notebooks in order, many runs, the bench: what the command line does
    show         figures
    training     fine-tuning, reinforcement
    annotation   which parts of a trace the big model should write
    evaluation   what a policy reaches, and how sure that is
    cost         memory, seconds, money
    decoding     two engines and a policy write traces: the `Offloader`
    engine       one model behind one interface: ids in, ids out
    data         problems, the grammar of the tags, prompts, grades
    params       the settings of a run
"""

import logging
import os
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from srlib.decoding import Offloader as Offloader

# Two OpenMP threads that spin make each other ten times slower on a busy CPU;
# this must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # `rollout_func` is new in TRL, and says so every time
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # names a faster kernel, at every import

__version__ = "0.1.0"


class SrlibError(Exception):
    """A mistake the user can mend; its message says what is wrong and what would be right.

    A user name and a password in an address are left out of it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(re.sub(r"(?<=://)[^\s'\"]*@", "…@", message))


def __getattr__(name: str) -> Any:
    """`srlib.Offloader`, imported when it is asked for: it takes seconds, and `--help` shall not."""
    if name == "Offloader":
        return import_module("srlib.decoding").Offloader
    raise AttributeError(f"module 'srlib' has no attribute {name!r}")
