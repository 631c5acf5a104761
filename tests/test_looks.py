"""Looks while GRPO trains: what is seen, that training goes on as without, and that the best is kept, killed or not."""

import itertools
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file

from srlib import SrlibError, engine
from srlib.data import arith
from srlib.data.rows import write_jsonl
from srlib.decoding.policies import Learned
from srlib.decoding.scheduler import Offloader
from srlib.params import Arith, Params
from srlib.training import grpo, looks, rollouts
from srlib.training.rewards import latency
from tests.purposes.grpo import OnVllm
from tests.test_grpo import CONFIG, OFFLOAD, SPEED, big, killed, tuned  # noqa: F401  (fixtures)

LOOKING = CONFIG.model_copy(update={"eval_steps": 1, "max_steps": 4, "save_steps": 2, "preset": "paper"})
TRAINED, HELD = "reward", "eval_reward"


@pytest.fixture(scope="module")
def problems():
    return list(islice(arith.generate(Arith(min_steps=1, max_steps=2), "traces", 0), 14))


@pytest.fixture
def train(tuned, big, problems):  # noqa: F811
    def training(folder, config=LOOKING, validation=problems[8:], **more):
        return grpo.train(tuned, big, problems[:8], config, OFFLOAD, SPEED, 0, folder, validation=validation, **more)

    return training


class Adapters:
    """What looks come to, by step, and the adapter of each."""

    def __init__(self, monkeypatch, values):
        self.values, self.held, self.steps = values, {}, {}
        look, seen = looks.Looks.look, self

        def spying(self, trainer):
            step = trainer.state.global_step
            self.reward = lambda rollouts: seen.values[step]
            named = trainer.model.named_parameters()
            seen.held[step] = {name: each.detach().clone() for name, each in named if each.requires_grad}
            return look(self, trainer)

        monkeypatch.setattr(looks.Looks, "look", spying)

    def step_of(self, folder):
        """Whose adapter lies in a folder."""
        saved = load_file(folder / "adapter" / "adapter_model.safetensors")
        (step,) = [
            step
            for step, held in self.held.items()
            if all(
                torch.equal(value, saved[name.replace(".default", "")])
                for name, value in held.items()
                if "lora" in name
            )
        ]
        return step


def kept(log):
    return [record["step"] for record in log if record.get("kept")]


def test_training_goes_on_as_without_looks(train, tmp_path, monkeypatch):
    """To the bit: what it is told of each step, and the adapter, where the last is the best."""
    spied = Adapters(monkeypatch, {1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0})
    with_looks, without = train(tmp_path / "a"), train(tmp_path / "b", LOOKING.model_copy(update={"eval_steps": 0}))
    same = ("step", "reward", "loss", "grad_norm", "entropy", "offload_share")
    assert [[r[name] for name in same] for r in with_looks if TRAINED in r] == [
        [r[name] for name in same] for r in without
    ]
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert kept(with_looks) == [spied.step_of(tmp_path / "a")] == [4]


def test_a_look_is_what_the_policy_writes_greedily(train, tuned, big, problems, tmp_path):  # noqa: F811
    offload = OFFLOAD.model_copy(update={"temperature": 0.9})
    config = LOOKING.model_copy(
        update={"max_steps": 1, "reward_weights": {"latency": 1.0}, "preset": "offload", "learning_rate": 1e-4}
    )
    seen = grpo.train(tuned, big, problems[:8], config, offload, SPEED, 0, tmp_path, validation=problems[8:])[-1]
    small = engine.load(tuned.model_copy(update={"adapter": str(tmp_path / "adapter")}), 8)
    func = rollouts.Rollouts(small.tokenizer, big, problems, config, OFFLOAD, 0, None)
    settings = OFFLOAD.settings | {"temperature": 0.0}
    traces = Offloader(small, big, Learned(), **settings).run([problem.prompt for problem in problems[8:]])
    made = [func.rollout(str(i), *each) for i, each in enumerate(zip(problems[8:], traces))]
    accuracy = sum(each.correct for each in made) / 6
    assert seen["eval_accuracy"] == accuracy
    assert seen["eval_offload_share"] == pytest.approx(sum(each.share for each in made) / 6)
    assert seen["eval_reward"] == pytest.approx(accuracy + sum(latency(made, grpo.Targets(SPEED))) / 6)
    assert any(each.big_tokens for each in made) and list(seen) == ["step", *looks.SEEN, "kept"]


