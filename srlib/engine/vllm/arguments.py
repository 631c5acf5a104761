"""The settings of a model as arguments of vLLM's engine."""

from __future__ import annotations

from typing import Any

from srlib import SrlibError
from srlib.engine.adapters import _adapter_config
from srlib.params.models import ModelSpec

CPU_CACHE_GB = 2.0  # where no size is given; vLLM's own choice is nine tenths of the memory
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has room for


def arguments(spec: ModelSpec, path: str, slots: int, lora: str | None, cpu: bool) -> dict[str, Any]:
    """The settings of a spec as vLLM's engine arguments.

    Raises:
        SrlibError: the weights are not quantised in the way the spec says.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    saved = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if spec.quantization in ("awq", "gptq") and (not saved or {saved, spec.quantization} == {"awq", "gptq"}):
        was = f"quantised by {saved}" if saved else "not quantised"
        raise SrlibError(f"quantization is {spec.quantization}, but the weights of {path} are {was}.")
    given = {
        "model": path,
        "skip_tokenizer_init": True,
        "dtype": ("float32" if cpu else "bfloat16") if spec.dtype == "auto" else spec.dtype,
        # awq and gptq weights say so themselves; vLLM then takes the fastest kernel for them.
        "quantization": "fp8" if spec.quantization == "fp8" else None,
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
        first = int(spec.device.removeprefix("cuda:"))
        given["device_ids"] = [first + i for i in range(spec.tensor_parallel * spec.pipeline_parallel)]
    if cpu:
        given["block_size"] = 32  # the least for a CPU, where 128 is usual
    if size := spec.kv_cache_gb or (CPU_CACHE_GB if cpu else None):
        # The share of memory is then a mere check at the start, which a second model here would fail.
        given |= {"kv_cache_memory_bytes": int(size * 2**30), "gpu_memory_utilization": 0.01}
    if lora:
        rank = _adapter_config(lora)["r"]
        given |= {"enable_lora": True, "max_lora_rank": next((r for r in LORA_RANKS if r >= rank), rank)}
    return given
