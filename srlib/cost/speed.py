"""Seconds with a big model of any cost: the same one, with inert layers behind it until a token costs so many times one
of the small model. It writes the same tokens, so that between two costs nothing differs but time.

Beside the clock stand two predictions of the same traces. The *simulation* acts them out with the real controller, over
passes that were timed just before (`srlib.cost.simulation`). The *limit* knows no controller, no messages and no
waiting: what each model wrote times the seconds that a token takes it alone at this batch, and what it had to read once
times the seconds of a token in a long prefill, one after the other. Traces that are under way at the same time keep both
models at work, and may go below it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tqdm.auto import tqdm

from srlib import SrlibError, engine
from srlib.cost import costs, latency, simulation
from srlib.cost.jobs import Job, Pipeline, drafts, replay
from srlib.data import problems
from srlib.data.prompts import encode_for_each
from srlib.decoding.policies import Always, Learned, Never, Random, Speculative
from srlib.decoding.published import Published
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import BIG, SMALL, Trace
from srlib.engine.models import deepen
from srlib.engine.protocol import Engine, Request
from srlib.params import ModelSpec, Params, slots_for

PROBE = 16  # inert layers by which the cost of one is measured
TRACES = 4  # of a run at least, for each place of a batch: fewer, and those that end last count for too much


@dataclass(frozen=True)
class Dial:
    """How many layers make a token of the big model cost so many times one of the small model, at one batch."""

    small: float  # seconds of a step
    big: float  # of the big model as it is
    layer: float  # of one more of its layers

    def layers(self, ratio: float) -> int:
        """As near as whole layers come to a ratio; none where the model as it is costs more."""
        return max(0, round((ratio * self.small - self.big) / self.layer))


def dial(small: Engine, spec: ModelSpec, batch: int, folder: Path) -> Dial:
    """Measured in this process, with the model as it is and with `PROBE` layers more.

    Args:
        folder: for what is made.
    """
    more = deepen(spec, PROBE, folder / "probe")
    engines = [small, *(engine.load(each.model_copy(update={"process": False}), batch) for each in (spec, more))]
    rounds = [[latency.calibrate(e, batch, repeats=2).decode * batch for e in engines] for _ in range(3)]
    one, other, deep = (statistics.median(column) for column in zip(*rounds))
    return Dial(one, other, max(deep - other, 1e-9) / PROBE)


def run(
    p: Params, ratios: Sequence[float], traces: int, repeats: int, reinforced: ModelSpec | None = None
) -> list[dict[str, Any]]:
    """Measure every policy at every ratio of costs, one batch after the other.

    Args:
        ratios: seconds of a token of the big model over those of the small one; the least there is is the model as it is.
        traces: of a run at least.
        repeats: rounds whose medians are taken, after one that warms up; each has all policies in turn.
        reinforced: the small model of 03, for the policy grpo.

    Returns:
        a row for each batch, ratio and policy: `batch`, `ratio` as asked, `cost_ratio` as measured, `layers` that were
        added, `policy`, `offload_share`, `measured_s`, `predicted_s` (None: not simulated), `limit_s` and of that
        `reading_s`, and `speed_up`, `predicted_speed_up`, `limit_speed_up` over the big model alone.

    Raises:
        SrlibError: a model runs on vLLM, or cannot be made deeper.
    """
    for spec in (p.tuned, p.big):
        if spec.engine != "transformers":
            raise SrlibError(f"{spec.path} runs on {spec.engine}; inert layers are measured on transformers.")
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory() as made:
        for batch in p.bench.speed_batches if ratios else []:
            most = slots_for(batch, p.offload.oversubscribe)
            # the public code's way has a sequence for every prefix of a chunk
            small = engine.load(p.tuned.model_copy(update={"process": False}), most * (1 + p.offload.control_chunk))
            smalls = {"learned": small}
            if reinforced is not None:
                smalls["grpo"] = engine.load(reinforced.model_copy(update={"process": False}), most)
            scale = dial(small, p.big, batch, Path(made))
            for ratio in tqdm(ratios, desc=f"speed at batch {batch}", unit="ratio"):
                layers = scale.layers(ratio)
                spec = deepen(p.big, layers, Path(made) / f"{batch} {layers}") if layers else p.big
                big = engine.load(spec, most)
                found = _measured(p, smalls, big, batch, max(traces, TRACES * batch), repeats)
                rows += [{"batch": batch, "ratio": ratio, "layers": layers, **row} for row in found]
                del big  # its process ends
    return rows


def _measured(
    p: Params, smalls: dict[str, Engine], big: Engine, batch: int, n: int, repeats: int
) -> list[dict[str, Any]]:
    """The rows of one batch and one big model."""
    small = smalls["learned"]
    tasks = problems.load(p.test)
    texts = [tasks[i % len(tasks)].prompt + p.offload.hint for i in range(n)]
    prompts = encode_for_each([small.tokenizer], texts)[0]
    how = p.offload.settings | {"hint": "", "batch_size": batch, "stream_chunk": p.bench.stream_chunk}
    how |= {"max_tokens": min(p.bench.max_tokens, p.offload.max_tokens)}
    if batch == 1:  # one trace at a time, and none beside it
        how["oversubscribe"] = 0.0
    policies = [Never("small"), Always("big"), *(Learned(name=name) for name in smalls)]
    policies += [Random(p.bench.random_share, p.bench.random_chunk), Speculative(p.bench.draft_tokens)]
    writers = [
        Offloader(smalls.get(policy.name, small), big, policy, **how, seed=p.seed)
        for policy in [*policies, Published(p.bench.peek_tokens)]
    ]
    written = [writer.run(prompts) for writer in writers]  # warms up, and says who writes what
    for writer, traces in zip(writers, written):
        writer.raise_if_failed(traces)
    rounds = []
    for _ in range(repeats):
        pipeline, alone = _costs(small, big, batch)
        row = {}
        for writer, traces in zip(writers, written):
            controller = writer.controller_seconds
            start = time.perf_counter()
            writer.run(prompts)
            measured = time.perf_counter() - start
            writing, reading = _limit(traces, *alone)
            predicted = _predicted(writer, traces, pipeline, controller)
            row[writer.policy.name] = [measured, predicted, writing + reading, reading]
        rounds.append([alone[1].decode / alone[0].decode, row])
    return [_row(writer.policy.name, traces, rounds) for writer, traces in zip(writers, written)]


def _costs(small: Engine, big: Engine, batch: int) -> tuple[Pipeline, tuple[latency.Speed, latency.Speed]]:
    """The two engines as they are now: for the simulation, and for the limit."""
    engines = small, big
    grid = tuple(sorted({1, max(1, batch // 4), batch}))
    one, other = (
        costs.measure(e, grid, (1, 8), repeats=2, clock=lambda e=e: e.counters.seconds)  # type: ignore[misc]
        for e in engines
    )
    speeds = latency.calibrate(small, batch, repeats=2), latency.calibrate(big, batch, repeats=2)
    how = {"process": True, "message_s": _message(big)} if big.running else {"shared": True}
    return Pipeline(one, other, **how), speeds


def _message(big: Engine) -> float:
    """Seconds from a request to its answer in which the model is not at work."""
    sequence, timed = big.open([]), []
    for _ in range(20):
        start, busy = time.perf_counter(), big.counters.seconds
        big.run(Request(sequence, [1]))
        timed.append(time.perf_counter() - start - (big.counters.seconds - busy))
    big.close(sequence)
    return max(0.0, statistics.median(timed))


def _predicted(writer: Offloader, traces: list[Trace], pipeline: Pipeline, controller: float) -> float | None:
    """Seconds that the simulation says; None: what the policy does is no matter of stretches."""
    policy = writer.policy
    if isinstance(policy, Published):
        return None
    tags = policy.tags
    pipeline = replace(
        pipeline,
        slots=writer.batch_size,
        oversubscribe=writer.oversubscribe,
        stream_chunk=writer.stream_chunk,
        control_chunk=writer.control_chunk if tags else 0,
        overlap=writer.overlap,
    )
    jobs: list[Job] = []
    for trace in traces:
        owners, prompt = "".join("SBF"[owner] for owner in trace.owners), len(trace.prompt_ids)
        if isinstance(policy, Speculative):
            jobs.append(drafts(owners, prompt, policy.draft))
        else:
            jobs.append(replay(owners, prompt, tags, chunk=writer.control_chunk))
    answers = sum(simulation.run(pipeline, jobs).answers.values())
    return simulation.run(replace(pipeline, answer_s=controller / answers), jobs).seconds


def _limit(traces: list[Trace], small: latency.Speed, big: latency.Speed) -> tuple[float, float]:
    """Seconds of writing, and of reading: each token once."""
    writing = reading = 0.0
    for trace in traces:
        for owner, least, speed in (
            (SMALL, trace.least_small_forward_tokens, small),
            (BIG, trace.least_big_forward_tokens, big),
        ):
            wrote = trace.owners.count(owner)
            writing += wrote * speed.decode
            reading += max(0, least - wrote) * speed.prefill
    return writing, reading


def _row(name: str, traces: list[Trace], rounds: list[Any]) -> dict[str, Any]:
    def median(part: int, over: str | None = None) -> float | None:
        """Of the rounds' seconds; or of how many times as fast it is as another."""
        pairs = [(row[name][part], row[over][part] if over else None) for _, row in rounds]
        values = [seconds if other is None else other / seconds for seconds, other in pairs if seconds is not None]
        return statistics.median(values) if values else None

    tokens = sum(len(trace.ids) for trace in traces)
    return {
        "cost_ratio": statistics.median(ratio for ratio, _ in rounds),
        "policy": name,
        "offload_share": sum(trace.big_tokens for trace in traces) / max(1, tokens),
        "measured_s": median(0),
        "predicted_s": median(1),
        "limit_s": median(2),
        "reading_s": median(3),
        "speed_up": median(0, "big"),
        "predicted_speed_up": median(1, "big"),
        "limit_speed_up": median(2, "big"),
        "forward_tokens": sum(trace.small_forward_tokens + trace.big_forward_tokens for trace in traces),
    }
