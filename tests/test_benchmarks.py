import json
from collections import Counter

import pytest

from srlib import SrlibError, params
from srlib.cost import memory
from srlib.data import benchmarks, grade, problems
from srlib.params import Source


def test_names_read_their_rows(monkeypatch):
    """The columns of the sets on the hub, which is not asked here."""
    rows = {
        "HuggingFaceH4/aime_2024": [{"id": 60, "problem": "P?", "solution": "…", "answer": "204", "year": "2024"}],
        "HuggingFaceH4/MATH-500": [
            {"problem": "Q?", "answer": "\\frac{1}{2}", "subject": "Algebra", "level": 3, "unique_id": "test/1"}
        ],
        "Idavidrein/gpqa": [
            {
                "Question": "Which?",
                "Correct Answer": "right",
                **{f"Incorrect Answer {i}": f"wrong {i}" for i in (1, 2, 3)},
                "Record ID": "rec1",
                "Subdomain": "Optics",
            }
        ],
        "openai/gsm8k": [{"question": "How many?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"}],
    }
    monkeypatch.setattr(problems, "hub_rows", lambda source: rows[source.path])
    (aime,) = problems.load("aime24")
    assert (aime.id, aime.answer) == ("60", "204") and aime.prompt.startswith("P?\n") and "\\boxed{}" in aime.prompt
    (maths,) = problems.load("math500")
    assert maths.meta == {"level": 3, "subject": "Algebra"}
    (gpqa,) = problems.load("gpqa_diamond")
    assert f"({gpqa.answer}) right" in gpqa.prompt and gpqa.prompt.count("wrong") == 3
    assert grade.verdict(f"</think>\\boxed{{\\text{{{gpqa.answer}}}}}", gpqa).correct
    assert problems.load("gpqa_diamond") == [gpqa]  # the order of the choices does not change
    (gsm,) = problems.load("gsm8k")
    assert (gsm.answer, gsm.meta) == ("1200", {"level": 1})
    rows["openai/gsm8k"] = [{"problem": "?"}]
    with pytest.raises(SrlibError, match="gsm8k, row 1 is not a Problem: no column 'answer', which rows of gsm8k have"):
        problems.load("gsm8k")
    rows["openai/gsm8k"] = [{"question": "?", "answer": 5}, {"question": "6*7?", "answer": "#### 42"}]
    dropped = Counter()
    assert [x.answer for x in problems.load("gsm8k", on_bad="drop", dropped=dropped)] == ["42"]
    assert dropped == {"its columns do not hold what those of gsm8k do": 1}
    rows["HuggingFaceH4/MATH-500"] = [{"problem": "Q?", "answer": ["1", "2"], "unique_id": "test/1"}]
    with pytest.raises(SrlibError, match="math500, row 1 is not a Problem: answer is a list of 2"):
        problems.load("math500")


def test_a_copy_of_a_set(texts_folder):
    some = problems.load(f"math500:{texts_folder}/math500_a.jsonl", 20, seed=1)
    assert len(some) == 20 and all("level" in p.meta for p in some)
    all_of_it = problems.load(Source(path=f"gsm8k:{texts_folder}/gsm8k_a.jsonl", prompt="base"))
    lines = (texts_folder / "gsm8k_a.jsonl").read_text().splitlines()
    assert len(all_of_it) == len(lines) >= 60 and all(p.prompt.startswith("Question: ") for p in all_of_it)
    assert all(p.answer.lstrip("-").replace(".", "").isdigit() for p in all_of_it)


def test_a_bad_line_of_a_copy_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text(
        '{"question": "6*7?", "answer": "#### 42"}\n\n{"question": " ", "answer": "#### 1"}'
    )
    with pytest.raises(SrlibError, match="x.jsonl, line 3 is not a Problem: prompt is blank"):
        problems.load(f"gsm8k:{tmp_path}/x.jsonl")
    assert problems.load(f"gsm8k:{tmp_path}/x.jsonl", 1, on_bad="drop")[0].answer == "42"


