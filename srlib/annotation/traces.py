"""Worked traces to annotate: as a data set has them, or written here by the big model.

Data sets differ in shape. Where one has several generations a problem and says which are right,
the first right one is taken; a row without what is needed is dropped, and its reason counted.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.data import benchmarks, digests, grade, problems, spans
from srlib.data.journal import Journal
from srlib.data.rows import Problem, read_jsonl
from srlib.decoding.policies import Always
from srlib.decoding.scheduler import Offloader
from srlib.params import Annotate, Offload, Params, Source


def load(source: Source, n: int, seed: int = 0, worked: bool = True) -> tuple[list[Problem], Counter[str]]:
    """`n` problems of `source` in random order, and how many rows were dropped, by reason.

    A file whose rows have the fields of `Problem` is read as it is, and a damaged line is an error;
    rows of other columns, and of the hub, are dropped if damaged. The column named `correct` may
    hold a truth value for each of a row's generations.

    Args:
        worked: whether a row needs a trace.

    Raises:
        SrlibError: no such file, data set or column, or fewer than `n` rows can be used.
    """
    if benchmarks.find(source) is not None or (source.file is not None and not source.columns):
        return problems.load(source, n, seed), Counter()
    if source.file is not None:
        rows: Any = read_jsonl(source.file, dict)
        random.Random(seed).shuffle(rows)
    else:
        rows = problems.hub_rows(source).shuffle(seed, buffer_size=problems.WINDOW)
    found, dropped = [], Counter()
    for number, row in enumerate(tqdm(rows, desc="load", unit="row", mininterval=1, leave=False)):
        problem = problems.from_row(row, number, source, worked)
        if isinstance(problem, Problem):
            found.append(problem)
        else:
            dropped[problem] += 1
        if len(found) == n:
            return found, dropped
    why = f" ({told(dropped)})" if dropped else ""
    raise SrlibError(f"{source.path} holds {len(found)} traces that can be used{why}, fewer than the {n} asked for.")


def gather(p: Params, folder: Path, big=None) -> tuple[list[Problem], Counter[str]]:
    """The traces that stage 01 annotates, and how many were dropped, by reason.

    With `annotate.tries` they are written here, with a journal in `folder`. Tags that a trace has
    are taken out, unless they are what is wanted.

    Args:
        big: an engine, if it writes.
    """
    config = p.annotate
    found, dropped = load(p.traces, config.n_traces, p.seed, worked=not config.tries)
    if config.tries:
        # Not the code: a trace is right whatever wrote it.
        decides = [digests.of_model(p.big), p.offload.settings, config.tries, config.temperature, p.seed]
        found = [problem.model_copy(update={"trace": None}) for problem in found]
        with Journal(folder / f"written-{digests.of(decides, 8)}.journal.jsonl") as journal:
            found, wrong = write(big, found, config, p.offload, p.seed, journal)
        dropped += wrong
        if not found:
            raise SrlibError(f"The big model wrote no right trace: {told(dropped)}.")
    if config.method != "given":
        found = [problem.model_copy(update={"trace": spans.strip(problem.trace)}) for problem in found]
    return found, dropped


def told(dropped: Counter[str]) -> str:
    """What was dropped, in words."""
    return "; ".join(f"{count} dropped: {reason}" for reason, count in dropped.most_common())


def key(problem: Problem) -> str:
    """A name for a problem and its very trace, under which work on it is kept."""
    text = f"{problem.prompt}\0{problem.trace or ''}"
    return f"{problem.id}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def write(
    big, asked: list[Problem], config: Annotate, offload: Offload, seed: int, journal: Journal
) -> tuple[list[Problem], Counter[str]]:
    """The problems with traces that the big model wrote, each the first of up to `config.tries` with the right answer.

    What is in the journal is not written again. A problem without a right trace is dropped.

    Returns:
        the problems that have a trace, and why others have none.
    """
    todo = [problem for problem in asked if key(problem) not in journal.records]
    bar = tqdm(total=len(todo), desc="write traces", unit="problem", mininterval=1, disable=not todo)
    for at in range(0, len(todo), offload.batch_size):
        batch = todo[at : at + offload.batch_size]
        journal.append(*_sampled(big, batch, config, offload, seed))
        bar.update(len(batch))
    bar.close()
    written, dropped = [], Counter()
    for problem in asked:
        record = journal.records[key(problem)]
        if record["trace"] is None:
            dropped[record["reason"]] += 1
        else:
            written.append(problem.model_copy(update={"trace": record["trace"]}))
    return written, dropped


def _sampled(big, batch: list[Problem], config: Annotate, offload: Offload, seed: int) -> Iterator[dict[str, Any]]:
    """A record for each problem of `batch`; those without a right trace so far are tried again."""
    left = batch
    settings = offload.settings | {"temperature": config.temperature}
    for attempt in range(config.tries):
        # A draw depends on the prompt and the seed alone, not on the batch: a resumed run writes the same.
        writer = Offloader(None, big, Always("big"), **settings, seed=config.tries * seed + attempt)
        traces = writer.run([problem.prompt for problem in left])
        writer.raise_if_failed(traces)
        wrong = []
        for problem, trace in zip(left, traces):
            text = trace.text(writer.tokenizer)
            if trace.finish == "eos" and grade.verdict(text, problem, offload.hint).correct:
                yield {"key": key(problem), "trace": text, "tries": attempt + 1}
            else:
                wrong.append(problem)
        left = wrong
    for problem in left:
        reason = f"no right answer in {config.tries} tries"
        yield {"key": key(problem), "trace": None, "tries": config.tries, "reason": reason}
