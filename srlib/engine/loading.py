"""From a model's name or folder to an engine, or to a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from srlib.engine import files
from srlib.params.models import ModelSpec

if TYPE_CHECKING:
    from srlib.engine.protocol import Engine


def check(spec: ModelSpec) -> None:
    """Look at what a model is loaded from, without loading it: its files, and for vLLM its settings.

    Raises:
        SrlibError: no such model or adapter, one of its files is damaged, or vLLM is not installed
            or refuses a setting.
    """
    files.check(spec)
    if spec.engine == "vllm" and not spec.url:
        from srlib.engine.vllm import arguments

        arguments.check(spec)


def load(spec: ModelSpec | str | Path, slots: int = 64) -> Engine:
    """An engine from a model's name or folder.

    Args:
        spec: name or path, or a `ModelSpec` with engine, adapter, device and dtype.
        slots: how many sequences can be open at the same time.

    Raises:
        SrlibError: no such model or adapter, one of its files is damaged, or vLLM is not installed
            or not reached.
    """
    spec = spec if isinstance(spec, ModelSpec) else ModelSpec(path=str(spec))
    if spec.engine == "vllm":
        from srlib.engine.vllm import engine

        return engine.load(spec, slots)
    if spec.process:
        from srlib.engine import process

        return process.ProcessEngine(spec, slots)
    from srlib.engine import transformers

    return transformers.load(spec, slots)
