import errno

import pytest
import torch
from psutil import Process

from srlib import SrlibError, engine
from srlib.engine import Request, Sampling, models
from srlib.engine import slots as cache_slots
from srlib.engine.transformers import TransformersEngine
from srlib.params import ModelSpec
from tests.conftest import random_model


def generate(model, prompt, n):
    """What transformers itself writes, greedily."""
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False)
    return out[0, len(prompt) :].tolist()


def test_ragged_batch_writes_what_generate_writes(pair, engines, prompts):
    small, _ = engines
    requests = [Request(small.open([]), feed=x, max_new=24, stops=((0,),)) for x in prompts]
    small.run(*requests)
    assert [r.ids for r in requests] == [generate(pair[0], x, 24) for x in prompts]
    assert small.counters.forward_tokens == sum(len(x) + len(r.ids) - 1 for x, r in zip(prompts, requests))
    assert small.counters.decoded_tokens == sum(len(r.ids) for r in requests)


def test_logprobs_are_those_of_one_full_pass(pair, engines, prompts):
    small, _ = engines
    (request,) = small.run(Request(small.open([]), feed=prompts[0], max_new=12))
    scored = small.score([prompts[0] + request.ids, prompts[1]])
    assert request.logprobs == pytest.approx(scored[0][len(prompts[0]) - 1 :], abs=1e-4)
    assert len(scored[1]) == len(prompts[1]) - 1
    assert scored[1] == pytest.approx(small.score([prompts[1]])[0], abs=1e-4)


def test_one_extend_decides_as_n_separate_passes(pair, engines, prompts):
    """The closing check: own next token and watched log-probability at every position of a chunk."""
    small, _ = engines
    watch, prompt, chunk = 98, prompts[3], prompts[4]
    sequence = small.open([])
    small.run(Request(sequence, feed=prompt))
    before = small.counters.forward_tokens
    (request,) = small.run(Request(sequence, feed=chunk, ask=len(chunk), watch=watch))
    assert small.counters.forward_tokens - before == len(chunk)
    for i in range(len(chunk)):
        with torch.no_grad():
            logits = pair[0](torch.tensor([prompt + chunk[: i + 1]])).logits[0, -1]
        assert request.own[i] == int(logits.argmax())
        assert request.watched[i] == pytest.approx(float(logits.log_softmax(-1)[watch]), abs=1e-4)


def test_work_in_turns_processes_every_token_once(engines, prompts):
    small, _ = engines
    sequence = small.open([])
    (a,) = small.run(Request(sequence, feed=prompts[0], max_new=5))
    (b,) = small.run(Request(sequence, feed=prompts[1], ask=1))
    (c,) = small.run(Request(sequence, max_new=5))
    whole = prompts[0] + a.ids + prompts[1]
    (again,) = small.run(Request(small.open([]), feed=whole, max_new=5))
    assert c.ids == again.ids
    assert c.ids[0] == b.own[-1]
    assert sequence.forwarded == len(whole) + 4
    assert small.counters.discarded_tokens == 0


def test_truncate_takes_back(engines, prompts):
    small, _ = engines
    sequence = small.open([])
    small.run(Request(sequence, feed=prompts[0] + prompts[1]))
    small.truncate(sequence, len(prompts[0]))
    (a,) = small.run(Request(sequence, max_new=6))
    (b,) = small.run(Request(small.open([]), feed=prompts[0], max_new=6))
    assert a.ids == b.ids
    assert small.counters.discarded_tokens == len(prompts[1]) + 1  # the last one left is read again for its logits


def test_slots_are_reused_and_counted(pair, tokenizer, prompts):
    one = TransformersEngine(pair[0], tokenizer, slots=1)
    first = one.open([])
    (a,) = one.run(Request(first, feed=prompts[0] * 10, max_new=4))
    with pytest.raises(RuntimeError, match="all 1 slots are taken"):
        one.open([])
    one.close(first)
    (b,) = one.run(Request(one.open([]), feed=prompts[1], max_new=8, stops=((0,),)))
    assert b.ids == generate(pair[0], prompts[1], 8)


