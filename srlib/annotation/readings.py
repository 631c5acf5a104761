"""What a model reads of worked traces: a number for each token, kept, so that no trace is read twice.

A journal of readings is named after what decides them: the model, what is read, and the code and
packages it is read with; a record in it after the ids. What an annotator makes of the numbers, such
as marks above a threshold, is in neither.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from contextlib import nullcontext
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from tqdm.auto import tqdm

from srlib.data import digests
from srlib.data.journal import Journal
from srlib.data.modules import Code
from srlib.data.prompts import encode_prompts
from srlib.data.rows import Annotated, Problem
from srlib.engine.protocol import Engine
from srlib.params import ModelSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

What = Literal["score", "doubts"]  # methods of an engine


class Passage(NamedTuple):
    """A prompt and a worked trace, in ids."""

    ids: np.ndarray
    prompt: int  # how many of the ids are the prompt's

    @property
    def key(self) -> str:
        return f"{sha256(self.ids.tobytes()).hexdigest()[:24]}:{self.prompt}"


def passages(
    problems: Sequence[Problem | Annotated], tokenizer: PreTrainedTokenizerBase, hint: str = ""
) -> list[Passage]:
    """The traces of `problems` behind their prompts, as a model reads them; `hint` stands behind every problem."""
    prompts = encode_prompts(tokenizer, [problem.prompt + hint for problem in problems])
    traces = (tokenizer.encode(problem.worked, add_special_tokens=False) for problem in problems)
    return [Passage(np.array(a + b, dtype="<i4"), len(a)) for a, b in zip(prompts, traces)]


def journal(folder: Path, spec: ModelSpec, what: What) -> Path:
    """The file in which what a model reads is kept."""
    code = {name: digest for name, digest in Code().used(["srlib.engine"]).items() if name.startswith("srlib.engine")}
    decides = [digests.of_model(spec), code, [version(package) for package in ("torch", "transformers")]]
    return folder / f"{what}-{digests.of(decides, 8)}.journal.jsonl"


def read(
    engine: Engine, what: What, asked: Sequence[Passage], batch_size: int, file: Path | None = None
) -> list[np.ndarray]:
    """What a model reads of each token of each trace, in float32.

    Args:
        batch_size: traces that are read at a time; those of like length together, so that little is padding.
        file: what it holds is not read again, and what is read is added, batch by batch; see `journal`.
    """
    # As text, four bytes a number and a third: 18,000 traces of 5,500 tokens are 100 million numbers,
    # and 0.53 GB here and on the disk. In decimals they would be 2 GB.
    with Journal(file) if file else nullcontext() as kept:
        done: dict[str, dict[str, Any]] = kept.records if kept else {}
        waiting = {passage.key: passage for passage in asked}
        todo = sorted((x for key, x in waiting.items() if key not in done), key=lambda passage: len(passage.ids))
        bar = tqdm(total=len(todo), desc=what, unit="trace", mininterval=1, disable=not todo)
        for at in range(0, len(todo), batch_size):
            batch = todo[at : at + batch_size]
            values = getattr(engine, what)([passage.ids.tolist() for passage in batch])
            records = [
                {"key": passage.key, "float32": _packed(numbers[passage.prompt - 1 :])}
                for passage, numbers in zip(batch, values)
            ]
            if kept:
                kept.append(*records)
            else:
                done |= {record["key"]: record for record in records}
            bar.update(len(batch))
        bar.close()
        return [_unpacked(done[passage.key]["float32"]) for passage in asked]


def _packed(numbers: Sequence[float]) -> str:
    return b64encode(np.array(numbers, dtype="<f4").tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(b64decode(text), dtype="<f4")
