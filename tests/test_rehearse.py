"""Rehearsals: twins that differ in size alone, params that keep their structure, and what is told of the rest."""

import json
import random
import re
from collections import Counter
from math import log
from statistics import fmean

import nbformat
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from srlib import SrlibError
from srlib.__main__ import main
from srlib.data import problems
from srlib.data.rows import write_jsonl
from srlib.params import ROOT, Params, build, load
from srlib.params.reference import settings
from srlib.run import pipeline, rehearse, twins

SHIPPED = ["cpu", "smoke", "gpu16", "gpu24", "node", "released"]
ARCHITECTURES = [
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "mistral",
    "phi3",
    "gemma2",
    "gemma3_text",
    "granite",
    "cohere2",
]
ARCHITECTURES += ["olmo2", "gpt_oss"]


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(twins, "reached", lambda: False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_twin_keeps_what_is_no_size(name):
    config, model = AutoConfig.for_model(name), AutoConfig.for_model(name)
    config.pad_token_id = 0
    twins.narrow(config, 500, 128)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_config(config)(torch.tensor([[1, 2, 3]])).logits
    assert logits.shape == (1, 3, 500)
    for key in ("tie_word_embeddings", "hidden_act", "logit_scale", "final_logit_softcapping", "qk_norm"):
        assert getattr(config, key, None) == getattr(model, key, None)
    ratio = model.num_attention_heads // (model.num_key_value_heads or model.num_attention_heads)
    assert config.num_attention_heads // config.num_key_value_heads == ratio
    assert set(getattr(config, "layer_types", None) or ()) == set(getattr(model, "layer_types", None) or ())
    assert bool(getattr(config, "sliding_window", None)) == bool(getattr(model, "sliding_window", None))
    assert getattr(config, "sliding_window", None) is None or config.sliding_window < 128


def test_the_tokenizer_that_is_trained_is_like_that_of_r1(tmp_path):
    told = []
    twins.make("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", tmp_path, 256, told.append)
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1?"}], add_generation_prompt=True, tokenize=False
    )
    assert asked.startswith(tokenizer.bos_token) and asked.endswith("<think>\n")
    assert len(tokenizer.encode("<think>", add_special_tokens=False)) == 1
    text = "<think>\n7*8=56; é<bigmodel>…</bigmodel></think>\\boxed{56}"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert model.get_input_embeddings().num_embeddings > len(tokenizer) + 2  # as in R1, there are rows for the tags
    assert not model.config.tie_word_embeddings and model.config.num_attention_heads == 6
    assert len(told) == 2 and all("R1-Distill-Qwen-1.5B" in each for each in told)


def test_a_model_of_which_nothing_is_known_has_no_twin(tmp_path):
    with pytest.raises(SrlibError, match="someone/some-model: neither a folder nor the hub gives its configuration"):
        twins.make("someone/some-model", tmp_path, 256, print)


def test_rows_that_are_here_are_cut_and_else_as_they_are(tmp_path):
    rows = [
        {"q": "1+1?", "generations": ["x" * 9000, None], "n": 1.5, "ok": [True, False]},
        {"q": None},
        {"q": "y" * 3},
    ]
    source, file = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source.write_text("\n".join([json.dumps(rows[0]), "{broken", *map(json.dumps, rows[1:])]))
    twins.cut(source, file, 30)
    lines = file.read_text().splitlines()
    assert json.loads(lines[0]) == {**rows[0], "generations": ["x" * 300, None]}
    assert lines[1] == "{broken" and list(map(json.loads, lines[2:])) == rows[1:]


COLUMNS = {"id": "uuid", "prompt": "problem", "trace": "generations", "correct": "correctness_math_verify"}
TOKEN = re.compile(r" ?[A-Za-z]+|\d| ?[^\w\s]+|\s+|\w")  # what a vocabulary that knows the words makes of a text


