"""What a policy reaches, and how sure that is.

- `completions`: every problem written and graded, each completion kept
- `stats`: accuracy, differences, intervals; by problem and by training seed
- `claims`: sentences about policies, and whether a run bears them out
- `tuning`: baselines at their best
- `comparisons`: many of them in a table, corrected for their number
- `counterfactual`: what would have been without a request
- `report`: two runs beside each other
"""

from srlib.evaluation.stats import accuracy, compare

__all__ = ["accuracy", "compare"]
