"""The writing of one trace: what a policy may do with it.

The small model writes; at `<bigmodel>` the big one takes over, reading only what it has not
read yet and never a tag. After every chunk of the big model's tokens the small one reads them,
and where its own next token would be `</bigmodel>` it takes control back: the decision falls
out of the forward pass that it needs anyway. So each model processes every token once.

Models of two vocabularies meet in text (see `translate`): the trace is in ids of the small one, and
tokens are counted there.

Tags that are plain text are looked for in the text, so that it does not matter how the small
model cuts them into tokens; in the trace they stand as the tokenizer writes them alone.

What happens at the edges: a span also closes at the span budget (the closing tag is then
`FORCED`); a span has at least one token, so a request cannot be empty; end of text by either
model ends the trace, in a span too; opening tags inside a span cannot occur, as the big model
writes there; a closing tag outside one stays in the trace and is counted as malformed; at the
total budget the trace ends with finish `length`, and a prompt with no room left in the context
gives an empty trace with finish `prompt`.

Deviation from the paper (section on inference): control returns at the exact token, seen in one
pass, where the public code generates a few tokens from every prefix to look for the tag.
"""

from __future__ import annotations

from collections.abc import Generator
from collections.abc import Sequence as Several
from typing import Any

from srlib.data import spans
from srlib.decoding.duo import Duo, Turns
from srlib.decoding.trace import BIG, FORCED, NAN, SMALL, Handover, Trace
from srlib.engine.protocol import STOP_TAIL, Doubt, Request, Sampling, Sequence

Steps = Generator[Request, None, None]  # what is waited for, until it is done
Begun = tuple[Several[int], Several[int]]  # the ids a trace begins with, and their owners


class Side:
    """One model's view of one trace: a sequence, and what it has still to read."""

    def __init__(self, turns: Turns | None, prompt_ids: list[int], sampling: Sampling) -> None:
        self._turns, self.sampling = turns, sampling
        self.unread = list(prompt_ids)
        self._sequence: Sequence | None = None
        self.length = 0  # ids the sequence has, as far as they have been heard of
        self.beside = 0  # tokens processed for the trace in sequences that a policy has opened beside this one

    @property
    def turns(self) -> Turns:
        """The model; only for policies that ask it is there one."""
        assert self._turns is not None
        return self._turns

    @property
    def sequence(self) -> Sequence:
        """Its sequence, which takes a slot."""
        if self._sequence is None:
            self._sequence = self.turns.engine.open([], self.sampling)
        return self._sequence

    def request(self, **ask: Any) -> Request:
        """To read what is unread and do what is asked, in its turn; to yield it is to wait for it."""
        feed, self.unread = self.unread, []
        self.length += len(feed)
        return self.turns.ask(Request(self.sequence, feed, **ask))

    def answered(self, request: Request) -> None:
        """Take note of what `request`, which is done, has written.

        Raises:
            SrlibError: it failed.
        """
        if request.error:
            raise request.error
        self.length += len(request.ids)

    def read(self) -> None:
        """Have what is unread read while others work."""
        if self.unread:
            self.request()

    def take_back(self, tokens: int) -> None:
        """Take the last `tokens` ids back."""
        self.length -= tokens
        self.turns.engine.truncate(self.sequence, self.length)

    def close(self) -> None:
        """Give the slot back."""
        if self._sequence is not None:
            self.turns.close(self._sequence)

    @property
    def forwarded(self) -> int:
        """How many tokens the model has processed for this trace."""
        return self.beside + (self._sequence.forwarded if self._sequence else 0)


