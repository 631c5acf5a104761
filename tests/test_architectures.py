"""The engine on transformers does with each architecture what the model itself does, or refuses it when it is loaded."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from srlib import SrlibError, engine
from srlib.data import arith
from srlib.engine import Request, slots, transformers
from srlib.params import ModelSpec
from srlib.run import twins

VOCABULARY, CONTEXT = 120, 96  # windows are a quarter of the context
ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
ROPE |= {"short_factor": [1.0] * 32, "long_factor": [9.0] * 32}
SERVED = {
    "llama": {},
    "qwen2": {},
    "qwen2 that slides": {"use_sliding_window": True},
    "qwen3": {},
    "qwen3_moe": {},
    "mistral": {"sliding_window": None},
    "mistral that slides": {},
    "phi3": {"sliding_window": 2047},
    "phi3 of short context": {"rope_parameters": ROPE | {"original_max_position_embeddings": CONTEXT}},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},  # low enough to be felt
    "gemma3_text": {},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.5},
    "cohere": {},
    "cohere2": {},
    "olmo2": {},
    "olmo3": {},
    "gpt_oss": {},
}
REFUSED = {
    "llama4_text": "layers of the kind chunked_attention",
    "deepseek_v3": "it keeps its keys compressed",
    "gptj": "its attention is its own",
    "doge": "DogeAttention makes a mask of its own",
    "gpt2": "AttributeError while a model was at work",  # its output asks for attention across two texts
    "phi3 of long context": "beyond 48 tokens it scales all positions anew; with a context of 48 it runs",
}
OTHERS = {
    "phi3 of long context": {"rope_parameters": ROPE | {"original_max_position_embeddings": CONTEXT // 2}},
    "deepseek_v3": {"num_hidden_layers": 2, "n_routed_experts": 8},
    "gptj": {"n_layer": 2, "n_embd": 128, "n_head": 2, "rotary_dim": 16},
    "gpt2": {"n_layer": 2, "n_embd": 128, "n_head": 2},
}


def made(name):
    """A tiny random model, whose attention is the one that its authors wrote."""
    settings = (SERVED | OTHERS).get(name, {})
    rope = settings.get("rope_parameters")
    config = AutoConfig.for_model(name.split()[0], **({} if rope else settings))
    if name not in ("gptj", "gpt2"):
        twins.narrow(config, VOCABULARY, CONTEXT)
    if rope:  # whose factors fit the heads that are narrow
        config.rope_parameters, config.original_max_position_embeddings = rope, rope["original_max_position_embeddings"]
    config.tie_word_embeddings = False
    config.initializer_range = 0.2
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()


def loaded(model, folder, slots=6, **settings):
    model.save_pretrained(folder)
    arith.tokenizer().save_pretrained(folder)
    return engine.load(ModelSpec(path=str(folder), device="cpu", **settings), slots)


@pytest.fixture
def texts():
    """Ids of several lengths, shorter and longer than the windows."""
    torch.manual_seed(1)
    return [torch.randint(1, VOCABULARY, (n,)).tolist() for n in (3, 40, 9, 61)]


@torch.no_grad()
def logprobs(model, ids):
    """(T - 1, V) the model's own, in one full pass."""
    return model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)


def greedy(model, ids, n):
    given = torch.tensor([ids])
    out = model.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=n, do_sample=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("name", SERVED)
def test_an_architecture_is_served_as_the_model_itself_writes_and_scores(name, texts, tmp_path, monkeypatch):
    model = made(name)
    served = loaded(model, tmp_path)
    assert served.counters == engine.Counters()
    traces = [ids + greedy(model, ids, 24) for ids in texts]
    own = [logprobs(model, ids) for ids in traces]
    picked = [each.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for each, ids in zip(own, traces)]
    requests = served.run(*(Request(served.open([]), feed=ids, max_new=24) for ids in texts))
    for request, ids, trace, values in zip(requests, texts, traces, picked):
        assert request.ids == trace[len(ids) :]
        assert request.logprobs == pytest.approx(values[len(ids) - 1 :].tolist(), abs=2e-4)
    # Asked at ids that are given, of sequences of all lengths in one pass.
    asked = served.run(*(Request(r.sequence, feed=ids[1:6], ask=4, watch=7) for r, ids in zip(requests, traces)))
    for request in asked:
        whole = logprobs(model, [*request.sequence.ids, 0])[-4:]
        assert request.own == whole.argmax(1).tolist()
        assert request.watched == pytest.approx(whole[:, 7].tolist(), abs=2e-4)
    for tokens in (transformers.SCORE_TOKENS, 64):  # in one pass, and in several with a cache
        monkeypatch.setattr(transformers, "SCORE_TOKENS", tokens)
        for scored, values in zip(served.score(traces), picked):
            assert scored == pytest.approx(values.tolist(), abs=2e-4)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss"])
def test_attention_without_a_kernel_is_the_same_in_parts_and_on_padded_batches(name, texts, tmp_path, monkeypatch):
    model = made(name)
    served = loaded(model, tmp_path)
    (whole,) = served.run(Request(served.open([]), feed=texts[3], ask=60, watch=7))
    monkeypatch.setattr(slots, "SCORES", 1000)
    (parts,) = served.run(Request(served.open([]), feed=texts[3], ask=60, watch=7))
    assert parts.watched == pytest.approx(whole.watched, abs=1e-5)
    ids = torch.tensor([texts[1], [0] * 31 + texts[2]])
    seen = torch.ones_like(ids)
    seen[1, :31] = 0
    expected, logits = (m(ids, attention_mask=seen).logits for m in (model, served.model))
    assert torch.allclose(logits[0], expected[0], atol=1e-4) and torch.allclose(
        logits[1, 31:], expected[1, 31:], atol=1e-4
    )
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in served.model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_is_not_served_is_refused_when_it_is_loaded(name, tmp_path):
    with pytest.raises(SrlibError, match=rf"does not run on the transformers engine \(.*{REFUSED[name]}"):
        loaded(made(name), tmp_path)


def test_a_window_reads_no_more_than_it_sees(texts, tmp_path, monkeypatch):
    served = loaded(made("mistral that slides"), tmp_path)
    read = []
    real = slots.scaled_dot_product_attention
    monkeypatch.setattr(
        slots, "scaled_dot_product_attention", lambda q, k, *a, **b: read.append(k.shape[2]) or real(q, k, *a, **b)
    )
    sequence = served.open(texts[3])
    served.run(Request(sequence, max_new=1))
    read.clear()
    served.run(Request(sequence, max_new=4))
    assert set(read) == {CONTEXT // 4}
