"""srlib: a small reasoning model that hands the hard parts of its thinking to a big one.

Rooms, from the top; each may use those below it, and none above:

    run          the notebooks in order, many runs, the bench: what the command line does
    show         figures and tables
    training     fine-tuning, reinforcement
    annotation   which parts of a trace the big model should write
    evaluation   what a policy reaches, and how sure that is
    cost         memory, seconds, money
    decoding     two engines and a policy write traces: the `Offloader`
    engine       one model behind one interface: ids in, ids out
    data         problems, the grammar of the tags, prompts, grades
    params       the settings of a run
"""

import gc
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
# What torch and transformers make when they are imported stays: to look through it all again and again for garbage, as
# Python's own limits have it, would take a fifth of the time that every notebook begins with.
gc.set_threshold(20_000, 20, 20)
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # names a faster kernel, at every import

__version__ = "0.1.0"


# Controls, half characters, and marks that turn the direction of what is behind them.
UNSEEN = re.compile("[\0-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")


def visible(text: str, but: str = "") -> str:
    """`text` with what would not be seen, or would change how the rest is, as escapes (`\\x1b`, `\\u202e`).

    For all that models, data sets and users have written and people look at.

    Args:
        but: characters that are left as they are, such as line ends.
    """
    return UNSEEN.sub(lambda one: one[0] if one[0] in but else one[0].encode("unicode_escape").decode(), text)


class SrlibError(Exception):
    """A mistake the user can mend; its message says what is wrong and what would be right, in one visible line.

    A user name and a password in an address are left out of it.
    """

    def __init__(self, message: str) -> None:
        one_line = re.sub(r"\s*\n\s*", " ", message.strip())
        super().__init__(visible(re.sub(r"(?<=://)[^\s'\"]*@", "…@", one_line)))


def __getattr__(name: str) -> Any:
    """`srlib.Offloader`, imported when it is asked for: it takes seconds, and `--help` shall not."""
    if name == "Offloader":
        return import_module("srlib.decoding").Offloader
    raise AttributeError(f"module 'srlib' has no attribute {name!r}")
