"""A judge by the batch API: one file, one batch, waited for however often the run ends."""

import json

import pytest

from srlib import SrlibError
from srlib.annotation import batch, judge, traces
from srlib.annotation.endpoint import PROBE
from srlib.data.journal import Journal
from tests.judge_server import JudgeServer, hard_steps
from tests.test_judge import key, problems, settings  # noqa: F401 (a fixture)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(batch, "POLL_S", 0.01)


def go(config, asked, path):
    with Journal(path) as journal:
        judge.ask(judge.server(config.judge, journal), asked, config, journal, judge.Usage())
        return {name: record for name, record in journal.records.items() if name != batch.RECORD}


def asked_for(url, **changed):
    return settings(url, **{"batch": True, "retries": 0} | changed)


def test_bad_answers_are_in_a_second_batch(tmp_path):
    asked, path = problems(30), tmp_path / "a.journal.jsonl"
    bad = {problem.trace: ("empty", "malformed", "no fences")[i] for i, problem in enumerate(asked[:3])}
    server = JudgeServer(hard_steps, lambda trace, n: bad.get(trace) if n == 0 else None)
    with server.serve() as url:
        records = go(asked_for(url), asked, path)
        before = len(server.headers)
        assert go(asked_for(url), asked, path) == records and len(server.headers) == before
    assert set(records) == {traces.key(problem) for problem in asked} and all(r["snippets"] for r in records.values())
    assert [len(data.splitlines()) for data in server.batches.files.values()] == [30, 30, 3, 3]
    assert [body["temperature"] for body in server.bodies[asked[0].trace]] == [0.0, 0.3]
    assert server.prompt_tokens == sum(record["prompt_tokens"] for record in records.values())
    assert server.requests == sum(record["requests"] for record in records.values()) == 33


@pytest.mark.parametrize("still", [True, False], ids=["", "and is no longer asked for"])
@pytest.mark.parametrize("when", ["create", "retrieve", "content"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of the server, which breaks off
def test_a_run_that_ends_while_it_waits_pays_once(tmp_path, monkeypatch, when, still):
    """It ends right after the server did what was asked, so that nothing of the answer is known."""
    monkeypatch.setattr(batch, "PATIENCE", 1)
    asked, path = problems(12), tmp_path / "a.journal.jsonl"
    server = JudgeServer(hard_steps)
    answer, ends = server.batches.answer, [when]

    def told(route, sent):
        said = answer(route, sent)
        what = "content" if route.endswith("/content") else "create" if sent and "batches" in route else ""
        what = what or ("retrieve" if "/batch-" in route else "")
        if what in ends:
            ends.clear()
            raise KeyboardInterrupt  # closes the connection, and says nothing
        return said

    server.batches.answer = told
    with server.serve() as url:
        with pytest.raises(SrlibError, match="run again"):
            go(asked_for(url), asked, path)
        assert not ends
        records = go(asked_for(url, batch=still), asked, path)
    assert len(records) == 12 and len(server.batches.made) == 1 and server.good.total() == 12


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_what_a_batch_ends_without_is_named_and_asked_again(tmp_path, status):
    asked, path, server = problems(6), tmp_path / "a.journal.jsonl", JudgeServer(hard_steps)
    server.batches.status, server.batches.spare = status, {asked[2].trace}
    with server.serve() as url:
        with pytest.raises(SrlibError, match=f"gave no answer on 1 of 6 traces: {asked[2].id} .*{status} without it"):
            go(asked_for(url), asked, path)
        server.batches.status, server.batches.spare = "completed", set()
        assert len(go(asked_for(url), asked, path)) == 6
    assert server.good.total() == 6


def test_a_batch_that_is_refused_as_a_whole(tmp_path):
    asked, path, server = problems(6), tmp_path / "a.journal.jsonl", JudgeServer(hard_steps)
    server.batches.status = "failed"
    with server.serve() as url:
        with pytest.raises(SrlibError, match="has refused the batch: no such model in batches. .* mend it"):
            go(asked_for(url), asked, path)
        server.batches.status = "completed"
        assert len(go(asked_for(url), asked, path)) == 6


def test_faults_of_single_requests(tmp_path):
    """Too long: a verdict. A server's error: asked again. Unexplained: asked at once. No credit: the run ends."""
    asked, path = problems(8), tmp_path / "a.journal.jsonl"
    long = (400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
    faults = {asked[1].trace: long, asked[2].trace: "500", asked[4].trace: (400, {"error": {"message": "oddity"}})}
    server = JudgeServer(hard_steps, lambda trace, n: faults.get(trace))

    def kept():
        lines = map(json.loads, path.read_text().splitlines())
        return {line["key"]: line["reason"] for line in lines if line["key"] != batch.RECORD}

    with server.serve() as url:
        with pytest.raises(SrlibError, match=f"gave no answer on 1 of 8 traces: {asked[2].id} "):
            go(asked_for(url), asked, path)
        assert set(kept()) == {traces.key(problem) for problem in asked} - {traces.key(asked[2])}
        assert "finds it too long" in kept()[traces.key(asked[1])] and "oddity" in kept()[traces.key(asked[4])]
        assert server.good[PROBE.trace] == 1
        faults[asked[2].trace] = (402, {"error": {"message": "pay"}})
        with pytest.raises(SrlibError, match="has no credit left: status 402, pay"):
            go(asked_for(url), asked, path)
        assert len(kept()) == 7
        faults.clear()
        records = go(asked_for(url), asked, path)
    assert len(records) == 8 and sum(bool(record["reason"]) for record in records.values()) == 2
    assert max(server.good[problem.trace] for problem in asked) == 1


def test_a_server_without_batches(tmp_path):
    server = JudgeServer(hard_steps)
    server.batches.answer = lambda path, sent: (404, {"error": "Not Found"})
    with server.serve() as url, pytest.raises(SrlibError, match="is not at this address: status 404, Not Found"):
        go(asked_for(url), problems(3), tmp_path / "a.journal.jsonl")
    server.batches.answer = lambda path, sent: (200, b"<html>secret-value")
    with server.serve() as url, pytest.raises(SrlibError, match=r"or a strange one: <html>\[key\]"):
        go(asked_for(url), problems(3), tmp_path / "a.journal.jsonl")


def test_files_have_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "REQUESTS", 4)
    server = JudgeServer(hard_steps)
    with server.serve() as url:
        assert len(go(asked_for(url), problems(10), tmp_path / "a.journal.jsonl")) == 10
        assert len(server.batches.made) == 3
        monkeypatch.setattr(batch, "BYTES", 10)  # less than one request: that one is sent all the same
        assert len(go(asked_for(url), problems(2), tmp_path / "b.journal.jsonl")) == 2
    assert len(server.batches.made) == 5
