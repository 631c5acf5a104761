"""The engine on vLLM: a model loaded in this process, or a server that runs already.

vLLM batches by itself, so the engine is a running one: an event loop in a thread of its own hands
every request to vLLM. vLLM keeps no open sequences: each request gives it all the ids, and its
prefix cache finds those it has read before, in whole blocks: about half a block a request is read
again, and a look at n tokens is n requests. So nothing is lost if a server is started anew between
two requests.

What would read less, counted in vLLM's scheduler for a model that writes 40 tokens between spans of
8, in blocks of 32 (vLLM 0.32, CPU): a hand-over reads 124 tokens more than are new with looks at one
token, 273 with looks at 16.

- Sessions that stay open (`StreamingInput`): none. But they read on and never back, so what is taken
  back needs a new one; they answer one place a step, 16 steps for a look at 16 tokens instead of one;
  and a server has none, so this way would remain beside them.
- A look as one request, with log-probabilities of its prompt from the cache: 38. But they come for greedy
  looks alone, as they are at temperature 1 and without a draw; and for places that are in the cache
  already, as they are once another trace has had the same tokens, vLLM answers uninitialised memory.

How it differs from the transformers engine:

- Draws. A decode draws with one generator, seeded by the sequence's seed and the position of its
  first token. So it is repeatable, and that token is the one an extend answers there; the later
  ones have the same distribution, but an extend would draw others.
- Log-probabilities are those after `top_k` and `top_p` have cut (`watched` is -inf for what was cut
  away), so exact without them. A server gives those at temperature 1, exact at temperature 0 and
  1, unless it was started with `--logprobs-mode processed_logprobs`. `score` is at temperature 1.
- `doubt` sees the 20 likeliest tokens and takes all others for one: an entropy is a little too low, and
  more so the lower the temperature, from which it is reckoned back. Once it has been used, `watched` is nan for
  an id that is not one of the 20 likeliest.
- Counts. A server tells what it had in its cache if it was started with
  `--enable-prompt-tokens-details`, and only for requests that vLLM itself ends; else all that was
  processed before is taken to be there. What vLLM computes until it hears of a stop it does not
  know (of several ids, a text, `doubt`, a cancel) is not counted.
"""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections.abc import Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from socket import socket, socketpair
from threading import Thread, current_thread
from typing import Any

from srlib import SrlibError
from srlib.engine.adapters import beside, merge
from srlib.engine.files import check
from srlib.engine.protocol import Measure, Request, Running, Sampling, Sequence
from srlib.engine.vllm.arguments import arguments, on_cpu, told
from srlib.engine.vllm.local import Local
from srlib.engine.vllm.pieces import gather, uncertainty
from srlib.engine.vllm.server import Server
from srlib.params import ModelSpec

TOP = 20  # likeliest tokens an entropy is estimated from; vLLM gives no more by default
BAN = -100.0  # added to a logit, the least that vLLM takes: a probability below 1e-40 where the others are not as low
INTERVAL = 8  # tokens that come together where none of them has to be looked at


