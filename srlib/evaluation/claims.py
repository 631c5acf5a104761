"""What is claimed of the policies of a run, from the rows of `results.json` alone: each sentence, and whether it holds.

Notebook 05 prints them under its figure, README.md has them of the run in outputs/reference/.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any, NamedTuple

Row = Mapping[str, Any]
UNTRAINED = ("entropy", "margin", "confidence")


class Claim(NamedTuple):
    """A sentence, whether it holds (None: it cannot be told), and the numbers that say so."""

    words: str
    holds: bool | None
    found: str


class Difference(NamedTuple):
    """Of two accuracies, with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return points(self.value, (self.low, self.high))


def difference(one: Row, other: Row) -> Difference:
    """one − other, from the interval of each (Newcombe 1998, Statistics in Medicine 17: 873–890, method 10).

    As if they had answered different problems: pairs by problem, as notebook 05 has them, are sharper.
    """
    (p, (low, high)), (q, (least, most)) = ((row["accuracy"], row["ci95"]) for row in (one, other))
    below, above = ((p - low) ** 2 + (most - q) ** 2) ** 0.5, ((high - p) ** 2 + (q - least) ** 2) ** 0.5
    return Difference(p - q, p - q - below, p - q + above)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def points(value: float, interval: tuple[float, float]) -> str:
    """A difference, with its interval."""
    return f"{100 * value:+.1f} points [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]".replace("-", "−")


def accuracy(row: Row) -> str:
    """With its interval."""
    return "{} [{:.1f}, {:.1f}]".format(percent(row["accuracy"]), *(100 * end for end in row["ci95"]))


def at_share(row: Row) -> str:
    """Accuracy with its interval, and offload share."""
    return f"{accuracy(row)} at {percent(row['offload_share'])}"


def random_at(rows: Mapping[str, Row], share: float) -> Row:
    """Random offloading at this share: straight between the nearest two that were measured, interval ends as well."""
    curve = [row for name, row in rows.items() if name in ("small", "big") or name.startswith("random")]
    below = max((row for row in curve if row["offload_share"] <= share), key=lambda row: row["offload_share"])
    above = min((row for row in curve if row["offload_share"] >= share), key=lambda row: row["offload_share"])
    gap = above["offload_share"] - below["offload_share"]
    weight = (share - below["offload_share"]) / gap if gap else 0.0

    def between(one: float, other: float) -> float:
        return (1 - weight) * one + weight * other

    ends = [between(*pair) for pair in zip(below["ci95"], above["ci95"])]
    return {"accuracy": between(below["accuracy"], above["accuracy"]), "ci95": ends, "offload_share": share}


def of_policies(rows: Mapping[str, Row]) -> Iterator[Claim]:
    """Of random offloading, trained policies, their controls, and baselines that need no training, as far as they are there.

    Args:
        rows: of `results.json`, by policy.
    """
    if {"small", "big"} <= rows.keys():
        yield from _random(rows)
        if "learned" in rows:
            yield from _learned(rows)
        if "grpo" in rows:
            yield from _reinforced(rows)
        yield from _untrained(rows)
    if {"big", "speculative"} <= rows.keys():
        big, drafted = rows["big"], rows["speculative"]
        yield Claim(
            "Speculative decoding is right exactly as often as the big model",
            drafted["accuracy"] == big["accuracy"],
            f"{accuracy(drafted)} against {accuracy(big)}",
        )


def _random(rows: Mapping[str, Row]) -> Iterator[Claim]:
    """By the share of the way from small to big: where the curve bends upwards it lies below the straight line."""
    small, way = rows["small"], rows["big"]["accuracy"] - rows["small"]["accuracy"]
    line = {
        name: small["accuracy"] + row["offload_share"] * way for name, row in rows.items() if name.startswith("random")
    }
    if not line:
        return
    below = [name for name in line if rows[name]["ci95"][1] < line[name]]
    above = [name for name in line if rows[name]["ci95"][0] > line[name]]
    widest = max(line, key=lambda name: line[name] - rows[name]["accuracy"])
    yield Claim(
        "What random offloading buys is less than in proportion: it lies below the straight line from the small model "
        "to the big one, and nowhere above it",
        bool(below) and not above if way > 0 else None,
        f"below at {len(below)} of {len(line)} shares, above at {len(above)}; "
        f"{at_share(rows[widest])}, where the line has {percent(line[widest])}",
    )


