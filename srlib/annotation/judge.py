"""Judges: a language model is shown a trace, and quotes its hardest parts.

A judge is a server that speaks the OpenAI protocol (`srlib.annotation.endpoint`, `.batch`), or a model loaded
here. It answers with passages between fences (`.answers`); where they stand is for `.alignment` to find. A bad
answer (none, cut, no fences, passages of another text) is asked for again at the next temperature, a bounded
number of times, and then recorded with its reason. Every trace is judged once: what was answered is written
down as it comes, and what was not is named at the end and asked again by the next run.

Deviation from the paper (section on annotation): passages are asked for in the order of the
trace, so that one that occurs twice can be told apart.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.annotation import answers, traces
from srlib.annotation.answers import CUT, Answer, Usage, Verdict, prompt_of
from srlib.annotation.batch import Batch, under_way
from srlib.annotation.endpoint import Endpoint, judged, limit
from srlib.data import digests
from srlib.data.journal import Journal
from srlib.data.rows import Problem
from srlib.engine.protocol import Engine
from srlib.params import Annotate, Judge, Params

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PASSAGE = 60  # tokens of a passage, as the estimate has it; with its fences it takes FENCES more
FENCES = 4
FRAME = 8  # tokens that a chat template lays around a prompt
SAMPLE = 300  # traces that are tokenised for the estimate
HOPELESS = 8  # traces in a row that a server failed on, after which it is taken to be down
NAMED = 8  # traces without an answer that are named
# Reasons that older versions wrote down though the server, the account or the key was to blame.
OF_OTHERS = ("server:", "refused:")


def estimate(problems: Sequence[Problem], config: Annotate, tokenizer: PreTrainedTokenizerBase) -> Usage:
    """What judging `problems` should take, if every first answer is good and marks the share asked for.

    Tokens are those of `tokenizer`, counted on at most `SAMPLE` of the traces; a judge that thinks
    before it answers writes more.
    """
    some = problems[:: max(1, len(problems) // SAMPLE)][:SAMPLE]

    def tokens(texts: list[str]) -> int:
        return sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"])) if texts else 0

    characters = sum(len(problem.prompt) + len(problem.worked) for problem in some)
    scale = sum(len(p.prompt) + len(p.worked) for p in problems) / max(1, characters)
    read_ = scale * tokens([prompt_of(problem, config.share) for problem in some]) + FRAME * len(problems)
    quoted = config.share * scale * tokens([problem.worked for problem in some])
    return Usage(len(problems), round(read_), round(quoted * (1 + FENCES / PASSAGE)))


class Asked(Protocol):
    """Who is asked."""

    name: str

    def stop(self, fault: str) -> None:
        """Ask no more, and raise `fault` when what is under way has ended."""

    def judge(self, problems: list[Problem], config: Annotate) -> Generator[Verdict, None, None]:
        """A verdict for each of `problems`, as they come."""


def server(config: Judge, journal: Journal) -> Endpoint:
    """The judge that is a server; a batch that was paid for is read even if no other is wanted."""
    return Batch(config, journal) if config.batch or under_way(journal) else Endpoint(config)


def ask(judge: Asked, problems: list[Problem], config: Annotate, journal: Journal, expected: Usage) -> None:
    """Ask `judge` about the problems that the journal has no verdict on, and write down every verdict as it comes.

    Args:
        expected: what all of `problems` should take; see `estimate`.

    Raises:
        SrlibError: it would cost more than `max_cost`, now or by what it has cost so far, the judge cannot be
            asked, or it gave no answer on some. What was answered is in the journal.
    """
    named = {traces.key(problem): problem for problem in problems}
    done = {name for name in named if name in journal.records and stands(journal.records[name], config.judge)}
    spent = Usage()
    for name in done:
        spent.add(journal.records[name])
    todo = [problem for name, problem in named.items() if name not in done]
    if not todo:
        return
    most, price = config.judge.max_cost, expected.cost(config.judge)
    if most is not None and price > most:
        raise SrlibError(
            f"Judging {len(problems)} traces should cost {price:.2f} ({expected.prompt_tokens:,} tokens read, "
            f"{expected.completion_tokens:,} written), more than annotate.judge.max_cost = {most}: raise it, or "
            f"lower annotate.n_traces to {int(len(problems) * most / price)}."
        )
    bar = tqdm(total=len(todo), desc="judge", unit="trace", mininterval=1)
    pending: list[Verdict] = []
    in_a_row = 0
    with bar:
        answers = judge.judge(todo, config)
        try:
            for verdict in answers:
                spent.add(verdict.usage)
                in_a_row = in_a_row + 1 if verdict.pending else 0
                if verdict.pending:
                    pending.append(verdict)
                else:
                    journal.append(verdict.record)
                    done.add(traces.key(verdict.problem))
                bar.update()
                cost = spent.cost(config.judge)
                bar.set_postfix(cost=f"{cost:.2f} of {cost / max(1, len(done)) * len(named):.2f}", refresh=False)
                if in_a_row >= HOPELESS:
                    judge.stop(
                        f"{judge.name} has failed on {HOPELESS} traces in a row ({verdict.reason}). The "
                        f"{len(done)} answers before are kept: run again to go on."
                    )
                if most is not None and cost > most:
                    judge.stop(
                        f"annotate.judge.max_cost = {most} is reached: {len(done)} of {len(named)} "
                        f"traces are judged, for {cost:.2f}. Raise it, and run again to go on."
                    )
        finally:
            answers.close()
    if pending:
        ids = [verdict.problem.id for verdict in pending]
        more = f" and {len(ids) - NAMED} more" if len(ids) > NAMED else ""
        raise SrlibError(
            f"{judge.name} gave no answer on {len(ids)} of {len(named)} traces: {', '.join(ids[:NAMED])}{more} "
            f"({pending[-1].reason}). The {len(done)} answers are kept: run again to ask about the others."
        )


def stands(record: dict[str, Any], config: Judge) -> bool:
    """Whether a record of the journal is a verdict: what a server's fault left there, in older versions, is none.

    Nor is an answer that was cut, once there is more room for it.
    """
    cut = re.match(rf"{CUT} (\d+) tokens", record["reason"])
    if cut and int(cut[1]) < (config.max_tokens_retry or config.max_tokens):
        return False
    return record["requests"] > 0 and not record["reason"].startswith(OF_OTHERS)


class Local:
    """A model that is loaded here."""

    def __init__(self, config: Judge, engine: Engine, batch_size: int, seed: int = 0) -> None:
        self.config, self.engine, self.batch_size, self.seed = config, engine, batch_size, seed
        self.name, self._fault = "The local judge", ""

    def stop(self, fault: str) -> None:
        """Ask no more, and raise `fault`."""
        self._fault = fault

    def judge(self, problems: list[Problem], config: Annotate) -> Generator[Verdict, None, None]:
        """A verdict for each of `problems`, `batch_size` at a time.

        Raises:
            SrlibError: the model failed, or the run was stopped.
        """
        from srlib.decoding.policies import Never
        from srlib.decoding.scheduler import Offloader

        for at in range(0, len(problems), self.batch_size):
            left = [Verdict(problem) for problem in problems[at : at + self.batch_size]]
            for attempt, temperature in enumerate(self.config.temperatures):
                writer = Offloader(
                    self.engine,
                    None,
                    Never("judge"),
                    max_tokens=limit(self.config, attempt),
                    batch_size=self.batch_size,
                    temperature=temperature,
                    seed=len(self.config.temperatures) * self.seed + attempt,  # else a draw is the last one again
                )
                answers = writer.run([prompt_of(verdict.problem, config.share) for verdict in left])
                writer.raise_if_failed(answers)
                again = []
                for verdict, answer in zip(left, answers):
                    verdict.usage.add(Usage(1, len(answer.prompt_ids), len(answer.ids)))
                    if answer.finish == "prompt":
                        verdict.reason = f"too long: {len(answer.prompt_ids)} tokens to read"
                        yield verdict
                        continue
                    cut = f"{CUT} {limit(self.config, attempt)} tokens" if answer.finish == "length" else ""
                    judged(verdict, Answer(answer.text(writer.tokenizer), cut), config)
                    if verdict.reason:
                        again.append(verdict)
                    else:
                        yield verdict
                left = again
            yield from left
            if self._fault:
                raise SrlibError(self._fault)


def chosen(p: Params, journal: Journal) -> Asked:
    """The judge that the params name."""
    config = p.annotate.judge
    if config.local is None:
        return server(config, journal)
    from srlib import engine

    slots = p.annotate.batch_size
    return Local(config, engine.load(config.local, slots), slots, p.seed)


def digest(p: Params) -> str:
    """Of all that decides what a judge answers; a journal keeps its name as settings come to be."""
    config = p.annotate
    asked = config.judge.model_dump(include={"model", "base_url", "local", "temperatures", "max_tokens"})
    if config.judge.extra_body:
        asked["extra_body"] = config.judge.extra_body
    return digests.of([asked, config.share, answers.PROMPT, p.seed if config.judge.local else None], 8)
