"""The section `annotate` but for its judge."""

import json
from itertools import islice
from statistics import fmean
from types import SimpleNamespace
from typing import Any

from srlib.annotation import annotators, traces, worth
from srlib.annotation.answers import prompt_of
from srlib.data import arith
from srlib.data.journal import Journal
from srlib.data.rows import Annotated, Problem, write_jsonl
from srlib.params import Params
from tests.judge_server import JudgeServer
from tests.purposes import Case, shows

TAGGED = "<think>12+3=<bigmodel>15</bigmodel>;15*4=<bigmodel>60;60-4=56</bigmodel>;56+1=57;57-7=50;</think>"


def params(case: Case, value: Any, changes: dict[str, Any] | None = None) -> Params:
    return case.params({"annotate.n_traces": 8, **(changes or {}), case.key: value})


def tagged(case: Case, value: Any) -> Annotated:
    """The row of a trace that comes with tags."""
    path = write_jsonl(case.folder / "t.jsonl", [{"id": "t", "prompt": "?", "answer": "56", "trace": TAGGED}])
    changes = {"data.traces": str(path), "annotate.method": "given", "annotate.n_traces": 1}
    p = case.params({"annotate.max_share": 0.6, **changes, case.key: value})
    (row,) = rows(case, p, traces.gather(p, case.folder, case.fixture("tokenizer"))[0])
    return row


def worked(n: int = 8) -> list[Problem]:
    return list(islice(arith.generate(Params(run="x").arith, "traces", 0), n))


def rows(case: Case, p: Params, asked: list[Problem]) -> list[Annotated]:
    return annotators.run(p, case.folder, asked, *case.fixture("engines"))[0]


def texts(row: Annotated) -> list[str]:
    return [row.trace[span.start : span.end] for span in row.spans]


def written(case: Case, value: Any, changes: dict[str, Any]) -> tuple[list[Problem], list[float], list[dict]]:
    """Traces that the big model writes, at which temperatures, and what is kept of each; a third look finds it right."""
    path = write_jsonl(case.folder / "t.jsonl", worked(4))
    offload = {"offload.max_tokens": 200, "offload.batch_size": 4}
    p = params(case, value, {"data.traces": str(path), "annotate.n_traces": 4, **offload, **changes})
    looks: dict[str, int] = {}
    _, big = case.fixture("engines")
    temperatures, real = [], big.open

    def verdict(text: str, problem: Problem, hint: str) -> SimpleNamespace:
        looks[problem.id] = looks.get(problem.id, 0) + 1
        return SimpleNamespace(correct=looks[problem.id] == 3)

    def opened(ids: list[int], sampling: Any) -> Any:
        temperatures.append(sampling.temperature)
        return real(ids, sampling)

    with case.fixture("monkeypatch").context() as patch:
        patch.setattr(traces.grade, "verdict", verdict)
        patch.setattr(big, "open", opened)
        found, _ = traces.gather(p, case.folder, case.fixture("tokenizer"), {"big": big})
    lines = [line for file in case.folder.glob("written-*") for line in file.read_text().splitlines()]
    return found, temperatures, list(map(json.loads, lines))


@shows("annotate.method")
def who_marks(case: Case) -> None:
    row = tagged(case, "given")
    assert texts(row) == ["15", "60;60-4=", "56"] and row.annotator == "given"


@shows("annotate.n_traces")
def how_many_are_annotated(case: Case) -> None:
    path = write_jsonl(case.folder / "t.jsonl", worked(64))
    p = case.params({"data.traces": str(path), "annotate.n_traces": 5})
    assert len(traces.gather(p, case.folder, case.fixture("tokenizer"))[0]) == 5


@shows("annotate.tries")
def how_often_the_big_model_tries(case: Case) -> None:
    found, _, kept = written(case, 6, {"annotate.temperature": 1.0})
    given = {problem.trace for problem in worked(4)}
    assert found and not given & {problem.trace for problem in found}
    assert kept and {record["tries"] for record in kept} <= {3, 4, 5, 6}  # the third that ends is right


@shows("annotate.temperature")
def at_which_traces_are_written(case: Case) -> None:
    _, temperatures, _ = written(case, 1.25, {"annotate.tries": 6, "offload.temperature": 0.3})
    assert set(temperatures) == {1.25}


@shows("annotate.threshold")
def the_gap_that_marks(case: Case) -> None:
    p = params(case, 2.0, {"annotate.max_share": 1.0})
    small, big = case.fixture("engines")
    for row in rows(case, p, worked()):
        seen = annotators.by_token(small, big, Problem(id="x", prompt=row.prompt, answer="0", trace=row.trace))
        ends = [0]
        for each in seen:
            ends.append(ends[-1] + len(each["token"]))
        hard = [place for place, each in zip(zip(ends, ends[1:]), seen) if each["gap"] > 2.0]
        assert all(any(a < end and start < b for a, b in hard) for start, end in row.spans)
        assert all(any(a < end and start < b for start, end in row.spans) for a, b in hard)


