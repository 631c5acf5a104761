"""Runs of the notebooks, and what the command line does.

- `pipeline`: the notebooks of one params file, in order
- `stages`: what each depends on; `manifest`: what each was made of
- `sweep`: many runs
- `rehearse`: one params file with tiny models; `twins`: how they are made
- `export`: a run's tuned model and its data, for others
- `bench`: the speed of the policies, side by side
"""
