"""One writer to a run's folder: a run holds it alone, notebooks by hand and runs that build on it hold it together.

The locks are the system's: they are free when their process ends, however that ends. Where the file system
has none (some network disks), nobody is let in, and told so.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Literal

from filelock import ReadWriteLock, Timeout
from typing_extensions import TypedDict

from srlib import SrlibError
from srlib.data.rows import read_json, write_json
from srlib.params.paths import here

LOCK, HOLDER = ".lock", ".holder.json"
OF_A_RUN = "SRLIB_RUN"  # environment variable: the folder of the run that has started this process
_written: set[Path] = set()  # by this process
_by_hand: dict[Path, ReadWriteLock] = {}  # held until this process ends


class Holder(TypedDict):
    """Who writes a folder."""

    pid: int
    what: str
    since: str


@contextmanager
def writing(folder: Path, what: str) -> Iterator[None]:
    """This process alone writes the run in `folder`; the notebooks that it starts are let in, and it itself again.

    Raises:
        SrlibError: another process writes it, or reads from it.
    """
    if folder in _written:
        yield
        return
    before = os.environ.get(OF_A_RUN)
    with _held(folder, "write"):
        _sign(folder, what)
        _written.add(folder)
        os.environ[OF_A_RUN] = str(folder)
        try:
            yield
        finally:
            _written.discard(folder)
            os.environ.pop(OF_A_RUN)
            if before is not None:
                os.environ[OF_A_RUN] = before
            with suppress(OSError):
                (folder / HOLDER).unlink()


@contextmanager
def reading(folder: Path, stages: Sequence[str] = ()) -> Iterator[None]:
    """What is in `folder`, another run's, stays as it is: no run writes it, and no notebook one of `stages` by hand.

    Raises:
        SrlibError: another process writes it.
    """
    with ExitStack() as held:
        for place in _of_another(folder, stages):
            held.enter_context(_held(place, "read"))
        yield


def begin(folder: Path, stage: str, base: Path | None = None, built_on: Sequence[str] = ()) -> bool:
    """Let a notebook write its stage of the run in `folder`; returns whether it was started by hand.

    By hand, it holds the folder beside other notebooks, and its stage alone, until its kernel ends; and so
    long what it builds on stays as it is.

    Args:
        base, built_on: another run, and those of its stages that this one builds on.

    Raises:
        SrlibError: a run writes the folder or `base`, or another notebook this stage or one of `built_on`.
    """
    if os.environ.get(OF_A_RUN) == str(folder):
        return False
    others = _of_another(base, built_on) if base is not None else []
    for place in (*others, folder, folder / stage):
        if place not in _by_hand:
            _by_hand[place] = _hold(place, "write" if place == folder / stage else "read")
    _sign(folder / stage, f"the kernel of notebook {stage}")
    return True


def _of_another(folder: Path, stages: Sequence[str]) -> list[Path]:
    """What is held of another run, as far as anybody here could write it."""
    return [place for place in (folder, *(folder / stage for stage in stages)) if os.access(place, os.W_OK)]


@contextmanager
def _held(folder: Path, mode: Literal["read", "write"]) -> Iterator[None]:
    lock = _hold(folder, mode)
    try:
        yield
    finally:
        lock.release()


def _hold(folder: Path, mode: Literal["read", "write"]) -> ReadWriteLock:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = ReadWriteLock(folder / LOCK, is_singleton=False)
        (lock.acquire_read if mode == "read" else lock.acquire_write)(timeout=0)
    except Timeout:
        raise SrlibError(
            f"{here(folder)} is in use by {_holder(folder)}: wait for it, end it, or give this run a name of its own"
            " (`run`)."
        ) from None
    except (OSError, ValueError, sqlite3.Error) as error:  # the lock is a database of SQLite
        reason = getattr(error, "strerror", None) or error
        raise SrlibError(f"{here(folder)} cannot be written or locked ({reason}): mend that, and run again.") from None
    return lock


def _sign(folder: Path, what: str) -> None:
    write_json(folder / HOLDER, Holder(pid=os.getpid(), what=what, since=time.strftime("%H:%M")))


def _holder(folder: Path) -> str:
    """Who holds a folder or a stage of it, as far as it is known."""
    for file in (folder / HOLDER, *sorted(folder.glob(f"*/{HOLDER}"))):
        with suppress(SrlibError, ProcessLookupError):  # what a killed process has left
            who = read_json(file, Holder)
            with suppress(PermissionError):  # another user's
                os.kill(who["pid"], 0)
            return f"process {who['pid']} ({who['what']}, since {who['since']})"
    return "a run that builds on it"
