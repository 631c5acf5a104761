"""Rollouts: TRL asks with prompts, two models answer with traces."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, cast

from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from srlib import engine
from srlib.data import prompts, spans
from srlib.data.grade import verdict
from srlib.data.rows import Problem, whole
from srlib.data.spans import Tags
from srlib.decoding.policies import Learned, Never
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import SMALL, Trace
from srlib.engine.adapters import rows_in_place, write_adapter
from srlib.engine.protocol import Engine
from srlib.engine.transformers import TransformersEngine
from srlib.params.decoding import Offload
from srlib.params.models import ModelSpec
from srlib.params.training import Grpo
from srlib.training.credit import went_on
from srlib.training.rewards import Rollout

if TYPE_CHECKING:
    from srlib.engine.vllm.engine import VllmEngine


class Rollouts:
    """TRL's `rollout_func`: a prompt in, a trace by two models out.

    Args:
        samples: file in which some of the traces are kept.
        context: tokens of the longest sequence of the small model; None: its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        big: Engine | None,
        problems: list[Problem],
        config: Grpo,
        offload: Offload,
        seed: int,
        samples: Path,
        context: int | None = None,
    ) -> None:
        self.tokenizer, self.big, self.config, self.context = tokenizer, big, config, context
        self.offload = offload.model_copy(update={"batch_size": config.rollouts_at_once or offload.batch_size})
        self.problems = problems
        self.seed, self.samples = seed, samples
        tags = Tags.of(tokenizer)
        # Of rollouts in which the small model decides when to take control back, token by token.
        self.decides = tags if config.rollout == "true_offload" and len(tags.close) == 1 else None
        self.vllm: Synchronised | None = None  # writes the small model's part; None: the model that is trained does

    def forget_from(self, step: int) -> None:
        """Drop samples of `step` and later: a run taken up from a checkpoint writes them again."""
        kept = self.samples.read_bytes().splitlines(True) if self.samples.is_file() else []
        with whole(self.samples) as file:
            file.writelines(line.decode() for line in kept if _step(line) < step)

    def __call__(self, numbers: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's prompts are the numbers of problems: two of them may ask the same and have different answers."""
        step = trainer.state.global_step
        problems = [self.problems[int(number)] for number in numbers]
        traces = self.written(trainer, [problem.prompt for problem in problems], step)
        rollouts = [self.rollout(*each) for each in zip(numbers, problems, traces)]
        if trainer.accelerator.is_main_process and step % self.config.sample_every == 0:
            with self.samples.open("a", encoding="utf-8") as file:
                for r in rollouts[: self.config.num_generations]:
                    file.write(
                        json.dumps({"step": step, "text": r.text, "correct": r.correct, "share": r.share}) + "\n"
                    )
        return {**self.columns(traces), "rollout": rollouts}

    def look(self, trainer: GRPOTrainer, problems: list[Problem]) -> list[Rollout]:
        """What the policy writes for `problems` as it stands, greedily; each process writes its share, and has them all."""
        step, processes = trainer.state.global_step, trainer.accelerator.num_processes
        if self.vllm is not None and trainer._last_loaded_step != step:  # as TRL does before rollouts
            self.vllm.sync_weights()
            trainer._last_loaded_step = step
        share = list(enumerate(problems))[trainer.accelerator.process_index :: processes]
        traces = self.written(trainer, [problem.prompt for _, problem in share], step, greedy=True) if share else []
        made = [self.rollout(str(number), problem, trace) for (number, problem), trace in zip(share, traces)]
        return sorted(gather_object(made), key=lambda each: int(each.group))

    def written(self, trainer: GRPOTrainer, prompts: list[str], step: int, greedy: bool = False) -> list[Trace]:
        """`write`, by vLLM or by the model that is trained, as it is now."""
        if self.vllm is not None:
            return self.write(self.vllm.engine, prompts, step, greedy)
        with unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator) as model:
            training = model.training
            model.eval()
            at_once = min(self.offload.slots, self.config.batch_size // self.config.processes)
            slots = min(len(prompts), at_once)
            small = TransformersEngine(model, self.tokenizer, slots, self.context)
            with rows_in_place(model):
                traces = self.write(small, prompts, step, greedy)
            model.train(training)
        return traces

    def columns(self, traces: list[Trace]) -> dict[str, list]:
        """What TRL trains on: in each row ids, log-probabilities and mask run in parallel."""
        own = [[owner == SMALL for owner in trace.owners] for trace in traces]
        learned = own  # from: what is the small model's own, and its decisions
        if self.decides and self.config.credit_waiting:
            learned = [[o or waited for o, waited in zip(os, went_on(t))] for t, os in zip(traces, own)]
        return {
            "prompt_ids": [trace.prompt_ids for trace in traces],
            "completion_ids": [trace.ids for trace in traces],
            "logprobs": [[p if o else float("nan") for p, o in zip(t.logprobs, os)] for t, os in zip(traces, own)],
            "env_mask": [[int(each) for each in row] for row in learned],
        }

    def write(self, small: Engine | None, prompts: list[str], step: int, greedy: bool = False) -> list[Trace]:
        """One trace a prompt, with the current weights; the seed moves on with the step. Greedy: both models are."""
        alone = self.config.rollout == "self"
        settings = self.offload.settings
        # The big model answers as it will at inference; the small one draws from all tokens, as TRL takes for granted.
        settings["big_sampling"] = (settings["temperature"], settings["top_p"], settings["top_k"])
        settings.update(temperature=self.config.temperature, top_p=1.0, top_k=0)
        if greedy:
            settings.update(temperature=0.0, big_sampling=None)
        writer = Offloader(
            small,
            self.big,
            Never() if alone else Learned(),
            seed=self.seed * 1_000_003 + step,
            **settings,
        )
        traces = writer.run(prompts)
        writer.raise_if_failed(traces)
        return traces

    def rollout(self, group: str, problem: Problem, trace: Trace) -> Rollout:
        """The counts that rewards are made of; with `rollout: self`, what the small model asks for counts as big."""
        text = prompts.with_opening(self.tokenizer, self.tokenizer.decode(trace.ids, skip_special_tokens=True))
        plain = spans.inside(trace.ids, trace.tags)
        return Rollout(
            text=text,
            correct=verdict(spans.strip(text), problem, self.offload.hint).correct,
            group=group,
            prompt_tokens=len(trace.prompt_ids),
            small_tokens=len(plain) - sum(plain),
            big_tokens=sum(plain),
            handovers=len(spans.parse(trace.ids, trace.tags)),
            well_formed=not trace.malformed,
            max_tokens=self.offload.max_tokens,
            tokens=len(trace.ids),
        )


def _step(line: bytes) -> float:
    """The step of a line of `samples.jsonl`; of one that is torn or damaged, one that is never reached."""
    try:
        return int(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, TypeError, KeyError):
        return math.inf


class Synchronised:
    """The small model on vLLM, which takes on what has been trained before each batch of rollouts.

    The adapter is merged into the weights on disk, as for inference, and vLLM reads them from there: some seconds
    for a model of 1.5B. A server reads them once for all training processes.
    """

    def __init__(self, trainer: GRPOTrainer, spec: ModelSpec, slots: int, folder: Path) -> None:
        self.trainer, self.spec, self.slots, self.folder = trainer, spec, slots, folder
        self.engine: VllmEngine | None = None

    def sync_weights(self) -> None:
        """Called by TRL."""
        from srlib.engine import adapters

        accelerator, merged = self.trainer.accelerator, self.folder / "merged"
        first = accelerator.is_main_process
        if first:
            write_adapter(self.trainer, self.folder)
            adapters.merge(self.spec.model_copy(update={"adapter": str(self.folder)}))
        accelerator.wait_for_everyone()
        if self.engine is None:
            own = {"path": str(merged), "adapter": None, "revision": None}
            self.engine = cast("VllmEngine", engine.load(self.spec.model_copy(update=own), self.slots))
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
