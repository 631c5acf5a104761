"""Completions: written, kept as they end, taken up again, graded, and summed up in a row."""

import json
from dataclasses import dataclass, field
from itertools import islice

import pytest

from srlib import SrlibError
from srlib.data import arith
from srlib.data.rows import read_jsonl
from srlib.decoding.policies import Learned, Never, Policy, Random
from srlib.engine.transformers import TransformersEngine
from srlib.evaluation import completions, counterfactual, stats
from srlib.params import Arith, Offload


@pytest.fixture
def problems():
    return list(islice(arith.generate(Arith(), "test", 0), 10))


def without_time(records):
    return [{key: value for key, value in r.items() if key != "seconds"} for r in records]


def test_a_row_of_results(engines, problems):
    config = Offload(max_tokens=20, temperature=1.0)
    row, kept = completions.run(*engines, Learned(), problems, config, dataset="arith", samples=3)
    assert len(kept) == 30
    assert (row["n_problems"], row["samples_per_problem"], row["max_tokens"]) == (10, 3, 20)
    assert row["ci95"][0] <= row["accuracy"] <= row["ci95"][1]
    assert len({r["text"] for r in kept if r["id"] == problems[0].id}) > 1  # three samples, three seeds
    assert row["offload_share"] == sum(r["big_tokens"] for r in kept) / sum(
        r["big_tokens"] + r["small_tokens"] for r in kept
    )
    assert all(len(r["owners"]) <= 20 for r in kept)
    assert row["truncated_share"] == sum(r["finish"] != "eos" for r in kept) / 30
    assert row["handovers"] == sum(len(r["handovers"]) for r in kept) / 30
    assert row["pass@3"] == stats.pass_at(kept, 3).value and 0 <= row["maj@3"] <= row["pass@3"]
    assert row["share_quartiles"][0] <= row["share_quartiles"][1] <= row["share_quartiles"][2]


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
    assert [json.loads(line) for line in file.read_text().splitlines()] == found
    assert write(file)[1] == 0  # complete
    assert write(file, key="other settings")[1] == begun


def test_a_damaged_file_of_completions(pair, tokenizer, problems, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"key": "1"}\n{"key":\n{"key": "2"}\n')
    small = TransformersEngine(pair[0], tokenizer)
    with pytest.raises(SrlibError, match="line 2 is damaged"):
        completions.run(small, None, Never("small"), problems, Offload(), dataset="arith", file=tmp_path / "x.jsonl")


def test_by_difficulty(problems):
    records = [
        {"id": p.id, "correct": "*" not in p.prompt, "big_tokens": 1, "small_tokens": 3, "handovers": []}
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
    assert all(row["same_start"] for row in rows)
    by_key = {(r["id"], r["sample"]): r for r in records}
    for row in rows:
        text = by_key[row["id"], row["sample"]]["text"]
        assert row["verdict"] == counterfactual.VERDICTS[row["correct"], row["correct_without"]]
        assert row["big"] in text and 0 < row["position"] < 1
    assert any(row["big"] != row["small"] for row in rows)
    table = counterfactual.table(rows)
    assert table["n"].item() == len(rows)
    assert counterfactual.table(rows, "request")["n"].sum() == len(rows)
