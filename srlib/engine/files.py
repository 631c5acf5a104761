"""A model's files, looked at without loading it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from srlib import SrlibError
from srlib.data.rows import read_json, unwritten
from srlib.params import ModelSpec

# What transformers and peft read, beside the weights; other files of a folder are no concern of theirs.
READ = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
)


class Index(TypedDict):
    """Which file holds which tensor of a model in several files."""

    weight_map: dict[str, str]


def check(spec: ModelSpec) -> None:
    """Look at a model's files without loading it; a name that is no folder here is left to the hub.

    Raises:
        SrlibError: a revision of a folder is asked for, a folder holds no model or no adapter, a file of JSON holds something else, or a
            safetensors file is missing or not whole.
    """
    if spec.path is None:
        raise SrlibError("No model is named: give pair.small.path and pair.big.path a folder or a hub name.")
    # A hub name has at most one slash; anything else must be a folder.
    if Path(spec.path).exists() or spec.path.startswith((".", "/")) or spec.path.count("/") > 1:
        if spec.revision is not None:
            raise SrlibError(f"{spec.path} is a folder, and has no revision {spec.revision!r}: leave it away.")
        _check_folder(Path(spec.path), "config.json", "model")
    if spec.adapter is not None:
        _check_folder(Path(spec.adapter), "adapter_config.json", "adapter")


@contextmanager
def saving(folder: Path) -> Iterator[None]:
    """While libraries write a model into `folder`.

    Raises:
        SrlibError: the disk is full, or may not be written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unwritten(error, folder) from None


def _check_folder(folder: Path, config: str, kind: str) -> None:
    from safetensors import SafetensorError, safe_open

    if not (folder / config).is_file():
        raise SrlibError(f"There is no {kind} in {folder}: {config} is not there.")
    for name in READ:
        if (folder / name).exists():
            read_json(folder / name, dict[str, Any], "make it again")
    weights = set(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        weights |= {folder / name for name in read_json(index, Index, "make it again")["weight_map"].values()}
    if not weights:
        raise SrlibError(f"There is no {kind} in {folder}: it holds no .safetensors file.")
    for file in sorted(weights):
        if not file.exists():
            raise SrlibError(f"There is no whole {kind} in {folder}: {file.name}, which its index names, is not there.")
        try:
            with safe_open(file, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise SrlibError(f"{file} is damaged ({error}); make it again.") from None