class Writer:
    """The writing of one trace: what a policy may do with it. What takes time is a generator of requests.

    A request is submitted as soon as its model has room for it; one that is yielded is waited for.

    Args:
        duo: the engines, and how they work together.
        prompt_ids, big_prompt_ids: the prompt as each model is asked.
        begun: ids and owners that the trace begins with: both models read them, and go on behind.
        live: what it has written can be seen token by token (`written`).
    """

    def __init__(
        self,
        duo: Duo,
        prompt_ids: list[int],
        big_prompt_ids: list[int],
        seed: int,
        live: bool = False,
        begun: Begun = ((), ()),
    ) -> None:
        self.o, self.seed, self._live = duo, seed, live
        ids, owners = map(list, begun)
        self.trace = Trace(list(prompt_ids), duo.tags, ids, owners, [NAN] * len(ids))
        # One seed for both: where they agree on a token's distribution they draw the same token.
        small, big = (duo.turns[engine] if engine is not None else None for engine in (duo.small, duo.big))
        self.small = Side(small, [*prompt_ids, *ids], Sampling(*duo.sampling, seed))
        self.big = Side(big, big_prompt_ids, Sampling(*duo.big_sampling, seed))
        rooms = [
            engine.context - len(ids)
            for engine, ids in ((duo.small, prompt_ids), (duo.big, big_prompt_ids))
            if engine is not None
        ]
        self.room = min(duo.max_tokens, *rooms)
        self.to_big, self.to_small = duo.bridge.start()
        self.big.unread += self.to_big.feed(spans.strip(ids, duo.tags), last=True)
        self._unfed = 0  # ids of the big model's last chunk that have not gone through `to_small`
        self._shown = len(ids)  # the big model has been given the trace up to here, as far as the small one wrote it
        self._under_way: tuple[Request, int] | None = None  # its ids go into the trace as they are; and whose they are
        self._shaky = 0  # ids at the end of the trace that may be taken back
        if self.left <= 0:
            self.trace.finish = "length" if ids else "prompt"

    @property
    def left(self) -> int:
        """Tokens left in the total budget."""
        return self.room - len(self.trace.ids)

    @property
    def done(self) -> bool:
        return bool(self.trace.finish)

    @property
    def written(self) -> tuple[list[int], list[int]]:
        """Ids and owners of the trace so far, as far as none of them will be taken back."""
        ids, owners = self.trace.ids, self.trace.owners
        if self._under_way is not None:
            request, owner = self._under_way
            fresh = list(request.ids)
            ids, owners = ids + fresh, owners + [owner] * len(fresh)
        sure = len(ids) - self._shaky
        return ids[:sure], owners[:sure]

    def stop(self, finish: str, error: Exception | None = None) -> None:
        """End the trace before its time: with what was written so far, or after an error with what was answered."""
        if self._under_way is not None and error is None:
            request, owner = self._under_way
            self.append(request.ids, owner, request.logprobs)
        self._under_way, self._shaky = None, 0
        self.trace.finish, self.trace.cause = finish, error
        self.trace.error = str(error) if error else ""

    def close(self) -> None:
        """Give the slots back."""
        self.small.close()
        self.big.close()

    def count(self) -> None:
        """Note in the trace what each model has processed for it."""
        self.trace.small_forward_tokens, self.trace.big_forward_tokens = self.small.forwarded, self.big.forwarded

    def append(self, ids: list[int], owner: int, logprobs: list[float]) -> None:
        """Write down what a model has written, here or for a policy that asks models by itself."""
        self.trace.ids += ids
        self.trace.owners += [owner] * len(ids)
        self.trace.logprobs += logprobs

    def end_if(self, ended: bool) -> None:
        """End the trace if the text has ended, or the total budget."""
        if ended:
            self.trace.finish = "eos"
        elif self.left <= 0 and not self.trace.finish:
            self.trace.finish = "length"

    def small_writes(
        self,
        n: int,
        tags: bool = False,
        doubt: Doubt | None = None,
        inside: bool = False,
        until: tuple[str, ...] = (),
    ) -> Generator[Request, None, str | None]:
        """Up to `n` tokens by the small model, up to a tag with `tags`, to where it is unsure, or to a text of `until`.

        Args:
            inside: it writes a span itself, and may close it. Outside of spans a closing tag that is a token is not
                written: there is nothing to close, and as it is stripped nobody would pay for it.
            doubt: a token of which the model is less sure is not written.

        Returns:
            the tag or the text it ended with, `unsure`, or None.
        """
        o, eos, start = self.o, self.o.small_eos, len(self.trace.ids)
        ends = o.tag_ends if tags else {"stops": eos, "stop_texts": until}
        end = start + min(n, self.left)
        while True:
            before = len(self.trace.ids)
            request = self.small.request(
                max_new=min(end - before, o.stream_chunk or o.max_tokens),
                doubt=doubt,
                recent=self.trace.ids[max(start, before - STOP_TAIL) : before],
                live=self._live,
                banned=o.closing if tags and not inside else (),
                **ends,
            )
            self._shaky = STOP_TAIL if tags and o.plain_tags else 0
            self._under_way = request, SMALL
            yield request
            self._under_way = None
            self.small.answered(request)
            self.append(request.ids, SMALL, request.logprobs)
            if request.stopped or request.unsure or len(self.trace.ids) >= end:
                break
            if o.big is not None:  # it reads along, but for what may be the beginning of a tag
                self._show(start, STOP_TAIL if tags and o.plain_tags else 0)
                self.big.read()
        stopped = request.stopped
        if isinstance(stopped, str):
            tag = self._settle(stopped) if tags else None
        else:
            tag = o.tag_of.get(stopped or ())
        self._shaky = 0
        self.end_if(stopped in eos)
        if not self.done:
            self._show(start, len(o.ids_of[tag]) if tag else 0, last=True)
        return tag or ("unsure" if request.unsure else stopped if isinstance(stopped, str) else None)

    def big_writes(self, n: int, until: tuple[str, ...] = ()) -> Steps:
        """Up to `n` tokens by the big model, or to a text of `until`."""
        start, began = len(self.trace.ids), self.o.clock()
        ended = yield from self._big_chunk(self._ask_big(n, until), last=True, live=self.o.bridge.same)
        self.end_if(ended)
        self._handover(start, len(self.trace.ids), self.trace.finish or "chunk", began)

    def span(self, budget: int | None = None) -> Steps:
        """The big model writes until the small one would close the span, or a budget or the text ends.

        Args:
            budget: most tokens of the span, where it is to be less than the span budget.
        """
        o, start, began, closed_by, tag = self.o, len(self.trace.ids), self.o.clock(), "", 0
        budget = min(budget or o.span_budget, o.span_budget)
        request = self._ask_big(min(o.control_chunk, budget))
        while not closed_by:
            before = len(self.trace.ids)
            ended = yield from self._big_chunk(request)
            n, ahead = len(self.trace.ids) - before, None
            self._shaky = n
            left = min(o.control_chunk, budget - (len(self.trace.ids) - start))
            if o.overlap and left > 0 and self.left > 0 and not ended:
                ahead = self._ask_big(left)
            if n > ended:
                tag = yield from self._close_if_wanted(n, n - ended, ahead)
            self._shaky = 0
            if tag:
                closed_by = "small"
                continue
            self.end_if(ended)
            closed_by = self.trace.finish or ("budget" if left <= 0 else "")
            if not closed_by:
                request = ahead or self._ask_big(left)
        if closed_by == "budget" and self.to_small.held:
            self._take_back_big(n)
        end = len(self.trace.ids) - tag
        if closed_by == "budget":
            close = list(self.trace.tags.close)[: self.left]
            self.append(close, FORCED, [NAN] * len(close))
            self.small.unread += close
        self.end_if(False)
        self._handover(start, end, closed_by, began)

    def draft(self, n: int) -> Steps:
        """The small model drafts `n` tokens; the big one keeps those it would have written, and adds the next.

        Every token is the one that the big model alone would have written: in one pass over the
        draft it answers what it would have put at each place. (Leviathan et al. 2023, arXiv
        2211.17192; as both draw with one seed, kept and replaced tokens are exactly the big model's.)
        """
        eos = self.o.big_eos
        asked = min(n, self.left - 1)
        drafted: list[int] = []
        if asked:
            tags = () if self.o.plain_tags else self.o.tag_ids  # the big model does not know them
            request = self.small.request(max_new=asked, stops=(*eos, *tags))
            yield request
            self.small.answered(request)
            tag = len(request.stopped) if request.stopped in tags else 0
            drafted = request.ids[: len(request.ids) - tag]
            if tag:
                self.small.take_back(tag)
        began = self.o.clock()
        self.big.unread += drafted
        answer = self.big.request(ask=len(drafted) + 1)
        yield answer
        self.big.answered(answer)
        kept = 0
        while kept < len(drafted) and drafted[kept] == answer.own[kept]:
            kept += 1
        if drafted:
            self.append(drafted[:kept], SMALL, request.logprobs[:kept])
        if extra := len(drafted) - kept:
            self.small.take_back(extra)
            self.big.take_back(extra)
        if kept and (drafted[kept - 1],) in eos:
            return self.end_if(True)
        start, token = len(self.trace.ids), answer.own[kept]
        self.append([token], BIG, [NAN])
        self.small.unread.append(token)
        self.big.unread.append(token)
        self.end_if((token,) in eos)
        self._handover(start, start + 1, self.trace.finish or "draft", began)

    def _ask_big(self, n: int, until: tuple[str, ...] = ()) -> Request:
        return self.big.request(max_new=min(n, self.left), stops=self.o.big_eos, stop_texts=until, live=self._live)

    def _big_chunk(self, request: Request, last: bool = False, live: bool = False) -> Generator[Request, None, bool]:
        """What `request` has the big model write; returns whether the text ended."""
        self._under_way = (request, BIG) if live else None
        yield request
        self._under_way = None
        self.big.answered(request)
        ended, same = request.stopped in self.o.big_eos, self.o.bridge.same
        written = request.ids if same or not ended else request.ids[:-1]
        ids = self.to_small.feed(written, last or ended)
        self._unfed = len(request.ids) - len(written)  # the big model's end of text is no text
        if ended and not same:
            ids.append(self.o.tokenizer.eos_token_id)
        if len(ids) > self.left:  # the small model writes it in more tokens
            self._take_back_big(self.left)
            ids, ended = ids[: self.left], False
        self.append(ids, BIG, request.logprobs if same else [NAN] * len(ids))
        self.small.unread += ids
        return ended

    def _take_back_big(self, kept: int) -> None:
        """Of what the big model's last chunk is to the small one, only the first `kept` ids stay."""
        taken, again = self.to_small.rewind(kept)
        if taken + self._unfed:
            self.big.take_back(taken + self._unfed)
        self._unfed = 0
        self.big.unread += again

    def _close_if_wanted(self, n: int, asked: int, ahead: Request | None) -> Generator[Request, None, int]:
        """The small model reads the last `n` tokens: would it close the span after one of the first `asked`?

        If so, the tokens behind that place are dropped, `ahead` is taken back, and the tag is
        written. Returns its length, or 0.
        """
        close, o = self.trace.tags.close, self.o
        request = self.small.request(ask=n, watch=close[0])
        yield request
        self.small.answered(request)
        place = next((i for i, token in enumerate(request.own[:asked]) if token in o.may_close), None)
        if place is None or (self.left < len(close) and n == place + 1):
            return 0
        tries = None
        if o.plain_tags:  # it began like the tag: the small model writes on, and another word is taken back
            room = self.small.turns.engine.context - self.small.length
            if room < 1:
                return 0
            tries = self.small.request(max_new=min(len(close) + 2, room), stop_texts=spans.SPELLINGS)
            yield tries
            self.small.answered(tries)
            text = o.tokenizer.decode(tries.ids).lstrip()
            if not text.startswith(spans.SPELLINGS[1:]):
                self.small.take_back(len(tries.ids))
                return 0
        if ahead is not None:
            self.big.turns.take_back(ahead)
        self._take_back_big(place + 1)
        if extra := n - place - 1:
            self.small.take_back(extra)
            self._drop(extra)
        if tries is None:
            self.append(list(close), SMALL, [request.watched[place]])
            self.small.unread += close
        elif tuple(tries.ids) == close:
            self.append(tries.ids, SMALL, tries.logprobs)
        else:
            self.small.take_back(len(tries.ids))
            self.append(list(close), FORCED, [NAN] * len(close))
            self.small.unread += close
        return len(close)

    def _settle(self, tag: str) -> str:
        """Write the tag that the last tokens spell in the tokens it has alone; returns it in its usual spelling."""
        o = self.o
        tail = self.trace.ids[-STOP_TAIL:]
        text = o.tokenizer.decode(tail)
        at = text.rindex(tag)
        kept = len(tail)
        while not text[:at].startswith(before := o.tokenizer.decode(tail[:kept])):
            kept -= 1
        tag = spans.OPEN if tag == spans.OPEN else spans.CLOSE
        written = list(o.ids_of[tag])
        again = o.tokenizer.encode(text[len(before) : at], add_special_tokens=False) + written
        if again != tail[kept:] and self.left + len(tail) - kept >= len(again):
            self.small.take_back(len(tail) - kept)
            self._drop(len(tail) - kept)
            self.append(again, FORCED, [NAN] * len(again))
            self.small.unread += again
        return tag

    def _show(self, start: int, but: int, last: bool = False) -> None:
        """The big model gets to read what the small one has written since `start`, but for the last `but` ids."""
        fresh = self.trace.ids[max(start, self._shown) : len(self.trace.ids) - but]
        self._shown = max(start, self._shown) + len(fresh)
        if not self.o.plain_tags:
            fresh = [token for token in fresh if token not in self.o.tag_tokens]
        self.big.unread += self.to_big.feed(fresh, last)

    def _drop(self, tokens: int) -> None:
        for column in (self.trace.ids, self.trace.owners, self.trace.logprobs):
            del column[-tokens:]

    def _handover(self, start: int, end: int, closed_by: str, began: float) -> None:
        """Record a stretch of the big model; one that goes on where the last one ended is the same."""
        seconds, handovers = self.o.clock() - began, self.trace.handovers
        if handovers and handovers[-1].start + handovers[-1].tokens == start:
            last = handovers.pop()
            start, began, seconds = last.start, last.began, self.o.clock() - last.began
        handovers.append(Handover(start, end - start, closed_by, began, seconds))
