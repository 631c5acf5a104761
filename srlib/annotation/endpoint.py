"""A judge that is a server: it is asked, and what goes wrong is put down to whom it is due.

Whatever a server does is one of four things, told apart in one table (`FAULTS`). A fault of the trace
is a verdict on it. One of the account, the key, the request, the address or the network ends the run
in one sentence. One that passes (too many requests, a server's error, a lost connection) is tried again
after a pause by the `openai` client, and then the trace is left for another run. And where a server
does not say what it refuses, it is asked about a trace of two lines: if it answers that, and refuses the
other once more, it is the trace; if not, it is every request. So no verdict is written down
that the trace did not cause.

What a server says is shown and kept without the key, however it repeats it.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from enum import Enum
from typing import Any, NamedTuple

from srlib import SrlibError
from srlib.annotation.answers import MALFORMED, Answer, Usage, Verdict, answer_of, json_of, prompt_of, read
from srlib.data.rows import Problem
from srlib.params import Annotate, Judge
from srlib.params.secrets import checked, masked

SHOWN = 200  # characters of what a server says
SECRET = 8  # characters from which a key is looked for in answers too: a shorter one stands for none, as EMPTY does
PROBE = Problem(id="probe", prompt="What is 17 * 24?", answer="408", trace="17 * 20 = 340\n17 * 4 = 68\n340 + 68 = 408")


class Kind(Enum):
    """Whose a fault is, and so what becomes of the trace that was asked about."""

    TRACE = "a verdict on it"
    UNSURE = "of the trace or of all requests, which is to be found out"
    ENDS = "none; the run ends, as no other request could fare better"
    PASSES = "none; it is asked again in another run"


class Fault(Exception):
    """Why there is no answer; `what` goes on from the name of the judge, `said` is the server's word."""

    def __init__(self, kind: Kind, what: str, said: str) -> None:
        super().__init__(f"{what}: {said}")
        self.kind, self.what, self.said = kind, what, said


class Row(NamedTuple):
    """One kind of refusal: the status, what the server says (any case), and what that means."""

    status: str
    says: str
    kind: Kind
    what: str


# The first row that fits. What a server says is the code, the type, the parameter (as param:name) and the message.
FAULTS = (
    Row(r"402", r"", Kind.ENDS, "has no credit left"),
    Row(
        r"4..",
        r"insufficient.?(quota|balance|credit|fund)|billing_(hard_limit|not_active)|exceeded_current_quota|"
        r"(credit balance|account balance|out of credit|no credit|in arrears)",
        Kind.ENDS,
        "has no credit left",
    ),
    Row(r"401", r"", Kind.ENDS, "does not take the key in {key}"),
    Row(
        r"4(?!29)..",
        r"content.?(filter|policy|management|exists risk|violation)|moderation|flagged|data.?inspection|usage polic",
        Kind.TRACE,
        "refuses what is in it",
    ),
    Row(r"(4(?!29)|5)..", r"context.{0,8}(length|window|size|limit)", Kind.TRACE, "finds it too long"),
    Row(r"403", r"", Kind.ENDS, "does not take the key in {key}, or not for {model!r}"),
    Row(r"404|405|410", r"", Kind.ENDS, "has no model {model!r}, or is not at this address"),
    Row(r"407", r"", Kind.ENDS, "is behind a proxy that wants to know who asks"),
    Row(
        r"400|422",
        r"(unsupported|unrecogni.ed|unknown|unexpected|extra|invalid).{0,20}(param|argument|field|keyword|model)|"
        r"not (supported|permitted)|param:(?!messages|input|prompt|none\b)\w|model.{0,60}not (found|exist|a valid)",
        Kind.ENDS,
        "does not take requests of this form (see annotate.judge: limit_by, temperatures, extra_body)",
    ),
    Row(r"413", r"", Kind.TRACE, "finds it too long"),
    Row(
        r"400|422",
        r"(prompt|input|message|text|content|string).{0,40}(too (long|large|many)|exceed)|reduce the length|string_above",
        Kind.TRACE,
        "finds it too long",
    ),
    Row(r"408|409|425|429|5..", r"", Kind.PASSES, "gives no answer"),
    Row(r"...", r"", Kind.UNSURE, "refuses it"),
)
# Errors of the HTTP client, by name (which client it is, is openai's affair), that no other attempt would mend.
UNREACHABLE = ("ConnectError", "ProxyError", "UnsupportedProtocol", "LocalProtocolError", "TooManyRedirects")


