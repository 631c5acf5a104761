"""Traces of the test set's problems are found and dropped, and no others."""

import json
import random
from collections import Counter

import pytest

from srlib.data import problems
from srlib.data.overlap import Overlap
from srlib.data.rows import write_jsonl
from srlib.params import Params
from tests.conftest import TEXTS

REASON = "its problem is in the test set"


def given(tmp_path, traces, test, **data):
    files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", rows)) for name, rows in (("a", traces), ("b", test))}
    return Params(run="x", data={"traces": files["a"], "test": {"path": files["b"], "prompt": "boxed"}, **data})


def questions(folder, name):
    rows = map(json.loads, (folder / f"{name}_a.jsonl").read_text(encoding="utf-8").splitlines())
    return [row.get("problem") or row["question"] for row in rows]


def people(name):
    """Problems as people put them."""
    return questions(TEXTS["own"], name)


def reworded(text, draw):
    """In other spacing and case."""
    words = [draw.choice([word, word.upper(), word.lower()]) for word in text.split()]
    return "\n" + "".join(word + draw.choice(["  ", "\n", "\t ", "\u00a0"]) for word in words)


def test_planted_problems_are_dropped_and_counted_and_no_other(tmp_path):
    draw = random.Random(1)
    test, others = people("math500"), people("gsm8k")
    # Word problems with other numbers are others, and so are the test set's own with one word changed in each few.
    rest = [f"In year {i} it was asked: {draw.choice(others)}" for i in range(980)]
    planted = draw.sample(test, 20)
    planted = [reworded(text, draw) if i < 5 else text for i, text in enumerate(planted)]
    rows = [{"id": str(i), "prompt": text, "answer": "1", "trace": "1"} for i, text in enumerate(rest + planted)]
    draw.shuffle(rows)
    p = given(tmp_path, rows, [{"prompt": text, "answer": "1"} for text in test])
    dropped = Counter()
    kept = problems.traces(p, 980, worked=True, dropped=dropped)
    assert dropped == {REASON: 20}
    assert {x.id for x in kept} == {str(i) for i in range(980)}


def test_real_sets_share_nothing(texts_folder):
    read = {name: questions(texts_folder, name) for name in ("gsm8k", "math500")}
    for test, traces in (("gsm8k", "math500"), ("math500", "gsm8k")):
        found = Overlap(read[test], Params(run="x").data.decontaminate)
        assert not any(map(found.holds, read[traces])) and all(map(found.holds, read[test]))


@pytest.mark.parametrize(
    ("text", "there"),
    [
        ("what  is $2+3$?", True),  # a short one: the whole of it, in any case and spacing
        ("What is $2 + 3$?", True),
        ("What is $2-3$?", False),
        ("What is $2+3$? And $4$?", False),
        ("A train of nine cars leaves at noon and meets ANOTHER\u00a0of four at five.", True),
        ("Of old, a train of nine cars leaves at noon and meets another of four, they say.", True),
        ("A train of nine cars comes at noon and meets another of five at six.", False),
        ("Reason step by step, please, and put what you find at the end into a box of its own.", False),
    ],
)
def test_what_is_the_same(text, there):
    instruction = " Reason step by step, please, and put what you find at the end into a box of its own."
    long = "A train of nine cars leaves at noon and meets another of four at five."
    assert Overlap(["What is $2+3$?", long], 12).holds(text) == there
    # An instruction behind every problem of either side is no problem's own.
    both = Overlap([f"What is $2+3$?{instruction}", long + instruction], 12)
    assert both.holds(text + instruction) == there


def test_a_single_problem_is_looked_for_too():
    text = " ".join(f"word{i}" for i in range(30))
    assert Overlap([text], 13).holds(text.upper()) and Overlap([text, text], 13).holds(text)


def test_nothing_is_looked_for_where_it_is_switched_off(tmp_path):
    row = {"id": "0", "prompt": " ".join(map(str, range(20))), "answer": "1", "trace": "1"}
    assert problems.traces(given(tmp_path, [row], [row], decontaminate=0), 1)[0].id == "0"
    assert not Params(run="x").kept_apart, "the arithmetic world's splits share none"
    assert not Params(run="x", data={"traces": "own.jsonl", "test": "arith"}).kept_apart
