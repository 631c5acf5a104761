"""A judge that is asked by its provider's batch API: all requests in one file, answered within a day.

What is under way stands in the journal before it is paid for: the file that was sent, then the batch that
was made of it, and what its traces have used so far. A run that ends while it waits, however it ends, waits
on for the same batch when it is started again. Bad answers are asked for again in another batch, at the
next temperature.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any

from tqdm.auto import tqdm

from srlib import SrlibError
from srlib.annotation import traces
from srlib.annotation.answers import MALFORMED, Usage, Verdict, at, count, json_of, prompt_of
from srlib.annotation.endpoint import Endpoint, Fault, Kind, judged
from srlib.data import digests
from srlib.data.journal import Journal
from srlib.data.rows import Problem
from srlib.params import Annotate, Judge

RECORD = "batch"  # its key in the journal; that of a trace has a colon
REQUESTS, BYTES = 50_000, 190_000_000  # that a file may hold
ENDED = ("completed", "failed", "expired", "cancelled")
POLL_S = 30.0  # between two looks at a batch; the first come sooner
PATIENCE = 20  # looks in a row without an answer


class Batch(Endpoint):
    """A server that speaks the OpenAI protocol, by its endpoints /files and /batches; errors as of `Endpoint`."""

    def __init__(self, config: Judge, journal: Journal) -> None:
        super().__init__(config)
        self.journal = journal

    def judge(self, problems: list[Problem], config: Annotate) -> Generator[Verdict, None, None]:
        """A verdict for each of `problems`, as their batches end.

        Raises:
            SrlibError: a batch could not be made, or the run was stopped; after the last verdict that came.
        """
        left = {_name(problem): Verdict(problem) for problem in problems}
        try:
            while left and not self._fault:
                record = self.journal.records.get(RECORD, {"used": {}})
                for name in left.keys() & record["used"].keys():
                    left[name].usage = Usage(**record["used"][name])
                if not under_way(self.journal):
                    record = self._sent_off(left, config)
                made = self._waited_for(record)
                for name, said in self._lines(made):
                    if name in left and self._filled_in(left[name], said, config):
                        yield left.pop(name)
                for name in [name for name in record["used"] if name in left and not left[name].reason]:
                    left[name].pending, left[name].reason = True, f"the batch has {made['status']} without it"
                    yield left.pop(name)
                self._note(left, "", "")
        except Fault as fault:
            self._ends(fault)
        if self._fault:
            raise SrlibError(self._fault)

    def _sent_off(self, left: dict[str, Verdict], config: Annotate) -> dict[str, Any]:
        """Send a file of requests; what the journal has of it."""
        lines: list[bytes] = []
        size = 0
        asked: dict[str, Verdict] = {}
        for name, verdict in left.items():
            body = self.body(prompt_of(verdict.problem, config.share), verdict.usage.requests)
            line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
            lines.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
            size += len(lines[-1])
            if asked and (len(lines) > REQUESTS or size > BYTES):
                lines.pop()
                break
            asked[name], verdict.reason = verdict, ""
        create = self.client.files.with_raw_response.create
        sent = self._said(lambda: create(file=("judge.jsonl", b"".join(lines)), purpose="batch"))
        return self._note(asked, str(sent["id"]), "")

    def _waited_for(self, record: dict[str, Any]) -> dict[str, Any]:
        """The batch of a file that was sent, once it has ended; it is made if it was not yet."""
        batches, file = self.client.batches.with_raw_response, record["file"]
        if not record["batch"]:
            # A run may have ended after it was made, and before that was written down.
            listed = self._said(lambda: batches.list(limit=100), "data")["data"]
            there = listed if isinstance(listed, list) else []
            made = next((each for each in there if at(each, "input_file_id") == file and at(each, "id")), None)
            if made is None:
                once = self.client.with_options(max_retries=0).batches.with_raw_response.create
                made = self._said(
                    lambda: once(input_file_id=file, endpoint="/v1/chat/completions", completion_window="24h")
                )
            record = {**record, "batch": str(made["id"])}
            self.journal.append(record)
        pause, missed = POLL_S / 30, 0
        with tqdm(total=len(record["used"]), desc=f"batch {record['batch']}", unit="trace") as bar:
            while True:
                try:
                    made = self._said(lambda: batches.retrieve(record["batch"]), "status")
                    missed = 0
                except Fault as fault:
                    missed += 1
                    if fault.kind is not Kind.PASSES or missed == PATIENCE:
                        raise
                else:
                    bar.n = count(at(at(made, "request_counts"), "completed"))
                    bar.refresh()
                    if made["status"] in ENDED:
                        return made
                time.sleep(pause)
                pause = min(2 * pause, POLL_S)

    def _lines(self, made: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """What a batch says of each of its requests, by name.

        Raises:
            Fault: it has not begun, such as where the file or the account is not as it should be.
        """
        if made["status"] == "failed":
            self._note({}, "", "")
            errors = at(at(made, "errors"), "data") or [made]
            raise Fault(Kind.ENDS, "has refused the batch", self._told(str(at(errors[0], "message") or errors[0])))
        for file in (made.get("output_file_id"), made.get("error_file_id")):
            if not file:
                continue
            try:
                text = self.client.files.content(file).text
            except Exception as error:
                raise self.fault_of(error) from None
            for line in text.split("\n"):
                if (said := json_of(line)) is not None:  # else its trace is one without an answer
                    yield str(at(said, "custom_id")), said

    def _filled_in(self, verdict: Verdict, said: Any, config: Annotate) -> bool:
        """Fill in a verdict by a line of a batch; False: it is to be asked again, or the run is stopped."""
        attempt, response = verdict.usage.requests, at(said, "response")
        try:
            status, body = at(response, "status_code"), at(response, "body")
            if status != 200:
                status = status if isinstance(status, int) else 503
                raise self.refusal(str(status), at(body, "error") or body or at(said, "error"))
            answer = self.answer(body, attempt)
        except Fault as fault:
            if fault.kind is Kind.ENDS:
                self._ends(fault)
                verdict.reason = fault.said
                return False
            if fault.kind is Kind.UNSURE:
                return self._at_once(verdict, config)
            verdict.pending = fault.kind is Kind.PASSES
            verdict.usage.requests += 1
            verdict.reason = fault.said if verdict.pending else f"the judge {fault}"
            return True
        verdict.usage.add(answer.usage)
        verdict.usage.requests += 1
        judged(verdict, answer, config)
        if not verdict.reason or verdict.usage.requests < len(self.config.temperatures):
            return not verdict.reason
        return answer.fault != MALFORMED or self._at_once(verdict, config)

    def _at_once(self, verdict: Verdict, config: Annotate) -> bool:
        """Ask about one trace without a batch, to find out whose a refusal is."""
        other = self._one(verdict.problem, config)
        if other is not None:
            verdict.usage.add(other.usage)
            verdict.snippets, verdict.reason, verdict.pending = other.snippets, other.reason, other.pending
        return other is not None

    def _note(self, asked: dict[str, Verdict], file: str, batch: str) -> dict[str, Any]:
        """Write down what is under way, and what its traces have used."""
        used = {name: vars(verdict.usage) for name, verdict in asked.items()}
        record = {"key": RECORD, "file": file, "batch": batch, "used": used}
        self.journal.append(record)
        return record

    def _said(self, call: Callable[[], Any], needs: str = "id") -> dict[str, Any]:
        """What a server answers.

        Raises:
            Fault: none, or not what it should.
        """
        try:
            text = call().text
        except Exception as error:  # as in `Endpoint`
            raise self.fault_of(error) from None
        said = json_of(text)
        if at(said, needs) is None:
            raise Fault(Kind.ENDS, "has no batch API at this address, or a strange one", self._told(text))
        return said


def under_way(journal: Journal) -> bool:
    """Whether a batch was sent whose answers are not read yet."""
    return bool(journal.records.get(RECORD, {}).get("file"))


def _name(problem: Problem) -> str:
    """Of a request in a batch; the id of a problem may be too long for one."""
    return digests.of(traces.key(problem))
