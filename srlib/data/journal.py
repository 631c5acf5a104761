"""A file that long work writes down as it goes: one JSON record a line, each line kept for good.

What a record says has been done is not done again: a run that was killed opens the file and goes
on. A line that was torn when a run ended is cut off; two processes cannot have one file open.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any
from zlib import crc32

from srlib import SrlibError
from srlib.data.rows import unwritten, whole

CHECKSUM = re.compile(rb', "crc": ([0-9]+)}$')


class Journal:
    """An append-only JSONL file of records, each with a `key` of its own; a context manager.

    The lock is the system's, on the open file: it ends with the process, however that ends.

    Args:
        every: seconds between two waits for the disk. A process that is killed loses nothing whatever they are; a
            machine that loses its power loses what was written since.

    Raises:
        SrlibError: another process has it open, or a line in its middle is no record.
    """

    def __init__(self, path: Path, every: float = 0.0) -> None:
        self.path, self._every, self._synced = Path(path), every, time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        except OSError as error:
            raise unwritten(error, self.path) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise SrlibError(
                f"Another process is writing {self.path}; wait for it, or give this run a name of its own (`run`)."
            ) from None
        try:
            self.records: dict[str, dict[str, Any]] = self._read()
        except SrlibError:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):  # of a full disk `append` has told
            os.fsync(self._file.fileno())
        self._file.close()

    def append(self, *records: dict[str, Any]) -> None:
        """Write records, all of them or none; on the disk when this returns, unless there is time for it (`every`).

        Raises:
            SrlibError: the disk is full, or cannot be written.
        """
        size = os.fstat(self._file.fileno()).st_size
        data = memoryview(b"".join(map(_line, records)))
        try:
            while data:
                data = data[self._file.write(data) :]
            if time.monotonic() >= self._synced + self._every:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file.fileno(), size)  # half a record is none
            raise SrlibError(
                f"{self.path} cannot be written ({error.strerror}): its {len(self.records)} records are whole. "
                "Make room, and run again to go on."
            ) from None
        self.records.update((record["key"], record) for record in records)

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        if end < len(data):
            os.ftruncate(self._file.fileno(), end)
        records = {}
        for number, text in enumerate(data[:end].split(b"\n")[:-1], 1):
            try:
                record = json.loads(_checked(text))
                records[record["key"]] = record
            except (ValueError, KeyError, TypeError):
                raise SrlibError(f"{self.path}, line {number} is damaged; remove the line, and run again.") from None
        return records


def write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write a journal anew, whole or not at all."""
    with whole(path) as file:
        file.writelines(_line(record).decode() for record in records)


def _line(record: dict[str, Any]) -> bytes:
    """A record as it is kept: with a checksum at its end, so that what has changed since is not taken for it."""
    text = json.dumps(record, ensure_ascii=False).encode(errors="backslashreplace")  # a lone surrogate, as JSON has it
    return b'%s, "crc": %d}\n' % (text[:-1], crc32(text))


def _checked(text: bytes) -> bytes:
    """The record in a line, without its checksum. Older lines have none.

    Raises:
        ValueError: it is not what was written.
    """
    found = CHECKSUM.search(text)
    if found is None:
        return text
    record = text[: found.start()] + b"}"
    if crc32(record) != int(found[1]):
        raise ValueError("checksum")
    return record


def check_idle(folder: Path) -> None:
    """That no process has a journal below `folder` open.

    Raises:
        SrlibError: one has.
    """
    for path in Path(folder).glob("*.journal.jsonl"):
        Journal(path).__exit__()