def test_the_first_of_the_best_is_kept(train, tmp_path, monkeypatch):
    spied = Adapters(monkeypatch, {1: -2.0, 2: -1.0, 3: -1.0, 4: -3.0})
    log = train(tmp_path)
    assert kept(log) == [spied.step_of(tmp_path)] == [2]
    assert [record["step"] for record in log if HELD in record] == [1, 2, 3, 4]
    assert sorted(f.name for f in tmp_path.iterdir()) == ["adapter", "log.json", "samples.jsonl"]


@pytest.mark.parametrize(("lost", "best"), [(0.1, 1), (5.0, 1), (0.1, 4)])
def test_a_killed_training_keeps_the_best_of_before(train, tmp_path, monkeypatch, killed, lost, best):  # noqa: F811
    """Killed twice behind the checkpoint of step 2; what was best there, and what comes later, counts, and no more."""

    spied = Adapters(monkeypatch, {1: 0.9, 2: 0.2, 3: lost, 4: 0.5 if best == 1 else 1.0})
    for _ in range(2):
        with killed(3):
            train(tmp_path)
    spied.values[3] = 0.3
    log = train(tmp_path)
    assert [record["step"] for record in log if HELD in record] == [1, 2, 3, 4]
    assert kept(log) == [spied.step_of(tmp_path)] == [best]


def test_a_training_that_is_killed_behind_its_last_step_keeps_the_best(train, tmp_path, monkeypatch, killed):  # noqa: F811
    spied = Adapters(monkeypatch, {1: 0.0, 2: 0.0, 3: 1.0, 4: 0.0})
    with killed(None):
        train(tmp_path)
    assert kept(train(tmp_path)) == [spied.step_of(tmp_path)] == [3]


def test_vllm_takes_on_the_weights_before_a_look(train, tuned, tmp_path, monkeypatch):  # noqa: F811
    """Those of the step, once: its rollouts are written with the same."""
    load, synchronise, steps, same = engine.load, rollouts.Synchronised.sync_weights, [], []
    monkeypatch.setattr(
        engine,
        "load",
        lambda spec, slots=64: OnVllm(*grpo.load_model(spec), slots) if spec.engine == "vllm" else load(spec),
    )

    def synchronising(self):
        steps.append(self.trainer.state.global_step)
        synchronise(self)

    class Spy(rollouts.Rollouts):
        @torch.no_grad()
        def look(self, trainer, problems):
            given = super().look(trainer, problems)
            ids = torch.tensor([[5, 6, 7, 8]])
            same.append(torch.allclose(self.vllm.engine.model(ids).logits, trainer.model(ids).logits, atol=1e-4))
            return given

    monkeypatch.setattr(rollouts.Synchronised, "sync_weights", synchronising)
    monkeypatch.setattr(grpo, "Rollouts", Spy)
    log = train(
        tmp_path, LOOKING.model_copy(update={"max_steps": 2}), rollout_small=tuned.model_copy(update={"engine": "vllm"})
    )
    assert steps == [0, 1, 2] and same == [True, True]
    assert [record["step"] for record in log if HELD in record] == [1, 2]


def test_no_problem_is_trained_on_and_looked_at(problems, tmp_path):
    path = str(write_jsonl(tmp_path / "problems.jsonl", problems))
    update = {"batch_size": 8, "num_generations": 4, "n_problems": 8, "n_validation": 6, "eval_steps": 1}
    p = Params(run="run", data={"traces": path}, grpo=update)
    taken = grpo.load_traces(p, 8)
    held = grpo.held_out(p, taken)
    assert {each.id for each in taken} | {each.id for each in held} == {each.id for each in problems}
    twice = [each.model_copy(update={"id": f"{each.id}-{i}"}) for i, each in itertools.product(range(2), problems[:7])]
    write_jsonl(tmp_path / "problems.jsonl", twice)
    with pytest.raises(SrlibError, match="n_validation is 6, but of 14 problems only . are others .* lower it"):
        grpo.held_out(p, grpo.load_traces(p, 8))


def test_a_look_wants_problems(train, tmp_path):
    with pytest.raises(SrlibError, match="eval_steps is 1, and there are no problems to look at"):
        train(tmp_path, validation=[])
