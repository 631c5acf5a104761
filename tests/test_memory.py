"""Whether the plan's figures are those of models that are really there, and what it refuses."""

import ctypes
import gc
import re

import pytest
import torch
from psutil import Process
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from srlib import SrlibError, engine, params
from srlib.__main__ import main
from srlib.cost import hours, memory, shapes
from srlib.data.rows import write_jsonl
from srlib.engine.models import _quantization
from srlib.params import ModelSpec
from srlib.run import bench
from srlib.training import arith_pair
from tests.conftest import random_model

R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-"
CPU = params.load("params/cpu.yaml")


def of(path, **spec) -> memory._Model:
    return memory._Model(CPU, ModelSpec(path=str(path), **spec), shapes.shape(str(path)))


@pytest.mark.parametrize(
    ("size", "billions", "bf16_gib"),
    [("1.5B", 1.777, 3.31), ("7B", 7.616, 14.19), ("14B", 14.77, 27.51), ("32B", 32.76, 61.03)],
)
def test_published_parameter_counts(size, billions, bf16_gib):
    assert shapes.shape(R1 + size).parameters == pytest.approx(billions * 1e9, rel=0.001)
    assert of(R1 + size, dtype="bfloat16").weights() / 2**30 == pytest.approx(bf16_gib, rel=0.002)


def test_weights_are_those_of_models_that_are_built(tmp_path):
    qwen = random_model(100, 0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96, head_dim=64
        )
    )
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}  # not hidden_size / heads
    wide = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=50, hidden_size=64, num_hidden_layers=1, intermediate_size=64, **sizes)
    )
    for name, model in (("qwen", qwen), ("llama", llama), ("wide", wide)):
        model.save_pretrained(tmp_path / name)
        linear = sum(
            x.weight.numel() for n, x in model.named_modules() if isinstance(x, torch.nn.Linear) and n != "lm_head"
        )
        found = shapes.shape(str(tmp_path / name))
        assert (found.parameters, found.linear) == (model.num_parameters(), linear)
        assert found.kv == model.model.layers[0].self_attn.k_proj.out_features
        assert of(tmp_path / name).weights() == sum(x.numel() * x.element_size() for x in model.parameters())
    for side in ("small", "big"):
        built = arith_pair.model(getattr(CPU.arith, side), 100, 0)
        assert memory.models(CPU, "04_offload")[side].shape.parameters == built.num_parameters()


def test_4_bit_weights_are_those_of_a_quantised_model(tmp_path):
    random_model(100, 0).save_pretrained(tmp_path)
    spec = ModelSpec(path=str(tmp_path), quantization="nf4")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=_quantization(spec), dtype=torch.float32)
    held = sum(x.numel() * x.element_size() for x in model.parameters())
    for module in model.modules():
        if state := getattr(getattr(module, "weight", None), "quant_state", None):
            held += state.absmax.numel() * state.absmax.element_size()
            held += state.state2.absmax.numel() * 4 if state.nested else 0
    assert of(tmp_path, quantization="nf4").weights() == pytest.approx(held, rel=0.001)


def test_cache_and_adapter_are_those_of_a_model(tmp_path, tokenizer):
    from peft import LoraConfig, get_peft_model

    model = random_model(len(tokenizer), 0)
    model.save_pretrained(tmp_path)
    cache = model(torch.zeros(3, 17, dtype=torch.long), use_cache=True).past_key_values
    held = sum(x.numel() * x.element_size() for layer in cache.layers for x in (layer.keys, layer.values))
    assert of(tmp_path).cache(3 * 17) == held
    tokenizer.save_pretrained(tmp_path)
    made = engine.load(ModelSpec(path=str(tmp_path), context=64), slots=3)
    made.run(engine.Request(made.open([]), feed=[5] * 40, max_new=8))
    assert _held(made) == of(tmp_path, context=64).caches(3)
    lora = LoraConfig(
        r=4, target_modules="all-linear", trainable_token_indices={"embed_tokens": [0, 1], "lm_head": [0, 1]}
    )
    assert get_peft_model(model, lora).get_nb_trainable_parameters()[0] == shapes.shape(str(tmp_path)).lora(4)


