"""The controller: two engines and a policy write one trace.

The small model writes; at `<bigmodel>` the big one takes over, reading only what it has not
read yet and never a tag. After every chunk of the big model's tokens the small one reads them,
and where its own next token would be `</bigmodel>` it takes control back: the decision falls
out of the forward pass that it needs anyway. So each model processes every token once.

Models of two vocabularies meet in text (see `translate`): the trace is in ids of the small one, and
tokens are counted there.

Tags that are plain text are looked for in the text, so that it does not matter how the small
model cuts them into tokens; in the trace they stand as the tokenizer writes them alone.

What happens at the edges: a span also closes at the span budget (the closing tag is then
`FORCED`); a span has at least one token, so a request cannot be empty; end of text by either
model ends the trace, in a span too; opening tags inside a span cannot occur, as the big model
writes there; a closing tag outside one stays in the trace and is counted as malformed; at the
total budget the trace ends with finish `length`, a prompt with no room left in the context
gives an empty trace with finish `prompt`, and an engine that fails ends the traces it was
asked for with finish `error`.

Deviation from the paper (section on inference): control returns at the exact token, seen in one
pass, where the public code generates a few tokens from every prefix to look for the tag.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from typing import Any, NamedTuple

from tqdm.auto import tqdm

from srlib import SrlibError, spans
from srlib.engine import STOP_TAIL, Request, Sampling
from srlib.params import slots_for
from srlib.policies import Policy, Speculative
from srlib.problems import encode_for_each
from srlib.spans import Tags
from srlib.translate import Bridge

SMALL, BIG, FORCED = 0, 1, 2  # who wrote a token; FORCED: put in by the controller
NAN = float("nan")
GATHER = 0.2  # of the requests that wait: an engine with fewer lets them gather into fuller batches
Steps = Generator[Request, None, None]  # what is waited for, until it is done


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
    finish: str = ""  # eos, length, prompt or error
    error: str = ""  # what went wrong, where `finish` is error
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
        return spans.strip(tokenizer.decode(spans.strip(self.ids, self.tags), skip_special_tokens=True))

    def pieces(self, tokenizer) -> list[tuple[str, bool]]:
        """The trace with its tags, cut where the owner changes: (text, by the big model)."""
        runs = itertools.groupby(zip(self.ids, self.owners), key=lambda token: token[1] == BIG)
        return [(tokenizer.decode([i for i, _ in run]), big) for big, run in runs]


class _Side:
    """One model's view of one trace: a sequence, and what it has still to read."""

    def __init__(self, engine, prompt_ids: list[int], sampling: Sampling) -> None:
        self.engine, self.sampling = engine, sampling
        self.unread = list(prompt_ids)
        self.sequence = None
        self.length = 0  # ids the sequence has, as far as they have been heard of

    def request(self, **ask) -> Request:
        """To read what is unread and do what is asked; to yield it is to submit it and wait for it."""
        if self.sequence is None:
            self.sequence = self.engine.open([], self.sampling)
        feed, self.unread = self.unread, []
        self.length += len(feed)
        return Request(self.sequence, feed, **ask)

    def answered(self, request: Request) -> None:
        """Take note of what `request`, which is done, has written.

        Raises:
            SrlibError: it failed.
        """
        if request.error:
            raise request.error
        self.length += len(request.ids)

    def read(self) -> None:
        """Have what is unread read while others work."""
        if self.unread:
            self.engine.submit(self.request())

    def take_back(self, tokens: int) -> None:
        """Take the last `tokens` ids back."""
        self.length -= tokens
        self.engine.truncate(self.sequence, self.length)

    def close(self) -> None:
        """Give the slot back."""
        if self.sequence is not None:
            self.engine.close(self.sequence)

    @property
    def forwarded(self) -> int:
        """How many tokens the model has processed for this trace."""
        return self.sequence.forwarded if self.sequence else 0


