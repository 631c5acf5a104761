"""What two models wrote after one prompt."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from srlib.data import spans
from srlib.data.spans import Tags

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SMALL, BIG, FORCED = 0, 1, 2  # who wrote a token; FORCED: put in by the controller
NAN = float("nan")


class Handover(NamedTuple):
    """One stretch of the big model."""

    start: int  # position in the trace of its first token
    tokens: int
    closed_by: str  # small, budget, eos or length; chunk under the random policy
    began: float  # seconds since the run started
    seconds: float


@dataclass
class Trace:
    """What two models wrote after one prompt. `ids`, `owners` and `logprobs` run in parallel."""

    prompt_ids: list[int]
    tags: Tags[tuple[int, ...]]
    ids: list[int] = field(default_factory=list)  # tags included, as the small model reads it
    owners: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # nan where FORCED
    handovers: list[Handover] = field(default_factory=list)
    finish: str = ""  # eos, length, prompt, cancelled or error
    error: str = ""  # what went wrong, where `finish` is error
    cause: Exception | None = field(default=None, repr=False, compare=False)  # and what was raised
    small_forward_tokens: int = 0
    big_forward_tokens: int = 0

    @property
    def big_tokens(self) -> int:
        """Tokens by the big model, tags excluded (it never writes one)."""
        return self.owners.count(BIG)

    @property
    def small_tokens(self) -> int:
        """Tokens by the small model, tags excluded."""
        return max(0, len(spans.strip(self.ids, self.tags)) - self.big_tokens)  # a split tag may hold a big token

    @property
    def malformed(self) -> Counter[str]:
        """Faults in the grammar of the tags, by kind."""
        return spans.faults(self.ids, self.tags)

    @property
    def least_forward_tokens(self) -> int:
        """Prompt and trace, every token once: what one model cannot do without to write it all."""
        return len(self.prompt_ids) + len(self.ids)

    @property
    def least_small_forward_tokens(self) -> int:
        """What the small model cannot do without: all of it, tags included; where it wrote nothing, nothing."""
        return self.least_forward_tokens if SMALL in self.owners else 0

    @property
    def least_big_forward_tokens(self) -> int:
        """What the big model cannot do without: all up to its last token but the tags, in tokens of the small one."""
        if not self.handovers:
            return 0
        end = self.handovers[-1].start + self.handovers[-1].tokens
        return len(self.prompt_ids) + len(spans.strip(self.ids[:end], self.tags))

    def text(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The trace without tags."""
        return spans.strip(tokenizer.decode(spans.strip(self.ids, self.tags), skip_special_tokens=True))

    def pieces(self, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
        """The trace with its tags, cut where the owner changes: (text, by the big model)."""
        runs = itertools.groupby(zip(self.ids, self.owners), key=lambda token: token[1] == BIG)
        return [(tokenizer.decode([i for i, _ in run]), big) for big, run in runs]
