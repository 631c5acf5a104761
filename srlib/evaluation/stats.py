"""Statistics of graded completions: problems are the units, since samples of one are alike.

Records are dictionaries with the `id` of their problem and `correct`; some functions also read
`answer`, `big_tokens` and `small_tokens`. Every problem is sampled equally often. Intervals are
of 95 %.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, comb
from typing import Any

import numpy as np
from scipy import stats

from srlib import SrlibError

Records = Sequence[dict[str, Any]]
LEVEL = 0.95


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


@dataclass(frozen=True)
class Matched:
    """A policy beside a curve of other policies at the share that it has itself."""

    share: float
    curve: Estimate  # the curve's accuracy at that share
    difference: Difference  # the policy's accuracy minus that


def accuracy(records: Records) -> Estimate:
    """avg@k: mean over problems of the share of right samples.

    The interval is Wilson's (1927) at the effective number n_eff = p(1 − p) / var(mean) of
    independent samples, and as that variance is estimated from n problems, with the quantile of
    Student's t at n − 1. With one sample a problem it is the plain Wilson interval.

    Raises:
        SrlibError: no records, or problems with different numbers of samples.
    """
    return _estimate(*_by_problem(records))


def pass_at(records: Records, k: int) -> Estimate:
    """pass@k: probability that one of k samples is right.

    From n samples, c of them right, without bias: 1 − C(n − c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374).

    Raises:
        SrlibError: as `accuracy`, or fewer than `k` samples of each problem.
    """
    means, n = _by_problem(records)
    _enough(k, n)
    values = [1 - comb(n - round(mean * n), k) / comb(n, k) for mean in means]
    return _estimate(np.array(values), k)


def maj_at(records: Records, k: int) -> Estimate:
    """maj@k: probability that the commonest answer of k samples is right.

    Right answers are one answer, however they are written. Answers that are equally common share
    the vote. The samples of a problem are cut into blocks of k, which are averaged.

    Raises:
        SrlibError: as `pass_at`.
    """
    grouped = _grouped(records)
    n = len(next(iter(grouped.values())))
    _enough(k, n)
    values = []
    for key in sorted(grouped):
        blocks = [grouped[key][i : i + k] for i in range(0, n - k + 1, k)]
        values.append(np.mean([_vote(block) for block in blocks]))
    return _estimate(np.array(values), k)


def intervals(records: Records, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The interval of `accuracy`, and beside it that of the normal approximation and of a bootstrap over problems.

    `normal` is mean ± t · standard error of the problems' means; `bootstrap` is BCa (Efron 1987), 2,000 draws.
    """
    values, samples = _by_problem(records)
    estimate = _estimate(values, samples)
    return {
        "wilson": (estimate.low, estimate.high),
        "normal": _student(values),
        "bootstrap": _bootstrap(values, seed),
    }


def compare(a: Records, b: Records) -> Difference:
    """Paired by problem: a t-test on the differences of each problem's mean.

    Raises:
        SrlibError: the two do not hold the same problems.
    """
    _same_problems(a, b)
    return _test(_by_problem(a)[0] - _by_problem(b)[0])


def share(records: Records) -> float:
    """Offload share by tokens: big / (big + small) over all of them."""
    big, total = _tokens(records)
    return float(big.sum() / max(1, total.sum()))


def share_per_problem(records: Records) -> tuple[float, float, float]:
    """Quartiles over problems of the offload share of each."""
    big, total = _tokens(records)
    low, middle, high = np.quantile(big / np.maximum(total, 1), (0.25, 0.5, 0.75)).tolist()
    return low, middle, high


def matched(records: Records, curve: Sequence[Records]) -> Matched:
    """A policy against others at its own offload share, interpolated from their curve, paired by problem.

    Between the two points of the curve on either side of the share the accuracy runs straight. All
    that is estimated goes into the interval: the accuracies, and by the delta method the shares, which are
    ratios of tokens.

    Args:
        curve: records of each policy on the curve, such as random offloading at several shares.

    Raises:
        SrlibError: other problems, or no points on either side of the policy's share.
    """
    for other in curve:
        _same_problems(records, other)
    wanted = share(records)
    points = sorted(curve, key=share)
    below = [point for point in points if share(point) <= wanted]
    above = [point for point in points if share(point) >= wanted]
    if not below or not above:
        ends = ", ".join(f"{share(point):.1%}" for point in points)
        raise SrlibError(f"The curve has shares {ends}; it cannot be interpolated at {wanted:.1%}, beyond its ends.")
    low, high = below[-1], above[0]
    own, (first, samples), (second, _) = _by_problem(records)[0], _by_problem(low), _by_problem(high)
    gap = share(high) - share(low)
    weight = (wanted - share(low)) / gap if gap else 0.0
    slope = (second.mean() - first.mean()) / gap if gap else 0.0
    moved = _share_influence(records) - (1 - weight) * _share_influence(low) - weight * _share_influence(high)
    there = (1 - weight) * first + weight * second + slope * moved
    at_share = Estimate(float(there.mean()), *_student(there), len(there), samples)
    return Matched(wanted, at_share, _test(own - there))


def proportion(of: Sequence[bool], problems: Sequence[str]) -> Estimate:
    """Share of some things that are so, several to a problem, with an interval clustered by problem.

    A ratio of two sums over problems; its variance is that of the delta method, its interval Wilson's
    at the effective number, as in `accuracy`.

    Args:
        of: for each thing whether it is so.
        problems: the problem each belongs to.
    """
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for yes, problem in zip(of, problems, strict=True):
        counts[problem][0] += yes
        counts[problem][1] += 1
    if not counts:
        raise SrlibError("There is nothing to take a share of.")
    above, below = np.array(list(counts.values()), dtype=float).T
    ratio = float(above.sum() / below.sum())
    each = _influence(above, below)
    variance = float(each.var(ddof=1)) / len(each) if len(each) > 1 else 0.0
    low, high = _wilson(ratio, variance, len(each), 0 < variance)
    return Estimate(ratio, low, high, len(each), round(below.mean()))


