"""Statistics against simulated studies whose truth is known."""

import itertools

import numpy as np
import pytest

from srlib import SrlibError
from srlib.evaluation import stats

STUDIES = 2000


def records(grid, big=None, total=100):
    """grid: (problems, samples) of 0 and 1; big: tokens of the big model in each, of `total`."""
    grid = np.asarray(grid)
    big = np.zeros(grid.shape, int) if big is None else np.broadcast_to(big, grid.shape)
    return [
        {"id": f"{i:04d}", "correct": bool(x), "big_tokens": int(b), "small_tokens": total - int(b)}
        for i, (row, bigs) in enumerate(zip(grid, big))
        for x, b in zip(row, bigs)
    ]


def studies(rng, n, k, a, b):
    """Results (studies, n, k) of problems whose probabilities differ, with mean a / (a + b)."""
    return rng.random((STUDIES, n, k)) < rng.beta(a, b, size=(STUDIES, n, 1))


def test_interval_of_single_samples_is_wilsons():
    from scipy.stats import binomtest

    estimate = stats.accuracy(records([[1]] * 70 + [[0]] * 30))
    wanted = binomtest(70, 100).proportion_ci(method="wilson")
    assert estimate.value == 0.7
    assert (estimate.low, estimate.high) == pytest.approx((wanted.low, wanted.high), abs=2e-3)
    assert (estimate.n_problems, estimate.samples_per_problem) == (100, 1)


def test_interval_of_all_right_is_not_a_point():
    estimate = stats.accuracy(records([[1, 1]] * 50))
    assert 0.9 < estimate.low < 1 and estimate.high == pytest.approx(1)


def test_interval_is_clustered_by_problem():
    """Samples that agree within a problem add nothing, samples that do not add much."""
    agree = stats.accuracy(records([[1] * 8] * 30 + [[0] * 8] * 30))
    single = stats.accuracy(records([[1]] * 30 + [[0]] * 30))
    differ = stats.accuracy(records([[1, 0] * 4] * 29 + [[1] * 8] + [[0] * 8] + [[1, 0] * 4] * 29))
    assert agree.high - agree.low == pytest.approx(single.high - single.low, rel=0.03)
    assert differ.high - differ.low < 0.3 * (single.high - single.low)


@pytest.mark.parametrize(("n", "k"), [(30, 4), (30, 16), (60, 4), (200, 1), (200, 8)])
@pytest.mark.parametrize(("a", "b"), [(2, 2), (0.5, 0.5), (4, 1)])
def test_95_percent_intervals_cover_the_truth(n, k, a, b):
    """In 93 to 97 % of 2,000 studies; 2,000 give the share of covering ones to ± 1 point."""
    rng = np.random.default_rng([n, k, int(2 * a), int(2 * b)])
    truth, covered = a / (a + b), 0
    for means in studies(rng, n, k, a, b).mean(2):
        estimate = stats._estimate(means, k)
        covered += estimate.low <= truth <= estimate.high
    assert 0.93 <= covered / STUDIES <= 0.97


def test_bootstrap_and_normal_intervals_cover_the_truth_too():
    rng = np.random.default_rng(0)
    covered = {"wilson": 0, "normal": 0, "bootstrap": 0}
    grids = studies(rng, 60, 4, 2, 2)[:1000]
    for grid in grids:
        means = grid.mean(1)
        estimate = stats._estimate(means, 4)
        found = (estimate.low, estimate.high), stats._student(means), stats._bootstrap(means, 0)
        for name, (low, high) in zip(covered, found):
            covered[name] += low <= 0.5 <= high
    assert all(0.93 <= count / len(grids) <= 0.97 for count in covered.values()), covered
    wanted = stats._bootstrap(grid.mean(1), 0)
    assert stats.intervals(records(grid))["bootstrap"] == pytest.approx(wanted)


@pytest.mark.parametrize(("n", "k"), [(30, 4), (100, 1), (500, 2)])
def test_the_paired_test_finds_what_is_not_there_in_5_percent(n, k):
    """Two policies that are equal on the whole, and differ on every problem."""
    rng = np.random.default_rng([n, k])
    found, size = 0, 4000
    easy = rng.beta(2, 2, size=(size, n))
    shift = rng.uniform(-0.3, 0.3, size=(size, n)) * np.minimum(easy, 1 - easy)
    a, b = (rng.binomial(k, easy + sign * shift) / k for sign in (1, -1))
    for difference in a - b:
        test = stats._test(difference)
        found += test.p_value < 0.05
        assert (test.p_value < 0.05) == (not test.low <= 0 <= test.high)
    assert 0.04 <= found / size <= 0.06


