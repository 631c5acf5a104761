"""Completions: written, kept as they end, taken up again, graded, and summed up in a row."""

from dataclasses import dataclass, field
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from srlib import SrlibError
from srlib.data import arith, spans
from srlib.data.grade import Grade
from srlib.data.journal import Journal
from srlib.data.rows import Problem, read_jsonl
from srlib.decoding import Offloader
from srlib.decoding.policies import Learned, Never, Policy, Random
from srlib.engine.transformers import TransformersEngine
from srlib.evaluation import completions, counterfactual, stats
from srlib.params import Arith, Offload
from srlib.show import claims
from tests.cells import run_cells
from tests.conftest import random_model
from tests.test_offload import Scripted
from tests.test_policies import Speaks


@pytest.fixture
def problems():
    return list(islice(arith.generate(Arith(), "test", 0), 10))


def without_time(records):
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]


def test_a_row_of_results(engines, problems, monkeypatch):
    graded = []

    def verdict(text, problem, hint):  # an untrained model is never right: the n-th problem is, n times of three
        graded.append(problem.id)
        return Grade(graded.count(problem.id) <= problems.index(problem) % 4, str(graded.count(problem.id)), "")

    monkeypatch.setattr(completions, "verdict", verdict)
    config = Offload(max_tokens=20, temperature=1.0)
    row, kept = completions.run(*engines, Learned(), problems, config, dataset="arith", samples=3)
    assert len(kept) == 30
    assert (row["n_problems"], row["samples_per_problem"], row["max_tokens"]) == (10, 3, 20)
    assert row["accuracy"] == pytest.approx((2 * (0 + 1 + 2 + 3) + 0 + 1) / 30)  # ten problems: 0, 1, 2, 3, 0, 1, …
    assert row["ci95"][0] < row["accuracy"] < row["ci95"][1]
    assert len({r["text"] for r in kept if r["id"] == problems[0].key}) > 1  # three samples, three seeds
    assert row["offload_share"] == sum(r["big_tokens"] for r in kept) / sum(
        r["big_tokens"] + r["small_tokens"] for r in kept
    )
    assert all(len(r["owners"]) <= 20 for r in kept)
    assert row["truncated_share"] == sum(r["finish"] != "eos" for r in kept) / 30
    assert row["handovers"] == sum(len(r["handovers"]) for r in kept) / 30
    assert row["pass@3"] == pytest.approx(7 / 10)  # all but those that were never right
    assert row["maj@3"] == pytest.approx((2 * (0 + 1 / 3 + 1 + 1) + 0 + 1 / 3) / 10)  # one right of three: a draw
    shares = [
        sum(r["big_tokens"] for r in rs) / sum(r["big_tokens"] + r["small_tokens"] for r in rs)
        for rs in (kept[i : i + 3] for i in range(0, 30, 3))
    ]
    assert row["share_quartiles"] == pytest.approx(list(np.quantile(shares, (0.25, 0.5, 0.75))))
    assert row["small_forward_tokens"] == engines[0].counters.forward_tokens <= row["least_small_forward_tokens"]
    assert row["big_forward_tokens"] == engines[1].counters.forward_tokens <= row["least_big_forward_tokens"]
    assert row["big_forward_tokens"] > 0.8 * row["least_big_forward_tokens"]  # twice would be seen
    assert row["least_small_forward_tokens"] == sum(r["prompt_tokens"] + len(r["owners"]) for r in kept)
    asked = [r for r in kept if r["handovers"]]
    read = sum(r["prompt_tokens"] for r in asked)
    for r in asked:  # up to the last token of the big model, without tags
        upto = engines[0].tokenizer.encode(r["text"])[: r["owners"].rindex("B") + 1]
        read += sum(token < 98 for token in upto)
    assert row["least_big_forward_tokens"] == read < row["least_small_forward_tokens"] and len(asked) < 30


class Killed(BaseException):
    pass


@dataclass(frozen=True)
class Counted(Policy):
    """A policy that notes what it begins, and dies at one of them."""

    inner: Policy
    begun: list = field(default_factory=list, repr=False)
    dies_at: int | None = field(default=None, repr=False)
    name: str = "counted"

    def write(self, writer):
        self.begun.append(writer)
        if len(self.begun) == self.dies_at:
            raise Killed
        return self.inner.write(writer)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("policy", [Learned(), Random(0.5)])
