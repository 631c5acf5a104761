import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from papermill.translators import translate_parameters

from srlib import SrlibError, params
from srlib.__main__ import main
from srlib.params import ROOT, Params, Section, reference
from srlib.params.written import typed
from srlib.run import sweep


@pytest.mark.parametrize("path", sorted((ROOT / "params").glob("*.yaml")), ids=lambda p: p.name)
def test_every_file_is_valid(path):
    assert params.load(path).run == path.stem


def test_overrides():
    p = params.load("params/cpu.yaml", seed=3, **{"sft.epochs": 1, "arith": {"small": {"train_steps": 7}}})
    assert (p.seed, p.sft.epochs, p.arith.small.train_steps) == (3, 1, 7)
    assert p.arith.small.learning_rate == params.load("params/cpu.yaml").arith.small.learning_rate


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sft.epoch": 1}, r"unknown key 'epoch'; did you mean 'epochs'\? \(in section sft\)"),
        ({"sfft": {"epochs": 1}}, r"unknown key 'sfft'; did you mean 'sft'\?"),
        ({"arith.small.train_step": 1}, r"did you mean 'train_steps'\? \(in section small\)"),
        ({"data.test": {"path": "a.jsonl", "splitt": "x"}}, r"did you mean 'split'\? \(in section test\)"),
        ({"sft.epochs": "many"}, r"sft.epochs is 'many': input should be a valid number"),
        ({"sft.lora_rank": 1.5}, r"sft.lora_rank is 1.5: input should be a valid integer"),
        ({"annotate.threshold": -1}, r"annotate.threshold is -1: input should be greater than 0"),
        (
            {"annotate.method": "guess"},
            r"annotate.method is 'guess': input should be 'gap', 'judge', 'random', 'entropy', 'worth' or 'given'",
        ),
        ({"arith.min_steps": 9}, r"arith: min_steps 9 is above max_steps 5"),
        ({"arith.small.num_attention_heads": 5}, r"not a multiple"),
        ({"evaluate.random_shares": [0.5, 2]}, r"random_shares holds 2.0, which is not between 0 and 1"),
        ({"evaluate.rejections": [0.051, 0.2, 0.054]}, r"holds 0.051 and 0.054, whose rows would both be called 0.05"),
        ({"evaluate.rejections": [0.0]}, r"rejections holds 0.0, which is not between 0 and 1"),
        ({"bench.batch_sizes": [4, 0]}, r"bench.batch_sizes.1 is 0: input should be greater than or equal to 1"),
        ({"latency.gpus": [0]}, r"latency.gpus.0 is 0: input should be greater than or equal to 1"),
        ({"latency.big": "33B"}, r"latency.big is '33B': input should be '1.5B', '7B', '8B', '14B', '32B' or '70B'"),
        ({"latency.gpu": "h1000"}, r"latency.gpu is 'h1000': input should be 't4', .* or 'h200'"),
        ({"pair.small.kv_cache_gb": 2}, r"kv_cache_gb and the parallel settings need engine: vllm"),
        ({"pair.small": {"quantization": "awq"}}, r"awq needs engine: vllm; transformers takes nf4 and int8"),
        ({"pair.small": {"engine": "vllm", "quantization": "nf4"}}, r"nf4 needs engine: transformers; vllm takes awq"),
        ({"pair.small": {"engine": "vllm", "process": True}}, r"process needs engine: transformers"),
        (
            {"pair.small": {"engine": "vllm", "url": "http://127.0.0.1:8000", "eager": True}},
            r"device, ray and eager are for a model that is loaded here, and url names a server",
        ),
        (
            {"pair.small": {"engine": "vllm", "ray": True, "device": "cuda:1"}},
            r"device is cuda:1, and with ray it is Ray that chooses the devices; leave it away",
        ),
        ({"run": "../x"}, r"run is '../x'"),
        ({"seed.x": 1}, r"seed.x cannot be set: seed is 0, not a section"),
    ],
)
def test_bad_values_are_one_sentence(change, message):
    with pytest.raises(SrlibError, match=message) as error:
        params.load("params/cpu.yaml", **change)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("params/cpu.yaml") or "seed.x" in change


