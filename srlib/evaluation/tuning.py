"""Baselines at their best: where an untrained small model is unsure, the big one is asked as often as by a trained one.

That needs a measure of doubt, a threshold, and a number of tokens that the big model writes each time. For a
comparison at one share the threshold is set such that the big model writes this share of the tokens; of the
numbers the best is taken. Both are found on problems to train on: test problems choose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from srlib.data.rows import Problem
from srlib.decoding.policies import Unsure
from srlib.decoding.scheduler import Offloader
from srlib.engine.protocol import Engine, Measure
from srlib.evaluation import completions, stats
from srlib.params import Offload

TRIES = 4  # thresholds that are tried out, each set anew by what the others gave


@dataclass(frozen=True)
class Tuned:
    """A baseline whose threshold is set, and what it reached on the problems by which it was set."""

    policy: Unsure
    share: float
    accuracy: stats.Estimate

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        policy, reached = self.policy, self.accuracy
        return {
            "measure": policy.measure,
            "chunk": policy.chunk,
            "threshold": policy.threshold,
            "offload_share": self.share,
            "accuracy": reached.value,
            "ci95": [reached.low, reached.high],
            "n_problems": reached.n_problems,
        }


def tune(
    small: Engine,
    big: Engine,
    like: float,
    measures: Sequence[Measure],
    chunks: Sequence[int],
    problems: Sequence[Problem],
    config: Offload,
    seed: int = 0,
) -> list[Tuned]:
    """For each measure and each number of tokens the threshold whose share is nearest to `like`.

    The big model writes each problem once, and the small one reads that; on what it doubts there, each threshold
    has a share. The threshold of the share that is wanted is tried out with both models, and corrected
    by what came of it.

    Args:
        like: offload share, of tokens.
        chunks: tokens that the big model writes each time it is asked.
        problems: to train on.

    Returns:
        one for each measure and number, the most accurate first.

    Raises:
        SrlibError: a trace failed.
    """
    # By a small model that is never sure of anything: the big one's traces, in ids of the small one.
    writer = Offloader(small, big, Unsure("confidence", -1.0, config.max_tokens), **config.settings, seed=seed)
    traces = writer.run([problem.prompt for problem in problems], progress=True)
    writer.raise_if_failed(traces)
    traces = sorted((trace for trace in traces if trace.ids), key=lambda trace: len(trace.prompt_ids) + len(trace.ids))
    found = []
    with tqdm(total=len(measures) * len(chunks) * TRIES, desc="tune", unit="threshold", mininterval=1) as bar:
        for measure in measures:
            doubts: list[np.ndarray] = []
            for at in range(0, len(traces), config.batch_size):
                batch = traces[at : at + config.batch_size]
                read = small.doubts([trace.prompt_ids + trace.ids for trace in batch], measure)
                doubts += [np.array(row[len(trace.prompt_ids) - 1 :]) for row, trace in zip(read, batch)]
            for chunk in chunks:
                tried: list[Tuned] = []
                gave = {0.0: 0.0, 1.0: 1.0}  # share that was given, by the share there is on the big model's traces
                for _ in range(TRIES):
                    shares, reads = zip(*sorted((share, read) for read, share in gave.items()))
                    wanted = float(np.interp(like, shares, reads))  # regula falsi
                    policy = Unsure(measure, _threshold(doubts, chunk, wanted), chunk, measure)
                    _, records = completions.run(
                        small, big, policy, problems, config, dataset="", seed=seed, progress=False
                    )
                    tried.append(Tuned(policy, stats.share(records), stats.accuracy(records)))
                    gave[wanted] = tried[-1].share
                    bar.update()
                found.append(min(tried, key=lambda one: abs(one.share - like)))
    return sorted(found, key=lambda one: one.accuracy.value, reverse=True)


def _threshold(doubts: Sequence[np.ndarray], chunk: int, share: float) -> float:
    """The one at which `share` of the tokens would be the big model's; `doubts` are those of each token of each trace."""
    values = np.unique(np.concatenate(doubts))
    low, high = 0, len(values) - 1
    while low < high:
        middle = (low + high) // 2
        if _share(doubts, float(values[middle]), chunk) > share:
            low = middle + 1
        else:
            high = middle
    return float(values[low])


def _share(doubts: Sequence[np.ndarray], threshold: float, chunk: int) -> float:
    """Part of the tokens in stretches of `chunk` that begin where there is more doubt than `threshold`."""
    big = 0
    for each in doubts:
        hits, end = np.flatnonzero(each > threshold), 0
        while (at := int(np.searchsorted(hits, end))) < len(hits):
            end = min(int(hits[at]) + chunk, len(each))
            big += end - int(hits[at])
    return big / sum(map(len, doubts))
