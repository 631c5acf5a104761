"""A file that long work writes down as it goes: one JSON record a line, each line kept for good.

What a record says has been done is not done again: a run that was killed opens the file and goes
on. A line that was torn when a run ended is cut off; two processes cannot have one file open.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from srlib import SrlibError


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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b", buffering=0)
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
        text = "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records)
        data = memoryview(text.encode(errors="backslashreplace"))  # a lone surrogate, as JSON writes it
        try:
            while data:
                data = data[self._file.write(data) :]
            if time.monotonic() >= self._synced + self._every:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)  # half a record is none
            raise SrlibError(
                f"{self.path} cannot be written ({error.strerror}): its {len(self.records)} records are whole. "
                "Make room, and run again to go on."
            ) from None
        self.records.update((record["key"], record) for record in records)

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.ftruncate(self._file.fileno(), whole)
        records = {}
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                records[record["key"]] = record
            except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError):
                raise SrlibError(f"{self.path}, line {number} is damaged; remove the line, and run again.") from None
        return records


def check_idle(folder: Path) -> None:
    """That no process has a journal below `folder` open.

    Raises:
        SrlibError: one has.
    """
    for path in Path(folder).glob("*.journal.jsonl"):
        Journal(path).__exit__()