class Endpoint:
    """A server that speaks the OpenAI protocol.

    Raises:
        SrlibError: the environment has no key, or none that can be sent, or the address is none.
    """

    def __init__(self, config: Judge) -> None:
        import openai

        self.config, self._key = config, _key(config)
        self._sent = threading.local()  # requests that a thread has sent for its trace
        self._pause = 60 / config.requests_per_minute if config.requests_per_minute else 0.0
        self._next, self._lock, self._fault = 0.0, threading.Lock(), ""
        self._answered = False  # a request of this form
        try:
            url = checked(config.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1")
        except ValueError as error:
            raise SrlibError(f"The environment variable OPENAI_BASE_URL: {error}.") from None
        try:
            self.client = openai.OpenAI(
                api_key=self._key or "none",
                base_url=url,
                timeout=config.timeout_s,
                max_retries=config.retries,
                http_client=openai.DefaultHttpxClient(event_hooks={"request": [self._sending]}),
            )
        except Exception as error:  # of whatever the environment says on proxies and certificates
            raise SrlibError(f"The judge at {url} cannot be asked: {self._told(str(error))}.") from None
        self.name = f"The judge at {url}"

    def stop(self, fault: str) -> None:
        """Ask no more, and raise `fault` when what is under way has ended."""
        self._fault = self._fault or fault

    def _ends(self, fault: Fault) -> None:
        """Ask no more, as nothing else would be answered either."""
        self.stop(f"{self.name} {fault}. What was answered is kept: mend it, and run again to go on.")

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
        """What came of one trace; None: nothing, and the run is stopped."""
        verdict, self._sent.requests = Verdict(problem), 0
        settled = not self._fault and self._settled(verdict, config)
        verdict.usage.requests = self._sent.requests
        return verdict if settled else None

    def _settled(self, verdict: Verdict, config: Annotate, again: bool = False) -> bool:
        """Fill in a verdict, or that it is pending; False: neither, as the run is stopped."""
        try:
            self._ask_until_good(verdict, config)
            return True
        except Fault as caught:
            fault = caught
        sure = again or (fault.kind is Kind.TRACE and self._answered)
        if fault.kind in (Kind.TRACE, Kind.UNSURE) and not sure:
            try:
                self._probe(verdict.usage, config)
                return self._settled(verdict, config, again=True)
            except Fault as caught:  # of a short one too: it was not the trace
                fault = caught if caught.kind is Kind.PASSES else Fault(Kind.ENDS, caught.what, caught.said)
        if fault.kind is Kind.ENDS:
            self._ends(fault)
            return False
        verdict.snippets, verdict.pending = [], fault.kind is Kind.PASSES
        verdict.reason = fault.said if verdict.pending else f"the judge {fault}"
        return True

    def _ask_until_good(self, verdict: Verdict, config: Annotate) -> None:
        """Ask about a trace at one temperature after the other, until an answer can be used.

        Raises:
            Fault: no answer came, or none that is a chat completion.
        """
        prompt, malformed = prompt_of(verdict.problem, config.share), True
        for attempt in range(len(self.config.temperatures)):
            answer = self._ask(prompt, attempt)
            verdict.usage.add(answer.usage)
            malformed = malformed and answer.fault == MALFORMED
            judged(verdict, answer, config)
            if not verdict.reason:
                return
        if malformed:
            raise Fault(Kind.UNSURE, "answers with what is no chat completion", MALFORMED)

    def _probe(self, usage: Usage, config: Annotate) -> None:
        """Ask about a trace of two lines.

        Raises:
            Fault: there is no answer to that either.
        """
        answer = self._ask(prompt_of(PROBE, config.share), 0)
        usage.add(answer.usage)
        if answer.fault == MALFORMED:
            raise Fault(Kind.ENDS, "answers with what is no chat completion, so that it may not be one", MALFORMED)

    def body(self, prompt: str, attempt: int) -> dict[str, Any]:
        """A request; `attempt` counts those for one trace from 0."""
        temperature = self.config.temperatures[attempt]
        body: dict[str, Any] = {"model": self.config.model, "messages": [{"role": "user", "content": prompt}]}
        body |= {self.config.limit_by: limit(self.config, attempt)} | self.config.extra_body
        return body if temperature is None else body | {"temperature": temperature}

    def _ask(self, prompt: str, attempt: int) -> Answer:
        """Send one request, again where it met what passes.

        Raises:
            Fault: no answer came.
        """
        body = self.body(prompt, attempt)
        try:
            response = self.client.chat.completions.with_raw_response.create(
                model=body["model"], messages=body["messages"], extra_body=body
            )
            text = response.text
        except Exception as error:  # the client's own, and those of what it is made of
            raise self.fault_of(error) from None
        return self.answer(json_of(text), attempt)

    def answer(self, said: Any, attempt: int) -> Answer:
        """The answer in the body of a response.

        Raises:
            Fault: it is an error, which some servers send as if it were an answer.
        """
        if isinstance(said, dict) and said.get("error") and not said.get("choices"):
            code = str(said["error"].get("code") if isinstance(said["error"], dict) else "")
            raise self.refusal(code if re.fullmatch(r"[45]\d\d", code) else "400", said["error"])
        answer = answer_of(said, limit(self.config, attempt), self._kept)
        self._answered = self._answered or answer.fault != MALFORMED
        return answer

    def refusal(self, status: str, error: Any) -> Fault:
        """What a server's error comes to; `error` is the `error` of its body, or all of it."""
        fields = error if isinstance(error, dict) else {}
        message = fields.get("message") or fields.get("detail") or error
        said = " ".join(f"{fields.get('code')} {fields.get('type')} param:{fields.get('param')} {message}".split())
        row = next(r for r in FAULTS if re.fullmatch(r.status, status) and re.search(r.says, said, re.IGNORECASE))
        what = row.what.format(key=self.config.key, model=self.config.model)
        return Fault(row.kind, what, self._told(f"status {status}, {message}" if message else f"status {status}"))

    def fault_of(self, error: Exception) -> Fault:
        """What an error of the client comes to."""
        import openai

        if isinstance(error, openai.APIStatusError):
            return self.refusal(str(error.status_code), error.body)
        cause = error.__cause__ or error
        said = self._told(str(cause) or type(cause).__name__)
        if isinstance(error, openai.APIConnectionError) and type(cause).__name__ not in UNREACHABLE:
            return Fault(Kind.PASSES, "gives no answer", said)
        return Fault(Kind.ENDS, "cannot be asked", said)

    def _sending(self, _: Any) -> None:
        """Before every request, those that the client makes again included: count it, and keep the rate."""
        self._sent.requests = getattr(self._sent, "requests", 0) + 1
        with self._lock:
            now = time.monotonic()
            at = max(self._next, now)
            self._next = at + self._pause
        time.sleep(at - now)

    def _told(self, text: str) -> str:
        """What a server says, as it may be shown: without the key, before it is cut short."""
        said = " ".join(text.split())
        return (masked(said, self._key) if self._key else said)[:SHOWN].rstrip(".")

    def _kept(self, text: str) -> str:
        """An answer as it may be kept."""
        return masked(text, self._key) if len(self._key) >= SECRET else text


def limit(config: Judge, attempt: int) -> int:
    """Tokens an answer may have."""
    return (attempt and config.max_tokens_retry) or config.max_tokens


def judged(verdict: Verdict, answer: Answer, config: Annotate) -> None:
    """Fill in a verdict by an answer."""
    verdict.snippets, verdict.reason = [], answer.fault
    if not answer.fault:
        verdict.snippets, verdict.reason = read(answer.text, verdict.problem.worked, config.min_score)


def _key(config: Judge) -> str:
    """The key, "" where none is wanted."""
    if config.key is None:
        return ""
    key = os.environ.get(config.key, "")
    if not key:
        raise SrlibError(
            f"The environment variable {config.key} is empty: put the judge's key there, or name another in "
            "annotate.judge.key."
        )
    if wrong := re.search(r"[^!-~]", key):
        raise SrlibError(
            f"The key in the environment variable {config.key} cannot be sent: its character {wrong.start() + 1} of "
            f"{len(key)} is white space or no letter of ASCII. Copy it there again."
        )
    return key


def _verdicts(done: set[Future[Verdict | None]]) -> list[Verdict]:
    return [verdict for future in done if (verdict := future.result()) is not None]
