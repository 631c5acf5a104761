"""Baselines get their best settings: thresholds that give a share, and problems to train on that choose them."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlib.data import arith
from srlib.decoding.scheduler import Offloader
from srlib.engine.transformers import TransformersEngine
from srlib.evaluation import completions, stats, tuning
from srlib.params import Arith, Offload
from tests.conftest import random_model

CONFIG = Offload(max_tokens=40, batch_size=16)
traces = st.lists(st.lists(st.floats(0, 1, width=16), min_size=1, max_size=30), min_size=1, max_size=6)


@pytest.fixture(scope="module")
def asked():
    return [
        problem.model_copy(update={"answer": str(i % 3)})
        for i, problem in enumerate(islice(arith.generate(Arith(), "train", 0), 30))
    ]


def by_hand(each, threshold, chunk):
    """Owners of a trace that is what the small model reads: True is the big model's."""
    owners = []
    while len(owners) < len(each):
        owners += [True] * chunk if each[len(owners)] > threshold else [False]
    return owners[: len(each)]


@given(traces, st.floats(-0.1, 1), st.integers(1, 5))
def test_the_share_of_a_threshold(doubts, threshold, chunk):
    owners = [owner for each in doubts for owner in by_hand(each, threshold, chunk)]
    found = tuning._share([np.array(each) for each in doubts], threshold, chunk)
    assert found == pytest.approx(sum(owners) / len(owners))


@given(traces, st.floats(0, 1))
def test_no_lower_threshold_keeps_to_the_share(doubts, share):
    arrays = [np.array(each) for each in doubts]
    chosen = tuning._threshold(arrays, 1, share)
    assert tuning._share(arrays, chosen, 1) <= share
    lower = [value for each in doubts for value in each if value < chosen]
    assert not lower or tuning._share(arrays, max(lower), 1) > share


def test_each_baseline_has_the_share_that_is_asked(engines, asked):
    found = tuning.tune(*engines, 0.2, ["entropy", "margin", "confidence"], [1, 3], asked, CONFIG)
    assert sorted((x.policy.name, x.policy.chunk) for x in found) == [
        (measure, chunk) for measure in ("confidence", "entropy", "margin") for chunk in (1, 3)
    ]
    accuracies = [x.accuracy.value for x in found]
    assert accuracies == sorted(accuracies, reverse=True)
    for x in found:
        assert x.share == pytest.approx(0.2, abs=0.04), x.policy
        _, records = completions.run(*engines, x.policy, asked, CONFIG, dataset="")
        assert (stats.share(records), stats.accuracy(records)) == (x.share, x.accuracy)
        assert x.row()["n_problems"] == len(asked)
    more = tuning.tune(*engines, 0.5, ["margin"], [2], asked, CONFIG)
    assert more[0].share == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("name", ["glimpse", "specreason"])
def test_a_policy_by_step_has_the_share_that_is_asked(name, tokenizer, asked):
    loud = tuple(tokenizer.convert_tokens_to_ids([";", "<|endoftext|>"]))
    two = [TransformersEngine(random_model(len(tokenizer), seed, loud=loud), tokenizer, slots=16) for seed in (7, 8)]
    (found,) = tuning.tune(*two, 0.3, [name], [1, 3], asked, CONFIG)
    assert found.policy.name == name and found.policy.ends == tuple(CONFIG.step_ends)
    assert found.share == pytest.approx(0.3, abs=0.08)
    assert found.row()["policy"] == name and found.row()["chunk"] is None


def test_what_came_of_a_threshold_corrects_the_next(engines, asked, monkeypatch):
    """The traces that are written with a threshold are others than those it was first set by."""
    tried, real = [], completions.run

    def run(*args, **how):
        row, records = real(*args, **how)
        tried.append((args[2].threshold, stats.share(records)))
        return row, records

    monkeypatch.setattr(completions, "run", run)
    (found,) = tuning.tune(*engines, 0.3, ["entropy"], [4], asked, CONFIG)
    assert len(tried) == tuning.TRIES and len({threshold for threshold, _ in tried}) > 1
    assert abs(found.share - 0.3) == min(abs(share - 0.3) for _, share in tried) < abs(tried[0][1] - 0.3)


def test_the_same_again(engines, asked):
    once, again = (tuning.tune(*engines, 0.2, ["margin"], [2], asked[:8], CONFIG, seed=1) for _ in range(2))
    assert once == again
    assert Offloader(*engines, once[0].policy, **CONFIG.settings).run([x.prompt for x in asked[:2]])
