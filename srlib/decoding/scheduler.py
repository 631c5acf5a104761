"""Many traces at a time: prompts are submitted, followed, cancelled; two engines are kept at work.

`Offloader.run` writes a list of prompts. Who needs more submits prompts as they come and calls `step`
until what was submitted is done:

    job = offloader.submit(prompt)
    for ids, owners in offloader.follow(job): ...
    job.trace

What a prompt fails with ends that prompt: its trace has finish `error` and says why. Whatever ends a
trace, its slots are given back at once.
"""

from __future__ import annotations

import gc
import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import repeat
from multiprocessing.connection import wait
from typing import Any

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.data.prompts import encode_for_each
from srlib.decoding.duo import Duo
from srlib.decoding.policies import Policy
from srlib.decoding.trace import Trace
from srlib.decoding.writer import Begun, Steps, Writer
from srlib.engine.protocol import Engine, Request, runs, steps
from srlib.params.decoding import slots_for

GATHER = 0.2  # of the requests that wait: an engine with fewer lets them gather into fuller batches


class Job:
    """A prompt that was submitted, and what becomes of it."""

    def __init__(self, writer: Writer) -> None:
        self.writer = writer
        self.steps: Iterator[Request] | None = None  # None: it has not begun
        self.request: Request | None = None  # what it waits for
        self.done = False

    @property
    def trace(self) -> Trace:
        return self.writer.trace


