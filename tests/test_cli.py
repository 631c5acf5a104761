"""The command line: what it says, what it imports, and how it ends."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from srlib import __version__
from srlib.__main__ import COMMANDS, main
from srlib.cost import memory
from srlib.evaluation import report
from srlib.params import ROOT
from srlib.run import bench, pipeline, sweep
from srlib.run.stages import STAGES

HEAVY = {"torch", "transformers", "pandas", "papermill", "scipy"}


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], HEAVY | {"pydantic", "yaml"}),
        (["run", "--help"], HEAVY | {"pydantic", "yaml"}),
        (["--version"], HEAVY | {"pydantic", "yaml"}),
        (["rum"], HEAVY | {"pydantic", "yaml"}),
        (["params", "grpo"], HEAVY),
        (["run", "params/smok.yaml"], HEAVY),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments, heavy):
    code = f"""
import sys
from srlib.__main__ import main
try:
    main({arguments!r})
except SystemExit:
    pass
print("heavy:", [name for name in {heavy!r} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_has_a_line_for_everything(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    told = {words[0]: words[1:] for words in lines if words}
    assert set(COMMANDS) == {"run", "sweep", "compare", "bench", "plan", "rehearse", "export", "params"}
    for name, command in COMMANDS.items():
        assert told[name] == [command.help]
    assert set(STAGES) <= set(told)
    assert [told[code] for code in ("0", "1", "2", "130")] == [
        ["done"],
        ["a stage failed, or something does not fit"],
        ["a mistake in the input; one sentence says which"],
        ["interrupted; what is finished is kept"],
    ]


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"srlib {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "the following arguments are required: COMMAND; see srlib --help"),
        (["rum"], "argument COMMAND: invalid choice: 'rum' (choose from"),
        (["run"], "the following arguments are required: params; see srlib run --help"),
        (["run", "params/smoke.yaml", "--onli", "x"], "unrecognized arguments: --onli x"),
        (
            ["run", "params/smoke.yaml", "--from", "a", "--only", "b"],
            "argument --only: not allowed with argument --from",
        ),
        (["sweep", "params/smoke.yaml", "--seeds", "a"], "'a' is no list of whole numbers, such as 0,1,2"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr()
    assert ended.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and sentence in said.err
    assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["run", "params/smok.yaml"], "There is no params file params/smok.yaml; did you mean params/smoke.yaml?"),
        (["run", "params/smoke.yaml", "--set", "sft.epoch=1"], "unknown key 'epoch'; did you mean 'epochs'?"),
        (["run", "params/smoke.yaml", "--set", "path=1"], "params/smoke.yaml: unknown key 'path'"),
        (["plan", "params/smoke.yaml", "--set", "seed"], "--set 'seed' is not of the form section.key=value"),
        (["params", "grpo.bta"], "There is no section or setting 'grpo.bta'; did you mean 'grpo.beta'?"),
        (["compare", "nowhere", "nor/here"], "nowhere"),
    ],
)
def test_a_mistake_in_the_input_is_one_sentence(capsys, arguments, sentence):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and sentence in said.err and len(said.err.splitlines()) == 1
    assert said.out == ""


@pytest.fixture
def called(monkeypatch):
    """What each command hands on, in place of what it does."""
    calls = []

    def record(name, result):
        return lambda *args, **kwargs: calls.append((name, args, kwargs)) or result

    monkeypatch.setattr(pipeline, "run", record("run", 1))
    monkeypatch.setattr(bench, "main", record("bench", 0))
    monkeypatch.setattr(memory, "table", record("plan", ("too much", False)))
    monkeypatch.setattr(sweep, "run", record("sweep", 0))
    monkeypatch.setattr(report, "compare", record("compare", "a table"))
    return calls


def test_run(called):
    assert main(["run", "params/smoke.yaml", "--set", "seed=4", "--set", "sft.epochs=2"]) == 1  # as it was told
    assert main(["run", "params/smoke.yaml", "--from", "02_sft", "--until", "04_offload", "--dry-run"]) == 1
    assert main(["run", "params/smoke.yaml", "--only", "01_annotate"]) == 1
    assert [(args[1:], kwargs) for _, args, kwargs in called] == [
        ((None, None, None), {"dry": False}),
        (("02_sft", None, "04_offload"), {"dry": True}),
        ((None, "01_annotate", None), {"dry": False}),
    ]
    p = called[0][1][0]
    assert (p.run, p.seed, p.sft.epochs) == ("smoke", 4, 2)


def test_the_other_commands(called, capsys):
    assert main(["bench", "params/smoke.yaml"]) == 0
    assert main(["plan", "params/smoke.yaml"]) == 1  # it does not fit
    assert main(["sweep", "params/smoke.yaml", "--set", "sft.epochs=1,2", "--seeds", "0,1", "--jobs", "2"]) == 0
    assert main(["compare", "a", "b", "--policy", "learned"]) == 0
    assert [name for name, *_ in called] == ["bench", "plan", "sweep", "compare"]
    chosen, jobs = called[2][1]
    assert (chosen.vary, chosen.seeds, jobs) == ({"sft.epochs": [1, 2]}, [0, 1], 2)
    assert called[3][1] == ("a", "b", ["learned"])
    assert capsys.readouterr().out == "too much\na table\n"
    assert main(["params", "grpo.beta"]) == 0
    assert "  grpo.beta  0.0 (number ≥ 0)" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["run", "params/smoke.yaml"], ["bench", "params/smoke.yaml"]])
def test_an_interrupt_ends_in_one_line(monkeypatch, capsys, command):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    monkeypatch.setattr(bench, "main", interrupted)
    assert main(command) == 130
    said = capsys.readouterr().err
    assert said.split("\n") == ["", "interrupted; what is finished is kept: run again to go on", ""]


def test_an_interrupted_sweep_begins_no_other_run(monkeypatch, tmp_path, capsys):
    """The run under way is waited for (it is interrupted, too); those that wait are not begun."""
    begun, over = [], Event()

    class Pool(ThreadPoolExecutor):
        def __exit__(self, *error):
            over.set()
            return super().__exit__(*error)

    def one(p, *_):
        begun.append(p.run)
        return "" if p.run.startswith("smoke") else over.wait(60) and ""

    def interrupted(_):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(sweep, "ThreadPoolExecutor", Pool)
    monkeypatch.setattr(sweep, "_run", one)
    monkeypatch.setattr(sweep, "as_completed", interrupted)
    vary = ["--set", f"outputs={tmp_path}", "--set", "grpo.beta=0,0.1,0.2"]
    assert main(["sweep", "params/smoke.yaml", *vary]) == 130
    assert begun in (["smoke"], ["smoke", "beta-0-seed0"])
    assert "interrupted" in capsys.readouterr().err


def test_a_failure_that_is_no_mistake_of_the_user_keeps_its_traceback(monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "run", broken)
    with pytest.raises(ZeroDivisionError):
        main(["run", "params/smoke.yaml"])
