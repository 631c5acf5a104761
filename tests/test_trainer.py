"""What both trainings share: what is passed on to libraries and trackers, and that it is checked first."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from types import ModuleType

import pytest
import torch
from transformers.integrations import integration_utils

from srlib import SrlibError
from srlib.data import digests
from srlib.params import load
from srlib.run import pipeline
from srlib.run.stages import STAGES, require
from srlib.training import grpo, sft
from tests.test_grpo import CONFIG, OFFLOAD, SPEED, big, make_tuned, problems, tuned  # noqa: F401  (fixtures)
from tests.test_sft import numbered


@dataclass
class Told:
    """What TensorBoard would have written, and where."""

    folders: list[str] = field(default_factory=list)
    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


def written(patch: pytest.MonkeyPatch) -> Told:
    """Have transformers find a TensorBoard whose writer keeps what it is told."""
    told = Told()

    class SummaryWriter:
        def __init__(self, log_dir):
            told.folders.append(log_dir)

        def add_scalar(self, name, value, step):
            told.scalars.setdefault(name, []).append((step, value))

        def add_text(self, name, text, step=None):
            told.texts[name] = text

        def flush(self):
            pass

        close = flush

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    patch.setitem(sys.modules, module.__name__, module)
    patch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    patch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    return told


def test_a_tracker_is_told_what_the_log_holds(tuned, big, problems, tmp_path, monkeypatch):  # noqa: F811
    """Of both stages, each in its own folder, under a name that says run and stage."""
    told = written(monkeypatch)
    config = load("params/smoke.yaml", **{"sft.report_to": "tensorboard", "sft.n_validation": 4}).sft
    small = tuned.model_copy(update={"adapter": None})
    log = sft.train(small, numbered(36), config, 0, tmp_path / "mine" / "02_sft")
    assert told.scalars["train/loss"] == [(r["step"], r["loss"]) for r in log if "loss" in r]
    assert told.scalars["eval/loss"] == [(r["step"], r["eval_loss"]) for r in log if "eval_loss" in r]
    assert '"run_name": "mine-02_sft"' in told.texts["args"]
    config = CONFIG.model_copy(update={"report_to": "tensorboard", "eval_steps": 1})
    folder = tmp_path / "mine" / "03_grpo"
    log = grpo.train(tuned, big, problems[2:], config, OFFLOAD, SPEED, 0, folder, validation=problems[:2])
    for name in ("reward", "offload_share", "rewards/accuracy/mean"):
        assert told.scalars[f"train/{name}"] == [(r["step"], r[name]) for r in log if name in r]
    for name in ("reward", "offload_share", "accuracy"):
        assert told.scalars[f"eval/{name}"] == [(r["step"], r[f"eval_{name}"]) for r in log if f"eval_{name}" in r]
    assert '"run_name": "mine-03_grpo"' in told.texts["args"]
    assert told.folders == [str(tmp_path / "mine" / stage / "tensorboard") for stage in ("02_sft", "03_grpo")]


@pytest.mark.parametrize("stage", [sft, grpo])
def test_fp16_trains_an_adapter_in_fp32(stage, big, problems, tmp_path, monkeypatch):  # noqa: F811
    """With the scaler of losses that accelerate leaves out on a CPU, as on a GPU, and without: the same."""
    fit, scale, seen = stage.fit, None, {}

    def fitting(trainer, *arguments):
        held = [(parameter.requires_grad, parameter.dtype) for parameter in trainer.model.parameters()]
        if scale:
            trainer.accelerator.native_amp, trainer.accelerator.scaler = True, torch.amp.GradScaler("cpu", scale)
        fit(trainer, *arguments)
        assert trainer.args.fp16 and not trainer.args.bf16
        assert {*held} == {(True, torch.float32), (False, torch.float16)}
        seen[scale] = trainer.accelerator.scaler, trainer.state.log_history[0]

    monkeypatch.setattr(stage, "fit", fitting)
    spec = make_tuned(tmp_path, eager=0.7).model_copy(
        update={"dtype": "float16"}
    )  # one that is surer is rounded too much
    for scale in (None, 64.0):
        folder = tmp_path / str(scale)
        if stage is sft:
            sft.train(spec.model_copy(update={"adapter": None}), numbered(16), load("params/smoke.yaml").sft, 0, folder)
        else:
            grpo.train(spec, big, problems, CONFIG.model_copy(update={"preset": "paper"}), OFFLOAD, SPEED, 0, folder)
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    (none, plain), (scaler, scaled) = seen.values()
    assert none is None and scaler.get_scale() == 64.0, "no step was left out"
    for name in ("loss", "grad_norm"):
        assert scaled[name] == pytest.approx(plain[name], rel=0.05) and abs(plain[name]) > 0.1


@pytest.mark.parametrize("given", [None, "elsewhere"])
def test_weights_and_biases_keeps_its_files_in_the_stage(tuned, tmp_path, monkeypatch, given):  # noqa: F811
    """Unless the environment says where."""
    monkeypatch.delenv("WANDB_DIR", raising=False)
    if given:
        monkeypatch.setenv("WANDB_DIR", given)
    seen, step = set(), sft._Trainer.training_step
    monkeypatch.setattr(sft._Trainer, "training_step", lambda *a: (seen.add(os.environ.get("WANDB_DIR")), step(*a))[1])
    small = tuned.model_copy(update={"adapter": None})
    sft.train(small, numbered(8), load("params/smoke.yaml").sft, 0, tmp_path)
    assert seen == {given or str(tmp_path)}
    assert os.environ.get("WANDB_DIR") == given, "and only for as long"


REFUSED = [
    ("sft.trainer", {"weight_decya": 0.1}, "'weight_decya'; did you mean 'weight_decay'. .of SFTConfig"),
    ("sft.trainer", {"weight_decay": "much"}, "sft.trainer.weight_decay is 'much': .* number.*SFTConfig"),
    ("sft.trainer", {"optim": "sdg"}, "sft.trainer: SFTConfig refuses optim: sdg is not a valid OptimizerNames"),
    ("sft.trainer", {"learning_rate": 1.0}, "sft.trainer holds learning_rate, which srlib sets itself"),
    ("sft.lora", {"use_dorra": True}, "'use_dorra'; did you mean 'use_dora'. .of LoraConfig"),
    ("sft.lora", {"lora_dropout": "some"}, "sft.lora.lora_dropout is 'some': .* number.*LoraConfig"),
    (
        "sft.lora",
        {"layers_pattern": "h"},
        "sft.lora: LoraConfig refuses layers_pattern: `layers_pattern` cannot be used",
    ),
    ("sft.lora", {"init_lora_weights": "gausian"}, "init_lora_weights is 'gausian': .*boolean.* or .*'gaussian'"),
    ("sft.lora", {"r": 4}, "sft.lora holds r, which srlib sets itself"),
    ("grpo.trainer", {"epsilon_hi": 0.3}, "'epsilon_hi'; did you mean 'epsilon_high'. .of GRPOConfig"),
    ("grpo.trainer", {"generation_batch_size": 3}, "GRPOConfig refuses generation_batch_size: .*divisible"),
    ("grpo.trainer", {"use_vllm": True}, "grpo.trainer holds use_vllm, which srlib sets itself"),
    ("sft.report_to", "tensorbord", "sft.report_to is 'tensorbord': tensorbord is not supported, only .*tensorboard"),
    ("sft.report_to", "wandb", "sft.report_to is 'wandb': WandbCallback requires wandb to be installed"),
    ("grpo.report_to", "trackio", "grpo.report_to is 'trackio': TrackioCallback requires trackio to be installed"),
]


@pytest.mark.parametrize(("setting", "value", "message"), REFUSED)
def test_what_a_library_refuses_is_said_before_the_first_stage(setting, value, message, tmp_path, monkeypatch, capsys):
    """In one line, of a run that would begin with the pair; and before a training's own stage."""
    for tracker in ("wandb", "trackio"):
        monkeypatch.setattr(integration_utils, f"is_{tracker}_available", lambda: False)
    p = load("params/smoke.yaml", **{"outputs": str(tmp_path), setting: value})
    monkeypatch.setattr(pipeline, "run_stage", lambda *a: pytest.fail("a stage runs"))
    with pytest.raises(SrlibError, match=message) as error:
        pipeline.run(p)
    stage = "02_sft" if setting.startswith("sft") else "03_grpo"
    assert str(error.value).startswith(f"{stage}: ") and "\n" not in str(error.value)
    for other in {*STAGES} - {stage}:
        if other != "06_reward_ablation":
            require(p, other, [*STAGES])


