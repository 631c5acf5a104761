"""The grammar of the tags: `<bigmodel>` hands over to the big model, `</bigmodel>` hands back.

Everything here works on text and on lists of token ids alike: what differs is only how a tag
is written there (`TEXT`, or `Tags.of(tokenizer)`). Positions of spans are those of the
sequence *without* tags, so that `strip(x)[span.start:span.end]` is what the big model wrote.

What holds, whatever `x` is: `strip(x)` has no tag, and the spans of `parse(x)` lie in it, in order.
If `x` has no faults, `wrap(strip(x), parse(x))` is `x` again, with `</bigmodel>` where the closing
tag is written `<\bigmodel>`. If `wrap(y, s)` raises nothing, `strip` and `parse` of it are `y` and `s`.

Where a sequence breaks the grammar, the reading is fixed: a nested opening tag and a closing
tag outside a span are ignored, a span left open ends with the sequence, an empty span is no
span; a split tag, which stands around others and is whole once they are taken out
(`<big</bigmodel>model>`), is one all the same. `faults` counts each.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Generic, NamedTuple, Protocol, TypeVar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPEN, CLOSE = "<bigmodel>", "</bigmodel>"
OTHER_CLOSE = r"<\bigmodel>"  # read, since published data has it; never written
SPELLINGS = (OPEN, CLOSE, OTHER_CLOSE)


class Span(NamedTuple):
    """Half-open range `[start, end)` of positions."""

    start: int
    end: int


Text = TypeVar("Text", str, list[int])  # a text, or token ids
Tag = TypeVar("Tag", str, tuple[int, ...])


@dataclass(frozen=True)
class Tags(Generic[Tag]):
    """How the tags are written: as strings, or as tuples of token ids."""

    open: Tag
    closes: tuple[Tag, ...]  # the first is the one written

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase) -> Tags[tuple[int, ...]]:
        """The tags in the ids of `tokenizer`: one id each where they are tokens, else several."""
        ids = [tuple(tokenizer.encode(tag, add_special_tokens=False)) for tag in SPELLINGS]
        return Tags(ids[0], tuple(ids[1:]))

    @property
    def close(self) -> Tag:
        return self.closes[0]


class Written(Protocol):
    """What an offload share is taken of."""

    @property
    def big_tokens(self) -> int: ...

    @property
    def small_tokens(self) -> int: ...


Counted = TypeVar("Counted", bound=Written)


TEXT = Tags(OPEN, (CLOSE, OTHER_CLOSE))


def parse(x: Text, tags: Tags = TEXT) -> list[Span]:
    """The spans of `x`, in order, as positions in `strip(x)`."""
    return _read(x, tags)[1]


def strip(x: Text, tags: Tags = TEXT) -> Text:
    """`x` without its tags, and without a tag: what the big model reads."""
    written = _read(x, tags)[0]
    return written if isinstance(x, str) else list(map(ord, written))


def faults(x: Text, tags: Tags = TEXT) -> Counter[str]:
    """How often `x` breaks the grammar: `nested`, `stray` (close outside), `unclosed`, `empty`, `split`."""
    return _read(x, tags)[2]


def wrap(x: Text, spans: Iterable[Span], tags: Tags = TEXT) -> Text:
    """`x`, which has no tags, with tags around `spans`.

    Raises:
        ValueError: a span is empty, out of range, or overlaps the one before it; `x` has a tag, or
            spells one together with those around it, as ids may.
    """
    pieces: list[Text] = []
    wanted, at = list(spans), 0
    for start, end in wanted:
        if not at <= start < end <= len(x):
            raise ValueError(f"span ({start}, {end}) is empty, overlaps another, or leaves 0…{len(x)}")
        pieces += [x[at:start], tags.open, x[start:end], tags.close]
        at = end
    pieces.append(x[at:])
    wrapped = "".join(pieces) if isinstance(x, str) else [token for piece in pieces for token in piece]
    plain, found, _ = _read(wrapped, tags)
    if plain != _characters(x) or found != wanted:
        raise ValueError("it holds a tag already; give it without tags (`spans.strip`), the spans as they lie there")
    return wrapped


def inside(x: Text, tags: Tags = TEXT) -> list[bool]:
    """For each position of `strip(x)`, whether it lies in a span."""
    plain, spans, _ = _read(x, tags)
    mask = [False] * len(plain)
    for start, end in spans:
        mask[start:end] = [True] * (end - start)
    return mask


def merge(spans: Iterable[Span], gap: int = 0) -> list[Span]:
    """Sorted spans, joined where they overlap, touch or lie at most `gap` positions apart."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start - merged[-1].end <= gap:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def share(traces: Counted | list[Counted] | tuple[Counted, ...]) -> float:
    """Offload share: big / (big + small) over the tokens of a trace or of several, tags left out."""
    several = traces if isinstance(traces, list | tuple) else [traces]
    big = sum(trace.big_tokens for trace in several)
    small = sum(trace.small_tokens for trace in several)
    return big / (big + small) if big + small else 0.0


def _characters(x: str | Sequence[int]) -> str:
    """Ids become characters of the same number, so that one regular expression reads both."""
    return x if isinstance(x, str) else "".join(map(chr, x))


def _read(x: Text, tags: Tags) -> tuple[str, list[Span], Counter[str]]:
    """What is left without tags, as characters; spans in it; faults."""
    plain, found, split = _without(_characters(x), tags)
    faults = Counter({"split": split} if split else {})
    spans: list[Span] = []
    start = None  # of the open span
    for at, opens in found:
        if opens and start is None:
            start = at
        elif opens:
            faults["nested"] += 1
        elif start is None:
            faults["stray"] += 1
        else:
            _end(spans, faults, start, at)
            start = None
    if start is not None:
        faults["unclosed"] += 1
        _end(spans, faults, start, len(plain))
    return plain, spans, faults


def _without(x: str, tags: Tags) -> tuple[str, list[tuple[int, bool]], int]:
    """`x` without tags; of each tag, in order, its place in that and whether it opens; how many others had split."""
    tag, opening = _pattern(tags)
    found: list[tuple[int, bool]] = []
    split = 0
    for reading in count():
        matches = list(tag.finditer(x))
        if not matches:
            break
        split += len(matches) if reading else 0
        earlier, found = deque(found), []
        pieces, at, length = [], 0, 0  # what stays; how far x is read; how much of it stays
        for match in matches:
            while earlier and earlier[0][0] <= match.start():
                place, opens = earlier.popleft()
                found.append((length + place - at, opens))
            pieces.append(x[at : match.start()])
            length += match.start() - at
            at = match.end()
            while earlier and earlier[0][0] < at:  # they stood in the tag
                found.append((length, earlier.popleft()[1]))
            found.append((length, match.group() == opening))
        found += [(length + place - at, opens) for place, opens in earlier]
        x = "".join([*pieces, x[at:]])
    return x, found, split


def _end(spans: list[Span], found: Counter[str], start: int, end: int) -> None:
    if start == end:
        found["empty"] += 1
    else:
        spans.append(Span(start, end))


@cache
def _pattern(tags: Tags) -> tuple[re.Pattern[str], str]:
    written = list(map(_characters, (tags.open, *tags.closes)))
    return re.compile("|".join(map(re.escape, written)), re.DOTALL), written[0]
