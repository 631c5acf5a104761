import itertools
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlib.data import equal, reading
from srlib.data.grade import LONGEST, boxed, grade

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
        ("\\boxed{5}", "\\text{Evelyn}", False, "no reading in common"),
        ("\\boxed{Elvis}", "\\text{Evelyn}", False, "another name"),
        ("\\boxed{3 + \\heartsuit +}", "3", False, "no reading in common"),
        ("\\boxed{3 hours}", "3 minutes", False, "another unit"),
        ("\\boxed{86}", "", False, "no reading in common"),
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
    "deep": ("\\boxed{" + "(" * 200 + "x" + ")" * 200 + "}", ("no reading in common",)),
    "control characters": ("\\boxed{\x00\x07\\\\\n}", ("no reading in common",)),
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


# what an answer says against a gold answer, kind by kind: those that are equal, and those that are not
KINDS = {
    "percent": (
        [("50\\%", "0.5"), ("50", "50\\%"), ("12.5\\%", "\\frac{1}{8}"), ("12.5 percent", "12.5\\%"), ("150\\%", "1.5")]
        + [("12.5", "12.5\\%"), ("\\frac12\\%", "0.5\\%"), ("33\\frac13\\%", "\\frac{1}{3}"), ("7\\text{ percent}", "7")],
        [("0.7\\%", "70\\%"), ("5\\%", "0.5"), ("0.5", "0.5\\%"), ("500\\%", "50"), ("50\\%", "5000"), ("\\frac12\\%", "50\\%")],
    ),
    "units": (
        [("5 cm", "5"), ("5", "5 cm"), ("5\\text{ cm}^2", "5"), ("5 square centimeters", "5\\text{ cm}^2"), ("5 ft", "5 feet")]
        + [("5\\mathrm{m/s}", "5 meters per second"), ("60 mph", "60 miles per hour"), ("\\$18 a day", "18"), ("18 €", "€18")]
        + [("\\$18", "18 dollars"), ("12 eggs per day", "12"), ("6\\text{ red apples}", "6"), ("\\text{5 apples}", "5"), ("1 day", "1"), ("145°", "145")]
        + [("145 degrees", "145^\\circ"), ("288\\pi\\text{ cm}^3", "288 \\pi"), ("25^\\circ\\text{C}", "25"), ("204", "204_5")]
        + [("x = 5\\text{ cm}", "5"), ("\\frac{270}{7}", "\\frac{270}7\\text{ degrees}"), ("3 hrs", "3\\text{ hours}")],
        [("5 cm", "5 mm"), ("5\\text{ cm}^2", "5\\text{ cm}"), ("60 mph", "60 km/h"), ("\\$18", "18 cents"), ("€18", "\\$18")]
        + [("6 apples", "6 oranges"), ("5\\text{ m}", "5\\text{ km}"), ("145^\\circ", "145 radians"), ("25°C", "25°F")]
        + [("288\\pi\\text{ cm}^3", "288 \\pi\\text{ cm}^2"), ("\\sin 30^\\circ", "\\sin 30"), ("204_5", "204_6"), ("204_5", "204")]
        + [("3 years", "3 months"), ("5 am", "5 pm"), ("9\\text{ m/s}", "9\\text{ m}")],
    ),
    "words that change a number": (
        [("3 million", "3000000"), ("2 dozen eggs", "24"), ("3\\text{ million dollars}", "\\$3,000,000")],
        [("7 \\text{ billion}", "7"), ("2 dozen", "2"), ("3 hundred", "3 thousand"), ("5 fewer", "5 more"), ("3 halves", "3")]
        + [("half", "0.5"), ("5 squared", "5"), ("20 more", "20"), ("3 \\text{ or } 4", "3")],
    ),
    "letters that are variables": (
        [("ab", "ba"), ("2ab", "2ba"), ("2 π", "2\\pi"), ("2xy", "2 x y")],
        [("3pq", "3rs"), ("3pq", "3"), ("3", "3pq"), ("3x", "3"), ("5m", "5"), ("12abc", "12xyz"), ("2 pi", "2")]
        + [("2 \\log x", "2\\ln x"), ("2\\pi", "2"), ("2e", "2"), ("5\\text{ x}", "5")],
    ),
    "case": (
        [("YES", "\\text{Yes}"), ("tuesday", "Tuesday"), ("\\textbf{Evelyn}", "\\text{evelyn}")],
        [("RR", "rr"), ("TT", "Tt"), ("AB", "ab"), ("Aabb", "aabb"), ("X", "x"), ("x+1", "X+1"), ("X_1", "x_1"), ("E", "e")]
        + [("\\Gamma", "\\gamma"), ("\\overline{AB}", "\\overline{ab}"), ("\\text{BB}", "\\text{Bb}"), ("seat", "\\text{east}")],
    ),
    "small differences": (
        [("0.333333", "\\frac13"), ("1.41421356", "\\sqrt{2}"), ("0.5x", "\\frac{x}{2}"), ("5.0", "5"), ("-0", "0")],
        [("0.333333", "0.333334"), ("0.33333", "\\frac13"), ("1.4142", "\\sqrt2"), ("10^{-20}", "10^{-21}"), ("1e-8", "1e-9")]
        + [("x+10^{-20}", "x+10^{-21}"), ("10^{-400}", "0"), ("1+10^{-30}", "1"), ("(10^{-9},1)", "(10^{-10},1)")]
        + [("\\pi+10^{-20}", "\\pi"), ("1000000.0000001", "1000000"), ("\\frac{1}{3^{90}}", "\\frac{1}{3^{91}}")],
    ),
    "the whole": (
        [("2√(3)", "2\\sqrt3"), ("√13", "\\sqrt{13}"), ("2 * sqrt(3)", "2\\sqrt{3}"), ("e^{-1}", "\\frac{1}{\\mathrm{e}}")]
        + [("x=5", "5"), ("5", "x=5"), ("f(2)=5", "5"), ("2+3=5", "5"), ("\\sin 30^\\circ", "\\frac12"), ("x=2,125", "2,125")],
        [("5+√2", "5+√3"), ("3 + ♥", "3"), ("3 → 4", "3"), ("2^{x", "2"), ("7 \\foo{3}", "7"), ("1,2,\\ldots", "1,2")]
        + [("y'", "y"), ("2x=5", "5"), ("x^2=4", "4"), ("2+4=5", "5"), ("y=5", "x=5"), ("\\ln 2+\\mathrm e", "\\ln 2-\\mathrm e")]
        + [("\\mathrm{e}", "1"), ("3\\sqrt(7)", "3"), ("5!", "5")],
    ),
    "groups of digits": (
        [("1\u2009000\u2009000", "1000000"), ("1 000", "1000"), ("10\\;000", "10000"), ("10~000", "10000"), ("20\\,000x", "20000x")]
        + [("12\\,345.5", "12345.5"), ("3.141\\,592", "3.141592"), ("11,\\! 111,\\! 100", "11111100"), ("(10\\,000, 5)", "(10000, 5)")],
        [("30\\,000", "10\\,000"), ("10\\,000", "10"), ("10\\,00", "1000"), ("(10\\,000, 5)", "(20\\,000, 5)"), ("12,00", "1200")],
    ),
    "mixed numbers": (
        [("2 3/4", "\\frac{11}{4}"), ("2½", "2.5"), ("-1 1/2", "-1.5"), ("1\\tfrac{1}{4}", "1.25"), ("2 1/2 cups", "2.5")],
        [("-1 1/2", "-\\frac12"), ("11/4", "1 1/4"), ("1\\frac14", "14"), ("2\\frac14", "\\frac{1}{2}"), ("3/4", "3")],
    ),
    "looks": (
        [("**73**", "73"), ("\\boldsymbol{\\frac{1}{2}}", "0.5"), ("$73$", "73"), ("\\(73\\)", "73"), ("\\textbf{(C)}", "C")]
        + [("C", "\\text{(C)}"), ("1.5 \\times 10^5", "150000"), ("6.5E-5", ".000065"), ("−5", "-5"), ("x²", "x^{2}")]
        + [("\\begin{pmatrix}-1\\\\2\\end{pmatrix}", "\\begin{pmatrix} -1 \\\\ 2 \\end{pmatrix}")],
        [("B", "\\text{(C)}"), ("1.5e5", "1.5e6"), ("1.5e5", "1.55"), ("x²", "x^3")],
    ),
    "nothing": ([], [("", ""), (" ", ""), ("\\text{}", "\\text{}"), ("\\,", "\\,"), ("$$", ""), ("{}", "{}"), ("5", "")]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_answers_that_say_the_same(kind):
    same, other = KINDS[kind]
    for expected, pairs in ((True, same), (False, other)):
        verdicts = {(answer, gold): grade(f"\\boxed{{{answer}}}", gold) for answer, gold in pairs}
        assert {pair: verdict for pair, verdict in verdicts.items() if verdict.correct is not expected} == {}


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("⭐ Final answer: **7**", "7"),
        ("### Step 2\nadd\n__Answer:__ 7", "7"),
        ("#### 1. Add\nadd\n#### 2. Check\nit is right\nThe final answer is: 7.", "7"),
        ("**Answer:** 7\n\n#### Check\n3 + 4 is 7", "7"),
        ("## Final Answer\n\n$\\frac{1}{2}$\n", "$\\frac{1}{2}$"),
        ("**Final Answer**\n7", "7"),
        ("> Answer: -7", "-7"),
        ("Answer: x^{2}", "x^{2}"),
        ("So 7.\n#### 7 apples", "7 apples"),
        ("#### 7\nI hope that helps.", "7"),
        ("#### Step 1\nadd 3 and 4", None),
        ("Answer 7", None),
    ],
)
def test_answers_without_a_box(completion, answer):
    assert grade(completion, "no such answer").answer == answer


