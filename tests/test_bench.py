import json

import pytest

from srlib.__main__ import main
from srlib.data.rows import Problem, write_jsonl


@pytest.mark.parametrize("apart", [False, True])
def test_bench_measures_every_policy_on_the_same_prompts(apart, pair, tokenizer, tmp_path, capsys):
    for name, model in zip(("small", "big"), pair):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    write_jsonl(tmp_path / "test.jsonl", [Problem(id=str(i), prompt=f"{i}+2?", answer="3") for i in range(4)])
    file = tmp_path / "x.yaml"
    file.write_text(
        f"""run: tiny
outputs: {tmp_path}
pair: {{small: {{path: {tmp_path}/small}}, big: {{path: {tmp_path}/big}}}}
data: {{test: {tmp_path}/test.jsonl}}
bench: {{batch_sizes: [1, 4], repeats: 1, max_tokens: 12, big_process: {apart}, pipelined: {{stream_chunk: 3, oversubscribe: 0.5}}}}
"""
    )
    assert main(["bench", str(file)]) == 0
    assert "efficiency" in capsys.readouterr().out
    result = json.loads((tmp_path / "tiny" / "bench.json").read_text())
    rows = {(r["batch"], r["policy"]): r for r in result["rows"]}
    names = ("small", "big", "learned", "random", "speculative", "learned, pipelined", "random, pipelined", "generate")
    assert set(rows) == {(batch, name) for batch in (1, 4) for name in names}
    for (batch, name), row in rows.items():
        if name in ("small", "big"):
            assert row["efficiency"] == pytest.approx(1.0, abs=1e-12)  # it divides by what it was multiplied with
        if name in ("small", "generate"):
            assert row["small_tokens"] == rows[batch, "small"]["small_tokens"]
        if name in ("big", "speculative"):
            tokens = row["small_tokens"] + row["big_tokens"]
            assert tokens == rows[batch, "big"]["big_tokens"]
        if name.endswith("pipelined"):
            assert row["big_tokens"] == rows[batch, name.removesuffix(", pipelined")]["big_tokens"]
            assert row["big_read"] >= rows[batch, name.removesuffix(", pipelined")]["big_read"]
        assert row["under_way"] == ({1: 2, 4: 6}[batch] if name.endswith("pipelined") else batch)
        if name != "generate":
            shares = [row[key] for key in ("small_share", "big_share", "controller_share", "idle_share")]
            assert 0.5 < sum(shares)
            beside = apart and name.endswith("pipelined")  # there the big model works at the same time
            assert sum(shares) - (row["big_share"] if beside else 0) <= 1.001
    assert [check["batch"] for check in result["closing_check"]] == [1, 4]
