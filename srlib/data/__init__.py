"""Problems and worked traces: what they are, where they come from, and whether an answer is right.

- `rows`: the schema of a problem and of an annotated trace, in JSONL
- `problems`: loads them, from files, from the hub and from named sets
- `benchmarks`: the named sets
- `arith`: the arithmetic world
- `spans`: the grammar of the tags
- `prompts`: how a question is put to a model
- `grade`: whether a completion is right; `equal`: whether two answers are the same
- `journal`: a file that long work writes down as it goes
- `digests`, `modules`: what work depends on, files, models and code, in a few digits
"""
