"""The controller, against a naive reference that reads everything again at every token."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srlib import SrlibError
from srlib.data import arith, spans
from srlib.data.spans import Tags
from srlib.decoding.policies import Always, Learned, Never, Random
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import BIG, FORCED, SMALL
from srlib.engine import GREEDY, Sequence
from srlib.engine.transformers import TransformersEngine
from tests.conftest import random_model

EOS = 0
TIE = 1e-4


def greedy(model):
    """Next token of a whole sequence, and whether the two best are too close to call."""

    @torch.no_grad()
    def next_token(ids, but=()):
        logits = model(torch.tensor([ids])).logits[0, -1]
        logits[list(but)] = -torch.inf
        best = logits.topk(2)
        return int(best.indices[0]), float(best.values[0] - best.values[1]) < TIE

    return next_token


def naive(small, big, prompt, opening, closing, max_tokens, span_budget):
    """The method in its plainest form. Returns ids, owners, and whether a tie was met."""
    ids, owners, inside, tie = [], [], 0, False

    def put(token, owner):
        ids.append(token)
        owners.append(owner)

    while len(ids) < max_tokens and (not ids or ids[-1] != EOS):
        if not inside:
            token, close_call = small(prompt + ids, but=(closing,))
            put(token, SMALL)
            inside = int(token == opening)
        else:
            token, close_call = big(prompt + [i for i in ids if i not in (opening, closing)])
            put(token, BIG)
            if token == EOS or len(ids) == max_tokens:
                break
            own, also_close = small(prompt + ids)
            close_call |= also_close
            if own == closing or inside == span_budget:
                put(closing, SMALL if own == closing else FORCED)
                inside = -1
            inside += 1
        tie |= close_call
    return ids, owners, tie


@pytest.mark.parametrize(("max_tokens", "span_budget"), [(40, 4), (40, 1), (7, 100), (1, 3)])
@pytest.mark.parametrize("chunk", [1, 3])
def test_learned_is_the_naive_method(pair, engines, prompts, tokenizer, max_tokens, span_budget, chunk):
    opening, closing = (t[0] for t in (Tags.of(tokenizer).open, Tags.of(tokenizer).close))
    writer = Offloader(
        *engines, Learned(), max_tokens=max_tokens, span_budget=span_budget, control_chunk=chunk, batch_size=64
    )
    traces = writer.run(prompts)
    ties = 0
    for prompt, trace in zip(prompts, traces):
        ids, owners, tie = naive(*map(greedy, pair), prompt, opening, closing, max_tokens, span_budget)
        ties += tie
        if not tie:
            assert trace.ids == ids
            assert trace.owners == owners
            assert trace.finish == ("eos" if ids[-1] == EOS else "length")
    assert ties < 6
    assert len(traces[0].prompt_ids) == len(prompts[0])
    if max_tokens == 40:
        closed_by = {h.closed_by for t in traces for h in t.handovers}
        assert {"small", "budget"} <= closed_by  # the cases were really met
        assert any(BIG in t.owners for t in traces)


def test_batch_of_64_equals_one_at_a_time(engines, prompts):
    for policy in (Learned(), Random(0.3, 4)):
        writer = Offloader(*engines, policy, max_tokens=32, span_budget=4)
        together = writer.run(prompts)
        alone = [writer.run([prompt])[0] for prompt in prompts]
        assert [t.ids for t in together] == [t.ids for t in alone]
        assert [t.owners for t in together] == [t.owners for t in alone]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("policy", [Learned(), Random(0.9, 2)], ids=str)
def test_others_stand_in_for_those_at_the_big_model(engines, prompts, policy, batch_size, monkeypatch):
    settings_ = {"max_tokens": 32, "span_budget": 4, "batch_size": batch_size}
    plain = Offloader(*engines, policy, **settings_).run(prompts)
    small, big = engines
    slots, sizes, opened = len(small._free), [], []  # sizes of the passes, and how many are open then
    for e in engines:
        forward = e._forward
        monkeypatch.setattr(e, "_forward", lambda s, forward=forward: sizes.append(len(s)) or forward(s))
        step = e.step
        monkeypatch.setattr(e, "step", lambda e=e, step=step: opened.append(slots - len(e._free)) or step())
    crowded = Offloader(*engines, policy, oversubscribe=0.5, **settings_)
    traces = crowded.run(prompts)
    assert crowded.under_way == {1: 2, 3: 5, 8: 12}[batch_size]
    assert max(sizes) == batch_size  # no pass has more
    assert batch_size < max(opened) <= crowded.under_way  # but more have a cache
    assert [t.ids for t in traces] == [t.ids for t in plain]
    assert [t.owners for t in traces] == [t.owners for t in plain]
    assert len(small._free) == len(big._free) == slots


@pytest.mark.parametrize("batch_size", [1, 5, 64])
@pytest.mark.parametrize("policy", [Learned(), Random(0.3, 4), Random(0.9, 2)], ids=str)
def test_every_token_is_processed_once(engines, prompts, policy, batch_size):
    small, big = engines
    traces = Offloader(*engines, policy, max_tokens=32, span_budget=4, batch_size=batch_size).run(prompts)
    for trace in traces:  # each model against what that model cannot do without, up to the last token it wrote
        last = max((i for i, owner in enumerate(trace.owners) if owner == SMALL), default=None)
        least = 0 if last is None else len(trace.prompt_ids) + last
        behind = 0 if last is None else len(trace.ids) - 1 - last  # of the big model, in the end: it may look at them
        assert least <= trace.small_forward_tokens <= least + behind
        if not trace.handovers:
            assert trace.big_forward_tokens == 0
            continue
        end = trace.handovers[-1].start + trace.handovers[-1].tokens
        read = len(trace.prompt_ids) + len(spans.strip(trace.ids[:end], trace.tags))
        assert trace.big_forward_tokens == read - 1  # the last token needs no pass
    assert any(len(trace.handovers) > 1 for trace in traces)
    assert small.counters.forward_tokens == sum(t.small_forward_tokens for t in traces)
    assert big.counters.forward_tokens == sum(t.big_forward_tokens for t in traces)
    assert small.counters.discarded_tokens == big.counters.discarded_tokens == 0


def test_alone_is_generate(pair, engines, prompts):
    small, big = engines
    for policy, engine, model in ((Never(), (small, None), pair[0]), (Always(), (None, big), pair[1])):
        traces = Offloader(*engine, policy, max_tokens=24).run(prompts)
        for prompt, trace in zip(prompts, traces):
            ids = torch.tensor([prompt])
            out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
            assert trace.ids == out[0, len(prompt) :].tolist()
    assert spans.share(traces) == 1.0


def test_the_big_model_may_be_greedy_where_the_small_one_is_not(engines, prompts):
    for policy, same in ((Always(), True), (Never(), False)):
        alone = [t.ids for t in Offloader(*engines, policy, max_tokens=16).run(prompts[:8])]
        sampled = Offloader(*engines, policy, max_tokens=16, temperature=2.0, big_sampling=(0.0, 1.0, 0)).run(
            prompts[:8]
        )
        assert ([t.ids for t in sampled] == alone) is same


def test_the_big_model_never_sees_a_tag(engines, prompts, tokenizer, monkeypatch):
    _, big = engines
    seen, opened = [], big.open
    monkeypatch.setattr(big, "open", lambda *a, **k: seen.append(opened(*a, **k)) or seen[-1])
    Offloader(*engines, Learned(), max_tokens=32, span_budget=4).run(prompts)
    tags = {*Tags.of(tokenizer).open, *Tags.of(tokenizer).close}
    assert len(seen) > 5
    assert not any(tags & set(sequence.ids) for sequence in seen)


def test_share_leaves_tags_out(engines, prompts):
    for trace in Offloader(*engines, Learned(), max_tokens=32, span_budget=4).run(prompts):
        plain = len(spans.strip(trace.ids, trace.tags))
        assert trace.big_tokens + trace.small_tokens == plain
        assert trace.big_tokens == sum(h.tokens for h in trace.handovers)
        assert all(set(trace.owners[h.start : h.start + h.tokens]) == {BIG} for h in trace.handovers)
        assert len(trace.ids) == len(trace.owners) == len(trace.logprobs)


def test_a_prompt_longer_than_the_context(engines, prompts):
    long = prompts[0] * 100
    traces = Offloader(*engines, Learned(), max_tokens=24).run([long, prompts[1], long])
    assert [t.finish == "prompt" for t in traces] == [True, False, True]
    assert traces[0].ids == [] and traces[0].big_forward_tokens == traces[0].small_forward_tokens == 0
    nearly = (prompts[0] * 100)[:250]
    (trace,) = Offloader(*engines, Never(), max_tokens=24).run([nearly])
    assert len(trace.ids) <= 6
    assert trace.finish in ("length", "eos")


def test_vocabularies_must_agree(engines, tokenizer):
    other = arith.tokenizer()
    other.add_tokens(["<other>"])
    foreign = TransformersEngine(random_model(len(other), 3), other)
    with pytest.raises(SrlibError, match="cannot write every text"):
        Offloader(engines[0], foreign, Learned(), max_tokens=8)


class Scripted:
    """An engine that writes given ids: from `script`, whatever it reads; `own` answers an extend."""

    running = False

    def __init__(self, tokenizer, script, own=lambda position: 5, context=10_000):
        self.tokenizer, self.script, self.own, self.context = tokenizer, script, own, context
        self.slots, self.eos, self.pending, self.read = 4, {EOS}, [], []
        self.most = 0  # traces it is asked for at a time

    def open(self, ids, sampling=GREEDY):
        return Sequence(0, list(ids), sampling)

    def close(self, sequence):
        self.read.append(list(sequence.ids))
        self.pending = [request for request in self.pending if request.sequence is not sequence]

    def truncate(self, sequence, length):
        del sequence.ids[length:]

    def submit(self, request):
        request.start = len(request.sequence.ids)
        request.sequence.ids += request.feed
        self.pending.append(request)
        return request

    def cancel(self, request):
        if request in self.pending:
            self.pending.remove(request)
        self.truncate(request.sequence, request.start)

    def step(self):
        done, self.pending = self.pending, []
        self.most = max(self.most, len({id(request.sequence) for request in done}))
        for request in done:
            ids = request.sequence.ids
            request.own = [self.own(len(ids) - i) for i in range(request.ask)][::-1]
            request.watched = [0.0] * request.ask
            ended = not request.max_new
            while not ended:
                wanted = self.script(len(ids))  # an id, or several, the best first
                wanted = wanted if isinstance(wanted, tuple) else (wanted,)
                ids.append(next(token for token in wanted if token not in request.banned))
                ended = request.add(ids[-1], 0.0, self.tokenizer)
        return done


def test_random_reaches_its_share(tokenizer):
    small, big = Scripted(tokenizer, lambda n: 10), Scripted(tokenizer, lambda n: 20)
    traces = Offloader(small, big, Random(0.3, 2), max_tokens=60).run([[50, i % 10] for i in range(200)])
    assert spans.share(traces) == pytest.approx(0.3, abs=0.03)  # 6,000 chunks: standard error 0.6 points
    assert traces[0].owners != traces[10].owners  # a prompt asked again has another seed
    for trace in traces:
        assert [h.tokens for h in trace.handovers] == [
            len(run) for run in "".join("SB"[o] for o in trace.owners).replace("S", " ").split()
        ]


@settings(max_examples=1000, deadline=None)
@given(data=st.data())
def test_random_handovers_against_the_reference(tokenizer, data):
    """Scripts over positions: what each model would write after a given number of tokens."""
    opening, closing = (t[0] for t in (Tags.of(tokenizer).open, Tags.of(tokenizer).close))
    small_script = data.draw(st.lists(st.sampled_from([10, 11, opening, opening, EOS]), min_size=1, max_size=30))
    big_script = data.draw(st.lists(st.sampled_from([20, 21, 22, 20, 21, 22, EOS]), min_size=1, max_size=30))
    closes = data.draw(st.lists(st.booleans(), min_size=1, max_size=10))
    max_tokens, span_budget, chunk = (data.draw(st.integers(1, n)) for n in (30, 6, 4))
    pipelining = {"stream_chunk": data.draw(st.integers(0, 3)), "overlap": data.draw(st.booleans())}
    crowd = {"batch_size": data.draw(st.integers(1, 3)), "oversubscribe": data.draw(st.sampled_from([0, 0.5, 2]))}
    prompt = [50, 51, 52]

    def small_next(n):
        return small_script[n % len(small_script)]

    def big_next(n):
        return big_script[n % len(big_script)]

    def own(n):
        return closing if closes[n % len(closes)] else 5

    small, big = Scripted(tokenizer, small_next, own), Scripted(tokenizer, big_next)
    settings_ = {"max_tokens": max_tokens, "span_budget": span_budget, "control_chunk": chunk, **pipelining, **crowd}
    trace, *others = Offloader(small, big, Learned(), **settings_).run([prompt] * data.draw(st.integers(1, 5)))
    assert all((t.ids, t.owners) == (trace.ids, trace.owners) for t in others)
    assert max(small.most, big.most) <= crowd["batch_size"]

    def reference_small(ids, but=()):  # its script closes nothing
        last = trace_owner(ids)
        return (own(len(ids)) if last == BIG else small_next(len(ids))), False

    def trace_owner(ids):
        return BIG if len(ids) > len(prompt) and ids[-1] >= 20 and ids[-1] < 50 else SMALL

    ids, owners, _ = naive(
        reference_small, lambda x: (big_next(len(x)), False), prompt, opening, closing, max_tokens, span_budget
    )
    assert trace.ids == ids
    assert trace.owners == owners
    assert small.read[0] == (prompt + ids)[: len(small.read[0])]
    assert len(small.read[0]) >= len(prompt) + max(i for i, owner in enumerate(owners) if owner == SMALL)
    inside = spans.inside(ids, trace.tags)
    assert trace.big_tokens == owners.count(BIG) == sum(h.tokens for h in trace.handovers)
    assert trace.small_tokens == len(inside) - trace.big_tokens
    assert len(trace.ids) == len(trace.owners) == len(trace.logprobs)
    if big.read:
        plain = prompt + spans.strip(ids, trace.tags)
        assert big.read[0] == plain[: len(big.read[0])]
    if trace.big_tokens:
        end = trace.handovers[-1].start + trace.handovers[-1].tokens
        assert len(big.read[0]) >= len(prompt) + len(spans.strip(ids[:end], trace.tags))


def test_tags_of_several_tokens():
    """Plain-text tags: the small model writes them out, and control changes hands all the same."""
    plain = arith.tokenizer()
    tags = Tags.of(plain)
    assert len(tags.open) > 1
    text = [*plain.encode("1+2="), *tags.open]
    after = [*tags.close, *plain.encode(";7"), EOS]
    prompt = plain.encode("1+2?")
    big_ids = plain.encode("34")

    def small_script(n):
        written = n - len(prompt)
        return text[written] if written < len(text) else after[written - len(text) - len(big_ids)]

    def own(n):
        return tags.close[0]

    small = Scripted(plain, small_script, lambda n: tags.close[0] if n == len(prompt + text + big_ids) else 5)
    big = Scripted(plain, lambda n: big_ids[n - len(prompt) - 4])
    (trace,) = Offloader(small, big, Learned(), max_tokens=60, span_budget=8).run([prompt])
    assert plain.decode(trace.ids) == "1+2=<bigmodel>34</bigmodel>;7<|endoftext|>"
    assert trace.text(plain) == "1+2=34;7"
    assert trace.handovers[0][:3] == (len(text), 2, "small")
    assert not trace.malformed
    assert plain.decode(big.read[0]) == "1+2?1+2=34"


def test_a_tag_of_plain_text_is_looked_for_within_the_context():
    """At its end there is no room to see whether a word that begins like the tag is one."""
    plain = arith.tokenizer()
    first = Tags.of(plain).close[0]
    models = [random_model(len(plain), seed, context=48, loud=(first,)) for seed in (0, 1)]
    asked = [plain.encode(f"{i}+{i}?") for i in range(10, 42)]
    for wanted in (Learned(), Opens()):
        engines = [TransformersEngine(model, plain) for model in models]
        traces = Offloader(*engines, wanted, max_tokens=200, span_budget=60).run(asked)
        assert not [trace.error for trace in traces if trace.error]
        assert all(len(trace.prompt_ids) + len(trace.ids) <= 48 for trace in traces)
    assert any(trace.big_tokens > 20 for trace in traces)


class Opens(Learned):
    """Asks at once, and again when control is back."""

    def write(self, writer):
        while not writer.done:
            yield from writer.small_writes(1)
            if not writer.done:
                yield from writer.span()


def test_an_unclosed_span_has_an_outcome_and_outside_of_spans_none_is_closed(tokenizer):
    opening, closing = (t[0] for t in (Tags.of(tokenizer).open, Tags.of(tokenizer).close))
    script = {1: 10, 2: (closing, 11), 3: 11, 4: opening}  # a closing tag is likeliest, and cannot be written
    small = Scripted(tokenizer, lambda n: script.get(n, 12))
    big = Scripted(tokenizer, lambda n: EOS if n >= 5 else 20)
    (trace,) = Offloader(small, big, Learned(), max_tokens=20, span_budget=9).run([[50]])
    assert trace.ids == [10, 11, 11, opening, 20, EOS]
    assert trace.finish == "eos"
    assert dict(trace.malformed) == {"unclosed": 1}
    assert trace.handovers[0].closed_by == "eos"
    assert big.read[0] == [50, 10, 11, 11, 20, EOS]
