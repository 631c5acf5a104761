"""README.md's figures come from the files in outputs/reference/, and so do its words on what holds."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from srlib.evaluation.claims import difference
from srlib.params import ROOT


@pytest.fixture
def ci(tmp_path, monkeypatch):
    """`.ci/readme.py` and `.ci/reference.py`, on a copy of what they read."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    import readme
    import reference

    kept = tmp_path / "outputs" / "reference"
    shutil.copytree(ROOT / "outputs" / "reference", kept)
    shutil.copytree(ROOT / "params", tmp_path / "params")
    shutil.copyfile(ROOT / "README.md", tmp_path / "README.md")
    for module, name, path in [
        (readme, "ROOT", tmp_path),
        (readme, "REFERENCE", kept),
        (reference, "OUTPUTS", tmp_path / "outputs"),
        (reference, "MADE", kept / "made.json"),
    ]:
        monkeypatch.setattr(module, name, path)
    return reference


@pytest.fixture
def readme(ci):
    return ci.readme


def refused(readme, check=True):
    with pytest.raises(SystemExit) as ended:
        readme.main(check)
    assert isinstance(ended.value.code, str) and len(ended.value.code.splitlines()) == 1
    return ended.value.code


def numbers(tree, path=()):
    """Path of each number."""
    if isinstance(tree, dict | list):
        for key in tree if isinstance(tree, dict) else range(len(tree)):
            yield from numbers(tree[key], (*path, key))
    elif isinstance(tree, int | float) and not isinstance(tree, bool):
        yield path


def without(text, path):
    tree = json.loads(text)
    at = tree
    for key in path[:-1]:
        at = at[key]
    del at[path[-1]]
    return json.dumps(tree)


def a_bench():
    """As `srlib bench` writes it; tests/test_bench.py puts a true one in its place."""
    row = {"big_tokens": 2, "under_way": 20, "reread_share": 0.004, "speed": 0.5, "seconds": 1.5}
    shares = {"efficiency": 0.921, "with_reading": 1.034, "controller_share": 0.039}
    rows = [{"batch": batch, "policy": name, **row, **shares} for batch in (1, 16) for name in ("small", "learned")]
    plain = [{"batch": batch, "policy": "generate", "speed": 1.25, "seconds": 1.0} for batch in (1, 16)]
    return {
        "rows": [*rows, *plain],
        "closing_check": [{"batch": batch, "tokens": 8, "one_pass": 1.2, "separate": 6.8} for batch in (1, 16)],
        "machine": {"cpu": "A processor", "cores": 2},
        "settings": {"max_tokens": 64, "traces_per_slot": 8, "min_traces": 64, "repeats": 3},
    }


# -- README.md and the files ---------------------------------------------------------------------


def test_readme_has_the_figures_of_the_reference_files():
    done = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py", "--check"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["results.json", "latency.json", "bench.json"])
def test_a_number_that_is_deleted_from_a_file_is_missed(name, readme):
    path = readme.REFERENCE / name
    if name == "bench.json":
        path.write_text(json.dumps(a_bench()))
    readme.main(check=False)
    readme.main(check=True)
    text = path.read_text()
    every = list(numbers(json.loads(text)))
    assert len(every) > 10
    for number in every:
        path.write_text(without(text, number))
        assert name in refused(readme) or "README.md, line" in refused(readme), number


def test_a_sweep_says_where_it_is_older_than_the_run(readme):
    path, page = readme.REFERENCE / "made.json", readme.ROOT / "README.md"
    made = json.loads(path.read_text())
    stage = "05_evaluate"
    for digest, told in ((made["run"]["code"][stage], False), ("0" * 16, True)):
        code = {stage: digest}
        path.write_text(json.dumps({**made, **{name: {"seconds": 1.0, "code": code} for name in readme.named()}}))
        readme.main(check=False)
        assert ("Older than the run above" in page.read_text()) == told
    path.unlink()
    readme.main(check=False)
    assert "Older than the run above" in page.read_text()


def test_seconds_that_are_deleted_from_the_manifest_are_missed(readme):
    path = readme.REFERENCE / "manifest.json"
    text = path.read_text()
    for stage in json.loads(text)["stages"]:
        path.write_text(without(text, ("stages", stage, "seconds")))
        assert "manifest.json" in refused(readme) and "'seconds'" in refused(readme)


