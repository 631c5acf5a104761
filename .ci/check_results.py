"""What the project claims of a run's results: `python .ci/check_results.py results.json` fails where a claim does not hold.

README.md has the same claims, with the numbers of outputs/reference/results.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

Row = Mapping[str, Any]


class Claim(NamedTuple):
    words: str
    holds: bool
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
    return f"{100 * value:+.1f} points [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]".replace("-", "−")


def accuracy(row: Row) -> str:
    """With its interval."""
    return "{} [{:.1f}, {:.1f}]".format(percent(row["accuracy"]), *(100 * end for end in row["ci95"]))


def at_share(row: Row) -> str:
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


def claims(rows: Mapping[str, Row]) -> Iterator[Claim]:
    """Each claim, whether it holds, and the numbers that say so. Args: rows: of results.json, by policy."""
    small, big, learned = (rows[name] for name in ("small", "big", "learned"))
    n = min(row["n_problems"] for row in rows.values())
    yield Claim("Every policy wrote at least 1,000 problems", n >= 1000, f"n = {n:,}")
    yield Claim("The big model alone is right on at least 90 %", big["accuracy"] >= 0.9, accuracy(big))
    yield Claim("The small one alone on at most 40 %", small["accuracy"] <= 0.4, accuracy(small))
    share = learned["offload_share"]
    yield Claim("The learned policy hands over at most 8 % of the tokens", share <= 0.08, percent(share))
    part = learned["accuracy"] / big["accuracy"]
    yield Claim(
        "It keeps at least 85 % of the big model's accuracy", part >= 0.85, f"{percent(part)}: {accuracy(learned)}"
    )
    yield from _random(rows)
    yield from _learned(rows)
    yield from _untrained(rows)
    twice = max(
        row[f"{side}_forward_tokens"] / row[f"least_{side}_forward_tokens"]
        for name, row in rows.items()
        if name.startswith(("learned", "grpo", "rejection", "random"))
        for side in ("small", "big")
        if row[f"least_{side}_forward_tokens"]
    )
    yield Claim(
        "No model processes a token twice (within 5 % of the least)", twice <= 1.05, f"at most {twice:.3f} of it"
    )


def _random(rows: Mapping[str, Row]) -> Iterator[Claim]:
    small, big, learned, matched = (rows[name] for name in ("small", "big", "learned", "random_matched"))
    gain = difference(learned, matched)
    yield Claim(
        "It is at least 30 points above random offloading at its share, their intervals apart",
        gain.value >= 0.3 and learned["ci95"][0] > matched["ci95"][1],
        f"{gain}; random: {at_share(matched)}",
    )
    less = learned["offload_share"] - matched["offload_share"]
    yield Claim(
        "Random offloading hands over no less there (within 1 point)", less <= 0.01, percent(matched["offload_share"])
    )
    # By the share of the way from small to big; where it bends upwards, what is bought lies below the straight line.
    line = {
        name: small["accuracy"] + row["offload_share"] * (big["accuracy"] - small["accuracy"])
        for name, row in rows.items()
        if name.startswith("random")
    }
    below = [name for name in line if rows[name]["ci95"][1] < line[name]]
    above = [name for name in line if rows[name]["ci95"][0] > line[name]]
    widest = max(line, key=lambda name: line[name] - rows[name]["accuracy"])
    yield Claim(
        "What random offloading buys is less than in proportion: it lies below the straight line from the small model "
        "to the big one, and nowhere above it",
        bool(below) and not above,
        f"below at {len(below)} of {len(line)} shares, above at {len(above)}; "
        f"{at_share(rows[widest])}, where the line has {percent(line[widest])}",
    )


def _learned(rows: Mapping[str, Row]) -> Iterator[Claim]:
    small, learned, off, grpo = (rows[name] for name in ("small", "learned", "learned_off", "grpo"))
    idle = difference(off, small)
    yield Claim(
        "With nobody answering it is as right as the small model, neither more nor less: the difference may be 0",
        idle.low <= 0 <= idle.high,
        f"{idle}: {accuracy(off)} against {accuracy(small)}",
    )
    by_refusal = sorted((name for name in rows if name.startswith("rejection_")), key=lambda name: float(name[10:]))
    walk = [learned, *(rows[name] for name in by_refusal), off]
    steps = [difference(one, other) for one, other in zip(walk, walk[1:])]
    shares = [row["offload_share"] for row in walk]
    yield Claim(
        "Refusing its requests at random walks from there to nobody answering: each step has less accuracy, and a "
        "smaller share",
        bool(by_refusal) and all(step.low > 0 for step in steps) and shares == sorted(set(shares), reverse=True),
        ", ".join(at_share(row) for row in walk[1:-1]),
    )
    change, gain = difference(grpo, learned), difference(grpo, random_at(rows, grpo["offload_share"]))
    yield Claim(
        "Reinforcement loses no accuracy that the two intervals could tell",
        change.high >= 0,
        f"{change}: {at_share(grpo)}, before it {at_share(learned)}",
    )
    yield Claim("Reinforced, it is above random offloading at its share", gain.low > 0, str(gain))


def _untrained(rows: Mapping[str, Row]) -> Iterator[Claim]:
    learned = rows["learned"]
    found = [rows[name] for name in ("entropy", "margin", "confidence")]
    best = max(found, key=lambda row: row["accuracy"])
    apart = max(abs(row["offload_share"] - learned["offload_share"]) for row in found)
    yield Claim(
        "Asking where the untrained small model is unsure, by its entropy, margin or confidence and with thresholds set "
        "on other problems, hands over as much (within 1 point)",
        apart <= 0.01,
        ", ".join(f"{row['policy']}: {percent(row['offload_share'])}" for row in found),
    )
    gain = difference(best, random_at(rows, best["offload_share"]))
    yield Claim("The best of these is above random offloading at its share", gain.low > 0, f"{best['policy']}: {gain}")
    ahead = difference(best, learned)
    yield Claim(
        "**In this world it is no worse than the learned policy: here training gains nothing over it**",
        ahead.high >= 0,
        f"{ahead}: {at_share(best)}, learned {at_share(learned)}",
    )


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        made = list(claims({row["policy"]: row for row in json.load(file)}))
    for claim in made:
        print("holds" if claim.holds else "FAILS", f"{claim.words}: {claim.found}", sep="  ")
    sys.exit(not all(claim.holds for claim in made))
