"""Statistics against simulated studies whose truth is known."""

import itertools

import numpy as np
import pytest

from srlib import SrlibError
from srlib.evaluation import comparisons, stats

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


@pytest.mark.parametrize(("n", "k"), [(30, 4), (30, 16), (30, 64), (60, 4), (200, 1), (200, 8)])
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
    assert (same.value, same.p_value) == (0, 1) and same.high == -same.low == pytest.approx(1 - 0.025 ** (1 / 300))
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


def test_wrong_answers_are_one_answer_however_they_are_written():
    """As right ones are: what two spellings divide does not lose to what is counted together."""
    half = [r"\frac12", "0.5", "1/2"]
    some = [{**r, "answer": a} for r, a in zip(records([[1, 1, 0, 0, 0]]), ["7", "7.0", *half])]
    assert stats.maj_at(some, 5).value == 0
    other = [{**r, "answer": a} for r, a in zip(some, ["7", "7.0", "1/2", "1/3", "1/4"])]
    assert stats.maj_at(other, 5).value == 1


def test_what_has_no_answer_has_no_vote():
    some = [{**r, "answer": a} for r, a in zip(records([[1, 0, 0, 0]]), ["7", None, None, " "])]
    assert stats.maj_at(some, 4).value == 1
    assert stats.maj_at([{**r, "correct": False, "answer": None} for r in some], 4).value == 0


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
def test_the_power_promised_against_random_at_that_share_is_had(samples):
    """Interpolated between two policies it is another comparison than against one of them."""
    rng = np.random.default_rng(samples)

    def three(n):
        easy, bigs = rng.beta(2, 2, size=n), rng.binomial(100, 0.1, size=(2, n, 1))
        accuracies = np.clip(easy + 0.2 + rng.normal(0, 0.1, n), 0, 1), easy, np.clip(easy + 0.1, 0, 1)
        return accuracies, (np.mean(bigs, 0).round().astype(int), bigs[0] // 2, 2 * bigs[1])

    def drawn(n):
        return [records(rng.random((n, samples)) < p[:, None], big) for p, big in zip(*three(n))]

    (better, low, high), shares = three(10**6)
    first, second = (other.mean() for other in shares[1:])
    weight = (shares[0].mean() - first) / (second - first)
    truth = better.mean() - (1 - weight) * low.mean() - weight * high.mean()
    pilot, *beside = drawn(4000)
    spread = stats.matched(pilot, beside).spread
    needed = stats.problems_needed(100 * truth, *spread, samples)
    found = []
    for _ in range(600):
        ours, *curve = drawn(needed)
        found.append(stats.matched(ours, curve).difference.p_value < 0.05)
    assert 0.75 <= np.mean(found) <= 0.85
    alone = stats.problems_needed(100 * truth, *stats.spread(pilot, beside[0]), samples)
    assert alone > 1.1 * needed


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


SEEDS = {"alike": 0.0, "unlike": 0.05}  # standard deviation over trainings of what a policy reaches


def trained(rng, seeds, spread, mean=0.8, problems=100, samples=2):
    """Graded samples (seeds, problems, samples) of a policy trained `seeds` times, each on problems of its own."""
    scale = mean * (1 - mean) / spread**2 - 1 if spread else np.inf
    reached = rng.beta(mean * scale, (1 - mean) * scale, size=(seeds, 1)) if spread else np.full((seeds, 1), mean)
    return (
        rng.random((seeds, problems, samples)) < rng.beta(4 * reached, 4 * (1 - reached), (seeds, problems))[..., None]
    )


def of_seeds(grids):
    return [{**r, "seed": seed} for seed, grid in enumerate(grids) for r in records(grid)]


def covering(seeds, study, clustered=True, rounds=1000):
    """Share of studies whose interval for a mean of 0.8 covers it; not `clustered`: as if of one training."""
    rng, covered = np.random.default_rng(seeds), 0
    for _ in range(rounds):
        grids = study(rng)
        means, of = grids.mean(2).ravel(), np.repeat(np.arange(seeds), grids.shape[1])
        estimate = stats._estimate(means, grids.shape[2], of if clustered else None)
        covered += estimate.low <= 0.8 <= estimate.high
    return covered / rounds


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", SEEDS.values(), ids=SEEDS)
def test_intervals_over_seeds_cover_what_the_method_reaches(seeds, spread):
    """Whether seeds differ or not; those over problems do so only if they do not."""

    def study(rng):
        return trained(rng, seeds, spread)

    assert 0.93 <= covering(seeds, study) <= 0.97
    over_problems = covering(seeds, study, clustered=False)
    assert over_problems < 0.75 if spread else 0.93 <= over_problems <= 0.97


@pytest.mark.parametrize("seeds", [3, 5])
def test_what_no_seed_has_met_is_in_no_interval(seeds):
    """The limit of few seeds, as the docstring says: one training in five fails by 25 points."""

    def study(rng):
        reached = np.where(rng.random(seeds) < 0.2, 0.6, 0.85)
        return rng.random((seeds, 500, 1)) < reached[:, None, None]

    assert 0.5 < covering(seeds, study) < 0.9


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize("spread", SEEDS.values(), ids=SEEDS)
def test_the_paired_test_over_seeds_finds_what_is_not_there_in_5_percent(seeds, spread):
    """Two methods that are equal on the whole; each training of either comes out a little better or worse."""
    rng, found, over_problems = np.random.default_rng(seeds), 0, 0
    of = np.repeat(np.arange(seeds), 100)
    for _ in range(1000):
        easy, shift = rng.beta(2, 2, size=(seeds, 100)), rng.normal(0, spread, size=(2, seeds, 1))
        a, b = (rng.random((seeds, 100)) < np.clip(easy + each, 0, 1) for each in shift)
        differences = a.astype(float).ravel() - b.ravel()
        test = stats._test(differences, of)
        found += test.p_value < 0.05
        over_problems += stats._test(differences).p_value < 0.05
        assert np.ptp(list(test.by_seed.values())) == 0 or (test.p_value < 0.05) == (not test.low <= 0 <= test.high)
    assert 0.03 <= found / 1000 <= 0.07
    assert over_problems / 1000 > 0.15 if spread else over_problems / 1000 <= 0.07


def test_seeds_are_the_units_where_there_are_several():
    rng = np.random.default_rng(0)
    grids = [rng.random((50, 2)) < p for p in (0.6, 0.7, 0.8)]
    some, means = of_seeds(grids), np.array([grid.mean() for grid in grids])
    estimate = stats.accuracy(some)
    assert (estimate.n_seeds, estimate.n_problems, estimate.samples_per_problem) == (3, 150, 2)
    assert estimate.value == pytest.approx(means.mean())
    assert (estimate.low, estimate.high) == stats._wilson(means.mean(), means.var(ddof=1) / 3, 3, True)
    low, high = stats._student(means)
    base = of_seeds([np.zeros((50, 2), bool)] * 3)
    difference = stats.compare(some, base)
    assert (difference.low, difference.high) == pytest.approx((low, high))
    assert difference.by_seed == pytest.approx(dict(enumerate(means)))
    assert stats.compare(records(grids[0]), records(grids[1])).by_seed.keys() == {0}
    for k, of in ((1, stats.pass_at), (2, stats.maj_at)):
        assert of(some, k).n_seeds == 3
    shifted = [{**r, "seed": r["seed"] + 1} for r in some]
    with pytest.raises(SrlibError, match="different problems .100 in common, of 150 and 150"):
        stats.compare(some, shifted)


def test_seeds_that_are_all_alike():
    """Nothing is known of their variance: the interval is over problems, and p what three equal signs can say."""
    grid = np.array([[1]] * 30 + [[0]] * 20, bool)
    some = of_seeds([grid] * 3)
    one = stats.accuracy(records(np.concatenate([grid] * 3)))
    assert (stats.accuracy(some).low, stats.accuracy(some).high) == pytest.approx((one.low, one.high))
    difference = stats.compare(some, of_seeds([np.zeros((50, 1), bool)] * 3))
    assert difference.p_value == 0.25 and 0 < difference.low < 0.6 < difference.high
    assert stats.accuracy(of_seeds([np.ones((50, 1), bool)] * 3)).low > 0.9


@pytest.mark.parametrize("n", [1, 2, 5, 6, 300, 3000])
def test_p_is_never_0_and_no_interval_a_point(n):
    """All right against all wrong: what the signs alone can say, though every difference is the same."""
    d = stats.compare(records([[1]] * n), records([[0]] * n))
    assert d.p_value == max(2.0 ** (1 - n), stats.LEAST_P) > 0
    assert d.low < d.value == d.high == 1 and (d.low > 0) == (d.p_value < 0.05)
    nearly = stats._test(1 + 1e-15 * np.arange(n))  # equal, but for rounding
    assert nearly.p_value == d.p_value
    assert stats._test(np.r_[np.ones(5000), 1 - 1e-9]).p_value > 0


def test_holm():
    assert comparisons.holm([0.04, 0.01, 0.02, 0.03]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert comparisons.holm([0.5, 0.9]) == [1, 1] and comparisons.holm([0.03]) == [0.03] and comparisons.holm([]) == []
    rng = np.random.default_rng(0)
    p = rng.random((2000, 8))
    p[:, 0] = 1e-6  # one difference is there
    any_false = np.array([[min(row[1:]), min(comparisons.holm(row)[1:])] for row in p]) < 0.05
    plain, corrected = any_false.mean(0)
    assert plain > 0.25 and 0.03 <= corrected <= 0.06
    assert max(comparisons.holm(row)[0] for row in p) < 1e-5


def test_a_table_of_comparisons():
    rng = np.random.default_rng(0)
    base, better = rng.random((2, 3, 100, 1)) < np.array([0.4, 0.8])[:, None, None, None]
    made = {"a": stats.compare(of_seeds(better), of_seeds(base)), "b": stats.compare(of_seeds(base), of_seeds(base))}
    rows = comparisons.table(made).set_index("comparison")
    assert rows["p (Holm)"]["a"] == comparisons.p_text(2 * made["a"].p_value) != rows["p"]["a"]
    assert rows["by seed"]["a"].count("%") == 3 and rows["by seed"]["a"].startswith("0: +") and rows["p"]["b"] == "1"
    assert "by seed" not in comparisons.table({"a": stats.compare(records(better[0]), records(base[0]))})
    assert comparisons.p_text(1e-300) == "< 0.0001" and comparisons.p_text(0.0123) == "0.012"


def test_what_intervals_speak_of_is_said():
    three = of_seeds([[[1]] * 4] * 3)
    assert "about these trained models only" in comparisons.about(records([[1]]))
    assert "about these trained models only" in comparisons.about([r for r in three if r["seed"] == 1])
    told = comparisons.about(three)
    assert told.startswith("3 training seeds") and "2 degrees of freedom" in told and "share problems" in told
    assert "share problems" not in comparisons.about([{**r, "id": f"{r['seed']} {r['id']}"} for r in three])


def test_errors():
    with pytest.raises(SrlibError, match="different problems"):
        stats.compare(records([[1]] * 3), records([[1]] * 4))
    with pytest.raises(SrlibError, match="equally many samples"):
        stats.accuracy([*records([[1, 1]]), {"id": "x", "correct": True}])
    with pytest.raises(SrlibError, match="no records"):
        stats.accuracy([])
