"""What the two ways to vLLM share."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine, Iterable
from typing import NamedTuple

from srlib.engine.protocol import Measure

ROUNDING = 1e-6  # of a sum of probabilities


class Piece(NamedTuple):
    """Some tokens of an answer, as they come."""

    ids: list[int]
    logprobs: list[dict[int, float]]  # for each of `ids`: of that id, and of others that were asked for
    cached: int | None  # how many ids of the prompt were in the cache; None: not told


async def gather(works: Iterable[Coroutine]) -> list:
    """The results of `works`, which are done at the same time; the first error ends them all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


def uncertainty(measure: Measure, logprobs: Iterable[float], temperature: float = 1.0) -> float:
    """What `Doubt` measures, of a distribution at temperature 1 whose likeliest tokens are given; all others count as one.

    Args:
        temperature: at which they are given.
    """
    shares = [math.exp(x) for x in logprobs]
    rest = 1.0 - sum(shares)
    if rest > ROUNDING:
        shares.append(rest)
    weights = [p**temperature for p in shares]
    total = sum(weights)
    if measure == "entropy":
        return -sum(w / total * math.log(w / total) for w in weights if w > 0)
    first, second, *_ = [*sorted((w / total for w in weights), reverse=True), 0.0]
    return 1 - (first - second if measure == "margin" else first)
