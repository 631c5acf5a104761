"""Where things are: the clone, and paths seen from here or from there."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the clone: holds params/, notebooks/, outputs/


def find(path: str | Path) -> Path | None:
    """`path` as it is seen from here or, failing that, from the clone; None if in neither."""
    return next((p for p in (Path(path), ROOT / path) if os.path.exists(p)), None)


def here(path: str | Path) -> str:
    """A path as the user sees it: from the clone, if it lies in it."""
    path = Path(path)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)
