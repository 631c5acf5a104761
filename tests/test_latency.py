"""The latency model, the paper's formula, and the event simulation against the real controller."""

from typing import get_args

import pytest

from srlib import SrlibError
from srlib.cost import costs, latency, planning, simulation
from srlib.cost.costs import Cost
from srlib.cost.jobs import BIG, SMALL, Job, Pipeline, Stretch, even
from srlib.cost.shapes import KNOWN
from srlib.decoding.policies import Always, Learned, Never, Random
from srlib.decoding.scheduler import Offloader
from srlib.params import Latency
from srlib.params.cost import GpuName, ModelSize


def table(big="32B", **changes):
    return latency.pair_speed(Latency(small="1.5B", big=big, **changes))


def paper(share, big="32B", **options):
    return latency.simulate(table(big), share=share, assumptions="paper", **options).seconds


@pytest.mark.parametrize(("share", "times"), [(0.05, 6.31), (0.1, 4.93), (0.2, 3.43), (0.4, 2.13)])
def test_the_papers_speed_ups(share, times):
    assert round(paper(1) / paper(share), 2) == times


def test_what_rounding_did():
    """221 tokens are less than a chunk of 256: the simulator of the paper has no big token in them."""
    assert round(0.0135 * 16_384) == 221
    assert round(paper(1) / paper(0.0135, whole_chunks=True), 2) == 8.76
    assert round(paper(1) / paper(0.0135), 2) == 7.93


def test_the_papers_seconds_for_the_set():
    """749 / 842 / 918 s are one and the same multiple of what the formula gives for a request, with whole chunks.

    How many requests' worth of tokens the set has is not published; one number must do for all three.
    """
    published = {"8B": 749, "14B": 842, "32B": 918}
    one = {big: paper(0.05, big, whole_chunks=True) for big in published}
    least = max((published[big] - 0.5) / one[big] for big in one)
    most = min((published[big] + 0.5) / one[big] for big in one)
    assert least < most
    requests = (least + most) / 2
    assert requests == pytest.approx(5.757, abs=1e-3)
    assert {big: round(requests * seconds) for big, seconds in one.items()} == published


def test_without_the_papers_rounding_no_number_of_requests_fits():
    published = {"8B": 749, "14B": 842, "32B": 918}
    one = {big: paper(0.05, big) for big in published}
    least = max((published[big] - 0.5) / one[big] for big in one)
    assert least > min((published[big] + 0.5) / one[big] for big in one)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.2, 0.4, 1.0])
def test_events_come_near_the_formula_where_nothing_costs(share):
    """One request, nothing shared: what the formula hides, the last chunk before each span, is little."""
    acted = latency.simulate(table(), share=share)
    assert acted.seconds == pytest.approx(paper(share), rel=0.01)
    assert sum(v for k, v in acted.by_cause.items() if k.startswith("big")) == pytest.approx(
        acted.by_model.get("big", 0), rel=1e-9
    )


def test_what_the_formula_leaves_out():
    plain = latency.simulate(table(), share=0.05)
    assert latency.simulate(table(), share=0.05, switch_s=0.5).seconds == pytest.approx(plain.seconds + 6 * 0.5)
    assert latency.simulate(table(), share=0.05, chunk=0).seconds > plain.seconds  # read when asked
    assert latency.simulate(table(), share=0.05, overlap=False).seconds > plain.seconds
    assert latency.simulate(table(), share=0.05, span=16).seconds > plain.seconds
    growing = Pipeline(Cost(base=1 / 141, held=1e-7), Cost(base=1 / 16, held=1e-6))
    still = Pipeline(Cost(base=1 / 141), Cost(base=1 / 16))
    assert latency.simulate(growing, share=0.05).seconds > latency.simulate(still, share=0.05).seconds
    shared = latency.simulate(table(), share=0.05, shared=True)
    assert shared.seconds == pytest.approx(sum(shared.by_model.values()))  # one device, and one request, never idle
    assert shared.seconds > plain.seconds


def test_latency_against_load():
    quiet, busy = (latency.simulate(table(), share=0.05, decode=2048, requests=24, rate=r) for r in (0.01, 10))
    assert len(quiet.latencies) == 24
    assert busy.per_request > quiet.per_request  # they wait for each other
    assert busy.seconds < quiet.seconds
    few = latency.simulate(table(), share=0.05, decode=2048, requests=24, rate=10, slots=1)
    assert few.per_request > busy.per_request
    more = latency.simulate(table(), share=0.05, decode=2048, requests=24, rate=10, slots=1, replicas=4)
    assert more.per_request < few.per_request


