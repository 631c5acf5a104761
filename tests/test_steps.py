"""Policies that go by step: who writes one, and what decides it."""

import pytest

from srlib.decoding.policies import Always, Glimpse, Never, SpecReason
from srlib.decoding.scheduler import Offloader
from srlib.decoding.steps import starts
from srlib.decoding.trace import BIG, SMALL
from srlib.engine.transformers import TransformersEngine
from tests.conftest import random_model

ENDS = (";", "?")


@pytest.fixture(scope="module")
def models(tokenizer):
    """Two that write the ends of steps often, and no tags."""
    loud = tuple(tokenizer.convert_tokens_to_ids([*ENDS, "<|endoftext|>"]))
    return [random_model(len(tokenizer) - 2, seed, loud=loud) for seed in (7, 8)]


@pytest.fixture
def two(models, tokenizer):
    return [TransformersEngine(model, tokenizer, slots=32) for model in models]


def write(two, policy, prompts, **how):
    return Offloader(*two, policy, max_tokens=32, **how).run(prompts)


def ids(traces):
    return [(trace.ids, trace.owners) for trace in traces]


def steps(trace, tokenizer):
    """Begin and end of each step, and who wrote it: one model alone."""
    places = starts(trace.ids, tokenizer, ENDS)
    for start, end in zip(places, [*places[1:], len(trace.ids)]):
        (owner,) = set(trace.owners[start:end])
        yield start, end, owner


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "stream_chunk": 2}])
@pytest.mark.parametrize("kind", [Glimpse, SpecReason])
def test_at_its_ends_one_model_writes_it_all(two, prompts, kind, how):
    assert ids(write(two, kind(1e9, ENDS), prompts[:16], **how)) == ids(write(two, Never(), prompts[:16], **how))
    assert ids(write(two, kind(-1.0, ENDS), prompts[:16], **how)) == ids(write(two, Always(), prompts[:16], **how))


def test_a_step_is_the_big_models_where_the_small_one_doubts_its_first_token(two, prompts, tokenizer):
    small, _ = two
    seen = set()
    for trace in write(two, Glimpse(2.5, ENDS), prompts[:24]):
        ((*doubts,),) = small.doubts([trace.prompt_ids + trace.ids])
        for start, _, owner in steps(trace, tokenizer):
            assert owner == (BIG if doubts[len(trace.prompt_ids) - 1 + start] > 2.5 else SMALL)
            seen.add((owner, start > 0))
    assert {(BIG, True), (SMALL, True)} <= seen


def test_a_step_that_the_big_model_finds_unlikely_is_its_own(two, prompts, tokenizer):
    small, big = two
    traces = write(two, SpecReason(8.0, ENDS), prompts[:24])
    kept = big.counters.forward_tokens - big.counters.discarded_tokens
    assert kept <= sum(trace.least_forward_tokens for trace in traces)  # it reads each token once, and what it refuses
    seen = set()
    for trace in traces:
        ((*scores,),) = big.score([trace.prompt_ids + trace.ids])
        behind = scores[len(trace.prompt_ids) - 1 :]
        for start, end, owner in steps(trace, tokenizer):
            surprise = -sum(behind[start:end]) / (end - start)
            if owner == BIG:  # what the small model wrote there first
                begun = [(trace.ids[:start], trace.owners[:start])]
                (own,) = Offloader(*two, Never(), max_tokens=32).run([trace.prompt_ids], begun=begun)
                places = [*starts(own.ids[start:], tokenizer, ENDS)[1:2], len(own.ids) - start]
                draft = own.ids[start : start + places[0]]
                (read,) = big.score([trace.prompt_ids + trace.ids[:start] + draft])
                surprise = -sum(read[-len(draft) :]) / len(draft)
            assert (surprise > 8.0) == (owner == BIG)
            seen.add((owner, start > 0))
    assert {(BIG, True), (SMALL, True)} <= seen


def test_a_tag_of_the_small_model_is_no_part_of_a_step(engines, prompts, tokenizer):
    """The big model does not know it."""
    tags = {*tokenizer.convert_tokens_to_ids(["<bigmodel>", "</bigmodel>"])}
    assert any(tags & {*trace.ids} for trace in Offloader(*engines, Never(), max_tokens=24).run(prompts[:16]))
    for trace in Offloader(*engines, SpecReason(1e9, ENDS), max_tokens=24).run(prompts[:16]):
        assert trace.ids and not tags & {*trace.ids} and trace.finish
