"""Statistics of graded completions: problems are the units, since samples of one are alike.

Records are dictionaries with the `id` of their problem and `correct`; some functions also read
`answer`, `big_tokens` and `small_tokens`. Every problem is sampled equally often. Intervals are
of 95 %.

Records of several trainings have a `seed`, too. Then seeds are the units, as what one training
came to is in all of its problems: a mean is taken over each seed's problems, and Student's t, at
seeds − 1 degrees of freedom, over the few means. That is the t-test on estimates of clusters of
Ibragimov and Müller (2010, J. Bus. Econ. Stat. 28, 453): right from two clusters on, whether
seeds differ or not, and with unlike variances it errs on the safe side; the sandwich estimate and a
bootstrap over clusters need dozens. Its price is width: t is 4.3 at three seeds and 2.8 at five. It takes
the means as about normal: a failure that one training in five meets is not in the interval of three
that were spared. Seeds that share problems speak of these problems.
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
from srlib.data import grade

Records = Sequence[dict[str, Any]]
LEVEL = 0.95
ALIKE = 1e-12  # numbers that differ by no more are equal, but for rounding
LEAST_P = 1e-300  # where a p-value ends: what floats can tell from 0


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval, clustered by problem, or by seed where there are several."""

    value: float
    low: float
    high: float
    n_problems: int
    samples_per_problem: int
    n_seeds: int = 1


@dataclass(frozen=True)
class Difference:
    """Accuracy of a minus that of b over the same problems, its 95 % interval, a paired p-value, and that of each seed."""

    value: float
    low: float
    high: float
    p_value: float
    n_problems: int
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Matched:
    """A policy beside a curve of other policies at the share that it has itself."""

    share: float
    curve: Estimate  # the curve's accuracy at that share
    difference: Difference  # the policy's accuracy minus that
    spread: tuple[float, float]  # of that difference, as `spread` gives it


