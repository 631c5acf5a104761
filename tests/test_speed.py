"""The cost dial, the public code's way, and what the clock is compared with: tokens and counts, no seconds."""

import pytest

from srlib import SrlibError, engine
from srlib.cost import simulation, speed
from srlib.cost.costs import Cost
from srlib.cost.jobs import BIG, SMALL, Job, Pipeline, Stretch, drafts, replay
from srlib.cost.latency import Speed
from srlib.data import spans
from srlib.decoding.policies import Always, Learned
from srlib.decoding.published import Published
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import Handover, Trace
from srlib.engine.models import deepen
from srlib.params import ModelSpec, load


@pytest.mark.parametrize("process", [False, True])
def test_inert_layers_are_computed_and_change_no_token(process, folders, engines, prompts, tmp_path):
    spec = deepen(ModelSpec(path=folders[1], process=process), 5, tmp_path / "deep")
    assert spec.process == process and spec.path == str(tmp_path / "deep")
    small, big = engines
    deep = engine.load(spec, 64)
    plain, deeper = (
        Offloader(small, e, policy, max_tokens=24).run(prompts[:12]) for policy in (Learned(),) for e in (big, deep)
    )
    assert [(t.ids, t.owners) for t in plain] == [(t.ids, t.owners) for t in deeper]
    alone = [Offloader(None, e, Always(), max_tokens=24).run(prompts[:12]) for e in (big, deep)]
    for one, other in zip(*alone):
        assert one.ids == other.ids and one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    assert any(t.big_tokens for t in plain)
    if not process:
        layers = deep.model.get_decoder().layers
        assert len(layers) == 2 + 5 == deep.model.config.num_hidden_layers == len(deep._cache.keys)
        assert all(layer.mlp.up_proj.weight.abs().min() > 0 for layer in layers)  # nothing an engine could leave out


def test_without_a_ratio_nothing_is_loaded(monkeypatch):
    monkeypatch.setattr(engine, "load", lambda *_: pytest.fail("loaded"))
    assert speed.run(load("params/smoke.yaml"), [], 1, 1) == []


def test_what_gets_no_inert_layers(folders, tmp_path, monkeypatch):
    from srlib.engine import models

    load_model = models.load_model

    def other(spec):
        model, tokenizer = load_model(spec)
        for layer in model.model.layers:
            layer.mlp = None
        return model, tokenizer

    monkeypatch.setattr(models, "load_model", other)
    with pytest.raises(SrlibError, match="gets no inert layers"):
        deepen(ModelSpec(path=folders[1]), 5, tmp_path / "deep")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize(("chunk", "peek"), [(1, 1), (3, 4)])
@pytest.mark.parametrize("apart", [False, True])
def test_the_public_codes_way_writes_the_same_and_reads_everything_again(chunk, peek, apart, folders, engines, prompts):
    small, big = engines
    if apart:
        big = engine.load(ModelSpec(path=folders[1], process=True), 64)
    how = {"max_tokens": 40, "batch_size": 4, "control_chunk": chunk, "span_budget": 2}
    ours = Offloader(small, big, Learned(), **how).run(prompts[:16])
    theirs = Offloader(small, big, Published(peek=peek), **how).run(prompts[:16])
    assert [(t.ids, t.owners, t.finish) for t in ours] == [(t.ids, t.owners, t.finish) for t in theirs]
    for a, b in zip(ours, theirs):
        assert [h[:3] for h in a.handovers] == [h[:3] for h in b.handovers]
    assert {h.closed_by for t in ours for h in t.handovers} >= {"small", "budget"}
    assert len(small._free) == small.slots  # every sequence is closed
    for t in theirs:
        n, tags, spans_ = len(t.prompt_ids), t.tags, t.handovers
        # Of each text all but the last token, which nobody reads: the small model's stretches, then prefixes of spans.
        begins, ends = [0, *(h.start + h.tokens + 1 for h in spans_)], [*(h.start for h in spans_), len(t.ids)]
        reads = [n + end - 1 for begin, end in zip(begins, ends) if end > begin]
        reads += [n + h.start + i + 1 for h in spans_ for i in range(h.tokens - (h.closed_by == "eos"))]
        reads_big = [n + len(spans.strip(t.ids[: h.start], tags)) + h.tokens - 1 for h in spans_]
        if chunk == 1:  # nothing is dropped, and one token is generated from each prefix
            assert (t.small_forward_tokens, t.big_forward_tokens) == (sum(reads), sum(reads_big))
        assert t.small_forward_tokens >= sum(reads) and t.big_forward_tokens >= sum(reads_big)


def test_a_simulated_span_is_written_in_whole_chunks():
    assert replay("SSBBBSSB", 5, True, chunk=2).stretches == (
        Stretch(SMALL, 2),
        Stretch(BIG, 4, given=1),
        Stretch(SMALL, 1),
        Stretch(BIG, 1),
    )
    assert drafts("SSBBSSSB", 5, 4) == Job(5, (Stretch(BIG, 1, drafted=4),) * 3)


def test_simulated_drafts():
    """Two rounds of three tokens by the small model, a second each, and a pass of ten by the big one."""
    done = simulation.run(Pipeline(Cost(1.0), Cost(10.0), shared=True), [drafts("SSSBSSSB", 5, 3)])
    assert done.passes == {"small": 6, "big": 2} and done.seconds == 26


def test_a_simulated_process():
    """The small model works in the controller's steps; the big one by itself, and behind messages."""
    job = Job(5, (Stretch(SMALL, 7), Stretch(BIG, 3), Stretch(SMALL, 2)))
    one, other = Cost(1.0), Cost(10.0)
    done = simulation.run(Pipeline(one, other, process=True), [job])
    assert done.seconds == 7 + 30 + 2
    assert simulation.run(Pipeline(one, other, process=True, message_s=0.25), [job]).seconds == 39.25
    # an answer of the controller takes half a second: three requests
    assert simulation.run(Pipeline(one, other, process=True, answer_s=0.5), [job]).seconds == 39 + 3 * 0.5
    # Two at a time: while the big model writes for one, the small one writes for the other.
    two = simulation.run(Pipeline(one, other, process=True, slots=2), [job, Job(5, (Stretch(SMALL, 30),))])
    assert two.seconds == 39
    shared = simulation.run(Pipeline(one, other, shared=True, slots=2), [job, Job(5, (Stretch(SMALL, 30),))])
    assert shared.seconds > 39


def test_the_limit_on_a_case_worked_by_hand(engines):
    """A prompt of 4; five tokens by the small model, three by the big one, two by the small one again, no tags."""
    trace = Trace([1, 2, 3, 4], Offloader(*engines, Learned(), max_tokens=9).tags)
    trace.ids, trace.owners = [9] * 10, [SMALL] * 5 + [BIG] * 3 + [SMALL] * 2
    trace.handovers = [Handover(5, 3, "small", 0.0, 0.0)]
    writing, reading = speed._limit([trace], Speed(1.0, 0.1), Speed(10.0, 2.0))
    assert writing == pytest.approx(7 * 1.0 + 3 * 10.0)
    assert reading == pytest.approx((4 + 3) * 0.1 + (4 + 5) * 2.0)


def test_layers_for_a_ratio():
    dial = speed.Dial(small=1.0, big=2.0, layer=0.5)
    assert [dial.layers(ratio) for ratio in (1, 2, 3, 10)] == [0, 0, 2, 16]
