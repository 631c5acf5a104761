"""The sizes of a model, from its configuration alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from srlib import SrlibError
from srlib.data.rows import read_json


@dataclass(frozen=True)
class Shape:
    """The sizes of a decoder, and its parameters: those of linear layers, which quantisation shrinks, and the rest."""

    hidden: int
    layers: int
    queries: int  # size of the queries of one token in one layer
    kv: int  # and of its keys
    inner: int
    vocabulary: int
    context: int
    linear: int
    rest: int

    @property
    def parameters(self) -> int:
        return self.linear + self.rest

    def lora(self, rank: int) -> int:
        """Parameters of an adapter on all linear layers, and of the two tags' rows at both ends."""
        h, kv, f = self.hidden, self.kv, self.inner
        return rank * self.layers * (2 * 2 * h + 2 * (h + kv) + 3 * (h + f)) + 4 * h


def qwen2(h: int, layers: int, heads: int, kv_heads: int, f: int, vocabulary: int, context: int, tied: bool) -> Shape:
    """The shape of a Qwen2 model."""
    kv = h // heads * kv_heads
    linear = layers * (2 * h * h + 2 * h * kv + 3 * h * f)
    rest = layers * (h + 2 * kv + 2 * h) + h + vocabulary * h * (1 if tied else 2)
    return Shape(h, layers, h, kv, f, vocabulary, context, linear, rest)


# DeepSeek-R1-Distill-Qwen, from the configurations on the hub; quantised copies have the name in theirs. 8B and 70B are
# R1-Distill-Llama: the same but for biases, which are a ten-thousandth of it.
KNOWN = {
    "1.5b": qwen2(1536, 28, 12, 2, 8960, 151936, 131072, False),
    "7b": qwen2(3584, 28, 28, 4, 18944, 152064, 131072, False),
    "8b": qwen2(4096, 32, 32, 8, 14336, 128256, 131072, False),
    "14b": qwen2(5120, 48, 40, 8, 13824, 152064, 131072, False),
    "32b": qwen2(5120, 64, 40, 8, 27648, 152064, 131072, False),
    "70b": qwen2(8192, 80, 64, 8, 28672, 128256, 131072, False),
}


@lru_cache
def shape(path: str, revision: str | None = None) -> Shape:
    """The shape of a model, from its folder, its name or the hub.

    Raises:
        SrlibError: none of them knows it.
    """
    file = Path(path) / "config.json"
    config = read_json(file, dict[str, Any], "make it again") if file.is_file() else {}
    if config.get("model_type") == "qwen2" and config.get("head_dim") is None:
        names = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"]
        names += ["intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings"]
        if all(name in config for name in names):
            try:
                return qwen2(*(config[name] for name in names))
            except (TypeError, ZeroDivisionError) as error:
                raise SrlibError(f"{file} is damaged ({error}): make it again.") from None
    named = re.search(r"r1-distill-qwen-(1\.5b|7b|14b|32b)", path.lower())
    return KNOWN[named[1]] if named and not config else _built(path, revision)


def _built(path: str, revision: str | None) -> Shape:
    """Of any other architecture: built without memory, and counted."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, revision=revision or "main")
    except (OSError, ValueError) as error:
        raise SrlibError(f"{path}: neither a folder nor the hub gives its configuration ({error}).") from None
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    c, head = config.get_text_config(), model.get_output_embeddings()
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    size = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    kv = size * (getattr(c, "num_key_value_heads", None) or c.num_attention_heads)
    sizes = (c.hidden_size, c.num_hidden_layers, size * c.num_attention_heads, kv, c.intermediate_size, c.vocab_size)
    return Shape(*sizes, c.max_position_embeddings, linear, model.num_parameters() - linear)
