"""The final answer out of a completion, and whether it equals the gold one.

One function for rewards and evaluation. What is easy is decided here: the same text, plain
numbers, the letter of a choice. The rest is mathematics and goes to `srlib.data.equal`, a process of
its own with a time limit, so that no completion can hold up a run.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import NamedTuple

from srlib.data import equal
from srlib.data.rows import Problem

LONGEST = 1000  # characters of an answer that is still compared as mathematics
CONTEXT = 16  # characters before a box by which one that repeats the prompt is known


class Grade(NamedTuple):
    """A verdict; `reason` says why, in a few words."""

    correct: bool
    answer: str | None
    reason: str


def grade(completion: str, gold: str, prompt: str = "") -> Grade:
    """Compare the final answer of `completion` to `gold`.

    The answer is the last whole `\\boxed{}` behind `</think>`, if there is one; without any box, what
    stands behind the last `####` (as GSM8K writes it) or the last line `Answer: …`. Equality is:

    - a gold answer that is one capital letter, A to J, is a choice: the letter counts, as in `(B)` or `B. 12 m/s`;
    - numbers are compared as such, without currency, thousands separators, units and `%` (25 % is 25 or 0.25);
    - else it is that of math-verify, so `\\frac12` equals `0.5`.

    Args:
        gold: the answer, or a worked solution of GSM8K that ends in `#### answer`.
        prompt: the question with its hint; a box that only repeats one of its is no answer.
    """
    gold = gold.rpartition("####")[2].strip()
    head, end, tail = completion.rpartition("</think>")
    if not end and "<think>" in tail:
        return Grade(False, None, "still thinking")
    answer = boxed(tail, prompt)
    if answer is None:
        answer = _unboxed(tail)
    if answer is None:
        return Grade(False, None, "no boxed answer")
    if answer.strip() == gold:
        return Grade(True, answer, "same text")
    if not answer.strip():
        return Grade(False, answer, "empty box")
    if len(answer) > LONGEST:
        return Grade(False, answer, "too long for an answer")
    return Grade(*_compare(answer, gold))


def boxed(text: str, prompt: str = "") -> str | None:
    """What stands in the last whole `\\boxed{}` of `text` that does not repeat one of `prompt`; None: there is none.

    One pass over the text, whatever its braces.
    """
    last: tuple[int, int] | None = None
    opened: list[tuple[int, bool]] = []
    for token in re.finditer(r"\\boxed\s*\{|\\[{}\\]|[{}]", text):
        written = token.group()
        if written.endswith("{") and written != "\\{":
            opened.append((token.start(), written != "{"))
        elif written == "}" and opened:
            start, box = opened.pop()
            if box and (last is None or start > last[0]) and not _repeats(text, start, token.end(), prompt):
                last = start, token.end() - 1
    return text[text.index("{", last[0]) + 1 : last[1]] if last else None


def _repeats(text: str, start: int, end: int, prompt: str) -> bool:
    return start >= CONTEXT and "\\boxed" in prompt and text[start - CONTEXT : end] in prompt


def _unboxed(text: str) -> str | None:
    """The answer of a completion without a box, where it is marked in another way."""
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0]
    lines = re.findall(r"^\W*(?:final )?answer(?: is)?\s*:\W*?(\S.*?)\W*$", text, re.IGNORECASE | re.MULTILINE)
    return lines[-1] if lines else None


def _compare(answer: str, gold: str) -> tuple[bool, str, str]:
    if re.fullmatch("[A-J]", gold) and (letter := _letter(answer)):
        return letter == gold, answer, "same choice" if letter == gold else "another choice"
    first, second = _plain(answer), _plain(gold)
    if first == second or (first.casefold() == second.casefold() and first.isalpha() and len(first) > 1):
        return True, answer, "same text"
    numbers, wanted = _numbers(first), _numbers(second)
    if numbers and wanted:
        same = any(_close(a, b) for a in numbers for b in wanted)
        return same, answer, "same number" if same else "another number"
    verdict = equal.compare(gold, answer)
    return verdict == equal.EQUAL, answer, verdict


def _letter(answer: str) -> str | None:
    """The letter of the one choice that is named."""
    text = _plain(answer, spaces=True)
    match = re.match(r"\(?([A-J])(?:$|[).:](.*)$)", text, re.DOTALL)
    if not match or set(re.findall(r"\b[A-J]\b", match[2] or "")) - {match[1]}:
        return None
    return match[1]


def _plain(text: str, spaces: bool = False) -> str:
    """An answer without what changes only its looks."""
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf|mbox|textrm)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\left\b|\\right\b|\\[!,;: ]|\$(?!\d)|\\\(|\\\)|~", " ", text)
    text = re.sub(r"\\[dt]frac\b", r"\\frac", text.replace("{,}", ",")).strip().removesuffix(".")
    return text.strip() if spaces else re.sub(r"\s+(?!\d)|(?<!\d)\s+", "", text)


SIMPLE = re.compile(
    r"(?P<sign>[-+−]?)(?:\\?[$€£])?(?P<sign2>-?)"
    r"(?:(?P<whole>\d{1,3}(?:,\d{3})+|\d+)?(?P<part>\.\d+)?|\\frac\{(?P<a>\d+)\}\{(?P<b>\d+)\}|(?P<c>\d+)/(?P<d>\d+))"
    r"(?P<percent>\\?%)?(?:\s*(?!pi\b)[A-Za-z]{2,}(?:\s*[A-Za-z]+)*)?"
)


def _numbers(text: str) -> list[tuple[Fraction, bool]]:
    """What a plain number may mean, and whether it has decimals; empty: it is none."""
    match = SIMPLE.fullmatch(text)
    if not match or len(text) > 60:
        return []
    above, below = match["a"] or match["c"], match["b"] or match["d"]
    if above and int(below):
        value = Fraction(int(above), int(below))
    elif match["whole"] or match["part"]:
        value = Fraction((match["whole"] or "0").replace(",", "") + (match["part"] or ""))
    else:
        return []
    negative = bool(match["sign"] in ("-", "−")) != bool(match["sign2"])
    value = -value if negative else value
    values = [value, value / 100] if match["percent"] else [value]
    return [(v, match["part"] is not None) for v in values]


def _close(a: tuple[Fraction, bool], b: tuple[Fraction, bool]) -> bool:
    """The same, or where one is a decimal the same to six places, as math-verify has it."""
    return a[0] == b[0] or ((a[1] or b[1]) and round(a[0], 6) == round(b[0], 6))


def verdict(completion: str, problem: Problem, hint: str = "") -> Grade:
    """`grade` for a problem of any set; where many answers are right, the set's own verifier has the last word.

    A verifier of reasoning-gym gives parts of a point: only a whole one counts.
    """
    found = grade(completion, problem.answer, problem.prompt + hint)
    row = problem.meta.get("reasoning_gym")
    if found.correct or found.answer is None or row is None:
        return found
    import reasoning_gym

    score = reasoning_gym.get_score_answer_fn(row["metadata"]["source_dataset"])(found.answer.strip(), row)
    return Grade(True, found.answer, "the set's verifier") if score >= 1.0 else found
