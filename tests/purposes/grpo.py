"""The section `grpo`: what TRL's trainer does with it, in two steps on two random models."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from itertools import groupby, islice
from pathlib import Path

import pytest
import torch

from srlib import engine
from srlib.cost import latency
from srlib.data import arith
from srlib.data.rows import write_json, write_jsonl
from srlib.engine.models import load_model
from srlib.engine.transformers import TransformersEngine
from srlib.engine.vllm.arguments import arguments
from srlib.params import Arith, Latency, ModelSpec, Params
from srlib.training import grpo, launch, rollouts
from srlib.training.rewards import PRESETS, REWARDS, Rollout
from tests.conftest import random_model
from tests.purposes import Case, once, shows
from tests.test_grpo import make_tuned
from tests.test_trainer import written

SPEED = latency.pair_speed(Latency())
BASE = {
    "grpo.batch_size": 16,
    "grpo.learning_rate": 1e-2,
    "offload.max_tokens": 20,
    "offload.span_budget": 3,
}


@dataclass
class Part:
    """A part of a step: what TRL trains on, and what comes of it."""

    lr: float
    advantages: torch.Tensor  # (B,)
    mask: torch.Tensor  # (B, T) of the tokens that count
    loss: float = 0.0
    without_kl: float = 0.0
    forwards: int = 0  # of the first layer


@dataclass
class Trained:
    """A training, as it was seen from within."""

    folder: Path
    trainer: grpo.GRPOTrainer | None = None
    log: list[dict] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    steps: list[dict] = field(default_factory=list)  # what the rollouts of each step gave TRL
    engines: list = field(default_factory=list)  # that wrote the small model's part of each
    looks: list = field(default_factory=list)  # the same of each look
    asked: list[list[str]] = field(default_factory=list)  # the prompts of each of both
    saved: list[int] = field(default_factory=list)  # the steps of the checkpoints
    vllm: list = field(default_factory=list)  # the specs of what was to be loaded on vLLM

    @property
    def rollouts(self) -> list[list[Rollout]]:
        return [step["rollout"] for step in self.steps]


class OnVllm(TransformersEngine):
    """In the place of vLLM's engine."""

    def reload(self, folder: Path) -> None:
        self.model.load_state_dict(load_model(ModelSpec(path=str(folder)))[0].state_dict())

    def shutdown(self) -> None:
        pass


DONE: dict[str, Trained] = {}


def models(case: Case) -> dict[str, str]:
    """The pair, its adapter and its problems, as settings."""

    def fill(folder: Path) -> None:
        make_tuned(folder)
        random_model(len(arith.tokenizer()), 2).save_pretrained(folder / "big")
        arith.tokenizer().save_pretrained(folder / "big")
        every = [*islice(arith.generate(Arith(min_steps=1, max_steps=2), "traces", 0), 160)]
        for name, n in (("problems", 16), ("many", 160)):
            write_jsonl(folder / f"{name}.jsonl", every[:n])

    folder = case.fixture("once")("grpo_purposes", fill)
    return {
        "pair.small.path": str(folder / "small"),
        "pair.big.path": str(folder / "big"),
        "pair.tuned.path": str(folder / "small"),
        "pair.tuned.adapter": str(folder / "adapter"),
        "data.traces": str(folder / "problems.jsonl"),
    }


def params(case: Case, **changes) -> Params:
    return case.params({**BASE, **models(case), **{f"grpo.{name}": value for name, value in changes.items()}})


def looking(case: Case, **changes) -> Trained:
    """`trained` on a set that has problems to look at, too."""
    paths = models(case)
    paths["data.traces"] = paths["data.traces"].replace("problems", "many")
    p = case.params({**BASE, **paths, **{f"grpo.{name}": value for name, value in changes.items()}})
    return once(DONE, p, lambda patch: _trained(p, case.folder, patch))


def trained(case: Case, **changes) -> Trained:
    """`grpo.run` with these settings; one that was made with the same before is looked at again."""
    p = params(case, **changes)
    return once(DONE, p, lambda patch: _trained(p, case.folder, patch))


