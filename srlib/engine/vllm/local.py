"""A model under vLLM, loaded in this process."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import count
from typing import Any

from srlib.engine.vllm.pieces import Piece


class Local:
    """A model that vLLM has loaded for this process, in processes of its own."""

    def __init__(self, arguments: dict[str, Any], lora: str | None) -> None:
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.lora.request import LoRARequest
        from vllm.v1.engine.async_llm import AsyncLLM

        self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self.lora = LoRARequest("adapter", 1, lora) if lora else None
        self.length = self.llm.model_config.max_model_len
        self._names = count()

    def _generate(self, ids: list[int], **asked: Any) -> AsyncGenerator[Any, None]:
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        if asked.get("logprob_token_ids"):
            asked["logprobs"] = None
        params = SamplingParams(**asked, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA)
        return self.llm.generate({"prompt_token_ids": ids}, params, str(next(self._names)), lora_request=self.lora)

    async def complete(self, ids: list[int], **asked: Any) -> AsyncGenerator[Piece, None]:
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
