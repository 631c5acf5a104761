"""What to buy: groups of GPUs with one big model and some small ones, simulated at full load.

A group is one big model, its layers shared by some GPUs, and small models on GPUs of their own; or
both on one GPU. How many requests it has under way is what its KV caches hold: every request has one
with each model, and the big model's are the large ones. Costs are rooflines (`srlib.cost.costs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srlib import SrlibError
from srlib.cost import latency
from srlib.cost.costs import GPUS, roofline
from srlib.cost.jobs import Pipeline, Simulation
from srlib.cost.shapes import KNOWN

USABLE = 0.9  # of a GPU's memory; the rest is for activations and what the allocator cannot use


@dataclass(frozen=True)
class Load:
    """What is asked: tokens of a request, how much of it is the big model's, and seconds a hand-over costs on top."""

    share: float
    prompt: int = 512
    decode: int = 4096
    span: int = 128
    handover_s: float = 0.0


@dataclass(frozen=True)
class Group:
    """GPUs that serve together, and what they do at full load."""

    name: str
    gpus: int
    slots: int  # requests under way
    per_s: float  # requests a second
    latency_s: float  # of a request, once it is taken up
    busy: dict[str, float]  # share of the time each model is at work, on average over its replicas
    devices: int = 1  # as `group` takes them
    replicas: int = 0


