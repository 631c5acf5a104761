"""Typed parameters of every stage, read from one YAML file and checked before any work.

- `models`: a model, a pair of them
- `data`, `annotation`, `training`, `cost`, `decoding`, `evaluation`: the sections of a params file, each
  in the file that is named after the room that reads it
- `run`: all sections together, `Params`, and where a run's artefacts lie
- `loading`: from a file or a notebook to checked values; a sentence where they are wrong
- `written`: YAML as it is written, text as text
- `reference`: every setting in words, what `python -m srlib params` prints
- `own`: functions and classes of one's own, named by their file
- `names`: the nearest name to one that is none
- `paths`: the clone, and paths as they are seen from here
- `secrets`: keys and passwords, which are never written down

A file in the folder `params/` is a scale: the same notebooks run on a laptop or on a node, and only
the file differs. This room knows names, types and limits; it knows nothing of models, and no torch.
"""

from srlib.params.annotation import Annotate, Judge, Worth
from srlib.params.cost import Hardware, Latency
from srlib.params.data import Arith, ArithModel, Data, Source
from srlib.params.decoding import Offload, slots_for
from srlib.params.evaluation import Bench, Evaluate
from srlib.params.loading import build, from_notebook, load, parse_override, read_file
from srlib.params.models import ModelSpec, Pair, Section
from srlib.params.names import nearest
from srlib.params.paths import ROOT, find, here
from srlib.params.run import Base, Params
from srlib.params.training import Grpo, Sft

__all__ = [
    "ROOT", "Annotate", "Arith", "ArithModel", "Base", "Bench", "Data", "Evaluate", "Grpo", "Hardware", "Judge",
    "Latency", "ModelSpec", "Offload", "Pair", "Params", "Section", "Sft", "Source", "Worth", "build",
    "find", "from_notebook", "here", "load", "nearest", "parse_override", "read_file", "slots_for",
]  # fmt: skip
