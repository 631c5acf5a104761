"""Supervised fine-tuning: the small model learns to write the tags, with TRL and a LoRA adapter.

Deviations from the paper (section on training): LoRA in place of a full fine-tune, and tags
that are one added token each, whose embeddings are trained with the adapter. `tags: plain`
keeps the paper's plain text.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from srlib import SrlibError
from srlib.annotate import Annotated
from srlib.engine.transformers import device_of, dtype_of, fit_embeddings, load_model
from srlib.params import ModelSpec, Sft
from srlib.problems import encode_prompt
from srlib.spans import CLOSE, OPEN

LABEL_IGNORED = -100


def add_tags(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make each tag one token of the tokenizer; returns the two ids."""
    tokenizer.add_tokens([OPEN, CLOSE])
    return tokenizer.convert_tokens_to_ids([OPEN, CLOSE])


def example(tokenizer: PreTrainedTokenizerBase, row: Annotated) -> dict[str, list[int]]:
    """Ids and labels of one annotated trace: loss on the completion alone.

    What the big model will write is part of it: from it the small model learns where a span is
    not over yet.
    """
    prompt = encode_prompt(tokenizer, row.prompt)
    completion = tokenizer.encode(row.tagged, add_special_tokens=False) + [tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [LABEL_IGNORED] * len(prompt) + completion}


def train(small: ModelSpec, rows: list[Annotated], config: Sft, seed: int, folder: Path) -> list[dict]:
    """Fine-tune `small` on annotated traces; adapter and tokenizer go to `folder/adapter`.

    Returns:
        the trainer's log, a record every few steps with `step`, `epoch` and `loss` (nats a token).

    Raises:
        SrlibError: no trace has a span, or one is longer than `max_length`.
    """
    if not any(row.spans for row in rows):
        raise SrlibError("No annotated trace has a span, so there is nothing to learn: lower annotate.threshold.")
    set_seed(seed)
    model, tokenizer = load_model(small)
    tokens = add_tags(tokenizer) if config.tags == "token" else None
    fit_embeddings(model, tokenizer)
    examples = [example(tokenizer, row) for row in rows]
    longest = max(len(e["input_ids"]) for e in examples)
    if longest > config.max_length:
        raise SrlibError(f"sft.max_length is {config.max_length}, but the longest trace has {longest} tokens.")
    steps = len(rows) * config.epochs / (config.batch_size * config.gradient_accumulation_steps)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(folder / "trainer"),
            num_train_epochs=config.epochs,
            per_device_train_batch_size=config.batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=int(config.warmup_ratio * steps),
            max_length=config.max_length,
            bf16=str(dtype_of(small)) == "torch.bfloat16",
            gradient_checkpointing=config.gradient_checkpointing,
            logging_steps=max(1, int(steps / 50)),
            save_strategy="no",
            report_to="none",
            dataloader_pin_memory=device_of(small) != "cpu",
            seed=seed,
        ),
        train_dataset=Dataset.from_list(examples),
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
    save_adapter(trainer, folder)
    log = [record for record in trainer.state.log_history if "loss" in record]
    (folder / "log.json").write_text(json.dumps(log, indent=1))
    return log


def save_adapter(trainer, folder: Path) -> None:
    """Adapter and tokenizer to `folder/adapter`; checkpoints are removed."""
    write_adapter(trainer, folder / "adapter")
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)


def write_adapter(trainer, folder: Path) -> None:
    """Adapter and tokenizer, the same bytes for the same training."""
    for config in trainer.model.peft_config.values():
        config.target_modules = sorted(config.target_modules)  # a set, written in any order
    # The tags' rows are saved with the adapter; the rest of the grown embeddings is the base model's.
    trainer.model.save_pretrained(folder, save_embedding_layers=False)
    trainer.processing_class.save_pretrained(folder)


def ready_for_trl(model) -> None:
    """Two mends: for TRL's fused loss, and for 4-bit weights on a CPU."""
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):  # PEFT's wrapper around trained rows has none, and TRL asks for it
        head.bias = None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' packing for inference has no backward
            module.support_avx512bf16_for_cpu = False


def embedding_rows(model, tokens: list[int] | None) -> dict[str, list[int]] | None:
    """The rows of the embeddings to train; the output layer has rows of its own unless it is tied."""
    if tokens is None:
        return None
    names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    rows = {names[id(model.get_input_embeddings())]: tokens}
    if not model.config.tie_word_embeddings:
        rows[names[id(model.get_output_embeddings())]] = tokens
    return rows
