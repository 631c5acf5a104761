"""Two runs beside each other: `python -m srlib compare outputs/a outputs/b`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from srlib import SrlibError, visible
from srlib.data.rows import DIGEST, read_json, read_jsonl
from srlib.evaluation import comparisons, stats
from srlib.params import find, nearest

SETTINGS = ("dataset", "samples_per_problem", "max_tokens")  # in which runs that are compared are alike
AGAIN = "run stage 05 again: python -m srlib run … --only 05_evaluate"
KEY = re.compile(rf"{DIGEST}[0-9a-f]{{8}}\Z")  # what the id of a completion ends with
COUNTED = {"id": str, "correct": bool, "big_tokens": int, "small_tokens": int}  # of a completion


def compare(a: str | Path, b: str | Path, policies: list[str] | None = None) -> str:
    """Every policy that both runs have, paired by problem, in a table and in a sentence each.

    Where there are several, p-values are corrected for their number (`comparisons.holm`).

    Args:
        a, b: folders of two runs, which have done stage 05 on the same problems.
        policies: those to compare; None: all. One of the form `learned:grpo` compares a's `learned` to b's `grpo`.

    Raises:
        SrlibError: a run has not done stage 05, they have no policy in common, or other problems.
    """
    rows = [_rows(folder) for folder in (a, b)]
    names = policies or [name for name in rows[0] if name in rows[1]]
    if not names:
        raise SrlibError(
            f"{a} and {b} have no policy in common: {', '.join(rows[0])}; {', '.join(rows[1])}. "
            "Name two of them: --policy learned:grpo"
        )
    measured: dict[str, tuple[stats.Difference, str, str, int]] = {}
    for name in names:
        first, _, second = name.partition(":")
        pair = first, second or first
        for side, some, folder in zip(pair, rows, (a, b)):
            if side not in some:
                near = nearest(side, list(some))
                hint = f"; did you mean {near!r}?" if near else f"; it has {', '.join(some)}."
                raise SrlibError(f"{folder} has no policy {side!r}{hint}")
        records = [_completions(folder, side) for folder, side in zip((a, b), pair)]
        try:
            d = stats.compare(records[1], records[0])
        except SrlibError as error:
            raise SrlibError(f"{name}: {error} Were they run with the same data and seed?") from None
        samples = max(1, len(records[0]) // d.n_problems)
        needed = stats.problems_needed(2.0, *stats.spread(records[1], records[0]), samples)
        accuracies = "  ".join(f"{stats.accuracy(some).value:>7.1%}" for some in records)
        measured[name] = d, accuracies, "  ".join(f"{stats.share(some):>7.1%}" for some in records), needed
        about = comparisons.about(records[0])
    p = "p (Holm)" if len(names) > 1 else "p"
    numbers = f"{'n':>6} {'A':>7}  {'B':>7}  {'B − A':>7}  {'95 % interval':<18}{p:>9}"
    table, words = [f"{'policy':<22}{numbers}  share A  share B"], []
    corrected = comparisons.holm([d.p_value for d, *_ in measured.values()])
    for (name, (d, accuracies, shares, needed)), p_value in zip(measured.items(), corrected):
        told, interval = comparisons.p_text(p_value), f"[{d.low:+.1%}, {d.high:+.1%}]"
        table.append(f"{name:<22}{d.n_problems:>6} {accuracies}  {d.value:>+7.1%}  {interval:<18}{told:>9}  {shares}")
        words.append(_sentence(name, d, p_value, needed))
    head = [f"A  {a}", f"B  {b}", *_unlike(rows, names), ""]
    return "\n".join(map(visible, [*head, *table, "", *words, about]))


def _sentence(name: str, d: stats.Difference, p_value: float, needed: int) -> str:
    told = comparisons.p_text(p_value)
    told = f"p {told if told.startswith('<') else f'= {told}'}, {d.n_problems} problems"
    if p_value < 1 - stats.LEVEL:
        how = "more accurate" if d.value > 0 else "less accurate"
        return f"{name}: B is {how} by {abs(d.value):.1%} ({told})."
    return f"{name}: no difference can be told ({told}); to find one of 2 points takes {needed} problems like these."


def _unlike(rows: list[dict[str, dict]], names: list[str]) -> list[str]:
    """Warnings: settings in which the two differ, so that more than the models is compared."""
    found = []
    for key in SETTINGS:
        first, last = names[0].partition(":")[0], names[0].rpartition(":")[2]
        values = rows[0][first][key], rows[1][last][key]
        if values[0] != values[1]:
            found.append(f"They differ in {key}: {values[0]} and {values[1]}.")
    return found


def _rows(folder: str | Path) -> dict[str, dict[str, Any]]:
    path = _stage(folder) / "results.json"
    if not path.is_file():
        raise SrlibError(f"There is no {path}: run stage 05 there first (python -m srlib run … --until 05_evaluate).")
    rows = read_json(path, list[dict[str, Any]], AGAIN)
    try:
        return {row["policy"]: {key: row[key] for key in SETTINGS} for row in rows}
    except KeyError as error:
        raise SrlibError(f"{path} is damaged (no {error}): {AGAIN}.") from None


def _completions(folder: str | Path, policy: str) -> list[dict[str, Any]]:
    path = _stage(folder) / "completions" / f"{policy}.jsonl"
    try:
        records = read_jsonl(path, dict)
    except SrlibError as error:
        raise SrlibError(f"{error} Run stage 05 again: python -m srlib run … --only 05_evaluate") from None
    if not all(isinstance(record.get(key), kind) for record in records for key, kind in COUNTED.items()):
        raise SrlibError(f"{path} is not complete; {AGAIN}")
    if old := next((record["id"] for record in records if not KEY.search(record["id"])), None):
        raise SrlibError(f"{path} does not say which problem {old!r} is (no digest in the id): {AGAIN}")
    return records


def _stage(folder: str | Path) -> Path:
    return (find(folder) or Path(folder)) / "05_evaluate"
