"""An event simulation of the pipeline: two models, many requests, who waits for whom.

A request is a list of stretches, each written by one of the models, as a policy made them. It is
acted out as `srlib.decoding` does it: what one model writes the other reads, streamed in chunks or
when it is asked; while the big model writes a span the small one reads along and looks whether to
take control back. A model takes all requests that wait into one forward pass, whose seconds a
`Cost` gives. A device runs one pass at a time; the two models have devices of their own, or share one.

Where nothing changes many passes are taken at once, so that events are stretches and not tokens.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from math import ceil

from srlib.cost.costs import Cost
from srlib.decoding.scheduler import GATHER

SMALL, BIG = 0, 1
NAMES = ("small", "big")


@dataclass(frozen=True)
class Stretch:
    """Tokens in a row that one model writes; `given`: put behind them without being written (a closing tag)."""

    side: int
    tokens: int
    given: int = 0


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
        slots: requests a small model has under way at the same time; the others wait.
        stream_chunk: the big model reads along every so many tokens; 0: when it is asked.
        control_chunk: tokens of the big model between two looks of the small one; 0: it does not look.
        overlap: the big model writes on while the small one looks.
        switch_s: seconds from one model to the other at each hand-over, in both directions.
        answer_s: seconds of the controller for each answer; a shared device waits for it.
    """

    small: Cost
    big: Cost
    shared: bool = False
    replicas: int = 1
    slots: int = 64
    stream_chunk: int = 0
    control_chunk: int = 0
    overlap: bool = False
    switch_s: float = 0.0
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


def replay(owners: str, prompt: int, tags: bool, arrival: float = 0.0) -> Job:
    """The request behind a completion that was written.

    Args:
        owners: of its tokens, `S`, `B` or `F`, as in the completions of stage 05.
        prompt: tokens of the prompt.
        tags: spans end with a closing tag of one token, which nobody decodes.
    """
    stretches: list[Stretch] = []
    for big, run in itertools.groupby(owners, lambda letter: letter == "B"):
        n = len(list(run))
        if not big and tags and stretches:  # behind a span
            stretches[-1] = Stretch(BIG, stretches[-1].tokens, given=1)
            n -= 1
        if n:
            stretches.append(Stretch(BIG if big else SMALL, n))
    return Job(prompt, tuple(stretches), arrival)


def arrivals(n: int, rate: float | None, seed: int = 0) -> list[float]:
    """Times at which n requests arrive, `rate` a second as a Poisson process; None: all at 0."""
    rng = random.Random(seed)
    if rate is None:
        return [0.0] * n
    return list(itertools.accumulate(rng.expovariate(rate) for _ in range(n)))


def run(pipeline: Pipeline, jobs: Sequence[Job]) -> Simulation:
    """Act out all `jobs`."""
    return _World(pipeline, jobs).run()


def _part(total: int, parts: int, i: int) -> int:
    """The i-th of `parts` whole parts, as equal as can be."""
    return total * (i + 1) // parts - total * i // parts


@dataclass(eq=False)
class _Work:
    """Read `read` tokens in one pass, and write `write`, the first in that same pass."""

    job: _Active
    read: int
    write: int
    cause: str
    awaited: bool = False
    done: bool = False
    began: int = 0  # pass of its server


class _Server:
    """A model on a device: who waits, and who writes until which pass."""

    def __init__(self, side: int, cost: Cost, device: _Device) -> None:
        self.side, self.cost, self.device = side, cost, device
        self.new: list[_Work] = []
        self.writing: list[tuple[int, int, _Work]] = []  # heap by last pass
        self.passes = 0
        self.context = 0.0  # tokens in the caches of those that write, at `passes`
        device.servers.append(self)

    @property
    def waiting(self) -> int:
        return len(self.new) + len(self.writing)


class _Device:
    def __init__(self) -> None:
        self.servers: list[_Server] = []
        self.server: _Server | None = None  # whose passes are under way
        self.taken: list[_Work] = []  # what came into the first of them
        self.busy = False
        self.start, self.k, self.each, self.version = 0.0, 0, 0.0, 0  # k passes of `each` seconds since `start`