def capacity(gpu: str, model: str, devices: int, tokens: int, beside: float = 0.0) -> int:
    """How many sequences of `tokens` the KV cache holds next to weights in 16 bits, and `beside` bytes of others."""
    shape = KNOWN[model.lower()]
    free = USABLE * devices * GPUS[gpu].memory * 1e9 - 2.0 * shape.parameters - beside
    return max(0, int(free // (2 * shape.layers * shape.kv * 2 * tokens)))


def group(gpu: str, small: str, big: str, load: Load, devices: int, replicas: int, seed: int = 0) -> Group | None:
    """A group under full load; None: its models do not fit.

    Args:
        devices: GPUs of the big model; 0: it shares one with the small model.
        replicas: small models; 0: the big model alone writes everything.
    """
    tokens = load.prompt + load.decode
    shared = devices == 0
    weights = 2.0 * KNOWN[small.lower()].parameters
    slots = capacity(gpu, big, max(1, devices), tokens, weights if shared else 0.0)
    if replicas:
        slots = min(slots, replicas * capacity(gpu, small, 1, tokens)) if not shared else slots * 9 // 10
    slots = min(slots, 256)  # what engines batch by default
    if slots < max(1, replicas):
        return None
    slots = slots // max(1, replicas) * max(1, replicas)
    requests = 3 * slots  # three fillings, so that beginning and end weigh little
    # They do not come in step: over the time that one takes alone.
    pair, share = _pair(gpu, small, big, load, devices), load.share if replicas else 1.0
    alone = latency.simulate(pair, share=share, prompt=load.prompt, decode=load.decode, span=load.span).seconds
    done = _served(pair, load, devices, replicas, slots, requests, requests / alone, seed)
    name = f"{big} on {max(1, devices)}" + (f" + {replicas} × {small}" if replicas else " alone")
    gpus = max(1, devices) + (0 if shared else replicas)
    models = {"small": max(1, replicas), "big": 1}
    busy = {side: done.by_model.get(side, 0.0) / done.seconds / n for side, n in models.items()}
    return Group(
        f"{big} and {small} on one" if shared else name,
        gpus,
        slots,
        requests / done.seconds,
        sum(done.served) / requests,
        busy,
        devices,
        replicas,
    )


def under_load(
    gpu: str, small: str, big: str, load: Load, g: Group, rates: Sequence[float], seed: int = 0
) -> list[float]:
    """Mean seconds of a request, waiting included, in a group of `groups` to which `rates` requests a second come.

    Of as many requests as fill it four times, or 100: beyond what a group can serve the queue grows with their number.
    """
    pair, requests = _pair(gpu, small, big, load, g.devices), max(100, 4 * g.slots)
    return [_served(pair, load, g.devices, g.replicas, g.slots, requests, rate, seed).per_request for rate in rates]


def _pair(gpu: str, small: str, big: str, load: Load, devices: int) -> Pipeline:
    costs = roofline(gpu, small), roofline(gpu, big, max(1, devices))
    return Pipeline(*costs, switch_s=load.handover_s / 2)


def _served(
    pair: Pipeline, load: Load, devices: int, replicas: int, slots: int, requests: int, rate: float, seed: int
) -> Simulation:
    """Requests that come to a group of `slots` in all, `rate` a second."""
    return latency.simulate(
        pair,
        share=load.share if replicas else 1.0,
        prompt=load.prompt,
        decode=load.decode,
        span=load.span,
        chunk=128,
        requests=requests,
        rate=rate,
        seed=seed,
        shared=not devices and bool(replicas),
        replicas=max(1, replicas),
        slots=slots // max(1, replicas),
        control_chunk=16,
    )


def groups(
    gpu: str, small: str, big: str, load: Load, devices: Sequence[int] = (1, 2, 4), replicas: Sequence[int] = (1, 2, 4)
) -> list[Group]:
    """All groups that fit: the pair on one GPU, the big model alone, and each number of small ones beside it.

    Raises:
        SrlibError: no such GPU or model, or nothing fits.
    """
    roofline(gpu, small), roofline(gpu, big)  # names are checked before
    kinds = [(0, 1), *((d, r) for d in devices for r in (0, *replicas))]
    found = [g for d, r in kinds if (g := group(gpu, small, big, load, d, r)) is not None]
    if not found:
        raise SrlibError(f"{big} does not fit on {max(devices)} × {gpu}; take a larger GPU or more of them.")
    return found


def best(found: Sequence[Group], gpus: int, alone: bool = False) -> tuple[Group, int] | None:
    """The group of which as many as there are GPUs for serve most requests, and how many there are."""
    fitting = [(g, gpus // g.gpus) for g in found if g.gpus <= gpus and g.name.endswith("alone") == alone]
    return max(fitting, key=lambda choice: choice[0].per_s * choice[1], default=None)


def cost(per_s: float, gpus: int, price: float) -> float:
    """Of a thousand problems: GPU hours times the price of one."""
    return 1000 / per_s * gpus / 3600 * price


def plan(found: Sequence[Group], counts: Sequence[int], price: float) -> list[dict]:
    """For each number of GPUs the best groups with small models, beside the big model alone."""
    rows = []
    for gpus in counts:
        for alone in (False, True):
            if (choice := best(found, gpus, alone)) is not None:
                g, n = choice
                rows.append(
                    {
                        "GPUs": gpus,
                        "groups": f"{n} × ({g.name})",
                        "left over": gpus - n * g.gpus,
                        "problems / s": n * g.per_s,
                        "latency (s)": g.latency_s,
                        "a thousand problems": cost(n * g.per_s, n * g.gpus, price),
                    }
                )
    return rows


def sentences(rows: Sequence[dict], found: Sequence[Group], load: Load, gpu: str) -> list[str]:
    """A plan in words: for each number of GPUs what to run, and what it gains."""
    size = f"{load.prompt} + {load.decode} tokens, {load.share:.1%} of them by the big model"
    lines = [f"Problems of {size}, on {gpu}, at full load."]
    for gpus in dict.fromkeys(row["GPUs"] for row in rows):
        ours, *alone = sorted(
            (row for row in rows if row["GPUs"] == gpus), key=lambda row: row["groups"].endswith("alone)")
        )
        line = f"{gpus} GPU{'s' * (gpus > 1)}: {ours['groups']} – {ours['problems / s']:.2f} problems a second"
        if alone:
            line += f", {ours['problems / s'] / alone[0]['problems / s']:.1f} times the big model alone"
        price, seconds = ours["a thousand problems"], ours["latency (s)"]
        lines.append(f"{line}; {price:.2f} a thousand problems, {seconds:.0f} s each.")
    mixed = [g for g in found if not g.name.endswith("alone") and g.busy["big"] >= 0.9]
    if mixed:
        least = min(mixed, key=lambda g: g.gpus)
        busy = f"{least.busy['big']:.0%}"
        lines.append(f"The big model is the bottleneck from {least.name} on: it is at work {busy} of the time.")
    return lines
