"""Sentences of the notebooks about results: each holds where it should and not elsewhere, and none stands as a fact."""

import inspect
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest

from srlib.cost import latency, planning
from srlib.cost.costs import Cost
from srlib.data import arith
from srlib.data.rows import Annotated, write_jsonl
from srlib.data.spans import Span
from srlib.engine.transformers import TransformersEngine
from srlib.evaluation import stats
from srlib.params import ROOT, Sft, load
from srlib.show import claims, owners, timing
from srlib.show.tables import table
from tests.cells import run_cells

PRODUCT = "<think>51-6=45;45*7=15;</think>\\boxed{15}"
AT = Span(PRODUCT.index("15;"), PRODUCT.index("15;") + 2)
ELSEWHERE = Span(PRODUCT.index("45;"), PRODUCT.index("45;") + 2)


def annotated(spans, trace=PRODUCT, name="a"):
    return Annotated(id=name, prompt="51-6*7?", answer="15", trace=trace, spans=spans, share=0.1, annotator="gap")


def policy(name, share, accuracy, low=None, high=None):
    ci95 = [accuracy - 0.02 if low is None else low, accuracy + 0.02 if high is None else high]
    return {"policy": name, "offload_share": share, "accuracy": accuracy, "ci95": ci95}


def policies(**changes):
    """Rows as sentences would have them, and what is changed of them: policy → (share, accuracy)."""
    found = {"small": (0, 0.3), "big": (1, 0.9), "learned": (0.05, 0.85), "random_matched": (0.05, 0.31)}
    found |= {"random_0.50": (0.5, 0.4), "learned_off": (0, 0.29), "rejection_0.50": (0.02, 0.6)}
    found |= {"speculative": (0.2, 0.9)} | changes
    return [policy(name, *values) for name, values in found.items()]


def written(small, big, handovers=()):
    return SimpleNamespace(
        least_forward_tokens=10, small_forward_tokens=small, big_forward_tokens=big, handovers=handovers
    )


def request(at, verdict, i):
    return {"at": at, "verdict": verdict, "id": str(i)}


WORTH = stats.Difference(0.02, 0.01, 0.03, 0.001, 100, {})


def levels(shares, accuracies):
    return pd.DataFrame({"offload share": shares, "accuracy": accuracies})


def group(name, per_s, busy=1.0, gpus=2, replicas=1):
    return planning.Group(name, gpus, 8, per_s, 1.0, {"small": 0.5, "big": busy}, 1, replicas)


WRONG = [{"text": "<think>51-6=45;45*7=99;</think>", "correct": False}]
SUM = [{"text": "<think>51-6=44;44*7=8;</think>", "correct": False}]
PROBLEM = [SimpleNamespace(worked=PRODUCT)]
STEPS = {"small": {"+": (9, 10), "-": (9, 10), "*": (2, 10)}, "big": {"+": (10, 10), "-": (10, 10), "*": (9, 10)}}
FOUND = {"annotator": "gap", "precision": 0.9, "recall": 0.8}
LOTS = {"annotator": "random", "precision": 0.07, "recall": 0.2}
MIXED = [annotated([Span(len(PRODUCT) - 2, len(PRODUCT))])]
TOTALS = {"right, alone": 1.0, "right, asked": 0.9, "wrong, alone": 0.0}
LOG = [{"rewards/accuracy/mean": x, "offload_share": 0.1 - x / 10} for x in (0.1, 0.2, 0.3, 0.4, 0.5)]
FORMULA = {0.0135: {"formula, whole chunks": 9.0, "formula": 8.0, "events": 8.0}}
POINTS = [{"big": "8B", "policy": n, "seconds": s} for n, s in (("small", 1), ("big", 9), ("learned", 2))]


