"""What is simulated: requests as stretches of two models, and how the two work together.

A request is a list of stretches, each written by one of the models, as a policy made them.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field
from math import ceil

from srlib.cost.costs import Cost

SMALL, BIG = 0, 1
NAMES = ("small", "big")


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that one model writes.

    Args:
        given: put behind them without being written (a closing tag).
        drafted: tokens that the small model writes before, for the big one to check in the pass that writes its own.
    """

    side: int
    tokens: int
    given: int = 0
    drafted: int = 0


@dataclass(frozen=True)
class Job:
    """One request: what it consists of, and when it arrives."""

    prompt: int
    stretches: tuple[Stretch, ...]
    arrival: float = 0.0


@dataclass(frozen=True)
class Pipeline:
    """How the two models work together.

    Args:
        shared: both on one device, which runs one pass at a time.
        replicas: small models, each on a device of its own; requests go to them in turn.
        slots: requests a model is asked for at the same time; the others wait.
        oversubscribe: requests under way beyond them, as a part of them (see `Offloader`).
        stream_chunk: the big model reads along every so many tokens; 0: when it is asked.
        control_chunk: tokens of the big model between two looks of the small one; 0: it does not look.
        overlap: the big model writes on while the small one looks.
        switch_s: seconds from one model to the other at each hand-over, in both directions.
        process: the big model works by itself, and the small one in the controller's steps, as in `srlib.engine.process`.
        message_s: seconds to a model that works by itself and back, for each thing it is asked.
        answer_s: seconds of the controller for each answer; what works in its steps waits for it.
    """

    small: Cost
    big: Cost
    shared: bool = False
    replicas: int = 1
    slots: int = 64
    oversubscribe: float = 0.0
    stream_chunk: int = 0
    control_chunk: int = 0
    overlap: bool = False
    switch_s: float = 0.0
    process: bool = False
    message_s: float = 0.0
    answer_s: float = 0.0


@dataclass
class Simulation:
    """What came out, in seconds."""

    seconds: float  # until the last request is done
    latencies: list[float] = field(default_factory=list)  # of each request, from its arrival
    served: list[float] = field(default_factory=list)  # of that, from when a slot was free for it
    by_model: dict[str, float] = field(default_factory=dict)  # at work, all replicas together
    by_cause: dict[str, float] = field(default_factory=dict)  # of that; and switching
    passes: dict[str, int] = field(default_factory=dict)
    answers: dict[str, int] = field(default_factory=dict)  # requests to each model that were done

    @property
    def per_request(self) -> float:
        """Mean latency."""
        return sum(self.latencies) / len(self.latencies)


def even(share: float, prompt: int, decode: int, span: int, arrival: float = 0.0) -> Job:
    """A request with spans of about `span` tokens at even distances, to a share of `decode` tokens."""
    big = round(share * decode)
    if big >= decode:
        return Job(prompt, (Stretch(BIG, decode),), arrival)
    n = max(1, round(big / span)) if big else 0
    stretches = []
    for i in range(n):
        stretches.append(Stretch(SMALL, _part(decode - big, n + 1, i)))
        stretches.append(Stretch(BIG, _part(big, n, i)))
    stretches.append(Stretch(SMALL, _part(decode - big, n + 1, n)))
    return Job(prompt, tuple(s for s in stretches if s.tokens), arrival)


def replay(owners: str, prompt: int, tags: bool, arrival: float = 0.0, chunk: int = 1) -> Job:
    """The request behind a completion that was written.

    Args:
        owners: of its tokens, `S`, `B` or `F`, as in the completions of stage 05.
        prompt: tokens of the prompt.
        tags: spans end with a closing tag of one token, which nobody decodes.
        chunk: with tags the big model writes so many tokens between two looks; those behind the tag's place are lost,
            and take their time all the same.
    """
    stretches: list[Stretch] = []
    for big, run in itertools.groupby(owners, lambda letter: letter == "B"):
        n = len(list(run))
        if not big and tags and stretches:  # behind a span
            stretches[-1] = Stretch(BIG, ceil(stretches[-1].tokens / chunk) * chunk, given=1)
            n -= 1
        if n:
            stretches.append(Stretch(BIG if big else SMALL, n))
    return Job(prompt, tuple(stretches), arrival)


def drafts(owners: str, prompt: int, draft: int, arrival: float = 0.0) -> Job:
    """The request behind a completion of speculative decoding: each token of the big model ended a draft of `draft`."""
    return Job(prompt, (Stretch(BIG, 1, drafted=draft),) * owners.count("B"), arrival)


def arrivals(n: int, rate: float | None, seed: int = 0) -> list[float]:
    """Times at which n requests arrive, `rate` a second as a Poisson process; None: all at 0."""
    rng = random.Random(seed)
    if rate is None:
        return [0.0] * n
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(n)))


def _part(total: int, parts: int, i: int) -> int:
    """The i-th of `parts` whole parts, as equal as can be."""
    return total * (i + 1) // parts - total * i // parts