def test_nothing_is_imported_where_nothing_is_passed_on(tmp_path, monkeypatch):
    """A run of which every stage is complete is looked through in a second."""
    for module in (sft, grpo):
        monkeypatch.setattr(module, "check", lambda p: pytest.fail("it is checked"))
    p = load("params/smoke.yaml", outputs=str(tmp_path))
    for stage in ("02_sft", "03_grpo"):
        require(p, stage, [*STAGES])


def test_what_can_be_passed_on_is(tmp_path):
    changes = {"sft.trainer": {"weight_decay": 1, "optim": "adamw_torch"}, "grpo.trainer": {"epsilon_high": 0.28}}
    p = load("params/smoke.yaml", **{"outputs": str(tmp_path), "sft.lora": {"use_rslora": True}, **changes})
    for stage in ("02_sft", "03_grpo"):
        require(p, stage, [*STAGES])


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_what_a_tracker_keeps_is_no_part_of_what_a_stage_made(tmp_path, tracker):
    """`wandb sync` leaves a mark beside a run: the stage would look damaged."""
    (tmp_path / "log.json").write_text("[]")
    made = digests.of_path(tmp_path)
    (tmp_path / tracker).mkdir()
    (tmp_path / tracker / "run.synced").touch()
    assert digests.of_path(tmp_path) == made