def test_all_tokens_are_written():
    """With a second a pass and a pass a token, seconds are counts."""
    second = Cost(base=1.0)
    done = simulation.run(Pipeline(second, second), [Job(5, (Stretch(SMALL, 7), Stretch(BIG, 3), Stretch(SMALL, 2)))])
    assert done.seconds == 12 and done.passes == {"small": 9, "big": 3}
    two = [Job(5, (Stretch(SMALL, 10),), arrival=t) for t in (0.0, 2.5)]
    assert sorted(simulation.run(Pipeline(second, second), two).latencies) == [10.0, 10.5]
    with_slots = simulation.run(Pipeline(second, second, slots=1), two)
    assert sorted(with_slots.latencies) == [10.0, 17.5]
    assert sum(s.tokens for s in even(0.3, 1, 1000, 64).stretches) == 1000
    assert sum(s.tokens for s in even(0.3, 1, 1000, 64).stretches if s.side == BIG) == 300


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "how", [{}, {"switch_s": 0.5}, {"chunk": 0}, {"overlap": False}, {"control_chunk": 0}], ids=str
)
def test_every_way_of_working_together_comes_to_an_end(shared, how):
    """Also where the big model is still reading along when the last request is done."""
    alone = latency.simulate(table(), share=0, decode=2048).seconds
    for share in (0.0135, 0.05, 0.2):
        done = latency.simulate(table(), share=share, decode=2048, requests=3, shared=shared, **how)
        assert len(done.latencies) == 3 and done.seconds > alone
        small, big = (sum(v for k, v in done.by_cause.items() if k.startswith(side)) for side in ("small", "big"))
        assert {"small": small, "big": big} == pytest.approx(done.by_model)


@pytest.mark.parametrize("policy", [Never(), Always(), Learned(), Random(0.3)], ids=lambda p: p.name)
@pytest.mark.parametrize("control_chunk", [1, 3])
def test_the_simulation_makes_the_passes_of_the_real_controller(engines, prompts, policy, control_chunk):
    """From who wrote which token alone: as many forward passes of each model, one trace at a time."""
    small, big = engines
    writer = Offloader(small, big, policy, max_tokens=40, batch_size=1, control_chunk=control_chunk, temperature=1.0)
    for prompt in prompts[:12]:
        before = small.counters.calls, big.counters.calls
        (trace,) = writer.run([prompt])
        real = small.counters.calls - before[0], big.counters.calls - before[1]
        tags = policy.tags
        pipeline = Pipeline(Cost(1.0), Cost(1.0), shared=True, control_chunk=control_chunk if tags else 0)
        made = simulation.run(pipeline, latency._jobs([trace], tags, control_chunk)).passes
        assert abs(made["small"] - real[0]) <= 2 + 0.1 * real[0], (real, made)
        assert abs(made["big"] - real[1]) <= 2 + 0.1 * real[1], (real, made)


def test_the_passes_of_a_batch(engines, prompts):
    small, big = engines
    writer = Offloader(small, big, Random(0.3), max_tokens=40, batch_size=16, temperature=1.0)
    traces = writer.run(prompts)
    pipeline = Pipeline(Cost(1.0), Cost(1.0), shared=True, slots=16)
    made = simulation.run(pipeline, latency._jobs(traces, False)).passes
    assert made["small"] == pytest.approx(small.counters.calls, rel=0.1)
    assert made["big"] == pytest.approx(big.counters.calls, rel=0.1)


def test_a_data_sheet_comes_near_the_papers_table():
    """The 32B of the table is taken to have two cards: one does not hold it."""
    for name, devices in (("1.5B", 1), ("7B", 1), ("14B", 1), ("32B", 2)):
        decode, prefill = latency.TABLES["a6000"][name]
        cost = costs.roofline("a6000", name, devices)
        assert 1 / cost.seconds(1, 1) == pytest.approx(decode, rel=0.25)
        assert 1 / cost.token == pytest.approx(prefill, rel=0.3)
    with pytest.raises(SrlibError, match="did you mean 'h100'"):
        costs.roofline("h1000", "7B")
    speed = latency.pair_speed(Latency(source="roofline", gpu="h100", small="1.5B", big="32B"))
    assert speed.big.decode > speed.small.decode


