"""Problems and worked traces in one schema, from JSONL files, from the hub and from named sets.

Every row meets the same checks, wherever it comes from and whatever its columns are called. One
that fails them is an error, or is left out and counted with its reason: `on_bad` says which.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.data import benchmarks, prompts
from srlib.data.benchmarks import Benchmark, Row
from srlib.data.overlap import Overlap
from srlib.data.rows import Problem, lines, parsed
from srlib.params import Params, Source

if TYPE_CHECKING:
    from datasets import IterableDataset

SAME = {field: field for field in ("id", "prompt", "answer", "trace", "correct", "meta")}  # the columns' own names
HALVES = re.compile("[\ud800-\udfff]")  # what is left of them when pairs are read as one character
WINDOW = 10_000  # rows of a stream that are held to be drawn from


class Bad(Exception):
    """Why a row is no problem: the `reason` it is counted under, and what was seen in this very row."""

    def __init__(self, reason: str, seen: object = "") -> None:
        super().__init__(f"{reason}: {str(seen)[:200]}" if seen else reason)
        self.reason = reason


def load(
    source: Source | str | Path,
    n: int | None = None,
    seed: int = 0,
    *,
    worked: bool = False,
    on_bad: Literal["raise", "drop"] = "raise",
    dropped: Counter[str] | None = None,
    apart: Overlap | None = None,
) -> list[Problem]:
    """Problems of a JSONL file, of a data set on the hub, or of a named set (see `benchmarks`).

    The fields `id`, `prompt`, `answer` and `trace` are read from the columns that the source names, or
    from those called like them; a mapping called `meta` is kept, other columns are left alone. A field
    is text, a number, or a list with one of these. A row without an id gets its number, from 0. Of a
    list of generations the first is the trace, or the first that the column `correct` says is right. A
    conversation (turns with `role` and `content`) is a prompt up to its last turn by the user, and a trace from there.

    Args:
        source: a `Source`, or a path alone.
        n: how many to draw without replacement, in random order (of a data set on the hub, which
            is streamed: out of a window of 10,000 rows); None: all, in order.
        seed: of the draw.
        worked: whether a row needs a trace.
        on_bad: what becomes of a row that is no problem: `raise` an error at the first, or `drop` it.
        dropped: is told how many were dropped, by reason.
        apart: a test set whose problems are bad rows here.

    Raises:
        SrlibError: no such file, data set or column, a split of what has none, a file that is not UTF-8, a bad row (where it is
            and what is wrong), or fewer than `n` problems (why others cannot be used).
    """
    source = source if isinstance(source, Source) else Source(path=str(source))
    benchmarks.check(source)
    benchmark = benchmarks.find(source)
    whole = benchmark is not None or source.file is not None
    rows = _placed_rows(source, n, seed)
    if benchmark is None:
        head = list(rows if whole else islice(rows, 1))
        _check_columns(source, [row for _, row in head if not isinstance(row, Bad)], worked)
        rows = chain(head, rows)
    places: dict[str, str] = {}
    found: list[Problem] = []
    bad_rows: Counter[str] = Counter()
    for number, (place, row) in enumerate(tqdm(rows, desc="load", unit="row", delay=2, mininterval=1, leave=False)):
        try:
            problem = _problem(row, number, source, benchmark, worked, apart)
            if problem.id in places:
                raise Bad("its id stands twice", f"{problem.id!r}, in {places[problem.id]} too")
        except Bad as bad:
            if on_bad == "raise":
                raise SrlibError(f"{source.path}, {place} is not a Problem: {bad}.") from None
            bad_rows[bad.reason] += 1
            continue
        places[problem.id] = place
        found.append(problem)
        if len(found) == n and not whole:
            break
    if dropped is not None:
        dropped.update(bad_rows)
    if len(found) < (n or 1):
        held = f"{len(found)} {'traces' if worked else 'problems'}"
        usable = f" that can be used ({told(bad_rows)})" if bad_rows else ""
        raise SrlibError(f"{source.path} holds {held}{usable}, fewer than the {n or 1} asked for.")
    return random.Random(seed).sample(found, n) if whole and n is not None else found


def traces(
    p: Params, n: int, *, worked: bool = False, dropped: Counter[str] | None = None, seed: int | None = None
) -> list[Problem]:
    """`n` of the traces that a run reads.

    Of a set that the params name, rows that cannot be used are left out and counted in `dropped`; in what
    stage 00 wrote there are none, but the file is damaged. A problem of the test set is such a row (`data.decontaminate`).

    Args:
        seed: of the draw; None: the run's.

    Raises:
        SrlibError: as `load`.
    """
    apart = None
    if p.kept_apart:  # the test set as it asks, without the words that the params put around it
        asked = load(p.test.model_copy(update={"prompt": "plain"}), seed=p.seed)
        apart = Overlap((problem.prompt for problem in asked), p.data.decontaminate)
    on_bad: Literal["raise", "drop"] = "drop" if p.data.traces else "raise"
    seed = p.seed if seed is None else seed
    return load(p.traces, n, seed, worked=worked, on_bad=on_bad, dropped=dropped, apart=apart)


def told(dropped: Counter[str]) -> str:
    """What was dropped, in words."""
    return "; ".join(f"{count} dropped: {reason}" for reason, count in dropped.most_common())


def hub_rows(source: Source) -> IterableDataset:
    """The rows of a data set on the hub as they are there, streamed.

    Raises:
        SrlibError: the hub has no such data set, configuration or split, or is not reached.
    """
    from datasets import load_dataset

    pinned = {"revision": source.revision} if source.revision is not None else {}
    try:
        return load_dataset(source.path, source.config, split=source.split or "train", streaming=True, **pinned)
    except (OSError, ValueError, ConnectionError) as error:  # DatasetNotFoundError is a FileNotFoundError
        reason = str(error).splitlines()[0]
        raise SrlibError(f"{source.path} is no file here, and the hub gave no such data set: {reason}") from None


def _placed_rows(source: Source, n: int | None, seed: int) -> Iterator[tuple[str, Row | Bad]]:
    """The rows of any source, each with its place, such as `line 3`; of a stream, shuffled if some are drawn."""
    rows: Iterable[Row]
    if benchmarks.find(source) is not None:
        origin = benchmarks.origin(source)
        if origin is not None:
            yield from _placed_rows(origin, None, seed)
            return
        rows = benchmarks.procedural(source, n, seed)
    elif source.file is not None:
        for number, line in lines(source.file):
            yield f"line {number}", _parsed(line)
        return
    else:
        stream = hub_rows(source)
        rows = stream if n is None else stream.shuffle(seed, buffer_size=WINDOW)
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _parsed(line: str) -> Row | Bad:
    """The row in a line of a file; a lone surrogate, which no model and no table takes, is kept as an escape."""
    try:
        row = parsed(line)
        if "\\u" in line:
            row = json.loads(HALVES.sub(lambda half: rf"\\u{ord(half[0]):x}", json.dumps(row, ensure_ascii=False)))
    except ValueError as error:
        reason, _, seen = str(error).partition(": ")
        return Bad("a list begins here, and a file is one object a line" if line[0] == "[" else reason, seen)
    return row if isinstance(row, dict) else Bad(f"a line is one object, and this is {_kind(row)}")


def _check_columns(source: Source, rows: list[Row], worked: bool) -> None:
    """Raise an error if none of `rows` has a column that is needed, or that the source names."""
    there = list(dict.fromkeys(column for row in rows for column in row))
    needed = {field: field for field in ("prompt", "answer", *(["trace"] if worked else []))}
    absent = [column for column in (needed | source.columns).values() if column not in there]
    if there and absent:
        raise SrlibError(f"{source.path} has no column {absent[0]!r}, but {', '.join(there)}. Name it in `columns`.")


def _problem(
    row: Row | Bad, number: int, source: Source, benchmark: Benchmark | None, worked: bool, apart: Overlap | None
) -> Problem:
    """The problem in a row.

    Raises:
        Bad: there is none.
    """
    if isinstance(row, Bad):
        raise row
    if benchmark is None:
        fields = {field: row.get(column) for field, column in (SAME | source.columns).items()}
    else:
        try:
            fields = benchmark.fields(row, number)
        except KeyError as error:
            raise Bad(f"no column {error}, which rows of {source.path.partition(':')[0]} have") from None
        except (AttributeError, TypeError):
            raise Bad(f"its columns do not hold what those of {source.path.partition(':')[0]} do", row) from None
    how = source.prompt or (benchmark.prompt if benchmark else "plain")
    question = _prompt(fields["prompt"])
    if apart is not None and apart.holds(question):
        raise Bad("its problem is in the test set", question)
    return Problem(
        id=str(number) if fields["id"] is None else _text("id", fields["id"]),
        prompt=prompts.ask(question, how),
        answer=_text("answer", fields["answer"]),
        trace=_trace(fields, "correct" in source.columns, worked),
        meta=fields["meta"] if isinstance(fields["meta"], dict) else {},
    )


def _trace(fields: Row, marked: bool, worked: bool) -> str | None:
    """The trace of a row, if it has one: of several generations the first, or the first that is marked right.

    Raises:
        Bad: it is no text, or a row needs one and has none.
    """
    given = fields.get("trace")
    if _is_conversation(given):
        given = given[-1].get("content") if given[-1]["role"] == "assistant" else None
    several = given if isinstance(given, list) else [given]
    if any(isinstance(each, dict) for each in several):
        raise Bad(f"trace is {_kind(given)}", given)
    correct = fields.get("correct")
    marks = correct if isinstance(correct, list) else [correct] * len(several)
    if not marked and not any(isinstance(mark, bool) for mark in marks):  # a column that is called so by chance
        marks = [True] * len(several)
    odd = [mark for mark in marks if mark not in (True, False, None)]  # 1 and 0, too
    if odd:
        raise Bad(f"correct is {_kind(odd[0])}", odd[0])
    if given and len(marks) != len(several):
        raise Bad("correct has not one mark for each generation", f"{len(marks)} for {len(several)}")
    written = [(each, right) for each, right in zip(several, marks) if each is not None and not _blank(str(each))]
    first = next((each for each, right in written if right), None)
    if first is None and worked:
        raise Bad("no generation is marked right" if written else "no trace")
    return None if first is None else _text("trace", first)


def _prompt(value: object) -> str:
    """The text of a prompt, of a conversation up to its last turn by the user.

    Raises:
        Bad: as `_text`, or the conversation has no such turn, or one that is no text.
    """
    if not _is_conversation(value):
        return _text("prompt", value)
    said = [(str(turn["role"]), _text("a turn of prompt", turn.get("content"))) for turn in value]
    while said and said[-1][0] == "assistant":
        said.pop()
    try:
        return prompts.conversation(said)
    except ValueError as error:
        raise Bad("prompt is a conversation that cannot be asked", error) from None


def _text(field: str, value: object) -> str:
    """The text of a field: text or a number as they are, or the only one in a list.

    Raises:
        Bad: it is missing, blank, or something else.
    """
    if isinstance(value, list) and len(value) == 1 and not isinstance(value[0], list | dict):
        value = value[0]
    if value is None:
        raise Bad(f"no {field}")
    number = isinstance(value, int | Decimal) or (isinstance(value, float) and math.isfinite(value))
    if isinstance(value, bool) or not (number or isinstance(value, str)):
        raise Bad(f"{field} is {_kind(value)}", value)
    if _blank(str(value)):
        raise Bad(f"{field} is blank")
    return str(value)


def _blank(text: str) -> bool:
    """Whether nothing of `text` is seen: it holds spaces, controls and marks without width alone."""
    return not any(character.isprintable() and character != " " for character in text)


def _is_conversation(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) and "role" in each for each in value)


def _kind(value: object) -> str:
    """What stands where a text should, in words."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    words: dict[type, str] = {dict: "a mapping", bool: "true or false", float: "not a number"}
    words |= {int: "a number", str: "text", type(None): "null"}
    return words.get(type(value), type(value).__name__)
