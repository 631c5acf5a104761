"""An annotator of one's own: a function that marks traces, named in the params as `path.py:name`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from srlib import SrlibError
from srlib.data.rows import Annotated, Problem
from srlib.data.spans import Span
from srlib.engine.protocol import Engine
from srlib.params import own

Marks = Iterable[Sequence[tuple[int, int]]]  # for each trace, (start, end) in characters of `worked`
Annotator = Callable[[Sequence[Problem | Annotated], Engine, Engine], Marks]


def annotator(name: str) -> Annotator:
    """The function that `annotate.method` names.

    Raises:
        SrlibError: there is none, or it takes something else.
    """
    found: Annotator = own.load(name)
    own.takes(found, f"The annotator {name}", "problems", "small", "big")
    return found


def marks(name: str, asked: Sequence[Problem | Annotated], small: Engine, big: Engine) -> list[list[Span]]:
    """What it marks in each of `asked`, checked.

    Raises:
        SrlibError: it marks another number of traces, or what is not in one.
    """
    found = [[Span(*span) for span in spans] for spans in annotator(name)(asked, small, big)]
    if len(found) != len(asked):
        raise SrlibError(f"The annotator {name} gave spans of {len(found)} traces, and was given {len(asked)}.")
    for problem, spans in zip(asked, found):
        for start, end in spans:
            if not 0 <= start < end <= len(problem.worked):
                raise SrlibError(
                    f"The annotator {name} marks ({start}, {end}) in the trace of problem {problem.id}, which has "
                    f"{len(problem.worked)} characters."
                )
    return found