# For each sentence: where it holds, and where it does not; the place of the sentence among those that are printed.
def speeds(**learned):
    """Rows of `srlib.cost.speed`."""
    known = {"batch": 1, "ratio": 5, "cost_ratio": 5.0, "offload_share": 0.1, "predicted_s": 1.1, "limit_s": 1.0}
    known |= {"measured_s": 1.1, "speed_up": 2.0, "predicted_speed_up": 2.1, "forward_tokens": 10}
    theirs = known | {"policy": "published", "predicted_s": None, "measured_s": 3.0, "forward_tokens": 90}
    return [known | {"policy": "learned"} | learned, theirs]


TOLD = [
    (claims.of_training, 0, [{"small": [4.0, 1, 1, 1, 1, 1, 1], "big": [4.0, 1, 1, 1, 1, 1, 0.5]}],
     [{"small": [4.0, 3.5, 3, 2, 1, 1, 1], "big": [4.0, 1, 1, 1, 1, 1, 1]}]),
    (claims.of_training, 1, [{"small": [4.0, 1.0], "big": [4.0, 0.5]}], [{"small": [4.0, 0.5], "big": [4.0, 1.0]}]),
    (claims.of_steps, 0, [STEPS], [STEPS | {"small": STEPS["small"] | {"*": (9, 10), "+": (1, 10)}}]),
    (claims.of_wrong_traces, 0, [PROBLEM, WRONG], [PROBLEM, SUM]),
    (claims.of_gaps, 0, [[0.0] * 9 + [2.0], 0.5], [[1.0] * 9 + [2.0], 0.5]),
    (claims.of_marks, 0, [[FOUND, LOTS], "gap", 0.07], [[FOUND, LOTS], "gap", 0.6]),
    (claims.of_marks, 1, [[FOUND, LOTS], "gap", 0.07], [[FOUND, LOTS], "gap", 0.2]),
    (claims.of_answers, 0, [{"gap": [annotated([AT])], "random": MIXED}, "gap"],
     [{"gap": MIXED, "random": [annotated([AT])]}, "gap"]),
    (claims.of_finetuning, 0, [[{"step": i, "loss": x} for i, x in ((1, 4.0), (2, 1.0), (10, 0.9))]],
     [[{"step": i, "loss": x} for i, x in ((1, 4.0), (2, 3.9), (10, 0.9))]]),
    (claims.of_imitation, 0, [[annotated([AT])], [AT.start / len(PRODUCT)], [0.1]], [[annotated([AT])], [0.9], [0.1]]),
    (claims.of_imitation, 1, [[annotated([AT])], [0.5], [0.11]], [[annotated([AT])], [0.5], [0.2]]),
    (claims.of_rewards, 0, [TOTALS], [TOTALS | {"right, asked": 1.1}]),
    (claims.of_reinforcement, 0, [LOG], [LOG[::-1]]),
    (claims.of_reinforcement, 1, [LOG], [LOG[::-1]]),
    (claims.of_policies, 0, [policies()], [policies(**{"random_0.50": (0.5, 0.65)})]),
    (claims.of_policies, 1, [policies()], [policies(learned=(0.3, 0.85))]),
    (claims.of_policies, 2, [policies()], [policies(random_matched=(0.05, 0.84))]),
    (claims.of_policies, 3, [policies()], [policies(learned_off=(0, 0.5))]),
    (claims.of_policies, 4, [policies()], [policies(**{"rejection_0.50": (0.02, 0.88)})]),
    (claims.of_policies, 5, [policies()], [policies(speculative=(0.2, 0.89))]),
    (claims.of_policies, 5, [policies(grpo=(0.06, 0.9))], [policies(grpo=(0.06, 0.84))]),
    (claims.of_policies, 6, [policies(grpo=(0.06, 0.84))], [policies(grpo=(0.06, 0.31))]),
    (claims.of_policies, 5, [policies(entropy=(0.05, 0.84))], [policies(entropy=(0.2, 0.84))]),
    (claims.of_policies, 6, [policies(margin=(0.05, 0.84))], [policies(margin=(0.05, 0.3))]),
    (claims.of_policies, 7, [policies(confidence=(0.05, 0.7))], [policies(confidence=(0.05, 0.84))]),
    (claims.of_worth, 0, [{"learned − entropy": WORTH}], [{"learned − entropy": replace(WORTH, low=-0.01)}]),
    (claims.of_reach, 0, [policies()], [policies(learned=(0.05, 0.5), speculative=(0.2, 0.5))]),
    (claims.of_places, 0, [{"a": [0.2, 0.7]}, {"a": [0.05]}], [{"a": [0.7, 0.8]}, {"a": [0.05]}]),
    (claims.of_places, 1, [{"a": [0.2, 0.7]}, {"a": [0.05]}], [{"a": [0.2, 0.7]}, {"a": [0.5]}]),
    (claims.of_intervals, 0, [{"small": {"x": (0.1, 0.2), "y": (0.101, 0.2)}}],
     [{"small": {"x": (0.1, 0.2), "y": (0.12, 0.2)}}]),
    (claims.of_difficulty, 0, [{"small": levels([0, 0], [0.9, 0.2]), "learned": levels([0.1, 0.2], [0.9, 0.8])}],
     [{"small": levels([0, 0], [0.9, 0.2]), "learned": levels([0.2, 0.1], [0.9, 0.8])}]),
    (claims.of_difficulty, 1, [{"small": levels([0, 0], [0.9, 0.2]), "learned": levels([0.1, 0.2], [0.9, 0.8])}],
     [{"small": levels([0, 0], [0.2, 0.9]), "learned": levels([0.1, 0.2], [0.9, 0.8])}]),
    (claims.of_requests, 0, [[request("*", "needed", i) for i in range(20)] + [request("+", "useless", 9)] * 20],
     [[request("*", "needed", i) for i in range(20)] + [request("+", "needed", 9)] * 20]),
    (claims.of_processing, 0, [[written(10, 9, (1,))]], [[written(10, 11, (1,)), written(1, 1, (1,))]]),
    (claims.of_processing, 1, [[written(10, 0)]], [[written(10, 3)]]),
    (timing.of_batches, 0, [Cost(base=1.0, token=0.01), 64], [Cost(base=1.0, token=0.1), 64]),
    (timing.of_formula, 0, [pd.DataFrame(FORMULA), 16_384, 256], [pd.DataFrame(FORMULA), 16_384, 16]),
    (timing.of_formula, 1, [pd.DataFrame(FORMULA), 16_384, 256],
     [pd.DataFrame({0.01: FORMULA[0.0135] | {"events": 5.0}}), 16_384, 256]),
    (timing.of_speed_up, 0, [{"a": ([0.1, 0.4], [5.0, 2.0])}, 0.4], [{"a": ([0.1, 0.4], [5.0, 3.0])}, 0.4]),
    (timing.of_seconds, 0, [POINTS], [[*POINTS, {"big": "8B", "policy": "learned", "seconds": 6}]]),
    (timing.of_the_clock, 0, [[{"ratio": 0.9}]], [[{"ratio": 0.5}]]),
    (timing.of_measured_speed, 0, [speeds()], [speeds(speed_up=0.9)]),
    (timing.of_measured_speed, 1, [speeds()], [speeds(predicted_speed_up=2.3)]),
    (timing.of_measured_speed, 2, [speeds()], [speeds(measured_s=1.2)]),
    (timing.of_measured_speed, 3, [speeds()], [speeds(measured_s=4.0)]),
    (timing.of_load, 0, [[0.1, 0.5, 1.5], {"a": ([1, 5, 15], [1.0, 1.1, 4.0])}],
     [[0.1, 0.5, 1.5], {"a": ([1, 5, 15], [1.0, 2.0, 4.0])}]),
    (timing.of_load, 1, [[0.1, 0.5, 1.5], {"a": ([1, 5, 15], [1.0, 1.1, 4.0])}],
     [[0.1, 0.5, 1.5], {"a": ([1, 5, 15], [1.0, 1.1, 1.2])}]),
    (timing.of_rates, 0, [[group("a", 1.0, gpus=1)], [group("b", 3.0)]], [[group("a", 1.0, gpus=1)], [group("b", 2.0)]]),
    (timing.of_groups, 0, [[group("a", 1.0), group("b", 1.05, replicas=2)]],
     [[group("a", 1.0), group("b", 1.5, replicas=2)]]),
]  # fmt: skip


