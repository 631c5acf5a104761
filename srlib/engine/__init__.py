"""One model behind one interface: token ids in, token ids out.

An engine keeps the KV cache of every open sequence and knows nothing of tags, pairs or
policies. Work is asked for in requests and done in steps, so that one forward pass serves
every request that is waiting:

    sequence = engine.open(prompt_ids)
    request = engine.submit(Request(sequence, max_new=64, stops=((eos,),)))
    while request not in engine.step(): ...
    request.ids, request.logprobs

`load` makes an engine from a model's name or folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from srlib import SrlibError
from srlib.params import ModelSpec


@dataclass(eq=False)
class Sequence:
    """One text an engine has open, and how much of it the model has processed."""

    slot: int
    ids: list[int]
    temperature: float
    top_p: float
    seed: int
    processed: int = 0  # keys and values of ids[:processed] are in the cache
    forwarded: int = 0  # tokens the model has processed for it, those taken back included
    logits: object = None  # (V,), after the last processed token
    generator: object = None  # random state; made on the first draw


@dataclass(eq=False)
class Request:
    """Read `feed`, then decode up to `max_new` tokens or to one of `stops`.

    With `max_new=0` it is an *extend*: `own` answers, for every id of `feed`, which token the
    model itself would have written after it, and `watched` the log-probability of `watch` there.
    Both come from the forward pass that reads `feed`.
    """

    sequence: Sequence
    feed: list[int] = field(default_factory=list)
    max_new: int = 0
    stops: tuple[tuple[int, ...], ...] = ()
    watch: int | None = None

    ids: list[int] = field(default_factory=list)  # decoded
    logprobs: list[float] = field(default_factory=list)  # of each decoded id, under the sampling temperature
    own: list[int] = field(default_factory=list)
    watched: list[float] = field(default_factory=list)

    @property
    def stopped(self) -> tuple[int, ...] | None:
        """The stop the decoded ids end with, if any."""
        return next((s for s in self.stops if len(self.ids) >= len(s) and tuple(self.ids[-len(s) :]) == s), None)


@dataclass
class Counters:
    """What an engine has done since it was made."""

    forward_tokens: int = 0  # tokens processed by the model
    decoded_tokens: int = 0  # tokens it wrote
    discarded_tokens: int = 0  # tokens processed and then taken back
    calls: int = 0  # forward passes
    seconds: float = 0.0


def load(spec: ModelSpec | str | Path, slots: int = 64):
    """An engine from a model's name or folder.

    Args:
        spec: name or path, or a `ModelSpec` with adapter, device and dtype.
        slots: how many sequences can be open at the same time.

    Raises:
        SrlibError: no such model or adapter, or one of its files is damaged.
    """
    from srlib.engine import transformers

    return transformers.load(spec if isinstance(spec, ModelSpec) else ModelSpec(path=str(spec)), slots)


def check(spec: ModelSpec) -> None:
    """Look at a model's files without loading it; a name that is no folder here is left to the hub.

    Raises:
        SrlibError: a folder holds no model or no adapter, or a safetensors file is not whole.
    """
    if spec.path is None:
        raise SrlibError("No model is named: give pair.small.path and pair.big.path a folder or a hub name.")
    # A hub name has at most one slash; anything else must be a folder.
    if Path(spec.path).exists() or spec.path.startswith((".", "/")) or spec.path.count("/") > 1:
        _check_folder(Path(spec.path), "config.json", "model")
    if spec.adapter is not None:
        _check_folder(Path(spec.adapter), "adapter_config.json", "adapter")


def _check_folder(folder: Path, config: str, kind: str) -> None:
    from safetensors import SafetensorError, safe_open

    if not (folder / config).is_file():
        raise SrlibError(f"There is no {kind} in {folder}: {config} is not there.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SrlibError(f"There is no {kind} in {folder}: it holds no .safetensors file.")
    for file in weights:
        try:
            with safe_open(file, framework="numpy"):
                pass
        except SafetensorError as error:
            raise SrlibError(f"{file} is damaged ({error}); make it again.") from None
