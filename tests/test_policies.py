"""Policies and baselines on real tiny models, and what may not change what they write."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from srlib import SrlibError, engine
from srlib.data import arith, spans
from srlib.data.spans import Tags
from srlib.decoding.policies import Always, Learned, Never, Random, Speculative, Unsure
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import BIG, FORCED, SMALL
from srlib.decoding.translate import Vocabulary
from srlib.engine.protocol import Doubt
from srlib.engine.transformers import TransformersEngine
from srlib.params import ModelSpec
from tests.conftest import random_model
from tests.test_offload import EOS, Scripted


def ids(traces):
    return [(t.ids, t.owners) for t in traces]


def test_rejection_goes_from_learned_to_switched_off(engines, prompts):
    def run(policy):
        return Offloader(*engines, policy, max_tokens=32, span_budget=4).run(prompts)

    shares = [spans.share(run(Learned(reject=p))) for p in (0.0, 0.3, 0.7, 1.0)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[2] > shares[3] == 0
    assert ids(run(Learned(reject=0.0))) == ids(run(Learned()))
    alone = [(off.ids, never.ids) for off, never in zip(run(Learned(reject=1.0)), run(Never())) if not never.malformed]
    assert alone and all(off == never for off, never in alone)  # one that is never asked may close what is not open


@pytest.mark.parametrize("cap", [0.1, 0.3])
def test_the_cap_holds_for_every_problem(engines, prompts, cap):
    free = Offloader(*engines, Learned(), max_tokens=32, span_budget=4).run(prompts)
    capped = Offloader(*engines, Learned(max_share=cap), max_tokens=32, span_budget=4).run(prompts)
    assert any(spans.share(t) > cap for t in free)
    assert all(spans.share(t) <= cap for t in capped)
    assert any(t.big_tokens for t in capped)


@pytest.mark.parametrize(
    ("measure", "above", "most"), [("entropy", 2.0, 100.0), ("margin", 0.9, 1.0), ("confidence", 0.8, 1.0)]
)
def test_the_big_model_is_asked_where_the_small_one_is_unsure(engines, prompts, measure, above, most):
    def write(threshold, prompts):
        return Offloader(*engines, Unsure(measure, threshold, 4), max_tokens=24).run(prompts)

    small, _ = engines
    assert ids(write(most, prompts)) == ids(Offloader(*engines, Never(), max_tokens=24).run(prompts))
    assert all(trace.big_tokens == len(trace.ids) for trace in write(-1.0, prompts))
    owned = set()
    for trace in write(above, prompts[:8]):
        for i, owner in enumerate(trace.owners):
            before = trace.prompt_ids + trace.ids[:i]
            request = engine.Request(small.open([]), feed=before, max_new=1, doubt=Doubt(measure, above))
            small.run(request)
            small.close(request.sequence)
            if owner == SMALL:
                assert not request.unsure
            elif trace.owners[i - 1 : i] != [BIG]:
                assert request.unsure
            owned.add(owner)
    assert owned == {SMALL, BIG}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("draft", [1, 4])
def test_speculative_decoding_writes_what_the_big_model_writes(engines, prompts, temperature, draft):
    alone = Offloader(None, engines[1], Always(), max_tokens=24, temperature=temperature).run(prompts)
    both = Offloader(*engines, Speculative(draft), max_tokens=24, temperature=temperature).run(prompts)
    assert [t.ids for t in both] == [t.ids for t in alone]
    assert [t.finish for t in both] == [t.finish for t in alone]
    twins = Offloader(engines[1], engines[1], Speculative(draft), max_tokens=24, temperature=temperature).run(
        prompts[:16]
    )
    assert [t.ids for t in twins] == [t.ids for t in alone[:16]]
    assert all(t.owners.count(BIG) <= -(-len(t.ids) // (draft + 1)) for t in twins)  # every draft is kept


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    "policy", [Learned(), Random(0.3, 4), Unsure("entropy", 3.0, 3), Speculative(3)], ids=lambda p: p.name
)
@pytest.mark.parametrize("how", [{"stream_chunk": 3}, {"overlap": True}])
def test_pipelining_changes_no_token(engines, prompts, policy, temperature, how):
    settings = {"max_tokens": 32, "span_budget": 6, "control_chunk": 2, "temperature": temperature}
    plain = Offloader(*engines, policy, **settings).run(prompts)
    piped = Offloader(*engines, policy, **settings, **how).run(prompts)
    # Other batches round otherwise, which moves a draw that lies on the very border of two tokens.
    assert sum(a != b for a, b in zip(ids(piped), ids(plain))) <= 1
    assert all(len(e._free) == e.slots and not e.pending for e in engines)


def test_streaming_has_read_the_text_when_it_is_asked(engines, prompts):
    """With it, the big model never has more than a chunk to read before it writes."""
    _, big = engines
    fed = []
    submit = big.submit
    big.submit = lambda request: fed.append((len(request.feed), request.max_new)) or submit(request)
    Offloader(*engines, Learned(), max_tokens=32, span_budget=4, stream_chunk=4).run(prompts)
    assert any(new == 0 for _, new in fed)
    longest = max(len(x) for x in prompts)
    assert max(n for n, _ in fed) <= longest + 4


def test_sampling_is_of_the_position(engines, prompts):
    """The same draw, however the text is cut into requests; `own` is the draw that decoding would make."""
    small, _ = engines
    sampling = engine.Sampling(1.0, top_p=0.9, top_k=20, seed=3)
    (whole,) = small.run(engine.Request(small.open([], sampling), feed=prompts[0], max_new=12))
    sequence = small.open([], sampling)
    parts = [small.run(engine.Request(sequence, feed=prompts[0], max_new=5))[0].ids]
    parts += [small.run(engine.Request(sequence, max_new=1))[0].ids for _ in range(7)]
    assert sum(parts, []) == whole.ids
    (asked,) = small.run(engine.Request(small.open([], sampling), feed=prompts[0] + whole.ids[:-1], ask=12))
    assert asked.own == whole.ids
    (one,) = small.run(engine.Request(small.open([], engine.Sampling(1.0, top_k=1)), feed=prompts[0], max_new=6))
    (greedy,) = small.run(engine.Request(small.open([]), feed=prompts[0], max_new=6))
    assert one.ids == greedy.ids


def test_draws_have_the_models_distribution(engines, prompts):
    small, _ = engines
    n, first = 2000, []
    for at in range(0, n, 50):
        opened = [small.open([], engine.Sampling(1.0, seed=at + i)) for i in range(50)]
        first += [r.ids[0] for r in small.run(*(engine.Request(s, feed=prompts[1], max_new=1) for s in opened))]
        for s in opened:
            small.close(s)
    size = len(small.tokenizer)
    scores = small.score([[*prompts[1], token] for token in range(size)])
    p = [math.exp(logprobs[-1]) for logprobs in scores]
    assert sum(p) == pytest.approx(1, abs=1e-3) and max(p) < 0.5
    for token in range(size):
        assert abs(first.count(token) / n - p[token]) < 5 * (p[token] * (1 - p[token]) / n) ** 0.5 + 2 / n


def test_cancel_takes_back(engines, prompts):
    small, _ = engines
    sequence = small.open([])
    small.run(engine.Request(sequence, feed=prompts[0]))
    request = small.submit(engine.Request(sequence, feed=prompts[1], max_new=8))
    small.step()
    small.step()
    small.cancel(request)
    assert sequence.ids == prompts[0]
    assert small.step() == []
    (a,) = small.run(engine.Request(sequence, max_new=4))
    (b,) = small.run(engine.Request(small.open([]), feed=prompts[0], max_new=4))
    assert a.ids == b.ids


def test_an_engine_that_fails_ends_its_traces_with_one_error(engines, prompts):
    small, big = engines

    class Failing(TransformersEngine):
        def step(self):
            done, self.pending = self.pending, []
            for request in done:
                request.error = SrlibError("the server is gone")
            return done

    failing = Failing(big.model, big.tokenizer)
    writer = Offloader(small, failing, Learned(), max_tokens=32, span_budget=4)
    traces = writer.run(prompts)
    assert {t.finish for t in traces} > {"error"}
    assert all((t.error == "the server is gone") == (t.finish == "error") for t in traces)
    assert len(small._free) == small.slots
    with pytest.raises(SrlibError, match=r"learned: \d+ of 64 traces failed: the server is gone"):
        writer.raise_if_failed(traces)


@pytest.fixture(scope="module")
def pieces():
    """A byte-level tokenizer that merges the characters of a tag with each other and with their neighbours."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    text = ["so 1+2=<bigmodel>3</bigmodel>; then =<bigmodel>\n33 é😀</bigmodel>.\n</bigmodel>;1"] * 4
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