@pytest.mark.parametrize("name", ["results.json", "manifest.json", "latency.json"])
def test_a_file_that_is_deleted_is_missed(name, readme):
    (readme.REFERENCE / name).unlink()
    assert name in refused(readme) or "latency" in refused(readme)


def test_a_place_that_is_edited_by_hand_is_found_and_made_again(readme):
    path = readme.ROOT / "README.md"
    right = path.read_text()
    places = list(readme.PLACE.finditer(right))
    assert {place[2].split()[0] for place in places} == set(readme.MADE)
    for place in places:
        if not place[3].strip():
            continue
        at = place.start(3) + re.search(r"\w", place[3]).start()
        path.write_text(right[:at] + "9" + right[at + 1 :])
        line = right.count("\n", 0, at) + 1
        assert refused(readme).startswith(f"README.md, line {line}:")
        readme.main(check=False)
        assert path.read_text() == right


@pytest.mark.parametrize(
    "words",
    [
        "It gains 3.1 % more.",
        "It gains 3.1% more.",
        "It is right in 9 per cent.",
        "Between [0.31, 0.4] of them.",
        "Between [−1, 2.5] of them.",
        "It is 12 points above.",
        "It is 1.7 times as fast.",
        "That takes 9 minutes.",
        "That takes 2½ minutes.",
        "It was seen at n = 300.",
        "It was seen, p < 0.01.",
    ],
)
def test_a_figure_with_no_file_behind_it_is_found(words, readme):
    path = readme.ROOT / "README.md"
    text = path.read_text()
    before, after = text.split("\n## Contributing\n")
    for hidden in ("`[0.31, 0.4]` and `5 %` are settings.", "Each has a 95 % interval, see [1](a.md)."):
        path.write_text(f"{before}\n{hidden}\n## Contributing\n{after}")
        readme.main(check=True)
    path.write_text(f"{before}\n{words}\n## Contributing\n{after}")
    found = refused(readme)
    assert found.startswith(f"README.md, line {before.count(chr(10)) + 2}:") and words in found
    assert words in refused(readme, check=False)


def test_places_are_whole_and_known(readme):
    path = readme.ROOT / "README.md"
    text = path.read_text()
    path.write_text(text.replace("<!-- end -->", "", 1))
    assert "begin" in refused(readme, check=False)
    path.write_text(text.replace("<!-- made: shown -->", "<!-- made: nonesuch -->"))
    assert "nonesuch" in refused(readme)


# -- words that are computed ---------------------------------------------------------------------

# A change of results.json that each claim does not survive.
BROKEN = {
    "Every policy wrote": {"small": {"n_problems": 999}},
    "The big model alone": {"big": {"accuracy": 0.89}},
    "The small one alone": {"small": {"accuracy": 0.41}},
    "The learned policy hands over": {"learned": {"offload_share": 0.081}},
    "It keeps at least": {"learned": {"accuracy": 0.7}},
    "It is at least 30 points above": {"random_matched": {"accuracy": 0.65}},
    "Random offloading hands over no less": {"random_matched": {"offload_share": 0.04}},
    "What random offloading buys": {"random_0.10": {"accuracy": 0.6, "ci95": [0.58, 0.62]}},
    "With nobody answering": {"learned_off": {"accuracy": 0.1, "ci95": [0.088, 0.114]}},
    "Refusing its requests": {"rejection_0.50": {"accuracy": 0.7, "ci95": [0.68, 0.72]}},
    "Reinforcement gains accuracy": {"grpo": {"accuracy": 0.85, "ci95": [0.834, 0.865]}},
    "Reinforced, it is above": {"grpo": {"accuracy": 0.35, "ci95": [0.33, 0.37]}},
    "The learned policy goes": {"learned": {"accuracy": 0.5, "ci95": [0.48, 0.52]}},
    "It is right more often": {"random_matched": {"accuracy": 0.94, "ci95": [0.93, 0.95]}},
    "Speculative decoding": {"speculative": {"accuracy": 0.5}},
    "Asking where the": {"margin": {"offload_share": 0.12}},
    "The best of these": {
        name: {"accuracy": 0.34, "ci95": [0.32, 0.36]} for name in ("entropy", "margin", "confidence")
    },
    "**The learned policy is right more often": {
        name: {"accuracy": 0.95, "ci95": [0.94, 0.96]} for name in ("entropy", "margin", "confidence")
    },
    "Reinforced, it keeps": {"grpo": {"offload_share": 0.09}},
    "No model processes": {"learned": {"big_forward_tokens": 70_000}},
}


