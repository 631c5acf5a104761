"""What a judge is asked about a trace, and how its answer is read.

A judge answers with passages between fences, as Markdown has them: three backticks or more, alone
on a line or with a language behind them, until as many. An answer is taken for what it is, whatever
a server sends: a field that is missing or of another type makes a malformed answer, not an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from srlib.annotation import traces
from srlib.annotation.alignment import align
from srlib.data.prompts import readable
from srlib.data.rows import Problem
from srlib.params import Judge

PROMPT = """\
You will see a problem and a worked solution. A small language model is to write such solutions, \
with a large one at hand that can write the hardest passages for it.

Choose the passages in which the small model would most likely go wrong: the key ideas, the steps \
that need care, the calculations that are hard to do in one's head. Together they should make up \
about {share:.0%} of the solution; choose at least three, even if all of it is easy.

Copy every passage word for word, in the order in which they stand in the solution. Put each \
between two lines of three backticks, and write nothing else:
```
a passage of the solution
```

<problem>
{problem}
</problem>

<solution>
{trace}
</solution>"""

CUT = "cut at"
MALFORMED = "malformed answer"
# Why a server says that an answer ended, where that is no end: it was cut, or the server gave up.
_CUT = ("length", "max_tokens", "max_output_tokens")
_GAVE_UP = ("error", "abort", "aborted", "insufficient_system_resource")
_FENCE = re.compile(r"[ \t]*(`{3,})([^`]*)")
_THOUGHT = "</think>"


@dataclass
class Usage:
    """What judging took, or will take; `cost` in the currency of the prices."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0  # of those of the prompts

    def cost(self, config: Judge) -> float:
        cached = config.price_in if config.price_cached is None else config.price_cached
        read_ = (self.prompt_tokens - self.cached_tokens) * config.price_in + self.cached_tokens * cached
        return (read_ + self.completion_tokens * config.price_out) / 1e6

    def add(self, other: Usage | dict[str, Any]) -> None:
        values = other if isinstance(other, dict) else vars(other)
        for name in vars(self):
            setattr(self, name, getattr(self, name) + values.get(name, 0))  # older journals have no cached tokens


@dataclass
class Verdict:
    """What a judge said on one trace: passages, or the reason why there are none."""

    problem: Problem
    snippets: list[str] = field(default_factory=list)
    reason: str = ""
    usage: Usage = field(default_factory=Usage)
    pending: bool = False  # no verdict: the server gave no answer, and another time it may

    @property
    def record(self) -> dict[str, Any]:
        kept = {"key": traces.key(self.problem), "snippets": self.snippets, "reason": self.reason}
        return kept | vars(self.usage)


@dataclass
class Answer:
    """A judge's answer: its text, or the fault for which it is not read."""

    text: str = ""
    fault: str = ""
    usage: Usage = field(default_factory=Usage)


def prompt_of(problem: Problem, share: float) -> str:
    """What a judge is asked about one trace."""
    return PROMPT.format(share=share, problem=readable(problem.prompt), trace=problem.trace)


def answer_of(body: Any, limit: int, shown: Callable[[str], str] = str) -> Answer:
    """The answer in a chat completion, as JSON has it.

    Args:
        body: whatever the server sent.
        limit: tokens the answer could have.
        shown: what of a text of the server's may be kept.
    """
    usage = _usage(at(body, "usage"))
    choice = at(at(body, "choices"), 0)
    message, ended = at(choice, "message"), at(choice, "finish_reason")
    text = _text(message.get("content")) if isinstance(message, dict) else None
    if text is None or ended in _GAVE_UP:
        return Answer(fault=MALFORMED, usage=usage)
    if ended in _CUT or (ended is None and _Fences(text).open):
        return Answer(fault=f"{CUT} {limit} tokens", usage=usage)
    if ended == "content_filter":
        return Answer(fault="withheld by the server's content filter", usage=usage)
    return Answer(shown(text), usage=usage)


def read(answer: str | None, trace: str, min_score: float) -> tuple[list[str], str]:
    """The passages of an answer and "", or none and what is wrong with it."""
    text = (answer or "").replace("\r\n", "\n")
    if not text.strip():
        return [], "empty answer"
    snippets = _passages(text)
    if not snippets:
        return [], "no passage between fences"
    if not any(align(snippets, trace, min_score)):
        return [], "no passage is in the trace"
    return snippets, ""


class _Fences:
    """The passages of a text, where in it each begins, and the places outside of them where a thought ends."""

    def __init__(self, text: str) -> None:
        self.passages: list[tuple[int, str]] = []
        self.ends: list[int] = []
        fence, start, place = "", 0, 0
        for line in text.split("\n"):
            mark = _FENCE.fullmatch(line.rstrip())
            if not fence and mark:
                fence, start = mark[1], place + len(line) + 1
            elif mark and len(mark[1]) >= len(fence) and not mark[2]:
                self.passages.append((start, text[start:place]))
                fence = ""
            elif not fence:
                self.ends += [place + end.end() for end in re.finditer(_THOUGHT, line)]
            place += len(line) + 1
        self.open = bool(fence)
        if self.open:
            self.passages.append((start, text[start:]))


def _passages(text: str) -> list[str]:
    """What stands between fences behind the judge's thought, which may hold fences too, closed or not.

    A passage may quote the end of a thought, so the judge's own is one that stands outside of fences. Where
    its thought leaves a fence open, it is the first behind which all fences are closed.
    """
    fences = _Fences(text)
    if fences.open:
        rests = (_Fences(text[end.end() :]) for end in re.finditer(_THOUGHT, text))
        fences = next((rest for rest in rests if not rest.open and any(p.strip() for _, p in rest.passages)), fences)
    for cut in reversed([0, *fences.ends]):
        found = [passage.strip("\n") for start, passage in fences.passages if start > cut and passage.strip()]
        if found:
            return found
    return []


def json_of(text: str) -> Any:
    """The JSON in a text; None: it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def at(value: Any, key: str | int, default: Any = None) -> Any:
    """What a mapping or a list holds there; else the default."""
    if isinstance(value, dict):
        return value.get(key, default)
    return value[key] if isinstance(value, list) and isinstance(key, int) and len(value) > key else default


def _text(content: Any) -> str | None:
    """The text of a message: a string, nothing, or chunks of which those that are text count; None: neither."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        return None
    chunks = [{"text": chunk} if isinstance(chunk, str) else chunk for chunk in content]
    texts = [at(chunk, "text") for chunk in chunks if at(chunk, "type", "text") in ("text", "output_text")]
    return "".join(texts) if all(isinstance(text, str) for text in texts) else None


def _usage(given: Any) -> Usage:
    """The tokens of one request, as far as the server says them."""
    details = at(given, "prompt_tokens_details")
    used = Usage(0, count(at(given, "prompt_tokens")), count(at(given, "completion_tokens")))
    used.cached_tokens = min(count(at(details, "cached_tokens")), used.prompt_tokens)
    return used


def count(value: Any) -> int:
    """A number of tokens or requests; 0 if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