class Speaks(Scripted):
    """Writes a text in its own tokens, piece by piece: the next token of what is still to be said."""

    def __init__(self, tokenizer, texts):
        super().__init__(tokenizer, None)
        self.eos, self.texts = {tokenizer.eos_token_id}, [text.encode() for text in texts]
        self.vocabulary = Vocabulary(tokenizer)

    def next(self, ids):
        said = self.vocabulary.join(ids)
        text = next((t for t in self.texts if t.startswith(said)), said)
        return self.vocabulary.encode(text[len(said) :])[0] if text != said else self.tokenizer.eos_token_id

    def step(self):
        done, self.pending = self.pending, []
        for request in done:
            sequence = request.sequence.ids
            places = range(len(sequence) - request.ask + 1, len(sequence) + 1)
            request.own = [self.next(sequence[:i]) for i in places]
            request.watched = [0.0] * request.ask
            ended = not request.max_new
            while not ended:
                sequence.append(self.next(sequence))
                ended = request.add(sequence[-1], 0.0, self.tokenizer)
        return done


@settings(max_examples=150, deadline=None)
@given(
    before=st.text(st.sampled_from(list("1+=; é\n")), max_size=6),
    hard=st.text(st.sampled_from(list("3 é😀.\n")), min_size=1, max_size=6),
    after=st.text(st.sampled_from(list("1+=; é\n")), max_size=6),
    other=st.booleans(),
)
def test_plain_tags_that_merge_with_their_neighbours(pieces, before, hard, after, other):
    """What small and big say comes out whole, however the tokens are cut."""
    close = spans.OTHER_CLOSE if other else spans.CLOSE
    said = f"?{before}{spans.OPEN}{hard}{close}{after}"
    plain = f"?{before}{hard}{after}"
    small, big = Speaks(pieces, [said, said.replace(close, spans.CLOSE)]), Speaks(pieces, [plain])
    (trace,) = Offloader(small, big, Learned(), max_tokens=200, span_budget=100).run(["?"])
    text = pieces.decode([i for i in trace.ids if i != pieces.eos_token_id])
    assert trace.text(pieces) == plain[1:]
    assert text.startswith(f"{before}{spans.OPEN}")
    assert pieces.decode(big.read[0]).startswith(f"?{before}")
    assert small.read[0][1:][: len(trace.ids)] == trace.ids[: len(small.read[0]) - 1]
    assert len(trace.ids) == len(trace.owners) == len(trace.logprobs)
    assert spans.parse(trace.ids, Tags.of(pieces))