def test_a_thought_that_the_prompt_opened():
    maybe, over = "Maybe \\boxed{54}? But", "Maybe \\boxed{54}? </think> It is \\boxed{55}."
    for prompt in ("What is it?\n<think>\n", "What is it?\n<think>"):
        assert grade(maybe, "54", prompt) == (False, None, "still thinking")
        assert grade(over, "55", prompt).correct and not grade(over, "54", prompt).correct
    assert grade(maybe, "54", "Think between <think> and </think>. What is it?").correct


PIECES = (
    "*|> |-|#|#### |\n|*\n|> \n|answer: |answer: x|**Answer:** |the |final answer |\\boxed|\\boxed{|\\boxed {1|\\boxed{}|{|}|<|"
    "<think>|</think>|5 |a |5 a |1 000 |12 345 |\\,|1\\,000|$|\\text{|\\text{a}|\\frac|\\sqrt(|^|_|,|.5|=|x=|(|√|²|%|percent |"
    "per |apples |/|`"
).split("|")
FRAMES = [("", ""), ("answer: x", " "), ("answer: ", "!"), ("\\boxed{5 ", "}"), ("\\boxed{", "!}"), ("#### ", "\n!")]


def test_repetition_holds_nothing_up(monkeypatch):
    """100,000 characters of what the patterns look for, framed by what they begin and end with.

    The comparison of mathematics is left out: it has a limit of its own.
    """
    monkeypatch.setattr(equal, "compare", lambda gold, answer: equal.UNREADABLE)
    for piece, (before, behind) in itertools.product(PIECES, FRAMES):
        text = before + piece * (100_000 // len(piece)) + behind
        start = time.process_time()
        grade(text, "7", prompt="7? Please put the answer in \\boxed{}")
        assert time.process_time() - start < 1, (before, piece, behind)


@pytest.mark.parametrize("frame", FRAMES[1:])
def test_repetition_in_a_short_answer_holds_nothing_up(frame):
    """As long as an answer may be, up to the comparison of mathematics, which has a limit of its own."""
    for piece in PIECES:
        text = (frame[0] + piece * 500)[: LONGEST - 2] + frame[1]
        start = time.process_time()
        for side in (reading.tidy(text), text):
            reading.quantity(side), reading.split(side), reading.name(side)
        assert time.process_time() - start < 1, (frame, piece)


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


def real_golds():
    """The golds of both sets, those of the published files where they are."""
    folder = Path(os.environ.get("SRLIB_REAL_DATA", Path(__file__).parent / "data"))
    return answers(folder / "math500_a.jsonl"), [
        x.rpartition("####")[2].strip() for x in answers(folder / "gsm8k_a.jsonl")
    ]


SPELLINGS = (
    lambda g: g,
    lambda g: f" {g} ",
    lambda g: f"${g}$",
    lambda g: f"\\({g}\\)",
    lambda g: f"{{{g}}}",
    lambda g: f"{g}.",
    lambda g: f"**{g}**",
    lambda g: f"\\boldsymbol{{{g}}}",
    lambda g: f"\\boxed{{{g}}}",
    lambda g: f"\\displaystyle {g}",
    lambda g: g.replace("\\frac", "\\dfrac").replace("\\left", "").replace("\\right", ""),
    lambda g: re.sub(r"(?<=\d),?(?:\\!)? ?(?=\d{3}\b)", "\\,", g) if re.fullmatch(r"[\d,\\! ]+", g) else g,
)


def test_a_gold_equals_itself_in_other_spellings():
    for gold in itertools.chain(*real_golds()):
        wrong = [
            x for write in SPELLINGS if not grade(f"So it is\n\\[\\boxed{{{(x := write(gold))}}}\\]", gold).correct
        ]
        assert wrong == [], gold


def mutants(gold, chance):
    """Golds with a letter, a digit, a sign or a unit changed, one each."""
    for match in re.finditer(r"\d", gold):
        other = chance.choice("0123456789".replace(match[0], ""))
        yield gold[: match.start()] + other + gold[match.end() :]
    for match in re.finditer(r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])|(?<=\\text\{)[A-Za-z]+", gold):
        at = match.start() + chance.randrange(len(match[0]))
        others = [x for x in "abcdfghjkmnpqrstuvwxyz" if x != gold[at].lower()]
        yield gold[:at] + chance.choice(others) + gold[at + 1 :]
        if len(match[0]) == 1:
            yield gold[:at] + gold[at].swapcase() + gold[at + 1 :]
    for match in re.finditer("[-+]", gold):
        yield gold[: match.start()] + {"-": "+", "+": "-"}[match[0]] + gold[match.end() :]
    if re.match(r"[\d\\(]", gold) and "text" not in gold:
        yield "-" + gold


def test_mutated_golds_are_wrong():
    """2,000 of them; left out are those of 0, of which -0 is no other number."""
    chance = random.Random(SEED)
    golds = [gold for gold in itertools.chain(*real_golds()) if gold != "0"]
    pairs = {(mutant, gold) for _ in range(9) for gold in golds for mutant in mutants(gold, chance)}
    pairs = chance.sample(sorted(pairs), 1600)
    numbers = sorted({gold for gold in golds if re.fullmatch(r"[\d.,]+|\\frac\{\d+\}\{\d+\}", gold)})
    units = ["cm", "km", "cm^2", "hours", "minutes", "apples", "cents", "million", "more", "less", "dollars per hour"]
    for _ in range(400):
        gold, (one, other) = chance.choice(numbers), chance.sample(units, 2)
        pairs.append((f"{gold}\\text{{ {one}}}", f"{gold}\\text{{ {other}}}"))
    assert len(pairs) == 2000
    assert [
        (*pair, verdict.reason) for pair in pairs if (verdict := grade(f"\\boxed{{{pair[0]}}}", pair[1])).correct
    ] == []


# Where the verdict departs from math-verify's on purpose: answer, gold, what math-verify says
DEPARTURES = [
    ("\\text{Evelyn}.", "\\text{Evelyn}", False),  # a full stop is no content
    ("{(3, \\pi)}", "(3, \\pi)", False),  # nor are braces
    ("x=2,125", "2,125", False),  # nor commas in a number
    ("10\\,000", "10000", False),  # nor is a thin space
    ("12.5", "12.5\\%", False),  # the sign may be left out of a decimal, too
    ("3 hours", "3 minutes", True),  # it drops units
    ("X_1", "x_1", True),  # it writes all letters small
    ("0.0000002", "0.0000001", True),  # it rounds to six places
    ("x+\\frac{1}{2^{98}}", "x+\\frac{1}{2^{99}}", True),  # it takes what is small for nothing
    ("204_5", "204_6", True),  # it drops the base
    ("2x=5", "5", True),  # it takes the right side of any equation
    ("1,2,\\ldots", "1,2", True),  # it drops dots
    ("\\Gamma", "\\gamma", True),  # both are Euler's constant
    ("2√3", "2", True),  # it takes a part for the whole
]


def _math_verify(answer, gold):
    from math_verify import parse, verify  # here: a process of a test that imports this module is to start fast

    sides = (parse(f"${side}$", parsing_timeout=None) for side in (gold, answer))
    return verify(*sides, timeout_seconds=None)


@pytest.mark.parametrize(("answer", "gold", "equal_to_it"), DEPARTURES)
def test_departures_from_math_verify(answer, gold, equal_to_it):
    assert _math_verify(answer, gold) is equal_to_it
    assert grade(f"\\boxed{{{answer}}}", gold).correct is not equal_to_it


def test_agreement_with_math_verify():
    """On golds, as they are and as others write them, and on golds of other problems the verdicts are one."""
    maths, numbers = real_golds()
    for golds in (maths, numbers[:60]):
        for gold, other in zip(golds, [*golds[1:], golds[0]]):
            for answer in {gold, gold.replace("\\frac", "\\dfrac"), f" {gold}", other}:
                assert grade(f"\\boxed{{{answer}}}", gold).correct is _math_verify(answer, gold), (answer, gold)
