"""What people look at.

- `figures`: the figures of the notebooks, and a trace in two colours
- `tables`: their tables

Names, traces and texts come from models and data sets: here they are text, never HTML or formulas.
"""
