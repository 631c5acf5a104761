"""The scheduler stays open: prompts come, are followed, are cancelled and fail while others are written."""

import random
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srlib import Offloader, SrlibError, engine
from srlib.decoding.policies import Always, Learned, Never, Random
from srlib.decoding.trace import BIG, SMALL
from srlib.engine.transformers import TransformersEngine
from srlib.params import ModelSpec
from tests.test_offload import Scripted

HOW = {"max_tokens": 24, "span_budget": 4, "batch_size": 16, "oversubscribe": 0.25}


@dataclass(frozen=True)
class Breaks(Learned):
    """Raises behind some requests of the prompts whose first ids are these."""

    on: frozenset = frozenset()
    name: str = "breaks"

    def write(self, writer):
        waits = 2 if tuple(writer.trace.prompt_ids) in self.on else -1
        for request in super().write(writer):
            if waits == 0:
                raise ValueError("this prompt is not for me")
            waits -= 1
            yield request


def kept(trace):
    return trace.ids, trace.owners, trace.finish


@pytest.fixture(scope="module", params=["steps", "process"])
def both(request, pair, tokenizer, folders):
    """The pair in engines that work in steps, or with the big model in a process of its own."""
    small, big = (TransformersEngine(model, tokenizer, slots=24) for model in pair)
    if request.param == "steps":
        yield small, big
    else:
        beside = engine.load(ModelSpec(path=folders[1], process=True), slots=24)
        yield small, beside
        beside.shutdown()


def free(both):
    """Slots that are free."""
    return [len(e._free) if hasattr(e, "_free") else e.slots - e._open for e in both]


@pytest.fixture(scope="module")
def many(prompts):
    """200 prompts, no two alike."""
    made = {tuple(a + b): None for a in prompts for b in prompts[:4]}
    return [list(ids) for ids in made][:200]


@pytest.fixture(scope="module")
def expected(both, many):
    """What `run` writes for them."""
    return {tuple(ids): kept(t) for ids, t in zip(many, Offloader(*both, Learned(), **HOW).run(many))}


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_prompts_come_and_go_and_fail_and_the_others_do_not_notice(both, many, expected, seed):
    rng = random.Random(seed)
    asked = rng.sample(many, 200)
    breaking = {tuple(ids) for ids in asked[:10]}
    asked[10:15], asked[15:20] = [[]] * 5, [[*ids, 10**6] for ids in asked[15:20]]
    doomed = {place: rng.choice([0, 1, 3, 6]) for place in rng.sample(range(20, 200), 66)}  # after so many tokens
    writer = Offloader(*both, Breaks(on=frozenset(breaking)), **HOW)
    order = rng.sample(range(200), 200)
    jobs, cancelled, ended = {}, set(), set()
    while len(ended) < 200:
        for _ in range(rng.choice([0, 0, 1, 5, 20])):
            if order:
                place = order.pop()
                jobs[place] = writer.submit(asked[place])
        for place in doomed.keys() & jobs.keys() - cancelled:
            if not jobs[place].done and len(jobs[place].writer.written[0]) >= doomed[place]:
                writer.cancel(jobs[place])
                cancelled.add(place)
        ended |= {place for job in writer.step() for place in jobs if jobs[place] is job}
    assert writer.idle and free(both) == [24, 24] and not any(e.pending for e in both if not e.running)
    for place, job in jobs.items():
        trace = job.trace
        if place < 10:
            whole = expected[tuple(asked[place])]
            assert trace.finish == "error" and "this prompt is not for me" in trace.error or kept(trace) == whole
        elif place < 20:
            assert trace.finish == "error" and ("empty" if place < 15 else "1000000") in trace.error
        elif place in cancelled:
            ids, owners, _ = expected[tuple(asked[place])]
            assert trace.finish == "cancelled"
            assert (trace.ids, trace.owners) == (ids[: len(trace.ids)], owners[: len(trace.ids)])
        else:
            assert kept(trace) == expected[tuple(asked[place])]
    finishes = [job.trace.finish for job in jobs.values()]
    assert finishes.count("cancelled") == len(cancelled) > 20 and finishes.count("error") > 10
    assert sum(len(jobs[place].trace.ids) > 0 for place in cancelled) > 5  # midway


def test_what_is_followed_is_what_is_written(both, many, expected):
    """Two are followed in turn, token by token, while others are written; nothing is shown and taken back."""
    writer = Offloader(*both, Learned(), control_chunk=3, **HOW)
    others = [writer.submit(ids) for ids in many[2:12]]
    jobs = [writer.submit(ids, live=True) for ids in many[:2]]
    shown = [([], [], []) for _ in jobs]
    streams = list(zip([writer.follow(job) for job in jobs], shown))
    while streams:
        for stream, (ids, owners, sizes) in streams[:]:
            some, whose = next(stream, (None, None))
            if some is None:
                streams = [each for each in streams if each[0] is not stream]
                continue
            ids += some
            owners += whose
            sizes.append(len(some))
    while not writer.idle:
        writer.step()
    assert all(kept(job.trace) == expected[tuple(job.trace.prompt_ids)] for job in (*jobs, *others))
    for job, (ids, owners, sizes) in zip(jobs, shown):
        assert (ids, owners) == (job.trace.ids, job.trace.owners)
        assert max(sizes) <= 6  # of some 24 tokens: they come as they are written
    assert free(both) == [24, 24]


