"""Where the snippets that a judge quotes stand in a trace.

A judge quotes loosely: it changes case and spaces, drops a character, writes `\\frac {1}{2}`. So a
snippet is looked for word for word, then with case, white space and LaTeX's spaces left out
(*folded*), then allowing for edits. For the last, a snippet is cut into pieces: if at most k
characters differ, one of k + 1 pieces is in the trace as it is (the pigeonhole principle), and
finding a piece is a plain string search. Places that pieces agree on are compared in full, and
their ends moved to where the edit distance is least.

This module knows text alone. Tokens come in with `units` and `cover`, which say what of a trace
must not be cut: a number, a LaTeX command.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from srlib.data import spans
from srlib.data.spans import Span

MIN_SCORE = 0.85  # one character in seven: three times what a careful judge changes, far from another sentence
SHORT = 12  # folded characters below which a snippet is too little to be found by likeness
PLACES = 64  # occurrences of a snippet, or of a piece of one, that are looked at
CANDIDATES = 4  # places that are compared in full
SLACK = 4  # characters that an end is moved by at a time, when it is refined

# What folding leaves out. A line break of LaTeX (\\) is kept: its second backslash begins no space.
_SPACES = re.compile(r"(\\\\)|\s+|\\[,;:!> ]|\\q?quad(?![A-Za-z])|~")
# A number with its separators and decimals, and a LaTeX command.
_UNITS = re.compile(r"\\(?:[A-Za-z]+|.)|(?:\d{1,3}(?:(?:,|\{,\})\d{3})+(?!\d)|\d+)(?:\.\d+)?", re.DOTALL)


class Match(NamedTuple):
    """Where a snippet stands: `text[start:end]`.

    `score` is 1 if the two are the same but for case and spaces, else 1 − edits / length.
    """

    snippet: str
    start: int
    end: int
    score: float


def align(snippets: Sequence[str], text: str, min_score: float = MIN_SCORE) -> list[Match | None]:
    """Find each of `snippets` in `text`.

    A snippet that stands there several times is put where most of the snippets follow each other
    as they were given; two snippets of the same words get two places, if there are two. The ends
    never lie inside a number or a LaTeX command: such a match is widened to hold all of it.

    Args:
        snippets: in the order of the text, as far as known.
        min_score: least score of what is taken for the snippet.

    Returns:
        for each snippet its match; None: `why` says why not.
    """
    haystack, whole = _Folded(text), _units(text)
    found = [_places(snippet, haystack, min_score) for snippet in snippets]
    return [
        Match(snippet, *_widen(place, whole), score) if place else None
        for snippet, (place, score) in zip(snippets, _in_order(found))
    ]


def why(snippet: str) -> str:
    """The reason why a snippet that `align` did not find was not found."""
    size = len(_Folded(snippet).text)
    if not size:
        return "empty"
    return "too short to be found by likeness" if size < SHORT else "nothing in the trace is like it"


def units(text: str, offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """The numbers and LaTeX commands of `text`, and characters of several tokens, as spans of tokens.

    To hand over within a number would ask the small model for its last digits, which it can
    know as little as the first.

    Args:
        offsets: characters of each token, in order.
    """
    covered = [cover(unit, offsets) for unit in _units(text)]
    covered += [Span(i, i + 2) for i, (a, b) in enumerate(zip(offsets, offsets[1:])) if b[0] < a[1]]
    return spans.merge([span for span in covered if span.end > span.start], gap=-1)  # two that share a token are one


def cover(span: Span, offsets: Sequence[tuple[int, int]]) -> Span:
    """The tokens that hold the characters of `span`; empty if there are none."""
    start = bisect_left(offsets, span.start + 1, key=lambda token: token[1])
    end = bisect_left(offsets, span.end, key=lambda token: token[0])
    return Span(start, max(start, end))


class _Folded:
    """A text without what does not count, and where its characters were."""

    def __init__(self, text: str) -> None:
        self.original = text
        self.at: list[int] = []
        pieces, kept = [], 0
        for space in _SPACES.finditer(text):
            if space[1] is None:
                pieces.append(text[kept : space.start()])
                self.at += range(kept, space.start())
                kept = space.end()
        pieces.append(text[kept:])
        self.at += range(kept, len(text))
        folded = "".join(pieces)
        self.text = folded.lower()
        if len(self.text) != len(folded):  # some capitals have two characters in lower case
            self.text = "".join(c if len(c.lower()) > 1 else c.lower() for c in folded)

    def back(self, start: int, end: int) -> Span:
        """The characters of the original that `[start, end)` stands for."""
        return Span(self.at[start], self.at[end - 1] + 1)


def _places(snippet: str, haystack: _Folded, min_score: float) -> list[tuple[Span, float]]:
    """Where `snippet` may stand, by how it was found: all places of the strictest way that finds any."""
    needle = _Folded(snippet)
    if not needle.text:
        return []
    core = snippet.strip()
    if exact := [(Span(i, i + len(core)), 1.0) for i in _occurrences(core, haystack.original)]:
        return exact
    if folded := _occurrences(needle.text, haystack.text):
        return [(haystack.back(i, i + len(needle.text)), 1.0) for i in folded]
    if len(needle.text) < SHORT:
        return []
    found = [_refined(needle.text, haystack.text, guess) for guess in _guesses(needle.text, haystack.text, min_score)]
    best = max((score for _, score in found), default=0.0)
    # Another place counts as well only if it is as like: a repeated passage.
    return [(haystack.back(*place), s) for place, s in dict(found).items() if s >= min_score and s == best]


def _occurrences(needle: str, text: str) -> list[int]:
    found: list[int] = []
    at = text.find(needle)
    while at >= 0 and len(found) < PLACES:
        found.append(at)
        at = text.find(needle, at + 1)
    return found


def _guesses(needle: str, text: str, min_score: float) -> list[int]:
    """Starts in `text` that most pieces of `needle` agree on, to within the edits that are allowed."""
    edits = int((1 - min_score) * len(needle)) + 1
    size = max(3, len(needle) // (edits + 1))
    starts = sorted(
        i - at for at in range(0, len(needle) - size + 1, size) for i in _occurrences(needle[at : at + size], text)
    )
    windows, first = [], 0  # (pieces, start): those that begin within `edits` of each other
    for last, start in enumerate(starts):
        while start - starts[first] > edits:
            first += 1
        windows.append((last - first + 1, starts[(first + last) // 2]))
    chosen: list[int] = []
    for _, start in sorted(windows, key=lambda window: -window[0]):
        if all(abs(start - other) > edits for other in chosen):
            chosen.append(start)
            if len(chosen) == CANDIDATES:
                break
    return chosen


def _refined(needle: str, text: str, guess: int) -> tuple[Span, float]:
    """The place near `guess` where `needle` fits best, and its score."""
    slack = len(needle) // 6 + SLACK
    low = max(0, guess - slack)
    window = text[low : guess + len(needle) + slack]
    place = _roughly(needle, window)
    best = Levenshtein.distance(needle, window[place.start : place.end])
    while True:
        near = [
            Span(place.start + by, place.end) if side else Span(place.start, place.end + by)
            for side in (True, False)
            for by in range(-SLACK, SLACK + 1)
        ]
        near = [span for span in near if 0 <= span.start < span.end <= len(window)]
        edits, better = min((Levenshtein.distance(needle, window[s.start : s.end]), s) for s in near)
        if edits >= best:
            score = 1 - best / max(len(needle), place.end - place.start)
            return Span(low + place.start, low + place.end), score
        best, place = edits, better


def _roughly(needle: str, window: str) -> Span:
    """Where `needle` stands in a window that is longer: the run of equal blocks that pays best.

    Every equal character counts one, every character between two blocks, on either side, minus one.
    """
    best, run = (0, Span(0, len(window))), None
    for block in Levenshtein.editops(needle, window).as_matching_blocks():
        if not block.size:
            continue
        if run is not None:
            apart = max(block.a - run[1], block.b - run[2])
        if run is None or run[0] - apart < 0:
            run = [0, block.a, block.b, max(0, block.b - block.a)]  # worth, ends, and where the needle would begin
            apart = 0
        run[0] += block.size - apart
        run[1], run[2] = block.a + block.size, block.b + block.size
        if run[0] > best[0]:
            best = run[0], Span(run[3], min(len(window), run[2] + len(needle) - run[1]))
    return best[1]


def _in_order(found: Sequence[list[tuple[Span, float]]]) -> list[tuple[Span | None, float]]:
    """One place for each snippet, so that as many as can follow each other in the order given."""
    ends: list[int] = []  # ends[n]: the least start with which n + 1 snippets in order can end
    last: list[tuple[int, int]] = []  # of that chain: snippet and start
    before: dict[tuple[int, int], tuple[int, int] | None] = {}
    for i, places in enumerate(found):
        # From the back, so that a snippet does not follow itself.
        for start in sorted({place.start for place, _ in places}, reverse=True):
            n = bisect_left(ends, start)
            before[i, start] = last[n - 1] if n else None
            if n == len(ends):
                ends.append(start)
                last.append((i, start))
            else:
                ends[n], last[n] = start, (i, start)
    chain, at = {}, last[-1] if last else None
    while at is not None:
        chain[at[0]] = at[1]
        at = before[at]
    taken = set(chain.values())
    answers: list[tuple[Span | None, float]] = []
    for i, places in enumerate(found):
        free = [p for p in places if p[0].start not in taken]
        place = next((p for p in places if p[0].start == chain.get(i)), None) or next(iter(free or places), None)
        if place:
            taken.add(place[0].start)
        answers.append(place or (None, 0.0))
    return answers


def _units(text: str) -> list[Span]:
    return [Span(*unit.span()) for unit in _UNITS.finditer(text)]


def _widen(span: Span, whole: Sequence[Span]) -> Span:
    """`span` and all of the units that its ends lie in."""
    start, end = span
    i = bisect_left(whole, start, key=lambda unit: unit.end)
    if i < len(whole) and whole[i].start < start < whole[i].end:
        start = whole[i].start
    i = bisect_left(whole, end, key=lambda unit: unit.end)
    if i < len(whole) and whole[i].start < end < whole[i].end:
        end = whole[i].end
    return Span(start, end)
