"""Was a request any use? What would have been without it, for every hand-over of a policy.

The trace is written on from the very ids that were recorded up to a request, which is refused: the
small model writes the span itself, and after it everything runs as before (later requests are
answered). To write what was before it again would be to write another trace: in half precision a
token may change with the others of its batch. Both ends are graded:

    right with it, wrong without  needed
    right or wrong, both alike    useless
    wrong with it, right without  harmful
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from srlib.data import spans
from srlib.data.grade import verdict
from srlib.data.prompts import with_opening
from srlib.data.rows import Problem
from srlib.decoding.policies import Learned
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import Trace
from srlib.decoding.writer import Begun
from srlib.engine.protocol import Engine
from srlib.evaluation import stats
from srlib.evaluation.completions import ids_of
from srlib.params import Offload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERDICTS = {(True, False): "needed", (True, True): "useless", (False, False): "useless", (False, True): "harmful"}


def run(
    small: Engine | None,
    big: Engine | None,
    policy: Learned,
    problems: Sequence[Problem],
    records: Sequence[dict[str, Any]],
    config: Offload,
    *,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Every request of `records` once refused, graded, and called needed, useless or harmful.

    Args:
        policy: the one that wrote `records`, without rejection; its engines, settings and seed the same.
        records: as `completions.run` gives them.

    Returns:
        a row for each request: `id`, `sample`, `request` (its number), `position` (0 … 1 in the trace), `tokens`
        of the span, `before` (the text up to it), `big` and `small` (what each wrote there), `correct`,
        `correct_without` and `verdict`.
    """
    by_id = {problem.key: problem for problem in problems}
    asked = [(record, request) for record in records for request in range(len(record["handovers"]))]
    writer = Offloader(small, big, replace(policy, name="without a request"), **config.settings, seed=seed)
    traces = writer.run(
        [by_id[record["id"]].prompt for record, _ in asked],
        progress=True,
        numbers=[record["sample"] for record, _ in asked],
        begun=[_up_to(*each) for each in asked],
    )
    writer.raise_if_failed(traces)
    rows = [
        _row(by_id[record["id"]], record, request, trace, config, writer.tokenizer)
        for (record, request), trace in zip(asked, traces)
    ]
    return sorted(rows, key=lambda row: (row["id"], row["sample"], row["request"]))


def table(rows: Sequence[dict[str, Any]], by: str | None = None) -> pd.DataFrame:
    """Share of requests that were needed, useless and harmful, with 95 % intervals clustered by problem.

    Args:
        by: a key of the rows, for a line of each of its values; None: one line for all.
    """
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row[by] if by else "all"].append(row)
    lines = []
    for group in sorted(groups):
        some = groups[group]
        line: dict[str, Any] = {by or "requests": group, "n": len(some), "problems": len({r["id"] for r in some})}
        for name in dict.fromkeys(VERDICTS.values()):
            e = stats.proportion([r["verdict"] == name for r in some], [r["id"] for r in some])
            line[name] = f"{e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"
        lines.append(line)
    return pd.DataFrame(lines)


def _up_to(record: dict[str, Any], request: int) -> Begun:
    """Ids and owners of a completion up to and with the tag of a request."""
    start, _, _ = record["handovers"][request]
    return ids_of(record)[:start], ["SBF".index(owner) for owner in record["owners"][:start]]


def _row(
    problem: Problem, record: dict, request: int, trace: Trace, config: Offload, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    start, tokens, _ = record["handovers"][request]
    found = verdict(with_opening(tokenizer, trace.text(tokenizer)), problem, config.hint)
    # the span of the refused request, as far as the small model closed it
    rest = trace.ids[start:]
    own = next((i for i in range(len(rest)) if _closes(rest, i, trace.tags)), len(rest))
    return {
        "id": record["id"],
        "sample": record["sample"],
        "request": request,
        "position": start / max(1, len(record["owners"])),
        "tokens": tokens,
        "before": spans.strip(tokenizer.decode(trace.ids[:start])),
        "big": tokenizer.decode(ids_of(record)[start : start + tokens]),
        "small": tokenizer.decode(rest[:own]),
        "correct": record["correct"],
        "correct_without": found.correct,
        "verdict": VERDICTS[record["correct"], found.correct],
    }


def _closes(ids: list[int], at: int, tags: spans.Tags) -> bool:
    return any(tuple(ids[at : at + len(close)]) == tuple(close) for close in (*tags.closes, tags.open))
