"""One model behind one interface: token ids in, token ids out.

An engine keeps the KV cache of every open sequence and knows nothing of tags, pairs or
policies. Work is asked for in requests and done in steps, so that one forward pass serves
every request that is waiting:

    sequence = engine.open(prompt_ids)
    request = engine.submit(Request(sequence, max_new=64, stops=((eos,),)))
    while request not in engine.step(): ...
    request.ids, request.logprobs

`Engine` is what every engine has. A *stepping* engine works when `step` is called. A *running* one (a
server, a process) works by itself, and `ready` is what `multiprocessing.connection.wait` waits for, so
that one place can wait for several engines. While a request is under way only the engine touches its
sequence.

"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import count
from multiprocessing.connection import Connection, wait
from socket import socket
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol, TypeGuard

from srlib import SrlibError
from srlib.params import ModelSpec

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Sampling(NamedTuple):
    """How the next token is chosen; means the same in every engine.

    The distribution is that of the logits divided by `temperature`, cut to the `top_k` likeliest
    tokens, then to the smallest set that holds `top_p` of the probability. The draw at a position
    depends on `seed` and the position alone, so it is the same whether the token is decoded, or
    asked for in an extend, and whatever was drawn before and taken back.
    """

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    seed: int = 0

    def number(self, position: int) -> int:
        """64 bits that decide the draw at a position."""
        return int.from_bytes(blake2b(f"{self.seed} {position}".encode(), digest_size=8).digest())


GREEDY = Sampling()


@dataclass(eq=False)
class Sequence:
    """One text an engine has open, and how much of it the model has processed."""

    slot: int
    ids: list[int]
    sampling: Sampling
    processed: int = 0  # keys and values of ids[:processed] are in the cache
    longest: int = 0  # most ids that have been processed at one time
    forwarded: int = 0  # tokens the model has processed for it, those taken back or read again included
    logits: torch.Tensor | None = None  # (V,), after the last processed token


Measure = Literal["entropy", "margin", "confidence"]


class Doubt(NamedTuple):
    """More than `above` of a measure of how unsure a model is, of the distribution of its next token at temperature 1.

    The measures of uncertainty sampling (Settles 2009, section 3.1), which all grow with doubt: `entropy` in
    nats, `margin` 1 − (p₁ − p₂) of the two likeliest tokens, `confidence` 1 − p₁.
    """

    measure: Measure
    above: float


@dataclass(eq=False)
class Request:
    """Read `feed`, then decode up to `max_new` tokens or to one of `stops`.

    With `max_new=0` it is an *extend*: for each of the last `ask` ids of `feed`, `own` answers
    which token the model itself would have written after it, and `watched` the log-probability of
    `watch` there, one id or one for each place. Both come from the forward pass that reads `feed`. With `ask=0` it only reads.

    `logprobs` and `watched` are those of the distribution at the sequence's temperature, before
    `top_k` and `top_p` cut it.
    """

    sequence: Sequence
    feed: list[int] = field(default_factory=list)
    max_new: int = 0
    stops: tuple[tuple[int, ...], ...] = ()
    stop_texts: tuple[str, ...] = ()  # ends when the text of the decoded ids holds one of these
    recent: list[int] = field(default_factory=list)  # decoded just before: where a stop may have begun
    doubt: Doubt | None = None  # ends before a token of which the model is less sure
    banned: tuple[int, ...] = ()  # ids that are not decoded: probabilities are those among all others
    ask: int = 0
    watch: int | tuple[int, ...] | None = None
    live: bool = False  # `ids` grows token by token while it is under way, in a running engine, too

    start: int | None = None  # length of the sequence before `feed`, set by `submit`
    ids: list[int] = field(default_factory=list)  # decoded
    logprobs: list[float] = field(default_factory=list)  # of each decoded id
    own: list[int] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)
    stopped: tuple[int, ...] | str | None = None  # the stop the decoded ids end with
    unsure: bool = False  # ended by `doubt`
    done: bool = False  # set by who waits for it
    error: SrlibError | None = None  # it failed; nothing above is of use, and the sequence is lost

    def add(self, token: int, logprob: float, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Take a decoded token; returns whether the request ends with it."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        for stop in self.stops:
            if stop[-1] == token and tuple(self._tail(len(stop))) == stop:
                self.stopped = stop
        if self.stop_texts:
            tail = tokenizer.decode(self._tail(STOP_TAIL))
            self.stopped = next((text for text in self.stop_texts if text in tail), self.stopped)
        return self.stopped is not None or len(self.ids) >= self.max_new

    def _tail(self, n: int) -> list[int]:
        return [*self.recent, *self.ids][-n:]


SCORE_TOKENS = 8192  # ids that `score` reads in one forward pass; a longer batch is read in several
SCORE_POSITIONS = 256  # places whose logits `score` holds at the same time
STOP_TAIL = 16  # tokens in which a stop is looked for, more than one has


@dataclass
class Counters:
    """What an engine has done since it was made."""

    prefilled_tokens: int = 0  # processed, more than one at a time
    decoded_tokens: int = 0  # written
    forward_tokens: int = 0  # processed in all
    reread_tokens: int = 0  # of these, at positions that had been processed before
    discarded_tokens: int = 0  # processed and then taken back
    calls: int = 0  # forward passes
    seconds: float = 0.0  # in which the engine was at work


class Engine(Protocol):
    """A causal language model with open sequences."""

    tokenizer: PreTrainedTokenizerBase
    slots: int  # sequences that can be open at the same time
    context: int  # longest sequence
    eos: frozenset[int]  # ids that end a text
    counters: Counters

    @property
    def running(self) -> bool:
        """Whether it works by itself; else it works in steps."""
        ...

    def open(self, ids: list[int], sampling: Sampling = GREEDY) -> Sequence:
        """Begin a sequence; nothing is computed yet.

        Raises:
            RuntimeError: all slots are taken.
        """
        ...

    def close(self, sequence: Sequence) -> None:
        """Give the slot back; what was asked for the sequence is forgotten."""
        ...

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Take back all but the first `length` ids of a sequence."""
        ...

    def submit(self, request: Request) -> Request:
        """Ask for work; `request.start` is set."""
        ...

    def cancel(self, request: Request) -> None:
        """Take a request back: it is not answered, and the sequence's ids are as they were before it."""
        ...

    def run(self, *requests: Request) -> list[Request]:
        """Submit and wait until all of `requests` are done.

        Raises:
            SrlibError: one of them failed.
        """
        ...

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability of every id of each sequence but its first, given what stands before it, in nats."""
        ...

    def doubts(self, sequences: list[list[int]], measure: Measure = "entropy") -> list[list[float]]:
        """As `score`, but how unsure the model is of each id; see `Doubt`."""
        ...


class SteppingEngine(Engine, Protocol):
    """An engine that works when it is told to."""

    pending: list[Request]  # submitted, and not done yet

    def step(self) -> list[Request]:
        """One token further for every pending request; returns those that are done, or failed."""
        ...


class RunningEngine(Engine, Protocol):
    """An engine that works by itself."""

    @property
    def ready(self) -> Connection | socket:
        """Can be read as long as `collect` has something to give."""
        ...

    def flush(self) -> None:
        """Send on what has been asked for."""
        ...

    def collect(self) -> list[Request]:
        """The requests that are done and were not given before; waits for none."""
        ...


def runs(engine: Engine) -> TypeGuard[RunningEngine]:
    """Whether an engine works by itself."""
    return engine.running


def steps(engine: Engine) -> TypeGuard[SteppingEngine]:
    """Whether an engine works in steps."""
    return not engine.running


class Running:
    """What the engines that work by themselves share.

    Args:
        spec: the model.
        slots: how many sequences can be open at the same time.
    """

    running = True
    ready: Connection | socket  # can be read as long as `collect` has something to give

    def __init__(self, spec: ModelSpec, slots: int) -> None:
        self.spec, self.slots, self.counters = spec, slots, Counters()
        self._names, self._open = count(), 0

    def open(self, ids: list[int], sampling: Sampling = GREEDY) -> Sequence:
        """Begin a sequence; nothing is computed yet.

        Raises:
            RuntimeError: all slots are taken.
        """
        if self._open >= self.slots:
            raise RuntimeError(f"all {self.slots} slots are taken; close a sequence first")
        self._open += 1
        return Sequence(next(self._names), list(ids), sampling)

    def submit(self, request: Request) -> Request:
        """Ask for work; it begins at once, or with `flush`."""
        raise NotImplementedError

    def flush(self) -> None:
        """Send on what has been asked for."""

    def collect(self) -> list[Request]:
        """The requests that are done and were not given before; waits for none."""
        raise NotImplementedError

    def run(self, *requests: Request) -> list[Request]:
        """Submit and wait until all of `requests` are done.

        Raises:
            SrlibError: one of them failed.
        """
        open_ = {self.submit(request) for request in requests}
        self.flush()
        while open_:
            wait([self.ready])
            open_.difference_update(self.collect())
        for request in requests:
            if request.error:
                raise request.error
        return list(requests)