class Writer:
    """The writing of one trace: what a policy may do with it. What takes time is a generator of requests.

    A request that is yielded is submitted as soon as fewer than `batch_size` wait for its model.
    """

    def __init__(self, offloader: Offloader, prompt_ids: list[int], big_prompt_ids: list[int], seed: int) -> None:
        self.o, self.seed = offloader, seed
        self.trace = Trace(list(prompt_ids), offloader.tags)
        # One seed for both: where they agree on a token's distribution they draw the same token.
        self.small = _Side(offloader.small, prompt_ids, Sampling(*offloader.sampling, seed))
        self.big = _Side(offloader.big, big_prompt_ids, Sampling(*offloader.big_sampling, seed))
        rooms = [
            engine.context - len(ids)
            for engine, ids in ((offloader.small, prompt_ids), (offloader.big, big_prompt_ids))
            if engine is not None
        ]
        self.room = min(offloader.max_tokens, *rooms)
        self.to_big, self.to_small = offloader.bridge.start()
        self._unfed = 0  # ids of the big model's last chunk that have not gone through `to_small`
        self._shown = 0  # the big model has been given the trace up to here, as far as the small one wrote it
        if self.room <= 0:
            self.trace.finish = "prompt"

    @property
    def left(self) -> int:
        """Tokens left in the total budget."""
        return self.room - len(self.trace.ids)

    @property
    def done(self) -> bool:
        return bool(self.trace.finish)

    def close(self) -> None:
        """Give the slots back."""
        self.small.close()
        self.big.close()

    def count(self) -> None:
        """Note in the trace what each model has processed for it."""
        self.trace.small_forward_tokens, self.trace.big_forward_tokens = self.small.forwarded, self.big.forwarded

    def small_writes(
        self, n: int, tags: bool = False, max_entropy: float | None = None
    ) -> Generator[Request, None, str | None]:
        """Up to `n` tokens by the small model, up to a tag with `tags`, or to where it is unsure.

        Args:
            max_entropy: of a token's distribution, in nats; a token above it is not written.

        Returns:
            the tag it ended with, `unsure`, or None.
        """
        o, eos, start = self.o, self.o.small_eos, len(self.trace.ids)
        ends = o.tag_ends if tags else {"stops": eos}
        end = start + min(n, self.left)
        while True:
            before = len(self.trace.ids)
            request = self.small.request(
                max_new=min(end - before, o.stream_chunk or o.max_tokens),
                max_entropy=max_entropy,
                recent=self.trace.ids[max(start, before - STOP_TAIL) : before],
                **ends,
            )
            yield request
            self.small.answered(request)
            self._append(request.ids, SMALL, request.logprobs)
            if request.stopped or request.unsure or len(self.trace.ids) >= end:
                break
            if o.big is not None:  # it reads along, but for what may be the beginning of a tag
                self._show(start, STOP_TAIL if tags and o.plain_tags else 0)
                self.big.read()
        stopped = request.stopped
        tag = self._settle(stopped) if isinstance(stopped, str) else o.tag_of.get(stopped)
        self._end_if(stopped in eos)
        if not self.done:
            self._show(start, len(o.ids_of[tag]) if tag else 0, last=True)
        return tag or ("unsure" if request.unsure else None)

    def big_writes(self, n: int) -> Steps:
        """Up to `n` tokens by the big model."""
        start, began = len(self.trace.ids), self.o.clock()
        ended = yield from self._big_chunk(self._ask_big(n), last=True)
        self._end_if(ended)
        self._handover(start, len(self.trace.ids), self.trace.finish or "chunk", began)

    def span(self, budget: int | None = None) -> Steps:
        """The big model writes until the small one would close the span, or a budget or the text ends.

        Args:
            budget: most tokens of the span, where it is to be less than the span budget.
        """
        o, start, began, closed_by, tag = self.o, len(self.trace.ids), self.o.clock(), "", 0
        budget = min(budget or o.span_budget, o.span_budget)
        request = self._ask_big(min(o.control_chunk, budget))
        while not closed_by:
            before = len(self.trace.ids)
            ended = yield from self._big_chunk(request)
            n, ahead = len(self.trace.ids) - before, None
            left = min(o.control_chunk, budget - (len(self.trace.ids) - start))
            if o.overlap and left > 0 and self.left > 0 and not ended:
                ahead = self.big.engine.submit(self._ask_big(left))
            if n > ended:
                tag = yield from self._close_if_wanted(n, n - ended, ahead)
            if tag:
                closed_by = "small"
                continue
            self._end_if(ended)
            closed_by = self.trace.finish or ("budget" if left <= 0 else "")
            if not closed_by:
                request = ahead or self._ask_big(left)
        if closed_by == "budget" and self.to_small.held:
            self._take_back_big(n)
        end = len(self.trace.ids) - tag
        if closed_by == "budget":
            close = list(self.trace.tags.close)[: self.left]
            self._append(close, FORCED, [NAN] * len(close))
            self.small.unread += close
        self._end_if(False)
        self._handover(start, end, closed_by, began)

    def draft(self, n: int) -> Steps:
        """The small model drafts `n` tokens; the big one keeps those it would have written, and adds the next.

        Every token is the one that the big model alone would have written: in one pass over the
        draft it answers what it would have put at each place. (Leviathan et al. 2023, arXiv
        2211.17192; as both draw with one seed, kept and replaced tokens are exactly the big model's.)
        """
        eos = self.o.big_eos
        asked = min(n, self.left - 1)
        drafted: list[int] = []
        if asked:
            tags = () if self.o.plain_tags else self.o.tag_ids  # the big model does not know them
            request = self.small.request(max_new=asked, stops=(*eos, *tags))
            yield request
            self.small.answered(request)
            tag = len(request.stopped) if request.stopped in tags else 0
            drafted = request.ids[: len(request.ids) - tag]
            if tag:
                self.small.take_back(tag)
        began = self.o.clock()
        self.big.unread += drafted
        answer = self.big.request(ask=len(drafted) + 1)
        yield answer
        self.big.answered(answer)
        kept = 0
        while kept < len(drafted) and drafted[kept] == answer.own[kept]:
            kept += 1
        if drafted:
            self._append(drafted[:kept], SMALL, request.logprobs[:kept])
        if extra := len(drafted) - kept:
            self.small.take_back(extra)
            self.big.take_back(extra)
        if kept and (drafted[kept - 1],) in eos:
            return self._end_if(True)
        start, token = len(self.trace.ids), answer.own[kept]
        self._append([token], BIG, [NAN])
        self.small.unread.append(token)
        self.big.unread.append(token)
        self._end_if((token,) in eos)
        self._handover(start, start + 1, self.trace.finish or "draft", began)

    def _ask_big(self, n: int) -> Request:
        return self.big.request(max_new=min(n, self.left), stops=self.o.big_eos)

    def _big_chunk(self, request: Request, last: bool = False) -> Generator[Request, None, bool]:
        """What `request` has the big model write; returns whether the text ended."""
        yield request
        self.big.answered(request)
        ended, same = request.stopped is not None, self.o.bridge.same
        written = request.ids if same or not ended else request.ids[:-1]
        ids = self.to_small.feed(written, last or ended)
        self._unfed = len(request.ids) - len(written)  # the big model's end of text is no text
        if ended and not same:
            ids.append(self.o.tokenizer.eos_token_id)
        if len(ids) > self.left:  # the small model writes it in more tokens
            self._take_back_big(self.left)
            ids, ended = ids[: self.left], False
        self._append(ids, BIG, request.logprobs if same else [NAN] * len(ids))
        self.small.unread += ids
        return ended

    def _take_back_big(self, kept: int) -> None:
        """Of what the big model's last chunk is to the small one, only the first `kept` ids stay."""
        taken, again = self.to_small.rewind(kept)
        if taken + self._unfed:
            self.big.take_back(taken + self._unfed)
        self._unfed = 0
        self.big.unread += again

    def _close_if_wanted(self, n: int, asked: int, ahead: Request | None) -> Generator[Request, None, int]:
        """The small model reads the last `n` tokens: would it close the span after one of the first `asked`?

        If so, the tokens behind that place are dropped, `ahead` is taken back, and the tag is
        written. Returns its length, or 0.
        """
        close, o = self.trace.tags.close, self.o
        request = self.small.request(ask=n, watch=close[0])
        yield request
        self.small.answered(request)
        place = next((i for i, token in enumerate(request.own[:asked]) if token in o.may_close), None)
        if place is None or (self.left < len(close) and n == place + 1):
            return 0
        tries = None
        if o.plain_tags:  # it began like the tag: the small model writes on, and another word is taken back
            tries = self.small.request(max_new=len(close) + 2, stop_texts=spans.SPELLINGS)
            yield tries
            self.small.answered(tries)
            text = o.tokenizer.decode(tries.ids).lstrip()
            if not text.startswith(spans.SPELLINGS[1:]):
                self.small.take_back(len(tries.ids))
                return 0
        if ahead is not None:
            self.big.engine.cancel(ahead)
        self._take_back_big(place + 1)
        if extra := n - place - 1:
            self.small.take_back(extra)
            self._drop(extra)
        if tries is None:
            self._append(list(close), SMALL, [request.watched[place]])
            self.small.unread += close
        elif tuple(tries.ids) == close:
            self._append(tries.ids, SMALL, tries.logprobs)
        else:
            self.small.take_back(len(tries.ids))
            self._append(list(close), FORCED, [NAN] * len(close))
            self.small.unread += close
        return len(close)

    def _settle(self, tag: str) -> str:
        """Write the tag that the last tokens spell in the tokens it has alone; returns it in its usual spelling."""
        o = self.o
        tail = self.trace.ids[-STOP_TAIL:]
        text = o.tokenizer.decode(tail)
        at = text.rindex(tag)
        kept = len(tail)
        while not text[:at].startswith(before := o.tokenizer.decode(tail[:kept])):
            kept -= 1
        tag = spans.OPEN if tag == spans.OPEN else spans.CLOSE
        written = list(o.ids_of[tag])
        again = o.tokenizer.encode(text[len(before) : at], add_special_tokens=False) + written
        if again != tail[kept:] and self.left + len(tail) - kept >= len(again):
            self.small.take_back(len(tail) - kept)
            self._drop(len(tail) - kept)
            self._append(again, FORCED, [NAN] * len(again))
            self.small.unread += again
        return tag

    def _show(self, start: int, but: int, last: bool = False) -> None:
        """The big model gets to read what the small one has written since `start`, but for the last `but` ids."""
        fresh = self.trace.ids[max(start, self._shown) : len(self.trace.ids) - but]
        self._shown = max(start, self._shown) + len(fresh)
        if not self.o.plain_tags:
            fresh = [token for token in fresh if token not in self.o.tag_tokens]
        self.big.unread += self.to_big.feed(fresh, last)

    def _drop(self, tokens: int) -> None:
        for column in (self.trace.ids, self.trace.owners, self.trace.logprobs):
            del column[-tokens:]

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


