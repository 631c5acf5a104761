"""Two engines that write together: what all traces of an `Offloader` share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from srlib.data import spans
from srlib.data.spans import Tags
from srlib.decoding.translate import Bridge
from srlib.engine.protocol import Engine, Request, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Turns:
    """What one model is asked: for at most `most` traces at a time, and the others wait for their turn."""

    def __init__(self, engine: Engine, most: int) -> None:
        self.engine, self.most = engine, most
        self._waiting: list[Request] = []  # not submitted yet
        self._asked: dict[Sequence, set[Request]] = {}  # submitted, and not done, for each trace that has such

    def ask(self, request: Request) -> Request:
        """Have a request submitted as soon as there is room for its trace."""
        self._waiting.append(request)
        return request

    def submit(self) -> None:
        """Submit what there is room for."""
        waiting, self._waiting = self._waiting, []
        for request in waiting:  # those of one trace stay in order: behind one that waits, there is no room either
            if request.sequence in self._asked or len(self._asked) < self.most:
                self._asked.setdefault(request.sequence, set()).add(self.engine.submit(request))
            else:
                self._waiting.append(request)

    def done(self, request: Request) -> None:
        """Take note that a request is done, which may be another model's."""
        if request in (asked := self._asked.get(request.sequence, set())):
            asked.remove(request)
            if not asked:
                del self._asked[request.sequence]

    def take_back(self, request: Request) -> None:
        """As if `request` had not been asked."""
        if request in self._waiting:
            self._waiting.remove(request)
        else:
            self.done(request)
            self.engine.cancel(request)

    def close(self, sequence: Sequence) -> None:
        """Give a sequence's slot back; what was asked for it is forgotten."""
        self._waiting = [request for request in self._waiting if request.sequence is not sequence]
        self._asked.pop(sequence, None)
        self.engine.close(sequence)


class Duo:
    """Two engines, how they sample and how much they may write, and how their tags are written.

    Args:
        small, big: engines; one of them may be None, if it is never asked.
        max_tokens: most tokens of a trace, tags included.
        span_budget: most tokens of one span.
        batch_size: most traces that one model is asked for at a time, to read along too; the others wait for
            their turn.
        control_chunk: big tokens between two looks of the small model; tokens behind the place
            where it takes over are lost, so 1 wastes nothing. Always 1 if a tag is several tokens.
        temperature, top_p, top_k: of both models; temperature 0 is greedy.
        big_sampling: temperature, top_p and top_k of the big model, where they are to differ.
        stream_chunk: the big model reads along every so many tokens of the small one; 0: when asked.
        overlap: the big model writes its next chunk while the small one looks at the last; for
            engines that really work at the same time, as one in a process of its own does.
        time: a clock, in seconds.

    Raises:
        SrlibError: the vocabularies differ, and one of them cannot write every text.
    """

    def __init__(
        self,
        small: Engine | None,
        big: Engine | None,
        *,
        max_tokens: int,
        span_budget: int = 8,
        batch_size: int = 64,
        control_chunk: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int = 0,
        big_sampling: tuple[float, float, int] | None = None,
        stream_chunk: int = 0,
        overlap: bool = False,
        time: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.small, self.big = small, big
        self.engines = [engine for engine in (small, big) if engine is not None]
        self.batch_size = min(batch_size, *(engine.slots for engine in self.engines))
        self.turns = {engine: Turns(engine, self.batch_size) for engine in self.engines}
        self.max_tokens, self.span_budget = max_tokens, span_budget
        self.stream_chunk, self.overlap = stream_chunk, overlap
        self.sampling = (temperature, top_p, top_k)
        self.big_sampling = big_sampling or self.sampling
        # Where a request is to stop: at the end of the text, or of the small model's at a tag, too.
        self.small_eos, self.big_eos = (tuple((i,) for i in engine.eos) if engine else () for engine in (small, big))
        self.tokenizer = self.engines[0].tokenizer
        self.tags = Tags.of(self.tokenizer)
        self.tag_ids = (self.tags.open, *self.tags.closes)
        self.tag_of = dict(zip(self.tag_ids, spans.SPELLINGS))
        self.ids_of = dict(zip(spans.SPELLINGS, self.tag_ids))
        self.plain_tags = len(self.tags.close) > 1
        self.tag_tokens = {ids[0] for ids in self.tag_ids if len(ids) == 1}
        self.tag_ends: dict[str, Any] = {"stops": (*self.tag_ids, *self.small_eos)}
        self.closing = () if self.plain_tags else tuple(ids[0] for ids in self.tag_ids[1:] if len(ids) == 1)
        self.may_close = frozenset(self.tags.close)
        self.control_chunk = control_chunk
        if self.plain_tags:
            self.control_chunk = 1
            self.tag_ends = {"stops": self.small_eos, "stop_texts": spans.SPELLINGS}
            self.may_close = _beginnings(self.tokenizer, spans.SPELLINGS[1:])
        self.bridge = Bridge(self.tokenizer, self.engines[-1].tokenizer)
        self._time = time
        self._start = time()

    def clock(self) -> float:
        """Seconds since the run started."""
        return self._time() - self._start


def _beginnings(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...]) -> frozenset[int]:
    """Ids of the tokens that one of `texts` may begin with, with or without space before it."""
    found = []
    for i in range(len(tokenizer)):
        piece = tokenizer.decode([i]).lstrip()
        if piece and any(text.startswith(piece) or piece.startswith(text) for text in texts):
            found.append(i)
    return frozenset(found)
