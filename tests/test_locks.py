"""One writer to a run's folder: who is let in, who is told what, and when it is free again."""

import json
import os
import signal
import subprocess
import sys
from contextlib import nullcontext

import pytest

from srlib import SrlibError
from srlib.params import load
from srlib.run import bench, locks, pipeline, stages

OTHER = """
import os
import sys
import time
from pathlib import Path
from srlib.run import locks
folder = Path(sys.argv[2])
if sys.argv[1] == "run":
    held = locks.writing(folder, "srlib run")
    held.__enter__()
    if os.fork() == 0:  # lives on when this process is killed, with all that is inherited
        print("held", os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
elif sys.argv[1] == "reader":
    held = locks.reading(folder, ["02_sft"])
    held.__enter__()
else:
    locks.begin(folder, "02_sft")
if sys.argv[1] != "run":
    print("held", os.getpid(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Starts another process that holds the folder in some way."""
    begun, last = [], []

    def start(how):
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, how, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        begun.append(process)
        said, number = process.stdout.readline().split()
        assert said == "held"
        last.append(int(number))
        return process

    yield start
    for process, number in zip(begun, last):
        process.kill()
        process.wait()
        if number != process.pid:
            os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ("run", "run", r"is in use by process \d+ \(srlib run, since \d\d:\d\d\)"),
        ("run", "notebook", r"is in use by process \d+ \(srlib run, since"),
        ("run", "reader", r"is in use by process \d+"),
        ("notebook", "run", r"is in use by process \d+ \(the kernel of notebook 02_sft, since \d\d:\d\d\): .* end it"),
        ("notebook", "notebook", r"02_sft is in use by process \d+ \(the kernel of notebook 02_sft, since"),
        ("reader", "run", "is in use by a run that builds on it"),
        ("notebook", "another", None),
        ("reader", "reader", None),
        ("reader", "notebook", "02_sft is in use by a run that builds on it"),
    ],
)
def test_one_writer(first, second, said, other, tmp_path, monkeypatch):
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    monkeypatch.setattr(locks, "_by_hand", {})

    def try_it():
        if second == "run":
            with locks.writing(tmp_path, "srlib run"):
                pass
        elif second == "reader":
            with locks.reading(tmp_path):
                pass
        else:
            locks.begin(tmp_path, "02_sft" if second == "notebook" else "03_grpo")

    (tmp_path / "02_sft").mkdir()
    process = other(first)
    with pytest.raises(SrlibError, match=said) if said else nullcontext():
        try_it()
    process.kill()  # whatever it held is free, and what it has left does not stand in the way
    process.wait()
    try_it()


def test_the_notebooks_of_a_run_are_let_in(tmp_path, monkeypatch):
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    with locks.writing(tmp_path, "srlib run"):
        assert not locks.begin(tmp_path, "02_sft")
        assert json.loads((tmp_path / locks.HOLDER).read_text())["pid"] == os.getpid()
    assert locks.OF_A_RUN not in os.environ and not (tmp_path / locks.HOLDER).exists()


def test_a_process_is_let_in_again_and_its_own_folders_are_free_at_the_end(tmp_path, monkeypatch):
    """As a sweep, which runs its notebook in the folder it holds."""
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    for _ in range(2):
        with locks.writing(tmp_path, "srlib sweep"):
            with locks.writing(tmp_path, "srlib run"):
                pass
            assert not locks.begin(tmp_path, "06_reward_ablation")
            with pytest.raises(SrlibError, match="srlib sweep, since"), locks.reading(tmp_path):
                pass


def test_what_holds_a_folder_is_taken_and_given_back(tmp_path, monkeypatch):
    """By a run, its base, and the bench; by a dry run nothing."""
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    base = {"folder": str(tmp_path / "base"), "stages": ["00_arith_pair"]}
    (tmp_path / "base" / "00_arith_pair").mkdir(parents=True)
    p = load("params/smoke.yaml", outputs=str(tmp_path), base=base)
    held = []

    def hold(folder, mode):
        held.append((str(folder.relative_to(tmp_path)), mode))
        return take(folder, mode)

    take = locks._hold
    monkeypatch.setattr(locks, "_hold", hold)
    monkeypatch.setattr(pipeline, "_run", lambda *_: 0)
    assert pipeline.run(p, dry=True) == 0 and not held
    assert pipeline.run(p) == 0
    assert held == [("smoke", "write"), ("base", "read"), ("base/00_arith_pair", "read")]
    held.clear()
    monkeypatch.setattr(bench, "run", lambda p: {"rows": []})
    monkeypatch.setattr(bench, "table", str)
    monkeypatch.setattr(stages, "require_artefact", lambda *_: None)
    assert bench.main(p) == 0
    assert held == [("smoke", "read")]


def test_a_notebook_keeps_others_from_what_it_builds_on(other, tmp_path, monkeypatch):
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    monkeypatch.setattr(locks, "_by_hand", {})
    (tmp_path / "02_sft").mkdir()
    process = other("run")
    with pytest.raises(SrlibError, match="srlib run, since"):
        locks.begin(tmp_path / "mine", "03_grpo", tmp_path, ["02_sft"])
    process.kill()
    process.wait()
    assert locks.begin(tmp_path / "mine", "03_grpo", tmp_path, ["02_sft"])
    for place in (tmp_path, tmp_path / "02_sft"):
        with pytest.raises(SrlibError, match="is in use by"):
            locks._hold(place, "write")
    locks._hold(tmp_path / "01_annotate", "write").release()  # it does not build on that


def test_a_folder_that_cannot_be_locked_is_told(tmp_path):
    (tmp_path / "run").write_text("no folder")
    with pytest.raises(SrlibError, match=r"run cannot be written or locked \(File exists\)"):
        with locks.writing(tmp_path / "run", "srlib run"):
            pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / locks.LOCK).write_text("no database " * 100)
    with pytest.raises(SrlibError, match="other cannot be written or locked"):
        with locks.writing(tmp_path / "other", "srlib run"):
            pass
