"""Fail if a run's results.json does not show what the project claims."""

import json
import sys

rows = {row["policy"]: row for row in json.load(open(sys.argv[1]))}
small, big, learned, off, matched = (
    rows[name] for name in ("small", "big", "learned", "learned_off", "random_matched")
)
claims = {
    "n of at least 1,000": all(row["n_problems"] >= 1000 for row in rows.values()),
    "big alone at 90 % or more": big["accuracy"] >= 0.90,
    "small alone at 40 % or less": small["accuracy"] <= 0.40,
    "learned at a share of 8 % or less": learned["offload_share"] <= 0.08,
    "learned 30 points above random at its share": learned["accuracy"] >= matched["accuracy"] + 0.30,
    "their intervals apart": learned["ci95"][0] > matched["ci95"][1],
    "random at no lower a share (within 1 point)": matched["offload_share"] >= learned["offload_share"] - 0.01,
    "learned at 85 % of the big model's accuracy": learned["accuracy"] >= 0.85 * big["accuracy"],
    "with nobody answering, at most 3 points above the small model": off["accuracy"] <= small["accuracy"] + 0.03,
    "no token processed twice, by either model": all(
        row[f"{side}_forward_tokens"] <= 1.05 * row[f"least_{side}_forward_tokens"]
        for name, row in rows.items()
        if name.startswith(("learned", "random"))
        for side in ("small", "big")
    ),
}
for claim, holds in claims.items():
    print("holds " if holds else "FAILS ", claim)
sys.exit(not all(claims.values()))
