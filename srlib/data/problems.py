"""Problems and worked traces in one schema, from JSONL files and from the hub."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from srlib import SrlibError
from srlib.data import benchmarks, prompts
from srlib.data.rows import Problem, read_jsonl
from srlib.params import Source

WINDOW = 10_000  # rows of a stream that are held to be drawn from


def load(source: Source | str | Path, n: int | None = None, seed: int = 0) -> list[Problem]:
    """Problems of a JSONL file, of a data set on the hub, or of a named benchmark (see `benchmarks`).

    Without `columns` the rows have just the fields of `Problem`; with them the fields are read
    from the columns named, others are left alone, and a row without an id gets its number.

    Args:
        source: a `Source`, or a path alone.
        n: how many to draw without replacement, in random order (of a data set on the hub, which
            is streamed: out of a window of 10,000 rows); None: all, in order.
        seed: of the draw.

    Raises:
        SrlibError: no such file or data set, a broken line or row (its number is named), an empty
            set, or fewer than `n` problems.
    """
    source = source if isinstance(source, Source) else Source(path=str(source))
    if benchmarks.find(source) is not None:
        fields = benchmarks.rows(source, n, seed, lambda s: read_jsonl(s.file, dict) if s.file else hub_rows(s))
        rows = [Problem(**row) for row in fields]
        if n is not None and n < len(rows):
            rows = random.Random(seed).sample(rows, n)
    elif source.file is not None:
        if source.columns:
            rows = _from_rows(read_jsonl(source.file, dict), source)
        else:
            rows = read_jsonl(source.file, Problem)
            if source.prompt:
                rows = [row.model_copy(update={"prompt": prompts.ask(row.prompt, source.prompt)}) for row in rows]
        if n is not None and n <= len(rows):
            rows = random.Random(seed).sample(rows, n)
    else:
        stream = hub_rows(source)
        stream = stream if n is None else stream.shuffle(seed, buffer_size=WINDOW).take(n)
        rows = _from_rows(stream, source)
    if n is not None and n > len(rows):
        raise SrlibError(f"{source.path} holds {len(rows)} problems, fewer than the {n} asked for.")
    return rows


def hub_rows(source: Source):
    """The rows of a data set on the hub as they are there, streamed.

    Raises:
        SrlibError: the hub has no such data set, configuration or split, or is not reached.
    """
    from datasets import load_dataset

    try:
        return load_dataset(source.path, source.config, split=source.split, streaming=True)
    except (OSError, ValueError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        reason = str(error).splitlines()[0]
        raise SrlibError(f"{source.path} is no file here, and the hub gave no such data set: {reason}") from None


def from_row(row: dict[str, Any], number: int, source: Source, worked: bool = False) -> Problem | str:
    """The problem in a row whose columns may have other names; a string: why there is none.

    Of several generations it takes the first, or, where a column named `correct` says which are right,
    the first right one.

    Args:
        number: of the row, from 0; an id where it has none.
        worked: whether a row needs a trace.

    Raises:
        SrlibError: the first row lacks a column.
    """
    columns = {field: source.columns.get(field, field) for field in ("id", "prompt", "answer", "trace")}
    needed = ("prompt", "answer", "trace") if worked else ("prompt", "answer")
    absent = [columns[field] for field in needed if columns[field] not in row]
    if absent and not number:
        raise SrlibError(f"{source.path} has no column {absent[0]!r}, but {', '.join(row)}. Name it in `columns`.")
    values = {field: row.get(column) for field, column in columns.items()}
    if "correct" in source.columns:
        values["trace"] = _first_right(values["trace"], row.get(source.columns["correct"]))
        if worked and values["trace"] is None:
            return "no generation is marked right"
    elif isinstance(values["trace"], list):
        values["trace"] = next(iter(values["trace"]), None)
    for field in needed:
        if values[field] is None or not str(values[field]).strip():
            return f"no {field}"
    values["id"] = number if values["id"] is None else values["id"]
    if source.prompt:
        values["prompt"] = prompts.ask(str(values["prompt"]), source.prompt)
    return Problem(**{field: None if value is None else str(value) for field, value in values.items()})


def _first_right(generations: Any, correct: Any) -> str | None:
    several = generations if isinstance(generations, list) else [generations]
    marks = correct if isinstance(correct, list) else [correct]
    return next((text for text, right in zip(several, marks) if right is True and text), None)


def _from_rows(rows: Iterable[dict[str, Any]], source: Source) -> list[Problem]:
    """As `from_row`, and every row is a problem."""
    found = []
    for number, row in enumerate(rows):
        problem = from_row(row, number, source)
        if isinstance(problem, str):
            raise SrlibError(f"{source.path}, row {number + 1} has {problem}: {json.dumps(row, default=str)[:200]}")
        found.append(problem)
    return found
