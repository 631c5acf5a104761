"""Worked traces to annotate: as a data set has them, or written here by the big model."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.data import digests, grade, problems, spans
from srlib.data.journal import Journal
from srlib.data.prompts import continuation, encode_prompts, with_opening
from srlib.data.rows import Problem
from srlib.decoding.policies import Always
from srlib.decoding.scheduler import Offloader
from srlib.engine.protocol import Engine
from srlib.params import Annotate, Offload, Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 1000  # traces whose tokens are counted for a plan: the share is within three points


def gather(
    p: Params, folder: Path, tokenizer: PreTrainedTokenizerBase, models: Mapping[str, Engine] = MappingProxyType({})
) -> tuple[list[Problem], Counter[str]]:
    """The traces that stage 01 annotates, and how many were dropped, by reason.

    With `annotate.tries` they are written here, with a journal in `folder`. Tags that a trace has
    are taken out, unless they are what is wanted, and so is a `<think>` that the prompt ends with. One
    that is longer, with its prompt, than `sft.max_length` or what a model reads is dropped.

    Args:
        tokenizer: of the small model.
        models: the engines that `annotate.engines` names, by side.
    """
    config = p.annotate
    dropped: Counter[str] = Counter()
    found = problems.traces(p, config.n_traces, worked=not config.tries, dropped=dropped)
    if config.tries:
        # Not the code: a trace is right whatever wrote it.
        decides = [digests.of_model(p.big), p.offload.settings, config.tries, config.temperature, p.seed]
        found = [problem.model_copy(update={"trace": None}) for problem in found]
        with Journal(folder / f"written-{digests.of(decides, 8)}.journal.jsonl") as journal:
            found, wrong = write(models.get("big"), found, config, p.offload, p.seed, journal)
        dropped += wrong
        if not found:
            raise SrlibError(f"The big model wrote no right trace: {problems.told(dropped)}.")
    most = min([p.sft.max_length, *(engine.context for engine in models.values())])
    asked = encode_prompts(tokenizer, [problem.prompt + p.offload.hint for problem in found])
    kept = []
    for problem, ids in zip(found, asked):
        trace = _plain(problem, config, tokenizer)
        if _too_long(trace, most - len(ids), tokenizer):
            dropped[f"it has more tokens than sft.max_length or a model's context holds ({most})"] += 1
        elif not trace.strip():
            dropped["it has nothing behind <think>"] += 1
        else:
            kept.append(problem.model_copy(update={"trace": trace}))
    if not kept:
        raise SrlibError(f"No trace can be annotated: {problems.told(dropped)}.")
    return kept, dropped


def _plain(problem: Problem, config: Annotate, tokenizer: PreTrainedTokenizerBase) -> str:
    """The trace of a problem as it goes on behind its prompt, without tags unless they are what is wanted."""
    return continuation(tokenizer, problem.worked if config.method == "given" else spans.strip(problem.worked))


def _too_long(trace: str, room: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a trace and its end of text take more than `room` tokens."""
    # No token is less than a byte, and bytes are quickly counted.
    return len(trace.encode()) >= room and len(tokenizer.encode(trace, add_special_tokens=False)) >= room


def foreseen(p: Params, contexts: Iterable[int]) -> str:
    """What share of the traces that the params name `gather` would drop as too long, from a sample, in a line.

    Nothing is fetched: where the set or the tokenizer is not on this machine, the line says so.

    Args:
        contexts: of the models that read them, in tokens.
    """
    file, path = p.traces.file, p.traces.path
    if file is None or not file.is_file():
        return f"How many traces are too long is not known: {path} is no file here."
    from srlib.engine.models import load_tokenizer

    try:
        tokenizer = load_tokenizer(p.small, local=True)
    except SrlibError:
        return f"How many traces of {path} are too long is not known: the tokenizer of {p.small.path} is not here."
    dropped: Counter[str] = Counter()
    found = problems.load(p.traces, worked=True, on_bad="drop", dropped=dropped)
    some = random.Random(p.seed).sample(found, min(SAMPLE, len(found)))
    most = min([p.sft.max_length, *contexts])
    asked = encode_prompts(tokenizer, [problem.prompt + p.offload.hint for problem in some])
    plain = (_plain(problem, p.annotate, tokenizer) for problem in some)
    longer = sum(_too_long(trace, most - len(ids), tokenizer) for trace, ids in zip(plain, asked))
    unusable = f"; of its other rows {problems.told(dropped)}" if dropped else ""
    return (
        f"{longer / len(some):.0%} of {len(some):,} traces drawn from the {len(found):,} of {path} have more than {most:,} "
        f"tokens, which is what sft.max_length or a model's context holds, and would be dropped{unusable}."
    )


def key(problem: Problem) -> str:
    """A name for a problem and its very trace, under which work on it is kept."""
    text = f"{problem.prompt}\0{problem.trace or ''}"
    return f"{problem.id}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def write(
    big: Engine | None, asked: list[Problem], config: Annotate, offload: Offload, seed: int, journal: Journal
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
    written: list[Problem] = []
    dropped: Counter[str] = Counter()
    for problem in asked:
        record = journal.records[key(problem)]
        if record["trace"] is None:
            dropped[record["reason"]] += 1
        else:
            written.append(problem.model_copy(update={"trace": record["trace"]}))
    return written, dropped


def _sampled(
    big: Engine | None, batch: list[Problem], config: Annotate, offload: Offload, seed: int
) -> Iterator[dict[str, Any]]:
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
            text = with_opening(writer.tokenizer, trace.text(writer.tokenizer))
            if trace.finish == "eos" and grade.verdict(text, problem, offload.hint).correct:
                yield {"key": key(problem), "trace": text, "tries": attempt + 1}
            else:
                wrong.append(problem)
        left = wrong
    for problem in left:
        reason = f"no right answer in {config.tries} tries"
        yield {"key": key(problem), "trace": None, "tries": config.tries, "reason": reason}