def test_the_cache_of_a_long_trace_takes_the_memory_that_is_planned(tmp_path, tokenizer):
    """16,384 tokens, read in parts and written on: bytes that the process holds more at some lengths; idle slots, none.

    Its layer slides, which is quick: it keeps all keys as others do.
    """
    length, part, written, heads = 16_384, 128, 64, 8
    config = MistralConfig(
        vocab_size=len(tokenizer), hidden_size=64, head_dim=64, num_hidden_layers=1, intermediate_size=64,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=length, sliding_window=part,
        eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    made, plan = engine.load(ModelSpec(path=str(tmp_path)), slots=16), of(tmp_path)
    sequence = made.open([])
    made.run(engine.Request(sequence, feed=[5] * part))  # what is made at the first pass is there
    resident, taken = _resident(), {}
    while len(sequence.ids) < length - written:
        made.run(engine.Request(sequence, feed=[5] * min(part, length - written - len(sequence.ids))))
        if len(sequence.ids) % (length // 4) == 0:
            taken[len(sequence.ids)] = _resident() - resident
    made.run(engine.Request(sequence, max_new=written))
    assert len(sequence.ids) == length
    taken[length] = _resident() - resident
    assert list(taken) == [length // 4, length // 2, 3 * length // 4, length]
    for tokens, more in taken.items():
        assert more == pytest.approx(plan.cache(tokens - part), rel=0.1)


def _resident() -> int:
    """Bytes of this process, without what is free in it already."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return Process().memory_info().rss


def _held(made) -> int:
    return sum(x.nbytes for store in (made._cache.keys, made._cache.values) for x in store.values())


@pytest.mark.parametrize("name", ["gpu16", "gpu24", "node", "cpu", "smoke"])
def test_every_scale_fits(name, capsys):
    assert main(["plan", f"params/{name}.yaml"]) == 0
    assert "Every stage fits." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["gpu16", "gpu24", "node", "released"])
def test_a_twentieth_of_a_card_is_left_free(name):
    there = params.load(f"params/{name}.yaml").hardware.gpu_gb
    p = params.load(f"params/{name}.yaml", **{"hardware.gpu_gb": 0.95 * there})
    assert not [fault for stage in memory.STAGES if stage not in p.left_out for fault in memory.faults(p, stage)]


def test_one_card_is_done_within_a_day_by_its_plan():
    for name, most in (("gpu16", 12), ("gpu24", 24)):
        assert sum(hours.stages(params.load(f"params/{name}.yaml")).values()) < most * 3600


def test_bfloat16_is_refused_on_a_card_that_has_none():
    """By its name, in the plan and before each stage, with a change that mends it."""
    card = {"hardware.gpu": "t4"}
    p = params.load("params/gpu24.yaml", **card)
    with pytest.raises(
        SrlibError, match="^02_sft .*: pair.small.dtype is bfloat16, in which a t4 does not compute. It fits"
    ) as error:
        memory.check(p, "02_sft")
    assert "with pair.small.dtype: float16 (" in str(error.value)
    memory.check(params.load("params/gpu24.yaml", **card, **{"pair.small.dtype": "auto"}), "02_sft")
    with pytest.raises(SrlibError, match="fits with pair.small.dtype: float16, pair.big.dtype: float16"):
        memory.check(p, "03_grpo")
    with pytest.raises(SrlibError, match="pair.tuned.dtype is bfloat16"):
        memory.check(params.load("params/released.yaml", **card), "05_evaluate")
    memory.check(params.load("params/gpu24.yaml", **card, **{"hardware.gpus": 0}), "04_offload")


def test_bf16_of_the_14b_is_refused_on_24_gb_and_the_mend_mends(capsys):
    change = {"pair.big.quantization": "none"}
    with pytest.raises(
        SrlibError, match=r"\d\d\.\d GiB .* there are 23\.6.* fits with pair.big.quantization: nf4"
    ) as error:
        memory.check(params.load("params/gpu24.yaml", **change), "04_offload")
    assert "\n" not in str(error.value)
    memory.check(params.load("params/gpu24.yaml"), "04_offload")
    assert main(["plan", "params/gpu24.yaml", "--set", "pair.big.quantization=none"]) == 1
    assert "04_offload does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "stage", "change", "named"),
    [
        (
            "gpu24",
            "02_sft",
            {"sft.gradient_checkpointing": False, "sft.max_length": 8192},
            "sft.gradient_checkpointing: True",
        ),
        ("gpu24", "05_evaluate", {"offload.batch_size": 32}, "offload.batch_size: 8"),
        ("gpu24", "05_evaluate", {"offload.oversubscribe": 2}, "fits with offload.oversubscribe: 0 ("),
        (
            "gpu24",
            "04_offload",
            {"pair.big.quantization": "none", "hardware.gpus": 4, "hardware.gpu_gb": 37},
            "pair.big.device: cuda:1",
        ),
        ("node", "04_offload", {"pair.big.tensor_parallel": 1}, "pair.big.tensor_parallel: 2"),
        ("node", "04_offload", {"pair.big.kv_cache_gb": 0.2}, "pair.big.kv_cache_gb: 3"),
        ("node", "04_offload", {"pair.big.kv_cache_gb": 70}, "pair.big.kv_cache_gb: 3"),
        (
            "gpu24",
            "03_grpo",
            {"grpo.rollout": "true_offload", "pair.big.path": R1 + "14B", "grpo.rollouts_at_once": 8},
            "rollouts_at_once: 4",
        ),
        (
            "gpu24",
            "04_offload",
            {"pair.big.quantization": "none", "offload.batch_size": 32},
            "offload.batch_size: 1, pair.big.quantization: nf4",
        ),
        (
            "node",
            "04_offload",
            {"hardware.gpu_gb": 16, "hardware.gpus": 5, "pair.big.tensor_parallel": 1, "pair.big.kv_cache_gb": 1},
            "pair.big.quantization: fp8",
        ),
        ("gpu24", "04_offload", {"hardware.gpu_gb": 4}, "smaller models"),
        ("gpu24", "bench", {"bench.batch_sizes": [1, 16, 64]}, "bench.batch_sizes: [1, 16]"),
        ("gpu24", "07_latency", {"hardware.gpu_gb": 17.5, "bench.max_tokens": 3072}, "bench.max_tokens: "),
        ("node", "03_grpo", {"grpo.vllm_kv_cache_gb": 75}, "grpo.vllm_kv_cache_gb: 14.9"),
        ("node", "03_grpo", {"grpo.vllm_kv_cache_gb": 0.1}, "grpo.vllm_kv_cache_gb: 14.9"),
    ],
)
def test_the_change_that_is_named_fits(file, stage, change, named):
    p = params.load(f"params/{file}.yaml", **change)
    with pytest.raises(SrlibError) as error:
        memory.check(p, stage)
    assert named in str(error.value)
    if "fits with" in str(error.value):
        mend = str(error.value).rpartition("fits with ")[2].rpartition(" (")[0]
        change |= dict(params.parse_override(text.replace(": ", "=", 1)) for text in re.split(r", (?=[a-z])", mend))
        memory.check(params.load(f"params/{file}.yaml", **change), stage)


def test_all_weights_take_their_gradients_and_moments(tmp_path):
    """As they are held after a step; in 16 bits a pass has a copy, and several processes hold gradients twice."""
    model = random_model(100, 0)
    model.save_pretrained(tmp_path / "small")
    ids = torch.zeros(1, 4, dtype=torch.long)
    optimizer = torch.optim.AdamW(model.parameters())
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    states = [each for state in optimizer.state.values() for each in (state["exp_avg"], state["exp_avg_sq"])]
    held = [*model.parameters(), *(each.grad for each in model.parameters()), *states]
    plan, whole = of(tmp_path / "small", device="cpu"), sum(each.nbytes for each in held)
    assert plan.weights() + plan.whole(1) == whole
    assert plan.weights() + plan.whole(2) == whole + sum(each.nbytes for each in model.parameters())
    short = of(tmp_path / "small", dtype="bfloat16")
    assert short.weights() + short.whole(1) == whole + 2 * plan.shape.linear


def test_training_of_all_weights_is_planned():
    """In stage 02 alone: 03 trains an adapter."""

    def training(stage, **changes):
        p = params.load("params/gpu24.yaml", **{f"sft.{key}": value for key, value in changes.items()})
        return {kind: gib for each in memory.totals(p, stage).values() for kind, gib in each.items()}

    lora, full = training("02_sft"), training("02_sft", method="full")
    assert lora["training"] < 1 and full["weights"] == lora["weights"]
    assert full["weights"] + full["training"] == pytest.approx((16 * 1.777 + 2 * 1.310) * 1e9 / 2**30, rel=0.001)
    assert full["activations"] < lora["activations"]  # no copy of the embeddings
    assert training("03_grpo", method="full") == training("03_grpo")
    packed = training("02_sft", packing=True)["activations"] - lora["activations"]
    assert packed == pytest.approx(3 * 3584**2 / 2**30)
    with pytest.raises(SrlibError, match="02_sft does not fit: .* fits with sft.method: lora"):
        memory.check(params.load("params/gpu24.yaml", **{"sft.method": "full"}), "02_sft")


def test_bench_and_check_are_planned_as_they_are_run(tmp_path):
    test = write_jsonl(tmp_path / "test.jsonl", [{"id": "0", "prompt": "1+1?", "answer": "2"}])
    changes = {"bench.batch_sizes": [1, 8], "bench.max_tokens": 64, "data.test": str(test)}
    p = params.load("params/gpu24.yaml", **changes)
    small = memory.models(p, "bench")["small"]
    caches = {n.what: n.gib * 2**30 for n in memory.needs(p, ("bench",)) if n.kind == "caches"}
    assert small.tokens == 512 + 64 and caches["small"] == small.cache(8 * 2 * 576)
    caches = {n.what: n.gib * 2**30 for n in memory.needs(p, ("07_latency",)) if n.kind == "caches"}
    assert caches["small"] == small.cache(16 * 2 * 576)
    with pytest.raises(SrlibError, match="bench does not fit"):
        bench.main(p.model_copy(update={"hardware": p.hardware.model_copy(update={"gpu_gb": 4.0})}))


def test_devices():
    held = memory.models(params.load("params/node.yaml"), "04_offload")
    assert held["small"].devices() == ["cuda:0"]
    assert held["big"].devices() == ["cuda:4", "cuda:5", "cuda:6", "cuda:7"]
    assert memory.sequences(held["big"]) == 82
    away = params.load("params/node.yaml", **{"pair.big.url": "http://10.0.0.2:8000"})
    assert {n.device for n in memory.needs(away, ("03_grpo",))} == {f"cuda:{i}" for i in range(4)}
    with pytest.raises(SrlibError, match="there is no cuda:3, as hardware.gpus is 3"):
        memory.check(params.load("params/gpu24.yaml", **{"pair.small.device": "cuda:3", "hardware.gpus": 3}), "02_sft")


def test_the_check_of_the_default_builds_no_model(monkeypatch):
    monkeypatch.setattr(memory, "shape", None)  # asks folders, or the hub, and may have to build a model
    for stage in memory.STAGES:
        memory.check(CPU, stage)
