"""Judges: a language model is shown a trace, and quotes its hardest parts.

A judge is a server that speaks the OpenAI protocol, or a model loaded here. It answers with
passages between fences; where they stand is for `srlib.annotation.alignment` to find. A bad answer (none, no
fences, passages of another text) is asked for again at the next temperature, a bounded number of
times, and then recorded with its reason. What passes (too many requests, a server's error, a
lost connection) is tried again after a pause by the `openai` client; what does not (a refused
key, no such model) ends the run in one sentence, with every answer that came kept.

Deviation from the paper (section on annotation): passages are asked for in the order of the
trace, so that one that occurs twice can be told apart.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.annotation import traces
from srlib.annotation.alignment import align
from srlib.data.journal import Journal
from srlib.data.rows import Problem
from srlib.engine.protocol import Engine
from srlib.params import Annotate, Judge

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT = """\
You will see a problem and a worked solution. A small language model is to write such solutions, \
with a large one at hand that can write the hardest passages for it.

Choose the passages in which the small model would most likely go wrong: the key ideas, the steps \
that need care, the calculations that are hard to do in one's head. Together they should make up \
about {share:.0%} of the solution; choose at least three, even if all of it is easy.

Copy every passage word for word, in the order in which they stand in the solution. Put each \
between two lines of three backticks, and write nothing else:
```
a passage of the solution
```

<problem>
{problem}
</problem>

<solution>
{trace}
</solution>"""

PASSAGE = 60  # tokens of a passage, as the estimate has it; with its fences it takes FENCES more
FENCES = 4
FRAME = 8  # tokens that a chat template lays around a prompt
SAMPLE = 300  # traces that are tokenised for the estimate
HOPELESS = 8  # traces in a row that a server failed on, or refused, after which it is taken to be down
_FENCED = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```[ \t]*$", re.DOTALL | re.MULTILINE)


@dataclass
class Usage:
    """What judging took, or will take; `cost` in the currency of the prices."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def cost(self, config: Judge) -> float:
        return (self.prompt_tokens * config.price_in + self.completion_tokens * config.price_out) / 1e6

    def add(self, other: Usage | dict[str, Any]) -> None:
        values = other if isinstance(other, dict) else vars(other)
        for name in vars(self):
            setattr(self, name, getattr(self, name) + values[name])


@dataclass
class Verdict:
    """What a judge said on one trace: passages, or the reason why there are none."""

    problem: Problem
    snippets: list[str] = field(default_factory=list)
    reason: str = ""
    usage: Usage = field(default_factory=Usage)
    failed: bool = False  # the server did: no answer came, and another time one may

    @property
    def record(self) -> dict[str, Any]:
        kept = {"key": traces.key(self.problem), "snippets": self.snippets, "reason": self.reason}
        return kept | vars(self.usage)


def prompt_of(problem: Problem, share: float) -> str:
    """What a judge is asked about one trace."""
    return PROMPT.format(share=share, problem=problem.prompt, trace=problem.trace)


def read(answer: str | None, trace: str, min_score: float) -> tuple[list[str], str]:
    """The passages of an answer and "", or none and what is wrong with it."""
    text = (answer or "").rpartition("</think>")[2]
    if not text.strip():
        return [], "empty answer"
    snippets = [snippet.strip("\n") for snippet in _FENCED.findall(text) if snippet.strip()]
    if not snippets:
        return [], "no passage between fences"
    if not any(align(snippets, trace, min_score)):
        return [], "no passage is in the trace"
    return snippets, ""


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


