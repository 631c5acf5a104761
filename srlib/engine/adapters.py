"""Adapters: the tags as tokens, what is trained, and how it is saved, merged and laid on a model."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srlib import SrlibError
from srlib.data.rows import read_json
from srlib.data.spans import CLOSE, OPEN
from srlib.engine.files import saving
from srlib.params.models import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer


def add_tags(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Make each tag one token of the tokenizer; returns the two ids."""
    tokenizer.add_tokens([OPEN, CLOSE])
    return pieces_of_tags(tokenizer)


def pieces_of_tags(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that the tags are written with, each once: two where they are tokens."""
    return list(dict.fromkeys(i for tag in (OPEN, CLOSE) for i in tokenizer.encode(tag, add_special_tokens=False)))


def begin_as(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> None:
    """Set the embeddings of the tags, which are tokens, at both ends of a model to the mean of those of some words' pieces.

    Args:
        words: for the opening and for the closing tag.

    Raises:
        SrlibError: the tokenizer cannot write one of them.
    """
    rows = [tokenizer.encode(text, add_special_tokens=False) for text in words]
    for text, ids in zip(words, rows):
        known = tokenizer.decode(ids)
        if not ids or tokenizer.unk_token_id in ids or "".join(known.split()) != "".join(text.split()):
            raise SrlibError(
                f"sft.tag_init holds {text!r}, of which the tokenizer of {tokenizer.name_or_path} can only write {known!r}; "
                "give words that it knows."
            )
    ends = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}  # one, where they are tied
    for weight in ends:
        for tag, ids in zip(pieces_of_tags(tokenizer), rows, strict=True):
            weight.data[tag] = weight.data[ids].float().mean(0)


def write_adapter(trainer: Trainer, folder: Path) -> None:
    """Adapter and tokenizer, the same bytes for the same training."""
    for config in trainer.model.peft_config.values():
        config.target_modules = sorted(config.target_modules)  # a set, written in any order
    # The tags' rows are saved with the adapter; the rest of the grown embeddings is the base model's.
    with saving(folder):
        trainer.model.save_pretrained(folder, save_embedding_layers=False, selected_adapters=["default"])
        trainer.processing_class.save_pretrained(folder)


def write_model(trainer: Trainer, folder: Path) -> None:
    """A model all of whose weights were trained, with its tokenizer."""
    with saving(folder):
        trainer.model.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)


def ready_for_trl(model: PreTrainedModel) -> None:
    """Three mends: for TRL's fused loss, for 4-bit weights on a CPU, and for what is trained, which has to be in fp32."""
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):  # PEFT's wrapper around trained rows has none, and TRL asks for it
        head.bias = None
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' packing for inference has no backward
            module.support_avx512bf16_for_cpu = False
    for parameter in model.parameters():
        if parameter.requires_grad:  # in bfloat16, which TRL casts some adapters to, a small step would round to none
            parameter.data = parameter.data.float()


@contextmanager
def rows_in_place(model: PreTrainedModel) -> Iterator[None]:
    """For as long, trained rows stand in the embeddings themselves; PEFT lays them into a copy at every pass.

    Rows are put in and back, never added to, so the embeddings are afterwards what they were, to the bit. That is not so
    of the matrices of an adapter, which stay beside the weights.
    """
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    layers = [module for module in model.modules() if isinstance(module, TrainableTokensLayer)]
    for layer in layers:
        layer.merge()
    try:
        yield
    finally:
        for layer in layers:
            layer.unmerge()


def embedding_rows(model: PreTrainedModel, tokens: list[int]) -> dict[str, list[int]]:
    """The rows of the embeddings to train; the output layer has rows of its own unless it is tied."""
    names = {id(module): name.split(".")[-1] for name, module in model.named_modules()}
    rows = {names[id(model.get_input_embeddings())]: tokens}
    if not model.config.tie_word_embeddings:
        rows[names[id(model.get_output_embeddings())]] = tokens
    return rows


def _adapter_config(adapter: str) -> dict[str, Any]:
    return read_json(Path(adapter) / "adapter_config.json", dict[str, Any], "make it again")


def beside(spec: ModelSpec) -> bool:
    """Whether vLLM lays the adapter of `spec` beside the weights; else the two are merged.

    Raises:
        SrlibError: it has to be merged, but the weights are quantised.
    """
    assert spec.adapter is not None
    config = _adapter_config(spec.adapter)
    pure = not (config.get("trainable_token_indices") or config.get("modules_to_save"))
    if spec.quantization != "none" and not pure:
        raise SrlibError(
            f"{spec.adapter} has trained token embeddings, which vLLM cannot lay on {spec.quantization} weights; "
            "set quantization to none, or engine to transformers."
        )
    return pure and (not spec.merge or spec.quantization != "none")


def merge(spec: ModelSpec, folder: Path | None = None) -> Path:
    """Base and adapter of `spec` as one model, in `folder` (default: `merged`, in the adapter's own).

    Made whole or not at all, anew if the adapter is newer. Returns the folder.
    """
    from srlib.engine.models import dtype_of, load_model

    assert spec.adapter is not None
    adapter = Path(spec.adapter)
    folder, dtype = folder or adapter / "merged", str(dtype_of(spec)).removeprefix("torch.")
    mark = folder / "source.json"
    source = json.dumps({"base": spec.path, **spec.pinned, "adapter": spec.adapter, "dtype": dtype})
    newest = max(file.stat().st_mtime for file in adapter.iterdir() if file.is_file())
    if mark.is_file() and mark.read_text() == source and mark.stat().st_mtime >= newest:
        return folder
    model, tokenizer = load_model(spec.model_copy(update={"merge": True, "device": "cpu", "dtype": dtype}))
    with saving(folder), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "merged"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        (made / mark.name).write_text(source)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return folder