def test_a_killed_run_goes_on_and_asks_nothing_again(pair, tokenizer, problems, tmp_path, policy, temperature):
    def write(file, dies_at=None, key="k"):
        small, big = (TransformersEngine(model, tokenizer, slots=64) for model in pair)
        counted = Counted(policy, dies_at=dies_at)
        config = Offload(max_tokens=20, temperature=temperature, batch_size=4)
        try:
            return completions.run(
                small, big, counted, problems, config, dataset="arith", samples=3, seed=5, file=file, key=key
            ), len(counted.begun)
        except Killed:
            return None, 0

    (row, wanted), begun = write(tmp_path / "whole.jsonl")
    file = tmp_path / "killed.jsonl"
    assert write(file, dies_at=20)[0] is None
    ended = len(read_jsonl(file, dict))
    assert 0 < ended < 20
    with file.open("a") as cut:
        cut.write(file.read_text().splitlines()[0][:40])  # the line under way when it was killed
    (row_again, found), asked = write(file)
    assert begun == 30 and asked == 30 - ended
    assert without_time(found) == without_time(wanted)
    assert {k: v for k, v in row.items() if k not in ("wall_s", "tokens_per_s")} == {
        k: v for k, v in row_again.items() if k not in ("wall_s", "tokens_per_s")
    }
    assert row_again["wall_s"] > 0
    with Journal(file) as kept:
        assert list(kept.records.values()) == found
    assert write(file)[1] == 0  # complete
    assert write(file, key="other settings")[1] == begun


