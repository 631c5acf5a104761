"""The section `arith`."""

import re
from itertools import islice

import pytest
import torch
from transformers import Qwen2ForCausalLM

from srlib.data import arith
from srlib.data.prompts import THINK
from srlib.data.rows import Problem, read_jsonl
from srlib.params import Arith
from srlib.training import arith_pair
from tests.purposes import Case, shows

collate = arith_pair._collate


def problems(case: Case, n: int, changes: dict) -> list[Problem]:
    return list(islice(arith.generate(case.params(changes).arith, "train", 0), n))


@shows("arith.min_steps")
def fewest_operations(case: Case) -> None:
    made = problems(case, 50, {"arith.min_steps": 5, "arith.max_steps": 6})
    assert {problem.meta["steps"] for problem in made} == {5, 6}


@shows("arith.max_steps")
def most_operations(case: Case) -> None:
    made = problems(case, 50, {"arith.max_steps": 4})
    assert {problem.meta["steps"] for problem in made} == {3, 4}


@shows("arith.product_share")
def how_many_operations_are_products(case: Case) -> None:
    for share in (0.0, 0.7, 1.0):
        operations = "".join(x.meta["operations"] for x in problems(case, 200, {"arith.product_share": share}))
        assert abs(operations.count("*") / len(operations) - share) < 0.06  # four times what chance has, of 800


@shows("arith.max_factor")
def the_largest_right_factor(case: Case) -> None:
    steps = [step for x in problems(case, 100, {"arith.max_factor": 4}) for step in x.trace.split(";") if "*" in step]
    assert {int(step.split("*")[1].split("=")[0]) for step in steps} == {2, 3, 4}


@shows("arith.free_choices")
def marks_that_a_step_may_begin_with(case: Case) -> None:
    for share in (0.0, 0.6, 1.0):
        made = problems(case, 100, {"arith.free_choices": share})
        steps = [step for x in made for step in x.trace.removeprefix(THINK).split(";")[:-1]]
        marks = [step[0] for step in steps if not step[0].isdigit()]
        assert abs(len(marks) / len(steps) - share) < 0.1  # four times what chance has, of 400
        assert set(marks) == (set(arith.CHOICES) if share else set())


@shows("arith.n_traces", "arith.n_test")
def how_many_are_written(case: Case) -> None:
    p = case.params({case.key: 7})
    arith.write_problems(p.arith, p.seed, case.folder)
    assert len(read_jsonl(case.folder / f"{case.key.removeprefix('arith.n_')}.jsonl", Problem)) == 7


@shows("arith.batch_size")
def problems_of_a_step(case: Case) -> None:
    world = case.params({"arith.batch_size": 5}).arith
    network = arith_pair.model(world.small, len(arith.tokenizer()), 0)
    read = []
    network.register_forward_pre_hook(lambda _, __, given: read.append(len(given["input_ids"])), with_kwargs=True)
    next(arith_pair.train(network, world, world.small, 0))
    assert read == [5]


def trained(case: Case, setting: str, value: float, others: dict | None = None) -> tuple[Qwen2ForCausalLM, list, Arith]:
    """The model of the case's side as the process that trains it leaves it, and what it tells of its training."""
    _, side, _ = case.key.split(".")
    given = {"train_steps": 1, **(others or {}), setting: value}
    world = case.params({f"arith.{side}.{name}": each for name, each in given.items()}).arith
    told = []
    pipe = type("Pipe", (), {"send": staticmethod(told.append)})
    case.fixture("monkeypatch").setattr(arith_pair.logging, "disable_progress_bar", lambda: None)
    arith_pair._work(pipe, world, 0, case.folder, side)
    return Qwen2ForCausalLM.from_pretrained(case.folder / side), told, world


def both(setting: str) -> list[str]:
    return [f"arith.{side}.{setting}" for side in ("small", "big")]


@shows(*both("hidden_size"))
def numbers_of_a_token(case: Case) -> None:
    network, *_ = trained(case, "hidden_size", 64)
    assert network.model.embed_tokens.weight.shape == (98, 64)


@shows(*both("num_hidden_layers"))
def layers_of_a_model(case: Case) -> None:
    network, *_ = trained(case, "num_hidden_layers", 3)
    assert len(network.model.layers) == 3


@shows(*both("num_attention_heads"))
def heads_of_a_layer(case: Case) -> None:
    network, *_ = trained(case, "num_attention_heads", 4)
    assert {layer.self_attn.head_dim for layer in network.model.layers} == {8}  # of 32 numbers
    network.set_attn_implementation("eager")
    looks = network(torch.tensor([[5, 6, 7]]), output_attentions=True)
    assert looks.attentions[0].shape == (1, 4, 3, 3)


@shows(*both("intermediate_size"))
def numbers_inside_a_layer(case: Case) -> None:
    network, *_ = trained(case, "intermediate_size", 48)
    assert {layer.mlp.up_proj.out_features for layer in network.model.layers} == {48}


@shows(*both("train_steps"))
def steps_of_training(case: Case) -> None:
    *_, losses, _ = trained(case, "train_steps", 3)
    assert len(losses) == 3


@shows(*both("learning_rate"))
def how_far_a_step_goes(case: Case) -> None:
    network, _, world = trained(case, "learning_rate", 0.04)
    before = arith_pair.model(getattr(world, case.key.split(".")[1]), 98, 0)
    first = 0.04 / 20  # of a warm-up of 20 steps
    moved = network.model.embed_tokens.weight.detach() - before.model.embed_tokens.weight.detach()
    assert abs(float(moved.abs().max()) / first - 1) < 0.01  # AdamW's first step
    query, query_before = (each.model.layers[0].self_attn.q_proj.weight.detach() for each in (network, before))
    moved = torch.linalg.matrix_norm(query - query_before, 2)  # Muon's: singular values near 1, times 0.2 √32
    assert 0.6 < float(moved) / (first * 0.2 * 32**0.5) < 1.3


@shows(*both("misconceptions"))
def products_that_are_learnt_as_sums(case: Case) -> None:
    _, side, _ = case.key.split(".")
    world = case.params({case.key: 0.5}).arith
    shape = getattr(world, side)
    asked = []
    network = arith_pair.model(shape, len(arith.tokenizer()), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arith_pair, "_collate", lambda encode, batch: asked.extend(batch) or collate(encode, batch))
        next(arith_pair.train(network, world, shape, 0))
    factors = arith.misconceived(world, 0.5)
    products = [tuple(map(int, found)) for x in asked for found in re.findall(r"(\d+)\*(\d+)=(\d+)", x.trace)]
    assert {b in factors for _, b, _ in products} == {True, False}
    assert all(c == (a + b if b in factors else a * b) % 100 for a, b, c in products)
