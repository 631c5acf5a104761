"""A model and its tokenizer, as transformers loads them: device, dtype, quantisation, adapter."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from srlib import SrlibError
from srlib.engine.files import check
from srlib.params.models import ModelSpec


def eos_of(generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a text."""
    eos = generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return frozenset(i for i in (*eos, tokenizer.eos_token_id) if i is not None)


def device_of(spec: ModelSpec) -> str:
    """The device a spec asks for; `auto` is the GPU if there is one.

    Raises:
        SrlibError: a GPU is asked for, and there is none.
    """
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise SrlibError(f"device is {spec.device}, but torch sees no GPU here; set it to auto or cpu.")
    return spec.device if spec.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(spec: ModelSpec) -> torch.dtype:
    """The dtype a spec asks for; `auto` is fp32 on a CPU, where bf16 is emulated and slow."""
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    return torch.float32 if device_of(spec) == "cpu" else torch.bfloat16


def load_model(spec: ModelSpec, trainable: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a spec; an adapter is merged, laid beside or left trainable, and brings its tokenizer.

    On quantised weights an adapter is never merged: to round it into four bits would undo it.

    Raises:
        SrlibError: no such model or adapter, or one of its files is damaged.
    """
    check(spec)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            spec.path,
            dtype=dtype_of(spec),
            attn_implementation="sdpa",
            use_safetensors=True,
            quantization_config=_quantization(spec),
            device_map={"": device_of(spec)},
        )
    except OSError as error:
        raise SrlibError(
            f"{spec.path} is no folder here, and the hub gave no such model: {_first_line(error)}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # of a file that holds something else
        raise SrlibError(f"{spec.path} is no model that can be loaded: {_first_line(error)}. Make it again.") from None
    tokenizer = load_tokenizer(spec)
    if spec.adapter is not None:
        from peft import PeftModel

        fit_embeddings(model, tokenizer)
        model = PeftModel.from_pretrained(model, spec.adapter, is_trainable=trainable)
        if spec.merge and not trainable and spec.quantization == "none":
            model = model.merge_and_unload()
    return model.eval(), tokenizer


def _quantization(spec: ModelSpec) -> BitsAndBytesConfig | None:
    if spec.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=spec.quantization == "nf4",
        load_in_8bit=spec.quantization == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # the scales in 8 bits: 0.4 bits a weight less
        bnb_4bit_compute_dtype=dtype_of(spec),
    )


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embeddings if the tokenizer has ids beyond them; many models have rows to spare."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # how the new rows start is of no matter: they are trained, or loaded
        model.resize_token_embeddings(len(tokenizer))
        logging.set_verbosity(verbosity)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone.

    Raises:
        SrlibError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(spec.adapter or spec.path)
    except OSError as error:
        raise SrlibError(f"{spec.path} has no tokenizer here or on the hub: {_first_line(error)}") from None
    except Exception as error:  # tokenizers, the library, raises nothing narrower
        where = spec.adapter or spec.path
        raise SrlibError(f"The tokenizer in {where} cannot be loaded: {_first_line(error)}. Make it again.") from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
