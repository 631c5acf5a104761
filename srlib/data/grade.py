"""The final answer out of a completion, and whether it equals the gold one.

One function for rewards and evaluation. What is easy is decided here: the same text, plain
numbers, the letter of a choice. The rest is mathematics and goes to `srlib.data.equal`, a process of
its own with a time limit, so that no completion can hold up a run.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from srlib.data import equal, reading
from srlib.data.rows import Problem

LONGEST = 500  # characters of an answer that is still compared as mathematics
PRODUCT = 3  # bare letters that may be a product, so that ab is ba; what is longer is a name
EMPTY, NOTHING = "empty box", "no reading in common"
CHOICE = re.compile(r"(?:\\text\{ ?)?\(?([A-J])\)?(?: ?\})?")
CONTEXT = 16  # characters before a box by which one that repeats the prompt is known


class Grade(NamedTuple):
    """A verdict; `reason` says why, in a few words."""

    correct: bool
    answer: str | None
    reason: str


def grade(completion: str, gold: str, prompt: str = "") -> Grade:
    """Compare the final answer of `completion` to `gold`.

    The answer is the last whole `\\boxed{}` behind `</think>`, if there is one; without any box, what
    the last mark says: `Answer: …`, a heading `Answer`, or `####` (as GSM8K writes it). Equality is:

    - a gold answer that is one capital letter, A to J, is a choice: the letter counts, as in `(B)` or `B. 12 m/s`;
    - words are the same words, numbers the same numbers, and units do not contradict: `srlib.data.reading` says how;
    - else it is that of math-verify on the whole of both, so `\\frac{x}{2}` equals `0.5x`.

    Where no way to read fits both, or a part cannot be read, the reason is "no reading in common". An empty answer
    equals nothing.

    Args:
        gold: the answer, or a worked solution of GSM8K that ends in `#### answer`.
        prompt: the question with its hint; a box that only repeats one of its is no answer. Where it ends in `<think>`
            the completion begins inside the thought.
    """
    gold = gold.rpartition("####")[2].strip()
    head, end, tail = completion.rpartition("</think>")
    if not end and ("<think>" in tail or prompt.rstrip().endswith("<think>")):
        return Grade(False, None, "still thinking")
    answer = boxed(tail, prompt)
    if answer is None:
        answer = _unboxed(tail)
    if answer is None:
        return Grade(False, None, "no boxed answer")
    return same(answer, gold)


def same(answer: str, gold: str) -> Grade:
    """Whether an answer equals another, both as they stand in their boxes; by `grade`'s rules."""
    if not reading.tidy(answer[:LONGEST]).strip("{} "):
        return Grade(False, answer, EMPTY)
    if answer.strip() == gold:
        return Grade(True, answer, "same text")
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
    box = start >= CONTEXT and end - start < len(prompt) and "\\boxed" in prompt
    return box and text[start - CONTEXT : end] in prompt


MARK = re.compile(
    r"[\W_]*(?:(?:so|thus|hence|therefore),? +)?(?:(?:the|my|our) +)?(?:(?:final|correct) +)?answer(?: +is)?"
    r"(?P<bold>[*_]*) *(?P<colon>:?)",
    re.IGNORECASE,
)


def _unboxed(text: str) -> str | None:
    """The answer of a completion without a box: what the last line marks that is marked.

    Marks are `Answer:`, also as a heading of the line below, and GSM8K's `####`: as the last line, or before what has
    no words, since it is a heading of Markdown, too. Each line is read once.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    for i, line in reversed(list(enumerate(lines))):
        before, mark, value = line.rpartition("####")
        if mark and not before.strip(" #") and (i + 1 == len(lines) or not re.search("[^\\W\\d_]{2}", value)):
            if not MARK.match(value):
                return _bare(value)
        match = MARK.match(line)
        if not match:
            continue
        value = _bare(line[match.end() :])
        if match["colon"] and value:
            return value
        headed = match["colon"] or match["bold"] or line.lstrip().startswith("#")
        if headed and not value and i + 1 < len(lines):
            return _bare(lines[i + 1])
    return None


def _bare(line: str) -> str:
    """What a line says, without the marks of Markdown around it."""
    line = line.strip()
    bold = line.strip("*_` ")
    return bold.removesuffix(".").rstrip("*_` ")


def _compare(answer: str, gold: str) -> tuple[bool, str, str]:
    given, wanted = reading.tidy(answer), reading.tidy(gold)
    given, wanted = reading.value(given, wanted), reading.value(wanted, given)
    if (match := CHOICE.fullmatch(wanted)) and (letter := _letter(given)):
        return letter == match[1], answer, "same choice" if letter == match[1] else "another choice"
    if given == wanted:
        return True, answer, "same text"
    name, gold_name = reading.name(given), reading.name(wanted)
    if name and gold_name:
        if reading.same_name(name, gold_name):
            return True, answer, "same text"
        if name.marked or gold_name.marked or max(map(len, name.words + gold_name.words)) > PRODUCT:
            return False, answer, "another name"
    elif (name and name.marked) or (gold_name and gold_name.marked):
        return False, answer, NOTHING
    numbers = reading.quantity(given), reading.quantity(wanted)
    (given, unit), (wanted, own) = (
        (reading.latex(number), number.unit) if number else reading.split(text)
        for number, text in zip(numbers, (given, wanted))
    )
    if not reading.fits(unit, own):
        return False, answer, "another unit"
    if numbers[0] and numbers[1]:
        same = reading.same(numbers[0], numbers[1])
        return same, answer, "same number" if same else "another number"
    verdict = equal.compare(wanted, given)
    return verdict == equal.EQUAL, answer, NOTHING if verdict in (equal.GOLD, equal.UNREADABLE) else verdict


def _letter(text: str) -> str | None:
    """The letter of the one choice that is named."""
    match = re.match(r"\(?([A-J])(?:$|[).:](.*)$)", re.sub(r"\\text\{([^{}]*)\}", r" \1 ", text).strip(), re.DOTALL)
    if not match or set(re.findall(r"\b[A-J]\b", match[2] or "")) - {match[1]}:
        return None
    return match[1]


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
