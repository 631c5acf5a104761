"""Looks: every so many steps the policy as it stands writes problems that it is not trained on, and the best is kept.

A look is written as rollouts are, by the same engines and controller, but greedily, and draws nothing: training goes on
as if there had been none. Best is what has the highest mean of the weighted rewards, so by what is trained for: accuracy
alone would choose a policy that asks for everything. Of equals the earliest is kept.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from trl import GRPOTrainer

from srlib.data.rows import Problem
from srlib.engine.adapters import write_adapter
from srlib.engine.files import saving
from srlib.training.rewards import Rollout
from srlib.training.rollouts import Rollouts

SEEN = ("eval_reward", "eval_accuracy", "eval_offload_share")
REWARD = SEEN[0]


class Looking(GRPOTrainer):
    """A trainer that looks; `looks` is set by who makes it, None: it does not."""

    looks: Looks | None = None
    control: TrainerControl

    def evaluate(self, *arguments: Any, **named: Any) -> dict[str, float]:
        """Called by transformers where a look is due; returns its record, once it is logged."""
        assert self.looks is not None
        record = self.looks.look(self)
        Trainer.log(self, record)  # TRL's would add what it holds of rollouts
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, record)
        return record

    def _save_checkpoint(self, *arguments: Any, **named: Any) -> None:
        if self.looks is not None and self.accelerator.is_main_process:
            self.looks.keep_in(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(*arguments, **named)


class Looks(TrainerCallback):
    """When to look, what is seen, and the best adapter so far, in `folder/best`.

    A checkpoint holds a copy of it, and the records: a run that was killed goes on with what was best there.

    Args:
        problems: those to look at.
        reward: the weighted sum of a list of rollouts' rewards, in the mean.
        every: steps between looks.
        folder: the trainer's own.
    """

    def __init__(
        self,
        rollouts: Rollouts,
        problems: list[Problem],
        reward: Callable[[list[Rollout]], float],
        every: int,
        folder: Path,
    ) -> None:
        self.rollouts, self.problems, self.reward, self.every = rollouts, problems, reward, every
        self.best = folder / "best"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.every == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True

    def look(self, trainer: GRPOTrainer) -> dict[str, float]:
        """What is seen: `eval_reward`, `eval_accuracy` and `eval_offload_share`; the adapter is kept if it is the best."""
        made = self.rollouts.look(trainer, self.problems)
        accuracy, share = (sum(values) / len(made) for values in zip(*((r.correct, r.share) for r in made)))
        seen = dict(zip(SEEN, (self.reward(made), accuracy, share)))
        before = [record[REWARD] for record in trainer.state.log_history if REWARD in record]
        if seen[REWARD] > max(before, default=-math.inf) and trainer.accelerator.is_main_process:
            shutil.rmtree(self.best, ignore_errors=True)
            write_adapter(trainer, self.best)
        return seen

    def keep_in(self, checkpoint: Path) -> None:
        """Copy the best so far into a checkpoint, deeper than where transformers looks for adapters."""
        if self.best.is_dir():
            with saving(checkpoint):
                shutil.copytree(self.best, _kept(checkpoint), dirs_exist_ok=True)

    def take_up(self, checkpoint: Path | None) -> None:
        """The best is that of a checkpoint, or none: what came later is written again."""
        shutil.rmtree(self.best, ignore_errors=True)
        if checkpoint and _kept(checkpoint).is_dir():
            with saving(self.best):
                shutil.copytree(_kept(checkpoint), self.best)

    def put_back(self, trainer: GRPOTrainer) -> None:
        """Give the model of the trainer the best adapter."""
        if self.best.is_dir():
            trainer.model.load_adapter(self.best, "default")


def told(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The looks in a trainer's log, each with whether its adapter is the one that is `kept`."""
    seen = [record for record in history if REWARD in record]
    best = max(seen, key=lambda record: record[REWARD], default=None)  # of equals the first
    return [{key: record[key] for key in ("step", *SEEN)} | {"kept": record is best} for record in seen]


def _kept(checkpoint: Path) -> Path:
    return checkpoint / "looks" / "best"
