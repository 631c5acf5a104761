"""How long it takes: a latency model for rewards, and what a pair would do on other machines.

Seconds come from a calibration of two engines on this machine, from a named table or from a GPU's
data sheet, so the noise of a machine never enters a reward. In `PairSpeed` nothing overlaps, the two
models take turns; `simulate` acts the pipeline out, or follows the assumptions of the paper.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import floor
from typing import Any, Literal

from srlib import SrlibError
from srlib.cost import costs, simulation
from srlib.cost.costs import Cost
from srlib.cost.jobs import Job, Pipeline, Simulation, arrivals, even, replay
from srlib.decoding.policies import Policy
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import Trace
from srlib.engine.protocol import Engine, Request
from srlib.params import Latency


@dataclass(frozen=True)
class Speed:
    """Seconds per token of one model, a sequence on its own share of the batch."""

    decode: float
    prefill: float


@dataclass(frozen=True)
class PairSpeed:
    """Two models, and what a hand-over costs on top, in seconds."""

    small: Speed
    big: Speed
    handover: float = 0.0

    def seconds(self, prompt: int, small: int, big: int, handovers: int) -> float:
        """Seconds of one trace in which the models take turns, each token processed once by each model.

        t = prompt·p_s + small·d_s + big·p_s  +  [big > 0] (prompt + small)·p_b + big·d_b  +  handovers·h

        with d, p the decode and prefill seconds a token. What the big model reads behind its
        last span is counted too, though an engine may never read it.

        Args:
            prompt, small, big: tokens of the prompt, by the small and by the big model.
        """
        t = (prompt + big) * self.small.prefill + small * self.small.decode + handovers * self.handover
        return t + ((prompt + small) * self.big.prefill + big * self.big.decode if big else 0.0)

    def alone(self, prompt: int, tokens: int) -> float:
        """Seconds of the big model writing all of it."""
        return prompt * self.big.prefill + tokens * self.big.decode

    def pipeline(self, **options: Any) -> Pipeline:
        """For `simulate`: a pass takes the seconds of one decoded token, or those of a prefill if it is long."""
        small, big = (Cost(base=speed.decode, token=speed.prefill) for speed in (self.small, self.big))
        return Pipeline(small, big, **{"switch_s": self.handover / 2, **options})


# Tokens a second on an A6000 as the paper's simulator has them (arXiv 2504.16379): decode, prefill.
TABLES = {
    "a6000": {
        "1.5B": (141, 28_868),
        "7B": (41.3, 7_658),
        "8B": (40.3, 7_457),
        "14B": (22, 3_836),
        "32B": (16, 2_595),
        "70B": (9, 2_238),
    }
}


def pair_speed(config: Latency, small: Speed | None = None, big: Speed | None = None) -> PairSpeed:
    """The latency model that the params ask for.

    Args:
        small, big: as `calibrate` gives them; needed where `source` is `calibrate`.

    Raises:
        SrlibError: what `calibrate` gives is missing.
    """
    if config.source == "calibrate":
        if small is None or big is None:
            raise SrlibError(
                "latency.source is calibrate: give the speeds of both engines, as `calibrate` measures them."
            )
        return PairSpeed(small, big, config.handover_s)
    if config.source == "roofline":
        pair = costs.roofline(config.gpu, config.small), costs.roofline(config.gpu, config.big, config.devices)
        one, other = (Speed(cost.seconds(1, 1), cost.token) for cost in pair)
        return PairSpeed(one, other, config.handover_s)
    table = TABLES[config.source]
    one, other = (Speed(1 / decode, 1 / prefill) for decode, prefill in (table[config.small], table[config.big]))
    return PairSpeed(one, other, config.handover_s)


def calibrate(engine: Engine, batch: int = 16, tokens: int = 32, repeats: int = 5) -> Speed:
    """Median seconds a token of one engine, decoding and prefilling a batch; the first run warms up.

    Args:
        batch: sequences at the same time; seconds are divided among them.
        tokens: prefilled, then decoded, by each.
    """
    prompt = [1] * tokens
    timed: list[tuple[float, float]] = []
    for _ in range(repeats + 1):
        sequences = [engine.open([]) for _ in range(min(batch, engine.slots))]
        marks = [engine.counters.seconds]
        engine.run(*(Request(s, feed=prompt) for s in sequences))
        marks.append(engine.counters.seconds)
        engine.run(*(Request(s, max_new=tokens) for s in sequences))
        marks.append(engine.counters.seconds)
        for sequence in sequences:
            engine.close(sequence)
        done = len(sequences) * tokens
        timed.append(((marks[1] - marks[0]) / done, (marks[2] - marks[1]) / done))
    prefill, decode = (statistics.median(column) for column in zip(*timed[1:]))
    return Speed(decode, prefill)


def simulate(
    pair: PairSpeed | Pipeline,
    *,
    share: float,
    prompt: int = 2048,
    decode: int = 16_384,
    assumptions: Literal["events", "paper"] = "events",
    chunk: int = 256,
    whole_chunks: bool = False,
    span: int = 256,
    requests: int = 1,
    rate: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Simulation:
    """Seconds of the pipeline at an offload share, by model and by cause.

    Args:
        pair: speeds of two models, or a `srlib.cost.jobs.Pipeline`, whose costs may be of any kind.
        share: of the decoded tokens that the big model writes; 0 and 1 are the models alone.
        prompt, decode: tokens of every request.
        assumptions: `events` acts the pipeline out; `paper` is the formula of the paper's simulator for one
            request, which has no cost for switching, looking and growing caches, and hides every prefill:
            max(prefills of the prompt) + Σ over chunks of max(decode, the other model's prefill).
        chunk: tokens the other model reads along; in the paper's formula also the grain of the sum.
        whole_chunks: `paper`: as its simulator, only whole chunks are the big model's, and the rest the small one's.
        span: tokens the big model writes in a row, on average.
        requests, rate: how many, and how many arrive a second (a Poisson process); None: all at once.
        **options: of `srlib.cost.jobs.Pipeline`, such as shared, replicas, control_chunk, overlap, switch_s.

    Raises:
        SrlibError: the share is not from 0 to 1, or the paper's formula is asked for more than it knows.
    """
    if not 0 <= share <= 1:
        raise SrlibError(f"share is {share}; it must be from 0 to 1.")
    if assumptions == "paper":
        if not isinstance(pair, PairSpeed) or requests > 1 or options:
            raise SrlibError("The paper's formula is for one request of a PairSpeed, without further options.")
        return _paper(pair, share, prompt, decode, chunk, whole_chunks)
    alone = share in (0, 1)
    options = {"stream_chunk": chunk, "control_chunk": 16, "overlap": True, **options}
    if alone:  # nobody reads along or looks
        options |= {"stream_chunk": 0, "control_chunk": 0}
    pipeline = replace(pair, **options) if isinstance(pair, Pipeline) else pair.pipeline(**options)
    times = arrivals(requests, rate, seed)
    return simulation.run(pipeline, [even(share, prompt, decode, span, time) for time in times])


def _paper(pair: PairSpeed, share: float, prompt: int, decode: int, chunk: int, whole: bool) -> Simulation:
    big = share * decode / chunk
    big = floor(big) if whole else big
    chunks, speeds = {"small": decode / chunk - big, "big": big}, {"small": pair.small, "big": pair.big}
    other = {"small": pair.big, "big": pair.small}
    involved = [name for name in chunks if chunks[name] or (whole and 0 < share < 1)]
    causes = {"prompt": max(prompt * speeds[name].prefill for name in involved)}
    for name in involved:
        causes[f"{name} decode"] = chunks[name] * chunk * speeds[name].decode
        hidden = max(0.0, other[name].prefill - speeds[name].decode) if len(involved) > 1 else 0.0
        causes[f"{name} waits"] = chunks[name] * chunk * hidden
    seconds = sum(causes.values())
    work = {name: chunks[name] * chunk * speeds[name].decode for name in involved}
    return Simulation(seconds, [seconds], [seconds], work, causes)


def check(
    small: Engine,
    big: Engine,
    prompts: Sequence[str],
    settings: dict[str, Any],
    policies: Sequence[Policy],
    batches: Sequence[int] = (1, 16),
    repeats: int = 3,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> list[dict[str, Any]]:
    """The simulation against the clock: predicted and measured seconds of the two engines that are given.

    Each prediction is made of passes timed just before the run it is for (`costs.measure`), as a machine that others
    use too changes its pace; of who wrote which token; and of the controller's seconds an answer in the run before.

    Args:
        settings: of the `Offloader`.
        policies: any but speculative decoding, whose drafts are not stretches.
        clock: `time.process_time` counts CPU seconds, where other work on the machine takes turns with this.

    Returns:
        a row for each batch and policy: `batch`, `policy`, `offload_share`, and medians over the repeats of
        `measured_s`, `predicted_s` and their `ratio` (predicted over measured), with its `lowest` and `highest`.
    """
    rows = []
    for batch in batches:
        for policy in policies:
            writer = Offloader(small, big, policy, **settings | {"batch_size": batch}, seed=seed)
            looks = writer.control_chunk if policy.tags else 0
            options: dict[str, Any] = {
                "shared": True,
                "slots": batch,
                "stream_chunk": writer.stream_chunk,
                "control_chunk": looks,
                "oversubscribe": writer.oversubscribe,
            }
            traces = writer.run(prompts)  # warms up, and says who writes what
            jobs, controller = _jobs(traces, policy.tags, writer.control_chunk), writer.controller_seconds
            grid = tuple(sorted({1, max(1, batch // 4), batch}))
            runs = []
            for _ in range(repeats):
                one, other = (costs.measure(e, grid, repeats=3, clock=clock) for e in (small, big))
                pipeline = Pipeline(one, other, **options)
                answers = sum(simulation.run(pipeline, jobs).answers.values())
                predicted = simulation.run(replace(pipeline, answer_s=controller / answers), jobs).seconds
                start = clock()
                writer.run(prompts)
                measured, controller = clock() - start, writer.controller_seconds
                runs.append((predicted / measured, predicted, measured))
            ratio, predicted, measured = (statistics.median(column) for column in zip(*runs))
            big_tokens, tokens = sum(t.big_tokens for t in traces), sum(t.big_tokens + t.small_tokens for t in traces)
            rows.append(
                {
                    "batch": batch,
                    "policy": policy.name,
                    "offload_share": big_tokens / max(1, tokens),
                    "measured_s": measured,
                    "predicted_s": predicted,
                    "ratio": ratio,
                    "lowest": min(runs)[0],
                    "highest": max(runs)[0],
                }
            )
    return rows


def _jobs(traces: Sequence[Trace], tags: bool, chunk: int = 1) -> list[Job]:
    owners = ["".join("SBF"[owner] for owner in trace.owners) for trace in traces]
    return [replay(text, len(trace.prompt_ids), tags, chunk=chunk) for text, trace in zip(owners, traces)]
