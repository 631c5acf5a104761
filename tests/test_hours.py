"""Hours of a plan: by hand where one can, beside the simulation, and larger where there is more to do."""

import pytest

from srlib import params
from srlib.__main__ import main
from srlib.cost import hours, latency, memory
from srlib.cost.costs import roofline
from srlib.cost.jobs import Pipeline
from srlib.evaluation import tuning

GPU = {"hardware.gpus": 1, "hardware.gpu": "a100"}


def seconds(stage, file="gpu24", **changes):
    return hours.stages(params.load(f"params/{file}.yaml", **{k.replace("__", "."): v for k, v in changes.items()}))[
        stage
    ]


def test_reading_and_training_by_hand():
    p = params.load("params/gpu24.yaml", **GPU)
    small, big = (hours.cost(p, memory.models(p, "01_annotate")[side]) for side in ("small", "big"))
    assert hours.stages(p)["01_annotate"] == pytest.approx(
        p.annotate.n_traces / 4 * sum(c.fixed + 4 * 3584 * c.token for c in (small, big))
    )
    assert small.fixed == 28 * hours.LAUNCH["transformers"] and big.fixed == 48 * hours.LAUNCH["transformers"]
    assert big.base < roofline("a100", "14B").base / 2.9  # four bits are read, not sixteen
    trained = 3 * p.annotate.n_traces * p.sft.epochs * (small.fixed + 3584 * small.token)  # forward twice, and backward
    watched = 4 * (3072 * (small.fixed + small.base + small.held * 8 * 2048) + 8 * 512 * small.token)  # 32, 8 at a time
    assert hours.stages(p)["02_sft"] == pytest.approx(trained + watched)


def test_looks_by_hand():
    """One at each multiple of `eval_steps`, and one behind the last step."""
    without, problems = seconds("03_grpo"), {"grpo__n_validation": 32}  # as many as a step has rollouts
    rollouts = seconds("03_grpo", grpo__eval_steps=50, **problems) - without
    assert 0 < rollouts < without / 50
    assert seconds("03_grpo", grpo__eval_steps=20, **problems) == pytest.approx(without + 3 * rollouts)
    problems["grpo__n_validation"] = 64
    assert seconds("03_grpo", grpo__eval_steps=20, **problems) == pytest.approx(without + 6 * rollouts)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_one_trace_takes_what_the_simulation_says(share):
    small, big = roofline("a100", "1.5B"), roofline("a100", "32B")
    own = hours.Pair(small, big).seconds(1, 1, share, 512, 4096)
    simulated = latency.simulate(Pipeline(small, big, shared=True), share=share, prompt=512, decode=4096, span=128)
    assert own == pytest.approx(simulated.seconds, rel=0.1)


@pytest.mark.parametrize(
    ("stage", "changes", "factor"),
    [
        ("01_annotate", {"annotate.n_traces": 8000}, 2),
        ("01_annotate", {"annotate.tries": 1}, None),
        ("02_sft", {"sft.epochs": 6}, None),
        ("02_sft", {"sft.gradient_checkpointing": False}, None),
        ("02_sft", {"sft.method": "full"}, None),
        ("03_grpo", {"sft.method": "full"}, 1),
        ("03_grpo", {"grpo.max_steps": 100}, 2),
        ("03_grpo", {"grpo.rollout": "self"}, None),
        ("03_grpo", {"grpo.eval_steps": 10}, None),
        ("04_offload", {"offload.n_demo": 16}, None),
        ("05_evaluate", {"evaluate.samples_per_problem": 2}, None),
        ("07_latency", {"bench.repeats": 7}, 2),
        ("07_latency", {"latency.n_check": 24}, None),
        ("bench", {"bench.repeats": 7}, 2),
        ("bench", {"bench.batch_sizes": [1]}, None),
        ("bench", {"bench.policies": ["learned"]}, None),
        ("05_evaluate", {"evaluate.n_refused": 0}, None),
        ("05_evaluate", {"evaluate.policies": ["small", "big"]}, None),
        ("05_evaluate", {"evaluate.protocol": "published", "latency.decode": 32768}, None),
    ],
)
def test_more_to_do_takes_longer(stage, changes, factor):
    before, after = (hours.stages(params.load("params/gpu24.yaml", **how))[stage] for how in ({}, changes))
    fewer = {"sft.gradient_checkpointing", "grpo.rollout", "evaluate.n_refused", "evaluate.policies"}
    fewer = (fewer | {"bench.batch_sizes", "bench.policies"}) & {*changes}
    assert after == pytest.approx(factor * before) if factor else (after < before if fewer else after > before)


def test_processes_share_the_work_and_graphs_save_launches():
    one = seconds("02_sft", "node", sft__processes=1, sft__n_watch=1, sft__gradient_accumulation_steps=16)
    assert seconds("02_sft", "node", sft__n_watch=1) == pytest.approx(one / 4, rel=0.1)
    p = params.load("params/node.yaml")
    small, big = (hours.cost(p, memory.models(p, "04_offload")[side]) for side in ("small", "big"))
    assert big.fixed < small.fixed / 4  # vLLM, and transformers


def test_the_plan_tells_hours_and_their_price(capsys):
    main(["plan", "params/node.yaml", "--set", "latency.gpu_hour=3"])
    told = capsys.readouterr().out
    p = params.load("params/node.yaml")
    total = sum(hours.stages(p).values()) / 3600
    assert "8 × a100 (hardware.gpu)" in told and f"{total:.1f}   {total * 8 * 3:,.0f} at 3" in told
    main(["plan", "params/smoke.yaml"])
    assert "Hours" not in capsys.readouterr().out  # on a CPU
    assert "01_annotate" not in hours.stages(params.load("params/released.yaml"))


def test_the_bench_by_hand():
    """One policy, one trace of 64 tokens after another: the small model alone, and the big one."""
    changes = {"bench.batch_sizes": [1], "bench.min_traces": 1, "bench.traces_per_slot": 3, "bench.policies": []}
    p = params.load("params/gpu24.yaml", **GPU, **changes)
    small, big = (hours.cost(p, memory.models(p, "bench")[side]) for side in ("small", "big"))
    one = {c: 64 * c.seconds(1, 1, 512 + 32) + 512 * c.token for c in (small, big)}
    assert hours.stages(p)["bench"] == pytest.approx(4 * 3 * (2 * one[small] + one[big]))  # `generate`, too


def test_thresholds_are_tried_as_often_as_they_are():
    assert hours.TRIES == tuning.TRIES
