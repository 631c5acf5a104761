"""One writer to a run's folder, and files that are not as they were left."""

import json
import os
import random
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from srlib import SrlibError
from srlib.params import load
from srlib.run import locks, pipeline
from srlib.run.manifest import Manifest
from srlib.run.stages import STAGES

OTHER = """
import sys
from pathlib import Path
from srlib.run import locks
folder = Path(sys.argv[2])
if sys.argv[1] == "run":
    held = locks.writing(folder, "srlib run")
    held.__enter__()
elif sys.argv[1] == "reader":
    held = locks.reading(folder)
    held.__enter__()
else:
    locks.begin(folder, "02_sft")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """Starts another process that holds the folder in some way."""
    begun = []

    def start(how):
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER, how, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        begun.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in begun:
        process.kill()
        process.wait()


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

    process = other(first)
    with pytest.raises(SrlibError, match=said) if said else nullcontext():
        try_it()
    process.kill()  # whatever it held is free
    process.wait()
    try_it()


def test_the_notebooks_of_a_run_are_let_in(tmp_path, monkeypatch):
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    with locks.writing(tmp_path, "srlib run"):
        assert not locks.begin(tmp_path, "02_sft")
        assert json.loads((tmp_path / locks.HOLDER).read_text())["pid"] == os.getpid()
    assert locks.OF_A_RUN not in os.environ and not (tmp_path / locks.HOLDER).exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "7", '{"stages": []}', '{"stages": {"02_sft": 3}}', '{"stages": {"02_sft": {}}}', "\udcff"]
    + ['{"stages": {"02_sft": {"state": "odd", "parameters": {}, "notebook": "", "inputs": {}}}}'],
)
def test_a_manifest_of_another_shape(tmp_path, text):
    p = load("params/smoke.yaml", outputs=str(tmp_path))
    p.run_dir.mkdir()
    (p.run_dir / "manifest.json").write_text(text, errors="surrogateescape")
    with pytest.raises(SrlibError, match=r"manifest\.json is damaged .*: remove it, and every stage is done again"):
        Manifest(p)


def _damaged(file, how, rng):
    content = file.read_bytes()
    match how:
        case "cut":
            file.write_bytes(content[: rng.randrange(max(1, len(content)))])
        case "flipped":
            at = rng.randrange(len(content))
            file.write_bytes(content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :])
        case "emptied":
            file.write_bytes(b"")
        case "other":
            file.write_bytes(rng.choice([b"[]", b"null", b"{}\n", b'"x"']))
        case "no text":
            file.write_bytes(b"\xff\xfe" + content)
        case "gone":
            file.unlink()


@pytest.mark.notebooks
def test_damage_is_seen_however_a_stage_is_started(finished, tmp_path, monkeypatch):
    """Every file that stages read, damaged in six ways: a sentence, or its maker runs again; 200 at least."""
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    shutil.copytree(finished[0], tmp_path / "outputs")
    manifest = tmp_path / "outputs" / "smoke" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(str(finished[0]), str(tmp_path / "outputs")))
    p = load("params/smoke.yaml", outputs=str(tmp_path / "outputs"))
    readers = {"00_arith_pair": "02_sft", "01_annotate": "02_sft", "02_sft": "04_offload", "03_grpo": "05_evaluate"}
    rng, tried, made_again = random.Random(0), 0, 0
    ran = []
    monkeypatch.setattr(pipeline, "run_stage", lambda p, name, manifest: ran.append(name) or True)
    monkeypatch.setattr(pipeline, "_last_screen", lambda p: None)
    for maker, reader in readers.items():
        outputs = json.loads(manifest.read_text())["stages"][maker]["outputs"]
        read = [Path(x) for x in outputs if "journal" not in x and Path(x).parts[0] in READ[maker]]
        for file in (p.run_dir / maker / name for name in read):
            kept = file.read_bytes()
            for how in ("cut", "flipped", "emptied", "other", "no text", "gone"):
                for start in ({}, {"first": reader}, {"only": reader}, None):
                    _damaged(file, how, rng)
                    ran.clear()
                    tried += 1
                    if start is None:
                        with pytest.raises(SrlibError):
                            pipeline.require(p, reader)
                            Manifest(p).check_inputs(reader)
                    elif start:
                        with pytest.raises(SrlibError):
                            pipeline.run(p, **start)
                        assert not ran
                    else:
                        try:
                            pipeline.run(p)
                        except SrlibError:
                            assert not ran
                        else:
                            assert maker in ran
                            made_again += 1
                    file.write_bytes(kept)
    assert tried >= 200 and made_again > 0
    pipeline.run(p)
    assert ran[-1:] != ["02_sft"]  # all is as it was


READ = {
    "00_arith_pair": {"small", "big"},
    "01_annotate": {"annotated.jsonl"},
    "02_sft": {"adapter"},
    "03_grpo": {"adapter"},
}


def test_stages_that_are_read_are_tried():
    assert set(READ) < set(STAGES)


@pytest.fixture
def full(monkeypatch):
    """A disk on which not a byte can be written."""

    def write(*args, **kwargs):
        raise OSError(28, "No space left on device")

    return lambda target, name: monkeypatch.setattr(target, name, write)


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, full):
    from srlib.data import rows

    (tmp_path / "x.json").write_text("[1]")
    full(os, "replace")
    for write in (lambda: rows.write_json(tmp_path / "x.json", [2]), lambda: rows.write_jsonl(tmp_path / "x.json", [])):
        with pytest.raises(SrlibError, match=r"x\.json cannot be written \(No space left on device\): mend that"):
            write()
        assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "[1]"


def test_a_second_error_does_not_hide_the_first(tmp_path, monkeypatch, full):
    """A stage fails, and the manifest cannot be written either: the run tells of the stage."""
    import papermill

    p = load("params/smoke.yaml", outputs=str(tmp_path))

    def fails(*args, **kwargs):
        full(os, "replace")
        raise papermill.PapermillExecutionError(0, 1, "", "ValueError", "of the stage", [])

    monkeypatch.setattr(papermill, "execute_notebook", fails)
    made = Manifest(p)
    assert not pipeline.run_stage(p, "00_arith_pair", made)
    monkeypatch.undo()

    def unwritable(*args, **kwargs):
        raise OSError(28, "No space left on device", "x.ipynb")

    monkeypatch.setattr(papermill, "execute_notebook", unwritable)
    with pytest.raises(SrlibError, match=r"ipynb cannot be written \(No space left on device\)"):
        pipeline.run_stage(p, "00_arith_pair", Manifest(p))
    assert Manifest(p).stages["00_arith_pair"]["state"] == "stopped"