def test_every_sentence_is_told_here():
    """A sentence that is added is to be among them."""
    made = {
        f
        for module in (claims, timing)
        for name, f in inspect.getmembers(module, inspect.isfunction)
        if name.startswith("of_") and f.__module__ == module.__name__
    }
    assert made == {f for f, *_ in TOLD}


@pytest.mark.parametrize(("f", "place", "where", "where_not"), TOLD, ids=lambda x: getattr(x, "__name__", ""))
def test_a_sentence_holds_where_it_should(f, place, where, where_not, capsys):
    f(*where)
    yes = capsys.readouterr().out.splitlines()[place]
    f(*where_not)
    no = capsys.readouterr().out.splitlines()[place]
    assert yes.startswith("holds here: ") and no.startswith("does not hold here: ")
    assert yes.partition(" – ")[0].partition(": ")[2] == no.partition(" – ")[0].partition(": ")[2]


def test_what_a_policy_that_never_asks_cannot_tell(capsys):
    claims.of_policies(policies(learned=(0, 0.3), **{"rejection_0.50": (0, 0.3)}))
    claims.of_places({"learned": []}, {"learned": [0.0]})
    claims.of_requests([])
    claims.of_imitation([annotated([AT])], [], [0.0])
    told = capsys.readouterr().out
    assert told.count("cannot be told here") == 6
    assert told.count("\n") == 11


