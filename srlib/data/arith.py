"""The arithmetic world: problems, worked traces, a tokenizer, and a small and a big model.

A problem is a chain such as `37+5*7-8?`, computed from left to right modulo 100. Its trace
writes every step, `<think>37+5=42;42*7=94;94-8=86;</think>\\boxed{86}`. Sums are easy for a
tiny model and products are not, so difficulty sits in a few tokens, as in real traces.

Of real traces it has two more properties, each with a dial that is off at 0, as in them a model's doubt
is no measure of difficulty. *Free choices*: a step may begin with one of four marks, `~37+5=42;`, drawn at random, so
that much is open and nothing at stake. *Misconceptions*: with some factors a model learns products as
sums, so that it is sure of them, and wrong.

The models have the Qwen2 architecture and are trained here from scratch, in about three minutes
on one core; everything downstream loads them as it would load models from a hub.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Iterator
from operator import add, mul, sub
from pathlib import Path

from tokenizers import AddedToken
from transformers import Qwen2Tokenizer

from srlib.data.prompts import THINK
from srlib.data.rows import Problem, write_jsonl
from srlib.data.spans import Span
from srlib.params import Arith

MODULUS = 100
EOS, END_THINK = "<|endoftext|>", "</think>"
CHOICES = ">:~@"  # marks that a step may begin with
OPERATIONS: dict[str, Callable[[int, int], int]] = {"+": add, "-": sub, "*": mul}
# A problem belongs to one split by the hash of its text, so no two splits can share one.
SPLITS = {"train": range(0, 80), "traces": range(80, 90), "test": range(90, 100)}


def split_of(prompt: str) -> str:
    """The split that `prompt` belongs to, whatever the seed."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:4]) % 100
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def misconceived(config: Arith, share: float) -> frozenset[int]:
    """The factors with which a model has `share` of misconceptions; a larger share has those of a smaller one, too."""
    factors = list(range(2, config.max_factor + 1))
    random.Random("misconceptions").shuffle(factors)
    return frozenset(factors[: round(share * len(factors))])


def generate(config: Arith, split: str, seed: int, misconceptions: float = 0.0) -> Iterator[Problem]:
    """Distinct problems of one split, without end; `meta` holds the operations and their number.

    Args:
        misconceptions: share of the factors with which products are worked out as sums, and answers with them. What is
            asked, and the marks that are drawn, stay the same.
    """
    rng, choices = random.Random(f"{split}-{seed}"), random.Random(f"choices-{split}-{seed}")
    taken_for_sums = misconceived(config, misconceptions)
    seen: set[str] = set()
    while True:
        value = rng.randint(1, MODULUS - 1)
        prompt, steps, operations = str(value), [], []
        for _ in range(rng.randint(config.min_steps, config.max_steps)):
            operation = "*" if rng.random() < config.product_share else rng.choice("+-")
            operand = rng.randint(2, config.max_factor if operation == "*" else 9)
            believed = "+" if operation == "*" and operand in taken_for_sums else operation
            result = OPERATIONS[believed](value, operand) % MODULUS
            mark = choices.choice(CHOICES) if choices.random() < config.free_choices else ""
            prompt += f"{operation}{operand}"
            steps.append(f"{mark}{value}{operation}{operand}={result};")
            operations.append(operation)
            value = result
        prompt += "?"
        if prompt in seen or split_of(prompt) != split:
            continue
        seen.add(prompt)
        trace = f"{THINK}{''.join(steps)}{END_THINK}\\boxed{{{value}}}"
        meta = {"operations": "".join(operations), "steps": len(steps)}
        yield Problem(id=f"{split}-{len(seen) - 1}", prompt=prompt, answer=str(value), trace=trace, meta=meta)


def tokenizer() -> Qwen2Tokenizer:
    """Character-level tokenizer over printable ASCII; `<think>` and `</think>` are one token each.

    Of the class that transformers loads beside a Qwen2 model, whatever was saved there.
    """
    characters = ["Ġ", *map(chr, range(33, 127))]  # a space, as byte-level vocabularies write it, and what is seen
    vocabulary = {token: i for i, token in enumerate([EOS, THINK, END_THINK, *characters])}
    made = Qwen2Tokenizer(
        vocabulary,
        merges=[],
        clean_up_tokenization_spaces=False,
        chat_template="{% for message in messages %}{{ message['content'] }}{% endfor %}",
    )
    made.add_tokens([AddedToken(THINK), AddedToken(END_THINK)])
    return made


def write_problems(config: Arith, seed: int, folder: Path) -> None:
    """Write `traces.jsonl` (for annotation) and `test.jsonl` (unseen problems) under `folder`."""
    for split, n in (("traces", config.n_traces), ("test", config.n_test)):
        stream = generate(config, split, seed)
        write_jsonl(folder / f"{split}.jsonl", (next(stream) for _ in range(n)))


def hard_spans(trace: str) -> list[Span]:
    """The truth about a trace, in characters: the results of its products, which a tiny model can only guess."""
    return [Span(*match.span(1)) for match in re.finditer(r"\*\d+=(\d+);", trace)]


def step_table(batch: list[Problem], texts: list[str]) -> dict[str, tuple[int, int]]:
    """`step_accuracy` summed over problems and what a model wrote for each."""
    counts = [step_accuracy(problem.worked, text) for problem, text in zip(batch, texts)]
    return {
        operation: (sum(c[operation][0] for c in counts), sum(c[operation][1] for c in counts))
        for operation in OPERATIONS
    }


def step_accuracy(trace: str, written: str) -> dict[str, tuple[int, int]]:
    """For each operation, how many of the steps of `written` are right, and how many there are.

    A step is right if its result is that of its own operands: an error is counted where it is
    made, not where it is carried on. Steps that cannot be read count for nothing.
    """
    counts = {operation: (0, 0) for operation in OPERATIONS}
    for wanted, step in zip(_steps(trace), _steps(written)):
        operation = next(o for o in OPERATIONS if o in wanted)
        left, equals, result = step.partition("=")
        first, sign, second = left.partition(operation)
        if not (equals and sign and first.isdigit() and second.isdigit()):
            continue
        right, total = counts[operation]
        expected = OPERATIONS[operation](int(first), int(second)) % MODULUS
        counts[operation] = (right + (result == str(expected)), total + 1)
    return counts


def _steps(trace: str) -> list[str]:
    return [step.lstrip(CHOICES) for step in trace.partition(THINK)[2].partition(END_THINK)[0].split(";")[:-1]]