@shows("annotate.share")
def how_much_is_marked_at_random_and_asked_for(case: Case) -> None:
    p = params(case, 0.1, {"annotate.method": "random"})
    drawn = annotators.random(worked(200), p.annotate, case.fixture("tokenizer"))
    assert abs(fmean(row.share for row in drawn) - 0.1) < 0.01
    assert "about 10% of the solution" in prompt_of(worked(1)[0], p.annotate.share)


@shows("annotate.merge_gap")
def near_marks_become_one(case: Case) -> None:
    assert texts(tagged(case, 6)) == ["15;15*4=", "60;60-4=", "56"]  # of 8 tokens at most


@shows("annotate.max_span_tokens")
def the_longest_span(case: Case) -> None:
    row = tagged(case, 4)
    assert texts(row) == ["15", "60;", "60-4", "=56"]
    assert row.tagged.count("</bigmodel><bigmodel>") == 2


@shows("annotate.max_share")
def the_most_that_is_marked(case: Case) -> None:
    row = tagged(case, 0.25)  # of 42 tokens
    assert texts(row) == ["60;60-4=", "56"] and row.share <= 0.25


@shows("annotate.min_score")
def how_like_a_quote_has_to_be(case: Case) -> None:
    case.fixture("monkeypatch").setenv("TEST_KEY", "secret")
    asked = worked(2)
    loose = asked[0].worked[7:27].replace("=", "-", 1)  # one of 20 characters: 0.95
    server = JudgeServer(lambda trace: [loose if trace == asked[0].worked else trace[7:15]])
    with server.serve() as url:
        judge = {"model": "judge", "base_url": url, "key": "TEST_KEY"}
        p = params(case, 0.97, {"annotate.method": "judge", "annotate.judge": judge})
        assert [row.id for row in rows(case, p, asked)] == [asked[1].id]


@shows("annotate.batch_size")
def traces_that_are_read_at_a_time(case: Case) -> None:
    small, big = case.fixture("engines")
    p = params(case, 3)
    list(annotators.gap(small, big, worked(), p.annotate))
    assert small.counters.calls == big.counters.calls == 3  # for eight


@shows("annotate.compare")
def who_is_put_beside_it(case: Case) -> None:
    p = params(case, ["random"])
    assert list(annotators.compare(p, case.folder, rows(case, p, worked()), *case.fixture("engines"))) == [
        "gap",
        "random",
    ]


@shows("annotate.n_compare")
def how_many_are_compared(case: Case) -> None:
    p = params(case, 7, {"annotate.compare": ["random"]})
    made = rows(case, p, worked(12))
    marked = annotators.compare(p, case.folder, made, *case.fixture("engines"))
    assert {name: len(of) for name, of in marked.items()} == {"gap": 7, "random": 7}
    assert {row.id for row in marked["gap"]} != {row.id for row in made[:7]}  # those are the shortest


def continued(case: Case, changes: dict[str, Any]) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """What worth finds in three traces where a continuation is right by its number of sevens, and what is kept."""
    p = case.params({"annotate.method": "worth", "offload.max_tokens": 40, "annotate.worth.jump": 0.1, **changes})
    small, _ = case.fixture("engines")

    def verdict(text: str, problem: Problem, hint: str) -> SimpleNamespace:
        return SimpleNamespace(correct=text.count("7") % 3 == 0)

    with case.fixture("monkeypatch").context() as patch:
        patch.setattr(worth, "verdict", verdict)
        with Journal(worth.journal(case.folder, p)) as journal:
            found = list(worth.values(small, worked(3), p.annotate.worth, p.offload, journal, 4, 0))
            return found, list(journal.records.values())


@shows("annotate.worth.continuations")
def continuations_from_a_place(case: Case) -> None:
    _, kept = continued(case, {case.key: 3})
    assert {len(each["found"]) for each in kept} == {3}


@shows("annotate.worth.temperature")
def at_which_continuations_are_written(case: Case) -> None:
    small, _ = case.fixture("engines")
    opened, real = [], small.open
    with case.fixture("monkeypatch").context() as patch:
        patch.setattr(small, "open", lambda ids, sampling: opened.append(sampling.temperature) or real(ids, sampling))
        continued(case, {case.key: 0.4, "offload.temperature": 0.9})
    assert set(opened) == {0.4}


@shows("annotate.worth.jump")
def the_jump_of_a_hard_step(case: Case) -> None:
    few, many = ([v for row in continued(case, {case.key: jump})[0] for v in row if v] for jump in (0.7, 0.0))
    assert len(few) < len(many) and all(value > 0.7 for value in few)


@shows("offload.step_ends")
def where_steps_end(case: Case) -> None:
    tokenizer = case.fixture("tokenizer")
    (one,) = worth._worked(tokenizer, worked(1), case.params({case.key: ["="]}).offload)
    tokens = tokenizer.convert_ids_to_tokens(one.ids)
    assert len(one.steps) > 3 and {tokens[at - 1] for at in one.steps[1:-1]} == {"="}