def test_a_sentence_shows_text(capsys):
    claims.claim("a \x1b[31m", True, "\u202e")
    assert capsys.readouterr().out == "holds here: a \\x1b[31m – \\u202e\n"


def test_a_case_is_the_first_that_shows_it(capsys):
    assert claims.case([1, 4, 6], lambda x: x % 2 == 0, "an even number") == 4
    assert capsys.readouterr().out == ""
    assert claims.case(iter([1, 3]), lambda x: x % 2 == 0, "an even number") == 1
    told = "no case here: none of 2 shows an even number; what follows is the first of them.\n"
    assert capsys.readouterr().out == told
    with pytest.raises(ValueError, match="nothing that could show an even number"):
        claims.case([], bool, "an even number")


def test_marks_at_products():
    assert claims.at_products(PRODUCT, [AT]) and claims.at_products(PRODUCT, [AT], every=True)
    assert not claims.at_products(PRODUCT, [ELSEWHERE]) and not claims.at_products(PRODUCT, [AT, ELSEWHERE])
    assert not claims.at_products(PRODUCT, [])
    assert not claims.at_products("<think>4*5=20;20*3=60;</think>", [Span(11, 13)], every=True)
    assert claims.at_products("Multiply x by y.", [Span(0, 3)])  # of data of one's own nothing is known
    tokens = arith.tokenizer().convert_ids_to_tokens(arith.tokenizer().encode(PRODUCT))
    assert "".join(tokens) == PRODUCT
    for span, found in ((AT, True), (ELSEWHERE, False)):
        starts = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        assert claims.hard_at_products(PRODUCT, tokens, [span.start <= s < span.end for s in starts]) is found


def test_owners_stand_under_their_tokens():
    text, letters = "3*4=<bigmodel>12</bigmodel>;", "SSSSSBBFS"
    tokenizer = arith.tokenizer()
    tokenizer.add_tokens(["<bigmodel>", "</bigmodel>"])
    above, below = owners.of_record(text, letters, tokenizer).split("\n")
    assert above == text and {below[i] for i in (above.index("12"), above.index("12") + 1)} == {"B"}
    assert below[above.index("</")] == "F" and below[above.index("<b")] == "S" and len(below) == len(above)
    lines = owners.under(["ab", "\n", "c" * 9], "SBF", width=6).split("\n")
    assert lines == ["ab\\n", "S B", "c" * 9, "F"]
    assert "28 tokens" not in owners.of_record(text, letters, tokenizer)
    told = owners.of_record(text, "SS", tokenizer).split("\n")
    assert told[0] == text and "no owners are shown" in told[1]


