import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlib.data import spans
from srlib.data.spans import CLOSE, OPEN, OTHER_CLOSE, TEXT, Span, Tags

IDS = Tags((7,), ((8,), (9, 9)))
LONG = Tags((7, 1, 7), ((7, 2, 7), (7, 3, 7)))


@st.composite
def marked(draw, characters):
    """A sequence without tags and disjoint spans in it."""
    x = draw(st.lists(characters, max_size=40))
    cuts = sorted(draw(st.sets(st.integers(0, len(x)), max_size=8)))
    return x, [Span(a, b) for a, b in zip(cuts[::2], cuts[1::2])]


@given(marked(st.characters(exclude_characters="<>")))
def test_text_round_trip(case):
    x, wanted = "".join(case[0]), case[1]
    tagged = spans.wrap(x, wanted)
    assert spans.parse(tagged) == wanted
    assert spans.strip(tagged) == x
    assert not spans.faults(tagged)
    assert spans.wrap(spans.strip(tagged), spans.parse(tagged)) == tagged
    assert spans.parse(tagged.replace(CLOSE, OTHER_CLOSE)) == wanted


@pytest.mark.parametrize("tags", [IDS, LONG])
@given(case=marked(st.integers(10, 150_000)))
def test_ids_round_trip(tags, case):
    x, wanted = case
    tagged = spans.wrap(x, wanted, tags)
    assert spans.parse(tagged, tags) == wanted
    assert spans.strip(tagged, tags) == x
    assert spans.inside(tagged, tags) == [any(a <= i < b for a, b in wanted) for i in range(len(x))]


PIECES = [
    OPEN,
    CLOSE,
    OTHER_CLOSE,
    "a",
    "<",
    "<big",
    "</big",
    "<\\big",
    "</",
    "<\\",
    "bigmodel>",
    "model>",
    "/bigmodel>",
    ">",
]
READINGS = {
    "text": (st.lists(st.sampled_from(PIECES), max_size=24).map("".join), TEXT),
    "ids": (st.lists(st.integers(7, 11), max_size=24), IDS),
    "long": (st.lists(st.sampled_from([7, 1, 2, 3, 9]), max_size=24), LONG),
    "one in the other": (st.lists(st.integers(7, 9), max_size=16), Tags((7, 8), ((7, 9, 8), (8, 7)))),
}


@pytest.mark.parametrize("form", READINGS)
@given(data=st.data())
def test_what_is_promised_of_any_sequence(form, data):
    some, tags = READINGS[form]
    x = data.draw(some)
    plain, found, faults = spans.strip(x, tags), spans.parse(x, tags), spans.faults(x, tags)
    assert spans.strip(plain, tags) == plain and not spans.parse(plain, tags) and not spans.faults(plain, tags)
    assert all(a.end <= b.start for a, b in zip(found, found[1:]))
    assert all(0 <= s.start < s.end <= len(plain) for s in found)
    assert spans.inside(x, tags) == [any(a <= i < b for a, b in found) for i in range(len(plain))]
    if (
        not faults and form != "one in the other"
    ):  # tags like those cannot be told from each other in any other spelling
        assert spans.wrap(plain, found, tags) == usual(x, tags)


def usual(x, tags):
    """`x` with every closing tag spelled as it is written, by a reading from left to right."""
    written = x if isinstance(x, str) else "".join(map(chr, x))
    opening, *closes = ("".join(map(chr, tag)) if isinstance(tag, tuple) else tag for tag in (tags.open, *tags.closes))
    spelled = re.compile("|".join(map(re.escape, (opening, *closes))))
    new = spelled.sub(lambda match: match.group() if match.group() == opening else closes[0], written)
    return new if isinstance(x, str) else list(map(ord, new))


@pytest.mark.parametrize("form", READINGS)
@given(data=st.data())
def test_what_wrap_gives_is_read_as_it_was_given(form, data):
    some, tags = READINGS[form]
    x = data.draw(some)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(x)), max_size=6)))
    wanted = [Span(a, b) for a, b in zip(cuts[::2], cuts[1::2])]
    try:
        tagged = spans.wrap(x, wanted, tags)
    except ValueError:
        assert form != "text" or spans.strip(x) != x  # a text without tags is never refused
    else:
        assert (spans.strip(tagged, tags), spans.parse(tagged, tags)) == (x, wanted)


@pytest.mark.parametrize(
    ("text", "found", "wanted"),
    [
        (f"a{OPEN}b{OPEN}c{CLOSE}d", [(1, 3)], {"nested": 1}),
        (f"a{CLOSE}b", [], {"stray": 1}),
        (f"a{OPEN}bc", [(1, 3)], {"unclosed": 1}),
        (f"a{OPEN}{CLOSE}b", [], {"empty": 1}),
        (f"a{OPEN}", [], {"unclosed": 1, "empty": 1}),
        (f"{OPEN}a{CLOSE}{OPEN}b{CLOSE}", [(0, 1), (1, 2)], {}),
        ("<bigmodel<bigmodel>>", [], {"nested": 1, "split": 1, "unclosed": 1, "empty": 1}),
        (f"{OPEN}ab<big{CLOSE}model>c{CLOSE}", [(0, 2), (2, 3)], {"split": 1}),
        (f"{OPEN}ab<\\big{OPEN}model>c", [(0, 2)], {"nested": 1, "split": 1}),
        (f"<big<big{OPEN}model>model>a{OTHER_CLOSE}", [(0, 1)], {"nested": 2, "split": 2}),
    ],
)
def test_faults(text, found, wanted):
    assert spans.parse(text) == found
    assert spans.faults(text) == Counter(wanted)


@pytest.mark.parametrize("bad", [[(2, 2)], [(0, 9)], [(0, 2), (1, 3)]])
def test_wrap_refuses_what_cannot_be(bad):
    with pytest.raises(ValueError, match="empty, overlaps another, or leaves"):
        spans.wrap("abcd", [Span(*s) for s in bad])


def test_wrap_refuses_a_text_with_tags():
    for x in (f"a{OPEN}b", f"a{CLOSE}", "a<big</bigmodel>model>b"):
        with pytest.raises(ValueError, match="holds a tag already"):
            spans.wrap(x, [Span(0, 1)])


def test_merge():
    assert spans.merge([Span(5, 6), Span(0, 2), Span(1, 3)]) == [(0, 3), (5, 6)]
    assert spans.merge([Span(0, 2), Span(3, 4)], gap=1) == [(0, 4)]


def test_tags_of_a_tokenizer(tokenizer):
    tags = Tags.of(tokenizer)
    assert len(tags.open) == len(tags.close) == 1
    ids = tokenizer.encode(f"1{OPEN}2{CLOSE}3{OPEN}4{OTHER_CLOSE}")
    assert tokenizer.decode(spans.strip(ids, tags)) == "1234"
    assert spans.parse(ids, tags) == [(1, 2), (3, 4)]


def test_traces_of_a_reasoning_model(r1_traces):
    for text in r1_traces:
        wanted = [Span(i, i + 40) for i in range(0, len(text) - 40, 400)]
        assert len(wanted) >= 5
        assert spans.parse(spans.wrap(text, wanted)) == wanted
        assert spans.strip(spans.wrap(text, wanted), TEXT) == text
