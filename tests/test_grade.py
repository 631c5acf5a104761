import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlib.data import equal
from srlib.data.grade import boxed, grade

SEED = 0


@pytest.mark.parametrize(
    ("completion", "gold", "correct", "reason"),
    [
        ("<think>1</think>\\boxed{86}", "86", True, "same text"),
        ("\\boxed{0.5}", "\\frac{1}{2}", True, "same number"),
        ("\\boxed{x+1}", "1+x", True, "equal"),
        ("\\boxed{x+2}", "1+x", False, "differs"),
        ("\\boxed{85}", "86", False, "another number"),
        ("the answer is 86", "86", False, "no boxed answer"),
        ("<think>\\boxed{86}</think> done", "86", False, "no boxed answer"),
        ("<think>so far \\boxed{86}", "86", False, "still thinking"),
        ("\\boxed{1} no, \\boxed{86}", "86", True, "same text"),
        ("\\boxed{86} no, \\boxed{1}", "86", False, "another number"),
        ("\\boxed{86", "86", False, "no boxed answer"),
        ("\\boxed{}", "86", False, "empty box"),
        ("\\boxed{ 86 }", "86", True, "same text"),
        ("\\boxed{\\dfrac{3}{4}}", "\\frac{3}{4}", True, "same text"),
        ("\\boxed{evelyn}", "\\text{Evelyn}", True, "same text"),
        ("\\boxed{y}", "x", False, "differs"),
    ],
)
def test_grade(completion, gold, correct, reason):
    verdict = grade(completion, gold)
    assert (verdict.correct, verdict.reason) == (correct, reason)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("1,200", True),
        ("\\$1{,}200", True),
        ("$1200.00", True),
        ("1200 dollars", True),
        ("1200\\text{ dollars}", True),
        ("-1200", False),
        ("12,00", False),
        ("1200\\%", True),
        ("1200 \\pi", False),
        ("1200x", False),
        ("1", False),
    ],
)
def test_numbers_as_gsm8k_writes_them(answer, right):
    worked = "First <<2*600=1200>>1200.\n#### 1,200"
    assert grade(f"</think>So \\boxed{{{answer}}}", worked).correct is right
    assert grade(f"</think>So it is.\n#### {answer}", "1200").correct is right


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("\\boxed{B}", True),
        ("\\boxed{\\text{(B)}}", True),
        ("\\boxed{B. 12 m/s}", True),
        ("\\boxed{A}", False),
        ("\\boxed{A) or B)}", False),
        ("\\boxed{B or C}", False),
        ("Answer: B", True),
        ("**Answer: (C)**", False),
    ],
)
def test_choices(completion, right):
    assert grade("</think>" + completion, "B").correct is right


def test_a_box_of_the_prompt_is_no_answer():
    prompt = "What is 1 + 1? An example of how to answer: \\boxed{2}. Put your answer in \\boxed{}."
    echo = f"I was asked: {prompt} I do not know."
    assert grade(echo, "2", prompt) == (False, None, "no boxed answer")
    assert grade("It is \\boxed{2}. Put your answer in \\boxed{}.", "2", prompt).correct
    assert grade("\\boxed{2}", "2", prompt).correct


def test_boxed():
    assert boxed("\\boxed{\\frac{1}{2}}") == "\\frac{1}{2}"
    assert boxed("\\boxed{1} \\boxed{2") == "1"
    assert boxed("\\boxed{\\{1, 2\\}}") == "\\{1, 2\\}"
    assert boxed("\\boxed{\\boxed{3}}") == "3"
    assert boxed("} \\boxed{4} {") == "4"
    assert boxed("1") is None


@given(st.text(alphabet="\\boxed{}1 ", max_size=60))
def test_any_text_is_read(text):
    inside = boxed(text)
    assert inside is None or f"{{{inside}}}" in text


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_integers_need_no_worker(a, b):
    started = equal._state.started
    assert grade(f"\\boxed{{{a:,}}}", str(b)).correct is (a == b)
    assert equal._state.started == started


