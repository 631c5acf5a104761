"""One writer to a run's folder: a run holds it alone, notebooks by hand and runs that build on it hold it together.

The locks are the system's: they are free when their process ends, however that ends.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from filelock import ReadWriteLock, Timeout
from typing_extensions import TypedDict

from srlib import SrlibError
from srlib.data.rows import read_json, write_json
from srlib.params.paths import here

LOCK, HOLDER = ".lock", ".holder.json"
OF_A_RUN = "SRLIB_RUN"  # environment variable: the folder of the run that has started this process
_by_hand: dict[Path, ReadWriteLock] = {}  # held until this process ends


class Holder(TypedDict):
    """Who writes a run's folder."""

    pid: int
    what: str
    since: str


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """This process alone writes the run in `folder`; the notebooks that it starts are let in.

    Raises:
        SrlibError: another process writes it, or reads from it.
    """
    before = os.environ.get(OF_A_RUN)
    lock = _hold(folder, "write")
    try:
        write_json(folder / HOLDER, Holder(pid=os.getpid(), what=what, since=time.strftime("%H:%M")))
        os.environ[OF_A_RUN] = str(folder)
        yield
    finally:
        (folder / HOLDER).unlink(missing_ok=True)
        lock.release()
        os.environ.pop(OF_A_RUN)
        if before is not None:
            os.environ[OF_A_RUN] = before


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """What is in `folder`, another run's, stays as it is.

    Raises:
        SrlibError: another process writes it.
    """
    lock = _hold(folder, "read")
    try:
        yield
    finally:
        lock.release()


def begin(folder: Path, stage: str) -> bool:
    """Let a notebook write its stage of the run in `folder`; returns whether it was started by hand.

    By hand, it holds the folder beside other notebooks, and its stage alone, until its kernel ends.

    Raises:
        SrlibError: a run writes the folder, or another notebook this stage of it.
    """
    if os.environ.get(OF_A_RUN) == str(folder):
        return False
    if folder not in _by_hand:
        _by_hand[folder] = _hold(folder, "read")
    if folder / stage not in _by_hand:
        _by_hand[folder / stage] = _hold(folder / stage, "write")
    return True


def _hold(folder: Path, mode: Literal["read", "write"]) -> ReadWriteLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = ReadWriteLock(folder / LOCK, is_singleton=False)
        (lock.acquire_read if mode == "read" else lock.acquire_write)(timeout=0)
    except Timeout:
        raise SrlibError(
            f"{here(folder)} is in use by {_holder(folder)}: wait for it, or give this run a name of its own (`run`)."
        ) from None
    except (OSError, sqlite3.Error) as error:  # the lock is a database of SQLite
        reason = getattr(error, "strerror", None) or error
        raise SrlibError(f"{here(folder)} cannot be written ({reason}): mend that, and run again.") from None
    return lock


def _holder(folder: Path) -> str:
    """Who holds a folder, as far as it is known."""
    try:
        who = read_json(folder / HOLDER, Holder)
    except SrlibError:
        return "a notebook whose kernel still runs (shut it down), or by a run that builds on it"
    return f"process {who['pid']} ({who['what']}, since {who['since']})"
