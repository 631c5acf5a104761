"""The way of the public code, from its description, to be measured beside ours; nothing else uses it.

At each hand-over the model that takes over reads everything from the beginning. To see where the small model would
close a span, a few tokens are generated from every prefix of each chunk of the big model's, each read from the
beginning, too. It is told kindly here: all prefixes of a chunk go in one batch, nothing is cut into tokens again,
and the big model keeps its cache within a span.

Deviation: the public code looks for the tag anywhere in what was generated, and counts the place from the wrong end,
so that control returns where nobody asked for it. Here a prefix counts whose generation begins with the tag: that is
where our own policy closes, so that both write the same tokens, and only the work differs.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from srlib import SrlibError
from srlib.data import spans
from srlib.decoding.policies import Policy
from srlib.decoding.trace import BIG, FORCED, NAN, SMALL, Handover
from srlib.decoding.writer import Side, Steps, Writer
from srlib.engine.protocol import Request


@dataclass(frozen=True)
class Published(Policy):
    """As `Learned`, everything read again at each hand-over; the small engine needs `control_chunk` slots for a trace.

    Args:
        peek: tokens generated from every prefix to look for the closing tag.
    """

    tags = True
    one_vocabulary = True

    peek: int = 8
    name: str = "published"

    def write(self, writer: Writer) -> Steps:
        o, trace = writer.o, writer.trace
        if o.plain_tags:
            raise SrlibError(f"The policy {self.name} needs a small model whose tags are tokens.")
        while not writer.done:
            stops = (trace.tags.open, *o.small_eos)
            (request,) = yield from _ask(
                writer.small, [_all(writer)], max_new=writer.left, stops=stops, banned=o.closing
            )
            writer.append(request.ids, SMALL, request.logprobs)
            writer.end_if(request.stopped in o.small_eos)
            if request.stopped == trace.tags.open and not writer.done:
                start, began = len(trace.ids), o.clock()
                closed_by, end = yield from self._span(writer)
                trace.handovers.append(Handover(start, end - start, closed_by, began, o.clock() - began))

    def _span(self, writer: Writer) -> Generator[Request, None, tuple[str, int]]:
        """Returns who closed it, and where it ended."""
        o, trace, start = writer.o, writer.trace, len(writer.trace.ids)
        close = list(trace.tags.close)
        unread = trace.prompt_ids + spans.strip(trace.ids, trace.tags)
        sequence = writer.big.turns.engine.open([], writer.big.sampling)
        try:
            while True:
                before = len(trace.ids)
                most = min(o.control_chunk, start + o.span_budget - before, writer.left)
                request = Request(sequence, unread, max_new=most, stops=o.big_eos)
                yield writer.big.turns.engine.submit(request)
                if request.error:
                    raise request.error
                unread = []
                writer.append(request.ids, BIG, request.logprobs)
                ended = request.stopped is not None
                asked = len(request.ids) - ended
                text = _all(writer)
                prefixes = [text[: len(text) - len(request.ids) + 1 + i] for i in range(asked)]
                peeks = yield from _ask(writer.small, prefixes, max_new=self.peek, **o.tag_ends)
                place = next((i for i, p in enumerate(peeks) if p.ids[: len(close)] == close), None)
                if place is not None and writer.room - before - place - 1 >= len(close):
                    for column in (trace.ids, trace.owners, trace.logprobs):
                        del column[before + place + 1 :]
                    writer.append(close, SMALL, peeks[place].logprobs[: len(close)])
                    writer.end_if(False)
                    return "small", before + place + 1
                writer.end_if(ended)
                if writer.done:
                    return trace.finish, len(trace.ids)
                if (end := len(trace.ids)) >= start + o.span_budget:
                    close = close[: writer.left]
                    writer.append(close, FORCED, [NAN] * len(close))
                    writer.end_if(False)
                    return "budget", end
        finally:
            writer.big.turns.engine.close(sequence)
            writer.big.beside += sequence.forwarded


def _all(writer: Writer) -> list[int]:
    """What the small model reads: the prompt and the trace."""
    return writer.trace.prompt_ids + writer.trace.ids


def _ask(side: Side, texts: list[list[int]], **wanted: Any) -> Generator[Request, None, list[Request]]:
    """Have a model write behind each of `texts`, all of which it reads."""
    engine, requests = side.turns.engine, []
    try:
        for text in texts:
            requests.append(engine.submit(Request(engine.open([], side.sampling), text, **wanted)))
        for request in requests:
            yield request
            if request.error:
                raise request.error
    finally:
        for request in requests:
            engine.close(request.sequence)
            side.beside += request.sequence.forwarded
    return requests