def test_sampling_is_seeded_by_sequence(engines, prompts):
    small, _ = engines

    def sample(seed, beside):
        opened = [small.open([], Sampling(1.0, 0.9, seed=s)) for s in (seed, *beside)]
        requests = small.run(*(Request(s, feed=prompts[0], max_new=16) for s in opened))
        for s in opened:
            small.close(s)
        return requests[0].ids

    assert sample(5, ()) == sample(5, (6, 7)) != sample(6, ())


def test_greedy_is_the_limit_of_a_small_nucleus(engines, prompts):
    small, _ = engines
    greedy, narrow = small.run(
        Request(small.open([]), feed=prompts[2], max_new=12),
        Request(small.open([], Sampling(1.0, 1e-6)), feed=prompts[2], max_new=12),
    )
    assert greedy.ids == narrow.ids


def test_stops_of_several_ids(engines, prompts):
    small, _ = engines
    (free,) = small.run(Request(small.open([]), feed=prompts[5], max_new=12))
    stop = tuple(free.ids[3:5])
    (held,) = small.run(Request(small.open([]), feed=prompts[5], max_new=12, stops=((999,), stop)))
    assert held.stopped == stop
    assert held.ids == free.ids[: len(held.ids)]
    assert len(held.ids) <= 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_banned_is_not_written_and_has_no_probability(pair, engines, prompts, temperature):
    """Beside a request that bans nothing; log-probabilities are those among all other ids."""
    small, _ = engines
    free = small.run(*(Request(small.open([], Sampling(temperature)), feed=ids, max_new=8) for ids in prompts[:4]))
    banned = tuple({request.ids[0] for request in free})
    opened = [small.open([], Sampling(temperature)) for _ in range(8)]
    asked = small.run(
        *(Request(s, feed=ids, max_new=8, banned=banned) for s, ids in zip(opened, prompts[:4])),
        *(Request(s, feed=ids, max_new=8) for s, ids in zip(opened[4:], prompts[:4])),
    )
    for s in opened:
        small.close(s)
    assert [request.ids for request in asked[4:]] == [request.ids for request in free]
    for ids, request in zip(prompts, asked[:4]):
        assert not set(banned) & set(request.ids)
        with torch.no_grad():
            rows = pair[0](torch.tensor([ids + request.ids])).logits[0, len(ids) - 1 : -1]
        rows[:, list(banned)] = -torch.inf
        exact = rows.log_softmax(-1)[range(len(request.ids)), request.ids]
        assert request.logprobs == pytest.approx(exact.tolist(), abs=1e-4)


def test_int8_does_not_tell_of_every_pass(folders, caplog):
    """bitsandbytes would, of each layer, that it computes in fp16."""
    made = engine.load(ModelSpec(path=folders[0], quantization="int8"))
    made.score([[5, 6, 7]])
    assert "Linear8bitLt" in {type(module).__name__ for module in made.model.modules()}
    assert "bitsandbytes" not in {record.name.partition(".")[0] for record in caplog.records}