def test_two_vocabularies_write_one_trace(others, monkeypatch):
    """A byte-level small model and a big one with other ids: both have read the same bytes."""
    ours, theirs = others
    tags = tuple(ours.convert_tokens_to_ids([spans.OPEN, spans.CLOSE]))
    small = TransformersEngine(random_model(len(ours), 5, loud=tags), ours)
    big = TransformersEngine(random_model(len(theirs), 6), theirs)
    small.eos, big.eos = frozenset({ours.eos_token_id}), frozenset({theirs.eos_token_id})
    opened, open_ = [], big.open
    monkeypatch.setattr(big, "open", lambda *a: opened.append(open_(*a)) or opened[-1])
    prompts = [f"{i} + {i * 7} é?" for i in range(24)]

    def text(trace, end=None):
        return ours.decode(spans.strip(trace.prompt_ids + trace.ids[:end], trace.tags)).removesuffix("<|end|>")

    for policy in (Learned(), Random(0.4, 3), Unsure("entropy", 3.0, 3)):
        for chunk in (1, 3):
            opened.clear()
            traces = Offloader(small, big, policy, max_tokens=48, span_budget=6, control_chunk=chunk).run(prompts)
            texts = [small.tokenizer.backend_tokenizer.encode(p).ids for p in prompts]
            assert all(t.prompt_ids == x for t, x in zip(traces, texts))
            asked = {prompt: trace for prompt, trace in zip(prompts, traces) if trace.handovers}
            reads = [theirs.decode(s.ids).removesuffix("<|end|>").rstrip("\ufffd") for s in opened]
            assert {read.partition("?")[0] + "?" for read in reads} >= set(asked) and len(asked) > 5
            for read in reads:
                prompt = read.partition("?")[0] + "?"
                assert text(traces[prompts.index(prompt)]).startswith(read)
                if prompt in asked:  # all that was there when it was asked for the last time
                    last = asked[prompt].handovers[-1]
                    assert read.startswith(text(asked[prompt], last.start).rstrip("\ufffd"))
    with pytest.raises(SrlibError, match="needs two models of one vocabulary"):
        Offloader(small, big, Speculative(2), max_tokens=8)
    with pytest.raises(SrlibError, match="prompt given as ids needs one vocabulary"):
        Offloader(small, big, Learned(), max_tokens=8).run([[1, 2]])


