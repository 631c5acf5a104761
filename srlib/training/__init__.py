"""How the small model learns.

- `arith_pair`: the two models of the arithmetic world, from scratch
- `sft`: fine-tuning on annotated traces
- `grpo`: reinforcement; `rollouts`: its traces, `rewards`: what they are paid, `looks`: which adapter is kept,
  `launch`: several processes
- `trainer`: what both of these share
"""