def spread(a: Records, b: Records) -> tuple[float, float]:
    """Variances of the difference of a and b: between problems, and within one (of one sample of each).

    With one sample a problem they cannot be told apart: all of it is counted as between.
    """
    _same_problems(a, b)
    (first, k), (second, m) = _by_problem(a), _by_problem(b)
    total = float(np.var(first - second, ddof=1))
    if k == 1 or m == 1:
        return total, 0.0
    within = [float(np.mean(p * (1 - p))) * n / (n - 1) for p, n in ((first, k), (second, m))]
    return max(0.0, total - within[0] / k - within[1] / m), sum(within)


def problems_needed(
    points: float, between: float, within: float, samples: int = 1, power: float = 0.8, level: float = LEVEL
) -> int:
    """How many problems a paired comparison needs to find a difference of `points` with probability `power`.

    n = (z_level + z_power)² (between + within / samples) / difference² (Miller 2024, arXiv 2411.00640, section 5)

    Args:
        points: the difference, in percentage points.
        between, within: as `spread` gives them.
        samples: of each problem.
    """
    z = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
    return max(2, ceil(z**2 * (between + within / samples) / (points / 100) ** 2))


def _estimate(values: np.ndarray, samples: int) -> Estimate:
    """Of values between 0 and 1, one a problem."""
    n, p = len(values), float(values.mean())
    variance = float(values.var(ddof=1)) / n if n > 1 else 0.0
    once = set(np.unique(values)) <= {0.0, 1.0}  # as if drawn once: then the variance is the binomial's own
    return Estimate(p, *_wilson(p, variance, n, not once), n, samples)


def _wilson(p: float, variance: float, n: int, clustered: bool) -> tuple[float, float]:
    """Wilson's interval at p(1 − p) / variance of the mean; if not `clustered`, at n."""
    clustered = clustered and variance > 0
    effective = p * (1 - p) / variance if clustered else n
    z = stats.t.ppf((1 + LEVEL) / 2, n - 1) if clustered else stats.norm.ppf((1 + LEVEL) / 2)
    centre = (p + z**2 / (2 * effective)) / (1 + z**2 / effective)
    half = z / (1 + z**2 / effective) * (p * (1 - p) / effective + z**2 / (4 * effective**2)) ** 0.5
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _student(values: np.ndarray) -> tuple[float, float]:
    """Mean ± t · standard error."""
    n, mean = len(values), float(values.mean())
    if n < 2:
        return mean, mean
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(ddof=1) / n**0.5)
    return mean - half, mean + half


def _bootstrap(values: np.ndarray, seed: int) -> tuple[float, float]:
    if np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = stats.bootstrap(
        (values,), np.mean, confidence_level=LEVEL, n_resamples=2000, batch=500, rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(found.low), float(found.high)


def _test(differences: np.ndarray) -> Difference:
    value, n = float(differences.mean()), len(differences)
    if n < 2 or np.ptp(differences) == 0:
        return Difference(value, value, value, 1.0 if value == 0 else 0.0, n)
    test = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(LEVEL)
    return Difference(value, float(interval.low), float(interval.high), float(test.pvalue), n)


def _share_influence(records: Records) -> np.ndarray:
    big, total = _tokens(records)
    return _influence(big, np.maximum(total, 1e-9))


def _influence(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """What each problem adds to a ratio r of sums, by the delta method: (a − r b) / mean of b."""
    return (above - above.sum() / below.sum() * below) / below.mean()


def _vote(block: Records) -> float:
    votes = Counter("right" if r["correct"] else ("wrong", (r.get("answer") or "").strip()) for r in block)
    most = max(votes.values())
    return float(votes["right"] == most) / sum(count == most for count in votes.values())


def _enough(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise SrlibError(f"k is {k}, but there are {n} samples of each problem; it must be from 1 to {n}.")


def _same_problems(a: Records, b: Records) -> None:
    if {r["id"] for r in a} != {r["id"] for r in b}:
        raise SrlibError("The two sets of records hold different problems, so they cannot be paired.")


def _grouped(records: Records, of: Callable[[dict], Any] = dict) -> dict[str, list]:
    """What `of` gives for each record, by problem.

    Raises:
        SrlibError: no records, or problems with different numbers of samples.
    """
    grouped: dict[str, list] = defaultdict(list)
    for record in records:
        grouped[record["id"]].append(of(record))
    counts = {len(values) for values in grouped.values()}
    if len(counts) != 1:
        raise SrlibError(f"Every problem needs equally many samples, but there are {sorted(counts) or 'no records'}.")
    return grouped


def _by_problem(records: Records) -> tuple[np.ndarray, int]:
    """Mean of each problem, in the order of their ids, and the samples of each."""
    grades = _grouped(records, lambda r: float(r["correct"]))
    means = np.array([np.mean(grades[key]) for key in sorted(grades)])
    return means, len(next(iter(grades.values())))


def _tokens(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Big tokens and all tokens of each problem, in the order of their ids."""
    tokens = _grouped(records, lambda r: (r["big_tokens"], r["big_tokens"] + r["small_tokens"]))
    sums = np.array([np.sum(tokens[key], axis=0) for key in sorted(tokens)], dtype=float)
    return sums[:, 0], sums[:, 1]