def test_paired_comparison():
    rng = np.random.default_rng(0)
    base = rng.random(300) < 0.5
    better = base | (rng.random(300) < 0.1)
    difference = stats.compare(records(better[:, None]), records(base[:, None]))
    assert difference.value == pytest.approx(better.mean() - base.mean())
    assert difference.low > 0 and difference.p_value < 0.001
    same = stats.compare(records(base[:, None]), records(base[:, None]))
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    unpaired = stats.accuracy(records(better[:, None]))
    assert difference.high - difference.low < unpaired.high - unpaired.low


def test_pass_and_majority():
    grid = [[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]
    some = records(grid)
    for k in (1, 2, 3, 4):
        by_hand = [np.mean([any(c) for c in itertools.combinations(row, k)]) for row in grid]
        assert stats.pass_at(some, k).value == pytest.approx(np.mean(by_hand))
    assert stats.pass_at(some, 1).value == pytest.approx(stats.accuracy(some).value)
    answers = ["5", "6", "7", "8"] + ["1", "1.0", "1", "2"] + ["3", "3", "3", "3"]
    voted = [{**r, "answer": answer} for r, answer in zip(some, answers)]
    assert stats.maj_at(voted, 4).value == pytest.approx((1 / 4 + 1 + 0) / 3)
    assert stats.maj_at(voted, 2).value == pytest.approx(((1 / 2 + 0) / 2 + (1 + 1 / 2) / 2 + 0) / 3)
    with pytest.raises(SrlibError, match="k is 5"):
        stats.pass_at(some, 5)


def test_pass_at_k_has_no_bias():
    rng = np.random.default_rng(1)
    p = rng.beta(1, 2, size=4000)
    estimate = stats.pass_at(records(rng.random((4000, 6)) < p[:, None]), 3)
    truth = float(np.mean(1 - (1 - p) ** 3))
    assert abs(estimate.value - truth) < estimate.high - estimate.low  # four standard errors


def world(rng, n, share, gain):
    """Records of a policy whose share scatters around `share` and whose accuracy is 0.2 + gain."""
    shares = np.clip(rng.normal(share, 0.3 * share, size=n), 0, 1)
    big = rng.binomial(400, shares)
    return records(rng.random((n, 1)) < 0.2 + gain, big[:, None], total=400)


def test_matched_share():
    rng = np.random.default_rng(0)
    curve = [world(rng, 400, s, 0.5 * s) for s in (0.0, 0.1, 0.4)]
    ours = world(rng, 400, 0.2, 0.4)
    found = stats.matched(ours, curve)
    assert found.share == pytest.approx(0.2, abs=0.02)
    ends = [stats.accuracy(c).value for c in curve]
    assert ends[1] < found.curve.value < ends[2] or ends[2] < found.curve.value < ends[1]
    assert found.difference.low > 0 and found.difference.p_value < 1e-3
    assert found.difference.value == pytest.approx(stats.accuracy(ours).value - found.curve.value)
    with pytest.raises(SrlibError, match="cannot be interpolated at"):
        stats.matched(world(rng, 400, 0.5, 0.0), curve)


def test_matched_share_covers_the_truth():
    """The curve's value at the policy's share, whose slope and shares are estimated too."""
    rng = np.random.default_rng(2)
    covered, found, rounds = 0, 0, 1000
    for _ in range(rounds):
        curve = [world(rng, 60, s, 1.5 * s) for s in (0.1, 0.3)]
        ours = world(rng, 60, 0.2, 0.3)  # on the curve
        match = stats.matched(ours, curve)
        covered += match.curve.low <= 0.5 <= match.curve.high
        found += match.difference.p_value < 0.05
    assert 0.93 <= covered / rounds <= 0.97
    assert 0.03 <= found / rounds <= 0.07


@pytest.mark.parametrize("samples", [1, 4])
def test_the_power_promised_is_had(samples):
    rng = np.random.default_rng(samples)

    def both(n):
        easy = rng.beta(2, 2, size=n)
        better = np.clip(easy + 0.1 + rng.normal(0, 0.1, n), 0, 1)
        return [rng.random((n, samples)) < p[:, None] for p in (better, easy)]

    many = both(200_000)
    pilot = [records(grid[:4000]) for grid in many]
    points = 100 * float(many[0].mean() - many[1].mean())
    needed = stats.problems_needed(points, *stats.spread(*pilot), samples)
    found = [stats._test(np.subtract(*(g.mean(1) for g in both(needed)))).p_value < 0.05 for _ in range(2000)]
    assert 0.75 <= np.mean(found) <= 0.85


def test_shares():
    some = records([[1, 0], [1, 1]], big=[[10, 30], [0, 0]])
    assert stats.share(some) == pytest.approx(0.1)
    assert stats.share_per_problem(some)[1] == pytest.approx(0.1)


def test_errors():
    with pytest.raises(SrlibError, match="different problems"):
        stats.compare(records([[1]] * 3), records([[1]] * 4))
    with pytest.raises(SrlibError, match="equally many samples"):
        stats.accuracy([*records([[1, 1]]), {"id": "x", "correct": True}])
    with pytest.raises(SrlibError, match="no records"):
        stats.accuracy([])