def _trained(p: Params, folder: Path, patch: pytest.MonkeyPatch) -> Trained:
    seen = Trained(folder)
    load = engine.load
    passes: list[int] = []  # through the first layer, for the loss and its gradient

    class Trainer(grpo._Trainer):
        def training_step(self, *arguments, **named):
            layer = self.model.get_base_model().get_decoder().layers[0]
            handle = layer.register_forward_pre_hook(lambda *a: passes.append(1))
            try:
                return super().training_step(*arguments, **named)
            finally:
                handle.remove()
                seen.parts[-1].forwards = len(passes)

        def _compute_loss(self, model, inputs):
            mask = inputs["completion_mask"] * inputs["tool_mask"]
            seen.parts.append(Part(self.optimizer.param_groups[0]["lr"], inputs["advantages"], mask))
            seen.trainer = self
            if beta := self.beta:
                self.beta = 0.0
                with torch.no_grad():
                    seen.parts[-1].without_kl = float(super()._compute_loss(model, inputs))
                self.beta = beta
            passes.clear()
            loss = super()._compute_loss(model, inputs)
            seen.parts[-1].loss = loss.item()
            return loss

        def _save_checkpoint(self, *arguments, **named):
            seen.saved.append(self.state.global_step)
            return super()._save_checkpoint(*arguments, **named)

    class Spy(rollouts.Rollouts):
        def __call__(self, numbers, trainer):
            seen.steps.append({**super().__call__(numbers, trainer), "numbers": numbers})
            return {name: values for name, values in seen.steps[-1].items() if name != "numbers"}

        def write(self, small, prompts, step, greedy=False):
            (seen.looks if greedy else seen.engines).append(small)
            seen.asked.append(prompts)
            return super().write(small, prompts, step, greedy)

    def loading(spec, slots=64):
        if spec.engine != "vllm":
            return load(spec, slots)
        seen.vllm.append(spec)
        return OnVllm(*load_model(spec), slots)

    patch.setattr(grpo, "_Trainer", Trainer)
    patch.setattr(grpo, "Rollouts", Spy)
    patch.setattr(engine, "load", loading)
    seen.log = grpo.run(p, folder, SPEED)
    return seen


def groups(seen: Trained, step: int = 0) -> list[int]:
    """How many rollouts in a row are of one problem."""
    return [len(list(same)) for _, same in groupby(seen.steps[step]["numbers"])]


def reward(seen: Trained, name: str, members: int = 4) -> torch.Tensor:
    """(G, N) a reward of the first step's rollouts, a row a group."""
    return torch.tensor(REWARDS[name](seen.rollouts[0], grpo.Targets(SPEED))).view(-1, members)


def in_order(advantages: torch.Tensor) -> list[float]:
    """TRL shuffles the rollouts of a step."""
    return sorted(advantages.flatten().tolist())


@shows("grpo.rollout")
def who_answers(case: Case) -> None:
    seen = trained(case, rollout="self")
    assert any(rollout.big_tokens for rollout in seen.rollouts[0]), "it asks"
    assert all(all(mask) for step in seen.steps for mask in step["env_mask"])


@shows("grpo.preset")
def ready_made_weights(case: Case) -> None:
    seen = trained(case, preset="paper")
    assert dict(zip(seen.trainer.reward_func_names, seen.trainer.reward_weights.tolist())) == PRESETS["paper"]


@shows("grpo.reward_weights")
def weights_of_rewards(case: Case) -> None:
    seen = trained(case, reward_weights={"latency": 2.0, "tag_count": 0.5})
    total = reward(seen, "accuracy") + 2 * reward(seen, "latency") + 0.5 * reward(seen, "tag_count")
    assert seen.log[0]["reward"] == pytest.approx(total.mean().item(), abs=1e-4)


@shows("grpo.coverage_target")
def highest_coverage(case: Case) -> None:
    seen = trained(case, coverage_target=0.1, reward_weights={"coverage": 1.0})
    worth = [r.share / 0.1 if r.share <= 0.1 else 1 - 2 * (r.share - 0.1) / 0.9 for r in seen.rollouts[0]]
    assert seen.log[0]["rewards/coverage/mean"] == pytest.approx(sum(worth) / len(worth), abs=1e-4)