def test_every_claim_can_fail(readme):
    path = readme.REFERENCE / "results.json"
    text = path.read_text()
    rows = {row["policy"]: row for row in json.loads(text)}
    assert len(BROKEN) == len(list(readme.claims(rows)))
    for words, changes in BROKEN.items():
        changed = {name: {**row, **changes.get(name, {})} for name, row in rows.items()}
        (claim,) = (claim for claim in readme.claims(changed) if claim.words.startswith(words))
        assert not claim.holds, words
        path.write_text(json.dumps(list(changed.values())))
        readme.main(check=False)
        made = (readme.ROOT / "README.md").read_text()
        assert f"{claim.words}: **does not hold here** · {claim.found}" in made
        assert re.search(r"All but \d of the 20 claims", made)
        checked = [sys.executable, ROOT / ".ci" / "check_results.py", path]
        if words == "With nobody answering":
            assert subprocess.run(checked, capture_output=True).returncode == 1
    # Both sides: more than the small model is no more equal to it than less.
    changed = {**rows, "learned_off": {**rows["learned_off"], "accuracy": 0.6, "ci95": [0.578, 0.621]}}
    (claim,) = (claim for claim in readme.claims(changed) if claim.words.startswith("With nobody"))
    assert not claim.holds


def test_the_difference_of_two_intervals_is_newcombes(readme):
    """His table II, example (a): 56/70 − 48/80, 0.0524 to 0.3339."""
    from scipy.stats import binomtest

    def row(right, n):
        interval = binomtest(right, n).proportion_ci(method="wilson")
        return {"accuracy": right / n, "ci95": [interval.low, interval.high]}

    assert difference(row(56, 70), row(48, 80)) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


def a_sweep(readme, name, accuracies):
    """Table of a sweep with these accuracies by seed, of each value and policy; shares are a tenth of them."""
    (key, values), *_ = yaml.safe_load((ROOT / f"params/ablations/{name}.yaml").read_text())["vary"].items()
    rows = [
        {
            "label": f"{key.rpartition('.')[2]}={value}",
            "policy": policy,
            "accuracy": sum(seeds) / len(seeds),
            "ci95": [0.1, 0.9],
            "offload_share": sum(seeds) / len(seeds) / 10,
            "by_seed": [[seed, seed / 10] for seed in seeds],
            "n_problems": 600,
            "samples_per_problem": 1,
            "max_tokens": 96,
            "values": {key: value},
        }
        for value, by_policy in zip(values, accuracies, strict=True)
        for policy, seeds in by_policy.items()
    ]
    (readme.REFERENCE / f"{name}.json").write_text(json.dumps(rows))
    readme.main(check=False)
    readme.main(check=True)
    return (readme.ROOT / "README.md").read_text()


def test_a_sweep_is_shown_when_its_table_is_there(readme):
    (readme.REFERENCE / "rollout.json").unlink(missing_ok=True)
    readme.main(check=False)
    assert "**rollout.**" not in (readme.ROOT / "README.md").read_text()
    before, low, high = [0.9, 0.91, 0.92], [0.3, 0.32, 0.31], [0.92, 0.94, 0.96]
    made = a_sweep(readme, "rollout", [{"learned": before, "grpo": high}, {"learned": before, "grpo": low}])
    assert "95 % intervals clustered by problem, 3 training seeds pooled" in made
    assert "| rollout=self | 91.0 % [10.0, 90.0] at 9.1 % | 31.0 % [10.0, 90.0] at 3.1 % |" in made
    # Student's t at 2 degrees of freedom: 63 ± 4.303 · 1.732 / √3
    assert (
        "ends higher than without: **holds here** · +63.0 points [58.7, 67.3] over 3 seeds (+62.0, +62.0, +65.0)"
        in made
    )
    made = a_sweep(readme, "rollout", [{"learned": before, "grpo": low}, {"learned": before, "grpo": high}])
    assert "ends higher than without: **does not hold here** · −63.0 points" in made
    mixed = [0.9, 0.95, 0.93]
    made = a_sweep(readme, "rollout", [{"learned": before, "grpo": mixed}, {"learned": before, "grpo": high}])
    assert "ends higher than without: **cannot be told here** ·" in made
    made = a_sweep(readme, "rollout", [{"learned": [0.9], "grpo": [0.9]}, {"learned": [0.9], "grpo": [0.3]}])
    assert "ends higher than without: **cannot be told here** · +60.0 points" in made


