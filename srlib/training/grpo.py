"""Reinforcement (GRPO): the small model learns when offloading pays, from rollouts that really offload.

Rollouts are written by the controller and the engines of `offload`, the very code of
inference: where the small model asks, the big one answers, and the tokens that are not the
small model's own are masked out of the loss. TRL's GRPOTrainer does the rest.

Deviation from the paper (section on reinforcement): there the small model writes between its
tags itself, and latency is only a target share. `rollout: self` is that recipe.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from trl import GRPOConfig, GRPOTrainer

from srlib import SrlibError, engine
from srlib.cost.latency import PairSpeed
from srlib.data.problems import traces as load_traces
from srlib.data.rows import Problem
from srlib.engine.adapters import embedding_rows, pieces_of_tags, ready_for_trl
from srlib.engine.models import device_of, load_model
from srlib.engine.protocol import Engine
from srlib.params import Grpo, ModelSpec, Offload, Params
from srlib.training.credit import Credited, unknown_logits
from srlib.training.launch import on_one_device
from srlib.training.looks import Looking, Looks, told
from srlib.training.rewards import Rollout, Targets, pay, weights
from srlib.training.rollouts import Rollouts, Synchronised
from srlib.training.trainer import (
    NoStepAtZero,
    check_tracker,
    configured,
    fit,
    lora,
    precision,
    run_name,
    save,
    step_of,
    taken_up,
)

# Inside of TRL: the adapter that the KL is measured with, and what has vLLM synchronised before each batch of rollouts.
REFERENCE = "ref"
TAKEN_OVER = ("use_vllm", "vllm_generation", "sync_weights", "_last_loaded_step")


class _Trainer(NoStepAtZero, Credited, Looking):
    pass


def train(
    tuned: ModelSpec,
    big: Engine | None,
    problems: list[Problem],
    config: Grpo,
    offload: Offload,
    speed: PairSpeed,
    seed: int,
    folder: Path,
    rollout_small: ModelSpec | None = None,
    fresh: LoraConfig | None = None,
    validation: Sequence[Problem] = (),
) -> list[dict]:
    """Train the adapter of `tuned` further; it goes to `folder/adapter`, sampled completions to `folder/samples.jsonl`.

    Where `tuned` has none, as all its weights were trained, a fresh one is laid on it, with the rows of the tags.

    A checkpoint that a killed run left in `folder/trainer` is taken up where it ends.

    Args:
        tuned: the small model as stage 02 has left it.
        big: engine of the big model; never trained. None: `rollout` is self.
        speed: the latency model of the reward.
        rollout_small: the small model on vLLM, where it is to write the rollouts.
        fresh: the adapter to lay on `tuned`, where it has none.
        validation: problems of the looks, where `config` asks for some; the adapter is then that of the best.

    Returns:
        the trainer's log, a record a step: `reward`, `offload_share`, and each reward's mean. Behind them a record a look:
        `step`, `eval_reward`, `eval_accuracy`, `eval_offload_share`, and whether its adapter is the one that is `kept`.

    Raises:
        SrlibError: there are fewer problems than a step has rollouts of, none to look at, or going on cannot be credited
            with this model.
    """
    if config.eval_steps and not validation:
        raise SrlibError(f"grpo.eval_steps is {config.eval_steps}, and there are no problems to look at: give some.")
    groups = config.batch_size // config.num_generations
    if len(problems) < groups:  # of which TRL would train no step, and say nothing
        raise SrlibError(
            f"A step of grpo has rollouts of {groups} problems, and there are {len(problems)}: give more, or lower "
            f"grpo.batch_size to {len(problems) * config.num_generations}."
        )
    model, tokenizer = load_model(tuned, trainable=True)
    if tuned.adapter is None:
        assert fresh is not None, "a tuned model without an adapter needs one"
        fresh.trainable_token_indices = embedding_rows(model, pieces_of_tags(tokenizer))
        set_seed(seed)  # one of its matrices is drawn, the other begins at 0: it changes nothing yet
        model = get_peft_model(model, fresh)
    paid = weights(config)
    rollouts = Rollouts(tokenizer, big, problems, config, offload, seed, folder / "samples.jsonl", tuned.context)
    if rollouts.decides and (more := unknown_logits(model)):
        if config.credit_waiting:
            raise SrlibError(
                f"{tuned.path} has {more} behind its output layer, and what such a model decides at the big one's tokens "
                "cannot be told; set grpo.credit_waiting: false, and its tokens alone are reinforced."
            )
        rollouts.decides = None
    targets = Targets(speed, config.coverage_target)
    args = _arguments(tuned, config, offload, seed, folder)
    on_one_device(args, model.device)
    trainer = _Trainer(
        model=model,
        reward_funcs=[_for_trl(name, targets, logs=i == 0) for i, name in enumerate(paid)],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": str(number)} for number in range(len(problems))]),
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[_Progress()],
    )
    _check_privates(trainer)
    trainer.closes_as = rollouts.decides
    if config.eval_steps:
        where = folder / "trainer"
        trainer.looks = Looks(rollouts, list(validation), _paid(paid, targets), config.eval_steps, where)
        trainer.add_callback(trainer.looks)
    ready_for_trl(trainer.model)
    # TRL may have rounded the one, and its copy for the KL lacks the tags' rows; those of a fresh one are the model's
    for adapter in trainer.model.peft_config if tuned.adapter else ():
        trainer.model.load_adapter(tuned.adapter, adapter)
    if rollout_small is not None:
        # In the place of TRL's own vLLM: TRL has it synchronised before each batch of rollouts, and corrects the
        # loss for what is sampled there with slightly other probabilities.
        rollouts.vllm = Synchronised(trainer, rollout_small, rollouts.offload.slots, folder / "rollouts")
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, rollouts.vllm, -1
    trainer.remove_callback(PrinterCallback)
    checkpoint = taken_up(trainer)
    if trainer.accelerator.is_main_process:
        rollouts.forget_from(step_of(checkpoint))
        if trainer.looks is not None:
            trainer.looks.take_up(checkpoint)
        if checkpoint:  # where it lies beside the adapter, the Trainer takes up the reference alone
            shutil.rmtree(checkpoint / REFERENCE, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    try:
        fit(trainer, folder, checkpoint)
    finally:
        if rollouts.vllm is not None:
            rollouts.vllm.close()
    log = [record for record in trainer.state.log_history if "reward" in record]
    if trainer.looks is not None:
        log += told(trainer.state.log_history)
        trainer.looks.put_back(trainer)
    save(trainer, log, folder)
    return log


def _check_privates(trainer: GRPOTrainer) -> None:
    """See to it that the installed TRL has inside what is used and set here.

    Raises:
        SrlibError: it is another version.
    """
    needed = {"rollout_func", *TAKEN_OVER}
    absent = sorted(needed.difference(trainer._generate.__code__.co_names))
    if trainer.beta and REFERENCE not in trainer.model.peft_config:
        absent.append(f"adapter {REFERENCE}")
    if absent:
        raise SrlibError(
            f"TRL {trl.__version__} has no {absent[0]} in its GRPOTrainer, which this version of srlib relies on: install "
            f"TRL as pyproject.toml pins it, with pip install -e ."
        )


def _arguments(tuned: ModelSpec, config: Grpo, offload: Offload, seed: int, folder: Path) -> GRPOConfig:
    """What TRL is told."""
    return configured(
        GRPOConfig,
        "grpo.trainer",
        config.trainer,
        output_dir=str(folder / "trainer"),
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size // config.processes // config.gradient_accumulation_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,  # rollouts are written all at once
        num_generations=config.num_generations,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=1 + min(5, config.max_steps // 10),  # see `NoStepAtZero`
        temperature=config.temperature,
        beta=config.beta,
        loss_type=config.loss_type,
        scale_rewards=config.scale_rewards,
        multi_objective_aggregation=config.aggregation,
        reward_weights=list(weights(config).values()),
        max_completion_length=offload.max_tokens,
        gradient_checkpointing=config.gradient_checkpointing,
        **precision(tuned),
        use_cpu=device_of(tuned) == "cpu",
        logging_steps=1,
        save_steps=config.save_steps,
        save_strategy="steps",
        save_total_limit=1,
        save_only_model=False,  # else none could be taken up
        report_to=config.report_to,
        run_name=run_name(folder),
        use_vllm=False,  # the rollouts are srlib's own
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )


def check(p: Params) -> None:
    """Check all that is passed on to TRL and a tracker, on the CPU and without a model.

    Raises:
        SrlibError: they refuse it, or the tracker is not installed.
    """
    check_tracker(p.grpo.report_to, "grpo.report_to")
    _arguments(p.tuned.model_copy(update={"device": "cpu"}), p.grpo, p.offload, p.seed, p.where("03_grpo"))


def run(p: Params, folder: Path, speed: PairSpeed) -> list[dict]:
    """`train` as the params ask for it, in this process."""
    tasks = load_traces(p, p.grpo.n_problems)
    held = held_out(p, tasks) if p.grpo.eval_steps else []
    big = engine.load(p.big, p.rollout_slots) if p.grpo.rollout == "true_offload" else None
    small = p.rollout_small if p.grpo.use_vllm else None
    fresh = None if p.tuned.adapter else lora(p.sft.lora_rank, p.sft.lora_alpha, p.sft.lora, {})
    return train(p.tuned, big, tasks, p.grpo, p.offload, speed, p.seed, folder, small, fresh, held)


def held_out(p: Params, taken: list[Problem]) -> list[Problem]:
    """`grpo.n_validation` problems, none of those `taken` to train on, which are the same as without looks.

    Raises:
        SrlibError: there are not so many.
    """
    n, asked = p.grpo.n_validation, {problem.prompt for problem in taken}
    drawn = load_traces(p, len(taken) + n, seed=p.seed + 1)
    others = [problem for problem in drawn if problem.prompt not in asked]
    if len(others) < n:
        raise SrlibError(
            f"grpo.n_validation is {n}, but of {len(drawn)} problems only {len(others)} are others than those trained on: "
            "lower it, or grpo.n_problems."
        )
    return others[:n]


def _paid(paid: dict[str, float], targets: Targets) -> Callable[[list[Rollout]], float]:
    """The mean of the weighted rewards of some rollouts."""

    def reward(rollouts: list[Rollout]) -> float:
        return sum(weight * sum(pay(name, rollouts, targets)) for name, weight in paid.items()) / len(rollouts)

    return reward


def _for_trl(name: str, targets: Targets, logs: bool) -> Callable[..., list[float]]:
    """A reward as TRL calls it; one of them also `logs` the mean offload share, whatever rewards are paid."""

    def reward(
        prompts: list[Any],
        completions: list[Any],
        rollout: Sequence[Rollout],
        log_metric: Callable[[str, float], None],
        **kwargs: Any,
    ) -> list[float]:
        if logs:
            log_metric("offload_share", sum(r.share for r in rollout) / len(rollout))
        return pay(name, rollout, targets)

    reward.__name__ = name
    return reward


class _Progress(TrainerCallback):
    """One bar, with reward, accuracy and offload share of the last step."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        here = state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="grpo", unit="step", mininterval=1, disable=not here
        )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "reward" in logs:
            shown = {"reward": "reward", "accuracy": "rewards/accuracy/mean", "share": "offload_share"}
            self.bar.set_postfix(
                {name: f"{logs[key]:.3f}" for name, key in shown.items() if key in logs}, refresh=False
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
