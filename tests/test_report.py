import json

import numpy as np

from srlib.__main__ import main
from srlib.data.rows import write_jsonl


def run(folder, policies, seed=0, n=400, problems=0):
    """A run's stage 05: policies, each with its accuracy and offload share; `problems` is the seed of these."""
    stage = folder / "05_evaluate"
    (stage / "completions").mkdir(parents=True)
    rows = []
    luck = np.random.default_rng(7).random(n)  # a problem is easy or hard for every policy
    for i, (name, (accuracy, share)) in enumerate(policies.items()):
        noise = np.random.default_rng([seed, i]).normal(0, 0.1, n)
        big = round(100 * share)
        records = [
            {"id": f"test-{j}#{problems:04x}{j:04x}", "correct": bool(x), "big_tokens": big, "small_tokens": 100 - big}
            for j, x in enumerate(luck + noise < accuracy)
        ]
        write_jsonl(stage / "completions" / f"{name}.jsonl", records)
        rows.append({"policy": name, "dataset": "arith", "samples_per_problem": 1, "max_tokens": 96})
    (stage / "results.json").write_text(json.dumps(rows))
    return str(folder)


def test_compare_in_words_and_numbers(tmp_path, capsys):
    a = run(tmp_path / "a", {"small": (0.2, 0.0), "learned": (0.7, 0.05)})
    b = run(tmp_path / "b", {"small": (0.2, 0.0), "learned": (0.8, 0.08), "grpo": (0.9, 0.1)}, seed=1)
    assert main(["compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert "grpo" not in printed
    assert "learned: B is more accurate by" in printed and "small: no difference can be told" in printed
    (line,) = (x for x in printed.splitlines() if x.startswith("learned  "))
    assert "5.0%" in line and "8.0%" in line and " 400 " in line
    assert "p (Holm)" in printed and "< 0.0001" in line and "p < 0.0001, 400 problems" in printed
    assert printed.splitlines()[-1].endswith("about these trained models only.")
    assert main(["compare", b, a, "--policy", "grpo:learned"]) == 0
    assert "grpo:learned: B is less accurate by" in capsys.readouterr().out


def test_names_are_text_on_the_screen(tmp_path, capsys):
    name = "\x1b[2J\u202elearned\n$x^{$"
    a, b = (run(tmp_path / folder, {name: (0.2, 0.0)}, seed=i) for i, folder in enumerate(("a", "b\u2066")))
    assert main(["compare", a, b]) == 0
    printed = capsys.readouterr().out
    assert r"\x1b[2J\u202elearned\n$x^{$" in printed and r"b\u2066" in printed
    assert all(character.isprintable() for line in printed.splitlines() for character in line)
    assert main(["compare", a, b, "--policy", "\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert main(["params", "\x1b[2J"]) == 2 and "\x1b" not in capsys.readouterr().err


def test_mistakes(tmp_path, capsys):
    def says(*arguments):
        assert main(["compare", *arguments]) == 2
        error = capsys.readouterr().err
        assert len(error.strip().splitlines()) == 1
        return error

    a = run(tmp_path / "a", {"small": (0.2, 0.0), "learned": (0.7, 0.05)})
    others = run(tmp_path / "b", {"small": (0.2, 0.0)}, problems=1)  # of the same numbers
    assert "small: The two sets of records hold different problems (0 in common, of 400 and 400)" in says(a, others)
    assert "did you mean 'learned'?" in says(a, others, "--policy", "learnt")
    assert "run stage 05 there first" in says(a, str(tmp_path / "none"))
    assert "have no policy in common" in says(a, run(tmp_path / "c", {"big": (0.9, 1.0)}))
    (tmp_path / "a" / "05_evaluate" / "completions" / "small.jsonl").write_text('{"id": "0", "text": "…"}\n')
    assert "is not complete" in says(a, a)
    for wrong in ({"correct": "yes"}, {"big_tokens": None}, {"id": 5}):
        record = {"id": "0", "correct": True, "big_tokens": 1, "small_tokens": 1} | wrong
        write_jsonl(tmp_path / "a" / "05_evaluate" / "completions" / "small.jsonl", [record])
        assert "is not complete" in says(a, a)
    write_jsonl(tmp_path / "a" / "05_evaluate" / "completions" / "small.jsonl", [record | {"id": "test-0"}])
    assert "does not say which problem 'test-0' is" in says(a, a)  # of any seed
    for damaged in ("[{", "null", '{"policy": "small"}', '[{"policy": "small"}]', '[{"policy": [1]}]', "3"):
        (tmp_path / "a" / "05_evaluate" / "results.json").write_text(damaged)
        assert "is damaged" in says(a, a)


def test_p_values_are_corrected_for_the_number_of_policies(tmp_path, capsys):
    """What is told of one policy alone is not told of it among twenty that do not differ."""
    policies = {f"same{i}": (0.5, 0.1) for i in range(19)}
    a = run(tmp_path / "a", {**policies, "learned": (0.50, 0.1)})
    b = run(tmp_path / "b", {**policies, "learned": (0.52, 0.1)}, seed=1)
    assert main(["compare", a, b, "--policy", "learned"]) == 0
    alone = capsys.readouterr().out
    assert "learned: B is more accurate" in alone and "Holm" not in alone
    assert main(["compare", a, b]) == 0
    assert "learned: no difference can be told" in capsys.readouterr().out