def test_the_hint_stands_behind_every_prompt():
    plain = arith.tokenizer()
    small = Scripted(plain, lambda n: EOS)
    Offloader(small, None, Never(), max_tokens=8, hint="=").run(["1+2"])
    assert plain.decode(small.read[0]).startswith("1+2=")


def test_forced_tokens_are_no_ones(pieces):
    small, big = Speaks(pieces, [f"?{spans.OPEN}333333"]), Speaks(pieces, ["?333333"])
    (trace,) = Offloader(small, big, Learned(), max_tokens=60, span_budget=2).run(["?"])
    assert FORCED in trace.owners
    assert all((p != p) == (o == FORCED) for p, o in zip(trace.logprobs, trace.owners))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_big_model_beside_a_small_one_in_fp32(pair, tokenizer, prompts, tmp_path, quantization):
    for name, model in zip(("small", "big"), pair):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    small = engine.load(tmp_path / "small")
    big = engine.load(ModelSpec(path=str(tmp_path / "big"), quantization=quantization))
    kinds = {type(module).__name__ for module in big.model.modules()}
    assert {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[quantization] in kinds
    traces = Offloader(small, big, Learned(), max_tokens=24, span_budget=4).run(prompts)
    assert any(t.big_tokens for t in traces)
    asked = [t for t in traces if t.handovers][:4]
    for trace in asked:  # what the big model wrote is what it writes alone from there
        first = trace.handovers[0]
        read = trace.prompt_ids + spans.strip(trace.ids[: first.start], trace.tags)
        (alone,) = big.run(engine.Request(big.open([]), feed=read, max_new=1))
        assert alone.ids == trace.ids[first.start : first.start + 1]


@pytest.fixture(scope="module")
def others(pieces):
    """A vocabulary of other ids, in which a number is one token, and `pieces` with tags as tokens."""
    other = Tokenizer(models.BPE())
    other.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    other.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    other.train_from_iterator(["8989 8989 8989"], trainers.BpeTrainer(vocab_size=262, initial_alphabet=alphabet))
    other.add_special_tokens(["<s>", "<|end|>"])
    ours = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(pieces.backend_tokenizer.to_str()), eos_token="<|end|>"
    )
    ours.add_tokens([spans.OPEN, spans.CLOSE])
    return ours, PreTrainedTokenizerFast(tokenizer_object=other, eos_token="<|end|>")


class SpeaksTagged(Speaks):
    """As `Speaks`, with tags that are tokens."""

    def next(self, ids):
        said = self.vocabulary.join(ids)
        text = next((t for t in self.texts if t.startswith(said)), said)
        rest = text[len(said) :].decode()
        return self.tokenizer.encode(rest)[0] if rest else self.tokenizer.eos_token_id


def test_the_big_models_end_of_text_is_taken_back_with_what_stood_before_it(others):
    ours, theirs = others
    small = SpeaksTagged(ours, ["?ab<bigmodel>34</bigmodel>xy<bigmodel>7</bigmodel>z"])
    big = Speaks(theirs, ["?ab345", "?ab34xy7"])
    writer = Offloader(small, big, Learned(), max_tokens=100, span_budget=50, control_chunk=8)
    (trace,) = writer.run(["?"])
    assert trace.text(ours) == "ab34xy7z"
    assert theirs.decode(big.read[0]).startswith("?ab34xy7")


@pytest.mark.parametrize("max_tokens", range(4, 9))
def test_a_big_token_of_several_small_ones_at_the_end_of_the_budget(others, max_tokens):
    ours, theirs = others
    small, big = SpeaksTagged(ours, ["?ab<bigmodel>8989"]), Speaks(theirs, ["?ab8989"])
    writer = Offloader(small, big, Learned(), max_tokens=max_tokens, span_budget=50, control_chunk=8)
    (trace,) = writer.run(["?"])
    whole = ours.encode("ab<bigmodel>8989<|end|>")
    assert trace.ids == whole[:max_tokens]
    assert trace.finish == ("eos" if max_tokens == len(whole) else "length")
