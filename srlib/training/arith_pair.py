"""The models of the arithmetic world: a small and a big one, trained here from scratch."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from srlib.data import problems
from srlib.data.arith import generate, tokenizer
from srlib.data.rows import Problem
from srlib.params.stages import Arith, ArithModel


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


def train(network: Qwen2ForCausalLM, config: Arith, shape: ArithModel, seed: int, name: str) -> list[float]:
    """Train on fresh problems of the `train` split, loss on the trace alone.

    Muon for the matrices inside the layers, AdamW for embeddings, norms and biases, both with a
    linear decay: at this size it needs about a third of the steps of AdamW alone.

    Returns:
        the loss of every step, in nats a token.
    """
    encode = tokenizer()
    stream = generate(config, "train", seed)
    named = list(network.named_parameters())
    matrices = [p for key, p in named if p.ndim == 2 and "embed" not in key]
    others = [p for key, p in named if p.ndim != 2 or "embed" in key]
    optimizers = [
        torch.optim.Muon(matrices, shape.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, shape.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
    ]
    warmup = 20
    schedule = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min((i + 1) / warmup, 1 - i / shape.train_steps))
        for o in optimizers
    ]
    network.train()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # at this size a second thread costs more than it gives
    losses = []
    progress = tqdm(range(shape.train_steps), desc=f"train {name}", mininterval=1)
    for _ in progress:
        batch = [next(stream) for _ in range(config.batch_size)]
        loss = network(**_collate(encode, batch)).loss
        loss.backward()
        clip_grad_norm_(network.parameters(), 1.0)
        for part in (*optimizers, *schedule):
            part.step()
        network.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    torch.set_num_threads(threads)
    network.eval()
    return losses


def make_pair(config: Arith, seed: int, folder: Path) -> dict[str, list[float]]:
    """Train the small and the big model and save each, with its tokenizer, under `folder`.

    A pair that is already there, made with the same settings and seed, is kept.

    Returns:
        the losses of `small` and `big`.
    """
    made = {"seed": seed, **config.model_dump(exclude={"n_traces", "n_test"})}
    record = folder / "pair.json"
    if record.is_file() and (kept := json.loads(record.read_text()))["made"] == made:
        print(f"kept the pair in {folder.name}: its settings are the same")
        return kept["losses"]
    record.unlink(missing_ok=True)
    encode = tokenizer()
    losses = {}
    for name, shape in (("small", config.small), ("big", config.big)):
        network = model(shape, len(encode), seed)
        losses[name] = train(network, config, shape, seed, name)
        network.save_pretrained(folder / name)
        encode.save_pretrained(folder / name)
    record.write_text(json.dumps({"made": made, "losses": losses}))
    return losses


def _collate(encode: Qwen2Tokenizer, batch: list[Problem]) -> dict[str, torch.Tensor]:
    """Right-padded ids (B, T) and labels (B, T); causal attention needs no mask for padding at the end."""
    ids, labels = [], []
    for problem in batch:
        prompt = problems.encode_prompt(encode, problem.prompt)
        trace = encode.encode(problem.trace) + [encode.eos_token_id]
        ids.append(torch.tensor(prompt + trace))
        labels.append(torch.tensor([-100] * len(prompt) + trace))
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=encode.pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
