"""A trace in steps: where one ends, and one that the small model writes and the big one judges."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING

from srlib.decoding.trace import SMALL
from srlib.decoding.writer import Steps, Writer
from srlib.engine.protocol import STOP_TAIL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def starts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, ends: Sequence[str]) -> list[int]:
    """Where the steps of a trace begin: its beginning, and behind each token with which one of the texts `ends` is whole.

    As engines end a request (`Request.stop_texts`), so that a step is the same where it is written and where it is read.
    """
    found = [0] if ids else []
    for i in range(1, len(ids)):
        tail = tokenizer.decode(ids[max(found[-1], i - STOP_TAIL) : i])
        if any(end in tail for end in ends):
            found.append(i)
    return found


def judged(writer: Writer, ends: tuple[str, ...], threshold: float) -> Steps:
    """One step by the small model, which stays if the big one finds it likely; else the big one writes it.

    The big model reads it in one pass: the mean of its log-probabilities of the step's tokens, at its temperature, is
    at least −`threshold` (nats). The last token before a step stays unread until then, as what comes behind it is asked.
    One vocabulary is needed. For a trace that is written in such steps alone.
    """
    w, tags = writer, () if writer.o.plain_tags else writer.o.tag_ids  # the big model does not know them
    request = w.small.request(max_new=w.left, stops=(*w.o.small_eos, *tags), stop_texts=ends)
    yield request
    w.small.answered(request)
    tag = len(request.stopped) if request.stopped in tags else 0
    step, surprise = request.ids[: len(request.ids) - tag], inf
    began = len(w.trace.ids)
    if step:
        w.big.unread += step[:-1]
        answer = w.big.request(ask=len(step), watch=tuple(step))
        yield answer
        w.big.answered(answer)
        surprise = -sum(answer.watched) / len(step)
    if surprise <= threshold:
        if tag:
            w.small.take_back(tag)
        w.append(step, SMALL, request.logprobs[: len(step)])
        w.end_if(request.stopped in w.o.small_eos)
        w.big.unread.append(step[-1])
        return
    w.small.take_back(len(request.ids))
    if step:
        w.big.take_back(len(step) - 1)
    yield from w.big_writes(w.left, ends)
    if not w.done and len(w.trace.ids) > began:
        w.big.take_back(1)
        w.big.unread.append(w.trace.ids[-1])
