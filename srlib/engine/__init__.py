"""One model behind one interface: token ids in, token ids out.

- `protocol`: what every engine is, and the small classes that go in and out
- `files`: a model's files, looked at without loading it
- `loading`: from a model's name or folder to an engine, and what can be seen of it before
- `models`: a model and its tokenizer, as transformers loads them
- `adapters`: the tags as tokens; adapters made, saved and merged
- `transformers`: the engine for a CPU or one GPU; `slots`: its cache and its attention
- `process`: the same in a process of its own
- `vllm`: the engine on vLLM, in process or as a server

An engine knows nothing of tags, pairs or policies.
"""

from srlib.engine.loading import check, load
from srlib.engine.protocol import GREEDY, STOP_TAIL, Counters, Request, Sampling, Sequence

__all__ = ["GREEDY", "STOP_TAIL", "Counters", "Request", "Sampling", "Sequence", "check", "load"]