class Timed:
    """An engine whose passes take known seconds of its own clock; at every fiftieth, `hiccup` more."""

    slots = 64

    def __init__(self, fixed, each, token, hiccup=0.0):
        self.cost, self.hiccup, self.now, self.passes = (fixed, each, token), hiccup, 0.0, 0

    def open(self, ids):
        return ids

    def close(self, sequence):
        pass

    def run(self, *requests):
        """What is fed goes into the first pass; each further token takes one more."""
        fed = sum(len(request.feed) or 1 for request in requests)
        for tokens in [fed, *[len(requests)] * (requests[0].max_new - 1)]:
            fixed, each, token = self.cost
            self.passes += 1
            self.now += fixed + each * len(requests) + token * tokens + self.hiccup * (self.passes % 50 == 0)


@pytest.mark.parametrize("known", [(3e-3, 2e-4, 5e-5), (1e-3, 0.0, 1e-4), (0.0, 1e-3, 0.0)])
def test_measuring_finds_the_costs_that_an_engine_has(known):
    engine = Timed(*known)
    cost = costs.measure(engine, clock=lambda: engine.now)
    assert (cost.fixed, cost.each, cost.token) == pytest.approx(known, abs=1e-9)
    assert cost.seconds(4, 16) == pytest.approx(known[0] + 4 * known[1] + 16 * known[2])


def test_a_median_keeps_hiccups_out_of_the_costs():
    engine = Timed(3e-3, 2e-4, 5e-5, hiccup=1.0)
    cost = costs.measure(engine, reads=(1, 8, 32), clock=lambda: engine.now)
    assert (cost.fixed, cost.each, cost.token) == pytest.approx((3e-3, 2e-4, 5e-5), rel=1e-6)


def test_the_costs_of_a_real_engine_have_no_negative_part(engines):
    cost = costs.measure(engines[0], batches=(1, 4), reads=(1, 4), repeats=1)
    assert min(cost.fixed, cost.each, cost.token) >= 0
    assert cost.seconds(4, 16) >= cost.seconds(1, 1) > 0


def test_check_compares_prediction_and_clock(engines, prompts):
    policies = [Always("big"), Learned(), Random(0.3)]
    rows = latency.check(*engines, prompts[:4], {"max_tokens": 16}, policies, batches=(1, 4), repeats=1)
    assert [(r["batch"], r["policy"]) for r in rows] == [(b, p.name) for b in (1, 4) for p in policies]
    assert all(r["measured_s"] > 0 and r["predicted_s"] > 0 for r in rows)
    for r in rows:  # of one repeat, all three are the same
        assert r["lowest"] == r["ratio"] == r["highest"] == pytest.approx(r["predicted_s"] / r["measured_s"])
        assert r["offload_share"] == 1 if r["policy"] == "big" else 0 < r["offload_share"] < 1


def test_params_name_what_the_tables_have():
    assert set(get_args(GpuName)) == set(costs.GPUS)
    assert {size.lower() for size in get_args(ModelSize)} == set(KNOWN)
    assert all(set(table) == set(get_args(ModelSize)) for table in latency.TABLES.values())
    assert KNOWN["8b"].parameters == pytest.approx(8.03e9, rel=1e-3)
    assert KNOWN["70b"].parameters == pytest.approx(70.55e9, rel=1e-3)


def test_a_handover_slows_a_group_of_gpus_down():
    quick, slow = (
        planning.group("h100", "1.5B", "32B", planning.Load(0.2, 20_000, 2000, 100, seconds), 1, 1)
        for seconds in (0.0, 1.0)
    )
    assert slow.latency_s > quick.latency_s + 2 and slow.per_s < quick.per_s
    alone = [
        planning.group("h100", "1.5B", "32B", planning.Load(0.2, 20_000, 2000, 100, seconds), 1, 0)
        for seconds in (0.0, 1.0)
    ]
    assert alone[0] == alone[1]


def test_errors():
    with pytest.raises(SrlibError, match="share is 1.5"):
        latency.simulate(table(), share=1.5)
    with pytest.raises(SrlibError, match="one request"):
        latency.simulate(table(), share=0.1, assumptions="paper", requests=4)
