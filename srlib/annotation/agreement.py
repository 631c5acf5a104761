"""How far two annotators mark the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from srlib.annotation.alignment import cover
from srlib.annotation.annotators import _encoded
from srlib.data.rows import Annotated
from srlib.data.spans import Span

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Agreement:
    """Of two annotators over the tokens of the same traces; `low` and `high` bound F1, 95 %, clustered by trace."""

    f1: float
    low: float
    high: float
    kappa: float  # Cohen's
    precision: float  # of the first, if the second is the truth
    recall: float
    n_traces: int


def agreement(
    rows: Sequence[Annotated],
    others: dict[str, Sequence[Span]],
    tokenizer: PreTrainedTokenizerBase,
    draws: int = 1000,
    seed: int = 0,
) -> Agreement:
    """How far two annotators mark the same tokens: F1, and kappa = (observed − expected) / (1 − expected).

    The interval is that of a bootstrap over traces (Efron, 1979), as tokens of one are not independent.

    Args:
        rows: of one annotator.
        others: spans, in characters, of the other for each of the traces, by id.
    """
    counts = []
    for row in rows:
        offsets = _encoded(tokenizer, row)["offset_mapping"]
        both = np.zeros((2, len(offsets)), bool)
        for mask, marked in zip(both, (row.spans, others[row.id])):
            for span in marked:
                mask[slice(*cover(span, offsets))] = True
        a, b = both
        counts.append([(a & b).sum(), (a & ~b).sum(), (~a & b).sum(), (~a & ~b).sum()])
    table = np.array(counts)

    def f1(sums: np.ndarray) -> np.ndarray:
        return 2 * sums[..., 0] / np.maximum(1, 2 * sums[..., 0] + sums[..., 1] + sums[..., 2])

    drawn = np.random.default_rng(seed).integers(len(table), size=(draws, len(table)))
    low, high = np.quantile(f1(table[drawn].sum(1)), [0.025, 0.975])
    sums = table.sum(0)
    hit, ours, theirs, _ = sums
    n = sums.sum()
    observed = (n - ours - theirs) / n
    expected = ((hit + ours) * (hit + theirs) + (n - hit - ours) * (n - hit - theirs)) / n**2
    return Agreement(
        f1=float(f1(sums)),
        low=float(low),
        high=float(high),
        kappa=float((observed - expected) / (1 - expected)) if expected < 1 else 1.0,
        precision=float(hit / max(1, hit + ours)),
        recall=float(hit / max(1, hit + theirs)),
        n_traces=len(rows),
    )
