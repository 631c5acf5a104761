"""Sentences about seconds, those of notebook 07: see `srlib.show.claims`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from srlib.show.claims import Row, claim


def of_batches(cost: Any, sequences: int) -> None:
    """Up to how many sequences a decoding step takes the time of one; of a `srlib.cost.costs.Cost`."""
    one, many = cost.seconds(1, 1), cost.seconds(sequences, sequences)
    claim(
        f"{sequences} sequences take the big model hardly longer than one, by a tenth at most",
        many <= 1.1 * one,
        f"{1000 * one:.1f} and {1000 * many:.1f} ms a token; computing takes over at {cost.base / cost.token:.0f}",
    )


def of_formula(speed_up: Any, decode: int, chunk: int) -> None:
    """The paper's formula beside whole chunks and events; a data frame of times faster, a column a share."""
    first = speed_up.columns[0]
    whole, exact = speed_up.loc["formula, whole chunks", first], speed_up.loc["formula", first]
    claim(
        f"at {first:.2%} of {decode:,} tokens whole chunks leave the big model's part out",
        round(first * decode) < chunk and whole > exact,
        f"{round(first * decode)} tokens, a chunk has {chunk}: {whole:.2f} times, and {exact:.2f} by the formula itself",
    )
    apart = (speed_up.loc["events"] / speed_up.loc["formula"] - 1).abs().max()
    claim("events give the formula's figures within a twentieth", apart <= 0.05, f"{apart:.1%} at most")


def of_speed_up(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], at: float) -> None:
    """What is left of the speed-up at a share; name → (shares, times)."""
    left = {name: times[list(shares).index(at)] for name, (shares, times) in curves.items()}
    claim(
        f"at {at:.0%} of the tokens no more than a factor of two and a half is left",
        max(left.values()) <= 2.5,
        ", ".join(f"{name} {value:.2f}" for name, value in left.items()),
    )


def of_seconds(points: Sequence[Row]) -> None:
    """How long the learned policy takes beside the two models alone; each has `big`, `policy`, `seconds`."""
    for big in dict.fromkeys(point["big"] for point in points):
        took = {point["policy"]: point["seconds"] for point in points if point["big"] == big}
        if not {"small", "big", "learned"} <= took.keys():
            continue
        claim(
            f"with {big} the learned policy takes less than a quarter of the way from the small model's time to the "
            "big one's",
            took["learned"] - took["small"] < (took["big"] - took["small"]) / 4
            if took["learned"] > took["small"]
            else None,
            ", ".join(f"{name} {seconds:.2f} s" for name, seconds in took.items()),
        )


def of_the_clock(checked: Sequence[Row]) -> None:
    """Whether the simulation is near what was measured."""
    ratios = [row["ratio"] for row in checked]
    claim(
        "predictions are within a fifth of what is measured",
        all(0.8 <= ratio <= 1.25 for ratio in ratios) if ratios else None,
        f"ratios from {min(ratios):.2f} to {max(ratios):.2f}" if ratios else "",
    )


def of_measured_speed(rows: Sequence[Row]) -> None:
    """Of `srlib.cost.speed`: what the learned policy gains, whether the simulation said so, and how far the limit is."""
    learned = [row for row in rows if row["policy"] == "learned"]
    for row in learned:
        claim(
            f"batch {row['batch']}: where a token of the big model costs {row['cost_ratio']:.1f} of the small one, the "
            "learned policy is faster than the big model alone",
            row["speed_up"] > 1,
            f"{row['speed_up']:.2f} times; {row['offload_share']:.1%} of the tokens are the big model's",
        )
    apart = [row["predicted_speed_up"] / row["speed_up"] for row in rows if row["predicted_s"] is not None]
    claim(
        "the simulation says every speed-up within a tenth",
        all(0.9 <= ratio <= 1.1 for ratio in apart) if apart else None,
        f"from {min(apart):.2f} to {max(apart):.2f} of what is measured" if apart else "",
    )
    over = [row["measured_s"] / row["limit_s"] for row in learned]
    claim(
        "the learned policy takes at most 15 % longer than its limit",
        max(over) <= 1.15 if over else None,
        ", ".join(f"batch {row['batch']}, {row['ratio']:g} times: {part:.2f}" for row, part in zip(learned, over)),
    )
    for row in rows:
        if row["policy"] == "published":
            (ours,) = (r for r in learned if (r["batch"], r["ratio"]) == (row["batch"], row["ratio"]))
            claim(
                f"batch {row['batch']}, {row['ratio']:g} times: the public code's way takes longer for the same tokens",
                row["measured_s"] > ours["measured_s"],
                f"{row['measured_s'] / ours['measured_s']:.1f} times as long, and "
                f"{row['forward_tokens'] / ours['forward_tokens']:.1f} times as many tokens processed",
            )


def of_load(parts: Sequence[float], curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Requests that come at parts of what a group serves at full load: name → (rates, seconds)."""
    for name, (_, seconds) in curves.items():
        (calm, busy), (below, above) = (seconds[0], seconds[-1]), (parts[0], parts[-1])
        half = [s for part, s in zip(parts, seconds) if part <= 0.5][-1]
        claim(
            f"{name}: up to half of what it serves a request hardly takes longer, by a quarter at most",
            half <= 1.25 * calm,
            f"{calm:.1f} s at {below:.0%}, {half:.1f} s at 50%",
        )
        claim(
            f"{name}: beyond what it serves, requests wait, half as long again at least",
            busy >= 1.5 * calm,
            f"{busy:.1f} s at {above:.0%}",
        )


def of_rates(alone: Sequence[Any], mixed: Sequence[Any]) -> None:
    """How many problems a second a group serves beside the big model alone; one each of `planning.Group`, or none."""
    for one, other in zip(alone, mixed):
        times = other.per_s / one.per_s
        claim(
            "small models beside it have the big model serve more than twice as many problems, and on each GPU more",
            times > 2 and times * one.gpus > other.gpus,
            f"{one.per_s:.3f} a second on {one.gpus} GPU(s) alone, {other.per_s:.3f} on {other.gpus}",
        )


def of_groups(groups: Sequence[Any]) -> None:
    """Where the big model is at work all the time, whether another small one adds anything; of `planning.Group`."""
    pairs = [
        (one, other)
        for one, other in pairwise(groups)
        if one.devices == other.devices and one.replicas and one.busy["big"] >= 0.95
    ]
    gains = [other.per_s / one.per_s - 1 for one, other in pairs]
    claim(
        "where the big model is at work 95 % of the time, more small ones add less than a tenth",
        max(gains) < 0.1 if gains else None,
        ", ".join(f"{one.name} → {other.name} {gain:+.1%}" for (one, other), gain in zip(pairs, gains)),
    )
