"""Reinforcement (GRPO): the small model learns when offloading pays, from rollouts that really offload.

Rollouts are written by the controller and the engines of `offload`, the very code of
inference: where the small model asks, the big one answers, and the tokens that are not the
small model's own are masked out of the loss. TRL's GRPOTrainer does the rest.

Deviation from the paper (section on reinforcement): there the small model writes between its
tags itself, and latency is only a target share. `rollout: self` is that recipe.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from trl import GRPOConfig, GRPOTrainer
from trl.models import unwrap_model_for_generation

from srlib import SrlibError, engine, spans
from srlib.benchmarks import verdict
from srlib.engine.transformers import TransformersEngine, device_of, dtype_of, load_model
from srlib.latency import PairSpeed, Speed
from srlib.offload import SMALL, Offloader, Trace
from srlib.params import Grpo, ModelSpec, Offload, Params, build, find
from srlib.policies import Learned, Never
from srlib.problems import Problem
from srlib.rewards import REWARDS, Rollout, Targets, weights
from srlib.sft import ready_for_trl, save_adapter, write_adapter
from srlib.traces import load as load_traces


def train(
    tuned: ModelSpec,
    big: TransformersEngine,
    problems: list[Problem],
    config: Grpo,
    offload: Offload,
    speed: PairSpeed,
    seed: int,
    folder: Path,
    rollout_small: ModelSpec | None = None,
) -> list[dict]:
    """Train the adapter of `tuned` further; it goes to `folder/adapter`, sampled completions to `folder/samples.jsonl`.

    A checkpoint that a killed run left in `folder/trainer` is taken up where it ends.

    Args:
        tuned: the small model with the adapter of stage 02.
        big: engine of the big model; never trained.
        speed: the latency model of the reward.
        rollout_small: the small model on vLLM, where it is to write the rollouts.

    Returns:
        the trainer's log, a record a step: `reward`, `offload_share`, and each reward's mean.
    """
    model, tokenizer = load_model(tuned, trainable=True)
    ready_for_trl(model)
    paid = weights(config)
    rollouts = Rollouts(tokenizer, big, problems, config, offload, seed, folder / "samples.jsonl")
    targets = Targets(speed, config.coverage_target)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[_for_trl(name, targets, logs=i == 0) for i, name in enumerate(paid)],
        args=GRPOConfig(
            output_dir=str(folder / "trainer"),
            max_steps=config.max_steps,
            per_device_train_batch_size=config.batch_size // config.processes // config.gradient_accumulation_steps,
            gradient_accumulation_steps=config.gradient_accumulation_steps,  # rollouts are written all at once
            num_generations=config.num_generations,
            learning_rate=config.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=min(5, config.max_steps // 10),
            temperature=config.temperature,
            beta=config.beta,
            loss_type=config.loss_type,
            scale_rewards=config.scale_rewards,
            multi_objective_aggregation=config.aggregation,
            reward_weights=list(paid.values()),
            max_completion_length=offload.max_tokens,
            gradient_checkpointing=config.gradient_checkpointing,
            bf16=dtype_of(tuned) == torch.bfloat16,
            use_cpu=device_of(tuned) == "cpu",
            logging_steps=1,
            save_steps=config.save_steps,
            save_total_limit=1,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=seed,
        ),
        train_dataset=Dataset.from_list([{"prompt": problem.prompt} for problem in problems]),
        processing_class=tokenizer,
        rollout_func=rollouts,
        callbacks=[_Progress()],
    )
    if rollout_small is not None:
        # In the place of TRL's own vLLM: TRL has it synchronised before each batch of rollouts, and corrects the
        # loss for what is sampled there with slightly other probabilities.
        rollouts.vllm = _Synchronised(trainer, rollout_small, rollouts.offload.slots, folder / "rollouts")
        trainer.use_vllm, trainer.vllm_generation, trainer._last_loaded_step = True, rollouts.vllm, -1
    trainer.remove_callback(PrinterCallback)
    found = {int(each.name.rpartition("-")[2]): each for each in (folder / "trainer").glob("checkpoint-*")}
    whole = [step for step, each in found.items() if (each / TRAINER_STATE_NAME).is_file()]  # written last
    step = max(whole, default=0)
    checkpoint = str(found[step]) if step else None
    trainer.accelerator.wait_for_everyone()  # until all have looked
    if trainer.accelerator.is_main_process:
        rollouts.forget_from(step)
        for broken in found.keys() - set(whole):
            shutil.rmtree(found[broken])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")  # at every checkpoint
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if rollouts.vllm is not None:
                rollouts.vllm.close()
    log = [record for record in trainer.state.log_history if "reward" in record]
    if trainer.accelerator.is_main_process:
        save_adapter(trainer, folder)
        (folder / "log.json").write_text(json.dumps(log, indent=1))
    return log


def run(p: Params, speed: PairSpeed, folder: Path) -> list[dict]:
    """`train` as the params ask for it, in this process."""
    big = engine.load(p.big, p.rollout_slots) if p.grpo.rollout == "true_offload" else None
    tasks, _ = load_traces(p.traces, p.grpo.n_problems, p.seed, worked=False)
    small = p.rollout_small if p.grpo.use_vllm else None
    return train(p.tuned, big, tasks, p.grpo, p.offload, speed, p.seed, folder, small)


def launch(p: Params, speed: PairSpeed, folder: Path) -> list[dict]:
    """`run` in `grpo.processes` processes; their screen is streamed to this one.

    Each process writes and trains on its part of every batch. On GPUs they start under
    `accelerate launch`, with the configuration `grpo.accelerate_config` (DeepSpeed, FSDP) if one
    is named; on a CPU under torchrun, which accelerate takes up in the same way.

    Raises:
        SrlibError: a process failed; what it said stands above.
    """
    job = folder / "job.json"
    job.write_text(json.dumps({"params": p.model_dump(), "speed": asdict(speed), "folder": str(folder)}))
    processes = p.grpo.processes
    environment = {**os.environ, "OMP_NUM_THREADS": str(p.threads or 1)}
    if device_of(p.small) == "cpu":  # accelerate's own launcher would ask for MPI there
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment["ACCELERATE_USE_CPU"] = "true"
    else:
        command = [sys.executable, "-m", "accelerate.commands.launch", f"--num_processes={processes}"]
        config = p.grpo.accelerate_config
        command.append(f"--config_file={find(config)}" if config else "--multi_gpu")
    command += ["-m", "srlib.grpo", str(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            # newline="": a progress bar's carriage returns are kept as they are
            for line in io.TextIOWrapper(process.stdout, newline="", errors="replace"):
                print(line, end="", flush=True)
        except BaseException:  # an interrupted cell leaves nothing running
            process.terminate()
            raise
    if process.returncode:
        raise SrlibError(f"grpo: the training in {processes} processes failed, with status {process.returncode}.")
    job.unlink()
    return json.loads((folder / "log.json").read_text())


def _work(job: Path) -> None:
    """What each process of `launch` does."""
    given = json.loads(job.read_text())
    p = build(given["params"], str(job))
    if p.threads:
        torch.set_num_threads(p.threads)
    set_seed(p.seed)
    speed = PairSpeed(**{**given["speed"], **{side: Speed(**given["speed"][side]) for side in ("small", "big")}})
    PartialState()  # makes this process's GPU the current one, on which models are loaded
    run(p, speed, Path(given["folder"]))


class Rollouts:
    """TRL's `rollout_func`: a prompt in, a trace by two models out."""

    def __init__(
        self, tokenizer, big, problems: list[Problem], config: Grpo, offload: Offload, seed: int, samples: Path
    ):
        self.tokenizer, self.big, self.config = tokenizer, big, config
        self.offload = offload.model_copy(update={"batch_size": config.rollouts_at_once or offload.batch_size})
        self.problems = {problem.prompt: problem for problem in problems}
        self.seed, self.samples = seed, samples
        self.vllm: _Synchronised | None = None  # writes the small model's part; None: the model that is trained does

    def forget_from(self, step: int) -> None:
        """Drop samples of `step` and later: a run taken up from a checkpoint writes them again."""
        kept = self.samples.read_text(encoding="utf-8").splitlines(True) if self.samples.is_file() else []
        self.samples.write_text("".join(line for line in kept if json.loads(line)["step"] < step), encoding="utf-8")

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        step = trainer.state.global_step
        if self.vllm is not None:
            traces = self.write(self.vllm.engine, prompts, step)
        else:
            traces = self.write_with(trainer, prompts, step)
        rollouts = [self.rollout(prompt, trace) for prompt, trace in zip(prompts, traces)]
        if trainer.accelerator.is_main_process and step % self.config.sample_every == 0:
            with self.samples.open("a", encoding="utf-8") as file:
                for r in rollouts[: self.config.num_generations]:
                    file.write(
                        json.dumps({"step": step, "text": r.text, "correct": r.correct, "share": r.share}) + "\n"
                    )
        return {**self.columns(traces), "rollout": rollouts}

    def write_with(self, trainer: GRPOTrainer, prompts: list[str], step: int) -> list[Trace]:
        """`write` with the model that is trained, as it is now."""
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            training = model.training
            model.eval()
            small = TransformersEngine(model, self.tokenizer, slots=min(len(prompts), self.offload.slots))
            traces = self.write(small, prompts, step)
            model.train(training)
        return traces

    def columns(self, traces: list[Trace]) -> dict[str, list]:
        """What TRL trains on: in each row ids, log-probabilities and mask run in parallel."""
        own = [[owner == SMALL for owner in trace.owners] for trace in traces]
        return {
            "prompt_ids": [trace.prompt_ids for trace in traces],
            "completion_ids": [trace.ids for trace in traces],
            "logprobs": [[p if o else float("nan") for p, o in zip(t.logprobs, os)] for t, os in zip(traces, own)],
            "env_mask": [[int(o) for o in os] for os in own],
        }

    def write(self, small, prompts: list[str], step: int) -> list[Trace]:
        """One trace a prompt, with the current weights; the seed moves on with the step."""
        alone = self.config.rollout == "self"
        settings = self.offload.settings
        settings["big_temperature"] = settings["temperature"]  # the big model answers as it will at inference
        settings["temperature"], settings["top_p"] = self.config.temperature, 1.0
        writer = Offloader(
            small,
            None if alone else self.big,
            Never() if alone else Learned(),
            seed=self.seed * 1_000_003 + step,
            **settings,
        )
        traces = writer.run(prompts)
        writer.raise_if_failed(traces)
        return traces

    def rollout(self, prompt: str, trace: Trace) -> Rollout:
        """The counts that rewards are made of; with `rollout: self`, what the small model asks for counts as big."""
        text = self.tokenizer.decode(trace.ids, skip_special_tokens=True)
        plain = spans.inside(trace.ids, trace.tags)
        return Rollout(
            text=text,
            correct=verdict(spans.strip(text), self.problems[prompt], self.offload.hint).correct,
            group=prompt,
            prompt_tokens=len(trace.prompt_ids),
            small_tokens=len(plain) - sum(plain),
            big_tokens=sum(plain),
            handovers=len(spans.parse(trace.ids, trace.tags)),
            well_formed=not trace.malformed,
            max_tokens=self.offload.max_tokens,
            tokens=len(trace.ids),
        )