def _learned(rows: Mapping[str, Row]) -> Iterator[Claim]:
    small, big, learned = (rows[name] for name in ("small", "big", "learned"))
    asks, way, gone = learned["offload_share"] > 0, *(row["accuracy"] - small["accuracy"] for row in (big, learned))
    yield Claim(
        "The learned policy goes most of the way from the small model to the big one, with less than a tenth of the tokens",
        gone > way / 2 and learned["offload_share"] < 0.1 if way > 0 and asks else None,
        f"{accuracy(small)} → {at_share(learned)} → {accuracy(big)}",
    )
    if matched := rows.get("random_matched"):
        yield Claim(
            "It is right more often than random offloading at its share, and their intervals do not meet",
            learned["ci95"][0] > matched["ci95"][1],
            f"{difference(learned, matched)}; random: {at_share(matched)}",
        )
    if not (off := rows.get("learned_off")):
        return
    idle = difference(off, small)
    yield Claim(
        "With nobody answering it is as right as the small model, neither more nor less: the difference may be 0",
        idle.low <= 0 <= idle.high,
        f"{idle}: {accuracy(off)} against {accuracy(small)}",
    )
    refusals = sorted((name for name in rows if name.startswith("rejection_")), key=lambda name: float(name[10:]))
    if refusals:
        walk = [learned, *(rows[name] for name in refusals), off]
        steps, shares = [difference(*two) for two in pairwise(walk)], [row["offload_share"] for row in walk]
        yield Claim(
            "Refusing its requests at random walks from there to nobody answering: each step has less accuracy, and a "
            "smaller share",
            all(step.low > 0 for step in steps) and shares == sorted(set(shares), reverse=True) if asks else None,
            ", ".join(at_share(row) for row in walk[1:-1]),
        )


def _reinforced(rows: Mapping[str, Row]) -> Iterator[Claim]:
    grpo = rows["grpo"]
    if learned := rows.get("learned"):
        change = difference(grpo, learned)
        yield Claim(
            "Reinforcement gains accuracy that the two intervals can tell",
            change.low > 0,
            f"{change}: {at_share(grpo)}, before it {at_share(learned)}",
        )
    gain = difference(grpo, random_at(rows, grpo["offload_share"]))
    yield Claim(
        "Reinforced, it is above random offloading at its share",
        gain.low > 0 if grpo["offload_share"] else None,
        f"{gain}",
    )


def _untrained(rows: Mapping[str, Row]) -> Iterator[Claim]:
    learned, found = rows.get("learned"), [rows[name] for name in UNTRAINED if name in rows]
    if not (learned and found):
        return
    best = max(found, key=lambda row: row["accuracy"])
    apart = max(abs(row["offload_share"] - learned["offload_share"]) for row in found)
    yield Claim(
        "Asking where the untrained small model is unsure, with thresholds set on other problems, hands over as much "
        "(within 1 point)",
        apart <= 0.01,
        ", ".join(f"{row['policy']}: {percent(row['offload_share'])}" for row in found),
    )
    gain = difference(best, random_at(rows, best["offload_share"]))
    yield Claim("The best of these is above random offloading at its share", gain.low > 0, f"{best['policy']}: {gain}")
    ahead = difference(learned, best)
    yield Claim(
        "**The learned policy is right more often than the best of them: here asking is worth training**",
        ahead.low > 0,
        f"{ahead}: {at_share(learned)}, {best['policy']} {at_share(best)}",
    )