def test_bad_files(tmp_path):
    with pytest.raises(SrlibError, match="no params file params/cpo.yaml; did you mean params/cpu.yaml?"):
        params.load("params/cpo.yaml")
    (tmp_path / "a.yaml").write_text("run: [")
    with pytest.raises(SrlibError, match="not valid YAML"):
        params.load(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- run")
    with pytest.raises(SrlibError, match="mapping of sections"):
        params.load(tmp_path / "b.yaml")
    (tmp_path / "c.yaml").write_text("seed: 1")
    with pytest.raises(SrlibError, match="run is missing"):
        params.load(tmp_path / "c.yaml")


CELL = 'params_file = "params/smoke.yaml"\nchanges = {}\n'


def notebook(*cells: str) -> dict:
    """The globals of a notebook that has run `cells`."""
    scope: dict = {"In": ["", *cells]}
    for cell in cells:
        exec(cell, scope)
    return scope


def injected(**values) -> str:
    """The cell that papermill writes."""
    return translate_parameters("python3", "python", values, "Parameters")


def smoke(**changes) -> Params:
    return params.load("params/smoke.yaml", **changes)


def test_a_notebook_by_hand():
    assert params.from_notebook(notebook(CELL)) == smoke()
    dotted = CELL.replace("{}", '{"seed": 1, "sft.epochs": 2}')
    nested = CELL.replace("{}", '{"seed": 1, "sft": {"epochs": 2}}')
    assert params.from_notebook(notebook(dotted)) == smoke(seed=1, **{"sft.epochs": 2})
    assert params.from_notebook(notebook(nested)) == smoke(seed=1, **{"sft.epochs": 2})


def test_a_value_set_by_hand_is_laid_on_top_of_the_file():
    p = params.from_notebook(notebook(CELL + 'run = "mine"\nsft = {"epochs": 2}\ngrpo = None\n'))
    assert p == smoke(run="mine", **{"sft.epochs": 2})
    assert p.annotate.threshold == 0.05  # of the file, as everything that was not set
    both = CELL.replace("{}", '{"seed": 2}') + "seed = 1\n"
    assert params.from_notebook(notebook(both)).seed == 2


def test_the_begin_cell_can_be_run_again():
    """By then other cells have used the names of sections for something else."""
    cells = [CELL + 'arith = {"n_test": 9}\nseed = 3\n', "from srlib.run import stages as arith, stages as latency"]
    scope = notebook(*cells, "seed = 5\ndata = {}\npair = object()\nparams_file == 'x'")
    assert params.from_notebook(scope) == smoke(seed=3, **{"arith.n_test": 9})
    edited = notebook(*cells, CELL.replace("{}", '{"sft.epochs": 2}'))  # the cell itself, too
    assert params.from_notebook(edited) == smoke(**{"sft.epochs": 2})


def test_papermill_with_a_whole_file():
    """`-f`: the file stands in the place of `params_file`, and changes are laid on top of it."""
    given = yaml.safe_load((ROOT / "params/cpu.yaml").read_text())
    cpu = params.load("params/cpu.yaml")
    assert params.from_notebook(notebook(CELL, injected(**given))) == cpu
    assert params.from_notebook(notebook(CELL + "seed = 3\n", injected(**given))) == cpu
    changed = notebook(CELL.replace("{}", '{"sft.epochs": 2}'), injected(**given))
    assert params.from_notebook(changed) == params.load("params/cpu.yaml", **{"sft.epochs": 2})
    assert params.from_notebook(notebook(CELL, injected(**smoke().model_dump()))) == smoke()  # as the runner does


def test_papermill_with_single_values():
    """`-p` and `-y`: on top of `params_file`, a `run` too."""
    assert params.from_notebook(notebook(CELL, injected(seed=1))) == smoke(seed=1)
    assert params.from_notebook(notebook(CELL, injected(run="mine", seed=1))) == smoke(run="mine", seed=1)
    other = notebook(CELL, injected(params_file="params/cpu.yaml", changes={"sft.epochs": 2}))
    assert params.from_notebook(other) == params.load("params/cpu.yaml", **{"sft.epochs": 2})
    assert params.from_notebook(notebook(CELL.replace("{}", '{"seed": 2}'), injected(seed=1))).seed == 1


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([CELL, injected(run="cpu", sfft={})], r"papermill: unknown key 'sfft'; did you mean 'sft'\?"),
        ([CELL.replace("{}", '{"sft.epoch": 1}')], r"smoke.yaml: unknown key 'epoch'; did you mean 'epochs'\?"),
        ([CELL.replace("{}", '{"sfft": {"epochs": 1}}')], r"smoke.yaml: unknown key 'sfft'; did you mean 'sft'\?"),
        ([CELL.replace("{}", "3")], r"changes is 3; it must map names to values"),
        ([CELL.replace("{}", "{1: 2}")], r"smoke.yaml: unknown key '1'"),
        ([CELL, injected(run=131)], r"smoke.yaml: run is 131, which is no text; put it in quotes"),  # -p run 0131
        ([CELL, injected(run=89, sft={})], r"parameters: run is 89, which is no text; put it in quotes"),  # -f, octal
        (
            [CELL + "import datetime\nrun = datetime.date(2025, 1, 31)\n"],
            r"run is datetime.date\(2025, 1, 31\), which is no",
        ),
        (["params_file = None\n"], r"No params file is named"),
    ],
)
def test_a_mistake_in_a_notebook_is_one_sentence(cells, message):
    with pytest.raises(SrlibError, match=message) as error:
        params.from_notebook(notebook(*cells))
    assert "\n" not in str(error.value)


