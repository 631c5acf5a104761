"""A model's files, looked at without loading it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from srlib import SrlibError
from srlib.data.rows import read_json
from srlib.params import ModelSpec


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
    for file in folder.glob("*.json"):
        held = read_json(file, dict[str, Any], "make it again")
        absent = [name for name in set(held.get("weight_map", {}).values()) if not (folder / name).is_file()]
        if file.name.endswith(".index.json") and absent:
            raise SrlibError(
                f"There is no whole {kind} in {folder}: {absent[0]}, which {file.name} names, is not there."
            )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SrlibError(f"There is no {kind} in {folder}: it holds no .safetensors file.")
    for file in weights:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise SrlibError(f"{file} is damaged ({error}); make it again.") from None
