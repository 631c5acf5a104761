"""What a policy reaches: accuracy with its interval, offload share, cost, and paired comparisons."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from srlib import SrlibError, spans
from srlib.grade import grade
from srlib.offload import Offloader, Trace
from srlib.params import Offload
from srlib.policies import Policy
from srlib.problems import Problem


@dataclass(frozen=True)
class Estimate:
    """A mean over problems and its 95 % interval, clustered by problem."""

    value: float
    low: float
    high: float
    n_problems: int
    samples_per_problem: int


@dataclass(frozen=True)
class Difference:
    """Accuracy of a minus that of b over the same problems, its 95 % interval, and a paired p-value."""

    value: float
    low: float
    high: float
    p_value: float
    n_problems: int


def run(
    small,
    big,
    policy: Policy,
    problems: list[Problem],
    config: Offload,
    *,
    dataset: str,
    samples: int = 1,
    seed: int = 0,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write and grade every problem `samples` times under one policy.

    Returns:
        the policy's row of `results.json`, and a record for each completion with its problem's
        id, text, owners, and grade.
    """
    writer = Offloader(small, big, policy, **config.settings, seed=seed)
    asked = [problem for problem in problems for _ in range(samples)]
    start = time.perf_counter()
    traces = writer.run([problem.prompt for problem in asked], progress=True)
    wall = time.perf_counter() - start
    writer.raise_if_failed(traces)
    records = [_record(problem, trace, writer.tokenizer) for problem, trace in zip(asked, traces)]
    return summarise(policy.name, dataset, config.max_tokens, traces, records, wall), records


def summarise(
    policy: str, dataset: str, max_tokens: int, traces: list[Trace], records: list[dict], wall: float
) -> dict[str, Any]:
    """One row of `results.json`. Shares are of tokens or traces, times in seconds, tokens are sums."""
    estimate = accuracy(records)
    tokens = sum(len(trace.ids) for trace in traces)
    return {
        "policy": policy,
        "dataset": dataset,
        "n_problems": estimate.n_problems,
        "samples_per_problem": estimate.samples_per_problem,
        "max_tokens": max_tokens,
        "accuracy": estimate.value,
        "ci95": [estimate.low, estimate.high],
        "offload_share": spans.share(traces),
        "handovers": sum(len(trace.handovers) for trace in traces) / len(traces),
        "truncated_share": sum(trace.finish != "eos" for trace in traces) / len(traces),
        "malformed_share": sum(bool(trace.malformed) for trace in traces) / len(traces),
        "wall_s": wall,
        "tokens_per_s": tokens / wall,
        "small_forward_tokens": sum(trace.small_forward_tokens for trace in traces),
        "big_forward_tokens": sum(trace.big_forward_tokens for trace in traces),
        "least_forward_tokens": sum(trace.least_forward_tokens for trace in traces),
    }


def accuracy(records: list[dict[str, Any]]) -> Estimate:
    """Mean over problems of the share of right samples, with a 95 % interval.

    Samples of one problem are not independent, so problems are the units. The interval is
    Wilson's (1927) at the effective number n_eff = p(1 − p) / var(mean) of independent samples;
    with one sample a problem that is the plain Wilson interval.

    Args:
        records: each with `id` of its problem and `correct`; every problem equally often.

    Raises:
        SrlibError: no records, or problems with different numbers of samples.
    """
    means, samples = _by_problem(records)
    n, p = len(means), float(means.mean())
    variance = float(means.var(ddof=1)) / n if n > 1 else 0.0
    effective = n if samples == 1 or variance == 0 else p * (1 - p) / variance
    z = stats.norm.ppf(0.975)
    centre = (p + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * (p * (1 - p) / effective + z**2 / (4 * effective**2)) ** 0.5
    return Estimate(p, max(0.0, float(centre - half)), min(1.0, float(centre + half)), n, samples)


def compare(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> Difference:
    """Paired by problem: a t-test on the differences of each problem's mean.

    Raises:
        SrlibError: the two do not hold the same problems.
    """
    if {r["id"] for r in a} != {r["id"] for r in b}:
        raise SrlibError("The two sets of records hold different problems, so they cannot be paired.")
    first, second = _by_problem(a)[0], _by_problem(b)[0]
    value = float((first - second).mean())
    if np.ptp(first - second) == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, len(first))
    test = stats.ttest_rel(first, second)
    interval = test.confidence_interval(0.95)
    return Difference(value, float(interval.low), float(interval.high), float(test.pvalue), len(first))


def _by_problem(records: list[dict[str, Any]]) -> tuple[np.ndarray, int]:
    """Mean of each problem, in the order of their ids, and the samples of each."""
    grades: dict[str, list[bool]] = defaultdict(list)
    for record in records:
        grades[record["id"]].append(record["correct"])
    counts = {len(values) for values in grades.values()}
    if len(counts) != 1:
        raise SrlibError(f"Every problem needs equally many samples, but there are {sorted(counts) or 'no records'}.")
    return np.array([np.mean(grades[key]) for key in sorted(grades)]), counts.pop()


def _record(problem: Problem, trace: Trace, tokenizer) -> dict[str, Any]:
    text = trace.text(tokenizer)
    verdict = grade(text, problem.answer)
    return {
        "id": problem.id,
        "correct": verdict.correct,
        "answer": verdict.answer,
        "reason": verdict.reason,
        "finish": trace.finish,
        "text": tokenizer.decode(trace.ids),
        "owners": "".join("SBF"[owner] for owner in trace.owners),
        "big_tokens": trace.big_tokens,
        "small_tokens": trace.small_tokens,
    }
