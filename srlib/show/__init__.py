"""What people look at.

- `figures`: the figures of the notebooks
"""