class _Synchronised:
    """The small model on vLLM, which takes on what has been trained before each batch of rollouts.

    The adapter is merged into the weights on disk, as for inference, and vLLM reads them from there: some seconds
    for a model of 1.5B. A server reads them once for all training processes.
    """

    def __init__(self, trainer: GRPOTrainer, spec: ModelSpec, slots: int, folder: Path) -> None:
        self.trainer, self.spec, self.slots, self.folder = trainer, spec, slots, folder
        self.engine = None

    def sync_weights(self) -> None:
        """Called by TRL."""
        from srlib.engine import vllm

        accelerator, merged = self.trainer.accelerator, self.folder / "merged"
        first = accelerator.is_main_process
        if first:
            write_adapter(self.trainer, self.folder)
            vllm.merge(self.spec.model_copy(update={"adapter": str(self.folder)}))
        accelerator.wait_for_everyone()
        if self.engine is None:
            device = self.spec.device
            if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
                device = str(accelerator.device)
            own = {"path": str(merged), "adapter": None, "device": device}
            self.engine = engine.load(self.spec.model_copy(update=own), self.slots)
            if not self.spec.url:
                return
        if first or not self.spec.url:
            self.engine.reload(merged)
        accelerator.wait_for_everyone()

    def close(self) -> None:
        """End vLLM and drop the merged weights."""
        if self.engine is not None:
            self.engine.shutdown()
        if self.trainer.accelerator.is_main_process:
            shutil.rmtree(self.folder, ignore_errors=True)


def _for_trl(name: str, targets: Targets, logs: bool):
    """A reward as TRL calls it; one of them also `logs` the mean offload share, whatever rewards are paid."""

    def reward(prompts, completions, rollout, log_metric, **kwargs) -> list[float]:
        if logs:
            log_metric("offload_share", sum(r.share for r in rollout) / len(rollout))
        return REWARDS[name](rollout, targets)

    reward.__name__ = name
    return reward


class _Progress(TrainerCallback):
    """One bar, with reward, accuracy and offload share of the last step."""

    def on_train_begin(self, args, state, control, **kwargs):
        here = state.is_world_process_zero
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="grpo", unit="step", mininterval=1, disable=not here
        )

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "reward" in logs:
            shown = {"reward": "reward", "accuracy": "rewards/accuracy/mean", "share": "offload_share"}
            self.bar.set_postfix(
                {name: f"{logs[key]:.3f}" for name, key in shown.items() if key in logs}, refresh=False
            )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


if __name__ == "__main__":
    _work(Path(sys.argv[1]))