def test_a_damaged_file_of_completions(pair, tokenizer, problems, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"key": "1"}\n{"key":\n{"key": "2"}\n')
    small = TransformersEngine(pair[0], tokenizer)
    with pytest.raises(SrlibError, match="line 2 is damaged"):
        completions.run(small, None, Never("small"), problems, Offload(), dataset="arith", file=tmp_path / "x.jsonl")


def test_records_say_which_problem_they_are_of(engines, problems):
    """Two seeds number other problems alike, and what was written of them is not paired."""
    config = Offload(max_tokens=20)
    others = list(islice(arith.generate(Arith(), "test", 1), 10))
    assert [x.id for x in problems] == [x.id for x in others]
    first, second = (
        completions.run(*engines, Never("small"), some, config, dataset="arith")[1] for some in (problems, others)
    )
    assert [r["id"] for r in first] == [x.key for x in problems]
    assert completions.compare(first, first).value == 0
    with pytest.raises(SrlibError, match="different problems .0 in common, of 10 and 10"):
        completions.compare(first, second)
    changed = problems[0].model_copy(update={"answer": "7"})
    assert changed.key != problems[0].key == problems[0].model_copy(update={"meta": {}, "trace": None}).key


def test_by_difficulty(problems):
    records = [
        {"id": p.key, "correct": "*" not in p.prompt, "big_tokens": 1, "small_tokens": 3, "handovers": []}
        for p in problems
    ]
    table = completions.by_difficulty(records, problems).set_index("difficulty")
    assert table["n"].sum() == len(problems)
    assert set(table.index) == {f"{p.prompt.count('*')} products" for p in problems}
    assert all((table.accuracy == 1) == (table.index == "0 products"))
    assert completions.by_difficulty(records, [p.model_copy(update={"meta": {}}) for p in problems]).empty


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_request_is_refused_once(engines, problems, temperature):
    config = Offload(max_tokens=24, temperature=temperature)
    policy = Learned()
    _, records = completions.run(*engines, policy, problems, config, dataset="arith", samples=2, seed=1)
    rows = counterfactual.run(*engines, policy, problems, records, config, seed=1)
    assert len(rows) == sum(len(r["handovers"]) for r in records) > 5
    by_key = {(r["id"], r["sample"]): r for r in records}
    for row in rows:
        text = by_key[row["id"], row["sample"]]["text"]
        assert row["verdict"] == counterfactual.VERDICTS[row["correct"], row["correct_without"]]
        assert row["big"] in text and 0 < row["position"] < 1
    assert any(row["big"] != row["small"] for row in rows)
    table = counterfactual.table(rows)
    assert table["n"].item() == len(rows)
    assert counterfactual.table(rows, "request")["n"].sum() == len(rows)


@pytest.mark.parametrize("names", [["small", "random_0.10", "learned", "grpo", "big"], ["big"]])
def test_the_notebook_compares_policies_in_tables(monkeypatch, names):
    """Corrected for their number, and with what a difference from random at that share needs, not from the small model."""
    rng, shown = np.random.default_rng(0), []
    reached = {"small": (0.2, 0), "random_0.10": (0.25, 10), "learned": (0.7, 5), "grpo": (0.75, 6), "big": (0.9, 100)}
    records = {
        name: [
            {
                "id": f"{i:03d}",
                "correct": bool(x),
                "big_tokens": reached[name][1],
                "small_tokens": 100 - reached[name][1],
            }
            for i, x in enumerate(rng.random(300) < reached[name][0])
        ]
        for name in names
    }
    scope = {"records": records, "rows": [{"policy": name} for name in names], "stats": stats, "pd": pd}
    scope |= {
        "tuned": [],
        "claims": claims,
        "measures": [],
        "table": lambda frame, index: shown.append(frame),
        "how": SimpleNamespace(samples=1),
    }
    run_cells("05_evaluate", scope, "pairs += [", "at.spread")
    paired, at_share = shown
    if names == ["big"]:
        assert paired.empty and at_share.empty
        return
    paired = paired.set_index("comparison")
    assert paired.index.tolist() == ["learned − big", "learned − small", "grpo − learned", "grpo − big"]
    assert float(paired["p (Holm)"]["grpo − learned"]) >= float(paired["p"]["grpo − learned"])
    assert at_share["comparison"].tolist() == ["learned − random at 5.0%", "grpo − random at 6.0%"]
    curve = [records[name] for name in ("small", "random_0.10", "big")]
    for name, needed in zip(("learned", "grpo"), at_share["problems for 2 points"]):
        assert needed == stats.problems_needed(2, *stats.matched(records[name], curve).spread)
        assert needed != stats.problems_needed(2, *stats.spread(records[name], records["small"]))


@dataclass(frozen=True)
class Without(Learned):
    """As `Learned` from the beginning, but for one request."""

    request: int = 0

    def write(self, writer):
        asked = count()
        while not writer.done:
            tag = yield from writer.small_writes(writer.left, tags=True)
            if tag == spans.OPEN and not writer.done and next(asked) != self.request:
                yield from writer.span()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_trace_is_written_on_from_the_ids_that_were_recorded(pair, tokenizer, problems, temperature, monkeypatch):
    """To the letter, whatever a model would write there now, as in half precision, and as if it had been written so."""
    config, seen, row_of = Offload(max_tokens=24, span_budget=4, temperature=temperature), [], counterfactual._row

    def spying(problem, record, request, trace, *more):
        seen.append((problem, record, request, trace))
        return row_of(problem, record, request, trace, *more)

    monkeypatch.setattr(counterfactual, "_row", spying)
    engines = [TransformersEngine(model, tokenizer, slots=64) for model in pair]
    _, records = completions.run(*engines, Learned(), problems, config, dataset="arith", samples=2, seed=1)
    tags = tokenizer.convert_tokens_to_ids(["<bigmodel>", "</bigmodel>"])
    for small in (pair[0], random_model(len(tokenizer), 7, loud=(*tags, 0))):
        seen.clear()
        engines[0] = TransformersEngine(small, tokenizer, slots=64)
        counterfactual.run(*engines, Learned(), problems, records, config, seed=1)
        assert len(seen) == sum(len(r["handovers"]) for r in records) > 5
        for problem, record, request, trace in seen:
            start, ids = record["handovers"][request][0], completions.ids_of(record)
            assert tokenizer.decode(ids) == record["text"] and len(ids) == len(record["owners"])
            assert trace.ids[:start] == ids[:start] and (ids[start - 1],) == trace.tags.open
            assert "".join("SBF"[owner] for owner in trace.owners[:start]) == record["owners"][:start]
            if small is pair[0]:
                writer = Offloader(*engines, Without(request=request), **config.settings, seed=1)
                (again,) = writer.run([problem.prompt], numbers=[record["sample"]])
                assert (again.ids, again.owners) == (trace.ids, trace.owners)


class Says(Speaks):
    """Writes the first of some texts that goes on from what it has read."""

    def __init__(self, tokenizer, texts):
        Scripted.__init__(self, tokenizer, None)
        self.eos, self.texts = {tokenizer.eos_token_id}, texts

    def next(self, ids):
        said = self.tokenizer.decode(ids)
        rest = next((text.removeprefix(said) for text in self.texts if text.startswith(said)), "")
        return self.tokenizer.encode(rest)[0] if rest else self.tokenizer.eos_token_id


def test_needed_useless_and_harmful_requests(tokenizer):
    """The prompt decides which of the two models knows the answer; only what is known by one alone makes a difference."""
    known = {"1+1?": ("3", "2"), "2+2?": ("5", "4"), "3+3?": ("6", "6"), "4+4?": ("1", "1"), "5+4?": ("9", "8")}
    golds = {"1+1?": "2", "2+2?": "4", "3+3?": "6", "4+4?": "8", "5+4?": "9"}
    said = [f"{x}\\boxed{{{spans.OPEN}{own}{spans.CLOSE}}}" for x, both in known.items() for own in both]
    small = Says(tokenizer, said)  # left alone it says the first of the two
    big = Says(tokenizer, [f"{x}\\boxed{{{big}" for x, (_, big) in known.items()])
    problems = [Problem(id=x, prompt=x, answer=gold) for x, gold in golds.items()]
    config = Offload(max_tokens=40, span_budget=1)
    _, records = completions.run(small, big, Learned(), problems, config, dataset="made")
    assert [(r["answer"], r["correct"]) for r in records] == [
        ("2", True), ("4", True), ("6", True), ("1", False), ("8", False)
    ]  # fmt: skip
    rows = counterfactual.run(small, big, Learned(), problems, records, config)
    assert [(row["id"].partition("#")[0], row["big"], row["small"], row["verdict"]) for row in rows] == [
        ("1+1?", "2", "3", "needed"),
        ("2+2?", "4", "5", "needed"),
        ("3+3?", "6", "6", "useless"),
        ("4+4?", "1", "1", "useless"),
        ("5+4?", "8", "9", "harmful"),
    ]
    line = counterfactual.table(rows).iloc[0]
    assert [line[name].partition(" ")[0] for name in ("needed", "useless", "harmful")] == ["40.0%", "40.0%", "20.0%"]
