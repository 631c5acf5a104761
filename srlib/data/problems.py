"""Problems and worked traces in one schema, from JSONL files and from the hub."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from srlib import SrlibError, benchmarks
from srlib.params import Source


class Problem(BaseModel):
    """One problem; `trace` is a worked solution from `<think>` to the boxed answer, if known."""

    model_config = ConfigDict(extra="forbid")

    id: str
    prompt: str
    answer: str
    trace: str | None = None
    meta: dict[str, Any] = {}


Row = TypeVar("Row", BaseModel, dict)
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
                rows = [row.model_copy(update={"prompt": benchmarks.ask(row.prompt, source.prompt)}) for row in rows]
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
        values["prompt"] = benchmarks.ask(str(values["prompt"]), source.prompt)
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


def read_jsonl(path: str | Path, row: type[Row]) -> list[Row]:
    """Every line of `path` as a `row`: a model of pydantic, or a plain dict.

    Raises:
        SrlibError: no such file, an empty file, or a line that is no such row (its number is named).
    """
    path = Path(path)
    if not path.is_file():
        raise SrlibError(f"There is no file {path}.")
    rows, adapter = [], TypeAdapter(row)
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(adapter.validate_json(line))
            except ValidationError as error:
                first = error.errors()[0]
                field = ".".join(map(str, first["loc"]))
                raise SrlibError(
                    f"{path}, line {number} is not a {row.__name__}: {field + ': ' if field else ''}{first['msg']}."
                ) from None
    if not rows:
        raise SrlibError(f"{path} is empty: it needs at least one {row.__name__}.")
    return rows


def write_jsonl(path: str | Path, rows: Iterable[BaseModel | dict[str, Any]]) -> Path:
    """Write `rows` to `path`, whole or not at all (a temporary file takes its place at the end)."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        for row in rows:
            values = row.model_dump() if isinstance(row, BaseModel) else row
            file.write(json.dumps(values, ensure_ascii=False) + "\n")
    os.replace(part, path)
    return path


def encode_prompt(tokenizer, prompt: str) -> list[int]:
    """Ids of a prompt as the model is asked: through the tokenizer's chat template, if it has one."""
    return encode_prompts(tokenizer, [prompt])[0]


def encode_prompts(tokenizer, prompts: list[str]) -> list[list[int]]:
    """`encode_prompt` of each of `prompts`, in half the time."""
    return encode_for_each([tokenizer], prompts)[0]


def encode_for_each(tokenizers: list, prompts: list[str]) -> list[list[list[int]]]:
    """`encode_prompts` for each of `tokenizers`; a chat template that several share is filled in once."""
    ids_alone = {"return_attention_mask": False}
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    filled: dict[tuple[Any, ...], list[str]] = {}
    encoded = []
    for tokenizer in tokenizers:
        if not prompts:
            encoded.append([])
        elif tokenizer.chat_template is None:
            encoded.append(tokenizer(prompts, **ids_alone)["input_ids"])
        else:
            key = (type(tokenizer), str(tokenizer.chat_template), str(tokenizer.special_tokens_map))
            if key not in filled:
                filled[key] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            encoded.append(tokenizer(filled[key], add_special_tokens=False, **ids_alone)["input_ids"])
    return encoded
