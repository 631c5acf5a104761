"""Supervised fine-tuning: the small model learns to write the tags, with TRL and a LoRA adapter or all of its weights.

Deviations from the paper (section on training): LoRA in place of a full fine-tune, unless `method` is full,
and tags that are one added token each, whose embeddings are trained with the adapter. `tags: plain`
keeps the paper's plain text; the embeddings of its pieces are trained, too, as a full fine-tune
does: a model may never have met them, as that of the arithmetic world has met no letter.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from random import Random

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer, pack_dataset

from srlib import SrlibError
from srlib.data.prompts import continuation, encode_prompt
from srlib.data.rows import Annotated, read_jsonl
from srlib.data.spans import OPEN
from srlib.engine.adapters import add_tags, begin_as, embedding_rows, merge, pieces_of_tags, ready_for_trl
from srlib.engine.models import device_of, dtype_of, fit_embeddings, load_model
from srlib.engine.slots import ATTENTION
from srlib.params import ModelSpec, Params, Sft
from srlib.training.launch import on_one_device
from srlib.training.trainer import (
    NoStepAtZero,
    check_tracker,
    configured,
    fit,
    lora,
    precision,
    run_name,
    save,
    taken_up,
)

LABEL_IGNORED = -100
Example = dict[str, list[int]]


class _Trainer(NoStepAtZero, SFTTrainer):
    pass


def example(tokenizer: PreTrainedTokenizerBase, row: Annotated, hint: str = "") -> Example:
    """Ids and labels of one annotated trace: loss on the completion alone.

    What the big model will write is part of it: from it the small model learns where a span is
    not over yet. `hint` stands behind the problem, as where the trained model writes.
    """
    prompt = encode_prompt(tokenizer, row.prompt + hint)
    tagged = continuation(tokenizer, row.tagged)
    completion = tokenizer.encode(tagged, add_special_tokens=False) + [tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [LABEL_IGNORED] * len(prompt) + completion}


def train(small: ModelSpec, rows: list[Annotated], config: Sft, seed: int, folder: Path, hint: str = "") -> list[dict]:
    """Fine-tune `small` on annotated traces; adapter and tokenizer go to `folder/adapter`, a whole model to `folder/model`.

    Where `small` has an adapter already, it is merged into the weights, in `folder/merged`, and the new one is for those;
    a model that is trained as a whole is not written before.
    A checkpoint that a killed run left in `folder/trainer` is taken up where it ends, and all becomes what it would have
    been, but for `num_tokens` in the log: TRL counts them from there.

    Returns:
        the trainer's log, a record every few steps with `step`, `epoch` and `loss` (nats a token); where traces are held
        out, records with `step`, `epoch` and `eval_loss`, theirs, the mean of its batches, too.

    Raises:
        SrlibError: no trace has a span, none is within `max_length`, or none is left to train on (single ones beyond
            `max_length` are left out and told); or words, packing or a model that do not go together.
    """
    if not any(row.spans for row in rows):
        raise SrlibError("No annotated trace has a span, so there is nothing to learn: lower annotate.threshold.")
    set_seed(seed)
    process = PartialState()
    if small.adapter is not None and config.method == "lora":
        with process.main_process_first():
            if process.is_main_process:
                shutil.rmtree(folder / "merged", ignore_errors=True)  # of a base that may have been made again since
            own = {"path": str(merge(small, folder / "merged")), "adapter": None, "revision": None}
            small = small.model_copy(update=own)
    model, tokenizer = load_model(small)
    known = OPEN in tokenizer.get_vocab()  # to a model that was taught already
    tokens = add_tags(tokenizer) if config.tags == "token" else pieces_of_tags(tokenizer)
    fit_embeddings(model, tokenizer)
    if config.packing and model.config._attn_implementation != ATTENTION:
        raise SrlibError(
            f"sft.packing is true, but {small.path} has an attention of its own, in which traces of one row may see each "
            "other; set it to false."
        )
    if config.tag_init is not None and not known:
        begin_as(model, tokenizer, config.tag_init)
    examples = [example(tokenizer, row, hint) for row in rows]
    fitting = [each for each in examples if len(each["input_ids"]) <= config.max_length]
    if not fitting:
        shortest = min(len(each["input_ids"]) for each in examples)
        raise SrlibError(f"sft.max_length is {config.max_length}, but the shortest trace has {shortest} tokens.")
    if (longer := len(examples) - len(fitting)) and process.is_main_process:
        print(f"{longer} of {len(examples)} traces are left out: they have more than {config.max_length} tokens")
    taught, held_out = split(fitting, config.n_validation, seed)
    data = Dataset.from_list(taught)
    rows_to_train = len(pack_dataset(data, config.max_length)) if config.packing else len(data)
    args = _arguments(small, config, rows_to_train, seed, folder)
    on_one_device(args, model.device)
    adapter = None
    if config.method == "full":
        model.requires_grad_(True)  # PEFT has frozen those that it has merged an adapter into
    else:
        adapter = lora(config.lora_rank, config.lora_alpha, config.lora, embedding_rows(model, tokens))
    trainer = _Trainer(
        model=model,
        args=args,
        train_dataset=data,
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        peft_config=adapter,
    )
    ready_for_trl(trainer.model)
    fit(trainer, folder, taken_up(trainer))
    log = [record for record in trainer.state.log_history if "loss" in record]
    held = [record for record in trainer.state.log_history if "eval_loss" in record]
    log += [{key: record[key] for key in ("step", "epoch", "eval_loss")} for record in held]
    if config.method == "full":
        trainer.model.to(dtype_of(small))
    save(trainer, log, folder)
    return log


def split(examples: list[Example], n: int, seed: int) -> tuple[list[Example], list[Example]]:
    """Those to train on, and `n` that are held out, drawn at random; both in the order they came in.

    Raises:
        SrlibError: none would be left to train on.
    """
    if n >= len(examples):
        raise SrlibError(
            f"sft.n_validation is {n}, but there are {len(examples)} traces to train on and to hold out: lower it."
        )
    drawn = {*Random(seed).sample(range(len(examples)), n)}
    taught = [each for i, each in enumerate(examples) if i not in drawn]
    return taught, [examples[i] for i in sorted(drawn)]


def _arguments(small: ModelSpec, config: Sft, n: int, seed: int, folder: Path) -> SFTConfig:
    """What TRL is told, for `n` traces to train on, or rows of packed ones."""
    steps = n * config.epochs / config.batch_size
    logging_steps = max(1, int(steps / 50))
    order = {"train_sampling_strategy": "group_by_length"} if config.group_by_length else {}
    in_part = config.batch_size // config.processes // config.gradient_accumulation_steps
    return configured(
        SFTConfig,
        "sft.trainer",
        config.trainer,
        output_dir=str(folder / "trainer"),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=in_part,
        per_device_eval_batch_size=in_part,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=1 + int(config.warmup_ratio * steps),  # see `NoStepAtZero`
        max_length=config.max_length,
        packing=config.packing,
        packing_strategy="bfd",  # the others cut traces in two
        eval_packing=False,
        padding_free=False,  # bfd sees to that itself
        **order,
        **precision(small),
        use_cpu=device_of(small) == "cpu",
        gradient_checkpointing=config.gradient_checkpointing,
        logging_steps=logging_steps,
        eval_strategy="steps" if config.n_validation else "no",
        eval_steps=logging_steps,
        save_steps=math.ceil(config.save_steps / logging_steps) * logging_steps,  # where no loss is half summed up
        save_strategy="steps",
        save_total_limit=1,
        save_only_model=False,  # else none could be taken up
        report_to=config.report_to,
        run_name=run_name(folder),
        dataloader_pin_memory=False,
        seed=seed,
    )


def check(p: Params) -> None:
    """Check all that is passed on to TRL, PEFT and a tracker, on the CPU and without a model.

    Raises:
        SrlibError: they refuse it, or the tracker is not installed.
    """
    check_tracker(p.sft.report_to, "sft.report_to")
    _arguments(p.small.model_copy(update={"device": "cpu"}), p.sft, 1, p.seed, p.where("02_sft"))
    lora(p.sft.lora_rank, p.sft.lora_alpha, p.sft.lora, {})


def run(p: Params, folder: Path) -> list[dict]:
    """`train` as the params ask for it, in this process."""
    return train(p.small, read_jsonl(p.annotated, Annotated), p.sft, p.seed, folder, p.offload.hint)
