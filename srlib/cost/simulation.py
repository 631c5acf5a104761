"""Engines on a virtual clock: they compute nothing, and say how long it would have taken.

A model takes all that it is asked at a moment into one forward pass, whose seconds a `Cost` gives. A
device runs one pass at a time; the two models have devices of their own, and work by themselves, or the
small one works in the controller's steps, or they share a device, and the controller has them take turns.
The controller is the real one.

Where nothing changes many passes are taken at once, so that events are stretches and not tokens.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

from srlib.cost.costs import Cost
from srlib.cost.jobs import BIG, NAMES, SMALL, Job, Pipeline, Simulation
from srlib.decoding.policies import Policy
from srlib.decoding.scheduler import Offloader
from srlib.decoding.writer import Steps, Writer
from srlib.engine import protocol
from srlib.engine.protocol import GREEDY, Counters, Engine, Request, Sampling
from srlib.params import slots_for

ENDLESS = 10**9  # tokens: no budget of the controller ends what is written


def run(pipeline: Pipeline, jobs: Sequence[Job]) -> Simulation:
    """Act out all `jobs`."""
    world = _World(pipeline, jobs)
    while world.go_on():
        pass
    passes = {"small": sum(model.passes for model in world.smalls), "big": world.big.passes}
    counts = dict(world.busy), dict(world.causes), passes, dict(world.answers)
    return Simulation(world.now, world.latencies, world.served, *counts)


class _Tokenizer:
    """A vocabulary of one word and the tags; nothing is cut or decoded."""

    chat_template = None
    ids = {"<bigmodel>": 1, "</bigmodel>": 2}

    def __len__(self) -> int:
        return 1 + len(self.ids)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [self.ids.get(text, 2)]


@dataclass(eq=False)
class _Sequence(protocol.Sequence):
    rests: float = 0.0  # what is asked for it does not begin before
    owner: int = 0  # which of the controllers opened it
    claimed: int = 0  # ids that what was asked will have processed
    closed: bool = False


def _own(request: Request) -> _Sequence:
    """The sequence of a request, which an engine of this module has opened."""
    return cast(_Sequence, request.sequence)


class _Model:
    """A model on a device: what it is asked, and how far it is with it."""

    def __init__(self, world: _World, side: int, cost: Cost) -> None:
        self.world, self.side, self.cost = world, side, cost
        self.new: list[Request] = []
        self.reads: dict[Request, int] = {}  # tokens that a request reads in its first pass
        self.writing: list[tuple[int, int, Request]] = []  # heap by last pass
        self.passes = 0
        self.context = 0.0  # tokens in the caches of those that write, at `passes`
        self.version, self.busy = 0, False  # of the passes under way
        self.start, self.k, self.each = 0.0, 0, 0.0  # k passes of `each` seconds since `start`
        self.taken: list[Request] = []  # what came into the first of them

    @property
    def asked(self) -> int:
        return len(self.new) + len(self.writing)

    def ask(self, request: Request) -> None:
        """Take a request, which begins with the next pass."""
        sequence = _own(request)
        self.reads[request] = max(1, len(sequence.ids) - sequence.claimed)
        sequence.claimed = len(sequence.ids) + max(0, request.max_new - 1)
        self.new.append(request)

    def forget(self, sequence: protocol.Sequence) -> None:
        """What was asked for `sequence` and has not begun is not done."""
        for request in [request for request in self.new if request.sequence is sequence]:
            self.new.remove(request)
            del self.reads[request]

    def take(self, most: int | None = None) -> None:
        """Begin as many passes as change nothing: one if something is new, else until one that writes is done.

        Args:
            most: of them; None: no limit.
        """
        n, self.taken, self.new = len(self.writing), self.new, []
        sequences = self.asked + len(self.taken)
        if self.taken:
            self.k = 1
            tokens = n + sum(self.reads[r] for r in self.taken)
            context = float(sum(r.sequence.processed for r in self.taken))
        else:
            left = self.writing[0][0] - self.passes
            self.k = left if most is None else min(left, most)
            tokens, context = n, n * (self.k - 1) / 2
        self.start, self.each = self.world.now, self.cost.seconds(sequences, tokens, self.context + context)

    def end(self) -> list[Request]:
        """Note what was done in the passes; returns the requests that are done."""
        world, k, name = self.world, self.k, NAMES[self.side]
        spent, n = k * self.each, len(self.writing)
        reads = [self.reads.pop(request) for request in self.taken]
        world.busy[name] += spent
        share = spent / (n * k + sum(reads))
        world.causes[f"{name} decode"] += share * n * k
        self.passes += k
        self.context += n * k
        done = []
        for request, read in zip(self.taken, reads):
            world.causes[f"{name} {_cause(request, read)}"] += share * read
            sequence = request.sequence
            sequence.processed += read
            if request.max_new > 1:
                self.context += sequence.processed
                heapq.heappush(self.writing, (self.passes + request.max_new - 1, next(world.order), request))
            else:
                done.append(request)
        self.taken, self.k = [], 0
        while self.writing and self.writing[0][0] <= self.passes:
            request = heapq.heappop(self.writing)[2]
            request.sequence.processed += request.max_new - 1
            self.context -= request.sequence.processed
            done.append(request)
        for request in done:
            n = request.max_new
            request.ids, request.logprobs = [0] * n, [0.0] * n
            request.sequence.ids += request.ids
            request.own, request.watched = [0] * request.ask, [0.0] * request.ask
        world.answers[name] += len(done)
        return done


class _Engine:
    """A model as one controller sees it."""

    running: bool

    def __init__(self, model: _Model, owner: int, slots: int) -> None:
        self.model, self.owner, self.slots = model, owner, slots
        self.tokenizer, self.context, self.counters = model.world.tokenizer, ENDLESS, Counters()
        self.eos: frozenset[int] = frozenset()

    def open(self, ids: list[int], sampling: Sampling = GREEDY) -> _Sequence:
        return _Sequence(0, list(ids), sampling, owner=self.owner)

    def close(self, sequence: protocol.Sequence) -> None:
        cast(_Sequence, sequence).closed = True
        self.model.forget(sequence)

    def submit(self, request: Request) -> Request:
        request.start = len(request.sequence.ids)
        request.sequence.ids += request.feed
        world = self.model.world
        begins = max(_own(request).rests, world.now + (world.pipeline.message_s if self.running else 0.0))
        if begins > world.now:
            world.at(begins, self._came, request)
        else:
            self.take(request)
        return request

    def _came(self, request: Request) -> None:
        if not _own(request).closed:
            self.take(request)

    def take(self, request: Request) -> None:
        """Hand a request to the model."""
        raise NotImplementedError


class _Alone(_Engine):
    """On a device of its own: it works by itself."""

    running = True
    ready = None

    def __init__(self, model: _Model, owner: int, slots: int) -> None:
        super().__init__(model, owner, slots)
        self.done: list[Request] = []

    def take(self, request: Request) -> None:
        model = self.model
        model.ask(request)
        if not model.busy:
            model.busy = True
            self._at(model.world.now, self._begin)
        elif model.k > 1:  # passes under way are cut short at the end of the one that runs
            k = min(model.k, max(1, ceil((model.world.now - model.start) / model.each - 1e-9)))
            if k < model.k:
                model.k = k
                self._at(model.start + k * model.each, self._end)

    def flush(self) -> None:
        pass

    def collect(self) -> list[Request]:
        done, self.done = self.done, []
        self.model.world.control(len(done))
        return done

    def _at(self, time: float, what: Callable[[int], None]) -> None:
        self.model.version += 1
        # A pass begins after all that is asked at its moment, which comes into it.
        self.model.world.at(time, what, self.model.version, last=what == self._begin)

    def _begin(self, version: int) -> None:
        model = self.model
        if version == model.version:
            model.busy = bool(model.asked)
            if model.busy:
                model.take()
                self._at(model.start + model.k * model.each, self._end)

    def _end(self, version: int) -> None:
        model = self.model
        if version == model.version:  # else it was cut short
            for request in model.end():
                model.world.answered(request, model.side)
            self._at(model.world.now, self._begin)


class _Shared(_Engine):
    """It works in the controller's steps: a step is a pass, or several where no other model of its device is asked."""

    running = False

    def __init__(self, model: _Model, owner: int, slots: int) -> None:
        super().__init__(model, owner, slots)
        self.pending: list[Request] = []

    def take(self, request: Request) -> None:
        self.model.ask(request)
        self.pending.append(request)
        self.model.world.wake(self.owner)

    def close(self, sequence: protocol.Sequence) -> None:
        super().close(sequence)
        self.pending = [request for request in self.pending if request.sequence is not sequence]

    def step(self) -> list[Request]:
        model, world = self.model, self.model.world
        beside = (*world.smalls, world.big) if world.pipeline.shared else ()
        others = any(other.asked for other in beside if other is not model)
        model.take(1 if others else None)
        if model.k > 1 and (next_ := world.next_event) is not None:  # something begins meanwhile
            model.k = max(1, min(model.k, ceil((next_ - world.now) / model.each)))
        world.spend(model.k * model.each)
        done = model.end()
        finished = set(done)
        self.pending = [request for request in self.pending if request not in finished]
        world.control(len(done))
        return done


