"""What reinforcement takes the small model's decisions for, against a plain pass of the model."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from srlib.data import arith
from srlib.data.spans import Tags
from srlib.decoding.policies import Learned
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import BIG
from srlib.engine.adapters import add_tags
from srlib.engine.models import fit_embeddings
from srlib.engine.transformers import TransformersEngine
from srlib.training.credit import Credited, decided, went_on
from tests.conftest import random_model
from tests.test_grpo import decisions

T = 0.8  # temperature of the rollouts


@pytest.fixture(scope="module")
def written():
    """Traces of a small model that opens and closes spans, and the model."""
    tokenizer = arith.tokenizer()
    model = random_model(len(tokenizer), 1, loud=(0,))
    tags = add_tags(tokenizer)
    torch.manual_seed(0)
    fit_embeddings(model, tokenizer)
    with torch.no_grad():
        model.get_output_embeddings().weight[tags] = 0.7 * torch.randn(2, 64)
    engines = TransformersEngine(model, tokenizer), TransformersEngine(random_model(98, 2), arith.tokenizer())
    offloader = Offloader(*engines, Learned(), max_tokens=40, span_budget=5, temperature=T)
    return model, offloader.run(["3+4*5?", "9*9?", "7-2?", "1*2*3?"] * 4)


@pytest.fixture
def trainer():
    """As much of one as gives log-probabilities."""
    made = Credited.__new__(Credited)
    made.temperature = T
    made.accelerator = SimpleNamespace(unwrap_model=lambda model: model, autocast=nullcontext, is_main_process=True)
    return made


def given(trainer, model, trace):
    ids = torch.tensor([trace.prompt_ids + trace.ids])
    found, *_ = trainer._get_per_token_logps_and_entropies(model, ids, torch.ones_like(ids), len(trace.ids))
    return found[0]


def test_decisions_have_their_probability_and_its_gradient(written, trainer):
    """Of what is decided at each place: the value, and what it does to every weight; the big model's token is no part of it."""
    model, traces = written
    add_fused_lm_head(model, temperature=T, outputs=("log_probs", "entropy"))
    waits = 0
    for trace in traces:
        trainer.closes_as = trace.tags
        exact = decisions(model, trace, T)
        with torch.no_grad():
            plain = model(torch.tensor([trace.prompt_ids + trace.ids])).logits[0] / T
        certain = plain.softmax(-1)[len(trace.prompt_ids) - 1 : -1, trace.tags.close[0]] > 0.9  # 1 - p has few digits
        known = ~exact.isnan() & ~certain
        found = given(trainer, model, trace)
        assert torch.allclose(found[known], exact[known], atol=1e-4)
        grads = []
        for values in (exact, found):
            model.zero_grad()
            values[known].sum().backward()
            grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert (grads[0] - grads[1]).norm() < 1e-3 * grads[0].norm()
        waits += sum(went_on(trace))
    assert waits > 20 and any(h.closed_by == "small" for trace in traces for h in trace.handovers)
    trainer.closes_as = None  # a token is a token
    plain = given(trainer, model, traces[0])
    alone = GRPOTrainer._get_per_token_logps_and_entropies
    ids = torch.tensor([traces[0].prompt_ids + traces[0].ids])
    assert torch.equal(plain, alone(trainer, model, ids, torch.ones_like(ids), len(traces[0].ids))[0][0])


def test_another_token_of_the_big_model_is_the_same_decision(written, trainer):
    """In its own place it changes nothing; only what is decided behind it may."""
    model, traces = written
    add_fused_lm_head(model, temperature=T, outputs=("log_probs", "entropy"))
    trace = next(t for t in traces if any(went_on(t)))
    at = went_on(trace).index(True)
    trainer.closes_as = trace.tags
    with torch.no_grad():
        before = given(trainer, model, trace)
        trace.ids[at] = 7 if trace.ids[at] != 7 else 8
        after = given(trainer, model, trace)
    assert torch.allclose(before[: at + 1], after[: at + 1], atol=1e-5)
    assert not torch.allclose(before[at + 1 :], after[at + 1 :], atol=1e-5)


def test_a_certain_close_and_an_impossible_one_are_finite():
    tags = Tags(open=(8,), closes=((9,),))
    ids, before = torch.tensor([[8, 1, 2, 9, 3]]), torch.tensor([[5, 8, 1, 2, 9]])
    closing = torch.tensor([[0.0, -1.0, 0.0, -200.0, 0.0]], requires_grad=True)
    values = decided(torch.full((1, 5), -2.0), closing, ids, before, tags)
    values.sum().backward()
    assert values.isfinite().all() and closing.grad.isfinite().all()


def test_the_first_token_of_a_span_is_not_decided_on(written):
    _, traces = written
    for trace in traces:
        (opening,) = trace.tags.open
        for j, waits in enumerate(went_on(trace)):
            assert waits == (trace.owners[j] == BIG and trace.ids[j - 1] != opening)
