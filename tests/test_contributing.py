"""The examples of the README run as they stand, one behind the other, on tiny models."""

import re

import pytest
import yaml

from srlib import Offloader
from srlib.data import arith
from srlib.data.rows import Annotated, read_jsonl
from srlib.decoding.policies import Learned
from srlib.decoding.trace import BIG, SMALL
from srlib.params import ROOT, Arith, Grpo, training
from srlib.run.pipeline import require
from srlib.training.rewards import REWARDS, Rollout, weights
from srlib.training.sft import example

PROMPT = "37+5*7-8?"


@pytest.fixture(scope="module")
def names(pair, tokenizer, tmp_path_factory):
    """What the blocks have defined in the end; the params file that the first one names is one of tiny models."""
    folder = tmp_path_factory.mktemp("contributing")
    for side, model in zip(("small", "big"), pair):
        model.save_pretrained(folder / side)
        tokenizer.save_pretrained(folder / side)
    places = {"small": folder / "small", "big": folder / "big", "tuned": folder / "small"}
    values = yaml.safe_load((ROOT / "params" / "smoke.yaml").read_text())
    values |= {"outputs": str(folder), "pair": {side: {"path": str(path)} for side, path in places.items()}}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    (folder / "smoke" / "00_arith_pair").mkdir(parents=True)
    config = Arith(**values["arith"])
    arith.write_problems(config, 0, folder / "smoke" / "00_arith_pair")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5 and '"params/cpu.yaml"' in blocks[0]
    blocks[0] = blocks[0].replace('"params/cpu.yaml"', repr(str(folder / "tiny.yaml")))
    scope: dict = {}
    kept = dict(REWARDS)
    try:
        for block in blocks:
            exec(block, scope)
        yield scope
    finally:
        REWARDS.clear()
        REWARDS.update(kept)
        training.REGISTERED.clear()


def test_the_package(names):
    assert names["trace"].ids and names["trace"].finish in ("eos", "length")
    assert names["job"].done and names["ids"] and names["job"].trace.ids[-len(names["ids"]) :] == names["ids"]


def test_a_policy(names, prompts):
    assert len(names["turns"]) == 1
    traces = Offloader(names["small"], names["big"], names["Turns"](), max_tokens=96).run(prompts)
    for trace in traces:
        assert trace.owners == [(SMALL if i % 10 < 8 else BIG) for i in range(len(trace.ids))]
    assert max(len(trace.handovers) for trace in traces) > 1


def test_a_reward(names):
    assert weights(Grpo(reward_weights={"brief": 0.5}))["brief"] == 0.5
    some = [Rollout("", True, "g", 10, tokens, 0, 0, True, 100, tokens) for tokens in (0, 25, 100)]
    assert REWARDS["brief"](some, None) == [1.0, 0.75, 0.0]


def test_an_annotator(names, tokenizer):
    p = names["p"]
    mine = p.run_dir / "products.jsonl"
    p = p.model_copy(update={"sft": p.sft.model_copy(update={"annotated": str(mine)})})
    rows = read_jsonl(p.annotated, Annotated)
    assert len(rows) == p.arith.n_traces
    for row in rows:
        assert [row.trace[start:end] for start, end in row.spans] == re.findall(r"\*\d+=(\d+);", row.trace)
    marked = next(row for row in rows if row.spans)
    assert tokenizer.convert_tokens_to_ids("<bigmodel>") in example(tokenizer, marked)["labels"]
    assert p.annotated == mine
    require(p, "02_sft")  # stage 02 takes it


def test_an_engine(names, capsys):
    p, tuned, big = names["p"], names["small"], names["big"]
    assert names["told"][0].ids == Offloader(tuned, big, Learned(), max_tokens=96).run([PROMPT])[0].ids
    again = names["Told"](*names["models"].load_model(p.big))
    Offloader(None, again, names["policies"].Always(), max_tokens=4).run([PROMPT])
    assert capsys.readouterr().out == "reads 9, writes up to 4\n"
