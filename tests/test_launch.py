"""Training in several processes, and in one that sees several GPUs."""

from __future__ import annotations

import json

import pytest
import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import TrainingArguments

from srlib import SrlibError
from srlib.data.rows import write_jsonl
from srlib.params import Params, load
from srlib.training import grpo, launch, sft
from tests.test_grpo import CONFIG, OFFLOAD, SPEED, big, problems, tuned  # noqa: F401  (fixtures)
from tests.test_sft import annotated


@pytest.fixture
def two_gpus(monkeypatch):
    """Two devices are seen, and training is not told to keep to the CPU, where the models are."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for module in (sft, grpo):
        monkeypatch.setattr(module, "device_of", lambda spec: "cuda")


def test_a_trainer_keeps_to_the_device_of_its_model(two_gpus, tuned, big, problems, tmp_path, monkeypatch):  # noqa: F811
    """One process that sees two GPUs: TRL refuses to spread a model over them, and is not asked to."""
    kept = []
    for module in (sft, grpo):
        monkeypatch.setattr(
            module, "on_one_device", lambda args, device: (launch.on_one_device(args, device), kept.append(args))
        )
    small = tuned.model_copy(update={"adapter": None})
    assert TrainingArguments(output_dir=str(tmp_path)).n_gpu == 2
    assert sft.train(small, annotated(8), load("params/smoke.yaml").sft, 0, tmp_path / "sft")
    assert grpo.train(tuned, big, problems, CONFIG, OFFLOAD, SPEED, 0, tmp_path / "grpo")
    assert [(args.n_gpu, args.device) for args in kept] == [(1, torch.device("cpu"))] * 2


def test_the_device_need_not_be_the_first(two_gpus, tmp_path, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    args, second = TrainingArguments(output_dir=str(tmp_path)), torch.device("cuda:1")
    launch.on_one_device(args, second)
    assert args.n_gpu == args.train_batch_size // args.per_device_train_batch_size == 1
    assert args.device == PartialState().device == current[0] == second


def test_each_process_loads_on_its_own_device():
    p = load("params/node.yaml", **{"pair.tuned": {"path": "a/b"}})
    q = launch.placed(p, torch.device("cuda:2"))
    assert (q.tuned.device, q.small.device, q.rollout_small.device) == ("cuda:2",) * 3
    assert q.pair.big == p.pair.big, "a server is where it is"
    q = launch.placed(load("params/gpu24.yaml", **{"pair.big.device": "cuda:0"}), torch.device("cuda:2"))
    assert (q.big.device, q.tuned.device) == ("cuda:2", "cuda:2")
    assert launch.placed(p, torch.device("cpu")) == p


@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_are_one_with_the_same_batch(tuned, tmp_path, capfd, method):  # noqa: F811
    """Of stage 02: same losses, nearly the same weights, though its parts are other; written and told once."""
    rows = [row.model_copy(update={"prompt": f"{i}*{i}+1?"}) for i, row in enumerate(annotated(16))]
    long = rows[0].model_copy(update={"prompt": "1" * 200, "id": "long"})
    write_jsonl(tmp_path / "annotated.jsonl", [*rows, long])
    given = {"annotated": str(tmp_path / "annotated.jsonl"), "epochs": 2, "batch_size": 8, "max_length": 128}
    given |= {"method": method, "learning_rate": 3e-3 if method == "lora" else 1e-4}
    made = ["adapter", "log.json", "merged"] if method == "lora" else ["log.json", "model"]
    p = Params(
        run="run",
        threads=1,
        outputs=str(tmp_path),
        pair={"small": {"path": tuned.path, "adapter": tuned.adapter}, "big": {"path": tuned.path}},
        sft={**given, "processes": 2, "gradient_accumulation_steps": 2, "gradient_checkpointing": True},
    )
    two = launch.launch(sft.run, p.sft.processes, p, p.stage_dir("02_sft"))
    told = capfd.readouterr().out
    assert told.count("1 of 17 traces are left out") == told.count("Truncating train dataset: 100%") == 1
    (tmp_path / "one").mkdir()
    alone = p.model_copy(update={"sft": p.sft.model_validate(given)})
    one = launch.launch(sft.run, alone.sft.processes, alone, tmp_path / "one")
    assert [record["loss"] for record in two] == pytest.approx([record["loss"] for record in one], abs=1e-4)
    assert [record["step"] for record in two] == [record["step"] for record in one] == [1, 2, 3, 4]
    folders = [tmp_path / "one", p.run_dir / "02_sft"]
    assert [sorted(file.name for file in folder.iterdir()) for folder in folders] == [made] * 2
    weights = "adapter/adapter_model.safetensors" if method == "lora" else "model/model.safetensors"
    first, second = (load_file(folder / weights) for folder in folders)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=1e-4), name
    assert json.loads((p.run_dir / "02_sft" / "log.json").read_text()) == two


@pytest.mark.parametrize("name", launch.SHARDING)
def test_what_shares_out_a_model_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv(name, "true")
    with pytest.raises(
        SrlibError, match=f"{name} is true, but what is trained is saved from one process.*: unset {name}"
    ):
        launch.launch(sft.run, 2, load("params/smoke.yaml"), tmp_path)


def test_a_gpu_for_each_process(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SrlibError, match="processes is 4, a GPU for each, but torch sees 2 here: set it to 2"):
        launch.launch(grpo.run, 4, load("params/node.yaml"), tmp_path)
