"""The annotator `worth`: what a step of a trace is worth to the small model, measured.

From a place in a right trace the small model writes on, `continuations` times; the share that ends right is the
place's value. A step is hard where the value jumps once it is given: of the continuations from behind it that end
right, most end wrong from before it. In proportion, as where much is still to come few end right anyway.

Continuation j draws with the same numbers from every place, so that one which writes the next steps as they stand is
the continuation from behind them, too: it is not written again, and the luck of later steps is the same on both
sides. Within a hard step the token is looked for at which the jump lies, by halving the step, and is marked: a step
may well begin in other words than the trace does, and go wrong behind them.

The idea is that of automatic labels for process rewards (Math-Shepherd, arXiv 2312.08935; by halving: OmegaPRM, arXiv
2406.06592). Deviations: what is measured is a model's need of help, so a step is right by definition and its worth
is what it saves; and only one token of a hard step is found, the rest of it is left to the small model.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.annotation import traces
from srlib.data import digests, problems
from srlib.data.grade import verdict
from srlib.data.journal import Journal
from srlib.data.prompts import encode_prompts, with_opening
from srlib.data.rows import Annotated, Problem
from srlib.decoding.policies import Policy
from srlib.decoding.scheduler import Offloader
from srlib.decoding.steps import starts
from srlib.decoding.trace import SMALL
from srlib.decoding.writer import Steps, Writer
from srlib.engine.protocol import Engine
from srlib.params import Offload, Params, Worth

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Stretch(NamedTuple):
    """Of one continuation: it begins at `start`, is as the trace up to `end` (tokens of it), and ends right or not."""

    start: int
    end: int
    right: bool


@dataclass
class Worked:
    """A right trace, and what continuations have shown of it."""

    problem: Problem
    prompt: int  # tokens of the prompt
    ids: list[int]
    steps: list[int]  # where they begin and end, in tokens: from 0 to the end
    found: list[list[Stretch]] = field(default_factory=list)  # for each continuation

    def right(self, j: int, at: int) -> bool | None:
        """Whether continuation `j` from a place ends right; None: it has not been written."""
        if at == len(self.ids):
            return True
        return next((s.right for s in self.found[j] if s.start <= at <= s.end), None)

    def waiting(self, places: Sequence[int]) -> list[tuple[int, int]]:
        """For each continuation that one of `places` needs, its number and the first of them; later ones may need none."""
        first = ((j, next((at for at in places if self.right(j, at) is None), None)) for j in range(len(self.found)))
        return [(j, at) for j, at in first if at is not None]

    def jump(self, at: int, behind: int) -> float:
        """Of the continuations that end right from `behind`, the share that does not from `at`, less those it harms."""
        pairs = [(self.right(j, at), self.right(j, behind)) for j in range(len(self.found))]
        given = sum(bool(after) for _, after in pairs)
        return (given - sum(bool(before) for before, _ in pairs)) / given if given else 0.0


@dataclass
class Hard:
    """A hard step, and between which tokens its jump lies."""

    number: int  # of the trace, in its batch
    low: int
    high: int
    end: int
    jump: float

    @property
    def middle(self) -> int:
        return (self.low + self.high) // 2


@dataclass(frozen=True)
class Onward(Policy):
    """The small model writes at most `most` tokens on."""

    models = ("small",)

    most: int
    name: str = "worth"

    def write(self, writer: Writer) -> Steps:
        yield from writer.small_writes(self.most)


def values(
    small: Engine,
    given: Sequence[Problem | Annotated],
    config: Worth,
    offload: Offload,
    journal: Journal,
    batch_size: int,
    seed: int,
) -> Iterator[list[float]]:
    """For each token of each trace the jump that lies at it: what the step would lose without; 0 elsewhere.

    What is in the journal is not written again. What is written is in it batch by batch.

    Args:
        offload: a continuation has at most `max_tokens`.
        batch_size: traces that are worked on together, each with its continuations.
        seed: of the draws.

    Raises:
        SrlibError: a continuation failed.
    """
    asked = _worked(small.tokenizer, given, offload)
    expected = _cost(asked, config)
    print(f"{len(asked)} traces: {expected}")
    bar = tqdm(total=len(asked), desc="worth", unit="trace", mininterval=1)
    for at in range(0, len(asked), batch_size):
        batch = asked[at : at + batch_size]
        for one in batch:
            kept = journal.records.get(traces.key(one.problem), {}).get("found")
            one.found = [[Stretch(*s) for s in each] for each in kept or [[] for _ in range(config.continuations)]]
        before = [list(map(len, one.found)) for one in batch]
        _write(small, [(one, one.steps) for one in batch], config, offload, seed)
        yield from _located(small, batch, config, offload, seed)
        changed = [one for one, was in zip(batch, before) if list(map(len, one.found)) != was]
        journal.append(*({"key": traces.key(one.problem), "found": one.found} for one in changed))
        bar.update(len(batch))
    bar.close()


def _located(small: Engine, batch: Sequence[Worked], config: Worth, offload: Offload, seed: int) -> list[list[float]]:
    """The values of the tokens: in each hard step the place is found that has the greater part of the jump behind it."""
    made = [[0.0] * len(one.ids) for one in batch]
    hard = [
        Hard(number, start, end, end, jump)
        for number, one in enumerate(batch)
        for start, end in zip(one.steps, one.steps[1:])
        if (jump := one.jump(start, end)) > config.jump
    ]
    while open_ := [each for each in hard if each.high - each.low > 1]:
        _write(small, [(batch[each.number], [each.middle, each.end]) for each in open_], config, offload, seed)
        for each in open_:
            if batch[each.number].jump(each.middle, each.end) > each.jump / 2:  # most of it is still to come there
                each.low = each.middle
            else:
                each.high = each.middle
    for each in hard:
        made[each.number][each.low] = each.jump
    return made


def _write(
    small: Engine, wanted: Sequence[tuple[Worked, Sequence[int]]], config: Worth, offload: Offload, seed: int
) -> None:
    """Have all continuations written that some places of some traces need."""
    settings = offload.settings | {"temperature": config.temperature}
    while todo := [(one, j, at) for one, places in wanted for j, at in one.waiting(places)]:
        todo = list({(id(one), j): (one, j, at) for one, j, at in todo}.values())  # two steps of one may want the same
        settings["max_tokens"] = offload.max_tokens + max(at for *_, at in todo)
        writer = Offloader(small, None, Onward(offload.max_tokens), **settings, seed=seed)
        written = writer.run(
            [one.problem.prompt for one, *_ in todo],
            numbers=[j for _, j, _ in todo],
            begun=[(one.ids[:at], [SMALL] * at) for one, _, at in todo],
        )
        writer.raise_if_failed(written)
        for (one, j, at), trace in zip(todo, written):
            same = next(
                (i for i, (a, b) in enumerate(zip(trace.ids, one.ids)) if a != b), min(len(trace.ids), len(one.ids))
            )
            text = with_opening(writer.tokenizer, trace.text(writer.tokenizer))
            right = verdict(text, one.problem, offload.hint).correct
            one.found[j].append(Stretch(at, same, right))


def _worked(tokenizer: PreTrainedTokenizerBase, given: Sequence[Problem | Annotated], offload: Offload) -> list[Worked]:
    prompts = encode_prompts(tokenizer, [problem.prompt + offload.hint for problem in given])
    made = []
    for problem, prompt in zip(given, prompts):
        ids = tokenizer.encode(problem.worked, add_special_tokens=False)
        one = Problem(**problem.model_dump(include={"id", "prompt", "answer", "trace"}))
        made.append(Worked(one, len(prompt), ids, [*starts(ids, tokenizer, offload.step_ends), len(ids)]))
    return made


@dataclass(frozen=True)
class Cost:
    """What continuations from the ends of steps take at most, in tokens of the small model."""

    traces: int
    continuations: int
    read: int
    written: int

    def __str__(self) -> str:
        return (
            f"at most {self.continuations:,} continuations by the small model, {self.read:,} tokens to read and about "
            f"{self.written:,} to write; those that write steps as they stand are fewer"
        )


def _cost(asked: Sequence[Worked], config: Worth) -> Cost:
    """A continuation is taken to be as long as what is left of the trace; tokens within hard steps come on top."""
    k = config.continuations
    places = [(one, at) for one in asked for at in one.steps[:-1]]
    read = sum(one.prompt + at for one, at in places)
    written = sum(len(one.ids) - at for one, at in places)
    return Cost(len(asked), k * len(places), k * read, k * written)


def estimate(
    given: Sequence[Problem | Annotated], config: Worth, offload: Offload, tokenizer: PreTrainedTokenizerBase
) -> Cost:
    """What `values` takes at most for these traces."""
    return _cost(_worked(tokenizer, given, offload), config)


def foreseen(p: Params) -> str:
    """What the traces that the params name take, from a sample of them, in a line; nothing is fetched."""
    from srlib.engine.models import load_tokenizer

    source, n = p.traces, p.annotate.n_traces if p.annotate.method == "worth" else p.annotate.n_compare
    if source.file is None or not source.file.is_file():
        return f"What worth takes is not known before the traces are here: {source.path} is no file."
    try:
        tokenizer = load_tokenizer(p.small, local=True)
    except SrlibError:
        return f"What worth takes is not known: the tokenizer of {p.small.path} is not here."
    found = problems.load(source, worked=True, on_bad="drop", dropped=Counter())
    some = random.Random(p.seed).sample(found, min(traces.SAMPLE, len(found)))
    one, n = estimate(some, p.annotate.worth, p.offload, tokenizer), min(n, len(found))
    counts = (round(count * n / max(1, len(some))) for count in (one.continuations, one.read, one.written))
    return f"worth, of {n:,} traces: {Cost(n, *counts)}."


def journal(folder: Path, p: Params) -> Path:
    """The file in which continuations are kept, named after all that decides them but for the code."""
    config = p.annotate.worth.model_dump(include={"continuations", "temperature"})
    settings: dict[str, Any] = p.offload.settings
    speed = {"batch_size", "control_chunk", "stream_chunk", "overlap", "oversubscribe", "span_budget", "temperature"}
    decides = [digests.of_model(p.small), config, {k: v for k, v in settings.items() if k not in speed}, p.seed]
    return folder / f"worth-{digests.of(decides, 8)}.journal.jsonl"
