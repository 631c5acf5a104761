"""Baselines at their best: where an untrained small model is unsure, the big one is asked as often as by a trained one.

That needs a measure of doubt, a threshold, and a number of tokens that the big model writes each time; or, by step,
a threshold alone: `glimpse` and `specreason` (see `srlib.decoding.policies`). For a comparison at one share the threshold is set such that the big model writes this share of the tokens; of the
numbers the best is taken. Both are found on problems to train on: test problems choose nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast, get_args

import numpy as np
from tqdm.auto import tqdm

from srlib.data.rows import Problem
from srlib.decoding.policies import Glimpse, Never, Policy, SpecReason, Unsure
from srlib.decoding.scheduler import Offloader
from srlib.decoding.steps import starts
from srlib.decoding.trace import Trace
from srlib.engine.protocol import Engine, Measure
from srlib.evaluation import completions, stats
from srlib.params import Offload

TRIES = 4  # thresholds that are tried out, each set anew by what the others gave


@dataclass(frozen=True)
class Tuned:
    """A baseline whose threshold is set, and what it reached on the problems by which it was set."""

    policy: Unsure | Glimpse | SpecReason
    share: float
    accuracy: stats.Estimate

    def row(self) -> dict[str, Any]:
        """As a row of a table."""
        policy, reached = self.policy, self.accuracy
        return {
            "policy": policy.name,
            "chunk": policy.chunk if isinstance(policy, Unsure) else None,  # else a step
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
    names: Sequence[str],
    chunks: Sequence[int],
    problems: Sequence[Problem],
    config: Offload,
    seed: int = 0,
) -> list[Tuned]:
    """For each measure and each number of tokens, or each policy by step, the threshold whose share is nearest to `like`.

    The big model writes each problem once, and the small one reads that; on what it doubts there, each threshold
    has a share. (For `specreason` the small one writes, and the big one doubts.) The threshold of the share that is
    wanted is tried out with both models, and corrected by what came of it.

    Args:
        like: offload share, of tokens.
        names: measures of doubt, `glimpse` and `specreason`.
        chunks: tokens that the big model writes each time it is asked by a measure.
        problems: to train on.

    Returns:
        one for each measure and number, and each policy by step; the most accurate first.

    Raises:
        SrlibError: a trace failed.
    """
    rounds = {name: chunks if name in get_args(Measure) else (1,) for name in names}
    found = []
    doubted = _Doubted(small, big, problems, config, seed)
    with tqdm(total=TRIES * sum(map(len, rounds.values())), desc="tune", unit="threshold", mininterval=1) as bar:
        for name in names:
            doubts = doubted.of(name)
            for chunk in rounds[name]:
                tried: list[Tuned] = []
                gave = {0.0: 0.0, 1.0: 1.0}  # share that was given, by the share there is on what was read
                for _ in range(TRIES):
                    shares, reads = zip(*sorted((share, read) for read, share in gave.items()))
                    wanted = float(np.interp(like, shares, reads))  # regula falsi
                    policy = _policy(name, _threshold(doubts, chunk, wanted), chunk, config)
                    _, records = completions.run(
                        small, big, policy, problems, config, dataset="", seed=seed, progress=False
                    )
                    tried.append(Tuned(policy, stats.share(records), stats.accuracy(records)))
                    gave[wanted] = tried[-1].share
                    bar.update()
                found.append(min(tried, key=lambda one: abs(one.share - like)))
    return sorted(found, key=lambda one: one.accuracy.value, reverse=True)


def _policy(name: str, threshold: float, chunk: int, config: Offload) -> Unsure | Glimpse | SpecReason:
    if name == "glimpse":
        return Glimpse(threshold, tuple(config.step_ends))
    if name == "specreason":
        return SpecReason(threshold, tuple(config.step_ends))
    return Unsure(cast(Measure, name), threshold, chunk, name)


class _Doubted:
    """How much there is to doubt in traces of one model, for each token: by a measure of the other, or step by step."""

    def __init__(self, small: Engine, big: Engine, problems: Sequence[Problem], config: Offload, seed: int) -> None:
        self.small, self.big, self.config, self.seed = small, big, config, seed
        self.prompts = [problem.prompt for problem in problems]

    @cached_property
    def by_big(self) -> list[Trace]:
        """By a small model that is never sure of anything: the big one's traces, in ids of the small one."""
        return self._written(Unsure("confidence", -1.0, self.config.max_tokens))

    def of(self, name: str) -> list[np.ndarray]:
        """For each trace the doubt of each of its tokens; where a policy goes by step, of all of a step alike."""
        if name == "specreason":
            traces = self._written(Never())
            read = self._read(traces, lambda batch: self.big.score(batch))
            return [self._by_step(trace, -values, np.mean) for trace, values in zip(traces, read)]
        if name == "glimpse":
            read = self._read(self.by_big, lambda batch: self.small.doubts(batch, "entropy"))
            return [self._by_step(trace, values, lambda step: step[0]) for trace, values in zip(self.by_big, read)]
        return self._read(self.by_big, lambda batch: self.small.doubts(batch, cast(Measure, name)))

    def _written(self, policy: Policy) -> list[Trace]:
        writer = Offloader(self.small, self.big, policy, **self.config.settings, seed=self.seed)
        traces = writer.run(self.prompts, progress=True)
        writer.raise_if_failed(traces)
        return sorted((trace for trace in traces if trace.ids), key=lambda t: len(t.prompt_ids) + len(t.ids))

    def _read(self, traces: list[Trace], by: Callable[[list[list[int]]], list[list[float]]]) -> list[np.ndarray]:
        read: list[np.ndarray] = []
        for at in range(0, len(traces), self.config.batch_size):
            batch = traces[at : at + self.config.batch_size]
            values = by([trace.prompt_ids + trace.ids for trace in batch])
            read += [np.array(row[len(trace.prompt_ids) - 1 :]) for row, trace in zip(values, batch)]
        return read

    def _by_step(self, trace: Trace, values: np.ndarray, of: Callable[[np.ndarray], float]) -> np.ndarray:
        steps = np.split(values, starts(trace.ids, self.small.tokenizer, self.config.step_ends)[1:])
        return np.concatenate([np.full(len(step), of(step)) for step in steps])


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