def test_the_example_of_02_is_marked_at_products(folders, tmp_path, capsys):
    """The first row has a mark at a difference."""
    write_jsonl(tmp_path / "rows.jsonl", [annotated([ELSEWHERE], name="b"), annotated([AT])])
    changes = {"sft.annotated": str(tmp_path / "rows.jsonl"), "pair.small.path": folders[0]}
    scope = run_cells("02_sft", {"p": load(ROOT / "params/smoke.yaml", **changes)}, "sft.example(")
    assert scope["row"].spans == [AT] and "no case here" not in capsys.readouterr().out


def test_the_groups_of_03_hold_right_and_wrong(tmp_path, capsys):
    def sample(step, text, correct):
        return {"step": step, "text": text, "correct": correct, "share": 0.1}

    mixed = [sample(step, f"at {step}: {ok}", ok) for step in (10, 20) for ok in (True, False)]
    alike = [sample(step, "the same", True) for step in (0, 0, 30, 30)]
    write_jsonl(tmp_path / "samples.jsonl", [*alike[:2], *mixed, *alike[2:]])
    run_cells("03_grpo", {"pd": pd, "claims": claims, "folder": tmp_path}, "samples.jsonl")
    told = capsys.readouterr().out
    assert "2 of 4 groups hold both" in told and "the same" not in told
    assert re.findall(r"^step (\d+)$", told, re.MULTILINE) == ["10", "20"]


def test_04_by_hand_is_what_the_controller_does(pair, tokenizer, monkeypatch, capsys):
    """With models that ask and close: control comes back, and the tokens are those of the controller."""
    from srlib import engine

    given = iter([TransformersEngine(model, tokenizer) for model in pair])
    monkeypatch.setattr(engine, "load", lambda *_, **__: next(given))
    p = load(ROOT / "params/smoke.yaml", **{"data.test": "arith"})
    steps = ("engine.load(", "likeliest = ", "first, = small.run", "answer, = big.run", "rest, = small.run")
    scope = run_cells("04_offload", {"p": p}, *steps)
    told = capsys.readouterr().out
    assert "no case here" not in told and scope["closes"]
    for sentence in ("the small model takes control back", "the controller writes the same", "no token twice"):
        assert re.search(f"^holds here: .*{sentence}", told, re.MULTILINE), sentence


def test_03_says_which_look_is_kept(tmp_path, capsys):
    """Beside the steps, whose claims are about the rollouts alone."""
    seen = {"eval_reward": 0.5, "eval_accuracy": 0.75, "eval_offload_share": 0.0625}
    log = [{"step": i + 1, **record} for i, record in enumerate(LOG)]
    log += [{"step": step, **seen, "kept": step == 4} for step in (2, 4, 5)]
    scope = run_cells("03_grpo", {"log": log, "folder": tmp_path, "claims": claims, "table": table}, "learning_curves(")
    told = capsys.readouterr().out
    assert "kept: the adapter of step 4" in told and "50.0% in the last" in told
    assert [look["step"] for look in scope["looks"]] == [2, 4, 5] and (tmp_path / "learning.png").is_file()


