"""Snippets that a judge quotes loosely, in traces of a reasoning model."""

import difflib
import random
import string
import time

import pytest
from rapidfuzz.distance import Levenshtein

from srlib.annotation.alignment import _Folded, _units, align

EDITS = 0.05  # of the characters of a snippet that count
LATEX_SPACES = (" ", "\\,", "\\;", "\\ ")


def perturbed(snippet: str, rng: random.Random) -> str:
    """With one character in 20 dropped, put in or exchanged, and as often other case, white space and LaTeX spacing."""
    chars = list(snippet)
    edited = int(EDITS * len(_Folded(snippet).text))
    # From the back, so that places stay; a letter or a number counts, however it is folded.
    for i in sorted(rng.sample([i for i, c in enumerate(chars) if c.isalnum()], edited), reverse=True):
        other = rng.choice([c for c in string.ascii_lowercase if c != chars[i].lower()])
        match rng.choice(("drop", "put in", "exchange")):
            case "drop":
                del chars[i]
            case "put in":
                chars.insert(i, other)
            case "exchange":
                chars[i] = other
    for _ in range(edited):
        i = rng.randrange(len(chars))
        match rng.choice(("case", "space", "latex")):
            case "case":
                chars[i] = chars[i].swapcase()
            case "space":
                chars[i : i + chars[i].isspace()] = [rng.choice(("", "\n", "  "))]
            case "latex":
                if places := [j for j, c in enumerate(chars) if c in "{}()=+"]:
                    chars.insert(rng.choice(places), rng.choice(LATEX_SPACES))
    return "".join(chars)


def passage(text: str, rng: random.Random) -> tuple[int, int]:
    """Whole words, and what is no number or command cut in two."""
    size = rng.randint(40, 400)
    start = rng.randrange(0, max(1, len(text) - size))
    end = min(len(text), start + size)
    while start and not text[start - 1].isspace():
        start -= 1
    while end < len(text) and not text[end].isspace():
        end += 1
    while text[start].isspace():
        start += 1
    while text[end - 1].isspace():
        end -= 1
    for unit in _units(text):  # such as "1 000", or a backslash before a space
        if unit.start < start < unit.end:
            start = unit.start
        if unit.start < end < unit.end:
            end = unit.end
    return start, end


def test_traces_made_of_a_few(r1_traces):
    """At least 99 % of snippets with 5 % of edits are found to within 2 characters, at most 1 % of foreign ones."""
    rng = random.Random(0)
    right = asked = found = foreign = edits = characters = 0
    for k in range(200):
        parts = r1_traces[k % len(r1_traces)].split("\n\n")
        text = "\n\n".join(parts[rng.randrange(len(parts) // 3) :])
        places = sorted(passage(text, rng) for _ in range(8))
        snippets = [perturbed(text[a:b], rng) for a, b in places]
        for snippet, match, (start, end) in zip(snippets, align(snippets, text), places):
            right += match is not None and abs(match.start - start) <= 2 and abs(match.end - end) <= 2
            asked += 1
            as_it_was = _Folded(text[start:end]).text
            edits += Levenshtein.distance(as_it_was, _Folded(snippet).text)
            characters += len(as_it_was)
        other = r1_traces[(k + 1) % len(r1_traces)]
        snippets = [perturbed(other[slice(*passage(other, rng))], rng) for _ in range(4)]
        found += sum(match is not None for match in align(snippets, text))
        foreign += len(snippets)
    print(f"{right} of {asked} right, {found} of {foreign} foreign ones found, {edits / characters:.1%} of edits")
    assert edits / characters == pytest.approx(EDITS, abs=0.005)  # what folding takes away is not among them
    assert right >= 0.99 * asked
    assert found <= 0.01 * foreign


def test_faster_than_a_ratio_at_every_offset(r1_traces):
    """The plain way compares the snippet with the window at every offset; one offset in 100 is timed."""
    rng = random.Random(1)
    text = "\n\n".join(r1_traces)[:10_000]
    places = [passage(text, rng) for _ in range(10)]
    snippets = [perturbed(text[a:b], rng) for a, b in places]
    start = time.process_time()
    for snippet in snippets:
        for at in range(0, len(text) - len(snippet), 100):
            difflib.SequenceMatcher(None, snippet, text[at : at + len(snippet)]).ratio()
    plain = 100 * (time.process_time() - start)
    align(snippets, text)
    start = time.process_time()
    for _ in range(5):
        align(snippets, text)
    ours = (time.process_time() - start) / 5
    print(f"{plain / ours:,.0f} times as fast on {len(text):,} characters")
    print(f"{1000 * ours:.1f} ms for {len(snippets)} snippets")
    assert plain > 100 * ours