def test_how_a_model_is_asked(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": "1", "prompt": "1+1?", "answer": "2"}')
    source = {"path": str(tmp_path / "x.jsonl")}
    assert problems.load(Source(**source))[0].prompt == "1+1?"
    assert problems.load(Source(**source, prompt="boxed"))[0].prompt.startswith("1+1?\n")
    assert problems.load(Source(**source, prompt="Q: {question} {A}:"))[0].prompt == "Q: 1+1? {A}:"
    with pytest.raises(SrlibError, match="did you mean 'boxed'"):
        problems.load(Source(**source, prompt="boxd"))


def test_procedural_sets():
    first, again, other = (problems.load("reasoning_gym:chain_sum", 5, seed=s) for s in (1, 1, 2))
    assert first == again != other and len(first) == 5
    for p in first:
        assert grade.verdict(f"</think>\\boxed{{{p.answer}}}", p).correct
        assert not grade.verdict(f"</think>\\boxed{{{int(p.answer) + 1}}}", p).correct
    with pytest.raises(SrlibError, match="did you mean reasoning_gym:chain_sum"):
        problems.load("reasoning_gym:chain_sums")
    unanswered = problems.load("reasoning_gym:graph_color", 2)
    assert len(unanswered) == 2 and all(p.meta["reasoning_gym"]["answer"] is None for p in unanswered)
    arith = problems.load("arith", 7)
    assert len(arith) == 7 and all(p.prompt.endswith("?") and "operations" in p.meta for p in arith)


def test_the_set_arith_is_that_of_the_section():
    given = {"data.test": "arith", "data.traces": "arith", "arith.min_steps": 6, "arith.max_steps": 6}
    p = params.load("params/cpu.yaml", **given)
    test, traces = problems.load(p.test, 20), problems.load(p.traces, 20)
    assert {x.meta["steps"] for x in test + traces} == {6}
    assert {x.id.partition("-")[0] for x in test} == {"test"} and {x.id.partition("-")[0] for x in traces} == {"traces"}
    train = params.load("params/cpu.yaml", **{"data.test": {"path": "arith", "split": "train"}})
    assert problems.load(train.test, 1)[0].id == "train-0"
    with pytest.raises(SrlibError, match="arith has no split 'dev', but train, traces, test"):
        problems.load(Source(path="arith", split="dev"), 1)


def test_a_part_of_a_source_acts_or_is_refused(monkeypatch, tmp_path):
    asked = []

    def hub(path, config, split, streaming):
        asked.append((path, config, split))
        return [{"Question": "?", "Correct Answer": "1", **{f"Incorrect Answer {i}": "2" for i in (1, 2, 3)}}]

    monkeypatch.setattr("datasets.load_dataset", hub)
    for source in (
        {"path": "gpqa_diamond"},
        {"path": "gpqa_diamond", "split": "dev"},
        {"path": "gpqa_diamond", "config": "gpqa_main"},
    ):
        problems.load(Source(**source))
    assert asked == [
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        ("Idavidrein/gpqa", "gpqa_diamond", "dev"),
        ("Idavidrein/gpqa", "gpqa_main", "train"),
    ]
    path = str(tmp_path / "x.jsonl")
    for source, reason in (
        ({"path": path, "split": "test"}, "x.jsonl is no data set on the hub, and has no split 'test': leave it away"),
        ({"path": path, "config": "main"}, "x.jsonl is no data set on the hub, and has no config 'main'"),
        ({"path": f"gsm8k:{path}", "split": "test"}, "x.jsonl is no data set on the hub, and has no split 'test'"),
        ({"path": "reasoning_gym:chain_sum", "split": "test"}, "chain_sum is no data set on the hub, and has no split"),
        ({"path": "arith", "config": "main"}, "arith is no data set on the hub, and has no config 'main'"),
        ({"path": "aime24", "columns": {"prompt": "q"}}, "aime24 is a named set, which has columns of its own: leave"),
        ({"path": f"gsm8k:{path}", "columns": {"prompt": "q"}}, "x.jsonl is a named set, which has columns of its own"),
    ):
        with pytest.raises(SrlibError, match=reason):
            problems.load(Source(**source))


def test_where_many_answers_are_right_the_verifier_decides():
    (problem,) = problems.load("reasoning_gym:countdown", 1, seed=3)
    numbers = problem.meta["reasoning_gym"]["metadata"]["numbers"]
    expression = problem.meta["reasoning_gym"]["metadata"]["expression"]
    assert grade.verdict(f"\\boxed{{({expression})}}", problem).correct
    assert not grade.verdict(f"\\boxed{{{' + '.join(map(str, numbers))} + 1}}", problem).correct


def test_protocols():
    def load(**sets):
        given = {key.replace("__", "."): value for key, value in sets.items()}
        return benchmarks.protocol(params.load("params/released.yaml", **given))

    own = load()
    assert (own.offload.max_tokens, own.samples, own.n_problems) == (8192, 4, 30)
    for name, samples in (("aime24", 64), ("math500", 4), ("gpqa_diamond", 8)):
        full = load(data__test=name, evaluate__protocol="published", offload__top_k=5)
        o = full.offload
        assert (o.temperature, o.top_p, o.top_k, o.max_tokens) == (0.6, 0.95, 0, 32_768)
        assert (full.samples, full.n_problems) == (samples, None)
    quick = load(data__test="math500", evaluate__protocol="quick")
    assert (quick.offload.max_tokens, quick.samples, quick.n_problems) == (4096, 1, 50)


def test_the_plan_counts_the_tokens_of_the_protocol():
    need = {}
    for name in ("own", "published"):
        given = {"data.test": "aime24", "evaluate.protocol": name, "pair.small.context": None}
        p = params.load("params/node.yaml", **given)
        need[name] = sum(n.gib for n in memory.needs(p, ("05_evaluate",)) if n.kind == "caches" and n.what == "small")
    assert need["published"] > 3 * need["own"]


def test_names_survive_params():
    p = params.load("params/cpu.yaml", **{"data.test": {"path": "aime24", "prompt": "boxed"}})
    assert p.dataset == "aime24" and p.test.file is None
    assert json.loads(p.model_dump_json())["data"]["test"]["prompt"] == "boxed"