def test_the_load_of_07_is_that_of_its_groups(tmp_path, monkeypatch):
    """Rates are parts of what the table says that a group serves, and as many requests are under way as there."""
    asked = []

    def simulate(pipeline, **how):
        asked.append((pipeline, how))
        return SimpleNamespace(per_request=1.0)

    monkeypatch.setattr(latency, "simulate", simulate)
    drawn = {}
    figures = SimpleNamespace(save=lambda *_: None, latency_by_load=drawn.update)
    alone = planning.Group("big alone", 2, 6, 0.5, 1.0, {"big": 1.0}, 2, 0)
    beside = planning.Group("big + 3", 5, 9, 4.0, 1.0, {"big": 1.0}, 2, 3)
    other = planning.Group("more", 5, 9, 400.0, 1.0, {"big": 1.0}, 4, 1)
    scope = {"gpu": "h100", "small_name": "1.5B", "big_name": "32B", "asked": planning.Load(0.1), "folder": tmp_path}
    scope |= {"groups": [alone, beside, other], "devices": 2, "p": load(ROOT / "params/smoke.yaml")}
    scope |= {"planning": planning, "figures": figures, "claims": claims, "timing": timing}
    run_cells("07_latency", scope, "latency_by_load(")
    assert list(drawn) == ["big alone", "big + 3"]
    for g in (alone, beside):
        rates = [part * g.per_s for part in scope["parts"]]
        assert drawn[g.name][0] == rates
        of_it = [how for _, how in asked if how["replicas"] == max(1, g.replicas)]
        assert [how["rate"] for how in of_it] == rates
        assert {how["slots"] * how["replicas"] for how in of_it} == {g.slots}
        assert {how["share"] for how in of_it} == {0.1 if g.replicas else 1.0}
        assert all(how["requests"] >= 4 * g.slots for how in of_it)
    assert min(scope["parts"]) <= 0.5 < 1 < max(scope["parts"])


def test_a_group_under_load_queues_beyond_what_it_serves():
    load_ = planning.Load(0.1, 64, 256, 32)
    g = planning.group("h100", "1.5B", "32B", load_, 1, 1)
    calm, busy = planning.under_load("h100", "1.5B", "32B", load_, g, [0.1 * g.per_s, 2 * g.per_s])
    alone = latency.simulate(planning._pair("h100", "1.5B", "32B", load_, 1), share=0.1, prompt=64, decode=256, span=32)
    assert alone.seconds * 0.9 < calm < alone.seconds * 1.5 and busy > 1.5 * calm


WORDS = {
    path.stem: [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(path.read_text())["cells"]]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    if path.stem != "06_reward_ablation"
}
# What runs have contradicted.
CONTRADICTED = """in proportion; far more often; differ in the third digit; the chance of guessing; ten times the size; several times
that of the big model; hardly more than a factor of two; accuracy of the sampled traces rises; lie all along the trace;
nearly as fast as; near zero nearly everywhere; stays where the products are guessed; which the small model cannot do;
share grows with difficulty; neither model processed more; levels off at what cannot be known"""


@pytest.mark.parametrize("name", WORDS)
def test_no_sentence_tells_a_result_that_is_not_computed(name):
    """Where a reader is told what to look for, the next code holds it against the run; no text has a result's figures."""
    for place, (kind, text) in enumerate(WORDS[name]):
        if kind != "markdown":
            continue
        assert not re.search(r"\d ?%(?! interval)|\d times\b|three minutes", text), text
        for words in CONTRADICTED.replace("\n", " ").split("; "):
            assert words not in text, words
        if "**What to look for" in text:
            code = [source for k, source in WORDS[name][place + 1 : place + 4] if k == "code"]
            assert any(re.search(r"\b(claims|timing)\.(of_\w+|claim)\(|agree\(", source) for source in code), text


def test_a_policy_that_never_asks_is_warned_of(capsys):
    """With what to try; one request in any trace is enough for none."""
    learnt, config = [SimpleNamespace(spans=[Span(0, 1), Span(2, 3)])] * 64, Sft(epochs=2, learning_rate=2e-4)
    claims.warn_if_silent([[], [Span(0, 1)], []], learnt, config)
    assert not capsys.readouterr().out
    claims.warn_if_silent([[]] * 32, learnt, config)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: the tuned model asks in none of 32 traces")
    assert "sft.epochs, now 2)" in line and "sft.learning_rate, now 0.0002" in line and "128 spans in 64 traces" in line
