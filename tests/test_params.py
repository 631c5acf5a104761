import subprocess
import sys

import nbformat
import pytest
import yaml
from papermill.translators import translate_parameters

from srlib import SrlibError, params
from srlib.params import ROOT, Params, Section, reference


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
            r"annotate.method is 'guess': input should be 'gap', 'judge', 'random', 'entropy' or 'given'",
        ),
        ({"arith.min_steps": 9}, r"arith: min_steps 9 is above max_steps 5"),
        ({"arith.small.num_attention_heads": 5}, r"not a multiple"),
        ({"evaluate.random_shares": [0.5, 2]}, r"random_shares holds 2.0"),
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


def test_set_flag():
    assert params.parse_override("sft.epochs=2.5") == ("sft.epochs", 2.5)
    with pytest.raises(SrlibError, match="not of the form"):
        params.parse_override("sft.epochs")
    with pytest.raises(SrlibError, match=r"--set 'sft.epochs=\[1' is not valid YAML"):
        params.parse_override("sft.epochs=[1")


SECTIONS = [section for section in vars(params).values() if isinstance(section, type) and issubclass(section, Section)]


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