@pytest.mark.parametrize("refused", [False, True])
def test_no_step_copies_all_of_the_cache(tokenizer, monkeypatch, refused):
    """Bytes, not seconds: nothing is copied, and where the system refuses stores of full length (as a GPU would have to),
    copies are spread; idle slots are neither copied nor held in memory."""
    length, slots = 1024, 512
    made = TransformersEngine(random_model(len(tokenizer), 1, context=length), tokenizer, slots)
    zeros = cache_slots._zeros

    def scarce(like, *shape):
        if shape[2] == length and len(made._cache.keys) + len(made._cache.values) < 4:  # the first pass makes them
            raise OSError(errno.ENOMEM, "no addresses")
        return zeros(like, *shape)

    if refused:
        monkeypatch.setattr(cache_slots, "_zeros", scarce)
    sequence = made.open([5] * 3)
    request = made.submit(Request(sequence, max_new=length - 3))
    before, sizes, resident = {}, [], Process().memory_info().rss
    grown = []  # stores that were copied in one step
    while not made.step():
        stores = {
            (i, layer): x
            for i, store in enumerate((made._cache.keys, made._cache.values))
            for layer, x in store.items()
        }
        grown.append(sum(before.get(key) is not None and before[key] != x.data_ptr() for key, x in stores.items()))
        before = {key: x.data_ptr() for key, x in stores.items()}
        sizes.append(sum(x.nbytes for x in stores.values()))
    assert len(request.ids) == length - 3
    token = 2 * 2 * 32 * 4  # keys and values of two layers, a head of 32, fp32
    assert sizes[-1] == slots * token * length
    if refused:
        assert set(grown) == {0, 1} and sum(grown) == 4 * 4  # two layers' keys and values; from 64 to 1,024
        for i, size in enumerate(sizes):  # as srlib/cost/memory.py counts it; a store doubles up to three tokens early
            assert slots * token * (i + 3) <= size <= slots * token * max(64, min(2 * (i + 6), length))
    else:
        assert set(grown) == {0}
    assert Process().memory_info().rss - resident < sizes[-1] / 4


def test_where_a_gpu_is_asked_for_its_attention_makes_no_plans(monkeypatch, folders):
    """Those of cuDNN are made for each exact shape."""
    told = []

    def loads(*args, **settings):
        told.append((settings["device_map"][""], torch.backends.cuda.cudnn_sdp_enabled()))
        raise ValueError("no weights")

    before = torch.backends.cuda.cudnn_sdp_enabled()
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", loads)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    try:
        torch.backends.cuda.enable_cudnn_sdp(True)
        for gpu in (False, True):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)  # noqa: B023
            with pytest.raises(SrlibError, match="no weights"):
                engine.load(folders[0])
        assert told == [("cpu", True), ("cuda", False)]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_load_errors(pair, tokenizer, tmp_path):
    with pytest.raises(SrlibError, match="There is no model in .*: config.json is not there"):
        engine.load(tmp_path)
    pair[0].save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    assert engine.load(tmp_path / "m").context == 256
    with pytest.raises(SrlibError, match="There is no adapter in"):
        engine.load(ModelSpec(path=str(tmp_path / "m"), adapter=str(tmp_path / "none")))
    with pytest.raises(SrlibError, match="There is no model in models/x/y"):
        engine.load("models/x/y")
    if not torch.cuda.is_available():
        with pytest.raises(SrlibError, match="device is cuda, but torch sees no GPU here"):
            engine.load(ModelSpec(path=str(tmp_path / "m"), device="cuda"))
    weights = tmp_path / "m" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(SrlibError, match="model.safetensors is damaged"):
        engine.load(tmp_path / "m")
    weights.unlink()
    with pytest.raises(SrlibError, match="holds no .safetensors file"):
        engine.load(tmp_path / "m")


def test_the_dtype_of_a_card_without_bf16(monkeypatch):
    """A T4: torch would emulate it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    spec = {kind: ModelSpec(path="any", dtype=kind) for kind in ("auto", "bfloat16", "float16")}
    for there, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, there=there: there)
        assert models.dtype_of(spec["auto"]) == expected and models.dtype_of(spec["float16"]) == torch.float16
    with pytest.raises(SrlibError, match="dtype is bfloat16, in which Tesla T4 does not compute; set it to float16 or"):
        models.dtype_of(spec["bfloat16"])
    assert models.dtype_of(spec["bfloat16"].model_copy(update={"device": "cpu"})) == torch.bfloat16
    packed = spec["float16"].model_copy(update={"quantization": "nf4"})
    assert models._quantization(packed).bnb_4bit_compute_dtype == torch.float16