HOSTILE = {  # and the reasons that may be given
    "huge power": ("\\boxed{9^{9^{9^{9}}}}", (equal.TIME,)),
    "huge factorial": ("\\boxed{(10^{9})!}", (equal.TIME,)),
    "unbalanced": ("\\boxed{" * 5000 + "}" * 10 + "{" * 5000, ("empty box",)),
    "long": ("\\boxed{" + "\\frac{1}{x+" * 8000 + "1" + "}" * 8000 + "}", ("too long for an answer",)),
    "100 kB without an end": ("\\sqrt{" * 17_000, ("no boxed answer",)),
    "several boxes": ("\\boxed{1}" * 10_000, ("another number",)),
    "a box in the hint": ("Please put the answer in \\boxed{7}", ("no boxed answer",)),
    "deep": ("\\boxed{" + "(" * 400 + "x" + ")" * 400 + "}", (equal.TIME, equal.UNREADABLE, equal.DIFFERS)),
    "control characters": ("\\boxed{\x00\x07\\\\\n}", (equal.UNREADABLE,)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_completions_end_with_a_reason(name):
    text, reasons = HOSTILE[name]
    verdict = grade("</think>" + text, "7", prompt="7? Please put the answer in \\boxed{7}")
    assert not verdict.correct and verdict.reason in reasons
    assert grade("\\boxed{1+x}", "x+1").correct  # the next one is graded as ever


def test_a_worker_that_was_ended_is_replaced():
    os.kill(_worker(), 9)
    before = equal._state.started
    assert equal.compare("z+1", "1+z") == equal.EQUAL
    assert equal._state.started == before + 1


def _worker() -> int:
    equal.compare("w+1", "1+w")
    if equal._state.process is None:
        equal._state._start()
    return equal._state.process.pid


def test_the_time_limit_ends_what_does_not_end():
    """A worker that computes for ever is ended by the system, here after a fifth of a second."""
    endless = "equal.LIMIT = 0.2; equal._verdict = lambda g, a: g == '1' or exec('while 1: 0')"
    worker = equal._Worker()
    script = [sys.executable, "-c", f"from srlib.data import equal; {endless}; equal._serve()"]
    worker.process = subprocess.Popen(script, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert worker._line(None) == b'"ready"\n'
    assert worker.ask("7", "8") == equal.TIME
    assert worker.process is None


def _grade_in_child(answers):
    answers.put((grade("\\boxed{b+a}", "a+b").correct, equal._state.process.pid))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_have_workers_of_their_own(method):
    own = _worker()
    equal.compare.cache_clear()
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    child = context.Process(target=_grade_in_child, args=(answers,))
    child.start()
    right, pid = answers.get(timeout=120)
    child.join()
    assert right and pid != own
    assert equal.compare("c+1", "1+c") == equal.EQUAL and equal._state.process.pid == own


@pytest.mark.parametrize("end", ["", "import os; os.kill(os.getpid(), 9)"])
def test_no_worker_outlives_the_process_that_asked(end):
    code = f"from srlib.data import equal; equal.compare('a', 'b'); print(equal._state.process.pid, flush=True); {end}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(done.stdout)
    deadline = time.monotonic() + 60
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def test_threads_may_ask_at_the_same_time():
    found = {}
    work = [
        threading.Thread(target=lambda i=i: found.update({i: grade(f"\\boxed{{{i}+t}}", f"t+{i}").correct}))
        for i in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert found == dict.fromkeys(range(8), True)


def disguises(gold):
    """A gold answer as a model may write it."""
    number = re.fullmatch(r"[-+\w{}\\^/ ]*\d[-+\w{}\\^/ ]*", gold) and not re.search("text|begin", gold)
    return (
        gold,
        f" {gold}. ",
        gold.replace("\\frac", "\\dfrac").replace("(", "\\left(").replace(")", "\\right)"),
        f"{gold} + 0" if number else gold,
    )


def answers(path):
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)["answer"] for line in lines]


def test_maths_answers(texts_folder):
    golds = answers(texts_folder / "math500_a.jsonl")
    right = [
        grade(f"<think>\\boxed{{0}}?</think>So it is\n\\[\\boxed{{{x}}}\\]", gold).correct
        for gold in golds
        for x in disguises(gold)
    ]
    assert len(right) == 4 * len(golds) and sum(right) >= 0.995 * len(right)
    others = [(a, b) for a, b in zip(golds, [*golds[1:], golds[0]]) if a != b]
    wrong = [grade(f"</think>\\boxed{{{a}}}", b).correct for a, b in others]
    assert len(wrong) > 0.8 * len(golds) >= 40 and sum(wrong) <= 0.005 * len(wrong)


def test_gsm8k_answers(texts_folder):
    golds = answers(texts_folder / "gsm8k_a.jsonl")
    numbers = [gold.rpartition("#### ")[2] for gold in golds]
    started = equal._state.started
    for write in (
        "</think>\\boxed{{{}}}",
        "</think>She makes \\boxed{{\\${}}} a day.",
        "worked\n#### {}",
        "</think>\\boxed{{{}.00}}",
    ):
        right = [grade(write.format(n), gold).correct for n, gold in zip(numbers, golds)]
        assert len(right) == len(golds) and sum(right) >= 0.995 * len(right)
    pairs = list(zip(numbers, golds[1:] + golds[:1], numbers[1:] + numbers[:1]))
    wrong = [grade(f"</think>\\boxed{{{n}}}", gold).correct for n, gold, own in pairs if n != own]
    assert len(wrong) > 0.9 * len(golds) >= 50 and sum(wrong) <= 0.005 * len(wrong)
    assert equal._state.started == started  # none of this needs the worker