class VllmEngine(Running):
    """A causal language model under vLLM; it works by itself.

    Args:
        spec: the model; with `url` the one of a server, else it is loaded here.
        slots: how many sequences can be open at the same time.
    """

    ready: socket

    def __init__(self, spec: ModelSpec, slots: int) -> None:
        super().__init__(spec, slots)
        self.tokenizer, self.eos = _texts(spec)
        self._doubted = False  # whether `doubt` has been used
        self._answers: SimpleQueue[Request] = SimpleQueue()  # not collected yet
        self.ready, self._bell = socketpair()
        self.ready.setblocking(False)
        self._bell.setblocking(False)
        self._under_way: dict[Request, asyncio.Task] = {}  # only the loop's thread touches it
        self._since = 0.0  # when the first of them began
        self._loop = asyncio.new_event_loop()
        thread = Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        thread.start()
        try:
            self._model = self._wait(_start(spec, slots))
        except BaseException:
            self._loop.call_soon_threadsafe(self._loop.stop)
            raise
        longest = self._model.length - 1  # vLLM wants room for the token it answers with
        self.context = min(spec.context or longest, longest)
        # Frees the model, once: when it is called, when the engine is garbage, or at exit.
        self.shutdown = weakref.finalize(self, _stop, self._model, self._loop, thread)

    def close(self, sequence: Sequence) -> None:
        """Give the slot back; what was asked for the sequence is forgotten."""
        self._wait(self._end(lambda request: request.sequence is sequence))
        self._open -= 1

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Take back all but the first `length` ids of a sequence."""
        del sequence.ids[length:]
        if sequence.processed > length:
            self.counters.discarded_tokens += sequence.processed - length
            sequence.processed = length

    def cancel(self, request: Request) -> None:
        """Take a request back: it is not answered, and the sequence's ids are as they were before it."""
        self._wait(self._end(lambda other: other is request))
        for other in self.collect():  # it may be there already
            if other is not request:
                self._give(other)
        assert request.start is not None  # it was submitted
        self.truncate(request.sequence, request.start)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability of every id of each sequence but its first, given what stands before it.

        Raises:
            SrlibError: a sequence is too long, or the model failed.
        """
        rows = self._scan(sequences, 0)
        return [[row[i] for i, row in zip(ids[1:], each)] for ids, each in zip(sequences, rows)]

    def doubts(self, sequences: list[list[int]], measure: Measure = "entropy") -> list[list[float]]:
        """As `score`, but how unsure the model is of each id; see `doubt` above."""
        return [[uncertainty(measure, row.values()) for row in each] for each in self._scan(sequences, TOP)]

    def _scan(self, sequences: list[list[int]], top: int) -> list[list[dict[int, float]]]:
        """For every id of each sequence but its first: its log-probability, and those of the `top` likeliest."""
        for ids in sequences:
            self._check_length(ids)
        self.counters.forward_tokens += sum(map(len, sequences))
        self.counters.calls += len(sequences)
        return self._wait(gather(self._model.scan(ids, top) for ids in sequences))

    def reload(self, folder: Path) -> None:
        """Take on the weights of the model in `folder`, which has the same shape; what was cached is forgotten.

        Raises:
            SrlibError: a server was not started with `VLLM_SERVER_DEV_MODE=1`, or cannot read the folder.
        """
        self._wait(self._model.reload(str(folder)))

    def _wait(self, work: Coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def submit(self, request: Request) -> Request:
        """Ask for work; it begins at once."""
        request.start = len(request.sequence.ids)
        request.sequence.ids += request.feed
        self._loop.call_soon_threadsafe(self._begin, request, list(request.sequence.ids))
        return request

    def collect(self) -> list[Request]:
        """The requests that are done and were not given before; waits for none."""
        with suppress(BlockingIOError):
            self.ready.recv(4096)
        done = []
        while not self._answers.empty():
            done.append(self._answers.get())
        return done

    def _give(self, request: Request) -> None:
        """Lay a request that is done ready for `collect`."""
        self._answers.put(request)
        with suppress(BlockingIOError):  # full of bells nobody has heard yet
            self._bell.send(b"!")

    def _begin(self, request: Request, ids: list[int]) -> None:
        if not self._under_way:
            self._since = time.perf_counter()
        self._under_way[request] = self._loop.create_task(self._serve(request, ids))
        self._under_way[request].add_done_callback(partial(self._end_of, request))

    def _end_of(self, request: Request, task: asyncio.Task) -> None:
        del self._under_way[request]
        if not self._under_way:
            self.counters.seconds += time.perf_counter() - self._since
        if not task.cancelled():
            self._give(request)

    async def _end(self, chosen: Callable[[Request], bool]) -> None:
        """Cancel the requests under way that are `chosen`."""
        tasks = [task for request, task in self._under_way.items() if chosen(request)]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _serve(self, request: Request, ids: list[int]) -> None:
        try:
            self._check_length(ids)
            await (self._decode(request, ids) if request.max_new else self._extend(request, ids))
        except SrlibError as error:
            request.error = error
        except Exception as error:
            what = " ".join(str(error).split()) or type(error).__name__
            request.error = SrlibError(f"vLLM failed on a request to {self.spec.url or self.spec.path}: {what}")

    def _check_length(self, ids: list[int]) -> None:
        if not 0 < len(ids) <= self.context:
            raise SrlibError(
                f"A sequence of {len(ids)} ids was given to {self.spec.path}, which takes 1 to {self.context}; "
                "shorten it, or raise `context`."
            )

    async def _decode(self, request: Request, ids: list[int]) -> None:
        sequence, doubt = request.sequence, request.doubt
        # At which log-probabilities are given; see above on servers.
        temperature = 1.0 if self.spec.url else sequence.sampling.temperature or 1.0
        self._doubted |= doubt is not None
        known = {stop for stop in request.stops if len(stop) == 1}  # vLLM ends at these by itself
        look = doubt or request.stop_texts or len(known) < len(request.stops)
        pieces = self._model.complete(
            ids,
            max_tokens=min(request.max_new, self._model.length - len(ids)),
            stop_token_ids=[i for (i,) in known],
            logprobs=TOP if doubt else 0,
            stream_interval=1 if look or request.live else INTERVAL,
            **({"logit_bias": dict.fromkeys(request.banned, BAN)} if request.banned else {}),
            **_drawn(sequence.sampling, len(ids)),
        )
        cached, answered = None, False
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    cached, answered = piece.cached if cached is None else cached, True
                    for token, logprobs in zip(piece.ids, piece.logprobs):
                        if doubt and uncertainty(doubt.measure, logprobs.values(), temperature) > doubt.above:
                            request.unsure = True
                            break
                        sequence.ids.append(token)
                        self.counters.decoded_tokens += 1
                        if request.add(token, logprobs[token], self.tokenizer):
                            break
                    if request.unsure or (request.stopped and request.stopped not in known):
                        break  # closing the stream ends the request
        finally:
            if answered:
                unread = 1 if request.ids and not request.unsure else 0  # the last token is written, and not processed
                self._count(sequence, len(ids), cached, len(ids) + len(request.ids) - unread)

    async def _extend(self, request: Request, ids: list[int]) -> None:
        """For each place that is asked about, a request of one token to vLLM."""
        ends = range(len(ids) - max(request.ask, 1) + 1, len(ids) + 1)
        watch = request.watch if isinstance(request.watch, tuple) else (request.watch,) * len(ends)
        answers = await gather(self._answer(request, ids[:end], each) for end, each in zip(ends, watch))
        for end, each, (token, logprobs, cached) in zip(ends, watch, answers):
            self._count(request.sequence, end, cached, end)
            if request.ask:
                request.own.append(token)
                if each is not None:
                    request.watched.append(logprobs.get(each, math.nan))

    async def _answer(
        self, request: Request, ids: list[int], watch: int | None
    ) -> tuple[int, dict[int, float], int | None]:
        """The token after `ids`, its log-probability and that of `watch`, and how many of `ids` were in the cache."""
        asked: dict[str, Any] = {"logprobs": 0}
        if watch is not None:
            # In one batch vLLM gives either named ids or the likeliest to all requests.
            asked = {"logprobs": TOP} if self._doubted else {"logprobs": 0, "logprob_token_ids": [watch]}
        pieces = self._model.complete(ids, max_tokens=1, **asked, **_drawn(request.sequence.sampling, len(ids)))
        answers = [piece async for piece in pieces]
        token, logprobs = next((p.ids[0], p.logprobs[0]) for p in answers if p.ids)
        return token, logprobs, next((p.cached for p in answers if p.cached is not None), None)

    def _count(self, sequence: Sequence, prompt: int, cached: int | None, processed: int) -> None:
        """`processed` ids of a sequence are processed, of them `prompt` at one go, but for the first `cached`."""
        if cached is None:
            cached = min(sequence.processed, prompt - 1)
        self.counters.prefilled_tokens += prompt - cached if prompt - cached > 1 else 0
        self.counters.forward_tokens += processed - cached
        self.counters.reread_tokens += max(0, min(sequence.longest, processed) - cached)
        self.counters.calls += 1
        sequence.forwarded += processed - cached
        sequence.processed = min(max(sequence.processed, processed), len(sequence.ids))
        sequence.longest = max(sequence.longest, processed)


def _stop(model: Local | Server, loop: asyncio.AbstractEventLoop, thread: Thread) -> None:
    async def stop() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        try:
            await model.stop()
        finally:
            loop.call_soon(loop.stop)

    asyncio.run_coroutine_threadsafe(stop(), loop)
    if current_thread() is not thread:
        thread.join(timeout=30)


def _drawn(sampling: Sampling, position: int) -> dict[str, Any]:
    """How the token at `position` is drawn, in vLLM's words."""
    if not sampling.temperature:
        return {"temperature": 0.0}
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": sampling.number(position) >> 1,
    }


