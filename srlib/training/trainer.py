"""What both trainings share: their arguments, a schedule, a tracker, and a run that is taken up where it was killed."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from peft import LoraConfig, PeftModel
from pydantic import ConfigDict, ValidationError, create_model
from transformers import Trainer, TrainerState
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks
from transformers.trainer import TRAINER_STATE_NAME

from srlib import SrlibError
from srlib.data.rows import read_json, write_json
from srlib.engine.adapters import write_adapter, write_model
from srlib.engine.models import dtype_of
from srlib.params.models import ModelSpec
from srlib.params.names import unknown

Config = TypeVar("Config")


class NoStepAtZero(Trainer):
    """A trainer whose schedule begins and ends one step further in: at its ends, where it is 0, nothing is trained.

    Its `warmup_steps` are one more than the steps whose learning rate is below the highest.
    """

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As transformers makes it, for one step more, and with the first behind it."""
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # before an optimizer's
            scheduler.step()
        return scheduler


def configured(kind: type[Config], setting: str, more: dict[str, Any], /, **own: Any) -> Config:
    """A library's configuration: of what srlib decides, its `own`, and what a setting adds to it.

    Args:
        kind: SFTConfig, GRPOConfig or LoraConfig.
        setting: its dotted name.
        more: what it holds: arguments of `kind`.

    Raises:
        SrlibError: `more` holds an argument that `kind` has not or that srlib sets itself, or a value that `kind` does
            not take.
    """
    hints = get_type_hints(kind)
    for key in more:
        if key not in hints:
            raise SrlibError(f"{setting}: {unknown(key, [*hints])} (of {kind.__name__})")
        if key in own:
            raise SrlibError(f"{setting} holds {key}, which srlib sets itself; leave it away.")
    strict = ConfigDict(arbitrary_types_allowed=True, protected_namespaces=())
    checked = create_model(kind.__name__, __config__=strict, **{key: (hints[key], ...) for key in more})  # type: ignore[call-overload]
    try:
        typed = checked.model_validate(more).__dict__
    except ValidationError as error:
        every = error.errors()  # of one that may be of several types, what each has against it
        key = str(every[0]["loc"][0])
        said = " or ".join(dict.fromkeys(each["msg"].lower() for each in every if each["loc"][0] == key))
        raise SrlibError(f"{setting}.{key} is {more[key]!r}: {said} ({key} of {kind.__name__}).") from None
    if not more:
        return kind(**own)
    try:
        return kind(**own, **typed)
    except Exception as error:  # of whatever kind the library's check raises
        said = " ".join(str(error).split())
        raise SrlibError(f"{setting}: {kind.__name__} refuses {', '.join(more)}: {said}") from None


def precision(spec: ModelSpec) -> dict[str, bool]:
    """What a trainer is told of the dtype of a model: mixed precision, in which what is trained stays in fp32.

    In fp16 losses are scaled, lest small gradients vanish; on a CPU accelerate leaves that out.
    """
    return {"bf16": dtype_of(spec) == torch.bfloat16, "fp16": dtype_of(spec) == torch.float16}


def check_tracker(report_to: str, setting: str) -> None:
    """Make what transformers reports with, and drop it: it says what is missing.

    Raises:
        SrlibError: transformers knows no such tracker, or its package is not installed.
    """
    try:
        for tracker in get_reporting_integration_callbacks(report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as error:
        raise SrlibError(f"{setting} is {report_to!r}: {error}") from None


def run_name(folder: Path) -> str:
    """What a tracker calls the training whose artefacts go to `folder`: run and stage."""
    return f"{folder.parent.name}-{folder.name}"


def fit(trainer: Trainer, folder: Path, checkpoint: Path | None) -> None:
    """Train, from a checkpoint on if there is one; what a tracker keeps here goes to `folder`."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder / "tensorboard")
    if checkpoint:
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:  # where that is within an epoch, transformers would take one more step
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
            return
    with warnings.catch_warnings(), _wandb_in(folder):
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers`")  # at every checkpoint
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


@contextmanager
def _wandb_in(folder: Path) -> Iterator[None]:
    """Weights & Biases keeps its files in `folder`, unless the environment says where."""
    if "WANDB_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DIR"]


def taken_up(trainer: Trainer) -> Path | None:
    """The last whole checkpoint that a killed run has left; those that are not whole are dropped."""
    found = {step_of(each): each for each in Path(trainer.args.output_dir).glob("checkpoint-*")}
    whole = []
    for step, each in found.items():
        with suppress(SrlibError):  # it is not there, or torn
            read_json(each / TRAINER_STATE_NAME, dict[str, Any])  # which is written last
            whole.append(step)
    trainer.accelerator.wait_for_everyone()  # until all have looked
    if trainer.accelerator.is_main_process:
        for broken in found.keys() - set(whole):
            shutil.rmtree(found[broken])
    trainer.accelerator.wait_for_everyone()
    return found[max(whole)] if whole else None


def step_of(checkpoint: Path | None) -> int:
    """Steps of training that a checkpoint holds; without one, none."""
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def lora(rank: int, alpha: int, more: dict[str, Any], rows: dict[str, list[int]]) -> LoraConfig:
    """An adapter on all linear layers, as the section `sft` has it; `rows` of the embeddings are trained with it."""
    return configured(
        LoraConfig,
        "sft.lora",
        more,
        r=rank,
        lora_alpha=alpha,
        target_modules="all-linear",
        trainable_token_indices=rows,
        task_type="CAUSAL_LM",
    )


def save(trainer: Trainer, log: list[dict], folder: Path) -> None:
    """Adapter and tokenizer to `folder/adapter`, or where all weights were trained the whole model to `folder/model`.

    The log goes to `folder/log.json`; checkpoints are removed.
    """
    if trainer.accelerator.is_main_process:  # every process holds all that was trained
        if isinstance(trainer.model, PeftModel):
            write_adapter(trainer, folder / "adapter")
        else:
            write_model(trainer, folder / "model")
        write_json(folder / "log.json", log)
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