def ask(judge: Endpoint | Local, problems: list[Problem], config: Annotate, journal: Journal, expected: Usage) -> None:
    """Ask `judge` about the problems that the journal has no answer for, and write down every answer as it comes.

    Args:
        expected: what all of `problems` should take; see `estimate`.

    Raises:
        SrlibError: it would cost more than `max_cost`, now or by what it has cost so far, or the
            judge cannot be asked. What was answered is in the journal.
    """
    named = {traces.key(problem): problem for problem in problems}
    spent = Usage()
    for record in (journal.records[name] for name in named if name in journal.records):
        spent.add(record)
    todo = [problem for name, problem in named.items() if name not in journal.records]
    if not todo:
        return
    limit, price = config.judge.max_cost, expected.cost(config.judge)
    if limit is not None and price > limit:
        raise SrlibError(
            f"Judging {len(problems)} traces should cost {price:.2f} ({expected.prompt_tokens:,} tokens read, "
            f"{expected.completion_tokens:,} written), more than annotate.judge.max_cost = {limit}: raise it, or "
            f"lower annotate.n_traces to {int(len(problems) * limit / price)}."
        )
    bar = tqdm(total=len(todo), desc="judge", unit="trace", mininterval=1)
    failed: list[Verdict] = []  # in a row; only a server that answers again makes them final
    with bar:
        answers = judge.judge(todo, config)
        try:
            for verdict in answers:
                spent.add(verdict.usage)
                bar.update()
                cost, done = spent.cost(config.judge), len(problems) - len(todo) + bar.n
                bar.set_postfix(cost=f"{cost:.2f} of {cost / done * len(problems):.2f}", refresh=False)
                failed.append(verdict)
                if not verdict.failed:
                    journal.append(*(v.record for v in failed))
                    failed = []
                elif len(failed) >= HOPELESS:
                    judge.stop(
                        f"{judge.name} has failed on {HOPELESS} traces in a row ({verdict.reason}). The "
                        f"{len(journal.records)} answers before are kept: run again to go on."
                    )
                if limit is not None and cost > limit:
                    judge.stop(
                        f"annotate.judge.max_cost = {limit} is reached: {len(journal.records)} of {len(problems)} "
                        f"traces are judged, for {cost:.2f}. Raise it, and run again to go on."
                    )
        finally:
            answers.close()
    journal.append(*(v.record for v in failed))