def openr1(file, n):
    """A set in the shape of OpenR1-Math-220k, whole and half broken rows; returns why rows cannot be used, and lengths.

    Lengths of the generations are log-normal, 5,500 tokens in the mean, to 30,000.
    """
    rng, bad, lengths = random.Random(0), Counter(), []
    corpus = [json.loads(x) for x in (ROOT / "tests" / "data" / "r1_style_traces.jsonl").read_text().splitlines()]
    whole = " ".join(row["message_thinking"] for row in corpus)
    words, token = whole.split(" "), len(whole) / len(TOKEN.findall(whole))  # characters of one

    def text(tokens):
        pieces, left = [], tokens * token
        while left > 0:
            at = rng.randrange(len(words) - 50)
            pieces.append(" ".join(words[at : at + 50]))
            left -= len(pieces[-1]) + 1
        return " ".join(pieces)[: int(tokens * token)]

    def row(number):
        several = rng.choice([1, 2, 2, 4])
        tokens = [min(30_000, int(rng.lognormvariate(log(5500) - 0.7**2 / 2, 0.7))) for _ in range(several)]
        generations = [f"<think>\n{text(t)}\n</think>\n\n\\boxed{{{number}}}" for t in tokens]
        right = [rng.random() < 0.7 for _ in tokens]
        right[rng.randrange(several)] = True
        lengths.append(tokens[right.index(True)])
        problem = f"What is {number}? {text(60)}"
        return {
            "problem": problem, "solution": rng.choice([None, text(100)]), "answer": str(number),
            "problem_type": rng.choice(["Algebra", None]), "question_type": "math-word-problem", "source": "olympiads",
            "uuid": f"u{number}", "is_reasoning_complete": [True] * several, "generations": generations,
            "correctness_math_verify": right, "correctness_llama": rng.choice([None, right]),
            "finish_reasons": rng.choice([None, ["stop"] * several]), "correctness_count": sum(right),
            "messages": [{"role": "user", "content": problem}, {"role": "assistant", "content": generations[0]}],
        }  # fmt: skip

    faults = {
        "no generation is marked right": lambda r: r | {"correctness_math_verify": [False] * len(r["generations"])},
        "no answer": lambda r: r | {"answer": None},
        "no prompt": lambda r: r | {"problem": None},
        "no trace": lambda r: r | {"generations": None},
        "correct has not one mark for each generation": lambda r: r | {"correctness_math_verify": [True] * 9},
        "its id stands twice": lambda r: r | {"uuid": "u1"},
    }
    with file.open("w") as written:
        for number in range(n):
            each = row(number)
            if number % 20 == 10:
                reason = [*faults][number // 20 % len(faults)]
                each = faults[reason](each)
                bad[reason] += 1
                lengths.pop()
            written.write(json.dumps(each) + "\n")
    return bad, lengths


@pytest.mark.notebooks
def test_a_set_in_the_shape_of_openr1_is_rehearsed(tmp_path):
    """Every row that cannot be used is counted, by reason; about as many are too long as really would be."""
    bad, lengths = openr1(tmp_path / "set.jsonl", 2000)
    assert bad.total() == 100 and 5000 < fmean(lengths) < 6000 and max(lengths) > 25_000
    values = load("params/gpu24.yaml", outputs=str(tmp_path)).model_dump()
    values["data"]["traces"] = {"path": str(tmp_path / "set.jsonl"), "columns": COLUMNS}
    others = [{"prompt": f"Is it {i}?", "answer": "1"} for i in range(64)]
    values["data"]["test"] = str(write_jsonl(tmp_path / "test.jsonl", others))
    with pytest.raises(SrlibError, match=r"holds 1900 traces that can be used \(.*\), fewer than the 4000 asked for"):
        rehearse.run(build(values, "it", Params), "params/gpu24.yaml")
    values["annotate"]["n_traces"] = values["grpo"]["n_problems"] = 1900
    p, noted = build(values, "it", Params), []
    q = build(rehearse.scaled(p, tmp_path, noted), "the rehearsal", Params)
    assert f"data.traces: long texts in it are cut, to their length / {p.sft.max_length / rehearse.TOKENS:.1f}" in noted
    assert not pipeline.run(q, only="01_annotate") and not pipeline.run(q, only="02_sft")
    cells = nbformat.read(q.run_dir / "01_annotate" / "01_annotate.ipynb", 4).cells
    printed = "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))
    kept, told = re.search(r"^(\d+) traces; (.*)$", printed, re.MULTILINE).groups()
    counts = {reason: int(n) for n, reason in re.findall(r"(\d+) dropped: ([^;]*)", told)}
    (longer,) = counts.keys() - bad.keys()
    assert longer == "it has more tokens than sft.max_length or a model's context holds (320)"
    assert {reason: counts[reason] for reason in bad} == bad and counts[longer] + int(kept) == rehearse.ROWS
    real = sum(tokens > p.sft.max_length - 100 for tokens in lengths) / len(lengths)  # beside a prompt
    assert counts[longer] / rehearse.ROWS == pytest.approx(real, abs=0.2)
    assert (q.run_dir / "02_sft" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_copy_of_a_named_set_stays_one(tmp_path):
    rows = [{"question": "1+1?", "answer": "It is two. #### 2"}] * 9
    path = write_jsonl(tmp_path / "copy.jsonl", rows)
    p = load("params/smoke.yaml", **{"data.test": f"gsm8k:{path}", "outputs": str(tmp_path)})
    q = build(rehearse.scaled(p, tmp_path, []), "the rehearsal", Params)
    assert [problem.answer for problem in problems.load(q.test)] == ["2"] * 9


def test_every_setting_that_is_scaled_is_one():
    known = {setting.key for setting in settings() if setting.values}
    assert {*rehearse.MOST, *rehearse.LENGTHS, *rehearse.FIRST} <= known


@pytest.mark.parametrize("name", SHIPPED)
def test_the_params_of_a_rehearsal_have_the_structure_of_the_file(name, tmp_path):
    p, noted = load(f"params/{name}.yaml"), []
    q = build(rehearse.scaled(p, tmp_path, noted), "the rehearsal", Params)
    assert [*q.pair.model_dump(exclude_none=True)] == [*p.pair.model_dump(exclude_none=True)]
    for one, other in ((p.pair.small, q.pair.small), (p.pair.big, q.pair.big)):
        assert (one.quantization, one.dtype, one.process, one.merge) == (
            other.quantization, other.dtype, other.process, other.merge,
        )  # fmt: skip
        assert (one.path is None) == (other.path is None)
    assert q.sft.gradient_checkpointing == p.sft.gradient_checkpointing and q.sft.tags == p.sft.tags
    assert q.offload.overlap == p.offload.overlap and bool(q.offload.stream_chunk) == bool(p.offload.stream_chunk)
    assert (q.grpo.rollout, q.grpo.preset, min(2, p.grpo.processes)) == (
        p.grpo.rollout,
        p.grpo.preset,
        q.grpo.processes,
    )
    assert q.evaluate.policies == p.evaluate.policies and pipeline.choose(q) == pipeline.choose(p)
    assert q.offload.max_tokens <= rehearse.TOKENS and q.grpo.max_steps <= 2 and q.hardware.gpus == 0
    told = "\n".join(noted)
    assert ("data.test is made here" in told) == (p.data.test is not None)
    assert ("pair.big is on one device, not on 4" in told) == (name == "node")
    assert ("pair.small is trained in float16 without scaling its losses" in told) == (name == "gpu16")


def test_the_flags_of_the_server_are_those_of_the_comment():
    flags = rehearse._flags((ROOT / "params" / "node.yaml").read_text())
    assert [flag for flag, _ in flags] == [
        "--port",
        "--tensor-parallel-size",
        "--max-model-len",
        "--kv-cache-memory-bytes",
    ]
    assert dict(flags)["--tensor-parallel-size"] == "4"
    assert rehearse._flags("# vllm serve m --enable-x \\\n#   --n 2\nrun: a") == [("--enable-x", ""), ("--n", "2")]


def test_a_stage_that_fails_ends_the_rehearsal_with_its_table(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(pipeline, "run", lambda q, only: asked.append(only) or int(only == "02_sft"))
    assert main(["rehearse", "params/smoke.yaml", "--set", f"outputs={tmp_path}"]) == 1
    assert asked == ["00_arith_pair", "01_annotate", "02_sft"]
    table = capsys.readouterr().out
    assert (
        "01_annotate     went through" in table and "02_sft          failed" in table and "nothing but sizes" in table
    )
    written = yaml.safe_load((tmp_path / "rehearsal-smoke" / "params.yaml").read_text())
    assert written["arith"]["small"]["train_steps"] == 12 and written["run"] == "rehearsal-smoke"
