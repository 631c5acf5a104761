import math
import re
from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from srlib import SrlibError, params
from srlib.annotation import alignment, annotators
from srlib.data import arith, spans
from srlib.data.rows import Problem
from srlib.data.spans import Span
from srlib.engine.protocol import Doubt, Request, Sampling
from srlib.engine.transformers import TransformersEngine, uncertainty
from srlib.engine.vllm import pieces
from srlib.params import ROOT, Annotate, Arith
from tests.conftest import random_model


@given(
    st.lists(st.floats(-5, 5), min_size=1, max_size=60),
    st.floats(0.1, 3),
    st.integers(0, 3),
    st.integers(1, 6),
    st.floats(0.05, 1),
)
def test_choice_keeps_its_budgets(gaps, threshold, merge_gap, size, share):
    config = Annotate(threshold=threshold, merge_gap=merge_gap, max_span_tokens=size, share=0.05, max_share=share)
    chosen = annotators.choose(gaps, config)
    assert all(end - start <= size for start, end in chosen)
    marked = {i for start, end in chosen for i in range(start, end)}
    assert chosen == sorted(chosen)
    assert len(marked) == sum(end - start for start, end in chosen) <= share * len(gaps)
    hard = {i for i, gap in enumerate(gaps) if gap > threshold}
    bridged = {
        i
        for i in marked - hard
        if not (set(range(i - merge_gap, i)) & hard and set(range(i, i + merge_gap + 1)) & hard)
    }
    assert not bridged
    if share == 1 and merge_gap == 0:
        assert marked == hard


def test_choice_prefers_wide_gaps():
    config = Annotate(threshold=0.5, share=0.2, max_share=0.2)
    assert annotators.choose([0.0, 1.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 2.0], config) == [(5, 6), (9, 10)]


def test_gap_is_the_difference_of_two_full_passes(engines, pair, tokenizer):
    problems = list(islice(arith.generate(Arith(min_steps=1, max_steps=5), "traces", 0), 12))
    small, big = engines
    config = Annotate(threshold=2.0, max_share=1.0, batch_size=5)
    rows = {row.id: row for row in annotators.gap(small, big, problems, config)}
    # two prefills a trace: each model has processed each trace exactly once
    total = sum(len(tokenizer.encode(x.prompt)) + len(tokenizer.encode(x.trace)) for x in problems)
    assert small.counters.forward_tokens == big.counters.forward_tokens == total
    assert small.counters.calls == big.counters.calls == 3
    assert any(row.spans for row in rows.values())
    for problem in problems:
        prompt, trace = tokenizer.encode(problem.prompt), tokenizer.encode(problem.trace)
        with torch.no_grad():
            by = [m(torch.tensor([prompt + trace])).logits[0].log_softmax(-1) for m in pair]
        at = range(len(prompt) - 1, len(prompt) + len(trace) - 1)
        gaps = [float(by[1][i, t] - by[0][i, t]) for i, t in zip(at, trace)]
        offsets = tokenizer(problem.trace, return_offsets_mapping=True)["offset_mapping"]
        hard = [Span(*o) for o, g in zip(offsets, gaps) if g > 2.0]
        whole = [Span(*m.span()) for m in re.finditer(r"\d+|\\[a-z]+", problem.trace)]
        hard += [n for n in whole if any(n.start <= s.start < n.end for s in hard)]
        assert rows[problem.id].spans == spans.merge(hard)
        assert spans.strip(rows[problem.id].tagged) == problem.trace


