"""A model under vLLM, behind an OpenAI server that runs already."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx

from srlib import SrlibError
from srlib.engine.vllm.pieces import Piece
from srlib.params.models import ModelSpec

PATIENCE = 600.0  # seconds for which a server that does not answer is waited for


class Server:
    """An OpenAI server of vLLM that runs already."""

    def __init__(self, spec: ModelSpec) -> None:
        assert spec.url is not None
        self.url = spec.url.rstrip("/").removesuffix("/v1")
        self.model, self.length = served(self.url, spec)
        # The server closes idle connections after 5 s, and to use one just then is an error.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2)
        timeout = httpx.Timeout(PATIENCE, connect=10)
        self.client = httpx.AsyncClient(base_url=self.url, limits=limits, timeout=timeout)
        self._lost = False  # it did not answer when it was last asked
        self._asking = asyncio.Lock()

    async def complete(self, ids: list[int], **asked: Any) -> AsyncGenerator[Piece, None]:
        """The tokens the server writes after `ids`; to close it before its end aborts the request."""
        asked |= {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        asked |= {"return_token_ids": True, "return_tokens_as_token_ids": True}
        async with aclosing(self._lines(ids, asked)) as lines:
            async for line in lines:
                if not line.startswith("data: {"):
                    continue
                answer = json.loads(line.removeprefix("data: "))
                if "error" in answer:
                    raise SrlibError(f"The server at {self.url} failed on a request: {message(answer)}")
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

    async def _lines(self, ids: list[int], asked: dict[str, Any]) -> AsyncGenerator[str, None]:
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
                        why = message(json.loads(await response.aread()))
                        raise SrlibError(f"The server at {self.url} refused a request: {why}")
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


def message(answer: dict) -> str:
    error = answer.get("error", answer)
    return str(error.get("message", error) if isinstance(error, dict) else error)


def served(url: str, spec: ModelSpec) -> tuple[str, int]:
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
        raise SrlibError(f"The server at {url} does not serve {spec.top}; it has {names}.")
    return found[0]["id"], next(card["max_model_len"] for card in (*found, *cards) if card.get("max_model_len"))