@dataclass(frozen=True)
class _Script(Policy):
    """Writes what is known already: the stretches of a job."""

    world: _World
    name: str = "simulated"

    def write(self, writer: Writer) -> Steps:
        p, before = self.world.pipeline, None
        for stretch in self.world.begun(writer).stretches:
            if before is not None and p.switch_s:
                side = (writer.small, writer.big)[stretch.side]
                cast(_Sequence, side.sequence).rests = self.world.now + p.switch_s
                self.world.causes["switch"] += p.switch_s
            before = stretch.side
            if stretch.drafted:
                yield from writer.draft(stretch.drafted)
            elif stretch.side == SMALL:
                yield from writer.small_writes(stretch.tokens)
            elif p.control_chunk:
                yield from writer.span(stretch.tokens)
            else:
                yield from writer.big_writes(stretch.tokens)


class _World:
    """The clock, what is to happen, the models, and the controllers of the replicas."""

    def __init__(self, pipeline: Pipeline, jobs: Sequence[Job]) -> None:
        self.pipeline, self.now, self.tokenizer = pipeline, 0.0, _Tokenizer()
        self.order = itertools.count()
        self._events: list[tuple[float, bool, int, Any, Any]] = []  # time, last, order, what is called, with what
        self.busy: dict[str, float] = defaultdict(float)
        self.causes: dict[str, float] = defaultdict(float)
        self.answers: dict[str, int] = defaultdict(int)
        self.latencies: list[float] = []
        self.served: list[float] = []
        self.smalls = [_Model(self, SMALL, pipeline.small) for _ in range(pipeline.replicas)]
        self.big = _Model(self, BIG, pipeline.big)
        one_kind = _Shared if pipeline.shared or pipeline.process else _Alone
        other_kind = _Shared if pipeline.shared else _Alone
        self._sides: list[tuple[Any, Any]] = []
        self._controllers: list[Offloader] = []
        for i, small in enumerate(self.smalls):
            slots = slots_for(pipeline.slots, pipeline.oversubscribe)
            sides = one_kind(small, i, slots), other_kind(self.big, i, slots)
            self._sides.append(sides)
            one, other = (cast(Engine, side) for side in sides)  # as far as a script needs it
            how: dict[str, Any] = {
                "control_chunk": max(1, pipeline.control_chunk),
                "stream_chunk": pipeline.stream_chunk,
            }
            how |= {"max_tokens": ENDLESS, "span_budget": ENDLESS, "overlap": pipeline.overlap}
            how |= {"batch_size": pipeline.slots, "oversubscribe": pipeline.oversubscribe}
            self._controllers.append(Offloader(one, other, _Script(self), time=lambda: self.now, **how))
        self._scripts: dict[Writer, tuple[Job, float]] = {}  # and when it was begun
        self._woken: deque[int] = deque()  # controllers that have something to do
        for i, job in enumerate(jobs):
            self.at(job.arrival, self._arrive, (i % pipeline.replicas, job))

    @property
    def next_event(self) -> float | None:
        return self._events[0][0] if self._events else None

    def at(self, time: float, what: Callable[[Any], None], given: Any, last: bool = False) -> None:
        """Have `what` called with `given` at a time; `last`: when the controllers have done all they can at that time."""
        heapq.heappush(self._events, (time, last, next(self.order), what, given))

    def spend(self, seconds: float) -> None:
        """A time in which a controller does not answer; what works by itself goes on."""
        until = self.now + seconds
        while self._events and self._events[0][0] < until:
            self.now = max(self.now, self._events[0][0])
            self._happen()
        self.now = until

    def control(self, answers: int) -> None:
        """The seconds that a controller takes for its answers."""
        pause = self.pipeline.answer_s * answers
        self.causes["controller"] += pause
        self.spend(pause)

    def go_on(self) -> bool:
        """All that happens at this moment, then the controllers, then passes begin; False: there is nothing more."""
        while self._events and self._events[0][0] <= self.now and not self._events[0][1]:
            self._happen()
        if self._woken:
            self._step(self._woken.popleft())
        elif self._events:
            self.now = max(self.now, self._events[0][0])
            self._happen()
        else:
            return False
        return True

    def _happen(self) -> None:
        *_, what, given = heapq.heappop(self._events)
        what(given)

    def answered(self, request: Request, side: int) -> None:
        """Hand a request that is done to the controller that asked."""
        owner = _own(request).owner
        self._sides[owner][side].done.append(request)
        self.wake(owner)

    def begun(self, writer: Writer) -> Job:
        """What is to be written, from now on."""
        job, _ = self._scripts[writer]
        self._scripts[writer] = job, self.now
        return job

    def wake(self, place: int) -> None:
        if place not in self._woken:
            self._woken.append(place)

    def _arrive(self, what: tuple[int, Job]) -> None:
        place, job = what
        asked = self._controllers[place].submit([0] * job.prompt)
        self._scripts[asked.writer] = job, self.now
        self.wake(place)

    def _step(self, place: int) -> None:
        controller = self._controllers[place]
        for ended in controller.step(wait=False):
            job, begun = self._scripts.pop(ended.writer)
            self.latencies.append(self.now - job.arrival)
            self.served.append(self.now - begun)
        if not controller.idle and any(side.pending for side in self._sides[place] if not side.running):
            self.wake(place)


def _cause(request: Request, read: int) -> str:
    """What a request reads for."""
    if not request.sequence.processed:
        return "prompt"
    if request.ask:
        return "probe"
    return "decode" if request.max_new and read <= 1 else "read"
