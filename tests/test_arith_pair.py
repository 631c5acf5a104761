"""Training the pair of the arithmetic world: the optimizer, and the two processes."""

import psutil
import pytest
import torch
from safetensors.torch import load_file

from srlib import SrlibError
from srlib.data import arith
from srlib.params import Arith
from srlib.training import arith_pair

CONFIG = Arith(
    min_steps=1,
    max_steps=2,
    small={"train_steps": 30},
    big={"train_steps": 3, "num_attention_heads": 1, "hidden_size": 64},
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained pair: its folder and its losses."""
    folder = tmp_path_factory.mktemp("pair")
    return folder, arith_pair.make_pair(CONFIG, 0, folder)


@pytest.fixture
def children():
    """Processes that are started in the test, once called; none of them may live on."""
    before = set(psutil.Process().children(recursive=True))
    yield lambda: set(psutil.Process().children(recursive=True)) - before
    _, alive = psutil.wait_procs(set(psutil.Process().children(recursive=True)) - before, timeout=10)
    assert not alive


def weights(folder, name):
    return folder / name / "model.safetensors"


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_muon_is_torchs_but_for_rounding(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    moved = {}
    for name, optimizer, more in (
        ("ours", arith_pair.Muon, {}),
        ("torch's", torch.optim.Muon, {"adjust_lr_fn": "match_rms_adamw"}),
    ):
        weight = torch.nn.Parameter(start.clone())
        steps = optimizer([weight], lr=0.01, weight_decay=0.1, **more)
        for gradient in gradients:
            weight.grad = gradient.clone()
            steps.step()
        moved[name] = weight.detach() - start
    assert (moved["ours"] - moved["torch's"]).norm() < 0.01 * moved["torch's"].norm()


def test_orthogonal_does_not_round_to_bf16():
    """What makes it fast where bf16 is emulated, and the same where it is not."""
    torch.manual_seed(0)
    made = arith_pair.orthogonal(torch.randn(32, 96))
    assert made.dtype == torch.float32 and not torch.equal(made, made.bfloat16().float())
    assert torch.linalg.svdvals(made).sub(1).abs().max() < 0.5


def test_the_small_model_learns_something(made):
    losses = made[1]["small"]
    assert len(losses) == 30 and len(made[1]["big"]) == 3
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("name", ["small", "big"])
def test_side_by_side_is_as_one_after_the_other(made, name):
    """The losses, and every bit of the weights."""
    folder, losses = made
    shape = getattr(CONFIG, name)
    network = arith_pair.model(shape, len(arith.tokenizer()), 0)
    assert list(arith_pair.train(network, CONFIG, shape, 0)) == losses[name]
    saved = load_file(weights(folder, name))
    assert saved and all(torch.equal(network.state_dict()[key], value) for key, value in saved.items())


def test_what_is_there_is_kept(made, capsys):
    folder, losses = made
    stamps = {name: weights(folder, name).stat().st_mtime_ns for name in ("small", "big")}
    big = weights(folder, "big").read_bytes()

    def redone():
        changed = {n for n, stamp in stamps.items() if weights(folder, n).stat().st_mtime_ns != stamp}
        stamps.update({n: weights(folder, n).stat().st_mtime_ns for n in changed})
        return changed

    assert arith_pair.make_pair(CONFIG.model_copy(update={"n_test": 7}), 0, folder) == losses  # how many are written
    assert not redone() and "small and big" in capsys.readouterr().out
    (folder / "big.json").unlink()  # as if it had been killed after the small one
    assert arith_pair.make_pair(CONFIG, 0, folder) == losses
    assert redone() == {"big"} and weights(folder, "big").read_bytes() == big
    longer = Arith(**{**CONFIG.model_dump(), "small": {"train_steps": 2}})
    assert len(arith_pair.make_pair(longer, 0, folder)["small"]) == 2
    assert redone() == {"small"}
    assert arith_pair.make_pair(longer, 1, folder)["big"] != losses["big"]
    assert redone() == {"small", "big"}


def test_a_failure_of_one_ends_both(tmp_path, children, capfd):
    (tmp_path / "big.json").mkdir()  # a folder where a file should be
    long = Arith(**{**CONFIG.model_dump(), "small": {"train_steps": 1_000_000}})
    with pytest.raises(SrlibError, match="the training of the big model failed, with status 1"):
        arith_pair.make_pair(long, 0, tmp_path)
    assert "Error" in capfd.readouterr().err  # what the process said
    assert not children() and not (tmp_path / "small.json").exists()


def test_an_interrupt_ends_both(tmp_path, children, monkeypatch):
    seen = []

    def interrupted(bar, n=1):
        seen.append(children())
        raise KeyboardInterrupt

    monkeypatch.setattr(arith_pair.tqdm, "update", interrupted)
    long = {"train_steps": 1_000_000}
    with pytest.raises(KeyboardInterrupt):
        arith_pair.make_pair(Arith(small=long, big=long), 0, tmp_path)
    assert len(seen[0]) == 2  # both were at work; the fixture looks whether they are gone


def test_a_process_nobody_listens_to_ends(tmp_path):
    """The notebook's kernel was killed: its processes notice at the next step."""
    process, pipe = arith_pair._start(
        Arith(**{**CONFIG.model_dump(), "small": {"train_steps": 1_000_000}}), 0, tmp_path, "small"
    )
    pipe.recv()
    pipe.close()
    assert process.wait(timeout=60) != 0
    assert not (tmp_path / "small.json").exists()
