"""Sweeps: the plan, what is shared, a failure among others, and the notebook that compares them."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from srlib import SrlibError, visible
from srlib.data.rows import write_json, write_jsonl
from srlib.evaluation import stats
from srlib.params import ROOT, load
from srlib.run import locks, sweep
from srlib.run.stages import STAGES
from srlib.show import figures
from tests.cells import run_cells


def test_a_params_file_and_values():
    plan = sweep.plan("params/cpu.yaml", ["grpo.reward_weights.latency=0,0.25", "grpo.max_steps=5"], [0, 3])
    top, bases, runs = sweep.combinations(plan)
    assert top.run == "cpu-latency" and {p.run for p in bases.values()} == {"cpu", "cpu-seed3"}
    assert [(c.label, c.seed) for c, _ in runs] == [(f"latency={v}", s) for s in (0, 3) for v in (0, 0.25)]
    for combination, p in runs:
        assert p.grpo.reward_weights == {"latency": combination.values["grpo.reward_weights.latency"]}
        assert p.grpo.max_steps == 5 and p.seed == combination.seed
        assert p.base.folder == str(bases[p.seed].run_dir)
        assert set(STAGES) - set(p.base.stages) == {"03_grpo", "05_evaluate", "07_latency"}  # 07 is not run
        assert p.tuned.adapter.startswith(p.base.folder) and p.reinforced.adapter.startswith(str(p.run_dir))
    assert len({p.run_dir for _, p in runs}) == len(runs)


def test_another_name_for_the_base_run():
    top, bases, runs = sweep.combinations(sweep.plan("params/cpu.yaml", ["run=mine", "grpo.beta=0,1"]))
    assert top.run == "mine-beta" and bases[0].run == "mine"
    assert all(p.base.folder == str(bases[0].run_dir) for _, p in runs)


def test_values_that_differ_in_signs_alone_have_folders_of_their_own():
    _, _, runs = sweep.combinations(sweep.plan("params/cpu.yaml", ['sft.tag_init=["=", ";"],["=", "+"],["=", "*"]']))
    assert len(runs) == 3 == len({p.run_dir for _, p in runs})


def test_what_is_touched_is_done_again():
    plan = sweep.plan("params/cpu.yaml", ["annotate.threshold=0.1,1"])
    _, _, runs = sweep.combinations(plan)
    assert all(set(p.base.stages) == {"00_arith_pair", "06_reward_ablation"} for _, p in runs)
    plan = sweep.plan("params/cpu.yaml", ["grpo.beta=0,1", "pair.small.dtype=float32"])
    assert all(p.base is None for _, p in sweep.combinations(plan)[2])


@pytest.mark.parametrize("path", sorted((ROOT / "params" / "ablations").glob("*.yaml")), ids=lambda path: path.stem)
def test_ready_made_sweeps(path):
    plan = sweep.plan(str(path))
    top, bases, runs = sweep.combinations(plan)
    assert plan.about and len(bases) == 5 and len(runs) >= 10
    assert top.run == f"cpu-{path.stem}"


def test_mistakes_are_named_before_any_work():
    with pytest.raises(SrlibError, match="unknown key 'betta'; did you mean 'beta'"):
        sweep.combinations(sweep.plan("params/cpu.yaml", ["grpo.betta=0,1"]))
    with pytest.raises(SrlibError, match="There is no params file params/cpuu.yaml"):
        sweep.combinations(sweep.plan("params/cpuu.yaml", ["grpo.beta=0,1"]))
    with pytest.raises(SrlibError, match="grpo.beta is -1"):
        sweep.combinations(sweep.plan("params/cpu.yaml", ["grpo.beta=0,-1"]))


def test_no_sweep(tmp_path):
    with pytest.raises(SrlibError, match="There is no sweep in"):
        sweep.read(tmp_path)
    (tmp_path / "sweep.json").write_text("{")
    with pytest.raises(SrlibError, match="damaged"):
        sweep.read(tmp_path)


REACHED = {"big": 0.9, "learned": 0.6, "grpo": 0.7}


def of_sweep(folder, seeds, labels=("beta=0", "beta=1"), missing=()):
    """A sweep that has run: graded completions of each seed's own problems, of models that came out unlike."""
    runs = []
    for label in labels:
        for seed in seeds:
            place, rng = folder / f"{label}-{seed}", np.random.default_rng(seed)
            (place / "05_evaluate" / "completions").mkdir(parents=True)
            luck, rows = rng.random(200), []
            for policy, mean in REACHED.items():
                right = luck < mean + 0.03 * (seed - 1) + 0.02 * (policy == "grpo" and label == labels[-1])
                records = [
                    {"id": f"test-{i}#{seed:08x}", "correct": bool(x), "big_tokens": seed + 1, "small_tokens": 9 - seed}
                    for i, x in enumerate(right)
                ]
                write_jsonl(place / "05_evaluate" / "completions" / f"{policy}.jsonl", records)
                row = {"policy": policy, "accuracy": right.mean(), "offload_share": (seed + 1) / 10, "max_tokens": 96}
                rows.append(row)
            write_json(place / "05_evaluate" / "results.json", rows)
            state = "failed" if (label, seed) in missing else "complete"
            runs.append(sweep.Combination(label, {"beta": labels.index(label)}, seed, str(place), state))
    plan = sweep.Plan(params="x.yaml", name="x", vary={"beta": [0, 1]}, seeds=list(seeds))
    sweep._write(folder, plan, runs)
    return folder


