"""The engine and the trainings on a GPU, beside the CPU: `make test-gpu`. The same bodies run on the CPU in every test run."""

import math
import time

import pytest
import torch

from srlib import engine
from srlib.decoding.policies import Learned
from srlib.decoding.scheduler import Offloader
from srlib.engine import Request
from srlib.engine.models import load_model
from srlib.engine.transformers import TransformersEngine
from srlib.params import ModelSpec
from srlib.training import grpo
from tests.conftest import random_model
from tests.test_grpo import CONFIG, OFFLOAD, SPEED, make_tuned, problems  # noqa: F401  (a fixture)

on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@on_each_device
def test_greedy_traces_are_those_that_the_cpu_writes_one_by_one(folders, prompts, engines, device):
    on_device = [engine.load(ModelSpec(path=path, device=device, dtype="float32"), 64) for path in folders]
    settings = {"max_tokens": 64, "control_chunk": 4}
    expected = Offloader(*engines, Learned(), **settings, batch_size=1).run(prompts)
    written = Offloader(*on_device, Learned(), **settings, batch_size=64).run(prompts)
    assert {each.model.device.type for each in on_device} == {device}
    assert any(trace.handovers for trace in written) and not any(trace.error for trace in written)
    same = [(a.ids, a.owners, a.finish) == (b.ids, b.owners, b.finish) for a, b in zip(expected, written)]
    assert sum(same) >= 63  # a tie may fall the other way


@on_each_device
def test_four_bits_mean_what_they_mean_unpacked(folders, prompts, device):
    four_bits = ModelSpec(path=folders[0], quantization="nf4", dtype="float32")
    packed = engine.load(four_bits.model_copy(update={"device": device}), 8)
    kinds = {(m.weight.dtype, m.weight.quant_type) for m in packed.model.modules() if type(m).__name__ == "Linear4bit"}
    assert kinds == {(torch.uint8, "nf4")}
    assert {weight.device.type for weight in packed.model.parameters()} == {device}
    model, tokenizer = load_model(four_bits.model_copy(update={"device": "cpu"}))
    unpacked = TransformersEngine(model.dequantize(), tokenizer, 8)
    whole = engine.load(ModelSpec(path=folders[0], device="cpu"), 8)
    ours, exact, other = (torch.tensor(sum(each.score(prompts[:8]), [])) for each in (packed, unpacked, whole))
    # On a CPU bitsandbytes multiplies in bf16.
    assert (ours - exact).abs().mean() < 0.1 * (ours - other).abs().mean()


@on_each_device
def test_two_steps_of_reinforcement(problems, tmp_path, device):  # noqa: F811
    tuned = make_tuned(tmp_path).model_copy(update={"device": device})
    big = engine.load(ModelSpec(path=tuned.path, device=device), 16)
    log = grpo.train(
        tuned, big, problems, CONFIG.model_copy(update={"max_steps": 2}), OFFLOAD, SPEED, 0, tmp_path / "run"
    )
    assert [record["step"] for record in log] == [1, 2]
    assert all(math.isfinite(record["loss"]) and math.isfinite(record["grad_norm"]) for record in log)
    before, after = (
        load_model(tuned.model_copy(update={"adapter": str(folder / "adapter"), "merge": False}))[0].state_dict()
        for folder in (tmp_path, tmp_path / "run")
    )
    adapter = [name for name in before if "lora_B" in name]
    assert adapter and not any(torch.equal(before[name], after[name]) for name in adapter)


@on_each_device
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_steps_a_second_beside_generate(tokenizer, device, batch, capsys):
    """Prints them; what is asserted is that both write the same, in as many steps."""
    steps = 32
    model = random_model(len(tokenizer), 3).to(device)
    model.generation_config.eos_token_id = None
    ids = torch.randint(5, len(tokenizer), (batch, 24), generator=torch.Generator().manual_seed(0)).to(device)

    def ours() -> list[list[int]]:
        made = TransformersEngine(model, tokenizer, slots=batch)
        return [request.ids for request in made.run(*(Request(made.open(row), max_new=steps) for row in ids.tolist()))]

    def generate() -> list[list[int]]:
        written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=steps, do_sample=False)
        return written[:, ids.shape[1] :].tolist()

    seconds, written = [], []
    for write in (ours, generate):
        write()  # to warm up
        began = time.perf_counter()
        written.append(write())  # lists: what a GPU has still to do is waited for
        seconds.append(time.perf_counter() - began)
    assert {len(row) for row in written[0]} == {steps}
    assert sum(a == b for a, b in zip(*written)) >= batch - batch // 16  # a tie may fall the other way
    with capsys.disabled():
        print(f"\n{device}, batch {batch}: {steps / seconds[0]:.0f} steps/s, generate {steps / seconds[1]:.0f}", end="")