@pytest.mark.parametrize("live", [True, False])
def test_a_process_tells_of_each_token_where_it_is_followed(folders, prompts, live):
    """And of none where it is not: then its answers come when they are done."""
    beside = engine.load(ModelSpec(path=folders[1], process=True), slots=4)
    writer = Offloader(None, beside, Always(), max_tokens=24)
    whole = max(writer.run(prompts), key=lambda trace: len(trace.ids))
    job = writer.submit(whole.prompt_ids, live=live)
    pieces = [ids for ids, _ in writer.follow(job)]
    assert sum(pieces, []) == job.trace.ids == whole.ids and len(whole.ids) > 8
    assert (len(pieces) > len(whole.ids) / 4) is live
    job = writer.submit(whole.prompt_ids, live=live)
    next(writer.follow(job))  # cancelled midway, what was told is kept
    writer.cancel(job)
    assert job.trace.ids == whole.ids[: len(job.trace.ids)] and beside._open == 0
    beside.shutdown()


def test_a_job_is_in_the_trace_as_far_as_it_was_shown_when_it_is_cancelled(both, many, expected):
    writer = Offloader(*both, Learned(), **HOW)
    long = next(ids for ids in many if len(expected[tuple(ids)][0]) > 10)
    job = writer.submit(long, live=True)
    stream = writer.follow(job)
    shown = []
    while len(shown) < 5:
        shown += next(stream)[0]
    writer.cancel(job)
    writer.cancel(job)  # once more does nothing
    assert job.done and job.trace.finish == "cancelled" and job.trace.ids[: len(shown)] == shown
    assert job.trace.ids == expected[tuple(long)][0][: len(job.trace.ids)]
    assert len(job.trace.ids) == len(job.trace.owners) == len(job.trace.logprobs)
    assert writer.step() == [job] and writer.step() == [] and free(both) == [24, 24]


def test_run_beside_what_was_submitted(both, many, expected):
    """`run` waits for its own prompts, and takes the others along."""
    writer = Offloader(*both, Learned(), **HOW)
    job = writer.submit(many[0])
    traces = writer.run(many[1:20])
    assert [kept(t) for t in traces] == [expected[tuple(ids)] for ids in many[1:20]]
    while not job.done:
        writer.step()
    assert kept(job.trace) == expected[tuple(many[0])] and free(both) == [24, 24]


def test_an_interrupt_gives_every_slot_back(both, many):
    @dataclass(frozen=True)
    class Interrupted(Learned):
        name: str = "interrupted"

        def write(self, writer):
            if tuple(writer.trace.prompt_ids) == tuple(many[30]):
                raise KeyboardInterrupt
            yield from super().write(writer)

    with pytest.raises(KeyboardInterrupt):
        Offloader(*both, Interrupted(), **HOW).run(many)
    assert free(both) == [24, 24] and not any(e.pending for e in both if not e.running)


@pytest.mark.parametrize("k", [1, 3, 9])
@pytest.mark.parametrize("side", [0, 1])
def test_an_engine_that_fails_at_one_call(pair, tokenizer, prompts, expected_of_64, k, side, monkeypatch):
    """Out of memory at the k-th pass: what was asked then ends with an error, the others as if nothing were."""
    engines = [TransformersEngine(model, tokenizer, slots=64) for model in pair]
    forward, calls = engines[side]._forward, []

    def failing(sequences):
        calls.append(len(sequences))
        if len(calls) == k:
            raise MemoryError("16 GiB are not there")
        return forward(sequences)

    monkeypatch.setattr(engines[side], "_forward", failing)
    writer = Offloader(*engines, Learned(), max_tokens=24, span_budget=4, batch_size=16)
    traces = writer.run(prompts)
    failed = [t for t in traces if t.finish == "error"]
    assert 0 < len(failed) <= 16
    assert all("MemoryError while a model was at work: 16 GiB are not there" in t.error for t in failed)
    assert all(kept(t) == e for t, e in zip(traces, expected_of_64) if t.finish != "error")
    assert free(engines) == [64, 64]
    with pytest.raises(SrlibError, match="of 64 traces failed: MemoryError") as caught:
        writer.raise_if_failed(traces)
    assert isinstance(caught.value.__cause__.__cause__, MemoryError)


@pytest.fixture(scope="module")
def expected_of_64(pair, tokenizer, prompts):
    engines = [TransformersEngine(model, tokenizer, slots=64) for model in pair]
    writer = Offloader(*engines, Learned(), max_tokens=24, span_budget=4, batch_size=16)
    return [kept(t) for t in writer.run(prompts)]


def test_a_number_is_a_sample(both, many):
    writer = Offloader(*both, Random(0.5, 2), temperature=1.0, **HOW)
    several = writer.run([many[0]] * 3)
    jobs = [writer.submit(many[0], number=n) for n in (2, 0, 1)]
    while not writer.idle:
        writer.step()
    assert [kept(job.trace) for job in jobs] == [kept(several[n]) for n in (2, 0, 1)]
    assert len({tuple(t.ids) for t in several}) == 3


def test_a_policy_says_which_models_it_asks(tokenizer):
    """An engine that a policy does not ask is left alone, even where it is given; one that it asks must be there."""
    small, big = Scripted(tokenizer, lambda n: 10), Scripted(tokenizer, lambda n: 20)
    for policy, owner in ((Never(), SMALL), (Always(), BIG)):
        (trace,) = Offloader(small, big, policy, max_tokens=4).run([[50]])
        assert set(trace.owners) == {owner}
    assert not small.read[1:] and not big.read[1:]
    with pytest.raises(SrlibError, match="learned asks the big model; give its engine"):
        Offloader(small, None, Learned(), max_tokens=4)
