"""Policies: who writes what of a trace.

A policy's `write` is a generator, made of the methods of a `srlib.decoding.writer.Writer`. Trained
policies read the small model's tags; the baselines need no training.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from math import floor
from typing import ClassVar, Protocol, get_args

from srlib import SrlibError
from srlib.data import spans
from srlib.decoding.steps import judged
from srlib.decoding.writer import Steps, Writer
from srlib.engine.protocol import Doubt, Measure
from srlib.params import own
from srlib.params.evaluation import PolicyName


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
class Glimpse(Policy):
    """A step is the big model's where the small one is unsure of its first token (GlimpRouter, arXiv 2601.05110).

    Args:
        threshold: entropy of the step's first token, in nats; above it the big model writes the step.
        ends: texts that a step ends with.
    """

    threshold: float
    ends: tuple[str, ...]
    name: str = "glimpse"

    def write(self, writer: Writer) -> Steps:
        while not writer.done:
            first = yield from writer.small_writes(1, doubt=Doubt("entropy", self.threshold), until=self.ends)
            if first == "unsure":
                yield from writer.big_writes(writer.left, self.ends)
            elif first is None and not writer.done:
                yield from writer.small_writes(writer.left, until=self.ends)


@dataclass(frozen=True)
class SpecReason(Policy):
    """The small model writes a step; the big one judges it, and writes it again if it does not like it (arXiv 2504.07891).

    Deviation: there the big model is asked for a mark from 0 to 9. Here it is its mean log-probability of the step's
    tokens, which any model has, and which takes nothing but to read the step.

    Args:
        threshold: minus that mean, in nats; above it the big model writes the step.
        ends: texts that a step ends with.
    """

    one_vocabulary = True

    threshold: float
    ends: tuple[str, ...]
    name: str = "specreason"

    def write(self, writer: Writer) -> Steps:
        while not writer.done:
            yield from judged(writer, self.ends, self.threshold)


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


def named(name: str) -> Policy:
    """The policy of one's own that `evaluate.policies` names as `path.py:name`: an instance, or a class made without arguments.

    Raises:
        SrlibError: there is none, it is no policy, or its name is none that its results can have.
    """
    found = own.load(name)
    if isinstance(found, type):
        try:
            found = found()
        except TypeError as error:
            raise SrlibError(f"The policy {name} cannot be made: {error}.") from error
    if Policy not in type(found).__mro__:
        raise SrlibError(f"The policy {name} is {found!r}; it has to be a subclass of srlib.decoding.policies.Policy.")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", str(getattr(found, "name", ""))) or found.name in get_args(PolicyName):
        raise SrlibError(
            f"The policy {name} has the name {getattr(found, 'name', '')!r}; give it one of its own (`name`), of letters, "
            "digits, - and _."
        )
    policy: Policy = found
    return policy
