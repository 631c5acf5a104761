"""The controller: two engines and a policy write one trace.

The small model writes; at `<bigmodel>` the big one takes over, reading only what it has not
read yet and never a tag. After every chunk of the big model's tokens the small one reads them,
and where its own next token would be `</bigmodel>` it takes control back: the decision falls
out of the forward pass that it needs anyway. So each model processes every token once.

What happens at the edges: a span also closes at the span budget (the closing tag is then
`FORCED`); a span has at least one token, so a request cannot be empty; end of text by either
model ends the trace, in a span too; opening tags inside a span cannot occur, as the big model
writes there; a closing tag outside one stays in the trace and is counted as malformed; at the
total budget the trace ends with finish `length`, and a prompt with no room left in the context
gives an empty trace with finish `prompt`.

Deviation from the paper (section on inference): control returns at the exact token, seen in one
pass, where the public code generates a few tokens from every prefix to look for the tag.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import time
from collections import Counter, deque
from collections.abc import Generator, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from tqdm.auto import tqdm

from srlib import SrlibError, spans
from srlib.engine import Request
from srlib.problems import encode_prompt
from srlib.spans import Tags

SMALL, BIG, FORCED = 0, 1, 2  # who wrote a token; FORCED: put in by the controller


class Handover(NamedTuple):
    """One stretch of the big model."""

    start: int  # position in the trace of its first token
    tokens: int
    closed_by: str  # small, budget, eos or length; chunk under the random policy
    began: float  # seconds since the run started
    seconds: float


@dataclass
class Trace:
    """What two models wrote after one prompt. `ids`, `owners` and `logprobs` run in parallel."""

    prompt_ids: list[int]
    tags: Tags
    ids: list[int] = field(default_factory=list)  # tags included, as the small model reads it
    owners: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # nan where FORCED
    handovers: list[Handover] = field(default_factory=list)
    finish: str = ""  # eos, length or prompt
    small_forward_tokens: int = 0
    big_forward_tokens: int = 0

    @property
    def big_tokens(self) -> int:
        """Tokens by the big model, tags excluded (it never writes one)."""
        return self.owners.count(BIG)

    @property
    def small_tokens(self) -> int:
        """Tokens by the small model, tags excluded."""
        return len(spans.strip(self.ids, self.tags)) - self.big_tokens

    @property
    def malformed(self) -> Counter[str]:
        """Faults in the grammar of the tags, by kind."""
        return spans.faults(self.ids, self.tags)

    @property
    def least_forward_tokens(self) -> int:
        """Prompt and trace, every token once: what one model cannot do without to write it all."""
        return len(self.prompt_ids) + len(self.ids)

    def text(self, tokenizer) -> str:
        """The trace without tags."""
        return tokenizer.decode(spans.strip(self.ids, self.tags), skip_special_tokens=True)

    def pieces(self, tokenizer) -> list[tuple[str, bool]]:
        """The trace with its tags, cut where the owner changes: (text, by the big model)."""
        runs = itertools.groupby(zip(self.ids, self.owners), key=lambda token: token[1] == BIG)
        return [(tokenizer.decode([i for i, _ in run]), big) for big, run in runs]


class _Side:
    """One model's view of one trace: a sequence, and what it has still to read."""

    def __init__(self, engine, prompt_ids: list[int], **sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.unread = list(prompt_ids)
        self.sequence = None

    def request(self, **ask) -> Generator[tuple, Request, Request]:
        """Read what is unread and do what is asked, when the engine comes to it."""
        if self.sequence is None:
            self.sequence = self.engine.open([], **self.sampling)
        feed, self.unread = self.unread, []
        return (yield self.engine, Request(self.sequence, feed, **ask))

    def truncate(self, tokens: int) -> None:
        """Take the last `tokens` ids back."""
        self.engine.truncate(self.sequence, len(self.sequence.ids) - tokens)

    def close(self) -> int:
        """Give the slot back; how many tokens the model processed for this trace."""
        if self.sequence is None:
            return 0
        self.engine.close(self.sequence)
        return self.sequence.forwarded


class Writer:
    """The writing of one trace: what a policy may do with it. Every method is a generator of requests."""

    def __init__(self, offloader: Offloader, prompt_ids: list[int], seed: int) -> None:
        self.o, self.seed = offloader, seed
        self.trace = Trace(list(prompt_ids), offloader.tags)
        self.small = _Side(offloader.small, prompt_ids, **offloader.sampling, seed=seed)
        self.big = _Side(offloader.big, prompt_ids, **offloader.big_sampling, seed=seed + 1)
        contexts = [engine.context for engine in (offloader.small, offloader.big) if engine is not None]
        self.room = min(offloader.max_tokens, min(contexts) - len(prompt_ids))
        if self.room <= 0:
            self.trace.finish = "prompt"

    @property
    def left(self) -> int:
        """Tokens left in the total budget."""
        return self.room - len(self.trace.ids)

    @property
    def done(self) -> bool:
        return bool(self.trace.finish)

    def small_writes(self, n: int, stops: tuple = ()) -> Generator[tuple, Request, tuple | None]:
        """Up to `n` tokens by the small model; returns the one of `stops` it ended with."""
        eos = self.o.eos(self.small)
        request = yield from self.small.request(max_new=min(n, self.left), stops=(*stops, *eos))
        self._append(request.ids, SMALL, request.logprobs)
        stop = request.stopped if request.stopped in stops else None
        self.big.unread += request.ids[: len(request.ids) - len(stop or ())]
        self._end_if(request.stopped in eos)
        return stop

    def big_writes(self, n: int) -> Generator[tuple, Request, None]:
        """Up to `n` tokens by the big model."""
        start, began = len(self.trace.ids), self.o.clock()
        ended = yield from self._big_chunk(n)
        self._end_if(ended)
        self._handover(start, len(self.trace.ids), self.trace.finish or "chunk", began)

    def span(self) -> Generator[tuple, Request, None]:
        """The big model writes until the small one would close the span, or a budget or the text ends."""
        start, began, closed_by, tag = len(self.trace.ids), self.o.clock(), "", 0
        while not closed_by:
            before = len(self.trace.ids)
            ended = yield from self._big_chunk(min(self.o.control_chunk, self.o.span_budget - (before - start)))
            n = len(self.trace.ids) - before
            if n > ended:
                tag = yield from self._close_if_wanted(n, n - ended)
            if tag:
                closed_by = "small"
                continue
            self._end_if(ended)
            over = len(self.trace.ids) - start >= self.o.span_budget
            closed_by = self.trace.finish or ("budget" if over else "")
        end = len(self.trace.ids) - tag
        if closed_by == "budget":
            close = list(self.trace.tags.close)[: self.left]
            self._append(close, FORCED, [float("nan")] * len(close))
            self.small.unread += close
        self._end_if(False)
        self._handover(start, end, closed_by, began)

    def _big_chunk(self, n: int) -> Generator[tuple, Request, bool]:
        """Up to `n` tokens by the big model; returns whether the text ended."""
        request = yield from self.big.request(max_new=min(n, self.left), stops=self.o.eos(self.big))
        self._append(request.ids, BIG, request.logprobs)
        self.small.unread += request.ids
        return request.stopped is not None

    def _close_if_wanted(self, n: int, asked: int) -> Generator[tuple, Request, int]:
        """The small model reads the last `n` tokens: would it close the span after one of the first `asked`?

        If so, the tokens behind that place are dropped and the tag is written. Returns its length, or 0.
        """
        close = self.trace.tags.close
        request = yield from self.small.request(watch=close[0])
        own, watched = request.own[-n:], request.watched[-n:]
        if close[0] not in own[:asked]:
            return 0
        kept = own.index(close[0]) + 1
        if extra := n - kept:
            self.small.truncate(extra)
            self.big.truncate(extra)
            for column in (self.trace.ids, self.trace.owners, self.trace.logprobs):
                del column[-extra:]
        if self.left < len(close):
            return 0
        if len(close) == 1:
            self._append(list(close), SMALL, [watched[kept - 1]])
            self.small.unread += close
            return 1
        # A tag of several tokens: the small model writes it out; another word is taken back.
        request = yield from self.small.request(max_new=len(close))
        if tuple(request.ids) != close:
            self.small.truncate(len(close))
            return 0
        self._append(request.ids, SMALL, request.logprobs)
        return len(close)

    def _append(self, ids: list[int], owner: int, logprobs: list[float]) -> None:
        self.trace.ids += ids
        self.trace.owners += [owner] * len(ids)
        self.trace.logprobs += logprobs

    def _end_if(self, ended: bool) -> None:
        if ended:
            self.trace.finish = "eos"
        elif self.left <= 0 and not self.trace.finish:
            self.trace.finish = "length"

    def _handover(self, start: int, end: int, closed_by: str, began: float) -> None:
        """Record a stretch of the big model; one that goes on where the last one ended is the same."""
        seconds, handovers = self.o.clock() - began, self.trace.handovers
        if handovers and handovers[-1].start + handovers[-1].tokens == start:
            last = handovers.pop()
            start, began, seconds = last.start, last.began, self.o.clock() - last.began
        handovers.append(Handover(start, end - start, closed_by, began, seconds))


class Policy(Protocol):
    """Decides who writes; `write` is a generator of requests, made of the methods of a `Writer`."""

    name: str

    def write(self, writer: Writer) -> Generator[tuple, Request, None]: ...


@dataclass(frozen=True)
class Learned:
    """The small model asks with `<bigmodel>`, as it was trained to."""

    name: str = "learned"

    def write(self, writer: Writer) -> Generator[tuple, Request, None]:
        tags = writer.trace.tags
        while not writer.done:
            stop = yield from writer.small_writes(writer.left, stops=(tags.open, *tags.closes))
            if stop == tags.open and not writer.done:
                yield from writer.span()


@dataclass(frozen=True)
class Never:
    """The small model alone; if it writes tags, it also writes what is between them."""

    name: str = "never"

    def write(self, writer: Writer) -> Generator[tuple, Request, None]:
        yield from writer.small_writes(writer.left)


@dataclass(frozen=True)
class Always:
    """The big model alone."""

    name: str = "always"

    def write(self, writer: Writer) -> Generator[tuple, Request, None]:
        yield from writer.big_writes(writer.left)


@dataclass(frozen=True)
class Random:
    """Chunks of `chunk` tokens, each the big model's with probability `share`; the baseline of the paper."""

    share: float
    chunk: int = 4
    name: str = "random"

    def write(self, writer: Writer) -> Generator[tuple, Request, None]:
        rng = random.Random(writer.seed)
        while not writer.done:
            if rng.random() >= self.share:
                yield from writer.small_writes(self.chunk)
            else:
                yield from writer.big_writes(self.chunk)


class Offloader:
    """Writes traces with two engines of one vocabulary.

    Args:
        small, big: engines; the one a policy never asks may be None.
        policy: who writes.
        max_tokens: most tokens of a trace, tags included.
        span_budget: most tokens of one span.
        control_chunk: big tokens between two looks of the small model; tokens behind the place
            where it takes over are lost, so 1 wastes nothing. Always 1 if a tag is several tokens.
        batch_size: traces written at the same time.
        temperature, top_p: of both models; temperature 0 is greedy.
        big_temperature: of the big model, where it is to differ.
        seed: with the prompt, it fixes a trace, whatever is written beside it.

    Raises:
        SrlibError: the two models do not share a vocabulary.
    """

    def __init__(
        self,
        small,
        big,
        policy: Policy,
        *,
        max_tokens: int,
        span_budget: int = 8,
        control_chunk: int = 1,
        batch_size: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        big_temperature: float | None = None,
        seed: int = 0,
    ) -> None:
        self.small, self.big, self.policy = small, big, policy
        self.max_tokens, self.span_budget = max_tokens, span_budget
        self.sampling = {"temperature": temperature, "top_p": top_p}
        self.big_sampling = {
            **self.sampling,
            "temperature": temperature if big_temperature is None else big_temperature,
        }
        self.seed = seed
        self.engines = [engine for engine in (small, big) if engine is not None]
        self.batch_size = min(batch_size, *(engine.slots for engine in self.engines))
        self.tokenizer = self.engines[0].tokenizer
        self.tags = Tags.of(self.tokenizer)
        self.control_chunk = control_chunk if len(self.tags.close) == 1 else 1
        if len(self.engines) == 2:
            check_vocabularies(small.tokenizer, big.tokenizer)

    def eos(self, side: _Side) -> tuple[tuple[int], ...]:
        """End-of-text ids of one side, as stops."""
        return tuple((i,) for i in side.engine.eos)

    def clock(self) -> float:
        """Seconds since the run started."""
        return time.perf_counter() - self._start

    def run(self, prompts: Iterable[str | list[int]], progress: bool = False) -> list[Trace]:
        """Write one trace for each prompt, text or ids, `batch_size` at a time.

        A prompt given k times is written with k different seeds.
        """
        self._start = time.perf_counter()
        encoded = [encode_prompt(self.tokenizer, p) if isinstance(p, str) else list(p) for p in prompts]
        times_seen: Counter[tuple[int, ...]] = Counter()
        writers = []
        for ids in encoded:
            key = f"{self.seed} {times_seen[tuple(ids)]} {ids}"
            times_seen[tuple(ids)] += 1
            writers.append(Writer(self, ids, int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])))
        waiting = deque(writers)
        asked: dict[Request, tuple[Writer, Generator]] = {}
        bar = tqdm(total=len(writers), desc=self.policy.name, unit="trace", disable=not progress, mininterval=1)

        def advance(writer: Writer, steps: Generator, answer: Request | None) -> None:
            try:
                engine, request = steps.send(answer)
                asked[engine.submit(request)] = writer, steps
            except StopIteration:
                writer.trace.small_forward_tokens = writer.small.close()
                writer.trace.big_forward_tokens = writer.big.close()
                bar.update()

        while waiting or asked:
            while waiting and len(asked) < self.batch_size:
                writer = waiting.popleft()
                advance(writer, (_ for _ in ()) if writer.done else self.policy.write(writer), None)
            # The engine with more to do goes first: requests to the other gather into fuller batches.
            for request in max(self.engines, key=lambda engine: len(engine.pending)).step():
                advance(*asked.pop(request), request)
        bar.close()
        return [writer.trace for writer in writers]


def check_vocabularies(small, big) -> None:
    """Two tokenizers must agree on every id of the big one.

    Raises:
        SrlibError: they do not.
    """
    ours, theirs = small.get_vocab(), big.get_vocab()
    differing = [token for token, i in theirs.items() if ours.get(token) != i]
    if differing:
        raise SrlibError(
            f"The two models do not share a vocabulary: {len(differing)} tokens of the big one differ, "
            f"such as {differing[0]!r}. Choose two models of one family."
        )