def test_a_number_is_marked_as_a_whole(tokenizer):
    text = "<think>12*34=408;</think>"
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    whole = alignment.units(text, offsets)
    assert [text[offsets[s.start][0] : offsets[s.end - 1][1]] for s in whole] == ["12", "34", "408"]
    gaps = [0.0] * len(offsets)
    gaps[whole[2].start + 1] = 3.0
    assert annotators.choose(gaps, Annotate(threshold=1), whole) == [whole[2]]
    # tokens of several characters, one of them on both sides of a number's end
    assert alignment.units("a12b", [(0, 2), (2, 4)]) == [(0, 2)]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"annotate.tries": 2, "offload.top_k": 1}, "annotate.tries is 2, but at offload.top_k 1 all of them are the"),
        ({"annotate.tries": 2, "annotate.temperature": 0}, "tries is 2, but at temperature 0 all of them are the same"),
        ({"evaluate.samples_per_problem": 4}, "samples_per_problem is 4, but at offload.temperature 0 all of them are"),
        (
            {"evaluate.samples_per_problem": 4, "offload.temperature": 1, "offload.top_k": 1},
            "samples_per_problem is 4, but at offload.top_k 1 all of them are the same",
        ),
        ({"annotate.method": "random", "annotate.share": 0.5}, "share 0.5 is above max_share 0.3, and random may not"),
        (
            {"annotate.method": "judge", "annotate.judge.model": "x", "annotate.share": 0.5, "annotate.compare": []},
            "share 0.5 is above max_share 0.3, and judge may not mark it",
        ),
        (
            {"annotate.judge.local.path": "x", "annotate.judge.temperatures": [0, 0]},
            "temperatures holds 0 more than once, where a model here writes the same answer again",
        ),
    ],
)
def test_what_would_do_nothing_is_refused(given, reason):
    with pytest.raises(SrlibError, match=reason):
        params.load("params/smoke.yaml", **given)


def test_what_draws_is_let_in():
    one = {"annotate.tries": 1, "offload.top_k": 1}
    four = {"evaluate.samples_per_problem": 4}
    for sets in (one, four | {"offload.temperature": 0.6}, four | {"evaluate.protocol": "published"}):
        params.load("params/smoke.yaml", **sets)
    params.load("params/smoke.yaml", **{"annotate.compare": ["entropy"], "annotate.share": 0.5})


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_big_model_may_write_what_the_small_one_is_taught_to_ask_for(path):
    p = params.load(path)
    assert "01_annotate" in p.left_out or p.annotate.max_span_tokens <= p.offload.span_budget


@pytest.mark.parametrize("measure", ["entropy", "margin", "confidence"])
def test_doubt_is_the_same_number_where_a_model_reads_and_where_it_writes(engines, prompts, measure):
    small, _ = engines
    for sampling in (Sampling(), Sampling(0.3), Sampling(3.0, top_k=2, seed=1)):
        for ids in prompts[:4]:
            [*_, exact] = small.doubts([[*ids, 0]], measure)[0]
            for limit, unsure in ((exact - 1e-3, True), (exact + 1e-3, False)):
                sequence = small.open(ids, sampling)
                (request,) = small.run(Request(sequence, max_new=1, doubt=Doubt(measure, limit)))
                assert request.unsure == unsure
                small.close(sequence)
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    p, *others = logits.softmax(-1).sort(descending=True).values.tolist()
    by_hand = {"margin": 1 - p + others[0], "confidence": 1 - p}
    own = by_hand.get(measure, -sum(x * math.log(x) for x in (p, *others)))
    assert uncertainty(measure, logits.log_softmax(-1)[None]).item() == pytest.approx(own)
    for temperature in (0.3, 1.0, 2.5):  # as vLLM gives them
        logprobs = (logits / temperature).log_softmax(-1).tolist()
        assert pieces.uncertainty(measure, logprobs, temperature) == pytest.approx(own)


def test_gap_needs_traces_and_one_vocabulary(engines):
    with pytest.raises(SrlibError, match="Problem 7 has no worked trace"):
        list(annotators.gap(*engines, [Problem(id="7", prompt="?", answer="1")], Annotate()))


def test_gap_needs_one_vocabulary(engines):
    other = arith.tokenizer()
    other.add_tokens(["<other>"])
    foreign = TransformersEngine(random_model(len(other), 3), other)
    problem = Problem(id="1", prompt="1+2?", answer="3", trace="<think>1+2=3;</think>\\boxed{3}")
    with pytest.raises(
        SrlibError, match="do not share a vocabulary: 1 tokens of the big one differ, such as '<other>'"
    ):
        next(annotators.gap(engines[0], foreign, [problem], Annotate()))
