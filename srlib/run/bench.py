"""How close the pair comes to what its models do alone: every policy on the same prompts in one run.

*Efficiency* is the seconds that the tokens of each model would take if it wrote alone, over the
seconds that were measured:

    (small tokens · seconds a token of the small model alone + big tokens · the same of the big one) / seconds

Alone means the policies `never` and `always` through the same controller, at the same batch: the
most traces that one model is asked for at a time. With `oversubscribe` more than that are under way,
and those that are with the big model leave no place of the small one empty. Tags count as tokens of
the small model, which writes them. What the seconds hold beyond that is the reading of what the other
model wrote, smaller batches, and the controller. The reading no engine can save: `with_reading` counts
it among the work to be done, at the speed of a prefill.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm.auto import tqdm

from srlib import engine
from srlib.cost import latency, memory, speed
from srlib.data import problems
from srlib.data.prompts import encode_prompts
from srlib.data.rows import write_json
from srlib.decoding.policies import Always, Learned, Never, Random, Speculative
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import BIG, Trace
from srlib.decoding.translate import same_vocabulary
from srlib.engine.protocol import Engine, Request
from srlib.engine.transformers import TransformersEngine
from srlib.params import Params, paths, slots_for
from srlib.run import locks, stages
from srlib.run.manifest import machine

COLUMNS = ("efficiency", "with_reading", "reread_share", "small_share", "big_share", "controller_share", "idle_share")


def run(p: Params) -> dict[str, Any]:
    """Measure what `p.bench` asks for, in rounds: the first warms up, the rest give medians.

    Every policy runs once a round and is compared with the models alone in the same round, so that what
    else the machine does meanwhile falls on all of them.

    Returns:
        `rows`, one a batch size and policy: tokens, `offload_share`, `seconds`, `tokens_per_s`,
        traces `under_way`, `speed` relative to the small model alone, and the shares of `COLUMNS`;
        `closing_check`, one a batch size; `speed`, at the costs of `cost_ratios` (see `srlib.cost.speed`); the
        `machine`, and the `settings` that were `p.bench`.
    """
    most = max(p.bench.batch_sizes, default=1)
    there = p.pair.tuned is not None or Path(p.tuned.top).exists()
    tuned = p.tuned if there else p.small
    slots = slots_for(most, p.offload.oversubscribe)
    small, big = engine.load(tuned, slots), engine.load(p.big, slots)
    mixed = (Learned(), Random(p.bench.random_share, p.bench.random_chunk), Speculative(p.bench.draft_tokens))
    policies = [Never("small"), Always("big"), *(policy for policy in mixed if policy.name in p.bench.policies)]
    numbers = {batch: max(p.bench.min_traces, batch * p.bench.traces_per_slot) for batch in p.bench.batch_sizes}
    tasks = problems.load(p.test)
    texts = [tasks[i % len(tasks)].prompt for i in range(max(numbers.values(), default=0))]
    encoded = encode_prompts(small.tokenizer, [text + p.offload.hint for text in texts])
    # Cutting prompts into tokens is no part of what is measured, but where each model needs its own.
    prompts = encoded if same_vocabulary(small.tokenizer, big.tokenizer) else texts
    rows, checks = [], []
    steps = len(p.bench.batch_sizes) * (len(policies) + (not small.running)) * (p.bench.repeats + 1)
    bar = tqdm(total=steps, desc="bench", unit="policy")
    for batch in p.bench.batch_sizes:
        asked = slice(numbers[batch])
        prefill = {
            side: latency.calibrate(e, batch, repeats=p.bench.repeats).prefill
            for side, e in (("small", small), ("big", big))
        }
        how = p.offload.settings | {"max_tokens": p.bench.max_tokens, "batch_size": batch}
        writers = [Offloader(small, big, policy, **how, seed=p.seed) for policy in policies]
        rounds = []
        for _ in range(p.bench.repeats + 1):
            measured = {}
            for writer in writers:
                measured[writer.policy.name] = _measure(writer, prompts[asked])
                bar.update()
            if not small.running:
                measured["generate"] = _generate(small, encoded[asked], batch, p)
                bar.update()
            rounds.append(_relative(measured, prefill))
        rows += [{"batch": batch, "policy": name, **_median([r[name] for r in rounds[1:]])} for name in rounds[0]]
        if not small.running:
            checks.append({"batch": batch, **_closing_check(small, encoded[:batch], p)})
    bar.close()
    adapter = p.reinforced.adapter
    reinforced = p.reinforced if adapter is not None and Path(adapter).exists() else None
    return {
        "rows": rows,
        "closing_check": checks,
        "speed": speed.run(p, p.bench.cost_ratios, p.bench.speed_traces, p.bench.repeats, reinforced)
        if p.bench.cost_ratios
        else [],
        "tuned": there,
        "machine": machine(),
        "settings": p.bench.model_dump(),
    }


def main(p: Params) -> int:
    """Measure, print the table, and write `bench.json` to the run's folder.

    Raises:
        SrlibError: a model or the test problems are not there, a run is making them, or the models do not fit.
    """
    for needed in ("pair", "test"):
        stages.require_artefact(p, needed, "bench")
    memory.check(p, "bench")
    if p.threads:
        torch.set_num_threads(p.threads)
    p.run_dir.mkdir(parents=True, exist_ok=True)
    with locks.reading(p.run_dir):
        result = run(p)
        print(table(result))
        write_json(p.run_dir / "bench.json", result)
    print(f"\nmeasurement  {paths.here(p.run_dir / 'bench.json')}")
    return 0


def table(result: dict[str, Any]) -> str:
    """The measurement as text."""
    lines = []
    if result["rows"]:
        frame = pd.DataFrame(result["rows"]).set_index(["batch", "policy"])
        shown = frame[["under_way", "offload_share", "tokens_per_s", "speed", *COLUMNS]]
        lines.append(shown.to_string(float_format="{:.3f}".format, na_rep=""))
    for check in result["closing_check"]:
        lines.append(
            f"closing check at batch {check['batch']}: asking at each of {check['tokens']} tokens takes "
            f"{check['one_pass']:.2f} times the pass that only reads them, separate passes {check['separate']:.2f} times"
        )
    if result["speed"]:
        lines.append(pd.DataFrame(result["speed"]).to_string(index=False, float_format="{:.3f}".format, na_rep=""))
    if not result["tuned"]:
        lines.append("There is no tuned model: `learned` is the small model as it is, which does not ask.")
    return "\n".join(lines)


def _measure(writer: Offloader, prompts: list[Any]) -> dict[str, float]:
    """One run: tokens, seconds, and where they went."""
    before = [(e.counters.seconds, e.counters.reread_tokens, e.counters.forward_tokens) for e in writer.engines]
    start = time.perf_counter()
    traces = writer.run(prompts)
    seconds = time.perf_counter() - start
    writer.raise_if_failed(traces)
    after = [(e.counters.seconds, e.counters.reread_tokens, e.counters.forward_tokens) for e in writer.engines]
    busy, reread, forward = zip(*[[y - x for x, y in zip(a, b)] for a, b in zip(before, after)])
    by: dict[Engine | None, float] = {e: b / seconds for e, b in zip(writer.engines, busy)}
    small, big = by.get(writer.small, 0.0), by.get(writer.big, 0.0)
    controller = writer.controller_seconds / seconds
    at_work = max(small, big) if writer.concurrent else small + big
    again: dict[Engine | None, int] = dict(zip(writer.engines, reread))
    tokens = _tokens(traces)
    for side, e in (("small_read", writer.small), ("big_read", writer.big)):
        tokens[side] = max(0, tokens[side] - again.get(e, 0))
    return {
        **tokens,
        "under_way": writer.under_way,
        "seconds": seconds,
        "tokens_per_s": sum(len(t.ids) for t in traces) / seconds,
        "reread_share": sum(reread) / sum(forward),
        "small_share": small,
        "big_share": big,
        "controller_share": controller,
        "idle_share": max(0.0, 1 - controller - at_work),
    }


def _tokens(traces: list[Trace]) -> dict[str, float]:
    big = sum(trace.owners.count(BIG) for trace in traces)
    total = sum(len(trace.ids) for trace in traces)
    prompts = sum(len(trace.prompt_ids) for trace in traces)
    small_forward, big_forward = (sum(getattr(t, f"{s}_forward_tokens") for t in traces) for s in ("small", "big"))
    return {
        "small_tokens": total - big,
        "big_tokens": big,
        "offload_share": big / total,
        # what a model processed and had not written; its own prompts are in the time of each of its tokens
        "small_read": small_forward - prompts - (total - big),
        "big_read": big_forward - big - (prompts if big == total else 0),
    }


def _relative(measured: dict[str, dict[str, float]], prefill: dict[str, float]) -> dict[str, dict[str, float]]:
    """The measurements of a round, with what each is worth beside the models alone.

    Args:
        prefill: seconds a token that is read, by side.
    """
    alone = {
        name: row["seconds"] / (row["small_tokens"] + row["big_tokens"])
        for name, row in measured.items()
        if name in ("small", "big")
    }
    for name, row in measured.items():
        row["speed"] = alone["small"] * row["tokens_per_s"]
        if name != "generate":
            ideal = sum(row[f"{side}_tokens"] * alone[side] for side in alone)
            reading = sum(row[f"{side}_read"] * prefill[side] for side in prefill)
            row |= {"efficiency": ideal / row["seconds"], "with_reading": (ideal + reading) / row["seconds"]}
    return measured


def _median(runs: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


@torch.inference_mode()
def _generate(small: Engine, encoded: list[list[int]], batch: int, p: Params) -> dict[str, float]:
    """The small model through transformers' own `generate`, `batch` prompts at a time, greedy."""
    assert isinstance(small, TransformersEngine), "no other engine works in steps"
    eos = sorted(small.eos)
    ours = small.model.config._attn_implementation
    small.model.set_attn_implementation("sdpa" if small.model._supports_sdpa else "eager")
    tokens, start = 0, time.perf_counter()
    for at in range(0, len(encoded), batch):
        part = encoded[at : at + batch]
        width = max(map(len, part))
        ids = torch.tensor([[eos[0]] * (width - len(x)) + x for x in part], device=small.device)
        mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in part], device=small.device)
        out = small.model.generate(
            ids, attention_mask=mask, max_new_tokens=p.bench.max_tokens, do_sample=False, pad_token_id=eos[0]
        )[:, width:].tolist()
        for row in out:
            ends = [i for i, token in enumerate(row) if token in small.eos]
            tokens += ends[0] + 1 if ends else len(row)
    seconds = time.perf_counter() - start
    small.model.set_attn_implementation(ours)
    return {"small_tokens": tokens, "under_way": batch, "seconds": seconds, "tokens_per_s": tokens / seconds}


def _closing_check(small: Engine, encoded: list[list[int]], p: Params) -> dict[str, float]:
    """Seconds of a pass that asks at each of n tokens, and of n passes, relative to one that only reads them."""
    n = min(p.offload.span_budget, 8)
    timed: dict[str, list[float]] = {"read": [], "one_pass": [], "separate": []}
    for _ in range(p.bench.repeats + 1):
        sequences = [small.open([]) for _ in encoded]
        small.run(*(Request(s, feed=ids) for s, ids in zip(sequences, encoded)))
        for how, parts, ask in (("read", [n], 0), ("one_pass", [n], n), ("separate", [1] * n, 1)):
            start = time.perf_counter()
            for part in parts:
                small.run(*(Request(s, feed=ids[:1] * part, ask=ask, watch=1) for s, ids in zip(sequences, encoded)))
            timed[how].append(time.perf_counter() - start)
            for s, ids in zip(sequences, encoded):
                small.truncate(s, len(ids))
        for s in sequences:
            small.close(s)
    read, one, separate = (statistics.median(values[1:]) for values in timed.values())
    return {"tokens": n, "one_pass": one / read, "separate": separate / read}
