"""Snippets that a judge quotes loosely, in real traces."""

import difflib
import json
import random
import time

import pytest

from srlib.annotation.alignment import _units, align

EDITS = 0.05  # of a snippet's characters
LATEX_SPACES = (" ", "\\,", "\\;", "\\ ")


@pytest.fixture(scope="module")
def texts(real_data):
    lines = (real_data / "r1_style_traces.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["message_thinking"] + "\n\n" + row["message_content"] for row in map(json.loads, lines)]


def perturbed(snippet: str, rng: random.Random) -> str:
    """With other case, white space, LaTeX spacing, and characters dropped."""
    chars = list(snippet)
    for _ in range(int(EDITS * len(snippet))):
        i = rng.randrange(len(chars))
        match rng.choice(("case", "space", "drop", "latex")):
            case "case":
                chars[i] = chars[i].swapcase()
            case "space":
                chars[i : i + chars[i].isspace()] = [rng.choice(("", "\n", "  "))]
            case "drop":
                del chars[i]
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


def test_500_traces_made_from_real_ones(texts):
    """At least 99 % of snippets with 5 % of edits are found to within 2 characters, at most 1 % of foreign ones."""
    rng = random.Random(0)
    right = asked = found = foreign = 0
    for k in range(500):
        parts = texts[k % len(texts)].split("\n\n")
        text = "\n\n".join(parts[rng.randrange(len(parts) // 3) :])
        places = sorted(passage(text, rng) for _ in range(8))
        for match, (start, end) in zip(align([perturbed(text[a:b], rng) for a, b in places], text), places):
            right += match is not None and abs(match.start - start) <= 2 and abs(match.end - end) <= 2
            asked += 1
        other = texts[(k + 1) % len(texts)]
        snippets = [perturbed(other[slice(*passage(other, rng))], rng) for _ in range(4)]
        found += sum(match is not None for match in align(snippets, text))
        foreign += len(snippets)
    print(f"{right} of {asked} right, {found} of {foreign} foreign ones found")
    assert right >= 0.99 * asked
    assert found <= 0.01 * foreign


def test_faster_than_a_ratio_at_every_offset(texts):
    """The plain way compares the snippet with the window at every offset; one offset in 100 is timed."""
    rng = random.Random(1)
    text = next(text for text in texts if len(text) >= 10_000)[:10_000]
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
