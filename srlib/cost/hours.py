"""Hours or weeks? What each stage takes on a GPU of which only the data sheet is known.

A pass costs what `costs.roofline` says of `hardware.gpu`, and the launch of its kernels. Traces that are written are taken
to be as long as `latency.decode` and `offload.max_tokens` allow, those that are read as long as `sft.max_length` does,
and a trained policy to hand over a tenth of its tokens. Loading, compiling, grading and figures are left out. So it
tells hours from days; what a machine really does is measured by `srlib bench`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from srlib.cost import memory
from srlib.cost.costs import Cost, roofline
from srlib.data import benchmarks
from srlib.params import Params, slots_for

SHARE = 0.1  # of its tokens that a trained policy hands over
# Seconds to launch the kernels of one layer: from Python some thirty, at ten to twenty microseconds; as CUDA graphs few.
LAUNCH = {"transformers": 5e-4, "vllm": 2e-5}
# Of a forward pass: of frozen weights no gradients are worked out, but what stands before them has some.
BACKWARD = {"lora": 1.0, "full": 2.0}
STEP = 64  # tokens of a step of a trace
TRIES = 4  # of a threshold in stage 05 (see `srlib.evaluation.tuning`)


@dataclass(frozen=True)
class Pair:
    """What writes: a pass of each model in seconds, and whether they work at the same time."""

    small: Cost
    big: Cost
    apart: bool = False

    def seconds(self, traces: float, slots: int, share: float, prompt: int, tokens: int) -> float:
        """To write `traces` of `tokens` each, `slots` at a time, of which the big model writes `share`.

        In one round each of those under way gains a token, by the one model or the other, and the other reads it in
        a later pass.
        """
        under_way, context = min(traces, slots), prompt + tokens / 2
        small, big = (
            cost.seconds(1, max(1.0, n), max(1.0, n) * context) * min(1.0, n)
            for cost, n in ((self.small, (1 - share) * under_way), (self.big, share * under_way))
        )
        if 0 < share < 1:
            small += share * under_way * self.small.token
            big += (1 - share) * under_way * self.big.token
        one = max(small, big) if self.apart else small + big
        prompts = prompt * under_way * ((share < 1) * self.small.token + (share > 0) * self.big.token)
        return traces / under_way * (tokens * one + prompts) if traces else 0.0


def cost(p: Params, model: memory._Model) -> Cost:
    """Seconds of a pass of a model as it is loaded."""
    devices = model.spec.tensor_parallel * model.spec.pipeline_parallel
    flat = roofline(p.hardware.gpu, model.shape, devices, model.weights() / model.shape.parameters)
    return replace(flat, fixed=LAUNCH[model.spec.engine] * model.shape.layers)


def stages(p: Params) -> dict[str, float]:
    """Seconds of each stage that runs on GPUs, and of `srlib bench`, by name."""
    made: dict[str, Callable[[Params], float]] = {
        "01_annotate": _annotate,
        "02_sft": _sft,
        "03_grpo": _grpo,
        "04_offload": lambda p: _write(p, p.offload.n_demo, SHARE),
        "05_evaluate": _evaluate,
        "07_latency": _check,
        "bench": _bench,
    }
    return {name: seconds(p) for name, seconds in made.items() if name not in p.left_out}


def table(p: Params) -> str:
    """What `srlib plan` prints behind memory: hours by stage, their sum, and its price."""
    found = stages(p)
    total = sum(found.values()) / 3600
    lines = [f"{name:<13}{seconds / 3600:>10.1f}" for name, seconds in found.items()]
    price = total * max(1, p.hardware.gpus) * p.latency.gpu_hour
    return "\n".join(
        (
            f"Hours, from the data sheet of {max(1, p.hardware.gpus)} × {p.hardware.gpu} (hardware.gpu) and of launches:",
            "",
            *lines,
            f"{'in all':<13}{total:>10.1f}   {price:,.0f} at {p.latency.gpu_hour:g} for an hour of a GPU (latency.gpu_hour)",
        )
    )


def _length(p: Params) -> int:
    """Tokens of a trace that is written."""
    return min(p.offload.max_tokens, p.latency.decode)


def _read(p: Params) -> int:
    """Tokens of a worked trace, its prompt included."""
    return min(p.sft.max_length, p.latency.prompt + p.latency.decode)


def _pair(p: Params, stage: str) -> Pair:
    held = memory.models(p, stage)
    small, big = held.get("rollouts", held["small"]), held.get("big", held["small"])
    apart = not {*small.devices()} & {*big.devices()}
    return Pair(cost(p, small), cost(p, big), apart and (small.spec.engine == "vllm" or big.spec.engine == "vllm"))


def _write(p: Params, traces: float, share: float, stage: str = "04_offload", slots: int | None = None) -> float:
    return _pair(p, stage).seconds(traces, slots or p.offload.slots, share, p.latency.prompt, _length(p))


def _annotate(p: Params) -> float:
    """Each model reads each trace once; others are written."""
    held, a, length = memory.models(p, "01_annotate"), p.annotate, _read(p)
    read = [cost(p, held[side]) for side in a.engines]
    seconds = sum(a.n_traces / a.batch_size * c.seconds(a.batch_size, a.batch_size * length) for c in read)
    if "worth" in a.methods:  # from each step on, half a trace in the mean
        traces = a.n_traces if a.method == "worth" else a.n_compare
        seconds += _write(p, traces * a.worth.continuations * length / STEP / 2, 0.0)
    return seconds + (_write(p, a.n_traces * a.tries, 1.0) if a.tries else 0.0)


def _trained(p: Params, stage: str, traces: float, length: int) -> float:
    """Forward and backward over some traces, in all processes at the same time."""
    c = p.sft if stage == "02_sft" else p.grpo
    of = cost(p, memory.models(p, stage)["small"])
    at_once = max(1, c.batch_size // c.processes // c.gradient_accumulation_steps)
    passes = 1 + BACKWARD[p.sft.method if stage == "02_sft" else "lora"] + c.gradient_checkpointing
    return passes * traces / c.processes / at_once * of.seconds(at_once, at_once * length)


def _sft(p: Params) -> float:
    trained = _trained(p, "02_sft", p.annotate.n_traces * p.sft.epochs, _read(p))
    return trained + _write(p, p.sft.n_watch, 0.0)


def _grpo(p: Params) -> float:
    """Each step writes a batch, and is trained on it; each look writes some problems."""
    g = p.grpo
    share = SHARE if g.rollout == "true_offload" else 0.0
    rollouts, look = (
        _write(p, n / g.processes, share, "03_grpo", p.rollout_slots) for n in (g.batch_size, g.n_validation)
    )
    looks = ceil(g.max_steps / g.eval_steps) if g.eval_steps else 0  # the last step has one
    trained = _trained(p, "03_grpo", g.batch_size, p.latency.prompt + _length(p))
    return g.max_steps * (rollouts + trained) + looks * look


def _evaluate(p: Params) -> float:
    """Each policy writes each problem as often as it is sampled; thresholds are tried out, and requests refused."""
    how, e = benchmarks.protocol(p), p.evaluate
    p = p.model_copy(update={"offload": how.offload})
    traces = (how.n_problems or e.n_problems) * how.samples
    shares: dict[str, list[float]] = {
        "small": [0.0], "big": [1.0], "learned": [SHARE], "grpo": [SHARE], "learned_off": [0.0],
        "rejection": [SHARE * (1 - refused) for refused in e.rejections], "random": [*e.random_shares, SHARE],
        "entropy": [SHARE], "margin": [SHARE], "confidence": [SHARE], "speculative": [1 / e.draft_tokens],
        "glimpse": [SHARE], "specreason": [SHARE],
    }  # fmt: skip
    seconds = sum(_write(p, traces, share) for name in e.policies for share in shares.get(name, [SHARE]))
    seconds += _write(p, e.n_tuned * TRIES * len(e.chunks) * len(p.to_tune), SHARE)
    if "learned" in e.policies:  # half a trace is written again for each request
        requests = e.n_refused * how.samples * SHARE * _length(p) / p.offload.span_budget
        seconds += _write(p, requests / 2, SHARE)
    return seconds


def _check(p: Params) -> float:
    """Three policies write some problems, one at a time and many; what is simulated takes no GPU."""
    shares, p = (1.0, SHARE, p.bench.random_share), memory.as_written(p, "07_latency")
    runs = [_write(p, p.latency.n_check, share, "07_latency", n) for share in shares for n in (1, p.offload.slots)]
    return (p.bench.repeats + 1) * sum(runs)


def _bench(p: Params) -> float:
    """Each policy, and for the small model `generate` too, at each batch size, once to warm up."""
    b, p = p.bench, memory.as_written(p, "bench")
    shares = {"learned": SHARE, "random": b.random_share, "speculative": 1 / b.draft_tokens}
    every = [0.0, 1.0, *(shares[name] for name in b.policies)]
    every += [0.0] if memory.models(p, "bench")["small"].spec.engine == "transformers" else []
    return (b.repeats + 1) * sum(
        _write(p, max(b.min_traces, n * b.traces_per_slot), share, "bench", slots_for(n, p.offload.oversubscribe))
        for n in b.batch_sizes
        for share in every
    )
