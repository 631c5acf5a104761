import numpy as np
import pytest

from srlib import SrlibError, arith, evaluate
from srlib.policies import Learned
from srlib.params import Arith, Offload


def records(grid):
    """grid: (problems, samples) of 0 and 1."""
    return [{"id": f"{i:04d}", "correct": bool(x)} for i, row in enumerate(grid) for x in row]


def test_interval_of_single_samples_is_wilsons():
    from scipy.stats import binomtest

    estimate = evaluate.accuracy(records([[1]] * 70 + [[0]] * 30))
    wanted = binomtest(70, 100).proportion_ci(method="wilson")
    assert estimate.value == 0.7
    assert (estimate.low, estimate.high) == pytest.approx((wanted.low, wanted.high), abs=2e-3)
    assert (estimate.n_problems, estimate.samples_per_problem) == (100, 1)


def test_interval_of_all_right_is_not_a_point():
    estimate = evaluate.accuracy(records([[1, 1]] * 50))
    assert 0.9 < estimate.low < 1 and estimate.high == pytest.approx(1)


def test_interval_is_clustered_by_problem():
    """Samples that agree within a problem add nothing, samples that do not add much."""
    agree = evaluate.accuracy(records([[1] * 8] * 30 + [[0] * 8] * 30))
    single = evaluate.accuracy(records([[1]] * 30 + [[0]] * 30))
    differ = evaluate.accuracy(records([[1, 0] * 4] * 29 + [[1] * 8] + [[0] * 8] + [[1, 0] * 4] * 29))
    assert agree.high - agree.low == pytest.approx(single.high - single.low, rel=0.03)
    assert differ.high - differ.low < 0.3 * (single.high - single.low)


def test_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        p = rng.beta(2, 2, size=60)
        estimate = evaluate.accuracy(records(rng.random((60, 4)) < p[:, None]))
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.92 <= covered / 400 <= 0.975


def test_paired_comparison():
    rng = np.random.default_rng(0)
    base = rng.random(300) < 0.5
    better = base | (rng.random(300) < 0.1)
    difference = evaluate.compare(records(better[:, None]), records(base[:, None]))
    assert difference.value == pytest.approx(better.mean() - base.mean())
    assert difference.low > 0 and difference.p_value < 0.001
    same = evaluate.compare(records(base[:, None]), records(base[:, None]))
    assert (same.value, same.low, same.high, same.p_value) == (0, 0, 0, 1)
    unpaired = evaluate.accuracy(records(better[:, None]))
    assert difference.high - difference.low < unpaired.high - unpaired.low


def test_errors():
    with pytest.raises(SrlibError, match="different problems"):
        evaluate.compare(records([[1]] * 3), records([[1]] * 4))
    with pytest.raises(SrlibError, match="equally many samples"):
        evaluate.accuracy(records([[1, 1], [1]]))
    with pytest.raises(SrlibError, match="no records"):
        evaluate.accuracy([])


def test_a_row_of_results(engines):
    from itertools import islice

    problems = list(islice(arith.generate(Arith(), "test", 0), 10))
    config = Offload(max_tokens=20, temperature=1.0)
    row, kept = evaluate.run(*engines, Learned(), problems, config, dataset="arith", samples=3)
    assert len(kept) == 30
    assert (row["n_problems"], row["samples_per_problem"], row["max_tokens"]) == (10, 3, 20)
    assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    assert len({r["text"] for r in kept if r["id"] == problems[0].id}) > 1  # three samples, three seeds
    assert row["offload_share"] == sum(r["big_tokens"] for r in kept) / sum(
        r["big_tokens"] + r["small_tokens"] for r in kept
    )
    assert all(len(r["owners"]) <= 20 for r in kept)
    assert row["truncated_share"] == sum(r["finish"] != "eos" for r in kept) / 30