class Offloader(Duo):
    """Writes traces with two engines.

    Args:
        small, big: engines; one that the policy never asks is left alone, and may be None.
        policy: who writes.
        oversubscribe: traces under way beyond `batch_size`, as a part of it and as far as there are slots:
            some write while others are with the big model.
        hint: text put behind every prompt that is given as text.
        seed: with the prompt, it fixes a trace, whatever is written beside it.
        **how: of `Duo`, such as `max_tokens`, `span_budget`, `batch_size`, `temperature`.

    Raises:
        SrlibError: a model that the policy asks is None, or the vocabularies differ, and one of them
            cannot write every text, or the policy needs one vocabulary.
    """

    def __init__(
        self,
        small: Engine | None,
        big: Engine | None,
        policy: Policy,
        *,
        oversubscribe: float = 0.0,
        hint: str = "",
        seed: int = 0,
        **how: Any,
    ) -> None:
        given = {"small": small, "big": big}
        for side in policy.models:
            if given[side] is None:
                raise SrlibError(f"The policy {policy.name} asks the {side} model; give its engine.")
        super().__init__(*(given[side] if side in policy.models else None for side in given), **how)
        if policy.one_vocabulary and not self.bridge.same:
            raise SrlibError(f"The policy {policy.name} needs two models of one vocabulary; these have different ones.")
        self.policy, self.hint, self.seed = policy, hint, seed
        self.oversubscribe = oversubscribe
        self.running = [engine for engine in self.engines if runs(engine)]
        self.stepping = [engine for engine in self.engines if steps(engine)]
        self._sizes = {engine: len(engine.tokenizer) for engine in self.engines}
        slots = min(engine.slots for engine in self.engines)
        self.under_way = min(slots_for(self.batch_size, oversubscribe), slots)  # most traces
        self._queue: deque[Job] = deque()  # not begun
        self._waiting: dict[Request, Job] = {}
        self._ended: list[Job] = []  # not given by `step` yet
        self._waited = 0.0  # seconds in which engines were waited for
        self.controller_seconds = 0.0  # of the last `run`: those in which no engine was waited for

    @property
    def concurrent(self) -> bool:
        """Whether its engines can work at the same time."""
        return bool(self.running)

    @property
    def idle(self) -> bool:
        """Whether all that was submitted has ended."""
        return not (self._queue or self._waiting)

    def submit(self, prompt: str | list[int], number: int = 0, live: bool = False) -> Job:
        """Have one trace written, in the steps to come.

        Args:
            prompt: text or ids. One that cannot be asked gives a trace with finish `error`.
            number: which sample of its prompt it is. With the seed and the prompt it fixes the trace.
            live: `follow` is to see every token as it is written, from an engine in a process of its own, too.
        """
        ((ids, big_ids),) = self._encode([prompt])
        return self._submit(ids, big_ids, number, live)

    def cancel(self, job: Job) -> None:
        """End a trace, with finish `cancelled` and with what was written of it so far; nothing if it has ended."""
        if not job.done:
            self._forget(job)
            job.writer.stop("cancelled")
            self._end(job)

    def step(self, wait: bool = True) -> list[Job]:
        """Go on with every trace that has its answer, and have the engines work on the others.

        Args:
            wait: for engines that work by themselves, if there is nothing else to do.

        Returns:
            those that have ended since the last step.
        """
        if self._waiting:
            before = self._time()
            answered = self._answers(wait)
            self._waited += self._time() - before
            for request in answered:
                request.done = True
                for turns in self.turns.values():
                    turns.done(request)
                if (job := self._waiting.pop(request, None)) is not None:  # else nobody waits for it
                    self._advance(job)
        while self._queue and len(self._waiting) < self.under_way:
            job = self._queue.popleft()
            job.steps = self._steps(job.writer)
            self._advance(job)
        for turns in self.turns.values():
            turns.submit()
        ended, self._ended = self._ended, []
        return ended

    def follow(self, job: Job) -> Iterator[tuple[list[int], list[int]]]:
        """The tokens of a trace as they are written, while others are written, too: ids, and who wrote each.

        A token that might be taken back is held until it stands. `step` goes on for all traces.
        """
        seen = 0
        while True:
            ids, owners = job.writer.written
            if len(ids) > seen:
                yield ids[seen:], owners[seen:]
                seen = len(ids)
            if job.done:
                return
            self._ended += self.step()

    def run(
        self,
        prompts: Iterable[str | list[int]],
        progress: bool = False,
        numbers: Iterable[int] | None = None,
        finished: Callable[[int, Trace], None] | None = None,
        begun: Iterable[Begun] | None = None,
    ) -> list[Trace]:
        """Write one trace for each prompt, text or ids.

        A prompt given k times is written with k different seeds.

        Args:
            numbers: which sample of its prompt each trace is, from 0; None: as they come. With the seed
                and the prompt it fixes the trace, so some of many samples can be written later.
            finished: called with a trace's place among the prompts and the trace, as soon as it has ended.
            begun: the ids that each trace begins with, and their owners; it is written on from there.
        """
        self._start, self._waited = self._time(), 0.0
        times_seen: Counter[tuple[int, ...]] = Counter()
        given = iter(numbers) if numbers is not None else None
        beginnings = iter(begun) if begun is not None else repeat(((), ()))
        jobs: dict[Job, int] = {}  # with their places
        for place, (ids, big_ids) in enumerate(self._encode(list(prompts))):
            key = tuple(ids)
            number = times_seen[key] if given is None else next(given)
            times_seen[key] += 1
            jobs[self._submit(ids, big_ids, number, begun=next(beginnings))] = place
        bar = tqdm(total=len(jobs), desc=self.policy.name, unit="trace", disable=not progress, mininterval=1)
        left = len(jobs)
        gc.freeze()  # what is loaded is no garbage: to go through it all again and again would cost a tenth of the time
        try:
            while left:
                for job in self.step():
                    if (ended := jobs.get(job)) is not None:
                        left -= 1
                        bar.update()
                        if finished is not None:
                            finished(ended, job.trace)
        finally:  # an interrupted run gives its slots back, too
            gc.unfreeze()
            for job in jobs:
                self.cancel(job)
            bar.close()
        if self.concurrent and (self.stream_chunk or self.overlap):  # an engine may have worked on
            for job in jobs:
                job.writer.count()
        self.controller_seconds = self.clock() - self._waited
        return [job.trace for job in jobs]

    def raise_if_failed(self, traces: list[Trace]) -> None:
        """For those who need every trace.

        Raises:
            SrlibError: one of `traces` ended with an error.
        """
        failed = [trace for trace in traces if trace.error]
        if failed:
            raise SrlibError(
                f"{self.policy.name}: {len(failed)} of {len(traces)} traces failed: {failed[0].error}"
            ) from failed[0].cause

    def _submit(
        self, ids: list[int], big_ids: list[int], number: int, live: bool = False, begun: Begun = ((), ())
    ) -> Job:
        text = f"{self.seed} {number} {ids}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
        job = Job(Writer(self, ids, big_ids, seed, live, begun))
        if fault := self._fault(ids, big_ids):
            job.writer.stop("error", SrlibError(fault))
        self._queue.append(job)
        return job

    def _fault(self, *prompts: list[int]) -> str:
        """What is wrong with a prompt, given as ids for each engine."""
        for engine, ids in zip((self.engines[0], self.engines[-1]), prompts):
            if not ids:
                return "The prompt is empty; there is nothing to go on from."
            size = self._sizes[engine]
            if wrong := [i for i in ids if not 0 <= i < size]:
                return f"The prompt has the id {wrong[0]}, and the vocabulary of its model has 0 to {size - 1}."
        return ""

    def _steps(self, writer: Writer) -> Steps:
        if not writer.done:
            yield from self.policy.write(writer)

    def _advance(self, job: Job) -> None:
        """Go on with one trace until it has to wait."""
        steps = job.steps
        assert steps is not None
        try:
            while (request := next(steps)).done:
                pass
        except StopIteration:
            return self._end(job)
        except Exception as error:  # of an engine, or of the policy: the others go on
            if not isinstance(error, SrlibError):
                error = _told(error)
            job.writer.stop("error", error)
            return self._end(job)
        job.request = request
        self._waiting[request] = job

    def _forget(self, job: Job) -> None:
        """Nobody waits for what `job` has asked."""
        if job in self._queue:
            self._queue.remove(job)
        elif job.request is not None:
            self._waiting.pop(job.request, None)

    def _end(self, job: Job) -> None:
        job.done = True
        job.writer.close()
        job.writer.count()
        self._ended.append(job)

    def _answers(self, wait_for_them: bool) -> list[Request]:
        """Requests that have been done: by a step of an engine, by those that run, or by both."""
        for running in self.running:
            running.flush()
        # An engine that has gathered its part of what waits goes first, the one with less before the other.
        total = sum(len(engine.pending) for engine in self.stepping)
        ready = [engine for engine in self.stepping if engine.pending and len(engine.pending) >= GATHER * total]
        next_ = min(ready, key=lambda engine: len(engine.pending), default=None)
        done = next_.step() if next_ is not None else []
        if self.running and not done and not total and wait_for_them:
            wait([running.ready for running in self.running])
        for running in self.running:
            done += running.collect()
        return done

    def _encode(self, prompts: list[str | list[int]]) -> list[tuple[list[int], list[int]]]:
        """Prompts as each model is asked: text through the chat template of each.

        Raises:
            SrlibError: ids are given, and the vocabularies differ.
        """
        texts = [prompt + self.hint for prompt in prompts if isinstance(prompt, str)]
        if len(texts) < len(prompts) and not self.bridge.same:
            raise SrlibError("A prompt given as ids needs one vocabulary; give the text to models of two.")
        sides = list(map(iter, encode_for_each([engine.tokenizer for engine in self.engines], texts)))
        encoded = []
        for prompt in prompts:
            ids = [next(side) for side in sides] if isinstance(prompt, str) else [list(prompt)]
            encoded.append((ids[0], ids[-1]))
        return encoded


def _told(error: Exception) -> SrlibError:
    """An error that nobody expected, in a sentence."""
    told = SrlibError(f"{type(error).__name__}: {error}")
    told.__cause__ = error
    return told