class Endpoint:
    """A server that speaks the OpenAI protocol.

    Raises:
        SrlibError: the environment has no key.
    """

    def __init__(self, config: Judge) -> None:
        import openai

        key = os.environ.get(config.key, "") if config.key else "none"
        if not key:
            raise SrlibError(
                f"The environment variable {config.key} is empty: put the judge's key there, or name another in "
                "annotate.judge.key."
            )
        self.config = config
        self._sent = threading.local()  # requests that a thread has sent for its trace
        self._pause = 60 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next, self._lock, self._fault = 0.0, threading.Lock(), ""
        self._answered = self._refused = 0
        self.client = openai.OpenAI(
            api_key=key,
            base_url=config.base_url,
            timeout=config.timeout_s,
            max_retries=config.retries,
            http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._sending]}),
        )
        self.name = f"The judge at {self.client.base_url}"

    def stop(self, fault: str) -> None:
        """Ask no more, and raise `fault` when what is under way has ended."""
        self._fault = self._fault or fault

    def judge(self, problems: list[Problem], config: Annotate) -> Generator[Verdict, None, None]:
        """A verdict for each of `problems`, as they come, `concurrency` at a time.

        Raises:
            SrlibError: after the last verdict that came, if the run was stopped.
        """
        waiting = iter(problems)
        under_way: set[Future[Verdict | None]] = set()
        with ThreadPoolExecutor(self.config.concurrency) as pool:
            try:
                while True:
                    while len(under_way) < self.config.concurrency and not self._fault:
                        if (problem := next(waiting, None)) is None:
                            break
                        under_way.add(pool.submit(self._one, problem, config))
                    if not under_way:
                        break
                    done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                    yield from _verdicts(done)
            except BaseException:  # nobody waits for the rest
                self.stop("interrupted")
                raise
        if self._fault:
            raise SrlibError(self._fault)

    def _one(self, problem: Problem, config: Annotate) -> Verdict | None:
        """The verdict on one trace; None: the run was stopped before there was one."""
        verdict, self._sent.requests = Verdict(problem), 0
        answered = not self._fault and self._asked(verdict, config)
        verdict.usage.requests = self._sent.requests
        return verdict if answered else None

    def _asked(self, verdict: Verdict, config: Annotate) -> bool:
        """Fill in a verdict; False: there can be none, and the run is stopped."""
        import openai

        prompt = prompt_of(verdict.problem, config.share)
        for temperature in self.config.temperatures:
            try:
                answer = self._ask(prompt, temperature)
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                return self._ends(f"does not take the key in {self.config.key}", error)
            except openai.NotFoundError as error:
                return self._ends(f"has no model {self.config.model!r}, or is not at this address", error)
            except (openai.APIConnectionError, openai.APIStatusError) as error:
                if getattr(error, "code", None) == "insufficient_quota":
                    return self._ends("has no credit left", error)
                status = getattr(error, "status_code", 500)  # none: no answer came
                if status >= 500 or status in (408, 409, 429):
                    verdict.reason, verdict.failed = f"server: {_short(error)}", True
                    return True
                with self._lock:  # such as a trace that is too long for the judge
                    self._refused += 1
                    hopeless = not self._answered and self._refused >= HOPELESS
                if hopeless:
                    return self._ends(f"refused all of the first {HOPELESS} requests", error)
                verdict.reason = f"refused: {_short(error)}"
                return True
            except ValueError:  # of the JSON decoder
                answer = None
            verdict.snippets, verdict.reason = self._read(answer, verdict, config)
            if not verdict.reason:
                break
        return True

    def _ask(self, prompt: str, temperature: float) -> Any:
        return self.client.chat.completions.create(
            model=self.config.model,
            messages=[{"role": "user", "content": prompt}],
            temperature=temperature,
            max_tokens=self.config.max_tokens,
        )

    def _read(self, answer: Any, verdict: Verdict, config: Annotate) -> tuple[list[str], str]:
        with self._lock:
            self._answered += 1
        usage = getattr(answer, "usage", None)
        verdict.usage.prompt_tokens += getattr(usage, "prompt_tokens", None) or 0
        verdict.usage.completion_tokens += getattr(usage, "completion_tokens", None) or 0
        try:
            text = answer.choices[0].message.content
        except (AttributeError, IndexError, TypeError):
            return [], "malformed answer"
        return read(text, verdict.problem.worked, config.min_score)

    def _sending(self, _: Any) -> None:
        """Before every request, those that the client makes again included: count it, and keep the rate."""
        self._sent.requests += 1
        with self._lock:
            now = time.monotonic()
            at = max(self._next, now)
            self._next = at + self._pause
        time.sleep(at - now)

    def _ends(self, what: str, error: Exception) -> bool:
        self.stop(f"{self.name} {what}: {_short(error)}. What was answered is kept: mend it, and run again to go on.")
        return False


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
            for temperature in self.config.temperatures:
                writer = Offloader(
                    self.engine,
                    None,
                    Never("judge"),
                    max_tokens=self.config.max_tokens,
                    batch_size=self.batch_size,
                    temperature=temperature,
                    seed=self.seed,
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
                    text = answer.text(writer.tokenizer)
                    verdict.snippets, verdict.reason = read(text, verdict.problem.worked, config.min_score)
                    if verdict.reason:
                        again.append(verdict)
                    else:
                        yield verdict
                left = again
            yield from left
            if self._fault:
                raise SrlibError(self._fault)


def _verdicts(done: set[Future[Verdict | None]]) -> list[Verdict]:
    return [verdict for future in done if (verdict := future.result()) is not None]


def _short(error: Exception) -> str:
    body = getattr(error, "body", None)
    text = body.get("message") if isinstance(body, dict) else None
    return " ".join(str(text or error).split())[:200]