@dataclass(eq=False)
class _Active:
    """A job under way."""

    job: Job
    small: _Server
    big: _Server
    admitted: float
    steps: Generator = None
    held: list[int] = field(default_factory=lambda: [0, 0])  # tokens in each model's cache


class _World:
    def __init__(self, pipeline: Pipeline, jobs: Sequence[Job]) -> None:
        self.p, self.now = pipeline, 0.0
        devices = [_Device() for _ in range(pipeline.replicas)]
        self.smalls = [_Server(SMALL, pipeline.small, device) for device in devices]
        self.big = _Server(BIG, pipeline.big, devices[0] if pipeline.shared else _Device())
        self.events: list[tuple[float, int, str, object]] = []
        self.order = itertools.count()
        self.queues: list[list[Job]] = [[] for _ in self.smalls]
        self.free = [pipeline.slots] * pipeline.replicas
        self.latencies: list[float] = []
        self.served: list[float] = []
        self.busy: dict[str, float] = defaultdict(float)
        self.causes: dict[str, float] = defaultdict(float)
        self.answers: dict[str, int] = defaultdict(int)
        for i, job in enumerate(jobs):
            self._at(job.arrival, "arrive", (i % pipeline.replicas, job))

    def run(self) -> Simulation:
        while self.events:
            self.now, _, kind, what = heapq.heappop(self.events)
            if kind == "arrive":
                place, job = what
                self.queues[place].append(job)
                self._admit(place)
            elif kind == "resume":
                self._advance(what)
            elif kind == "answer":
                self._answer(*what)
            elif what[1] == what[0].version:  # else it was cut short
                (self._passes if kind == "begin" else self._end)(what[0])
        passes = {"small": sum(s.passes for s in self.smalls), "big": self.big.passes}
        counts = dict(self.busy), dict(self.causes), passes, dict(self.answers)
        return Simulation(self.now, self.latencies, self.served, *counts)

    def _at(self, time: float, kind: str, what: object) -> None:
        heapq.heappush(self.events, (time, next(self.order), kind, what))

    def _admit(self, place: int) -> None:
        while self.queues[place] and self.free[place]:
            self.free[place] -= 1
            active = _Active(self.queues[place].pop(0), self.smalls[place], self.big, self.now)
            active.steps = self._write(active)
            self._advance(active)

    def _advance(self, active: _Active) -> None:
        """Go on with a job until it has to wait."""
        for wait in active.steps:
            if isinstance(wait, float):
                self.causes["switch"] += wait
                self._at(self.now + wait, "resume", active)
                return
            if not wait.done:
                wait.awaited = True
                return
        self.latencies.append(self.now - active.job.arrival)
        self.served.append(self.now - active.admitted)
        place = self.smalls.index(active.small)
        self.free[place] += 1
        self._admit(place)

    def _write(self, a: _Active) -> Generator[_Work | float, None, None]:
        """The controller of `offload`, in token counts."""
        p, job = self.p, a.job
        unread, cause = [job.prompt, job.prompt], ["prompt", "prompt"]
        helped = any(s.side == BIG for s in job.stretches)

        def ask(side: int, write: int, why: str = "decode") -> _Work:
            first, cause[side] = cause[side], "read"
            read, unread[side] = unread[side], min(1, write)
            return self._submit(a, side, read, write, first if first == "prompt" else why)

        if helped and p.stream_chunk and job.stretches[0].side == SMALL:
            ask(BIG, 0)
        before = None
        for stretch in job.stretches:
            if before is not None and p.switch_s:
                yield p.switch_s
            before, left = stretch.side, stretch.tokens
            if stretch.side == SMALL:
                while left:
                    n = min(left, p.stream_chunk or left)
                    yield ask(SMALL, n)
                    unread[BIG] += n
                    left -= n
                    if left and helped:
                        ask(BIG, 0, "read")
            elif not p.control_chunk:
                yield ask(BIG, left)
                unread[SMALL] += left
            else:
                ahead = ask(BIG, min(p.control_chunk, left))
                while left:
                    n = min(p.control_chunk, left)
                    yield ahead
                    left -= n
                    unread[SMALL] += n
                    if p.overlap and left:
                        ahead = ask(BIG, min(p.control_chunk, left))
                    yield ask(SMALL, 0, "probe")
                    if not p.overlap and left:
                        ahead = ask(BIG, min(p.control_chunk, left))
            unread[SMALL] += stretch.given

    def _submit(self, a: _Active, side: int, read: int, write: int, cause: str) -> _Work:
        server = (a.small, a.big)[side]
        work = _Work(a, max(1, read), write, cause)
        server.new.append(work)
        device = server.device
        if not device.busy:
            device.busy = True
            self._begin(device, self.now)  # after all that is asked at this moment: it comes into the same pass
        elif device.k > 1:  # passes under way are cut short at the end of the one that runs
            done = min(device.k, max(1, ceil((self.now - device.start) / device.each - 1e-9)))
            if done < device.k:
                device.k = done
                self._at_end(device)
        return work

    def _begin(self, device: _Device, time: float) -> None:
        device.k = 0
        device.version += 1
        self._at(time, "begin", (device, device.version))

    def _at_end(self, device: _Device) -> None:
        device.version += 1
        self._at(device.start + device.k * device.each, "end", (device, device.version))

    def _passes(self, device: _Device) -> None:
        """Choose the model whose turn it is, as `Offloader` does, and take its passes up to the next event."""
        total = sum(server.waiting for server in device.servers)
        ready = [s for s in device.servers if s.waiting and s.waiting >= GATHER * total]
        if not ready:
            device.busy = False
            return
        server = device.server = min(ready, key=lambda s: s.waiting)
        n, device.taken = len(server.writing), server.new
        if server.new:
            tokens, context = n + sum(w.read for w in server.new), sum(w.job.held[server.side] for w in server.new)
            device.k = 1
        else:
            alone = server.waiting == total
            device.k = server.writing[0][0] - server.passes if alone else 1
            tokens, context = n, n * (device.k - 1) / 2
        device.each = server.cost.seconds(server.waiting, tokens, server.context + context)
        device.start, server.new = self.now, []
        self._at_end(device)

    def _end(self, device: _Device) -> None:
        """The passes of a device are over."""
        done = self._account(device)
        self.answers[NAMES[device.server.side]] += len(done)
        pause = self.p.answer_s * len(done) if self.p.shared else 0.0
        if pause:
            self.causes["controller"] += pause
        device.k = 0
        self._at(self.now + pause, "answer", (device, done))

    def _answer(self, device: _Device, done: list[_Work]) -> None:
        for work in done:
            work.done = True
        for work in done:
            if work.awaited:
                self._advance(work.job)
        self._begin(device, self.now)

    def _account(self, device: _Device) -> list[_Work]:
        """Note what was done in the passes of a device; returns the works that ended."""
        server, k, name = device.server, device.k, NAMES[device.server.side]
        spent, n = k * device.each, len(server.writing)
        self.busy[name] += spent
        tokens = n * k + sum(w.read for w in device.taken)
        self.causes[f"{name} decode"] += spent * n * k / tokens
        server.passes += k
        server.context += n * k
        ended = []
        for work in device.taken:
            cause = "read" if work.cause == "decode" and work.read > 1 else work.cause
            self.causes[f"{name} {cause}"] += spent * work.read / tokens
            work.job.held[server.side] += work.read
            if work.write > 1:
                work.began = server.passes
                server.context += work.job.held[server.side]
                heapq.heappush(server.writing, (server.passes + work.write - 1, next(self.order), work))
            else:
                ended.append(work)
        device.taken = []
        while server.writing and server.writing[0][0] <= server.passes:
            work = heapq.heappop(server.writing)[2]
            work.job.held[server.side] += server.passes - work.began
            server.context -= work.job.held[server.side]
            ended.append(work)
        return ended
