"""The latency model: how long a trace takes, from its counts alone.

Seconds come from a calibration of two engines on this machine or from a named table, so the
noise of a machine never enters a reward. Nothing overlaps here: the two models take turns.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from srlib import SrlibError
from srlib.engine import Request
from srlib.params import Latency, nearest


@dataclass(frozen=True)
class Speed:
    """Seconds per token of one model, a sequence on its own share of the batch."""

    decode: float
    prefill: float


@dataclass(frozen=True)
class PairSpeed:
    """Two models, and what a hand-over costs on top, in seconds."""

    small: Speed
    big: Speed
    handover: float = 0.0

    def seconds(self, prompt: int, small: int, big: int, handovers: int) -> float:
        """Seconds of one trace in which the models take turns, each token processed once by each model.

        t = prompt·p_s + small·d_s + big·p_s  +  [big > 0] (prompt + small)·p_b + big·d_b  +  handovers·h

        with d, p the decode and prefill seconds a token. What the big model reads behind its
        last span is counted too, though an engine may never read it.

        Args:
            prompt, small, big: tokens of the prompt, by the small and by the big model.
        """
        t = (prompt + big) * self.small.prefill + small * self.small.decode + handovers * self.handover
        return t + ((prompt + small) * self.big.prefill + big * self.big.decode if big else 0.0)

    def alone(self, prompt: int, tokens: int) -> float:
        """Seconds of the big model writing all of it."""
        return prompt * self.big.prefill + tokens * self.big.decode


# Tokens a second on an A6000 as the paper's simulator has them (arXiv 2504.16379): decode, prefill.
TABLES = {
    "a6000": {
        "1.5B": (141, 28_868),
        "7B": (41.3, 7_658),
        "8B": (40.3, 7_457),
        "14B": (22, 3_836),
        "32B": (16, 2_595),
        "70B": (9, 2_238),
    }
}


def pair_speed(config: Latency, small: Speed | None = None, big: Speed | None = None) -> PairSpeed:
    """The latency model that the params ask for.

    Args:
        small, big: as `calibrate` gives them; needed where `source` is `calibrate`.

    Raises:
        SrlibError: the table has no such model.
    """
    if config.source == "calibrate":
        return PairSpeed(small, big, config.handover_s)
    table = TABLES[config.source]
    for name in (config.small, config.big):
        if name not in table:
            near = nearest(name, list(table))
            hint = f" (nearest: {near})" if near else ""
            raise SrlibError(f"The table {config.source} has no model {name!r}; it has {', '.join(table)}{hint}.")
    speeds = [Speed(1 / decode, 1 / prefill) for decode, prefill in (table[config.small], table[config.big])]
    return PairSpeed(*speeds, config.handover_s)


def calibrate(engine, batch: int = 16, tokens: int = 32, repeats: int = 5) -> Speed:
    """Median seconds a token of one engine, decoding and prefilling a batch; the first run warms up.

    Args:
        batch: sequences at the same time; seconds are divided among them.
        tokens: prefilled, then decoded, by each.
    """
    prompt = [1] * tokens
    timed: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        sequences = [engine.open([]) for _ in range(min(batch, engine.slots))]
        marks = [engine.counters.seconds]
        engine.run(*(Request(s, feed=prompt) for s in sequences))
        marks.append(engine.counters.seconds)
        engine.run(*(Request(s, max_new=tokens) for s in sequences))
        marks.append(engine.counters.seconds)
        for sequence in sequences:
            engine.close(sequence)
        done = len(sequences) * tokens
        timed.append(((marks[1] - marks[0]) / done, (marks[2] - marks[1]) / done))
    prefill, decode = (statistics.median(column) for column in zip(*timed[1:]))
    return Speed(decode, prefill)