class Offloader:
    """Writes traces with two engines.

    Args:
        small, big: engines; the one a policy never asks may be None.
        policy: who writes.
        max_tokens: most tokens of a trace, tags included.
        span_budget: most tokens of one span.
        control_chunk: big tokens between two looks of the small model; tokens behind the place
            where it takes over are lost, so 1 wastes nothing. Always 1 if a tag is several tokens.
        batch_size: most traces that one model is asked for at a time; the others wait for their turn.
        temperature, top_p, top_k: of both models; temperature 0 is greedy.
        big_temperature: of the big model, where it is to differ.
        stream_chunk: the big model reads along every so many tokens of the small one; 0: when asked.
        overlap: the big model writes its next chunk while the small one looks at the last; for
            engines that really work at the same time, as one in a process of its own does.
        oversubscribe: traces under way beyond `batch_size`, as a part of it and as far as there are slots:
            some write while others are with the big model.
        hint: text put behind every prompt that is given as text.
        seed: with the prompt, it fixes a trace, whatever is written beside it.

    Raises:
        SrlibError: the vocabularies differ, and one of them cannot write every text, or the policy needs one.
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
        top_k: int = 0,
        big_temperature: float | None = None,
        stream_chunk: int = 0,
        overlap: bool = False,
        oversubscribe: float = 0.0,
        hint: str = "",
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.max_tokens, self.span_budget = max_tokens, span_budget
        self.stream_chunk, self.overlap, self.hint, self.seed = stream_chunk, overlap, hint, seed
        self.sampling = (temperature, top_p, top_k)
        self.big_sampling = (temperature if big_temperature is None else big_temperature, top_p, top_k)
        self.small, self.big = small, big
        self.engines = [engine for engine in (small, big) if engine is not None]
        # Where a request is to stop: at the end of the text, or of the small model's at a tag, too.
        self.small_eos, self.big_eos = (tuple((i,) for i in engine.eos) if engine else () for engine in (small, big))
        self.running = [engine for engine in self.engines if engine.running]
        self.stepping = [engine for engine in self.engines if not engine.running]
        slots = min(engine.slots for engine in self.engines)
        self.batch_size = min(batch_size, slots)
        self.under_way = min(slots_for(self.batch_size, oversubscribe), slots)  # most traces
        self.tokenizer = self.engines[0].tokenizer
        self.tags = Tags.of(self.tokenizer)
        self.tag_ids = (self.tags.open, *self.tags.closes)
        self.tag_of = dict(zip(self.tag_ids, spans.SPELLINGS))
        self.ids_of = dict(zip(spans.SPELLINGS, self.tag_ids))
        self.plain_tags = len(self.tags.close) > 1
        self.tag_tokens = {ids[0] for ids in self.tag_ids if len(ids) == 1}
        self.tag_ends: dict[str, Any] = {"stops": (*self.tag_ids, *self.small_eos)}
        self.may_close = frozenset(self.tags.close)
        self.control_chunk = control_chunk
        if self.plain_tags:
            self.control_chunk = 1
            self.tag_ends = {"stops": self.small_eos, "stop_texts": spans.SPELLINGS}
            self.may_close = _beginnings(self.tokenizer, spans.SPELLINGS[1:])
        self.bridge = Bridge(self.tokenizer, self.engines[-1].tokenizer)
        if isinstance(policy, Speculative) and not self.bridge.same:
            raise SrlibError("Speculative decoding needs two models of one vocabulary; these have different ones.")

    @property
    def concurrent(self) -> bool:
        """Whether its engines can work at the same time."""
        return bool(self.running)

    def clock(self) -> float:
        """Seconds since the run started."""
        return time.perf_counter() - self._start

    def run(
        self,
        prompts: Iterable[str | list[int]],
        progress: bool = False,
        numbers: Iterable[int] | None = None,
        finished: Callable[[int, Trace], None] | None = None,
    ) -> list[Trace]:
        """Write one trace for each prompt, text or ids.

        A prompt given k times is written with k different seeds. `controller_seconds` are those
        in which no engine was waited for.

        Args:
            numbers: which sample of its prompt each trace is, from 0; None: as they come. With the seed
                and the prompt it fixes the trace, so some of many samples can be written later.
            finished: called with a trace's place among the prompts and the trace, as soon as it has ended.
        """
        self._start, waited = time.perf_counter(), 0.0
        times_seen: Counter[tuple[int, ...]] = Counter()
        writers = []
        given = iter(numbers) if numbers is not None else None
        for ids, big_ids in self._encode(list(prompts)):
            key = tuple(ids)
            number = times_seen[key] if given is None else next(given)
            times_seen[key] += 1
            text = f"{self.seed} {number} {ids}"
            seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
            writers.append(Writer(self, ids, big_ids, seed))
        waiting = deque(writers)
        under_way: dict[Request, tuple[Writer, Steps, Any]] = {}  # with the engine that is waited for
        asked = dict.fromkeys(self.engines, 0)  # how many wait for each
        queues: dict[Any, deque[Request]] = {engine: deque() for engine in self.engines}  # not submitted yet
        bar = tqdm(total=len(writers), desc=self.policy.name, unit="trace", disable=not progress, mininterval=1)

        def advance(writer: Writer, steps: Steps) -> None:
            """Go on with one trace until it has to wait."""
            try:
                while (request := next(steps)).done:
                    pass
                engine = (writer.big if request.sequence is writer.big.sequence else writer.small).engine
                under_way[request] = writer, steps, engine
                if request.start is None:
                    queues[engine].append(request)
                else:  # submitted before it was waited for
                    asked[engine] += 1
                return
            except StopIteration:
                pass
            except SrlibError as error:
                writer.trace.finish, writer.trace.error = "error", str(error)
            writer.close()
            writer.count()
            bar.update()
            if finished is not None:
                finished(places[writer], writer.trace)

        places = {writer: i for i, writer in enumerate(writers)}
        gc.freeze()  # what is loaded is no garbage: to go through it all again and again would cost a tenth of the time
        try:
            while waiting or under_way:
                while waiting and len(under_way) < self.under_way:
                    writer = waiting.popleft()
                    advance(writer, iter(()) if writer.done else self.policy.write(writer))
                for engine, queue in queues.items():
                    while queue and asked[engine] < self.batch_size:
                        engine.submit(queue.popleft())
                        asked[engine] += 1
                before = time.perf_counter()
                done = self._answers() if under_way else []
                waited += time.perf_counter() - before
                for request in done:
                    request.done = True
                    if request in under_way:  # else nobody waits for it
                        writer, steps, engine = under_way.pop(request)
                        asked[engine] -= 1
                        advance(writer, steps)
        finally:  # an interrupted run gives its slots back, too
            gc.unfreeze()
            for writer, *_ in under_way.values():
                writer.close()
            bar.close()
        if self.concurrent and (self.stream_chunk or self.overlap):  # an engine may have worked on
            for writer in writers:
                writer.count()
        self.controller_seconds = self.clock() - waited
        return [writer.trace for writer in writers]

    def raise_if_failed(self, traces: list[Trace]) -> None:
        """For those who need every trace.

        Raises:
            SrlibError: one of `traces` ended with an error.
        """
        errors = [trace.error for trace in traces if trace.error]
        if errors:
            raise SrlibError(f"{self.policy.name}: {len(errors)} of {len(traces)} traces failed: {errors[0]}")

    def _answers(self) -> list[Request]:
        """Requests that have been done: by a step of an engine, by those that run, or by both."""
        for engine in self.running:
            engine.flush()
        # An engine that has gathered its part of what waits goes first, the one with less before the other.
        total = sum(len(engine.pending) for engine in self.stepping)
        ready = [engine for engine in self.stepping if engine.pending and len(engine.pending) >= GATHER * total]
        next_ = min(ready, key=lambda engine: len(engine.pending), default=None)
        done = next_.step() if next_ is not None else []
        if self.running and not done and not total:
            wait([engine.ready for engine in self.running])
        for engine in self.running:
            done += engine.collect()
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


def _beginnings(tokenizer, texts: tuple[str, ...]) -> frozenset[int]:
    """Ids of the tokens that one of `texts` may begin with, with or without space before it."""
    found = []
    for i in range(len(tokenizer)):
        piece = tokenizer.decode([i]).lstrip()
        if piece and any(text.startswith(piece) or piece.startswith(text) for text in texts):
            found.append(i)
    return frozenset(found)
