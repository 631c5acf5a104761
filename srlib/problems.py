"""Problems and worked traces in one schema, and the JSONL files they live in."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from srlib import SrlibError


class Problem(BaseModel):
    """One problem; `trace` is a worked solution from `<think>` to the boxed answer, if known."""

    model_config = ConfigDict(extra="forbid")

    id: str
    prompt: str
    answer: str
    trace: str | None = None
    meta: dict[str, Any] = {}


Row = TypeVar("Row", bound=BaseModel)


def load(source: str | Path, n: int | None = None, seed: int = 0) -> list[Problem]:
    """Problems of a JSONL file with the fields of `Problem`.

    Args:
        source: path of the file.
        n: how many to draw without replacement, in random order; None: all, in order.
        seed: of the draw.

    Raises:
        SrlibError: no such file, a broken line (its number is named), an empty set, or fewer
            than `n` problems.
    """
    rows = read_jsonl(source, Problem)
    if n is None:
        return rows
    if n > len(rows):
        raise SrlibError(f"{source} holds {len(rows)} problems, fewer than the {n} asked for.")
    return random.Random(seed).sample(rows, n)


def read_jsonl(path: str | Path, row: type[Row]) -> list[Row]:
    """Every line of `path` as a `row`.

    Raises:
        SrlibError: no such file, an empty file, or a line that is no such row (its number is named).
    """
    path = Path(path)
    if not path.is_file():
        raise SrlibError(f"There is no file {path}.")
    rows = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(row.model_validate_json(line))
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
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt)
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
