"""A model and a pair of them: where they are, and how they are loaded."""

from __future__ import annotations

from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

from srlib.params.secrets import Address
from srlib.params.written import Anything


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _named_alone(cls, values: Any) -> Any:
        """A section that is named and holds nothing, as where its lines are comments, is as it is by default."""
        if not isinstance(values, dict):
            return values
        fields = {key: field.annotation for key, field in cls.model_fields.items()}
        sections = {key for key, kind in fields.items() if isinstance(kind, type) and issubclass(kind, Section)}
        return {key: value for key, value in values.items() if value is not None or key not in sections}


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, or may hold."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None)


class ModelSpec(Section):
    """Where a model is and how it is loaded."""

    path: str | None = Field(None, description="folder or hub name; empty: the one stage 00 trains")
    revision: str | None = Field(
        None, min_length=1, description="hub: branch, tag or commit of the model; empty: the newest"
    )
    adapter: str | None = Field(None, description="folder of a LoRA adapter to lay on top")
    merge: bool = Field(
        True,
        description="fold the adapter into the weights when it is loaded; quantised weights keep it beside them, "
        "and vllm merges one with trained token embeddings in any case",
    )
    template: dict[str, Anything] = Field(
        {}, description="arguments of the tokenizer's chat template, such as {enable_thinking: false}"
    )
    system: str = Field(
        "", description="system turn of the chat template, before every problem that has none of its own"
    )
    engine: Literal["transformers", "vllm"] = Field("transformers", description="what the model runs on")
    url: Address | None = Field(
        None,
        description="vllm: address of a running server, such as http://127.0.0.1:8000; the settings below, but "
        "for context, then only tell `plan` how it was started",
    )
    process: bool = Field(
        False, description="transformers: in a process of its own, so that both models of a pair work at the same time"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="auto, cpu, cuda, or one GPU such as cuda:1, for several the first; auto: a GPU if there is one",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="of weights and computation, but of what is quantised; auto: bfloat16 on a GPU (float16 on one "
        "that has none), float32 on a CPU",
    )
    quantization: Literal["none", "nf4", "int8", "awq", "gptq", "fp8"] = Field(
        "none",
        description="of the weights; transformers: nf4, int8, by bitsandbytes; vllm: fp8, and awq, gptq as they are saved",
    )
    context: int | None = Field(
        None, ge=16, description="tokens of the longest sequence there is room for; empty: the model's or server's own"
    )
    kv_cache_gb: float | None = Field(
        None, gt=0, description="vllm: size of the KV cache in GiB, on each device; empty: vLLM's choice, 2 on a CPU"
    )
    tensor_parallel: int = Field(1, ge=1, description="vllm: devices that share every layer")
    pipeline_parallel: int = Field(1, ge=1, description="vllm: groups of devices that share the layers out")
    ray: bool = Field(False, description="vllm: the devices are on several machines, under Ray")
    eager: bool = Field(
        False,
        description="vllm: neither compile the model nor replay CUDA graphs: it starts sooner, and writes slower; on a "
        "CPU it is so in any case",
    )

    @property
    def place(self) -> str:
        """The path, where there is one: `Params` gives every model of a run its own."""
        assert self.path is not None, "this spec names no model"
        return self.path

    @property
    def top(self) -> str:
        """Where what was trained last lies, with the tokenizer: the adapter, or without one the model."""
        return self.adapter or self.place

    @property
    def pinned(self) -> dict[str, str]:
        """The revision as an argument of what loads the model; none where none is named."""
        return {} if self.revision is None else {"revision": self.revision}

    @model_validator(mode="after")
    def _engine_can(self) -> ModelSpec:
        if self.engine == "transformers":
            if self.quantization in ("awq", "gptq", "fp8"):
                raise ValueError(
                    f"quantization {self.quantization} needs engine: vllm; transformers takes nf4 and int8"
                )
            several = self.tensor_parallel * self.pipeline_parallel > 1
            if self.url or self.ray or self.eager or self.kv_cache_gb or several:
                raise ValueError("url, ray, eager, kv_cache_gb and the parallel settings need engine: vllm")
            return self
        if self.process:
            raise ValueError("process needs engine: transformers; vllm works by itself")
        if self.quantization in ("nf4", "int8"):
            raise ValueError(
                f"quantization {self.quantization} needs engine: transformers; vllm takes awq, gptq and fp8"
            )
        if self.url and (self.ray or self.eager or self.device != "auto"):
            raise ValueError("device, ray and eager are for a model that is loaded here, and url names a server")
        if self.ray and ":" in self.device:
            raise ValueError(f"device is {self.device}, and with ray it is Ray that chooses the devices; leave it away")
        return self


class Pair(Section):
    """The models of a run."""

    small: ModelSpec = Field(ModelSpec(), description="the model that learns to ask, before it is tuned")
    big: ModelSpec = Field(ModelSpec(), description="the model that is asked; it is never trained")
    tuned: ModelSpec | None = Field(
        None, description="a small model that writes the tags already: 01 to 03 are left out"
    )
