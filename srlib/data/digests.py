"""Digests of what work depends on, files and models: what has the same digest is the same."""

from __future__ import annotations

import json
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

from srlib.params import ModelSpec
from srlib.params.paths import find

# Folders: copies by hand, an adapter that vLLM serves merged into its model, and what trackers keep and may add to.
IGNORED = {".ipynb_checkpoints", "merged", "tensorboard", "wandb"}


def of(value: Any, digits: int = 16) -> str:
    """Of anything that can be written as JSON."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:digits]


def of_path(path: Path) -> str:
    """Of a file, or of all files of a folder and their names."""
    total = sha256()
    for file in files(path) if path.is_dir() else [path]:
        total.update(str(file.relative_to(path)).encode())
        with file.open("rb") as content:
            total.update(file_digest(content, "sha256").digest())
    return total.hexdigest()[:16]


def of_model(spec: ModelSpec) -> str:
    """Of what decides a model's answers: its files, or its name if they are not here, and how it is loaded.

    Where it lies, and what only makes it faster, is not in it.
    """
    decides = spec.model_dump(include={"merge", "engine", "dtype", "quantization"})
    for name, path in (("model", spec.path), ("adapter", spec.adapter)):
        local = find(path) if path else None
        decides[name] = of_path(local) if local else path
    if spec.revision is not None:
        decides["revision"] = spec.revision
    return of(decides)


def files(folder: Path) -> list[Path]:
    """All files below a folder, but for those in `IGNORED` ones."""
    return sorted(f for f in folder.rglob("*") if f.is_file() and not IGNORED & set(f.relative_to(folder).parts))