def test_papermill_itself(tmp_path):
    """The real cells of a notebook in a real kernel, by papermill."""
    full = nbformat.read(ROOT / "notebooks" / "00_arith_pair.ipynb", 4)
    told = "from srlib.params import from_notebook\nprint(from_notebook(globals()).model_dump_json())"
    full.cells = [full.cells[1], nbformat.v4.new_code_cell(told)]
    nbformat.write(full, tmp_path / "in.ipynb")
    command = [sys.executable, "-m", "papermill", tmp_path / "in.ipynb", tmp_path / "out.ipynb", "--no-progress-bar"]
    subprocess.run([*command, "-p", "params_file", "params/smoke.yaml", "-p", "run", "mine"], check=True, cwd=ROOT)
    printed = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text
    assert Params.model_validate_json(printed) == smoke(run="mine")
    subprocess.run([*command, "-f", "params/smoke.yaml", "-y", "changes: {seed: 4}"], check=True, cwd=ROOT)
    printed = nbformat.read(tmp_path / "out.ipynb", 4).cells[-1].outputs[0].text
    assert Params.model_validate_json(printed) == smoke(seed=4)


SECTIONS = [section for section in vars(params).values() if isinstance(section, type) and issubclass(section, Section)]


PLAIN = [
    "0131",
    "2025-01-31",
    "2025-13-45",
    "1e3",
    "1.50",
    "1_000",
    "yes",
    "No",
    "on",
    "true",
    "0x10",
    "0o7",
    "-7",
    "1.0.0",
]


@pytest.mark.parametrize("text", PLAIN)
def test_text_is_taken_as_it_is_written(tmp_path, text):
    """What is a number, a date or a truth elsewhere: in a file, by `--set`, alone, in lists and in mappings."""
    path = tmp_path / "x.yaml"
    path.write_text(
        f"run: x\noffload: {{hint: {text}}}\ndata: {{test: {text}, traces: {{path: y, columns: {{id: {text}}}}}}}\n"
        f"base: {{folder: {text}, stages: [{text}, b]}}\n"
    )
    p = params.load(path)
    assert (p.offload.hint, p.base.folder, p.base.stages) == (text, text, [text, "b"])
    assert (p.data.test.path, p.data.traces.columns) == (text, {"id": text})
    assert params.load(path, **dict([params.parse_override(f"outputs={text}")])).outputs == text
    again = tmp_path / "again.yaml"  # as a sweep writes the params of its runs
    again.write_text(yaml.safe_dump(p.model_dump()))
    assert params.load(again) == p
    plan = sweep.plan("params/smoke.yaml", [f"offload.hint={text},x"])
    assert [q.offload.hint for _, q in sweep.combinations(plan)[2]] == [text, "x"]


