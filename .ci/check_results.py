"""What the project claims of the default run: `python .ci/check_results.py results.json` fails where a claim does not hold.

README.md has the same claims, with the numbers of outputs/reference/results.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping

from srlib.evaluation.claims import Claim, Row, accuracy, difference, of_policies, percent


def claims(rows: Mapping[str, Row]) -> Iterator[Claim]:
    """Each claim, whether it holds, and the numbers that say so. Args: rows: of results.json, by policy."""
    small, big, learned, matched, grpo = (rows[name] for name in ("small", "big", "learned", "random_matched", "grpo"))
    n = min(row["n_problems"] for row in rows.values())
    yield Claim("Every policy wrote at least 1,000 problems", n >= 1000, f"n = {n:,}")
    yield Claim("The big model alone is right on at least 90 %", big["accuracy"] >= 0.9, accuracy(big))
    yield Claim("The small one alone on at most 40 %", small["accuracy"] <= 0.4, accuracy(small))
    share = learned["offload_share"]
    yield Claim("The learned policy hands over at most 8 % of the tokens", share <= 0.08, percent(share))
    part = learned["accuracy"] / big["accuracy"]
    yield Claim("It keeps at least 85 % of the big model's accuracy", part >= 0.85, f"{percent(part)} of it")
    gain = difference(learned, matched)
    yield Claim("It is at least 30 points above random offloading at its share", gain.value >= 0.3, str(gain))
    yield Claim(
        "Random offloading hands over no less there (within 1 point)",
        share - matched["offload_share"] <= 0.01,
        percent(matched["offload_share"]),
    )
    part, share = grpo["accuracy"] / big["accuracy"], grpo["offload_share"]
    yield Claim(
        "Reinforced, it keeps at least 95 % of the big model's accuracy, with at most 8 % of the tokens",
        part >= 0.95 and share <= 0.08,
        f"{percent(part)} of it, {percent(share)} of the tokens",
    )
    yield from of_policies(rows)
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


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        made = list(claims({row["policy"]: row for row in json.load(file)}))
    for claim in made:
        print("holds" if claim.holds else "FAILS", f"{claim.words}: {claim.found}", sep="  ")
    sys.exit(not all(claim.holds for claim in made))
