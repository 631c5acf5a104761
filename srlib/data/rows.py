"""Rows in files: the schema of problems and of annotated traces, read and written whole, one JSON object a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from srlib import SrlibError
from srlib.data import digests, spans
from srlib.data.spans import Span

DIGEST = "#"  # before the digest in a key


class Problem(BaseModel):
    """One problem; `trace` is a worked solution from `<think>` to the boxed answer, if known."""

    model_config = ConfigDict(extra="forbid")

    id: str
    prompt: str
    answer: str
    trace: str | None = None
    meta: dict[str, Any] = {}

    @property
    def key(self) -> str:
        """Its id and a digest of prompt and answer, `test-0#1a2b3c4d`: what has the same key is the same problem."""
        return f"{self.id}{DIGEST}{digests.of([self.prompt, self.answer], 8)}"

    @property
    def worked(self) -> str:
        """The trace, for those who load only problems that have one."""
        assert self.trace is not None, f"problem {self.id} has no trace"
        return self.trace


Row = TypeVar("Row", bound=BaseModel | dict)
Kind = TypeVar("Kind")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines of a text file and their numbers; blank ones, and a byte-order mark, are left out.

    Raises:
        SrlibError: no such file, an empty file, or one that cannot be read or is not UTF-8.
    """
    if not os.path.isfile(path):  # no error, whatever the name is
        raise SrlibError(f"There is no file {path}.")
    number, empty = 0, True
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig").strip()  # every line: files that begin with the mark are joined, too
                if text:
                    empty = False
                    yield number, text
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise SrlibError(f"{path} is not UTF-8: line {number} has the byte {byte:#04x}. Save it as UTF-8.") from None
    except OSError as error:
        raise SrlibError(f"{path} cannot be read: {error.strerror}.") from None
    if empty:
        raise SrlibError(f"{path} is empty: it needs at least one line.")


def parsed(line: str) -> Any:
    """The JSON in a line.

    Raises:
        ValueError: it is none, it nests too deep, or a key stands twice in one mapping.
    """
    try:
        return json.loads(line, object_pairs_hook=_mapping)
    except json.JSONDecodeError as error:
        raise ValueError(f"Invalid JSON: {error.msg} at character {error.pos + 1}") from None
    except RecursionError:
        raise ValueError("Invalid JSON: it nests too deep") from None


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for at, (key, _) in enumerate(pairs) if key in dict(pairs[:at]))
        raise ValueError(f"a key stands twice: {twice!r}")
    return found


def read_jsonl(path: str | Path, row: type[Row]) -> list[Row]:
    """Every line of `path` as a `row`: a model of pydantic, with an `id` of its own, or a plain dict.

    Raises:
        SrlibError: no such file, an empty file, one that is not UTF-8, a line that is no such row
            (its number is named), or two of one id (both are).
    """
    rows, adapter = [], TypeAdapter(row)
    places: dict[str, int] = {}
    for number, line in lines(Path(path)):
        try:
            rows.append(adapter.validate_python(parsed(line)))
            if isinstance(found := rows[-1], Problem | Annotated):
                before = places.setdefault(found.id, number)
                if before != number:
                    raise ValueError(f"its id stands twice: {found.id!r}, in line {before} too")
        except ValueError as error:
            reason = str(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"]))
                reason = f"{field + ': ' if field else ''}{first['msg'].removeprefix('Value error, ')}"
            raise SrlibError(f"{path}, line {number} is not a {row.__name__}: {reason}.") from None
    return rows


def write_jsonl(path: str | Path, rows: Iterable[BaseModel | dict[str, Any]]) -> Path:
    """Write `rows` to `path`, whole or not at all (a temporary file takes its place at the end)."""
    with whole(path) as file:
        for row in rows:
            values = row.model_dump() if isinstance(row, BaseModel) else row
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    return Path(path)


class Annotated(BaseModel):
    """A worked trace and the spans of it, in characters, that the big model should write."""

    model_config = ConfigDict(extra="forbid")

    id: str
    prompt: str
    answer: str
    trace: str
    spans: list[Span]
    share: float = Field(ge=0, le=1)  # of the trace's tokens
    annotator: str

    @model_validator(mode="after")
    def _spans_fit(self) -> Annotated:
        spans.wrap(self.trace, self.spans)
        (self.prompt + self.trace).encode()  # fails for a lone surrogate, which no tokenizer takes
        return self

    @property
    def worked(self) -> str:
        """As `Problem.worked`."""
        return self.trace

    @property
    def tagged(self) -> str:
        """The trace with its tags."""
        return spans.wrap(self.trace, self.spans)

    @property
    def pieces(self) -> list[tuple[str, bool]]:
        """The trace cut at its spans: (text, in a span)."""
        ends = [0, *(position for span in self.spans for position in span), len(self.trace)]
        return [(self.trace[a:b], i % 2 == 1) for i, (a, b) in enumerate(zip(ends, ends[1:]))]


def write_json(path: Path, content: object) -> None:
    """Write `content` to `path`, whole or not at all."""
    with whole(path) as file:
        file.write(json.dumps(content, indent=1))


def read_json(path: Path, kind: type[Kind], mend: str = "remove it, and run again") -> Kind:
    """What a JSON file holds, checked to be a `kind`: anything that pydantic can check.

    Raises:
        SrlibError: it cannot be read, is no JSON, or holds something else.
    """
    try:
        return TypeAdapter(kind).validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SrlibError(f"{path} is damaged ({where + ': ' if where else ''}{first['msg']}): {mend}.") from None
    except OSError as error:
        raise SrlibError(f"{path} cannot be read: {error.strerror}.") from None


@contextmanager
def whole(path: str | Path) -> Iterator[TextIO]:
    """A text file to be written whole or not at all: a temporary file takes its place at the end.

    Raises:
        SrlibError: the disk is full, or may not be written.
    """
    part = Path(path).with_name(Path(path).name + ".part")
    try:
        # A lone surrogate stands there as JSON writes it.
        with part.open("w", encoding="utf-8", errors="backslashreplace") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise unwritten(error, path) from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def unwritten(error: Exception, path: str | Path) -> SrlibError:
    """That a file could not be written, in a sentence."""
    reason = getattr(error, "strerror", None) or error
    return SrlibError(f"{path} cannot be written ({reason}): mend that, and run again to go on.")
