"""How two models write a trace."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import Field

from srlib.params.models import Section


class Offload(Section):
    """How two models write a trace."""

    max_tokens: int = Field(96, ge=1, description="most tokens of one trace, tags included")
    span_budget: int = Field(
        8, ge=1, description="most tokens the big model writes in one span, as annotate.max_span_tokens or more"
    )
    batch_size: int = Field(
        64, ge=1, description="most traces that one model is asked for at a time, to write them or to read along"
    )
    temperature: float = Field(0.0, ge=0, description="of both models; 0: always the likeliest token")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="above temperature 0: probability that the tokens drawn from have together; 1: all tokens",
    )
    top_k: int = Field(0, ge=0, description="above temperature 0: number of likeliest tokens drawn from; 0: all tokens")
    control_chunk: int = Field(
        1, ge=1, description="big tokens between two looks of the small model; always 1 where a tag is plain text"
    )
    stream_chunk: int = Field(
        0, ge=0, description="the big model reads along every so many small tokens; 0: when asked"
    )
    overlap: bool = Field(
        False,
        description="the big model writes on while the small one looks at its last chunk; worth it where both work at "
        "the same time (process, vllm)",
    )
    oversubscribe: float = Field(
        0.0, ge=0, description="traces under way beyond batch_size, as a part of it: they stand in for those at the big"
    )
    hint: str = Field("", description="put behind every problem that is written; for a model trained with one")
    step_ends: list[Annotated[str, Field(min_length=1)]] = Field(
        [";", "\n"],
        min_length=1,
        description="texts that a step of a trace ends with: for annotate.method worth, glimpse and specreason",
    )
    n_demo: int = Field(64, ge=1, description="problems in the batch of notebook 04")

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of an `Offloader`."""
        return self.model_dump(exclude={"n_demo", "step_ends"})

    @property
    def slots(self) -> int:
        """Sequences an engine has open."""
        return slots_for(self.batch_size, self.oversubscribe)


def slots_for(batch_size: int, oversubscribe: float) -> int:
    """Slots for the traces under way at a batch size."""
    return batch_size + math.ceil(batch_size * oversubscribe)
