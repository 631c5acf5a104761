"""Problem sets by name: where they are, how their rows are read, how a model is asked, how often.

In the params a name stands in the place of a file: `data: {test: aime24}`. Behind a colon stands a
copy of the set as JSONL (`math500:data/math500.jsonl`), or which of the procedural sets
(`reasoning_gym:chain_sum`). How a model is asked is `prompt` of the source: for models of the R1 and
Qwen families and other chat models `boxed` (all in the user's turn, the chat template adds the rest),
for base models `base`, or any text with {question} in it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from srlib import SrlibError
from srlib.data.prompts import ask
from srlib.params import Offload, Params, Source, nearest

if TYPE_CHECKING:
    pass

Row = dict[str, Any]
LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Benchmark:
    """A named set: its rows, and how often each problem is sampled where accuracies are published."""

    source: Source | None  # on the hub; None: made by a procedure
    fields: Callable[[Row, int], Row]  # a row of it and its number: id, prompt, answer, meta
    samples: int = 1
    prompt: str = "boxed"
    quick: int | None = 50  # problems of the quick protocol; None: all


class Protocol(NamedTuple):
    """How stage 05 samples."""

    offload: Offload
    samples: int
    n_problems: int | None  # None: all


def _maths(row: Row, number: int) -> Row:
    identity = row.get("unique_id") or row.get("id") or number
    meta = {key: row[key] for key in ("level", "subject") if key in row}
    return {"id": str(identity), "prompt": row["problem"], "answer": str(row["answer"]), "meta": meta}


def _gsm8k(row: Row, number: int) -> Row:
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    steps = row["answer"].count("<<")  # calculations in its worked solution
    return {"id": str(row.get("idx", number)), "prompt": row["question"], "answer": answer, "meta": {"level": steps}}


def _gpqa(row: Row, number: int) -> Row:
    """The order of the choices is drawn by the question, so it is the same in every run."""
    choices = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    order = random.Random(row["Question"]).sample(range(4), 4)
    lines = "\n".join(f"({LETTERS[i]}) {choices[place].strip()}" for i, place in enumerate(order))
    question = f"{row['Question'].strip()}\n\n{lines}\n\nThe answer is the letter of one of these choices."
    meta = {"subject": row.get("Subdomain")}
    return {
        "id": str(row.get("Record ID", number)),
        "prompt": question,
        "answer": LETTERS[order.index(0)],
        "meta": meta,
    }


def _gym(row: Row, number: int) -> Row:
    name = row["metadata"].get("source_dataset", "")
    return {
        "id": f"{name}-{number}",
        "prompt": row["question"],
        "answer": str(row["answer"]),
        "meta": {"reasoning_gym": row},
    }


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


def rows(source: Source, n: int | None, seed: int, read: Callable[[Source], Iterable[Row]]) -> Iterator[Row]:
    """The fields of the problems of a named set, in order; of a procedural one `n`, else all.

    Args:
        read: gives the rows of a file or of a set on the hub.

    Raises:
        SrlibError: there is no such procedural set, or a row has not the columns of the benchmark.
    """
    name, _, which = source.path.partition(":")
    benchmark = NAMES[name]
    if benchmark.source is None:
        given = _procedural(name, which, n or PROCEDURAL, seed)
    else:
        given = read(Source(path=which) if which else benchmark.source)
    for number, row in enumerate(given):
        try:
            fields = benchmark.fields(row, number)
        except (KeyError, AttributeError) as error:
            raise SrlibError(f"{source.path}, row {number + 1} is no row of {name}: it has no {error}.") from None
        yield {**fields, "prompt": ask(fields["prompt"], source.prompt or benchmark.prompt)}


def protocol(p: Params) -> Protocol:
    """How stage 05 samples: by its own settings, or by a preset laid over them.

    `published` is what accuracies of R1-Distill models are published with: temperature 0.6, top-p 0.95,
    32,768 tokens, all problems, 64 samples of each in AIME, 8 in GPQA, 4 in the others. `quick` is for a
    look: 4,096 tokens, 50 problems (AIME: all), one sample.
    """
    e, benchmark = p.evaluate, find(p.test)
    if e.protocol == "own":
        return Protocol(p.offload, e.samples_per_problem, e.n_problems)
    quick = e.protocol == "quick"
    update = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 4096 if quick else 32_768}
    offload = p.offload.model_copy(update=update)
    if benchmark is None or benchmark.source is None:
        samples, n = (1, min(50, e.n_problems)) if quick else (e.samples_per_problem, e.n_problems)
        return Protocol(offload, samples, n)
    return Protocol(offload, 1 if quick else benchmark.samples, benchmark.quick if quick else None)


def _procedural(name: str, which: str, n: int, seed: int) -> Iterator[Row]:
    if name == "arith":
        from srlib.data import arith
        from srlib.params import Arith

        stream = arith.generate(Arith(), "test", seed)
        return (next(stream).model_dump() for _ in range(n))
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if which not in DATASETS:
        near = nearest(which, list(DATASETS))
        hint = f"; did you mean reasoning_gym:{near}?" if near else "."
        raise SrlibError(f"reasoning_gym has no set {which!r}{hint}")
    return (dict(row) for row in reasoning_gym.create_dataset(which, size=n, seed=seed))
