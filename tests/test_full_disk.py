"""A disk that is full, or may not be written: one sentence, a true state, nothing half there, and on it goes."""

import copy
import json
import os
import resource
from contextlib import contextmanager
from types import SimpleNamespace

import papermill
import pytest
from nbclient.exceptions import DeadKernelError

from srlib import SrlibError, __main__
from srlib.data import rows
from srlib.data.journal import Journal
from srlib.data.modules import Code
from srlib.engine.adapters import write_adapter
from srlib.params import load
from srlib.run import locks, pipeline, sweep
from srlib.run.manifest import Manifest
from srlib.training.rollouts import Rollouts
from srlib.training.trainer import step_of, taken_up

FULL = OSError(28, "No space left on device")


@contextmanager
def room(size):
    """No file may grow beyond `size` bytes: the system's own error in whatever writes, Python or not."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("before", [None, "[1]"])
@pytest.mark.parametrize("write", [rows.write_json, rows.write_jsonl])
def test_what_is_written_whole_is_there_whole_or_not_at_all(tmp_path, write, before):
    file = tmp_path / "x.json"
    if before:
        file.write_text(before)
    with room(1000), pytest.raises(SrlibError, match=r"x\.json cannot be written \(File too large\): mend that"):
        write(file, [{"a": 1}] * 5000)
    assert [each.read_text() for each in tmp_path.iterdir()] == [before] * (before is not None)


def test_an_interrupt_leaves_no_part(tmp_path):
    with pytest.raises(KeyboardInterrupt), rows.whole(tmp_path / "x") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("size", [0, 10, 150, 199])
def test_a_journal_ends_with_a_whole_record_and_goes_on(tmp_path, size):
    path = tmp_path / "x.journal.jsonl"
    records = [{"key": str(i), "text": "t" * 50} for i in range(4)]
    with Journal(path) as journal:
        with room(size), pytest.raises(SrlibError, match=r"cannot be written \(File too large\): its \d records are"):
            for record in records:
                journal.append(record)
    with Journal(path) as journal:
        there = len(journal.records)
        journal.append(*records[there:])
    with Journal(tmp_path / "other.journal.jsonl") as other:
        other.append(*records)
    assert path.read_bytes() == other.path.read_bytes()


def test_an_adapter(tmp_path, tokenizer, pair):
    from peft import LoraConfig, get_peft_model

    small = get_peft_model(copy.deepcopy(pair[0]), LoraConfig(r=4, target_modules="all-linear"))
    trainer = SimpleNamespace(model=small, processing_class=tokenizer)
    with room(1000), pytest.raises(SrlibError, match="adapter cannot be written .*File too large"):
        write_adapter(trainer, tmp_path / "adapter")


@pytest.mark.parametrize("kept", ["", "{", "[]"])
def test_a_checkpoint_that_was_not_finished_is_not_taken_up(tmp_path, kept):
    for step, text in ((1, "{}"), (2, kept)):
        (tmp_path / "trainer" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "trainer" / f"checkpoint-{step}" / "trainer_state.json").write_text(text)
    samples = tmp_path / "samples.jsonl"
    lines = [json.dumps({"step": step, "text": "é"}) + "\n" for step in range(3)]
    samples.write_text("".join(lines) + lines[0][:9])  # torn
    alone = SimpleNamespace(wait_for_everyone=lambda: None, is_main_process=True)
    checkpoint = taken_up(SimpleNamespace(accelerator=alone, args=SimpleNamespace(output_dir=tmp_path / "trainer")))
    assert checkpoint == tmp_path / "trainer" / "checkpoint-1"
    Rollouts.forget_from(SimpleNamespace(samples=samples), step_of(checkpoint))
    assert samples.read_text() == lines[0]
    assert not (tmp_path / "trainer" / "checkpoint-2").exists()


@pytest.fixture
def p(tmp_path, monkeypatch):
    monkeypatch.delenv(locks.OF_A_RUN, raising=False)
    return load("params/smoke.yaml", outputs=str(tmp_path))


def unwritable(*_, **__):
    raise FULL


@pytest.mark.parametrize("ended", ["in a cell", "papermill", "interrupt", "at the end", "kernel"])
@pytest.mark.parametrize("full", [False, True])
def test_the_state_is_true_and_the_first_error_is_told(p, monkeypatch, capsys, ended, full):
    """However a stage ends, with room for the manifest or without."""

    def execute(*args, **kwargs):
        if full:
            monkeypatch.setattr(rows.os, "replace", unwritable)
        match ended:
            case "in a cell":
                raise papermill.PapermillExecutionError(0, 1, "", "ValueError", "of the stage\nmore", [])
            case "papermill":
                raise OSError(28, "No space left on device", "x.ipynb")
            case "interrupt":
                raise KeyboardInterrupt
            case "kernel":
                raise DeadKernelError("Kernel died")

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    wanted = {"in a cell": "failed", "kernel": "failed", "at the end": "complete"}.get(ended, "stopped")
    try:
        told = pipeline.run_stage(p, "00_arith_pair", Manifest(p))
        assert told is (ended == "at the end")
    except SrlibError as error:
        file = "manifest.json" if ended == "at the end" else "00_arith_pair.ipynb"
        assert f"{file} cannot be written (No space left on device)" in str(error)
    except KeyboardInterrupt:
        assert ended == "interrupt"
    monkeypatch.undo()
    said = capsys.readouterr().err.splitlines()
    if ended in ("in a cell", "kernel"):
        cause = {"in a cell": "ValueError: of the stage", "kernel": "its kernel ended: Kernel died"}[ended]
        assert said[0] == f"00_arith_pair: {cause}" and "executed notebook" in said[1] and len(said) == 2
    record = Manifest(p).stages["00_arith_pair"]
    assert record["state"] == ("stopped" if full else wanted)
    assert not [*p.run_dir.rglob("*.part")]
    if record["state"] != "complete":
        assert Manifest(p).resumable("00_arith_pair")


def test_a_full_disk_is_told_whatever_a_library_made_of_it(p, monkeypatch, capsys):
    def execute(*args, **kwargs):
        monkeypatch.setattr(pipeline, "TemporaryFile", unwritable)
        raise papermill.PapermillExecutionError(0, 1, "", "RuntimeError", "[enforce fail at inline_container.cc]", [])

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    assert not pipeline.run_stage(p, "00_arith_pair", Manifest(p))
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith(
        "00_arith_pair cannot be written (No space left on device): mend that, and run again to go on."
    )


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES", "EDQUOT"])
def test_elsewhere_it_is_a_sentence_too(monkeypatch, capsys, number):
    import errno

    def fails(*_):
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)), "outputs/x")

    monkeypatch.setitem(__main__.COMMANDS, "params", __main__.COMMANDS["params"]._replace(do=fails))
    assert __main__.main(["params"]) == 1
    said = capsys.readouterr().err
    assert said == f"error: outputs/x: {os.strerror(getattr(errno, number))}; mend that, and run again\n"


def test_a_sweep_tells_what_its_run_told(tmp_path, monkeypatch, p):
    """Its screen cannot be kept: the sentence of the run is not hidden by that."""
    done = SimpleNamespace(returncode=2, stderr="error: the first\n")
    monkeypatch.setattr(sweep.subprocess, "run", lambda *_, **__: done)
    with room(8000):  # for the params, and not for the screen
        done.stderr += "more\n" * 4000
        assert sweep._run(p, tmp_path / "c").startswith("failed: error: the first")


def test_code_can_be_read_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setattr(rows.os, "replace", unwritable)
    code = Code()
    code._known = {}
    assert code.used(["srlib.data.rows"])