def test_numbers_and_truths_are_read_as_such(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(
        "run: x\nseed: 010\nthreads: +2\nsft: {learning_rate: 1e-4, epochs: .5, gradient_checkpointing: yes}\n"
        "evaluate: {random_shares: [0.25, 5.0E-1]}\ngrpo: {reward_weights: {accuracy: 2}, use_vllm: False, vllm_url: ~}"
    )
    p = params.load(path)
    assert (p.seed, p.threads, p.sft.learning_rate, p.sft.epochs) == (10, 2, 1e-4, 0.5)
    assert p.sft.gradient_checkpointing and not p.grpo.use_vllm and p.grpo.vllm_url is None
    assert p.evaluate.random_shares == [0.25, 0.5] and p.grpo.reward_weights == {"accuracy": 2.0}
    values = [p.seed, p.threads, p.sft.epochs, *p.evaluate.random_shares]
    assert {type(value) for value in values} == {int, float}
    read = params.parse_override("x={a: [1, 0131, true], b: {c: 1.50}}")[1]
    assert typed(read) == {"a": [1, "0131", True], "b": {"c": 1.5}} and typed(read)["a"][2] is True


def test_a_section_whose_lines_are_comments_is_as_by_default(tmp_path):
    (tmp_path / "x.yaml").write_text("run: x\nsft:\n  # epochs: 9\narith:\n  small:\n  n_test: 5\ndata: ~\n")
    p = params.load(tmp_path / "x.yaml")
    assert p == params.load(tmp_path / "x.yaml", **{"sft": {}, "arith.small": {}, "data": {}}) and p.arith.n_test == 5
    assert p.sft == Params(run="x").sft and p.arith.small == Params(run="x").arith.small
    with pytest.raises(SrlibError, match="run is empty"):
        params.load(tmp_path / "x.yaml", run=None)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_what_is_passed_on_as_it_is_has_its_types(section):
    """A field of any JSON is one of `Anything`: else numbers in it would go out with how they are written."""
    for name, field in section.model_fields.items():
        assert "JsonValue" not in str(field.annotation) or "typed" in str(field.annotation), name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run: x\nsft: {epochs: 1}\noffload: {}\nsft: {lora_rank: 4}", "sft stands twice, in lines 2 and 4"),
        (
            "run: x\npair:\n  small: {path: a}\n  big: {path: b}\n  small: {}",
            "pair.small stands twice, in lines 3 and 5",
        ),
        ("run: x\nsft: {epochs: 1, epochs: 1}", "sft.epochs stands twice, in line 2"),
        ("run: x\n'seed': 1\nseed: 1", "seed stands twice, in lines 2 and 3"),
        ("run: x\nevaluate: {chunks: [1, {a: 1, a: 2}]}", r"evaluate.chunks\[1\].a stands twice, in line 2"),
        ("run: x\n? [a]\n: 1", "line 2 has a list or a mapping for a key"),
        ("run: x\n{a: b}: 1", "line 2 has a list or a mapping for a key"),
        ("run: x\n7: 1", "unknown key '7'"),
        ("run: !!python/object/apply:os.getcwd []", "line 1 has the tag !!python/object/apply:os.getcwd"),
        ("run: !!timestamp now", "line 1 has the tag !!timestamp"),
        ("run: !mine x", "line 1 has the tag !mine"),
        ("run: x\n<<: 3", "line 2 lays 3 under a mapping"),
        ("run: x\nsft: *sft", "line 2, column 6: found undefined alias 'sft'"),
        ("run: &x [*x]", "nests too deep"),
        ("run: " + "[" * 1200, "nests too deep"),
        ("\n".join(" " * i + "a:" for i in range(900)), "nests too deep"),
        ("a: &a [" + "x, " * 999 + "x]\nb: &b [" + "*a, " * 99 + "*a]\nrun: [*b, *b]", "more than 100,000 values"),
        ("run: x\n\tseed: 1", r"line 2, column 1: found character '\\t'"),
        ("run: x\n---\nrun: y", "line 2, column 1: found another document"),
        ("run: x\0y", r"the character '\\x00' at 7"),
        ('run: "\\ud800"', r"line 1 has half a character, '\\ud800'"),
        ("run:", "run is empty"),
        ("run: [x]", r"run is \['x'\], which is no text"),
        ("run: x\nseed: " + "9" * 5000, "seed is '9*…: unable to parse input string as an integer"),
        ("run: x\nseed: 12:30", "seed is '12:30': input should be a valid integer"),
        ("run: x\nthreads: yes", "threads is 'yes': input should be a valid integer"),
        ("", "holds nothing"),
        ("# run: x", "holds nothing"),
        ("[run]", "holds a list"),
        ("0131", "holds '0131' alone"),
        (b"run: x\noffload: {hint: \xe9}", "is not UTF-8: line 2 has the byte 0xe9"),
        ("run: x".encode("utf-16"), "is not UTF-8: line 1 has the byte 0xff"),
        ("run: x".encode("utf-16-le"), r"the character '\\x00' at 2"),
        (bytes(range(256)), "is not UTF-8: line 2 has the byte 0x80"),
    ],
)
def test_what_is_no_params_file_is_one_sentence(tmp_path, capsys, text, message):
    path = tmp_path / "x.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for command in ("run", "sweep", "plan"):
        assert main([command, str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and "x.yaml" in line and re.search(message, line), line
        assert len(line) < 600


def test_names_for_values_are_no_ties_between_them(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("run: x\npair: {small: &one {path: a, dtype: float16}, big: {<<: *one, path: b}, tuned: *one}")
    p = params.load(path, **{"pair.small.dtype": "float32"})
    assert (p.pair.small.dtype, p.pair.big.dtype, p.pair.tuned.dtype) == ("float32", "float16", "float16")
    assert (p.pair.small.path, p.pair.big.path) == ("a", "b")


@pytest.mark.parametrize("path", ["x" * 5000, "x\0y", "", ".", "params"], ids=ascii)
def test_a_file_that_cannot_be(path, capsys):
    assert main(["plan", path]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@settings(max_examples=200)
@example(data=b"?")  # a mapping without a key, which is no sweep
@given(data=st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)))
def test_any_bytes_are_params_or_one_sentence(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(data)
    for read in (params.load, lambda path: sweep.combinations(sweep.plan(path))):
        with pytest.raises(SrlibError) as error:  # nothing so short and blind has a run
            read(str(path))
        assert "\n" not in str(error.value)


YAML = st.text(st.sampled_from(list("[]{}:,-?&*!|>'\"%@#~ \n\t01e._ax\0\u202e\ud800")), max_size=24)


@settings(max_examples=200)
@given(
    key=st.sampled_from([*Params.model_fields, "sft.epochs", "data.test.columns", "pair.small.path", "offload.hint"]),
    text=YAML,
)
def test_any_text_is_a_setting_or_one_sentence(key, text):
    for read in (lambda given: params.load("params/smoke.yaml", **dict([params.parse_override(given)])), plan_of):
        try:
            read(f"{key}={text}")
        except SrlibError as error:
            assert "\n" not in str(error)


def plan_of(given: str) -> None:
    sweep.combinations(sweep.plan("params/smoke.yaml", [given, "grpo.beta=0,1"]))


def test_set_flag():
    assert params.parse_override("sft.epochs=2.5") == ("sft.epochs", 2.5)
    with pytest.raises(SrlibError, match="not of the form"):
        params.parse_override("sft.epochs")
    with pytest.raises(SrlibError, match=r"--set 'sft.epochs=\[1' is not valid YAML"):
        params.parse_override("sft.epochs=[1")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_every_setting_has_a_description(section):
    assert [name for name, field in section.model_fields.items() if not field.description] == []


def test_the_reference_lists_every_setting():
    keys = [setting.key for setting in reference.settings()]
    assert len(keys) == len(set(keys))
    # all that a params file may hold: whatever is dumped, and what the sections that are empty would hold
    given = {"folder": "x", "stages": ["00_arith_pair"]}
    model = {"local": {}}
    full = Params(run="x", base=given, pair={"tuned": {}}, data={"traces": "x", "test": "x"}, annotate={"judge": model})

    def dotted(values, prefix=""):
        for name, value in values.items():
            yield prefix + name
            if isinstance(value, dict):
                yield from dotted(value, f"{prefix}{name}.")

    assert set(keys) == set(dotted(full.model_dump()))
    lines = reference.table().splitlines()
    assert all(any(line.startswith((f"  {key} ", f"{key}: ")) for line in lines) for key in keys)
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("key", "line"),
    [
        ("grpo.beta", "  grpo.beta  0.0 (number ≥ 0)  weight of the KL to the policy of stage 02"),
        ("run", "  run  required (text like"),
        ("arith", "  arith.big.train_steps          1100 (whole number ≥ 1)  steps of training"),
        ("arith.max_factor", "  arith.max_factor  15 (whole number ≥ 2, ≤ 99)  largest factor"),
        ("pair.small.context", "  pair.small.context  empty (whole number ≥ 16 or   tokens of the longest"),
        ("grpo.preset", "  grpo.preset  offload (offload, paper,      ready-made"),
        ("pair.tuned", "pair.tuned: a small model that writes the tags already"),
        ("evaluate.rejections", "  evaluate.rejections  [0.25, 0.5, 0.75] (list of"),
    ],
)
def test_the_reference_of_one_key(key, line):
    printed = reference.table(key)
    assert any(each.startswith(line) for each in printed.splitlines()), printed
    assert all(other not in printed for other in ("  sft.epochs", "  grpo.batch_size"))


def test_the_reference_names_the_nearest():
    with pytest.raises(SrlibError, match=r"There is no section or setting 'grpo.bta'; did you mean 'grpo.beta'\?"):
        reference.table("grpo.bta")
    with pytest.raises(SrlibError, match=r"'qqqq'; the sections are base, hardware, pair, .* bench\."):
        reference.table("qqqq")
