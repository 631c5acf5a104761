import json

import pytest

from srlib.__main__ import main
from srlib.data.rows import Problem, write_jsonl
from srlib.params import ROOT
from srlib.run import bench
from srlib.run.manifest import machine


def test_efficiency_on_a_case_worked_by_hand():
    """Alone the small model takes 0.1 s a token and the big one 0.5 s; a token that is read takes 0.01 and 0.02 s."""

    def row(small, big, seconds, small_read=0, big_read=0):
        read = {"small_read": small_read, "big_read": big_read, "tokens_per_s": (small + big) / seconds}
        return {"small_tokens": small, "big_tokens": big, "seconds": seconds} | read

    measured = {"small": row(200, 0, 20.0), "big": row(0, 100, 50.0), "learned": row(80, 20, 30.0, 50, 100)}
    found = bench._relative(measured | {"generate": row(300, 0, 15.0)}, {"small": 0.01, "big": 0.02})
    assert found["learned"]["efficiency"] == pytest.approx((80 * 0.1 + 20 * 0.5) / 30)
    assert found["learned"]["with_reading"] == pytest.approx((18 + 50 * 0.01 + 100 * 0.02) / 30)
    assert [found[name]["speed"] for name in measured] == pytest.approx([1.0, 0.2, 1 / 3])
    assert found["generate"]["speed"] == pytest.approx(2.0) and "efficiency" not in found["generate"]


@pytest.mark.parametrize("apart", [False, True])
def test_bench_measures_every_policy_on_the_same_prompts(apart, pair, tokenizer, tmp_path, capsys, monkeypatch):
    for name, model in zip(("small", "big"), pair):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "test.jsonl", [Problem(id=str(i), prompt=f"{i}+2?", answer="3") for i in range(4)])
    file = tmp_path / "x.yaml"
    file.write_text(
        f"""run: tiny
outputs: {tmp_path}
pair: {{small: {{path: {tmp_path}/small}}, big: {{path: {tmp_path}/big, process: {apart}}}}}
data: {{test: {tmp_path}/test.jsonl}}
offload: {{oversubscribe: 0.5}}
bench: {{batch_sizes: [1, 4], repeats: 1, max_tokens: 12, random_share: 0.5, random_chunk: 2}}
"""
    )
    assert main(["bench", str(file)]) == 0
    assert "efficiency" in capsys.readouterr().out
    result = json.loads((tmp_path / "tiny" / "bench.json").read_text())
    rows = {(r["batch"], r["policy"]): r for r in result["rows"]}
    names = ("small", "big", "learned", "random", "speculative", "generate")
    assert set(rows) == {(batch, name) for batch in (1, 4) for name in names}
    for (batch, name), row in rows.items():
        if name in ("learned", "random", "speculative"):  # what both models alone would have taken for these tokens
            small, big = rows[batch, "small"], rows[batch, "big"]
            alone = row["small_tokens"] * small["seconds"] / small["small_tokens"]
            alone += row["big_tokens"] * big["seconds"] / big["big_tokens"]
            assert row["big_tokens"] > 0 and (row["small_tokens"] > 0 or name == "speculative")
            assert row["efficiency"] == pytest.approx(alone / row["seconds"])
            assert row["with_reading"] > row["efficiency"]
        if name in ("small", "generate"):
            assert row["small_tokens"] == rows[batch, "small"]["small_tokens"]
        if name in ("big", "speculative"):
            tokens = row["small_tokens"] + row["big_tokens"]
            assert tokens == rows[batch, "big"]["big_tokens"]
        assert row["under_way"] == (batch if name == "generate" else {1: 2, 4: 6}[batch])
        if name != "generate":
            shares = [row[key] for key in ("small_share", "big_share", "controller_share", "idle_share")]
            if apart:  # the big model works at the same time
                assert sum(shares) - row["big_share"] <= 1.001
            else:  # no second is counted twice, and none is lost
                assert sum(shares) == pytest.approx(1, abs=1e-3)
    assert [check["batch"] for check in result["closing_check"]] == [1, 4]
    assert result["machine"] == machine() and result["settings"]["max_tokens"] == 12
    # README.md is made of such a file.
    monkeypatch.syspath_prepend(ROOT / ".ci")
    import readme

    monkeypatch.setattr(readme, "REFERENCE", tmp_path / "tiny")
    assert all(f"| arithmetic, {name} | 1, 4 | " in readme.bench() for name in ("learned", "random", "speculative"))
