"""The models of the arithmetic world: a small and a big one, trained here from scratch.

Each is trained by a process of its own, on one thread: at this size a second thread costs more
than it gives, and a second core is better used for the second model.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer
from transformers.utils import logging
from typing_extensions import TypedDict

from srlib import SrlibError
from srlib.data import digests
from srlib.data.arith import generate, tokenizer
from srlib.data.prompts import encode_prompts
from srlib.data.rows import Problem, read_json, write_json
from srlib.engine.files import saving
from srlib.params.data import Arith, ArithModel


def model(config: ArithModel, vocabulary: int, seed: int) -> Qwen2ForCausalLM:
    """An untrained model; head size 32 keeps it loadable by every engine."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with its step size `match_rms_adamw`, in the precision of the weights.

    torch's own orthogonalises in bf16, whatever the weights are, and has no argument for another
    type. A CPU without instructions for bf16 emulates it, at twenty times the time of fp32; one
    that has them gains nothing on matrices of this size, and would round unlike the next.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step, with Nesterov's momentum; `closure` is not used, and nothing is returned."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(state["momentum"], group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values near 1, by five steps of Newton and Schulz, as `torch.optim.Muon`'s."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), wide, beta=3.4445)
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def train(network: Qwen2ForCausalLM, config: Arith, shape: ArithModel, seed: int) -> Iterator[float]:
    """Train on fresh problems of the `train` split, loss on the trace alone.

    Muon for the matrices inside the layers, AdamW for embeddings, norms and biases, both with a
    linear decay: at this size it needs about a third of the steps of AdamW alone.

    Yields:
        the loss of every step, in nats a token, after the step.
    """
    encode = tokenizer()
    stream = generate(config, "train", seed, shape.misconceptions)
    named = list(network.named_parameters())
    matrices = [p for key, p in named if p.ndim == 2 and "embed" not in key]
    others = [p for key, p in named if p.ndim != 2 or "embed" in key]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(matrices, shape.learning_rate, weight_decay=0.01),
        torch.optim.AdamW(others, shape.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    warmup = 20
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / warmup, 1 - i / shape.train_steps))
        for o in optimizers
    ]
    network.train()
    for _ in range(shape.train_steps):
        batch = [next(stream) for _ in range(config.batch_size)]
        loss = network(**_collate(encode, batch)).loss
        loss.backward()
        clip_grad_norm_(network.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        for decay in schedule:
            decay.step()
        network.zero_grad()
        yield loss.item()
    network.eval()


def make_pair(config: Arith, seed: int, folder: Path) -> dict[str, list[float]]:
    """Train the small and the big model side by side; each is saved, with its tokenizer, under `folder`.

    A model that is already there, made with the same settings and seed, is kept.

    Returns:
        the losses of `small` and `big`.

    Raises:
        SrlibError: the training of one failed; what it said stands above.
    """
    names = ("small", "big")
    kept = [name for name in names if _losses(config, seed, folder, name)]
    if kept:
        print(f"kept in {folder.name}, as made with the same settings: {' and '.join(kept)}")
    with ExitStack() as stack, selectors.DefaultSelector() as ready:
        for place, name in enumerate(name for name in names if name not in kept):
            process, pipe = _start(config, seed, folder, name)
            stack.enter_context(process)
            stack.callback(process.kill)  # comes before the wait for it: whatever ends one ends both
            stack.enter_context(pipe)
            steps = getattr(config, name).train_steps
            bar = stack.enter_context(tqdm(total=steps, desc=f"train {name}", mininterval=1, position=place))
            ready.register(pipe, selectors.EVENT_READ, (name, process, pipe, bar))
        while ready.get_map():
            for key, _ in ready.select():
                name, process, pipe, bar = key.data
                try:
                    bar.set_postfix(loss=f"{pipe.recv():.3f}", refresh=False)
                    bar.update()
                except EOFError:
                    ready.unregister(pipe)
                    if process.wait():
                        raise SrlibError(
                            f"arith: the training of the {name} model failed, with status {process.returncode}; "
                            "what it said stands above."
                        ) from None
    return {name: _losses(config, seed, folder, name) for name in names}


def _start(config: Arith, seed: int, folder: Path, name: str) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that trains one model, and the pipe that its losses come through."""
    ours, theirs = Pipe(duplex=False)
    job = json.dumps([config.model_dump(), seed, str(folder), name])
    command = [sys.executable, "-m", "srlib.training.arith_pair", str(theirs.fileno()), job]
    with theirs:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]), ours


def _work(pipe: Connection, config: Arith, seed: int, folder: Path, name: str) -> None:
    """What the process does."""
    torch.set_num_threads(1)
    logging.disable_progress_bar()  # of one file that is written: it would stand in the run's own lines
    (folder / f"{name}.json").unlink(missing_ok=True)
    encode = tokenizer()
    network = model(getattr(config, name), len(encode), seed)
    losses = []
    for loss in train(network, config, getattr(config, name), seed):
        losses.append(loss)
        pipe.send(loss)  # fails when nobody is there to read it, which ends this process, too
    with saving(folder / name):
        network.save_pretrained(folder / name)
        encode.save_pretrained(folder / name)
    kept = {"made": _made(config, seed, name), "files": digests.of_path(folder / name), "losses": losses}
    write_json(folder / f"{name}.json", kept)


class Kept(TypedDict):
    """What is kept of the making of a model."""

    made: dict[str, Any]
    files: str
    losses: list[float]


def _losses(config: Arith, seed: int, folder: Path, name: str) -> list[float]:
    """The losses of a model that is there as it was left, made with these settings; else none."""
    with suppress(SrlibError):  # no record, or a damaged one
        kept = read_json(folder / f"{name}.json", Kept)
        if kept["made"] == _made(config, seed, name) and kept["files"] == digests.of_path(folder / name):
            return kept["losses"]
    return []


def _made(config: Arith, seed: int, name: str) -> dict[str, Any]:
    """All that decides what a model becomes."""
    other = {"small": "big", "big": "small"}[name]
    return {"seed": seed, **config.model_dump(exclude={"n_traces", "n_test", other})}


def _collate(encode: Qwen2Tokenizer, batch: list[Problem]) -> dict[str, torch.Tensor]:
    """Right-padded ids (B, T) and labels (B, T); causal attention needs no mask for padding at the end."""
    prompts = encode_prompts(encode, [problem.prompt for problem in batch])
    traces = encode([problem.trace for problem in batch])["input_ids"]
    ids, labels = [], []
    for prompt, trace in zip(prompts, traces):
        trace = trace + [encode.eos_token_id]
        ids.append(torch.tensor(prompt + trace))
        labels.append(torch.tensor([-100] * len(prompt) + trace))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=encode.pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


if __name__ == "__main__":
    given, seed, folder, name = json.loads(sys.argv[2])
    try:
        _work(Connection(int(sys.argv[1]), readable=False), Arith(**given), seed, Path(folder), name)
    except SrlibError as error:
        sys.exit(f"arith: {error}")
