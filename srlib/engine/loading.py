"""From a model's name or folder to an engine, or to a model and its tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from srlib import SrlibError
from srlib.params.models import ModelSpec

if TYPE_CHECKING:
    from srlib.engine.protocol import Engine


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


def check(spec: ModelSpec) -> None:
    """Look at a model's files without loading it; a name that is no folder here is left to the hub.

    Raises:
        SrlibError: a folder holds no model or no adapter, or a safetensors file is not whole.
    """
    if spec.path is None:
        raise SrlibError("No model is named: give pair.small.path and pair.big.path a folder or a hub name.")
    # A hub name has at most one slash; anything else must be a folder.
    if Path(spec.path).exists() or spec.path.startswith((".", "/")) or spec.path.count("/") > 1:
        _check_folder(Path(spec.path), "config.json", "model")
    if spec.adapter is not None:
        _check_folder(Path(spec.adapter), "adapter_config.json", "adapter")


def _check_folder(folder: Path, config: str, kind: str) -> None:
    from safetensors import SafetensorError, safe_open

    if not (folder / config).is_file():
        raise SrlibError(f"There is no {kind} in {folder}: {config} is not there.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SrlibError(f"There is no {kind} in {folder}: it holds no .safetensors file.")
    for file in weights:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise SrlibError(f"{file} is damaged ({error}); make it again.") from None
