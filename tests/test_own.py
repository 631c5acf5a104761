"""Functions and classes of one's own, named in the params by the file they stand in."""

import math
from itertools import islice

import pytest

from srlib import SrlibError, params
from srlib.annotation import annotators
from srlib.data import arith
from srlib.decoding import policies
from srlib.params import Arith
from srlib.run.manifest import fingerprint
from srlib.run.stages import STAGES, needed, require
from srlib.training import rewards
from srlib.training.rewards import Rollout

SOME = [Rollout("", True, "g", 10, tokens, 0, 0, True, 100, tokens) for tokens in (0, 25)]


@pytest.fixture
def file(tmp_path):
    """Writes the file of one's own; its path."""

    def write(text):
        path = tmp_path / "mine.py"
        path.write_text(text)
        return str(path)

    return write


def paid_by(name, **changes):
    return params.load("params/smoke.yaml", **{"grpo.reward_weights": {name: 0.5}, **changes})


def test_a_reward_of_a_file_is_paid(file):
    name = f"{file('def brief(rollouts, targets): return [r.tokens for r in rollouts]')}:brief"
    p = paid_by(name)
    require(p, "03_grpo", list(STAGES))
    assert rewards.weights(p.grpo) == {"accuracy": 1.0, "latency": 0.25, name: 0.5}
    assert rewards.pay(name, SOME, None) == [0.0, 25.0]


def test_an_edit_makes_the_stage_another(file, tmp_path):
    name = f"{file('def brief(rollouts, targets): return [1] * len(rollouts)')}:brief"
    p = paid_by(name, outputs=str(tmp_path))
    before = {stage: fingerprint(p, stage) for stage in ("02_sft", "03_grpo", "05_evaluate")}
    assert before == {stage: fingerprint(p, stage) for stage in before}
    file("def brief(rollouts, targets): return [2] * len(rollouts)")
    after = {stage: fingerprint(p, stage) for stage in before}
    assert [stage for stage in before if before[stage] != after[stage]] == ["03_grpo"]
    assert rewards.pay(name, SOME, None) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        (None, "brief", r"there is no file .*mine.py; its path is seen from here or from the clone"),
        ("def other(rollouts, targets): ...", "brief", r"there is no brief in .*mine.py"),
        ("import nothing_of_this_name", "brief", r"its file fails with ModuleNotFoundError"),
        ("def brief(rollouts): ...", "brief", r"takes \(rollouts\); it has to take \(rollouts, targets\)"),
        ("brief = 3", "brief", r"is 3, which is no function"),
    ],
)
def test_what_cannot_be_paid_is_told_before_any_work(file, tmp_path, text, name, message):
    path = file(text) if text else tmp_path / "mine.py"
    with pytest.raises(SrlibError, match=message):
        require(paid_by(f"{path}:{name}"), "03_grpo", list(STAGES))


@pytest.mark.parametrize(
    ("gives", "message"),
    [
        ("[1.0]", "gave 1 numbers for 2 rollouts"),
        ("[0.0, float('nan')]", "gave nan, which is no finite number"),
        ("None", "gave None, which is no list of numbers"),
    ],
)
def test_what_a_reward_gives_is_looked_at(file, gives, message):
    path = file(f"def brief(rollouts, targets): return {gives}")
    with pytest.raises(SrlibError, match=message):
        rewards.pay(f"{path}:brief", SOME, None)


def test_a_reward_is_registered_in_a_notebook(monkeypatch):
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    monkeypatch.setattr(params.training, "REGISTERED", set())
    with pytest.raises(SrlibError, match="unknown key 'short'"):
        paid_by("short")

    @rewards.register
    def short(rollouts, targets):
        return [math.exp(-r.tokens) for r in rollouts]

    assert rewards.weights(paid_by("short").grpo)["short"] == 0.5 and rewards.pay("short", SOME, None)[0] == 1.0
    with pytest.raises(SrlibError, match="it has to take"):
        rewards.register(lambda rollouts: [])
    del rewards.REWARDS["short"]  # as in another process
    with pytest.raises(SrlibError, match="name it by its file, as path.py:short"):
        rewards.pay("short", SOME, None)


POLICY = """
from dataclasses import dataclass
from srlib.decoding.policies import Policy

@dataclass(frozen=True)
class Turns(Policy):
    tags = {tags}
    name: str = "{name}"

    def write(self, writer):
        yield from writer.big_writes(writer.left)
"""


def test_a_policy_of_a_file(file):
    name = f"{file(POLICY.format(tags=False, name='turns'))}:Turns"
    p = params.load("params/smoke.yaml", **{"evaluate.policies": ["small", name]})
    assert policies.named(name).name == "turns" and p.evaluate.policies[1] == name
    assert "adapter" not in needed(p, "05_evaluate")
    file(POLICY.format(tags=True, name="turns"))
    assert "adapter" in needed(p, "05_evaluate")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POLICY.format(tags=False, name="learned"), "has the name 'learned'; give it one of its own"),
        (POLICY.format(tags=False, name="a/b"), "has the name 'a/b'"),
        ("class Turns: ...", "it has to be a subclass of srlib.decoding.policies.Policy"),
        ("from srlib.decoding.policies import Random as Turns", "cannot be made: .*share"),
    ],
)
def test_what_is_no_policy(file, text, message):
    p = params.load("params/smoke.yaml", **{"evaluate.policies": ["small", f"{file(text)}:Turns"]})
    with pytest.raises(SrlibError, match=message):
        require(p, "05_evaluate", list(STAGES))


ANNOTATOR = """
import re

def products(problems, small, big):
    for problem in problems:
        yield [{span} for found in re.finditer(r"[*][0-9]+=([0-9]+)", problem.worked)]
"""


def test_an_annotator_of_a_file(file, tmp_path, engines):
    asked = list(islice(arith.generate(Arith(), "traces", 0), 6))
    name = f"{file(ANNOTATOR.format(span='found.span(1)'))}:products"
    p = params.load("params/smoke.yaml", **{"annotate.method": name, "annotate.max_share": 1.0})
    assert p.annotate.engines == ("small", "big")
    require(p, "01_annotate", list(STAGES))
    rows, report = annotators.run(p, tmp_path, asked, *engines)
    assert {row.id: row.spans for row in rows} == {
        problem.id: found for problem in asked if (found := arith.hard_spans(problem.trace))
    }
    assert {row.annotator for row in rows} == {name} == {report["annotator"]}
    file(ANNOTATOR.format(span="(0, 999)"))
    with pytest.raises(SrlibError, match=r"marks \(0, 999\) in the trace of problem traces-"):
        annotators.run(p, tmp_path, asked, *engines)
    file("def products(problems, small, big): return []")
    with pytest.raises(SrlibError, match="gave spans of 0 traces, and was given 6"):
        annotators.run(p, tmp_path, asked, *engines)
    file("def products(problems): return []")
    with pytest.raises(SrlibError, match="it has to take"):
        require(p, "01_annotate", list(STAGES))


def test_a_name_that_is_neither_known_nor_in_a_file():
    with pytest.raises(SrlibError, match="evaluate.policies.0 is 'mine.py': input should be"):
        params.load("params/smoke.yaml", **{"evaluate.policies": ["mine.py"]})
