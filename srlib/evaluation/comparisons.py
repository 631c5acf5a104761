"""Comparisons in tables and in words: p-values of many of them, and what they speak of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from srlib.evaluation import stats

SHOWN = 1e-4  # below it no p-value is written out: it would rest on the far tail of an approximation


def holm(p_values: Sequence[float]) -> list[float]:
    """Each p-value corrected for their number: of m, the i-th smallest times m − i + 1, and never below a smaller one.

    The probability of any false finding among all of them then keeps to the level (Holm 1979, Scand. J. Stat. 6, 65).
    """
    order = np.argsort(p_values)
    steps = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected.tolist()


def table(differences: Mapping[str, stats.Difference]) -> pd.DataFrame:
    """A line for each comparison, with p-values as they are and corrected for all that stand in the table (`holm`)."""
    rows = []
    for (name, d), corrected in zip(differences.items(), holm([d.p_value for d in differences.values()])):
        row: dict[str, str | int] = {
            "comparison": name,
            "difference": f"{d.value:+.1%}",
            "95 % interval": f"[{d.low:+.1%}, {d.high:+.1%}]",
        }
        row |= {"p": p_text(d.p_value), "p (Holm)": p_text(corrected), "problems": d.n_problems}
        if len(d.by_seed) > 1:
            row["by seed"] = ", ".join(f"{seed}: {value:+.1%}" for seed, value in d.by_seed.items())
        rows.append(row)
    return pd.DataFrame(rows)


def p_text(p: float) -> str:
    """A p-value as it is written: two digits, and what is below 0.0001 as that."""
    return f"{p:.2g}" if p >= SHOWN else f"< {SHOWN:.4f}"


def about(records: stats.Records) -> str:
    """What intervals and p-values of these records speak of, in a sentence or two."""
    seeds = {seed for seed, _ in map(stats.key, records)}
    if len(seeds) == 1:
        return "One training seed: intervals and p-values are over problems, and about these trained models only."
    shared = len({r["id"] for r in records}) < len(set(map(stats.key, records)))
    return (
        f"{len(seeds)} training seeds: intervals and p-values are over seeds (Student's t, {len(seeds) - 1} degrees "
        "of freedom), and about the method, trained once more."
        + (" Seeds share problems: it is about these problems." if shared else "")
    )
