"""What people look at.

- `figures`: the figures of the notebooks, and a trace in two colours
- `tables`: their tables
- `claims`: their sentences about results, held against the run; small cases chosen by what they are to show
- `timing`: such sentences about seconds
- `owners`: who wrote each token, right below it

Names, traces and texts come from models and data sets: here they are text, never HTML or formulas.
"""
