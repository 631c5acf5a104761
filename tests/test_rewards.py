import dataclasses
import math

import pytest

from srlib.cost import latency
from srlib.cost.latency import PairSpeed, Speed
from srlib.engine import Request
from srlib.params import Latency
from srlib.params.training import REWARD_NAMES
from srlib.training import rewards
from srlib.training.rewards import PRESETS, REWARDS, Rollout, Targets

SPEED = PairSpeed(Speed(1.0, 0.1), Speed(10.0, 1.0), handover=2.0)
TARGETS = Targets(SPEED)


def rollout(**changes) -> Rollout:
    base = Rollout("<think>x</think>\\boxed{1}", True, "g", 10, 20, 0, 0, True, 100, 20)
    return dataclasses.replace(base, **changes)


def one(name, **changes):
    return REWARDS[name]([rollout(**changes)], TARGETS)[0]


def test_names():
    assert tuple(REWARDS) == REWARD_NAMES
    assert all(set(weights) <= set(REWARDS) for weights in PRESETS.values())


def test_accuracy():
    assert rewards.accuracy([rollout(), rollout(correct=False)], TARGETS) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "well_formed", "value"),
    [
        ("<think>a</think><answer>1</answer>", True, 2),
        ("<think>a</think><answer>1</answer>", False, 1),
        ("<think>a</think>\\boxed{1}", True, 2),
        ("<think>\na\n</think>\n\nSo it is\n\\[\\boxed{1}\\]\n", False, 1),
        ("<think>\\boxed{1}</think>So it is 1", True, 1),
        ("a", False, 0),
    ],
)
def test_scaffold(text, well_formed, value):
    assert one("scaffold", text=text, well_formed=well_formed) == value


@pytest.mark.parametrize(
    ("tags", "value"),
    [(0, 0), (1, 0), (2, 1), (4, 2), (5, 1), (6, 1), (8, 0), (20, -6)],  # pairs of tags; floor(c / 2) by hand
)
def test_tag_count(tags, value):
    pair = "<bigmodel>x</bigmodel>"
    assert one("tag_count", text=pair * tags) == value
    assert one("tag_count", text="<think></think>\\boxed{}" + pair * tags) == value + 1.5
    assert one("tag_count", text="<bigmodel>") == -2


@pytest.mark.parametrize(("big", "value"), [(0, 0), (10, 0.25), (20, 0.5), (40, 1), (70, 0), (100, -1)])
def test_coverage(big, value):
    assert one("coverage", small_tokens=100 - big, big_tokens=big) == pytest.approx(value)


def test_latency_is_relative_to_the_big_model_alone():
    alone = 10 * 1 + 20 * 10  # reads the prompt, writes all
    assert one("latency") == pytest.approx(-(10 * 0.1 + 20 * 1) / alone)
    with_help = (10 + 2) * 0.1 + 18 * 1 + (10 + 18) * 1 + 2 * 10 + 1 * 2
    assert one("latency", small_tokens=18, big_tokens=2, handovers=1) == pytest.approx(-with_help / alone)
    rising = [one("latency", small_tokens=20 - n, big_tokens=n, handovers=1) for n in range(1, 21)]
    assert rising == sorted(rising, reverse=True)


def test_help_seeking_looks_at_the_group():
    def group(*members):
        made = [rollout(correct=c, small_tokens=20 - b, big_tokens=b) for c, b in members]
        return rewards.help_seeking(made, TARGETS)

    assert group((True, 0), (True, 2), (False, 0), (False, 2)) == [1.5, 0.9, 0.0, 0.0]
    assert group((True, 2), (False, 0), (False, 4)) == [0.9, -1.0, 0.0]
    assert group((False, 0), (False, 2)) == [0.0, 0.1]
    # groups do not mix
    mixed = [rollout(correct=False, group="a"), rollout(big_tokens=2, small_tokens=18, group="b")]
    assert rewards.help_seeking(mixed, TARGETS) == [0.0, 0.9]


def test_overlong():
    assert [one("overlong", tokens=n) for n in (50, 90, 95, 100, 120)] == [0, 0, -0.5, -1, -1]


def test_papers_table():
    pair = latency.pair_speed(Latency())
    # decode alone, 16,384 tokens: 141 against 16 tokens a second
    ratio = pair.alone(0, 16_384) / pair.seconds(0, 16_384, 0, 0)
    assert ratio == pytest.approx(141 / 16)


def test_calibration_measures_and_leaves_no_trace(engines):
    small, big = engines
    pair = latency.pair_speed(
        Latency(source="calibrate", handover_s=0.5), latency.calibrate(small), latency.calibrate(big)
    )
    assert pair.handover == 0.5
    for speed in (pair.small, pair.big):
        assert 0 < speed.prefill < speed.decode < math.inf
    (request,) = small.run(Request(small.open([]), feed=[5, 6], max_new=1))  # all slots are free again
    assert len(request.ids) == 1
