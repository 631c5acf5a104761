import pytest
import yaml

from srlib import SrlibError, params
from srlib.params import ROOT, Params


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


def test_notebook_by_hand_and_by_papermill():
    empty = dict.fromkeys(Params.model_fields)
    by_hand = {**empty, "params_file": "params/smoke.yaml"}
    assert params.from_notebook(by_hand) == params.load("params/smoke.yaml")
    assert params.from_notebook({**by_hand, "seed": 4}).seed == 4
    # papermill -f: the whole file is used alone, whatever params_file says
    given = yaml.safe_load((ROOT / "params/smoke.yaml").read_text())
    assert params.from_notebook({**empty, "params_file": "params/cpu.yaml", **given}) == params.load(
        "params/smoke.yaml"
    )


def test_papermill_unknown_name_is_refused():
    scope = {"In": ["", "params_file = 'x'", '# Parameters\nrun = "cpu"\nsfft = {}\n'], "run": "cpu"}
    with pytest.raises(SrlibError, match="papermill: unknown key 'sfft'; did you mean 'sft'"):
        params.from_notebook(scope)


def test_set_flag():
    assert params.parse_override("sft.epochs=2.5") == ("sft.epochs", 2.5)
    with pytest.raises(SrlibError, match="not of the form"):
        params.parse_override("sft.epochs")