@shows("grpo.aggregation")
def each_reward_by_itself(case: Case) -> None:
    how = {"aggregation": "normalize_then_sum", "scale_rewards": "group"}
    seen = trained(case, **how, reward_weights={"coverage": 1.0})
    alone = [reward(seen, name) for name in ("accuracy", "latency", "coverage")]
    each = [(r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True) + 1e-4) for r in alone]
    total = each[0] + 0.25 * each[1] + each[2]
    assert in_order(seen.parts[0].advantages) == pytest.approx(in_order(total / total.std()), abs=1e-3)


@shows("grpo.n_problems")
def problems_that_are_tried(case: Case) -> None:
    assert len({number for step in trained(case, n_problems=5).steps for number in step["numbers"]}) <= 5


@shows("grpo.max_steps")
def steps_of_training(case: Case) -> None:
    assert len(trained(case, max_steps=1).log) == 1


@shows("grpo.batch_size")
def rollouts_of_a_step(case: Case) -> None:
    seen = trained(case, batch_size=24)
    assert [len(step["numbers"]) for step in seen.steps] == [len(part.advantages) for part in seen.parts] == [24, 24]


@shows("grpo.num_generations")
def rollouts_of_a_problem(case: Case) -> None:
    seen = trained(case, num_generations=8, preset="relay")
    assert groups(seen) == [8, 8]
    total = reward(seen, "help_seeking", 8)
    by_hand = total - total.mean(1, keepdim=True)
    assert in_order(seen.parts[0].advantages) == pytest.approx(in_order(by_hand), abs=1e-5)


@shows("grpo.gradient_accumulation_steps")
def parts_of_a_step(case: Case) -> None:
    seen = trained(case, gradient_accumulation_steps=4)
    assert [len(part.advantages) for part in seen.parts] == [4] * 8 and len(seen.log) == 2
    assert [len(step["numbers"]) for step in seen.steps] == [16, 16], "a batch is all the same written at once"


@shows("grpo.gradient_checkpointing")
def forward_passes_again(case: Case) -> None:
    assert {part.forwards for part in trained(case, gradient_checkpointing=True).parts} == {2}


@shows("grpo.rollouts_at_once")
def rollouts_under_way(case: Case) -> None:
    assert {small.slots for small in trained(case, rollouts_at_once=3).engines} == {3}


@shows("grpo.use_vllm")
def vllm_writes_the_small_part(case: Case) -> None:
    seen = trained(case, use_vllm=True)
    assert {type(small) for small in seen.engines} == {OnVllm} and len(seen.engines) == len(seen.log) == 2


@shows("grpo.vllm_url")
def server_of_the_small_model(case: Case) -> None:
    seen = trained(case, use_vllm=True, vllm_url="http://127.0.0.1:8000")
    assert [str(spec.url) for spec in seen.vllm] == ["http://127.0.0.1:8000"]


@shows("grpo.vllm_kv_cache_gb")
def cache_of_the_small_model(case: Case) -> None:
    (spec,) = trained(case, use_vllm=True, vllm_kv_cache_gb=0.5).vllm
    path = models(case)["pair.small.path"]
    assert arguments(spec, path, 4, cpu=False, lora=None).get("kv_cache_memory_bytes") == 2**29


def launched(patch: pytest.MonkeyPatch, run: Callable, processes: int, p: Params, folder: Path) -> list[str]:
    """The command that starts the training processes."""
    commands = []

    class Process:
        stdout, returncode = BytesIO(), 0

        def __init__(self, command, **named):
            commands.append(command)

        __enter__, __exit__ = (lambda self: self), (lambda self, *error: None)

    patch.setattr(launch.subprocess, "Popen", Process)
    write_json(folder / "log.json", [])
    launch.launch(run, processes, p, folder)
    return commands[0]


