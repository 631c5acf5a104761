"""The notebooks end to end, as users run them: the command line, papermill, JupyterLab's run-all."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from urllib.parse import quote

import nbformat
import pytest
import yaml
from nbclient import NotebookClient

from srlib.params import ROOT
from srlib.run.stages import STAGES
from tests.conftest import command_line as srlib
from tests.judge_server import JudgeServer, hard_steps

pytestmark = pytest.mark.notebooks
OF_A_RUN = [name for name in STAGES if name != "06_reward_ablation"]  # that one belongs to a sweep


def refuses(outputs, *arguments):
    """The run must stop before any stage, with one sentence; returns it."""
    before = (outputs / "smoke" / "manifest.json").read_text()
    done = srlib("run", "params/smoke.yaml", "--set", f"outputs={outputs}", *arguments)
    assert done.returncode == 2
    assert (outputs / "smoke" / "manifest.json").read_text() == before
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) == 1
    return done.stderr.strip()


def test_everything_is_there(finished):
    outputs, printed = finished
    run = outputs / "smoke"
    for stage in OF_A_RUN:
        assert f"{stage:<16} done in" in printed
        assert (run / stage / f"{stage}.ipynb").is_file()
    rows = json.loads((run / "05_evaluate" / "results.json").read_text())
    wanted = """policy dataset n_problems samples_per_problem max_tokens accuracy ci95 offload_share handovers
    truncated_share wall_s tokens_per_s small_forward_tokens big_forward_tokens least_forward_tokens""".split()
    assert all(set(wanted) <= set(row) for row in rows)
    names = [row["policy"] for row in rows]
    assert names[:6] == ["small", "big", "learned", "learned_off", "rejection_0.50", "grpo"]
    assert names[6:8] == ["random_0.20", "random_0.50"]
    asks = 0 < next(row["offload_share"] for row in rows if row["policy"] == "learned") < 1
    untrained = [*(["random_matched"] if asks else []), "speculative"]
    assert names[8:] == [*untrained, *(["entropy", "margin", "confidence"] if asks else [])]
    by_name = {row["policy"]: row for row in rows}
    assert by_name["speculative"]["accuracy"] == by_name["big"]["accuracy"]
    assert (run / "05_evaluate" / "accuracy_by_share.png").stat().st_size > 10_000
    assert "05_evaluate/accuracy_by_share.png" in printed.splitlines()[-1]
    manifest = json.loads((run / "manifest.json").read_text())
    for stage in OF_A_RUN:
        record = manifest["stages"][stage]
        assert record["state"] == "complete" and record["seconds"] > 0 and record["versions"]["torch"]
    for file in run.rglob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert lines or file.name == "requests.jsonl"  # a policy that was hardly trained may not ask at all


def test_every_sentence_about_a_result_has_its_verdict(finished):
    """Each cell that holds sentences against the run printed whether they hold; no case failed without a word."""
    for stage in OF_A_RUN:
        notebook = nbformat.read(finished[0] / "smoke" / stage / f"{stage}.ipynb", 4)
        for cell in (c for c in notebook.cells if c.cell_type == "code"):
            told = "".join(o.get("text", "") for o in cell.outputs).splitlines()
            verdicts = [line for line in told if re.match("(holds|does not hold|cannot be told) here: .", line)]
            asked = re.findall(r"\b(?:claims|timing)\.(?:of_\w+|claim)\(", cell.source)
            assert len(verdicts) >= len(asked) - cell.source.count("timing.of_seconds("), (stage, cell.source)
            # models that were hardly trained show nothing, and it says so
            if "claims.case(" in cell.source and stage == "04_offload":
                assert [line for line in told if line.startswith("no case here: none of 12 shows")] == told[:1]


def test_a_second_run_does_nothing(copy):
    def files():
        return {f: f.stat().st_mtime_ns for f in copy.rglob("*") if f.is_file() and f.name != ".lock"}

    before = files()
    done = srlib("run", "params/smoke.yaml", "--set", f"outputs={copy}")
    assert done.returncode == 0
    assert all(f"{stage:<16} unchanged, skipped" in done.stdout for stage in OF_A_RUN)
    assert files() == before


def test_only_what_changed_runs_again(copy):
    settings = ("--set", f"outputs={copy}", "--set", "evaluate.random_shares=[0.4]")
    done = srlib("run", "params/smoke.yaml", *settings, "--until", "05_evaluate")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("skipped") == len(OF_A_RUN) - 2 and "05_evaluate      done in" in done.stdout
    assert "05_evaluate      runs: evaluate.random_shares changed ([0.2, 0.5] → [0.4])\n" in done.stdout
    after = srlib("run", "params/smoke.yaml", *settings, "--dry-run").stdout
    assert after.count("unchanged") == len(OF_A_RUN) - 1
    assert "07_latency       would run: results.json changed; completions changed\n" in after  # it reads 05's rows
    assert "random_0.40" in done.stdout and "random_0.50" not in done.stdout


def test_another_threshold_reads_no_trace_again(copy):
    folder = copy / "smoke" / "01_annotate"
    read = {file: file.read_bytes() for file in folder.glob("*.journal.jsonl")}
    assert len(read) == 3  # of `gap` by either model, and of `entropy`
    settings = ("--set", f"outputs={copy}", "--set", "annotate.threshold=0.5", "--until", "01_annotate")
    done = srlib("run", "params/smoke.yaml", *settings)
    assert done.returncode == 0, done.stderr
    assert "01_annotate      runs: annotate.threshold changed (0.05 → 0.5)\n" in done.stdout
    assert {file: file.read_bytes() for file in folder.glob("*.journal.jsonl")} == read


def test_a_failing_cell_ends_the_run(copy):
    broken = ("run", "params/smoke.yaml", "--set", f"outputs={copy}", "--set", "sft.n_watch=999")
    done = srlib(*broken)
    assert done.returncode == 1
    assert "02_sft           failed" in done.stdout and "05_evaluate" not in done.stdout.partition("failed")[2]
    assert "02_sft: SrlibError: " in done.stderr and "holds 24 problems, fewer than the 999 asked for" in done.stderr
    assert "smoke/02_sft/02_sft.ipynb" in done.stderr
    assert json.loads((copy / "smoke" / "manifest.json").read_text())["stages"]["02_sft"]["state"] == "failed"


def test_a_killed_run_goes_on(copy):
    command = [
        sys.executable,
        "-m",
        "srlib",
        "run",
        "params/smoke.yaml",
        "--set",
        f"outputs={copy}",
        "--from",
        "02_sft",
    ]
    manifest = copy / "smoke" / "manifest.json"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while json.loads(manifest.read_text())["stages"]["02_sft"]["state"] != "running" and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert json.loads(manifest.read_text())["stages"]["02_sft"]["state"] == "running"
    done = srlib("run", "params/smoke.yaml", "--set", f"outputs={copy}", "--until", "03_grpo")
    assert done.returncode == 0, done.stderr
    assert "02_sft           done in" in done.stdout and "01_annotate      unchanged" in done.stdout
    assert "02_sft           runs: was killed\n" in done.stdout
    assert {r["state"] for r in json.loads(manifest.read_text())["stages"].values()} == {"complete"}
    assert "03_grpo          done in" in done.stdout  # it reads what 02 wrote


def test_an_interrupted_run_is_stopped_and_goes_on(tmp_path):
    """SIGINT, as Ctrl-C sends it, in a cell of a stage: one model is trained, the other is not."""
    settings = ["params/smoke.yaml", "--set", f"outputs={tmp_path}", "--until", "00_arith_pair"]
    settings += ["--set", "arith.big.train_steps=120"]
    run = tmp_path / "smoke"
    executed, manifest = run / "00_arith_pair" / "00_arith_pair.ipynb", run / "manifest.json"

    process = subprocess.Popen(
        [sys.executable, "-m", "srlib", "run", *settings],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell has what it starts in the background ignore SIGINT, and so all that that starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 600
    while not (executed.parent / "small.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) != 0
    assert json.loads(manifest.read_text())["stages"]["00_arith_pair"]["state"] == "stopped"
    outputs = [cell.outputs for cell in nbformat.read(executed, 4).cells if cell.cell_type == "code"]
    assert any(outputs) and not outputs[-1]  # it is there, as far as it came
    done = srlib("run", *settings)
    assert done.returncode == 0, done.stderr
    assert "00_arith_pair    runs: was stopped\n" in done.stdout and "00_arith_pair    done in" in done.stdout
    assert json.loads(manifest.read_text())["stages"]["00_arith_pair"]["state"] == "complete"


def test_a_killed_reinforcement_goes_on(copy):
    """SIGKILL between two checkpoints of stage 03: the next run takes the last whole one up, and ends complete."""
    settings = ["params/smoke.yaml", "--set", f"outputs={copy}", "--set", "grpo.max_steps=40"]
    run = copy / "smoke"
    process = subprocess.Popen(
        [sys.executable, "-m", "srlib", "run", *settings, "--from", "03_grpo"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    trainer = run / "03_grpo" / "trainer"
    while not list(trainer.glob("checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)  # the notebook's kernel too
    process.wait()
    assert list(trainer.glob("checkpoint-*")), "it was over before it could be killed"
    (trainer / "checkpoint-39").mkdir(exist_ok=True)  # as if it had been killed while it wrote that one
    assert not (run / "03_grpo" / "adapter").exists()
    done = srlib("run", *settings, "--until", "03_grpo")
    assert done.returncode == 0, done.stderr
    assert "02_sft           unchanged" in done.stdout and "03_grpo          done in" in done.stdout
    log = json.loads((run / "03_grpo" / "log.json").read_text())
    assert [record["step"] for record in log] == list(range(1, 41))
    samples = [json.loads(line)["step"] for line in (run / "03_grpo" / "samples.jsonl").open()]
    assert samples == sorted(samples) and len(set(samples)) * 4 == len(samples)  # none twice
    assert not trainer.exists()


def test_bad_parameters(finished):
    assert "unknown key 'epoch'; did you mean 'epochs'?" in refuses(finished[0], "--set", "sft.epoch=1")
    assert "There is no stage '02_stf'; did you mean '02_sft'?" in refuses(finished[0], "--from", "02_stf")


def test_a_missing_adapter(copy):
    shutil.rmtree(copy / "smoke" / "02_sft" / "adapter")
    message = refuses(copy)
    assert "03_grpo: There is no adapter in" in message and "--only 02_sft" in message


def test_what_no_policy_writes_with_is_not_needed(copy):
    """Stage 05 of two plain models, before anything was trained."""
    shutil.rmtree(copy / "smoke" / "02_sft")
    shutil.rmtree(copy / "smoke" / "03_grpo")
    settings = ("--set", f"outputs={copy}", "--set", "evaluate.policies=[small,big,random]", "--only", "05_evaluate")
    done = srlib("run", "params/smoke.yaml", *settings)
    assert done.returncode == 0, done.stderr
    rows = json.loads((copy / "smoke" / "05_evaluate" / "results.json").read_text())
    assert [row["policy"] for row in rows] == ["small", "big", "random_0.20", "random_0.50"]


def test_a_truncated_model(copy):
    weights = copy / "smoke" / "00_arith_pair" / "big" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    message = refuses(copy)
    assert "big/model.safetensors is damaged" in message and "--only 00_arith_pair" in message


def test_a_broken_line(copy):
    path = copy / "smoke" / "00_arith_pair" / "traces.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:6], lines[6][:-9], *lines[7:]]))
    assert "traces.jsonl, line 7 is not a Problem: Invalid JSON" in refuses(copy)


def test_an_empty_problem_set(copy):
    (copy / "smoke" / "00_arith_pair" / "test.jsonl").write_text("")
    assert "test.jsonl is empty" in refuses(copy)


def test_an_annotation_of_ones_own_is_used(copy):
    """Another annotator takes the place of 01: 02 runs on what it wrote."""
    rows = (copy / "smoke" / "01_annotate" / "annotated.jsonl").read_text().splitlines()
    (copy / "mine.jsonl").write_text("\n".join(rows[:20]) + "\n")
    own = ("--set", f"sft.annotated={copy / 'mine.jsonl'}")
    done = srlib("run", "params/smoke.yaml", "--set", f"outputs={copy}", *own, "--until", "02_sft")
    assert done.returncode == 0, done.stderr
    assert "02_sft           done in" in done.stdout and "01_annotate" not in done.stdout


def test_papermill_alone(copy, tmp_path):
    values = yaml.safe_load((ROOT / "params/smoke.yaml").read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**values, "outputs": str(copy)}))
    shutil.rmtree(copy / "smoke" / "02_sft")
    command = [
        sys.executable,
        "-m",
        "papermill",
        "notebooks/02_sft.ipynb",
        tmp_path / "out.ipynb",
        "-f",
        tmp_path / "mine.yaml",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (copy / "smoke" / "02_sft" / "adapter" / "adapter_model.safetensors").is_file()
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**values, "sftt": {"epochs": 1}}))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0 and "unknown key 'sftt'; did you mean 'sft'?" in done.stderr


@pytest.mark.parametrize("stage", ["02_sft", "04_offload"])
def test_by_hand(copy, stage):
    """Every cell in order, from the notebooks folder, with the scale named in the first cell."""
    notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", 4)
    cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
    cell.source = cell.source.replace("params/cpu.yaml", "params/smoke.yaml").replace(
        "changes = {}", f'changes = {{"outputs": {os.fspath(copy)!r}}}'
    )
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    images = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    html = [o for c in notebook.cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})]
    assert images if stage == "02_sft" else html


def test_a_judge_that_repeats_its_key(copy, monkeypatch):
    """The run fails in one sentence, and the key is on no screen and in no file, however it was quoted."""
    key = 'k-7f"3a/b\\c&%e+0d1'
    monkeypatch.setenv("TEST_KEY", key)
    judge = JudgeServer(hard_steps)
    echo = {"error": {"message": f"wrong key: {key} {json.dumps(key)} {quote(key, safe='')}"}}
    judge.fault = lambda trace, n: (401, echo) if judge.good.total() >= 20 else None
    folder = copy / "smoke" / "01_annotate"
    with judge.serve() as url:
        asked = ("method=judge", "compare=[]", f"judge.base_url={url}", "judge.model=m", "judge.key=TEST_KEY")
        settings = [word for each in asked for word in ("--set", f"annotate.{each}")]
        done = srlib("run", "params/smoke.yaml", *settings, "--set", f"outputs={copy}", "--only", "01_annotate")
    sentence = "does not take the key in TEST_KEY: status 401, wrong key: [key]"
    assert done.returncode == 1 and not (folder / "annotated.jsonl").exists()
    assert sentence in done.stderr and sentence in (folder / "01_annotate.ipynb").read_text()
    (journal,) = folder.glob("judge-*.journal.jsonl")
    assert len(journal.read_text().splitlines()) == judge.good.total() >= 20
    files = [file.read_bytes() for file in copy.rglob("*") if file.is_file()]
    for form in {key, json.dumps(key)[1:-1], json.dumps(json.dumps(key)[1:-1])[1:-1], quote(key, safe="")}:
        assert form not in done.stdout + done.stderr and not any(form.encode() in data for data in files)
