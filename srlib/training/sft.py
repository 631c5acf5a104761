"""Supervised fine-tuning: the small model learns to write the tags, with TRL and a LoRA adapter.

Deviations from the paper (section on training): LoRA in place of a full fine-tune, and tags
that are one added token each, whose embeddings are trained with the adapter. `tags: plain`
keeps the paper's plain text; the embeddings of its pieces are trained, too, as a full fine-tune
would: a model may never have met them, as that of the arithmetic world has met no letter.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from srlib import SrlibError
from srlib.data.prompts import continuation, encode_prompt
from srlib.data.rows import Annotated, read_jsonl, write_json
from srlib.engine.adapters import add_tags, embedding_rows, merge, pieces_of_tags, ready_for_trl, write_adapter
from srlib.engine.models import device_of, dtype_of, fit_embeddings, load_model
from srlib.params import ModelSpec, Params, Sft
from srlib.training.launch import on_one_device

LABEL_IGNORED = -100


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


class _Trainer(NoStepAtZero, SFTTrainer):
    pass


def example(tokenizer: PreTrainedTokenizerBase, row: Annotated, hint: str = "") -> dict[str, list[int]]:
    """Ids and labels of one annotated trace: loss on the completion alone.

    What the big model will write is part of it: from it the small model learns where a span is
    not over yet. `hint` stands behind the problem, as where the trained model writes.
    """
    prompt = encode_prompt(tokenizer, row.prompt + hint)
    tagged = continuation(tokenizer, row.tagged)
    completion = tokenizer.encode(tagged, add_special_tokens=False) + [tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [LABEL_IGNORED] * len(prompt) + completion}


def train(small: ModelSpec, rows: list[Annotated], config: Sft, seed: int, folder: Path, hint: str = "") -> list[dict]:
    """Fine-tune `small` on annotated traces; adapter and tokenizer go to `folder/adapter`.

    Where `small` has an adapter already, it is merged into the weights, in `folder/merged`, and the new one is for those.

    Returns:
        the trainer's log, a record every few steps with `step`, `epoch` and `loss` (nats a token).

    Raises:
        SrlibError: no trace has a span, or none is within `max_length`; single ones beyond it are left out and told.
    """
    if not any(row.spans for row in rows):
        raise SrlibError("No annotated trace has a span, so there is nothing to learn: lower annotate.threshold.")
    set_seed(seed)
    process = PartialState()
    if small.adapter is not None:
        with process.main_process_first():
            if process.is_main_process:
                shutil.rmtree(folder / "merged", ignore_errors=True)  # of a base that may have been made again since
            small = small.model_copy(update={"path": str(merge(small, folder / "merged")), "adapter": None})
    model, tokenizer = load_model(small)
    tokens = add_tags(tokenizer) if config.tags == "token" else pieces_of_tags(tokenizer)
    fit_embeddings(model, tokenizer)
    examples = [example(tokenizer, row, hint) for row in rows]
    fitting = [each for each in examples if len(each["input_ids"]) <= config.max_length]
    if not fitting:
        shortest = min(len(each["input_ids"]) for each in examples)
        raise SrlibError(f"sft.max_length is {config.max_length}, but the shortest trace has {shortest} tokens.")
    if (longer := len(examples) - len(fitting)) and process.is_main_process:
        print(f"{longer} of {len(examples)} traces are left out: they have more than {config.max_length} tokens")
    steps = len(fitting) * config.epochs / config.batch_size
    args = SFTConfig(
        output_dir=str(folder / "trainer"),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size // config.processes // config.gradient_accumulation_steps,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=1 + int(config.warmup_ratio * steps),  # see `NoStepAtZero`
        max_length=config.max_length,
        bf16=dtype_of(small) == torch.bfloat16,
        use_cpu=device_of(small) == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=max(1, int(steps / 50)),
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        seed=seed,
    )
    on_one_device(args, model.device)
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(fitting),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            target_modules="all-linear",
            trainable_token_indices=embedding_rows(model, tokens),
            task_type="CAUSAL_LM",
        ),
    )
    ready_for_trl(trainer.model)
    trainer.train()
    log = [record for record in trainer.state.log_history if "loss" in record]
    save(trainer, log, folder)
    return log


def run(p: Params, folder: Path) -> list[dict]:
    """`train` as the params ask for it, in this process."""
    return train(p.small, read_jsonl(p.annotated, Annotated), p.sft, p.seed, folder, p.offload.hint)


def save(trainer: Trainer, log: list[dict], folder: Path) -> None:
    """Adapter and tokenizer to `folder/adapter`, the log to `folder/log.json`; checkpoints are removed."""
    if trainer.accelerator.is_main_process:  # every process holds all of the adapter
        write_adapter(trainer, folder / "adapter")
        write_json(folder / "log.json", log)
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
