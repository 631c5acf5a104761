"""What a policy reaches: it writes every problem, each completion is kept, and a row says how it went.

Completions are kept in a journal as they end, by their ids: no text says for sure which they were. A
run that was killed goes on with those that had not ended: as the seed of a sample depends on its problem
and its number alone, it ends with what it would have ended with. (In half precision another batch may give
another sample, as likely; one that had ended is never written again.)
"""

from __future__ import annotations

import hashlib
import time
import zlib
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from srlib.data import spans
from srlib.data.grade import verdict
from srlib.data.journal import Journal, write
from srlib.data.prompts import with_opening
from srlib.data.rows import Problem
from srlib.decoding.policies import Policy
from srlib.decoding.scheduler import Offloader
from srlib.decoding.trace import Trace
from srlib.engine.protocol import Engine
from srlib.evaluation import stats
from srlib.evaluation.stats import accuracy, compare
from srlib.params import Offload

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["accuracy", "by_difficulty", "compare", "difficulty", "ids_of", "run", "summarise"]


def run(
    small: Engine | None,
    big: Engine | None,
    policy: Policy,
    problems: Sequence[Problem],
    config: Offload,
    *,
    dataset: str,
    samples: int = 1,
    seed: int = 0,
    file: Path | None = None,
    key: str = "",
    progress: bool = True,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Write and grade every problem `samples` times under one policy, all in one batched run.

    Args:
        file: completions are appended to it as they end, and those it has of the same `key` and policy are
            not written again; None: nothing is kept.
        key: what the completions depend on besides the policy (see `pipeline.fingerprint`).

    Returns:
        the policy's row of `results.json`, and a record for each completion with its problem's `key` as `id`,
        its number, text, ids (see `ids_of`), owners, counts, and grade; ordered by problem and number.

    Raises:
        SrlibError: a trace failed (those that ended are kept), or `file` is damaged or open in another process.
    """
    writer = Offloader(small, big, policy, **config.settings, seed=seed)
    digest = hashlib.sha256(f"{key} {policy} {seed}".encode()).hexdigest()[:16]

    def name(problem: Problem, number: int) -> str:
        return f"{digest}:{problem.key}:{number}"

    all_ = [(problem, n) for problem in problems for n in range(samples)]
    with Journal(file, every=1.0) if file else nullcontext() as journal:
        done = journal.records if journal else {}
        asked = [(problem, n) for problem, n in all_ if name(problem, n) not in done]
        last = time.perf_counter()

        def keep(place: int, trace: Trace) -> None:
            nonlocal last
            if trace.finish == "error":
                return
            problem, number = asked[place]
            now = time.perf_counter()
            record: dict[str, Any] = {"id": problem.key, "sample": number, "key": name(problem, number)}
            record |= {"seconds": now - last, **_record(trace, writer.tokenizer)}
            last = now
            if journal:
                journal.append(record)
            else:
                done[record["key"]] = record

        prompts, numbers = [problem.prompt for problem, _ in asked], [n for _, n in asked]
        traces = writer.run(prompts, progress=progress, numbers=numbers, finished=keep)
    writer.raise_if_failed(traces)
    records = [done[name(problem, n)] for problem, n in all_]
    _grade(records, {problem.key: problem for problem in problems}, config.hint, writer.tokenizer)
    if file:
        write(file, records)  # in order, graded, and without those of other settings
    return summarise(policy.name, dataset, config.max_tokens, records), records


def summarise(policy: str, dataset: str, max_tokens: int, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One row of `results.json`. Shares are of tokens or traces, times in seconds, tokens are sums.

    `wall_s` is the time from one ended trace to the next, summed: what a killed run had not finished is not in it.
    """
    estimate, n, k = accuracy(records), len(records), len(records) // len({r["id"] for r in records})
    tokens, wall = sum(len(r["owners"]) for r in records), sum(r["seconds"] for r in records)
    row = {
        "policy": policy,
        "dataset": dataset,
        "n_problems": estimate.n_problems,
        "samples_per_problem": estimate.samples_per_problem,
        "max_tokens": max_tokens,
        "accuracy": estimate.value,
        "ci95": [estimate.low, estimate.high],
        "offload_share": stats.share(records),
        "share_quartiles": list(stats.share_per_problem(records)),
        "handovers": sum(len(r["handovers"]) for r in records) / n,
        "truncated_share": sum(r["finish"] != "eos" for r in records) / n,
        "malformed_share": sum(r["malformed"] for r in records) / n,
        "wall_s": wall,
        "tokens_per_s": tokens / wall,
        **{key: sum(r[key] for r in records) for key in FORWARD},
    }
    if k > 1:
        row |= {f"pass@{k}": stats.pass_at(records, k).value, f"maj@{k}": stats.maj_at(records, k).value}
    return row


SIDES = ("small_forward_tokens", "big_forward_tokens")
FORWARD = (*SIDES, "least_forward_tokens", *(f"least_{side}" for side in SIDES))  # processed, and what had to be


def difficulty(problem: Problem) -> str | None:
    """How hard a problem is, by what its set says: `level`, or in the arithmetic world the number of products."""
    if "level" in problem.meta:
        return f"level {problem.meta['level']}"
    if "operations" in problem.meta:
        return f"{problem.meta['operations'].count('*')} products"
    return None


def by_difficulty(records: Sequence[dict[str, Any]], problems: Sequence[Problem]) -> pd.DataFrame:
    """Accuracy with its interval, offload share and hand-overs a trace, by `difficulty`; empty if none is known."""
    level = {problem.key: level for problem in problems if (level := difficulty(problem)) is not None}
    groups: dict[str, list[dict]] = defaultdict(list)
    for record in records:
        if record["id"] in level:
            groups[level[record["id"]]].append(record)
    rows = []
    for name in sorted(groups):
        estimate = accuracy(groups[name])
        rows.append(
            {
                "difficulty": name,
                "n": estimate.n_problems,
                "accuracy": estimate.value,
                "low": estimate.low,
                "high": estimate.high,
                "offload share": stats.share(groups[name]),
                "hand-overs": sum(len(r["handovers"]) for r in groups[name]) / len(groups[name]),
            }
        )
    return pd.DataFrame(rows)


def _record(trace: Trace, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "finish": trace.finish,
        "text": tokenizer.decode(trace.ids),
        "ids": b64encode(zlib.compress(np.array(trace.ids, dtype="<u4").tobytes())).decode(),
        "owners": "".join("SBF"[owner] for owner in trace.owners),
        "handovers": [[h.start, h.tokens, h.closed_by] for h in trace.handovers],
        "malformed": bool(trace.malformed),
        "prompt_tokens": len(trace.prompt_ids),
        "big_tokens": trace.big_tokens,
        "small_tokens": trace.small_tokens,
        **{key: getattr(trace, key) for key in FORWARD},
    }


def ids_of(record: dict[str, Any]) -> list[int]:
    """The ids of a completion, tags included, as its owners; they are packed, since in figures they would be the most of it."""
    return np.frombuffer(zlib.decompress(b64decode(record["ids"])), dtype="<u4").tolist()


def _grade(
    records: Sequence[dict[str, Any]], problems: dict[str, Problem], hint: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Lay the verdicts into the records; those that have one keep it."""
    special = [token for token in tokenizer.all_special_tokens if token not in (spans.OPEN, *spans.TEXT.closes)]
    waiting = [record for record in records if "correct" not in record]
    for record in tqdm(waiting, desc="grade", unit="completion", mininterval=1, disable=len(waiting) < 1000):
        problem, text = problems[record["id"]], spans.strip(record["text"])
        for token in special:
            text = text.replace(token, "")
        found = verdict(with_opening(tokenizer, text), problem, hint)
        record |= {"correct": found.correct, "answer": found.answer, "reason": found.reason}
