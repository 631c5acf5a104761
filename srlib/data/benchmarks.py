"""Problem sets by name: where they are, how their rows are read, how a model is asked, how often.

In the params a name stands in the place of a file: `data: {test: aime24}`. Behind a colon stands a
copy of the set as JSONL (`math500:data/math500.jsonl`), or which of the procedural sets
(`reasoning_gym:chain_sum`). How a model is asked is `prompt` of the source: for models of the R1 and
Qwen families and other chat models `boxed` (all in the user's turn, the chat template adds the rest),
for base models `base`, or any text with {question} in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from srlib import SrlibError
from srlib.params import Offload, Params, Source, nearest

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Benchmark:
    """A named set: its rows, and how often each problem is sampled where accuracies are published."""

    source: Source | None  # on the hub; None: made by a procedure
    fields: Callable[[Row, int], Row]  # of a row and its number: id, prompt, answer, meta; unchecked
    samples: int = 1
    prompt: str = "boxed"
    quick: int | None = 50  # problems of the quick protocol; None: all


class Protocol(NamedTuple):
    """How stage 05 samples."""

    offload: Offload
    samples: int
    n_problems: int | None  # None: all


def _maths(row: Row, number: int) -> Row:
    meta = {key: row[key] for key in ("level", "subject") if key in row}
    return {"id": row.get("unique_id", row.get("id")), "prompt": row["problem"], "answer": row["answer"], "meta": meta}


def _gsm8k(row: Row, number: int) -> Row:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    steps = row["answer"].count("<<")  # calculations in its worked solution
    return {"id": row.get("idx"), "prompt": row["question"], "answer": answer, "meta": {"level": steps}}


def _gpqa(row: Row, number: int) -> Row:
    """The order of the choices is drawn by the question, so it is the same in every run."""
    choices = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = random.Random(row["Question"]).sample(range(4), 4)
    lines = "\n".join(f"({LETTERS[i]}) {choices[place].strip()}" for i, place in enumerate(order))
    question = f"{row['Question'].strip()}\n\n{lines}\n\nThe answer is the letter of one of these choices."
    meta = {"subject": row.get("Subdomain")}
    return {"id": row.get("Record ID"), "prompt": question, "answer": LETTERS[order.index(0)], "meta": meta}


def _gym(row: Row, number: int) -> Row:
    """A few sets have no answers, or blank ones: their verifiers decide."""
    name, answer = row["metadata"].get("source_dataset", ""), str(row["answer"] or None)
    return {"id": f"{name}-{number}", "prompt": row["question"], "answer": answer, "meta": {"reasoning_gym": row}}


NAMES = {
    "aime24": Benchmark(Source(path="HuggingFaceH4/aime_2024"), _maths, 64, quick=None),
    "aime25": Benchmark(Source(path="yentinglin/aime_2025"), _maths, 64, quick=None),
    "math500": Benchmark(Source(path="HuggingFaceH4/MATH-500", split="test"), _maths, 4),
    "gpqa_diamond": Benchmark(Source(path="Idavidrein/gpqa", config="gpqa_diamond"), _gpqa, 8),
    "gsm8k": Benchmark(Source(path="openai/gsm8k", config="main", split="test"), _gsm8k, 4),
    "reasoning_gym": Benchmark(None, _gym),
    "arith": Benchmark(None, lambda row, number: row, prompt="plain"),
}
PROCEDURAL = 500  # problems a procedural set has, if no number is asked for


def find(source: Source) -> Benchmark | None:
    """The benchmark a source names, if it names one."""
    return NAMES.get(source.path.partition(":")[0])


def origin(source: Source) -> Source | None:
    """Where the rows of a named set are: in a copy, or on the hub; None: it is made by a procedure."""
    benchmark, which = find(source), source.path.partition(":")[2]
    if benchmark is None or benchmark.source is None:
        return None
    if which:
        return Source(path=which)
    given = {name: value for name in ("split", "config", "revision") if (value := getattr(source, name)) is not None}
    return benchmark.source.model_copy(update=given)


def check(source: Source) -> None:
    """What else is said of a source must be something that it has.

    Raises:
        SrlibError: a split, a configuration or a revision of a file or of a set that is made by a procedure, or columns of a
            named set.
    """
    name, _, which = source.path.partition(":")
    benchmark = NAMES.get(name)
    hub = not which and benchmark.source is not None if benchmark else source.file is None
    for part in ("split", "config", "revision"):
        value = getattr(source, part)
        if value is not None and not hub and (part, name) != ("split", "arith"):
            raise SrlibError(f"{source.path} is no data set on the hub, and has no {part} {value!r}: leave it away.")
    if benchmark and source.columns:
        raise SrlibError(
            f"{source.path} is a named set, which has columns of its own: leave `columns` away, or give the path "
            "alone, without the name."
        )


def procedural(source: Source, n: int | None, seed: int) -> Iterator[Row]:
    """`n` rows of a set that is made by a procedure; without a number 500.

    Raises:
        SrlibError: reasoning_gym has no such set, or arith no such split.
    """
    name, _, which = source.path.partition(":")
    n = n or PROCEDURAL
    if name == "arith":
        from srlib.data import arith

        split = source.split or "test"
        if split not in arith.SPLITS:
            raise SrlibError(f"arith has no split {split!r}, but {', '.join(arith.SPLITS)}.")
        stream = arith.generate(source._world, split, seed)
        return (next(stream).model_dump() for _ in range(n))
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if which not in DATASETS:
        near = nearest(which, list(DATASETS))
        hint = f"; did you mean reasoning_gym:{near}?" if near else "."
        raise SrlibError(f"reasoning_gym has no set {which!r}{hint}")
    return (dict(row) for row in reasoning_gym.create_dataset(which, size=n, seed=seed))


def protocol(p: Params) -> Protocol:
    """How stage 05 samples: by its own settings, or by a preset laid over them.

    `published` is what accuracies of R1-Distill models are published with: temperature 0.6, top-p 0.95,
    no top-k, 32,768 tokens, all problems, 64 samples of each in AIME, 8 in GPQA, 4 in the others. `quick` is for a
    look: 4,096 tokens, 50 problems (AIME: all), one sample.
    """
    e, benchmark = p.evaluate, find(p.test)
    if e.protocol == "own":
        return Protocol(p.offload, e.samples_per_problem, e.n_problems)
    quick = e.protocol == "quick"
    update = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "max_tokens": 4096 if quick else 32_768}
    offload = p.offload.model_copy(update=update)
    if benchmark is None or benchmark.source is None:
        samples, n = (1, min(50, e.n_problems)) if quick else (e.samples_per_problem, e.n_problems)
        return Protocol(offload, samples, n)
    return Protocol(offload, 1 if quick else benchmark.samples, benchmark.quick if quick else None)
