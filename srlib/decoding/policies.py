"""Policies: who writes what of a trace.

A policy's `write` is a generator, made of the methods of a `srlib.decoding.writer.Writer`. Trained
policies read the small model's tags; the baselines need no training.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import floor
from typing import ClassVar, Protocol

from srlib.data import spans
from srlib.decoding.writer import Steps, Writer
from srlib.engine.protocol import Doubt, Measure


class Policy(Protocol):
    """Decides who writes; a subclass says what it needs."""

    name: str
    models: ClassVar[tuple[str, ...]] = ("small", "big")  # those that it asks
    tags: ClassVar[bool] = False  # its hand-overs stand in the trace as tags, and the small model looks when to close
    one_vocabulary: ClassVar[bool] = False  # an id must mean the same to both models

    def write(self, writer: Writer) -> Steps:
        """Write one trace to its end."""
        ...


@dataclass(frozen=True)
class Learned(Policy):
    """The small model asks with `<bigmodel>`, as it was trained to.

    A request that is refused stays in the trace, and the small model writes the span itself.

    Args:
        reject: probability with which a request is refused; over 0 … 1 this is the whole curve of
            accuracy against share from one model (1: offloading switched off).
        max_share: most of the text so far that may be the big model's, in tokens; a span ends
            where it would go beyond, and one that could not have a single token is refused.
    """

    tags = True

    reject: float = 0.0
    max_share: float = 1.0
    name: str = "learned"

    def write(self, writer: Writer) -> Steps:
        rng, refused = random.Random(writer.seed) if self.reject else None, False
        while not writer.done:
            tag = yield from writer.small_writes(writer.left, tags=True, inside=refused)
            if tag is None or writer.done:
                continue
            refused = tag == spans.OPEN
            if not refused or rng and rng.random() < self.reject:
                continue
            budget = self._allowed(writer)
            if budget is None or budget >= 1:
                refused = False
                yield from writer.span(budget)

    def _allowed(self, writer: Writer) -> int | None:
        """Big tokens that keep the share: (b + n) / (t + n) ≤ c, so n ≤ (c·t − b) / (1 − c). None: no limit."""
        if self.max_share >= 1:
            return None
        big = writer.trace.big_tokens
        text = big + writer.trace.small_tokens
        return floor((self.max_share * text - big) / (1 - self.max_share) + 1e-9)


@dataclass(frozen=True)
class Never(Policy):
    """The small model alone; if it writes tags, it also writes what is between them."""

    models = ("small",)

    name: str = "never"

    def write(self, writer: Writer) -> Steps:
        yield from writer.small_writes(writer.left)


@dataclass(frozen=True)
class Always(Policy):
    """The big model alone."""

    models = ("big",)

    name: str = "always"

    def write(self, writer: Writer) -> Steps:
        yield from writer.big_writes(writer.left)


@dataclass(frozen=True)
class Random(Policy):
    """Chunks of `chunk` tokens, each the big model's with probability `share`; the baseline of the paper."""

    share: float
    chunk: int = 4
    name: str = "random"

    def write(self, writer: Writer) -> Steps:
        rng = random.Random(writer.seed)
        while not writer.done:
            if rng.random() >= self.share:
                yield from writer.small_writes(self.chunk)
            else:
                yield from writer.big_writes(self.chunk)


@dataclass(frozen=True)
class Unsure(Policy):
    """Where the small model is unsure of its next token, the big one writes `chunk` tokens; nothing is trained.

    Args:
        measure, threshold: see `Doubt`.
    """

    measure: Measure
    threshold: float
    chunk: int = 4
    name: str = "unsure"

    def write(self, writer: Writer) -> Steps:
        while not writer.done:
            stop = yield from writer.small_writes(writer.left, doubt=Doubt(self.measure, self.threshold))
            if stop == "unsure":
                yield from writer.big_writes(self.chunk)


@dataclass(frozen=True)
class Speculative(Policy):
    """The small model drafts `draft` tokens, the big one checks them in one pass: the text of the big model alone.

    A token of the draft that is kept counts as the small model's.
    """

    one_vocabulary = True

    draft: int = 4
    name: str = "speculative"

    def write(self, writer: Writer) -> Steps:
        while not writer.done:
            yield from writer.draft(self.draft)