def accuracy(records: Records) -> Estimate:
    """avg@k: mean over problems of the share of right samples.

    The interval is Wilson's (1927) at the effective number n_eff = p(1 − p) / var(mean) of
    independent samples, and as that variance is estimated from n problems, with the quantile of
    Student's t at n − 1; n is the number of seeds where there are several. With one sample a problem,
    of one seed, it is the plain Wilson interval. Of seeds whose means are all equal nothing is
    known of their variance: then it is over problems.

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
    means, n, seeds = _by_problem(records)
    _enough(k, n)
    values = [1 - comb(n - round(mean * n), k) / comb(n, k) for mean in means]
    return _estimate(np.array(values), k, seeds)


def maj_at(records: Records, k: int) -> Estimate:
    """maj@k: probability that the commonest answer of k samples is right.

    Right answers are one answer, however they are written, and so are wrong ones that the grader takes
    for equal. A sample without an answer has no vote. Answers that are equally common share the vote. The
    samples of a problem are cut into blocks of k, which are averaged.

    Raises:
        SrlibError: as `pass_at`.
    """
    grouped = _grouped(records)
    n = len(next(iter(grouped.values())))
    _enough(k, n)
    values = []
    for key in sorted(grouped):
        answers = _answers(grouped[key])
        values.append(np.mean([_vote(answers[i : i + k]) for i in range(0, n - k + 1, k)]))
    return _estimate(np.array(values), k, _seeds(grouped))


def intervals(records: Records, seed: int = 0) -> dict[str, tuple[float, float]]:
    """The interval of `accuracy` over problems, and beside it that of the normal approximation and of a bootstrap.

    `normal` is mean ± t · standard error of the problems' means; `bootstrap` is BCa (Efron 1987), 2,000 draws.
    """
    values, samples, _ = _by_problem(records)
    estimate = _estimate(values, samples)
    return {
        "wilson": (estimate.low, estimate.high),
        "normal": _student(values),
        "bootstrap": _bootstrap(values, seed),
    }


def compare(a: Records, b: Records) -> Difference:
    """Paired by problem: a t-test on the differences of each problem's mean, or of each seed's where there are several.

    Where all n of them are equal, their variance is unknown: p is the exact one of the sign-flip test,
    2^(1 − n), and the interval goes as far as the n-th part of problems that differ could be missed
    (Clopper and Pearson 1934); that of seeds which are all alike is over their problems.

    Raises:
        SrlibError: the two do not hold the same problems of the same seeds.
    """
    _same_problems(a, b)
    values, _, seeds = _by_problem(a)
    return _test(values - _by_problem(b)[0], seeds)


def key(record: dict[str, Any]) -> tuple[int, str]:
    """The seed and the problem of a record."""
    return record.get("seed", 0), record["id"]


def same_problems(a: Records, b: Records) -> bool:
    """Whether two sets of records hold the same problems of the same seeds, so that they can be paired."""
    return set(map(key, a)) == set(map(key, b))


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
    (own, k, seeds), (first, m, _), (second, n, _) = map(_by_problem, (records, low, high))
    gap = share(high) - share(low)
    weight = (wanted - share(low)) / gap if gap else 0.0
    slope = (second.mean() - first.mean()) / gap if gap else 0.0
    moved = _share_influence(records) - (1 - weight) * _share_influence(low) - weight * _share_influence(high)
    there = (1 - weight) * first + weight * second + slope * moved
    units = _units(there, seeds)
    at_share = Estimate(float(units.mean()), *_student(units), len(there), m, len(set(seeds)))
    parts = (1.0, own, k), (1 - weight, first, m), (weight, second, n)
    return Matched(wanted, at_share, _test(own - there, seeds), _spread(own - there, *parts))


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
    (first, k, _), (second, m, _) = _by_problem(a), _by_problem(b)
    return _spread(first - second, (1.0, first, k), (1.0, second, m))


def problems_needed(
    points: float, between: float, within: float, samples: int = 1, power: float = 0.8, level: float = LEVEL
) -> int:
    """How many problems a paired comparison needs to find a difference of `points` with probability `power`.

    n = (z_level + z_power)² (between + within / samples) / difference² (Miller 2024, arXiv 2411.00640, section 5)

    Args:
        points: the difference, in percentage points.
        between, within: as `spread` gives them; against a curve they are in what `matched` returns.
        samples: of each problem.
    """
    z = stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)
    return max(2, ceil(z**2 * (between + within / samples) / (points / 100) ** 2))


def _estimate(values: np.ndarray, samples: int, seeds: np.ndarray | None = None) -> Estimate:
    """Of values between 0 and 1, one a problem."""
    units = _units(values, seeds)
    p, n_seeds = float(units.mean()), 1 if seeds is None else len(set(seeds))
    if np.ptp(units) < ALIKE:
        units = values
    n = len(units)
    variance = float(units.var(ddof=1)) / n if n > 1 else 0.0
    once = set(np.unique(units)) <= {0.0, 1.0}  # as if drawn once: then the variance is the binomial's own
    return Estimate(p, *_wilson(p, variance, n, not once), len(values), samples, n_seeds)


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


def _test(differences: np.ndarray, seeds: np.ndarray | None = None) -> Difference:
    """Of differences between −1 and 1, one a problem."""
    units = _units(differences, seeds)
    value, n = float(units.mean()), len(units)
    of = np.zeros(len(differences), int) if seeds is None else seeds
    by_seed = {int(seed): float(differences[of == seed].mean()) for seed in np.unique(of)}
    if np.ptp(units) >= ALIKE:
        test = stats.ttest_1samp(units, 0.0)
        (low, high), p = test.confidence_interval(LEVEL), float(test.pvalue)
    elif len(by_seed) > 1:
        over_problems = _test(differences)
        low, high, p = over_problems.low, over_problems.high, _flips(value, n)
    else:
        missed = 1 - ((1 - LEVEL) / 2) ** (1 / n)  # so many problems could differ, and none be among n
        low, high, p = value - missed * (1 + value), value + missed * (1 - value), _flips(value, n)
    return Difference(value, float(low), float(high), max(p, LEAST_P), len(differences), by_seed)


def _flips(value: float, n: int) -> float:
    """p of n differences that are all `value`, by the sign-flip test: both signs of all, out of 2^n."""
    return 1.0 if abs(value) < ALIKE else 2.0 ** (1 - n)


def _units(values: np.ndarray, seeds: np.ndarray | None) -> np.ndarray:
    """What is independent: the means of the seeds, if there are several, or the values of problems."""
    if seeds is None or len(set(seeds)) == 1:
        return values
    return np.array([values[seeds == seed].mean() for seed in np.unique(seeds)])


def _spread(differences: np.ndarray, *parts: tuple[float, np.ndarray, int]) -> tuple[float, float]:
    """As `spread`; of `parts` (weight, means of problems, samples of each) the differences are the weighted sum."""
    total = float(np.var(differences, ddof=1)) if len(differences) > 1 else 1.0  # of one: the most it can be
    if any(k == 1 for _, _, k in parts):
        return total, 0.0
    within = [weight**2 * float(np.mean(p * (1 - p))) * k / (k - 1) for weight, p, k in parts]
    return max(0.0, total - sum(w / k for w, (_, _, k) in zip(within, parts))), sum(within)


def _share_influence(records: Records) -> np.ndarray:
    big, total = _tokens(records)
    return _influence(big, np.maximum(total, 1e-9))


def _influence(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """What each problem adds to a ratio r of sums, by the delta method: (a − r b) / mean of b."""
    return (above - above.sum() / below.sum() * below) / below.mean()


def _answers(samples: Records) -> list[int | None]:
    """The answer of each sample, as a number: 0 the right one, others as they come; None: it has none."""
    wrong: list[str] = []
    numbers: list[int | None] = []
    for record in samples:
        answer = (record.get("answer") or "").strip()
        if record["correct"] or not answer:
            numbers.append(0 if record["correct"] else None)
            continue
        known = (i for i, x in enumerate(wrong) if grade.same(answer, x).correct or grade.same(x, answer).correct)
        place = next(known, len(wrong))
        if place == len(wrong):
            wrong.append(answer)
        numbers.append(place + 1)
    return numbers


def _vote(answers: Sequence[int | None]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    return float(votes[0] == most) / sum(count == most for count in votes.values()) if votes else 0.0


def _enough(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise SrlibError(f"k is {k}, but there are {n} samples of each problem; it must be from 1 to {n}.")


def _same_problems(a: Records, b: Records) -> None:
    if not same_problems(a, b):
        first, second = set(map(key, a)), set(map(key, b))
        raise SrlibError(
            f"The two sets of records hold different problems ({len(first & second)} in common, of {len(first)} and "
            f"{len(second)}), so they cannot be paired."
        )


def _grouped(records: Records, of: Callable[[dict], Any] = dict) -> dict[tuple[int, str], list]:
    """What `of` gives for each record, by seed and problem.

    Raises:
        SrlibError: no records, or problems with different numbers of samples.
    """
    grouped: dict[tuple[int, str], list] = defaultdict(list)
    for record in records:
        grouped[key(record)].append(of(record))
    counts = {len(values) for values in grouped.values()}
    if len(counts) != 1:
        raise SrlibError(f"Every problem needs equally many samples, but there are {sorted(counts) or 'no records'}.")
    return grouped


def _seeds(grouped: dict[tuple[int, str], list]) -> np.ndarray:
    """The seed of each problem, in the order of `_by_problem`."""
    return np.array([seed for seed, _ in sorted(grouped)])


def _by_problem(records: Records) -> tuple[np.ndarray, int, np.ndarray]:
    """Mean of each problem, in the order of seeds and ids, the samples of each, and the seed of each."""
    grades = _grouped(records, lambda r: float(r["correct"]))
    means = np.array([np.mean(grades[key]) for key in sorted(grades)])
    return means, len(next(iter(grades.values()))), _seeds(grades)


def _tokens(records: Records) -> tuple[np.ndarray, np.ndarray]:
    """Big tokens and all tokens of each problem, in the order of seeds and ids."""
    tokens = _grouped(records, lambda r: (r["big_tokens"], r["big_tokens"] + r["small_tokens"]))
    sums = np.array([np.sum(tokens[key], axis=0) for key in sorted(tokens)], dtype=float)
    return sums[:, 0], sums[:, 1]
