import json

import pytest

from srlib.grade import boxed, grade


@pytest.mark.parametrize(
    ("completion", "gold", "correct", "reason"),
    [
        ("<think>1</think>\\boxed{86}", "86", True, "same text"),
        ("\\boxed{0.5}", "\\frac{1}{2}", True, "equal"),
        ("\\boxed{85}", "86", False, "differs"),
        ("the answer is 86", "86", False, "no boxed answer"),
        ("<think>\\boxed{86}</think> done", "86", False, "no boxed answer"),
        ("\\boxed{1} no, \\boxed{86}", "86", True, "same text"),
        ("\\boxed{86", "86", False, "no boxed answer"),
        ("\\boxed{}", "86", False, "empty box"),
        ("\\boxed{ 86 }", "86", True, "same text"),
    ],
)
def test_grade(completion, gold, correct, reason):
    verdict = grade(completion, gold)
    assert (verdict.correct, verdict.reason) == (correct, reason)


def test_boxed():
    assert boxed("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert boxed("\\boxed{1} \\boxed{2") == "1"
    assert boxed("1") is None


def test_real_answers(real_data):
    rows = [json.loads(line) for line in (real_data / "math500_a.jsonl").open()][:100]
    golds = [row["answer"] for row in rows]
    right = [grade(f"<think>…</think>So it is \\boxed{{{gold}}}.", gold).correct for gold in golds]
    wrong = [grade(f"</think>\\boxed{{{a}}}", b).correct for a, b in zip(golds, golds[1:]) if a != b]
    assert sum(right) == len(right)
    assert sum(wrong) <= 1