def test_seeds_are_clusters(tmp_path):
    """The interval is of the method: as wide as its trainings lie apart, though their problems are many."""
    rows, records = sweep.collect(of_sweep(tmp_path / "three", range(3)))
    row = next(row for row in rows if (row["label"], row["policy"]) == ("beta=0", "grpo"))
    assert (row["n_seeds"], row["n_problems"], row["samples_per_problem"]) == (3, 600, 1)
    reached = [accuracy for accuracy, _ in row["by_seed"]]
    assert row["accuracy"] == pytest.approx(np.mean(reached)) and row["offload_share"] == pytest.approx(0.2)
    low, high = row["ci95"]
    t = scipy.stats.ttest_1samp(reached, 0).confidence_interval()
    assert high - low == pytest.approx(t.high - t.low, rel=0.1)
    (axes,) = figures.front(rows).axes
    assert axes.get_title().startswith("n = 600 problems of 3 seeds (intervals are over these)")
    difference = stats.compare(records["beta=0", "grpo"], records["beta=0", "learned"])
    assert difference.by_seed.keys() == {0, 1, 2} and difference.n_problems == 600
    assert difference.p_value == pytest.approx(scipy.stats.ttest_1samp([*difference.by_seed.values()], 0).pvalue)
    assert not sweep.same_problems(
        sweep.collect(of_sweep(tmp_path / "two", range(3), missing=[("beta=1", 2)]))[1],
        ("beta=0", "grpo"),
        ("beta=1", "grpo"),
    )


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_notebook_shows_each_seed_and_says_what_it_is_about(tmp_path, capsys, seeds):
    shown = []
    scope = {
        "p": SimpleNamespace(run_dir=of_sweep(tmp_path, range(seeds), missing=[("beta=1", 2)])),
        "folder": tmp_path,
    }
    scope |= {"sweep": sweep, "pd": pd, "visible": visible, "table": lambda frame, index: shown.append(frame)}
    scope |= {"last": "grpo", "ours": [{"label": "beta=0"}, {"label": "beta=1"}]}
    run_cells("06_reward_ablation", scope, "sweep.collect(", "sweep.same_problems(")
    printed = capsys.readouterr().out
    assert ("about these trained models only" in printed) == (seeds == 1)
    assert ("3 training seeds" in printed) == (seeds == 3)
    paired = shown[1].set_index("comparison")
    assert "beta=0 · grpo − beta=0 · learned" in paired.index and "p (Holm)" in paired
    if seeds == 1:
        assert "by seed" not in paired and "beta=1 · grpo − beta=0 · grpo" in paired.index
    else:
        assert paired["by seed"]["beta=0 · grpo − beta=0 · learned"].startswith("0: ")
        assert "beta=1 · grpo − beta=0 · grpo: left out" in printed


