"""Annotators: which parts of a worked trace the big model should write.

Every annotator writes the same record, spans as character positions in the plain trace, so
that one can take another's place. `gap` needs no judge: it marks the tokens that the big
model finds much likelier than the small one, from one forward pass of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict, model_validator
from tqdm.auto import tqdm

from srlib import SrlibError, spans
from srlib.params import Annotate
from srlib.problems import Problem, encode_prompt
from srlib.spans import Span


class Annotated(BaseModel):
    """A worked trace and the spans of it, in characters, that the big model should write."""

    model_config = ConfigDict(extra="forbid")

    id: str
    prompt: str
    answer: str
    trace: str
    spans: list[Span]
    share: float  # of the trace's tokens
    annotator: str

    @model_validator(mode="after")
    def _spans_fit(self) -> Annotated:
        spans.wrap(self.trace, self.spans)
        return self

    @property
    def tagged(self) -> str:
        """The trace with its tags."""
        return spans.wrap(self.trace, self.spans)


def gap(small, big, problems: list[Problem], config: Annotate) -> Iterator[Annotated]:
    """Mark the tokens with log p_big − log p_small > threshold (nats).

    Two prefills a trace, `config.batch_size` traces at a time. A number is marked as a whole or
    not at all; marks at most `merge_gap` tokens apart become one span, spans are cut at
    `max_span_tokens`, and where the marks exceed `max_share` of the trace the spans with the
    largest total gap stay.

    Args:
        small, big: engines of one vocabulary.
        problems: each with a worked trace.

    Raises:
        SrlibError: a problem has no trace, or the models do not share a vocabulary.
    """
    check_vocabularies(small.tokenizer, big.tokenizer)
    for problem in problems:
        if not problem.trace:
            raise SrlibError(f"Problem {problem.id} has no worked trace, and the gap annotator needs one.")
    # Traces of like length share a batch, so that little is padding.
    order = sorted(problems, key=lambda problem: len(problem.trace))
    bar = tqdm(total=len(problems), desc="annotate", unit="trace", mininterval=1)
    for at in range(0, len(order), config.batch_size):
        batch = order[at : at + config.batch_size]
        prompts = [encode_prompt(small.tokenizer, problem.prompt) for problem in batch]
        traces = [
            small.tokenizer(problem.trace, add_special_tokens=False, return_offsets_mapping=True) for problem in batch
        ]
        sequences = [prompt + trace["input_ids"] for prompt, trace in zip(prompts, traces)]
        scores = zip(small.score(sequences), big.score(sequences))
        for problem, prompt, trace, (by_small, by_big) in zip(batch, prompts, traces, scores):
            gaps = [b - s for s, b in zip(by_small, by_big)][len(prompt) - 1 :]  # one for each trace token
            offsets = trace["offset_mapping"]
            marked = choose(gaps, config, numbers(problem.trace, offsets))
            yield Annotated(
                **problem.model_dump(include={"id", "prompt", "answer", "trace"}),
                spans=[Span(offsets[start][0], offsets[end - 1][1]) for start, end in marked],
                share=sum(end - start for start, end in marked) / len(gaps),
                annotator="gap",
            )
        bar.update(len(batch))
    bar.close()


def choose(gaps: list[float], config: Annotate, whole: Sequence[Span] = ()) -> list[Span]:
    """Spans, in tokens, for the gaps of one trace; those in `whole` are not cut into. See `gap`."""
    hard = [Span(i, i + 1) for i, value in enumerate(gaps) if value > config.threshold]
    hard += [unit for unit in whole if max(gaps[unit.start : unit.end]) > config.threshold]
    size = config.max_span_tokens
    joined = spans.merge(hard, config.merge_gap)
    cut = [Span(i, min(i + size, end)) for start, end in joined for i in range(start, end, size)]
    left, kept = int(config.max_share * len(gaps)), []
    for span in sorted(cut, key=lambda s: -sum(gaps[s.start : s.end])):
        if span.end - span.start <= left:
            kept.append(span)
            left -= span.end - span.start
    return spans.merge(kept)


def numbers(text: str, offsets: Sequence[tuple[int, int]]) -> list[Span]:
    """The numbers of `text` as spans of tokens.

    To hand over within a number would ask the small model for its last digits, which it can
    know as little as the first.

    Args:
        offsets: characters of each token, in order.
    """
    found, at = [], 0
    for match in re.finditer(r"\d+", text):
        while at < len(offsets) and offsets[at][1] <= match.start():
            at += 1
        start = at
        while at < len(offsets) and offsets[at][0] < match.end():
            at += 1
        if at > start:
            found.append(Span(start, at))
    return found


def check_vocabularies(small, big) -> None:
    """Two tokenizers must agree on every id of the big one.

    Raises:
        SrlibError: they do not.
    """
    ours, theirs = small.get_vocab(), big.get_vocab()
    differing = [token for token, i in theirs.items() if ours.get(token) != i]
    if differing:
        raise SrlibError(
            f"The two models do not share a vocabulary: {len(differing)} tokens of the big one differ, "
            f"such as {differing[0]!r}. Choose two models of one family."
        )
