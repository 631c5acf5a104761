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
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from typing import Any

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.data import spans
from srlib.data.prompts import encode_for_each
from srlib.data.spans import Tags
from srlib.decoding.policies import Policy, Speculative
from srlib.decoding.trace import Trace
from srlib.decoding.translate import Bridge
from srlib.decoding.writer import Steps, Writer
from srlib.engine.protocol import Request
from srlib.params import slots_for

GATHER = 0.2  # of the requests that wait: an engine with fewer lets them gather into fuller batches


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