@shows("grpo.processes")
def processes_that_train(case: Case) -> None:
    p = params(case, processes=2)
    given = grpo._arguments(p.tuned, p.grpo, p.offload, 0, case.folder)
    assert given.per_device_train_batch_size == 8, "each has its part of the batch"
    with pytest.MonkeyPatch.context() as patch:
        assert "--nproc_per_node=2" in launched(patch, grpo.run, p.grpo.processes, p, case.folder)


@shows("grpo.learning_rate")
def highest_learning_rate(case: Case) -> None:
    rates = [part.lr for part in trained(case, learning_rate=0.5, max_steps=10).parts]
    assert rates == pytest.approx([0.25, *(0.5 * (10 - step) / 9 for step in range(1, 10))])


@shows("grpo.temperature")
def how_boldly_it_tries(case: Case) -> None:
    seen = trained(case, temperature=0.001)
    texts = [rollout.text for rollout in seen.rollouts[0]]
    assert [len(set(texts[at : at + 4])) for at in range(0, 16, 4)] == [1, 1, 1, 1]


@shows("grpo.beta")
def held_to_where_it_began(case: Case) -> None:
    seen = trained(case, beta=0.7)
    kl = [record.get("kl") for record in seen.log]
    assert kl[0] == pytest.approx(0, abs=1e-6) and kl[1] > 1e-3, "to the policy of stage 02, which it leaves"
    assert [part.loss - part.without_kl for part in seen.parts] == pytest.approx(
        [0.7 * value for value in kl], abs=1e-3
    )


@shows("grpo.loss_type")
def average_of_losses(case: Case) -> None:
    first = trained(case, loss_type="dr_grpo", reward_weights={"coverage": 1.0}).parts[0]
    by_hand = -(first.advantages * first.mask.sum(1)).sum() / (16 * 20)
    assert first.loss == pytest.approx(float(by_hand), abs=1e-5) and abs(first.loss) > 1e-3


@shows("grpo.scale_rewards")
def divisor_of_advantages(case: Case) -> None:
    seen = trained(case, scale_rewards="group", reward_weights={"coverage": 1.0})
    total = reward(seen, "accuracy") + 0.25 * reward(seen, "latency") + reward(seen, "coverage")
    by_hand = (total - total.mean(1, keepdim=True)) / (total.std(1, keepdim=True) + 1e-4)
    assert in_order(seen.parts[0].advantages) == pytest.approx(in_order(by_hand), abs=1e-3)


@shows("grpo.eval_steps")
def steps_between_looks(case: Case) -> None:
    seen = looking(case, eval_steps=2, max_steps=5)
    assert [record["step"] for record in seen.log if "eval_reward" in record] == [2, 4, 5]
    assert len(seen.looks) == 3


@shows("grpo.n_validation")
def problems_of_a_look(case: Case) -> None:
    seen = looking(case, n_validation=3, eval_steps=2)
    asked = {len(prompts) for prompts in seen.asked}
    assert asked == {16, 3} and not {*seen.asked[0]} & {*seen.asked[-1]}


@shows("grpo.save_steps")
def steps_between_checkpoints(case: Case) -> None:
    assert trained(case, save_steps=2).saved == [2]


@shows("grpo.report_to")
def tracker_that_is_told(case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        told = written(patch)
        trained(case, report_to="tensorboard")
    assert "train/reward" in told.scalars


@shows("grpo.trainer")
def more_arguments_of_grpo(case: Case) -> None:
    assert trained(case, trainer={"weight_decay": 0.25}).trainer.optimizer.param_groups[0]["weight_decay"] == 0.25


@shows("grpo.sample_every")
def steps_between_samples(case: Case) -> None:
    samples = trained(case, sample_every=1).folder / "samples.jsonl"
    assert {json.loads(line)["step"] for line in samples.read_text().splitlines()} == {0, 1}


@shows("grpo.credit_waiting")
def decisions_to_wait(case: Case) -> None:
    """Without it, what the big model wrote counts for nothing, wherever it stands."""
    seen = trained(case, credit_waiting=False)
    for step in seen.steps:
        for mask, logprobs in zip(step["env_mask"], step["logprobs"]):
            assert mask == [int(p == p) for p in logprobs]  # nan where it is not the small model's own
