"""What one forward pass of a model costs in seconds: from a table, from a GPU's data sheet, or measured here."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from scipy.optimize import nnls

from srlib import SrlibError
from srlib.cost.shapes import KNOWN, Shape
from srlib.engine.protocol import Engine, Request
from srlib.params import nearest


@dataclass(frozen=True)
class Cost:
    """Seconds of a pass that takes `tokens` new tokens of some `sequences`, which have `context` tokens in the cache.

    t = fixed + each · sequences + max(base + held · context, token · tokens)

    The first term of the maximum is what has to be read from memory (weights, caches), the second
    what has to be computed; they overlap (Williams et al. 2009, the roofline).
    """

    base: float = 0.0  # to read the weights
    token: float = 0.0  # to compute one token
    held: float = 0.0  # to read the keys and values of one token
    fixed: float = 0.0  # to start a pass
    each: float = 0.0  # that a sequence adds, whatever its tokens

    def seconds(self, sequences: int, tokens: float, context: float = 0.0) -> float:
        """Of one pass."""
        return self.fixed + self.each * sequences + max(self.base + self.held * context, self.token * tokens)


Named = TypeVar("Named")


@dataclass(frozen=True)
class Gpu:
    """From the maker's data sheet: GB/s of memory, dense TFLOPS in bf16, or in fp16 where it has no bf16, GB of memory."""

    bandwidth: float
    tflops: float
    memory: float
    bf16: bool = True


GPUS = {
    "t4": Gpu(320, 65, 16, bf16=False),
    "a6000": Gpu(768, 155, 48),
    "rtx4090": Gpu(1008, 165, 24),
    "l40s": Gpu(864, 362, 48),
    "a100": Gpu(2039, 312, 80),
    "h100": Gpu(3350, 989, 80),
    "h200": Gpu(4800, 989, 141),
}


def roofline(
    gpu: str,
    model: str | Shape,
    devices: int = 1,
    bytes_per_weight: float = 2.0,
    memory_efficiency: float = 0.8,
    compute_efficiency: float = 0.7,
) -> Cost:
    """The cost of a model on a named GPU, or on `devices` of them with its layers shared (tensor parallelism).

    Reading takes bytes / bandwidth, computing 2 · parameters operations a token. The two efficiencies are
    about what the paper's table has of an A6000's limits (see the tests); communication is left out.

    Args:
        model: 1.5B, 7B, 8B, 14B, 32B or 70B (R1-Distill), or a shape of `srlib.cost.shapes`.

    Raises:
        SrlibError: no such GPU or model.
    """
    card = _named(GPUS, gpu, "GPU")
    shape = model if isinstance(model, Shape) else _named(KNOWN, model.lower(), "model shape")
    bandwidth = card.bandwidth * 1e9 * memory_efficiency * devices
    compute = card.tflops * 1e12 * compute_efficiency * devices
    return Cost(
        base=shape.parameters * bytes_per_weight / bandwidth,
        token=2 * shape.parameters / compute,
        held=2 * shape.layers * shape.kv * 2 / bandwidth,
    )


def measure(
    engine: Engine,
    batches: tuple[int, ...] = (1, 4, 16),
    reads: tuple[int, ...] = (1, 8, 32),
    repeats: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> Cost:
    """The cost of a pass of an engine on this machine: its steps are timed, and a plane is laid through the times.

    t = fixed + each · sequences + token · tokens, without negative parts, relative errors alike.

    Args:
        batches: sequences of a pass; more than the engine has slots are left out.
        reads: tokens that each sequence reads in a pass; 1 is also timed while it writes.
        clock: `time.process_time` counts the CPU seconds of this process alone, on a machine that others use too.
    """
    rows: list[tuple[int, int]] = []
    seconds: list[float] = []
    for batch in sorted({min(b, engine.slots) for b in batches}):
        timed: dict[str | int, list[float]] = {}
        for _ in range(repeats + 1):
            sequences = [engine.open([]) for _ in range(batch)]
            engine.run(*(Request(s, feed=[1] * 16) for s in sequences))
            for n in reads:
                requests = [Request(s, feed=[1] * n, ask=1) for s in sequences]
                timed.setdefault(n, []).append(_timed(engine, requests, clock))
            engine.run(*(Request(s, max_new=1) for s in sequences))
            eight = _timed(engine, [Request(s, max_new=8) for s in sequences], clock)
            timed.setdefault("write", []).append(eight / 8)
            for s in sequences:
                engine.close(s)
        for what, values in timed.items():
            rows.append((batch, batch * (1 if isinstance(what, str) else what)))
            seconds.append(statistics.median(values[1:]))
    grid, wanted = np.array([(1.0, b, n) for b, n in rows]), np.array(seconds)
    (fixed, each, token), _ = nnls(grid / wanted[:, None], np.ones(len(wanted)))
    return Cost(fixed=float(fixed), each=float(each), token=float(token))


def _timed(engine: Engine, requests: list[Request], clock: Callable[[], float]) -> float:
    start = clock()
    engine.run(*requests)
    return clock() - start


def _named(table: dict[str, Named], name: str, kind: str) -> Named:
    if name not in table:
        near = nearest(name, list(table))
        hint = f"; did you mean {near!r}?" if near else ""
        raise SrlibError(f"There is no {kind} {name!r}{hint} There are {', '.join(table)}.")
    return table[name]
