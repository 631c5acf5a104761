"""A model and its tokenizer, as transformers loads them: device, dtype, quantisation, adapter."""

from __future__ import annotations

import warnings
from copy import deepcopy
from logging import getLogger
from pathlib import Path

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
from srlib.data.prompts import set_template
from srlib.engine.files import check, saving
from srlib.engine.slots import ATTENTION
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
    """The dtype a spec asks for; `auto` is fp32 on a CPU, where bf16 is emulated and slow, and fp16 on a GPU without bf16.

    Raises:
        SrlibError: it is bfloat16, and the GPU has none.
    """
    if spec.dtype not in ("auto", "bfloat16"):
        return getattr(torch, spec.dtype)
    if device_of(spec) == "cpu":
        return torch.float32 if spec.dtype == "auto" else torch.bfloat16
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    if spec.dtype == "bfloat16":
        raise SrlibError(
            f"dtype is bfloat16, in which {torch.cuda.get_device_name()} does not compute; set it to float16 or auto."
        )
    return torch.float16


def load_model(spec: ModelSpec, trainable: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a spec; an adapter is merged, laid beside or left trainable, and brings its tokenizer.

    On quantised weights an adapter is never merged: to round it into four bits would undo it.

    Raises:
        SrlibError: no such model or adapter, or one of its files is damaged.
    """
    check(spec)
    assert spec.path is not None, "check has seen to it"
    if device_of(spec) != "cpu":
        # On Hopper torch prefers cuDNN's attention, which makes a plan for each exact shape and keeps it: as sequences
        # grow, each step would wait for a new one.
        torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = dtype_of(spec)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            spec.path,
            **spec.pinned,
            dtype=dtype,
            use_safetensors=True,
            quantization_config=_quantization(spec),
            device_map={"": device_of(spec)},
            output_loading_info=True,
        )
    except (torch.OutOfMemoryError, ImportError):  # no fault of the files
        raise
    except Exception as error:  # whatever a library raises for a file that holds something else
        if isinstance(error, OSError) and not Path(spec.path).exists():
            raise SrlibError(f"{spec.path} is no folder here, and the hub gave no such model: {_line(error)}") from None
        raise SrlibError(f"The model in {spec.path} cannot be loaded: {_line(error)}. Make it again.") from None
    if absent := sorted(found["missing_keys"]):  # which transformers has drawn at random
        raise SrlibError(f"The model in {spec.path} is not whole: it has no {absent[0]}. Make it again.")
    if model._supports_attention_backend:  # torch's, but for what its kernels would leave out without a word
        model.set_attn_implementation(ATTENTION)
    tokenizer = load_tokenizer(spec)
    if spec.adapter is not None:
        model = _with_adapter(model, tokenizer, spec, trainable)
    return model.eval(), tokenizer


def _with_adapter(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, spec: ModelSpec, trainable: bool
) -> PreTrainedModel:
    from peft import PeftModel

    fit_embeddings(model, tokenizer)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")  # which it has drawn at random
            model = PeftModel.from_pretrained(model, spec.adapter, is_trainable=trainable)
    except (torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:
        raise SrlibError(f"The adapter in {spec.adapter} cannot be loaded: {_line(error)}. Make it again.") from None
    return model.merge_and_unload() if spec.merge and not trainable and spec.quantization == "none" else model


def deepen(spec: ModelSpec, layers: int, folder: Path) -> ModelSpec:
    """Write a model with so many more layers that add nothing to what it computes: it writes the same, and costs more.

    They are copies of its last one whose two ways back into the residual stream are zero, and every engine works them
    out like any other.

    Returns:
        where it is, to be loaded as the one of `spec`.

    Raises:
        SrlibError: it has quantised weights, or a layer that is built otherwise.
    """
    model, tokenizer = load_model(spec.model_copy(update={"device": "cpu"}))
    stack, config = getattr(model.get_decoder(), "layers", []), model.config.get_text_config()
    parts = dict(stack[-1].named_modules()) if len(stack) else {}
    ways = [name for name in ("self_attn.o_proj", "mlp.down_proj") if isinstance(parts.get(name), torch.nn.Linear)]
    if spec.quantization != "none" or len(ways) < 2:
        raise SrlibError(
            f"{spec.path} gets no inert layers: that needs plain weights, and layers with self_attn.o_proj and "
            "mlp.down_proj."
        )
    for _ in range(layers):
        layer = deepcopy(stack[-1])
        for name in ways:
            for weight in layer.get_submodule(name).parameters():
                torch.nn.init.zeros_(weight)
        stack.append(layer)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [*kinds, *kinds[-1:] * layers]
    config.num_hidden_layers = len(stack)
    with saving(folder):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return spec.model_copy(update={"path": str(folder), "adapter": None})


def _quantization(spec: ModelSpec) -> BitsAndBytesConfig | None:
    if spec.quantization == "none":
        return None
    # It tells at every pass of every layer that int8 computes in fp16.
    getLogger("bitsandbytes.autograd._functions").setLevel("ERROR")
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


def load_tokenizer(spec: ModelSpec, local: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model alone, with what the spec says of its chat template.

    Args:
        local: the hub is not asked for it.

    Raises:
        SrlibError: there is none.
    """
    where = spec.top
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            where, local_files_only=local, **({} if spec.adapter else spec.pinned)
        )
    except Exception as error:  # tokenizers, the library, raises nothing narrower
        if isinstance(error, OSError) and not Path(where).exists():
            raise SrlibError(f"{where} has no tokenizer here or on the hub: {_line(error)}") from None
        raise SrlibError(f"The tokenizer in {where} cannot be loaded: {_line(error)}. Make it again.") from None
    set_template(tokenizer, spec.template, spec.system)
    return tokenizer


def _line(error: Exception) -> str:
    """The first line of an error that says something, without a stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0].rstrip(".: ")
