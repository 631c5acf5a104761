"""An engine in a process of its own does what it does here, and its end is told."""

from multiprocessing.connection import wait

import pytest

from srlib import SrlibError, engine
from srlib.decoding.policies import Always, Learned, Random, Speculative, Unsure
from srlib.decoding.scheduler import Offloader
from srlib.engine import Request, Sampling
from srlib.engine.process import ProcessEngine
from srlib.params import ModelSpec


@pytest.fixture(scope="module")
def apart(folders):
    """Both models of the pair, each in a process."""
    made = [engine.load(ModelSpec(path=folder, process=True)) for folder in folders]
    yield made
    for each in made:
        each.shutdown()


def ids(traces):
    return [(t.ids, t.owners, t.finish) for t in traces]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "policy", [Learned(), Random(0.3, 4), Unsure("entropy", 3.0, 3), Speculative(3)], ids=lambda p: p.name
)
@pytest.mark.parametrize("how", [{}, {"stream_chunk": 3}, {"overlap": True}])
def test_one_or_both_in_processes_change_no_token(engines, apart, prompts, policy, temperature, how):
    settings = {"max_tokens": 32, "span_budget": 6, "control_chunk": 2, "temperature": temperature}
    here = Offloader(*engines, policy, **settings).run(prompts)
    for pair in ((engines[0], apart[1]), apart):
        there = Offloader(*pair, policy, **settings, **how).run(prompts)
        # Other batches round otherwise, which moves a draw that lies on the very border of two tokens.
        assert sum(a != b for a, b in zip(ids(there), ids(here))) <= 1
        assert all(e._open == 0 and not e._under_way for e in pair if e.running)
    assert all(len(e._free) == e.slots for e in engines)


def test_requests_scores_and_counters(engines, apart, prompts):
    here, there = engines[0], apart[0]
    assert (there.context, there.eos) == (here.context, here.eos)
    before = there.counters.forward_tokens
    answers = []
    for e in (here, there):
        s = e.open(prompts[0][:2], Sampling(0.8, 0.9, 20, seed=3))
        (first,) = e.run(Request(s, feed=prompts[0][2:], max_new=5, banned=tuple(range(50))))
        e.truncate(s, len(prompts[0]) + 2)
        (second,) = e.run(Request(s, feed=[5, 6, 7], ask=2, watch=9))
        answers.append((first.ids, second.own, s.ids, s.forwarded))
        assert len(first.logprobs) == len(first.ids) and len(second.watched) == 2
        e.close(s)
    assert answers[0] == answers[1] and min(answers[0][0]) >= 50
    assert there.counters.forward_tokens - before == answers[1][3]
    for method, how in (("score", ()), ("doubts", ()), ("doubts", ("margin",))):
        a, b = (getattr(e, method)(prompts[:3], *how) for e in (here, there))
        assert [pytest.approx(row, abs=1e-4) for row in a] == b
    with pytest.raises(SrlibError, match="IndexError while a model was at work"):
        there.score([[10**6, 1]])


def test_a_cancelled_request_is_not_answered(apart, prompts):
    model = apart[0]
    s = model.open(prompts[0])
    request = model.submit(Request(s, max_new=200))
    model.cancel(request)
    assert s.ids == prompts[0]
    (again,) = model.run(Request(s, max_new=3))
    (other,) = model.run(Request(model.open(prompts[0]), max_new=3))
    assert again.ids == other.ids and not request.ids and not model._under_way
    model.close(s)
    model.close(other.sequence)


def test_two_full_pipes_do_not_wait_for_each_other(apart, prompts):
    model = apart[0]
    sequences = [model.open(prompts[0], Sampling(1.0, seed=i)) for i in range(60)]
    requests = [model.submit(Request(s, max_new=200)) for s in sequences]
    model.flush()
    assert wait([model.ready], 60)  # more than a pipe holds is on its way here
    for _ in range(20_000):  # as much goes there
        model.truncate(sequences[0], 10**6)
    model.flush()
    while any(not r.ids for r in requests):
        assert wait([model.ready], 60)
        model.collect()
    assert all(len(r.ids) == 200 for r in requests)
    for s in sequences:
        model.close(s)


def test_a_killed_process_ends_its_traces_with_one_error(engines, folders, prompts):
    big = ProcessEngine(ModelSpec(path=folders[1], process=True), 64)
    writer = Offloader(engines[0], big, Learned(), max_tokens=32, span_budget=4)
    assert all(not t.error for t in writer.run(prompts))
    big._process.kill()
    traces = writer.run(prompts)
    assert {t.finish for t in traces} > {"error"}
    assert len({t.error for t in traces if t.error}) == 1
    with pytest.raises(SrlibError, match=r"traces failed: The process of .*big has ended \(code -9\); load it again"):
        writer.raise_if_failed(traces)
    with pytest.raises(SrlibError, match="has ended"):
        big.score(prompts[:1])
    assert len(engines[0]._free) == engines[0].slots
    again = engine.load(big.spec)
    assert all(not t.error for t in Offloader(None, again, Always(), max_tokens=4).run(prompts))
    again.shutdown()
    assert again._process.poll() is not None


def test_what_cannot_be_loaded_is_told(folders, tmp_path):
    with pytest.raises(SrlibError, match="There is no model in"):
        engine.load(ModelSpec(path=str(tmp_path), process=True))
    with pytest.raises(SrlibError, match="device is cuda, but torch sees no GPU"):
        engine.load(ModelSpec(path=folders[1], process=True, device="cuda"))
    with pytest.raises(ValueError, match="process needs engine: transformers"):
        ModelSpec(engine="vllm", process=True)
