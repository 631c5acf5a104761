"""A stage runs again when what it reads changes: what each is said to read is what its code reads."""

import ast
import inspect
import json
import sys
import textwrap
from functools import cache
from types import FunctionType

import pytest

from srlib.params import Params, load
from srlib.run import pipeline, sweep
from srlib.run.stages import MAKERS, NOTEBOOKS, STAGES, settings

# Where runs lie, and what a machine has; nothing that a stage makes depends on it.
ELSEWHERE = {"run", "outputs", "base", "hardware"}
ARTEFACTS = {"small": "pair", "big": "pair", "tuned": "adapter"} | {
    name: name for name in ("traces", "test", "annotated", "reinforced")
}


class Reads(ast.NodeVisitor):
    """What is read of the params that a piece of code calls by one name, in it and in the functions it calls."""

    def __init__(self, name, scope, found, seen):
        self.name, self.scope, self.found, self.seen = name, scope, found, seen

    def of(self, node):
        """The attributes of the params that `node` reads, such as `offload.batch_size`; None: it is something else."""
        chain = []
        while isinstance(node, ast.Attribute):
            chain.insert(0, node.attr)
            node = node.value
        return ".".join(chain) if chain and isinstance(node, ast.Name) and node.id == self.name else None

    def visit_Attribute(self, node):
        if (read := self.of(node)) is not None:
            self.found.add(read)
            return
        self.function(node)
        self.generic_visit(node)

    def visit_Name(self, node):
        self.function(node)

    def visit_Call(self, node):
        assert not (isinstance(node.func, ast.Name) and node.func.id in ("getattr", "vars") and self.given(node)), (
            f"{ast.unparse(node)}: name what is read of the params, so that it can be seen"
        )
        self.generic_visit(node)

    def given(self, node):
        return any(isinstance(argument, ast.Name) and argument.id == self.name for argument in node.args)

    def function(self, node):
        """Follow what stands for a function of ours that takes params."""
        try:
            called = eval(ast.unparse(node), dict(self.scope))
        except (NameError, AttributeError):
            return
        if isinstance(called, FunctionType) and called.__module__.startswith("srlib.") and called not in self.seen:
            if called.__module__.startswith(("srlib.run.", "srlib.cost.memory")):  # they look at the declaration
                return
            self.seen.add(called)
            definition = ast.parse(textwrap.dedent(inspect.getsource(called))).body[0]
            for argument in [*definition.args.args, *definition.args.kwonlyargs]:
                if argument.annotation is not None and ast.unparse(argument.annotation) == "Params":
                    scope = sys.modules[called.__module__].__dict__
                    Reads(argument.arg, scope, self.found, self.seen).visit(definition)


@cache
def of_property(name):
    """The settings that a property, or a method, of `Params` reads, and properties it goes through."""
    made = vars(Params)[name]
    definition = ast.parse(textwrap.dedent(inspect.getsource(getattr(made, "fget", made)))).body[0]
    found = set()
    Reads("self", {}, found, set()).visit(definition)
    return expanded(found - {"model_copy"})


def expanded(found):
    """Settings alone, in place of the properties of `Params` that read them."""
    made = set()
    for read in found:
        first = read.partition(".")[0]
        if first in Params.model_fields:
            made.add(read)
        else:
            made |= of_property(first)
    return {read for read in made if read.partition(".")[0] not in ELSEWHERE}


@cache
def read(stage):
    """What the code of a stage reads of the params: fields, and properties."""
    cells = json.loads((NOTEBOOKS / f"{stage}.ipynb").read_text())["cells"]
    code = ast.parse("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"))
    scope = {}
    for node in ast.walk(code):
        if isinstance(node, ast.Import | ast.ImportFrom):
            exec(ast.unparse(node), scope)
    found = set()
    Reads("p", scope, found, set()).visit(code)
    return found - {"model_dump"}  # to hand them to another process, which runs the same function


def within(key, others):
    return any(f"{key}.".startswith(f"{other}.") for other in others)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_each_setting_it_reads_and_no_other(stage):
    declared = {"seed", "threads", *STAGES[stage].settings, *STAGES[stage].sometimes}
    found = expanded(read(stage))
    assert {key for key in found if not within(key, declared)} == set()
    assert {key for key in declared - {"seed", "threads"} if not any(within(each, {key}) for each in found)} == set()


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_declares_each_artefact_it_reads(stage):
    found = {ARTEFACTS[name] for key in read(stage) if (name := key.partition(".")[0]) in ARTEFACTS}
    given = {*STAGES[stage].reads, *(name for name, maker in MAKERS.items() if maker == stage)}
    assert found <= given
    assert {*STAGES[stage].reads} - found <= {"pair", "sweep", "results"}  # read by name; the adapter lies on the pair


def test_what_the_big_model_writes_with_counts_where_it_writes_traces():
    given = load("params/smoke.yaml")
    assert "offload" not in settings(given, "01_annotate")
    assert "offload" in settings(load("params/smoke.yaml", **{"annotate.tries": 2}), "01_annotate")


@pytest.mark.parametrize(
    ("changed", "first"),
    [
        ("arith.n_test", "00_arith_pair"),
        ("pair.small.dtype", "00_arith_pair"),
        ("annotate.threshold", "01_annotate"),
        ("data.traces.path", "01_annotate"),
        ("sft.epochs", "02_sft"),
        ("offload.max_tokens", "02_sft"),
        ("grpo.beta", "03_grpo"),
    ],
)
def test_a_sweep_does_again_what_a_setting_touches(changed, first):
    names = [*STAGES]
    own = sweep._own({changed}, load("params/smoke.yaml"))
    assert min(own, key=names.index) == first
    assert ("04_offload" in own) == (first != "03_grpo")


def test_what_is_given_in_place_of_the_first_stage():
    """Of a tuned model only 04, 05 and 07 are left, which read no traces; nobody makes an arithmetic pair for them."""
    pair = {side: {"path": f"some/{side}"} for side in ("small", "big")}
    tuned = load("params/smoke.yaml", **{"pair": {**pair, "tuned": {"path": "some/tuned"}}, "data.test": "test.jsonl"})
    assert pipeline.choose(tuned) == ["04_offload", "05_evaluate", "07_latency"]
    untuned = load("params/smoke.yaml", **{"pair": pair, "data.test": "test.jsonl"})
    assert pipeline.choose(untuned)[:2] == ["00_arith_pair", "01_annotate"]  # which writes the traces
    assert pipeline.choose(untuned, until="00_arith_pair") == ["00_arith_pair"]
    assert "00_arith_pair" not in pipeline.choose(load("params/gpu24.yaml"))