@pytest.mark.notebooks
def test_one_failure_among_others(copy):
    """On a base that is there: a combination that fails is named, the others end, and the next sweep does only that one."""
    command = [sys.executable, "-m", "srlib", "sweep", "params/smoke.yaml", "--jobs", "2", "--name", "three"]
    command += ["--set", f"outputs={copy}", "--set", "grpo.beta=0,0.1", "--set", "grpo.max_steps=1"]

    def go():
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)

    base = (copy / "smoke" / "manifest.json").read_text()
    folder = copy / "smoke-three"
    # what stage 03 wants to write there cannot be written: this one run fails
    blocked = folder / "beta-0.1-seed0" / "03_grpo" / "adapter"
    blocked.parent.mkdir(parents=True)
    (blocked.parent.parent / "manifest.json").write_text("{")
    done = go()
    assert done.returncode == 1
    assert "beta=0, seed 0: complete" in done.stdout and "beta=0.1, seed 0: failed" in done.stdout
    assert "1 of 2 failed: beta=0.1, seed 0" in done.stderr
    assert {c.label: c.state for c in sweep.read(folder)[1]} == {"beta=0": "complete", "beta=0.1": "failed"}
    assert (folder / "06_reward_ablation" / "front.png").is_file()  # of what is there

    (blocked.parent.parent / "manifest.json").unlink()
    kept = (folder / "beta-0-seed0" / "03_grpo" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    done = go()
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "beta-0-seed0" / "03_grpo" / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == kept
    assert "03_grpo          unchanged" in (folder / "beta-0-seed0" / "log.txt").read_text()
    rows = json.loads((folder / "06_reward_ablation" / "table.json").read_text())
    assert {(row["label"], row["policy"]) for row in rows} == {
        (label, policy) for label in ("beta=0", "beta=0.1") for policy in sweep.MEASURED
    }
    assert {r["n_problems"] for r in rows} == {load("params/smoke.yaml").evaluate.n_problems}
    assert (copy / "smoke" / "manifest.json").read_text() == base  # nothing of it was done again
    log = (folder / "base-seed0" / "log.txt").read_text()
    assert log.count("unchanged, skipped") == 3 and "02_sft" in log and "03_grpo" not in log  # it is asked for no more


def test_nobody_else_writes_a_sweep_or_what_it_builds_on(tmp_path, monkeypatch):
    """While its combinations run, another run of the base and another sweep are told; afterwards both are free."""
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    chosen = sweep.plan("params/smoke.yaml", [f"outputs={tmp_path}", "grpo.beta=0,0.1"], name="two")
    base, told = tmp_path / "smoke", []

    def runs(p, folder, *options):
        if folder.name == "base-seed0":
            (base / "02_sft").mkdir(parents=True)
            return ""
        for place in (base, base / "02_sft", tmp_path / "smoke-two"):
            with pytest.raises(SrlibError) as refused:
                locks._hold(place, "write")
            told.append(str(refused.value))
        return "failed: x"

    monkeypatch.setattr(sweep, "_run", runs)
    assert sweep.run(chosen) == 1
    assert len(told) == 6 and "smoke-two is in use by process" in told[2] and "srlib sweep, since" in told[2]
    assert "in use by a run that builds on it" in told[0]
    for place in (base, base / "02_sft", tmp_path / "smoke-two"):
        locks._hold(place, "write").release()


@pytest.mark.parametrize(
    ("text", "sets", "said"),
    [
        ("vary: {a: [1", [], "is not valid YAML"),
        ("params: params/smoke.yaml\nvary: {grpo.beta: []}", [], "vary.grpo.beta is an empty list"),
        ("params: params/smoke.yaml\nvary: {}", ["grpo.beta="], "names no value"),
        ("vary: {grpo.beta: [0, 1]}", [], "params is missing"),
        ("params: [a]\nvary: {}", [], r"params is \['a'\], which is no text"),
        ("params: params/smoke.yaml\nvary: [grpo.beta]", ["grpo.beta=0,1"], "vary is .*valid dictionary"),
        ("params: params/smoke.yaml\nvary:", ["grpo.beta=0,1"], "vary is None: input should be a valid dictionary"),
        ("params: params/smoke.yaml\nvary: {grpo.beta: 1}", [], "vary.grpo.beta is 1: input should be a valid list"),
        ("params: params/smoke.yaml\nvary: {}\nfix: [1]", ["a=1"], "fix is .*valid dictionary"),
        ("params: params/smoke.yaml\nvary: {}\nseeds: 3", [], "seeds is 3: input should be a valid list"),
        ("params: params/smoke.yaml\nvary: {}\nseeds: [0, x]", [], "seeds.1 is 'x': input should be a valid integer"),
        ("params: params/smoke.yaml\nvary: {}\nseeds: []", [], "seeds is an empty list"),
        ("params: params/smoke.yaml\nvary: {}\nseeds: [1, 0, 0]", [], "seeds holds 0 twice"),
        ("params: params/smoke.yaml\nvary: {grpo.beta: [0, 0.0]}", [], "vary.grpo.beta holds 0.0 twice"),
        ("params: params/smoke.yaml\nvary: {seed: [1, 2]}", [], "seed cannot be set here"),
        ("params: params/smoke.yaml\nvary: {}", ["run=a,b"], "run cannot be set here"),
        ("params: params/smoke.yaml\nvary: {}\nvary: {}", [], "vary stands twice, in lines 2 and 3"),
        ("params: params/smoke.yaml\nvari: {}", [], None),
    ],
)
def test_a_sweep_that_cannot_be_read_is_one_sentence(tmp_path, text, sets, said):
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(SrlibError, match=said or "unknown key 'params'"):
        sweep.combinations(sweep.plan(str(file), sets))