def _texts(spec: ModelSpec) -> tuple[Any, frozenset[int]]:
    """Tokenizer, and the ids that end a text."""
    from transformers import AutoConfig, GenerationConfig

    from srlib.engine.models import eos_of, load_tokenizer

    if not spec.url:
        check(spec)
    tokenizer = load_tokenizer(spec)
    try:
        try:
            generation = GenerationConfig.from_pretrained(spec.path, **spec.pinned)
        except OSError:  # it is no file of every model
            generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(spec.path, **spec.pinned))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise SrlibError(f"{spec.path} is no folder here, and the hub gave no such model: {reason}") from None
    return tokenizer, eos_of(generation, tokenizer)


async def _start(spec: ModelSpec, slots: int) -> Local | Server:
    if spec.url:
        return Server(spec)
    cpu = on_cpu(spec)
    lora = spec.adapter if spec.adapter and beside(spec) else None
    path = spec.place if lora or not spec.adapter else str(merge(spec))
    with told(path):
        return Local(arguments(spec, path, slots, lora, cpu), lora)


def load(spec: ModelSpec, slots: int) -> VllmEngine:
    """See `srlib.engine.load`.

    Raises:
        SrlibError: vLLM is not installed or cannot load the model, or no server answers at `url`.
    """
    return VllmEngine(spec, slots)
