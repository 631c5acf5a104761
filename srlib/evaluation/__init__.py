"""What a policy reaches, and how sure that is.

- `completions`: every problem written and graded, each completion kept
- `stats`: accuracy, comparisons, intervals
- `counterfactual`: what would have been without a request
- `report`: two runs beside each other
"""

from srlib.evaluation.stats import accuracy, compare

__all__ = ["accuracy", "compare"]