def test_a_trend_is_told_from_seeds_that_agree(readme):
    falling = [{"learned": [0.9 - level / 20 + seed / 100 for seed in range(3)]} for level in range(3)]
    assert "the lower the accuracy: **holds here** · 91.0, 86.0," in a_sweep(readme, "threshold", falling)
    assert "the lower the accuracy: **does not hold here** ·" in a_sweep(readme, "threshold", falling[::-1])
    mixed = [falling[place] for place in (1, 0, 2)]
    assert "the lower the accuracy: **cannot be told here** ·" in a_sweep(readme, "threshold", mixed)


def test_every_expectation_fits_its_sweep(readme):
    assert set(readme.EXPECTED) == set(readme.named()) == {p.stem for p in (ROOT / "params/ablations").glob("*.yaml")}
    for name, expected in readme.EXPECTED.items():
        plan = yaml.safe_load((ROOT / f"params/ablations/{name}.yaml").read_text())
        (values,) = plan["vary"].values()
        measured = plan.get("fix", {}).get("evaluate.policies", ["learned", "grpo"])
        made = a_sweep(
            readme, name, [{p: [0.5, 0.6, 0.7] for p in ("learned", "grpo") if p in measured} for _ in values]
        )
        for each in expected:
            assert f"- {each.words}: **cannot be told here** ·" in made, "equal rows tell nothing"


def test_the_bench_is_shown_when_it_was_measured(readme):
    bench = readme.REFERENCE / "bench.json"
    bench.unlink(missing_ok=True)
    readme.main(check=False)
    assert "| efficiency |" not in (readme.ROOT / "README.md").read_text()
    bench.write_text(json.dumps(a_bench()))
    readme.main(check=False)
    made = (readme.ROOT / "README.md").read_text()
    assert (
        "| arithmetic, learned | 1, 16 | 0.92, 0.92 | 1.03, 1.03 | 3.9 %, 3.9 % |" in made
        and "A processor, 2 cores" in made
    )
    bench.write_text(without(bench.read_text(), ("machine",)))
    assert "bench.json" in refused(readme) and "'machine'" in refused(readme)


def test_minutes_are_those_of_the_manifest_on_its_machine(readme):
    path = readme.REFERENCE / "manifest.json"
    manifest = json.loads(path.read_text())
    for stage in manifest["stages"].values():
        stage.update(seconds=150.0, machine={"cpu": "A processor", "cores": 2})
    path.write_text(json.dumps(manifest))
    readme.main(check=False)
    made = (readme.ROOT / "README.md").read_text()
    assert made.count("-->2.5<!-- end --> |") == len(manifest["stages"]) and "-->A processor, 2 cores<!--" in made


# -- make reference ------------------------------------------------------------------------------


