"""A judge over HTTP that misbehaves; what was answered is kept and not asked again."""

import errno
import json
import multiprocessing
import random
import re
import time
from itertools import islice

import pytest

from srlib import SrlibError
from srlib.annotation import judge, traces
from srlib.annotation.alignment import align
from srlib.data import arith
from srlib.data.journal import Journal
from srlib.params import Annotate, Arith, Judge
from tests.judge_server import PASSING, JudgeServer, at_random, hard_steps


def settings(url, **judge_settings):
    asked = {"model": "judge", "base_url": url, "key": "TEST_KEY", "concurrency": 16}
    asked["timeout_s"] = 5.0  # longer than a busy machine takes to answer
    return Annotate(method="judge", judge=Judge(**asked | judge_settings))


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", "secret-value")


def problems(n):
    return list(islice(arith.generate(Arith(), "traces", 0), n))


def go(config, asked, path):
    with Journal(path) as journal:
        estimate = judge.estimate(asked, config, arith.tokenizer())
        judge.ask(judge.Endpoint(config.judge), asked, config, journal, estimate)
        return journal.records


def test_hundreds_of_traces_and_a_server_that_fails(tmp_path):
    server, asked = JudgeServer(hard_steps, at_random(0.3, 0)), problems(400)
    with server.serve() as url:
        records = go(settings(url, concurrency=32), asked, tmp_path / "a.journal.jsonl")
    assert set(records) == {traces.key(problem) for problem in asked}
    assert all(bool(r["snippets"]) != bool(r["reason"]) for r in records.values())
    ended_badly = sum(bool(r["reason"]) for r in records.values())
    assert server.requests == len(asked) + server.faults.total() - ended_badly
    assert server.requests == sum(r["requests"] for r in records.values())
    assert max(server.good.values()) == 1  # what was answered well was not asked again
    assert server.prompt_tokens == sum(r["prompt_tokens"] for r in records.values())
    assert set(server.faults) - {None} >= set(PASSING)
    assert "secret-value" not in (tmp_path / "a.journal.jsonl").read_text()


def work(url, path):
    """A run in a process of its own."""
    go(settings(url, concurrency=8), problems(160), path)


def test_ten_kills_and_the_same_set(tmp_path):
    """A run killed ten times has what an undisturbed one has; only what was under way is asked again."""
    path, rng = tmp_path / "killed.journal.jsonl", random.Random(0)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.test_judge"])
    server = JudgeServer(hard_steps, at_random(0.2, 0, ("429", "500", "cut")))  # that pass
    with server.serve() as url:
        kills = 0
        while kills < 10:
            process = context.Process(target=work, args=(url, path))
            process.start()
            until = server.requests + rng.randint(1, 14)
            while server.requests < until and process.is_alive():
                time.sleep(0.001)
            assert process.is_alive(), "it ended before it was killed"
            process.kill()
            process.join()
            kills += 1
        killed = go(settings(url, concurrency=8), problems(160), path)
        whole = go(settings(url, concurrency=8), problems(160), tmp_path / "whole.journal.jsonl")
    assert {k: r["snippets"] for k, r in killed.items()} == {k: r["snippets"] for k, r in whole.items()}
    assert set(killed) == set(whole) == {traces.key(problem) for problem in problems(160)}
    lines = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert len(lines) == len(set(lines)) == 160  # none is there twice
    assert server.good.total() <= 2 * 160 + 10 * 8


def test_a_full_disk_leaves_a_valid_file(tmp_path, monkeypatch):
    path = tmp_path / "a.journal.jsonl"
    with Journal(path) as journal:
        journal.append({"key": "1"})
        real = journal._file

        class Full:
            def write(self, data):
                real.write(bytes(data[:5]))
                raise OSError(errno.ENOSPC, "No space left on device")

            def __getattr__(self, name):
                return getattr(real, name)

        journal._file = Full()
        with pytest.raises(SrlibError, match="cannot be written .No space left on device.: its 1 records are whole"):
            journal.append({"key": "2"})
        journal._file = real
        journal.append({"key": "3"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["1", "3"]


def test_a_revoked_key_ends_the_run_and_the_rest_is_asked_later(tmp_path):
    server, asked, path = JudgeServer(hard_steps), problems(120), tmp_path / "a.journal.jsonl"

    def choose(trace):
        server.refuse = 401 if server.requests > 60 else 0
        return hard_steps(trace)

    server.choose = choose
    with server.serve() as url:
        with pytest.raises(SrlibError, match="does not take the key in TEST_KEY"):
            go(settings(url), asked, path)
        kept = len(path.read_text().splitlines())
        assert 0 < kept < 120
        server.refuse, server.choose = 0, hard_steps
        assert len(go(settings(url), asked, path)) == 120
    assert max(server.good.values()) == 1


def test_the_estimate_and_the_limit(tmp_path):
    encode = arith.tokenizer()

    def fifth(trace):
        size = len(trace) // 5
        return [trace[8 : 8 + size]]

    server = JudgeServer(fifth, count=lambda text: len(encode.encode(text)))
    asked = problems(200)
    with server.serve() as url:
        config = settings(url, price_in=1.0, price_out=1.0)
        expected = judge.estimate(asked, config, encode)
        go(config, asked, tmp_path / "a.journal.jsonl")
        counted = server.prompt_tokens + server.completion_tokens
        assert expected.prompt_tokens + expected.completion_tokens == pytest.approx(counted, rel=0.1)
        price = expected.cost(config.judge)
        with pytest.raises(SrlibError, match="more than annotate.judge.max_cost"):
            go(settings(url, price_in=1.0, max_cost=price / 4), asked, tmp_path / "b.journal.jsonl")
        before = server.requests
        cheap = settings(url, price_in=1.0, max_cost=price / 4)
        with Journal(tmp_path / "c.journal.jsonl") as journal:
            with pytest.raises(SrlibError, match="is reached"):
                judge.ask(judge.Endpoint(cheap.judge), asked, cheap, journal, judge.Usage())
            assert len(journal.records) == server.requests - before <= 200 / 4 + 2 * 16


def test_a_journal_is_whole_and_one_process_has_it(tmp_path):
    path = tmp_path / "a.journal.jsonl"
    with Journal(path) as journal:
        journal.append({"key": "1"}, {"key": "2"})
        with pytest.raises(SrlibError, match="Another process"):
            Journal(path)
    with path.open("a") as file:
        file.write('{"key": "3", "sni')  # torn
    with Journal(path) as journal:
        assert list(journal.records) == ["1", "2"]
        journal.append({"key": "3"})
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["1", "2", "3"]


def test_alignment():
    text = r"So \(x = \frac{1}{2}\), and hence 3 * 14 = 42 in all. Again 3 * 14 = 42."
    found = align([r"X = \frac {1} {2}", "and henc 3 * 14 = 4", "so 5 = 7"], text)
    assert text[slice(*found[0][1:3])] == r"x = \frac{1}{2}"
    assert text[slice(*found[1][1:3])] == "and hence 3 * 14 = 42" and found[1].score < 1  # no end within a number
    assert found[2] is None
    twice = align(["3 * 14 = 42", "3 * 14 = 42"], text)
    assert [m.start for m in twice] == [m.start() for m in re.finditer(r"3 \* 14", text)]
