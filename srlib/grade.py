"""The final answer out of a completion, and whether it equals the gold one."""

from __future__ import annotations

from typing import NamedTuple

from math_verify import parse, verify
from math_verify.parser import ExprExtractionConfig, LatexExtractionConfig


class Grade(NamedTuple):
    """A verdict; `reason` says why, in a few words."""

    correct: bool
    answer: str | None
    reason: str


def grade(completion: str, gold: str) -> Grade:
    """Compare the last `\\boxed{}` of `completion`, behind `</think>` if there is one, to `gold`.

    Equality is that of math-verify, so `\\frac12` equals `0.5`.
    """
    answer = boxed(completion.rpartition("</think>")[2])
    if answer is None:
        return Grade(False, None, "no boxed answer")
    if answer.strip() == gold.strip():
        return Grade(True, answer, "same text")
    if not answer.strip():
        return Grade(False, answer, "empty box")
    wanted, given = (
        parse(f"${text}$", extraction_config=[LatexExtractionConfig(), ExprExtractionConfig()])
        for text in (gold, answer)
    )
    if not given:
        return Grade(False, answer, "cannot be read")
    if verify(wanted, given):
        return Grade(True, answer, "equal")
    return Grade(False, answer, "differs")


def boxed(text: str) -> str | None:
    """What stands in the last whole `\\boxed{}` of `text`; None if there is none."""
    start = text.rfind("\\boxed{")
    while start >= 0:
        depth = 0
        for end in range(start + len("\\boxed"), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start + len("\\boxed{") : end]
        start = text.rfind("\\boxed{", 0, start)
    return None