@pytest.fixture
def outputs(ci, monkeypatch):
    """`srlib` that writes what the commands would leave, each stage in 360 seconds; gives the commands."""
    called = []
    tables = json.dumps(json.loads((ci.readme.REFERENCE / "latency.json").read_text()))

    def manifest(folder, *stages):
        folder.mkdir(parents=True, exist_ok=True)
        kept = {name: {"seconds": 360.0, "notebook": name, "code": {"srlib": "1"}} for name in stages}
        (folder / "manifest.json").write_text(json.dumps({"stages": kept}))

    def srlib(*arguments):
        called.append(arguments)
        run = ci.OUTPUTS / next(each for each in arguments if each.startswith("run=")).removeprefix("run=")
        if arguments[0] == "run":
            manifest(run, "02_sft", "05_evaluate")
            kept = json.loads((ROOT / "outputs/reference/manifest.json").read_text())
            for stage in kept["stages"].values():
                stage["machine"] = {"cpu": "Another", "cores": 4}
            (run / "manifest.json").write_text(json.dumps(kept))
            (run / "05_evaluate").mkdir(exist_ok=True)
            for name in ("results.json", "accuracy_by_share.png"):
                shutil.copyfile(ROOT / "outputs/reference" / name, run / "05_evaluate" / name)
        elif arguments[0] == "bench":
            (run / "bench.json").write_text(json.dumps(a_bench()))
        else:
            folder = run.with_name(f"{run.name}-{Path(arguments[1]).stem}")
            manifest(folder, "06_reward_ablation")
            manifest(folder / "one", "05_evaluate")
            manifest(folder / "of-another-plan", "05_evaluate")
            manifest(run.with_name(f"{run.name}-seed1"), "02_sft")
            (folder / "sweep.json").write_text(json.dumps({"runs": [{"folder": "elsewhere/one"}]}))
            (folder / "06_reward_ablation").mkdir()
            (folder / "06_reward_ablation/table.json").write_text(tables)
            (folder / "06_reward_ablation/front.png").write_bytes(b"a figure")

    monkeypatch.setattr(ci, "srlib", srlib)
    monkeypatch.setattr(ci.readme, "EXPECTED", {})  # the same table for each
    return called


def test_make_reference_makes_all_that_the_readme_shows(ci, outputs, capsys):
    shutil.rmtree(ci.readme.REFERENCE)
    ci.main("cpu", 2)
    names = list(ci.readme.EXPECTED) or ci.readme.named()
    assert [a[:2] for a in outputs[:2]] == [("run", "params/cpu.yaml"), ("bench", "params/cpu.yaml")]
    assert [a[1] for a in outputs[2:]] == [f"params/ablations/{name}.yaml" for name in names]
    assert all(a[2:4] == ("--jobs", "2") for a in outputs[2:]) and len(names) == 8
    ci.readme.main(check=True)
    made = (ci.readme.ROOT / "README.md").read_text()
    assert all(f"**{name}.**" in made for name in names) and "| arithmetic, learned |" in made
    assert "Another, 4 cores" in made
    assert "not been measured: run, bench, latency" in capsys.readouterr().out
    known = json.loads(ci.MADE.read_text())
    assert known["latency"]["seconds"] == 720.0  # of the plan's runs and its notebook
    assert known["seed1"]["seconds"] == 360.0
    hours = (sum(stage["seconds"] for _, stage in ci.stages(ci.OUTPUTS / "cpu")) + len(names) * 720 + 360) / 3600
    assert f"it took {hours:.1f} hours the last time" in ci.estimate(names) and "measured:" not in ci.estimate(names)


def test_what_made_the_run_is_noted(ci):
    seconds = sum(stage["seconds"] for _, stage in ci.stages(ci.readme.REFERENCE))
    assert ci.noted()["run"] == {"seconds": pytest.approx(seconds), "code": ci.code(ci.readme.REFERENCE)}


def test_reference_files_of_other_code_are_found(ci, outputs):
    run = ci.OUTPUTS / "cpu"
    assert "There is no run" in ci.stale(run, [])
    ci.srlib("run", "params/cpu.yaml", "--set", "run=cpu")
    ci.MADE.unlink()
    assert "made.json does not say which code made the run" in ci.stale(run, ["latency"])
    shutil.rmtree(ci.readme.REFERENCE)
    ci.main("cpu", 1)
    own = json.loads((run / "manifest.json").read_text())
    for stage in own["stages"].values():
        stage.update(code={"srlib": "1"})
    own["stages"]["05_evaluate"]["notebook"] = "05_evaluate"
    own["stages"]["02_sft"]["notebook"] = "02_sft"
    (run / "manifest.json").write_text(json.dumps(own))
    assert "of the run was made by other code" in ci.stale(run, ["latency"])
    ci.keep({"run": run}, {})
    assert ci.stale(run, ["latency"]) is None
    own["stages"]["05_evaluate"]["code"] = {"srlib": "2"}
    (run / "manifest.json").write_text(json.dumps(own))
    ci.keep({"run": run}, {})
    assert "05_evaluate of the latency was made by other code" in ci.stale(run, ["latency"])
    assert ci.stale(run, []) is None
