"""Whose a fault is: first, in the middle and last, then mended; every trace is judged once, and none is lost."""

import base64
import json
import re
from collections import Counter
from urllib.parse import quote

import pytest

from srlib import SrlibError
from srlib.annotation import judge, traces
from srlib.annotation.endpoint import PROBE
from srlib.data.journal import Journal
from srlib.params import Params, load
from srlib.params.secrets import masked
from tests.judge_server import JudgeServer, hard_steps
from tests.test_judge import go, problems, settings

KEY = 'k-7f"3a/b\\c&%e+0d1'  # of a server; every way of quoting writes it in another way
ECHO = f"Incorrect key: {KEY}, {quote(KEY, safe='')}, {json.dumps(KEY)}"


def error(status, message, **fields):
    return status, {"error": {"message": f"{message} {ECHO}", **fields}}


# What ends the run at once; what passes; what the trace is to blame for.
ENDS = {
    "account: 402": error(402, "Insufficient Balance"),
    "account: quota": error(429, "You exceeded your current quota", code="insufficient_quota"),
    "account: as a 400": error(400, "Your credit balance is too low to access the API", type="invalid_request_error"),
    "account: in words nobody knows": error(400, "La banque dit non"),
    "key: 401": error(401, "Incorrect API key provided"),
    "key: 403": error(403, "Country not supported"),
    "request: parameter": error(400, "Unsupported parameter: 'max_tokens'", code="unsupported_parameter"),
    "request: value": error(400, "Only the default (1) is supported", param="temperature", code="unsupported_value"),
    "request: FastAPI": (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "max_tokens"], "msg": ECHO}]}),
    "request: room": error(400, "max_tokens is too large: 8192. This model supports at most 4096 completion tokens"),
    "request: model": error(404, "The model `judge` does not exist", code="model_not_found"),
    "request: method": error(405, "Method Not Allowed"),
    "request: a page of HTML": "not json",
    "request: no completion": (200, {"status": "ok", "hint": ECHO}),
    "account: an error as if it were an answer": (200, {"error": {"code": 402, "message": ECHO}}),
}
PASSES = {
    "server: 503": error(503, "no healthy upstream"),
    "server: 500": error(500, "Internal"),
    "server: 529": error(529, "Overloaded"),
    "server: rate": error(429, "Rate limit reached", code="rate_limit_exceeded"),
    "server: 408": error(408, "time"),
    "server: 425": error(425, "early"),
    "server: an error as if it were an answer": (200, {"error": {"code": 502, "message": ECHO}}),
    "network: reset": "reset",
    "network: cut": "cut",
    "network: down": "down",  # and refused from then on
}
OF_THE_TRACE = {
    "too long": error(400, "This model's maximum context length is 8192 tokens", code="context_length_exceeded"),
    "too long, vLLM": error(
        400, "maximum context length is 10 tokens; you requested 12", type="BadRequestError", code=400
    ),
    "too long, 413": error(413, "Payload Too Large"),
    "too long, Anthropic": error(400, "prompt is too long: 210000 tokens > 200000 maximum"),
    "flagged": error(403, "Your input was flagged by the moderation"),
    "filtered": error(400, "The prompt triggered the content management policy", code="content_filter"),
    "in words nobody knows": error(400, "Content Oddity"),
}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)


def no_secret(*texts):
    """No form of the key, nor half of it, is in any of the texts."""
    for text in map(str, texts):
        assert not re.search(re.escape(KEY[:6]), text), text
        assert masked(text, KEY) == text


def run(url, path, n=12, **changed):
    """The sentence a run ends with, and the traces the journal has."""
    try:
        go(settings(url, **{"concurrency": 1, "retries": 0} | changed), problems(n), path)
        told = ""
    except SrlibError as fault:
        told = str(fault)
        assert fault.__cause__ is None
    text = path.read_text()
    no_secret(told, text)
    kept = [json.loads(line)["key"] for line in text.splitlines()]
    assert len(kept) == len(set(kept))  # none twice
    return told, kept


@pytest.mark.parametrize("at", [0, 6, 11], ids=["first", "middle", "last"])
@pytest.mark.parametrize("fault", [pytest.param(f, id=name) for name, f in (ENDS | PASSES).items()])
def test_a_fault_of_others_loses_no_trace(tmp_path, fault, at, capsys):
    """From the trace `at` on nothing is answered; then it is mended."""
    path, names = tmp_path / "a.journal.jsonl", [problem.trace for problem in problems(12)]
    server = JudgeServer(hard_steps)
    server.fault = lambda trace, n: fault if len(server.good) >= at else None
    with server.serve() as url:
        told, kept = run(url, path)
        assert kept == [traces.key(problem) for problem in problems(at)]
        if fault in PASSES.values():
            assert "run again" in told and (names[at] in server.asked)
            if fault != "down" and at > 4:  # all that is left, by name
                assert f"gave no answer on {12 - at} of 12 traces: " in told
                assert ", ".join(problem.id for problem in problems(12)[at:]) in told
        else:
            assert "mend it, and run again" in told
            assert {*server.asked} <= {*names[: at + 1], PROBE.trace}  # it stops at the first
    before, server.fault = Counter(server.asked), lambda trace, n: None
    with server.serve(int(url.split(":")[2].split("/")[0])) as url:
        told, kept = run(url, path)
    assert not told and sorted(kept) == sorted(traces.key(problem) for problem in problems(12))
    del server.good[PROBE.trace]
    assert server.good == Counter(names)  # each was judged once
    assert all(server.asked[name] == before[name] for name in names[:at])  # what was answered is not asked again
    no_secret(*capsys.readouterr())


SOME = ("account: 402", "account: in words nobody knows", "request: a page of HTML", "server: 503", "network: reset")


@pytest.mark.parametrize("fault", [pytest.param((ENDS | PASSES)[name], id=name) for name in SOME])
def test_many_at_once(tmp_path, fault):
    """Sixteen requests are under way when it begins; those that were answered are kept, and no others."""
    path, asked = tmp_path / "a.journal.jsonl", problems(48)
    server = JudgeServer(hard_steps)
    server.fault = lambda trace, n: fault if server.good.total() >= 20 else None
    with server.serve() as url:
        told, kept = run(url, path, 48, concurrency=16)
        good = {problem.trace for problem in asked if traces.key(problem) in kept}
        assert told and good == {*server.good} - {PROBE.trace}
        server.fault = lambda trace, n: None
        told, kept = run(url, path, 48, concurrency=16)
    assert not told and len(kept) == 48
    assert max(server.good[problem.trace] for problem in asked) == 1


@pytest.mark.parametrize("at", [0, 6, 11], ids=["first", "middle", "last"])
@pytest.mark.parametrize("fault", [pytest.param(f, id=name) for name, f in OF_THE_TRACE.items()])
def test_a_fault_of_the_trace_is_a_verdict(tmp_path, fault, at):
    path, asked = tmp_path / "a.journal.jsonl", problems(12)
    server = JudgeServer(hard_steps, lambda trace, n: fault if trace == asked[at].trace else None)
    with server.serve() as url:
        told, kept = run(url, path)
        assert not told and len(kept) == 12
        assert sum(bool(json.loads(line)["reason"]) for line in path.read_text().splitlines()) == 1
        before = server.requests
        assert run(url, path) == ("", kept)
    assert server.requests == before  # nor is it asked again


def test_what_refuses_a_short_trace_too_does_not_refuse_the_trace(tmp_path):
    """A limit that no request keeps, told as if each trace were too long: nothing is written down."""
    server = JudgeServer(hard_steps, lambda trace, n: OF_THE_TRACE["too long"])
    with server.serve() as url:
        told, kept = run(url, tmp_path / "a.journal.jsonl")
    assert "finds it too long" in told and "mend it" in told and not kept
    assert server.asked == {problems(1)[0].trace: 1, PROBE.trace: 1}


def test_a_refusal_that_passes_by_itself(tmp_path):
    """A 400 to the first eight requests, in words nobody knows, sixteen at a time: all are judged."""
    path, server = tmp_path / "a.journal.jsonl", JudgeServer(hard_steps)
    server.fault = lambda trace, n: OF_THE_TRACE["in words nobody knows"] if server.requests < 8 else None
    with server.serve() as url:
        told, kept = run(url, path, 16, concurrency=16)
        while told:  # the short one may have been refused as well
            assert "run again" in told
            told, kept = run(url, path, 16, concurrency=16)
    assert len(kept) == 16 and '"reason": "the' not in path.read_text()


def test_a_server_that_is_down_is_not_asked_on(tmp_path):
    server = JudgeServer(hard_steps, lambda trace, n: PASSES["server: 503"])
    with server.serve() as url:
        told, kept = run(url, tmp_path / "a.journal.jsonl", 40)
    assert f"has failed on {judge.HOPELESS} traces in a row (status 503, no healthy upstream" in told
    assert not kept and server.requests <= judge.HOPELESS + 1


def test_journals_of_older_versions(tmp_path):
    """What a fault of others left there is asked again, and what was judged is not."""
    path, asked, server = tmp_path / "a.journal.jsonl", problems(6), JudgeServer(hard_steps)
    used = {"requests": 1, "prompt_tokens": 9, "completion_tokens": 9}
    kept = [
        {"snippets": [], "reason": "refused: Insufficient Balance", **used},
        {"snippets": [], "reason": "server: Error code: 503", **used},
        {"snippets": [], "reason": "malformed answer", **used, "requests": 0},  # the key could not be sent
        {"snippets": [], "reason": "no passage between fences", **used},
        {"snippets": ["1+1=2"], "reason": "", **used},
    ]
    with Journal(path) as journal:
        journal.append(*({"key": traces.key(problem), **record} for problem, record in zip(asked, kept)))
    with server.serve() as url:
        records = go(settings(url), asked, path)
    assert set(server.asked) == {asked[i].trace for i in (0, 1, 2, 5)}
    assert [bool(records[traces.key(problem)]["reason"]) for problem in asked] == [False] * 3 + [True] + [False] * 2


@pytest.mark.parametrize(
    "wrong", ["schlüssel-0123456789", "sk-0123456789\n", "sk-01234 56789", "“sk-0123456789”", "\x7f"]
)
def test_a_key_that_no_header_holds_is_told_before_a_request(tmp_path, monkeypatch, wrong):
    monkeypatch.setenv("TEST_KEY", wrong)
    server = JudgeServer(hard_steps)
    with (
        server.serve() as url,
        pytest.raises(SrlibError, match="in the environment variable TEST_KEY cannot be") as told,
    ):
        go(settings(url), problems(16), tmp_path / "a.journal.jsonl")
    assert not server.requests and not server.headers and wrong.strip() not in str(told.value)


@pytest.mark.parametrize(
    "address",
    [
        "https://127.0.0.1:{port}/v1",
        "http://127.0.0.1:1/v1",
        "http://no-such-host.invalid/v1",
        "http://127.0.0.1:{port}",
    ],
    ids=["TLS", "refused", "name", "path"],
)
def test_an_address_where_no_judge_is(tmp_path, address):
    server = JudgeServer(hard_steps)
    server.refuse = 404
    with server.serve() as url:
        port = re.search(r":(\d+)/", url)[1]
        told, kept = run(address.format(port=port), tmp_path / "a.journal.jsonl")
    assert "mend it, and run again" in told and not kept and "Traceback" not in told


@pytest.mark.parametrize("value", ["http://u:{k}@h/v1", "u:{k}@h/v1", "http://h:{k}@x@y/v1", "http://h/v1?api_key={k}"])
def test_a_secret_in_an_address_is_refused_and_not_repeated(value, monkeypatch):
    url = value.format(k="s3cr3t-w0rd")
    for name in ("annotate.judge.base_url", "pair.big.url", "grpo.vllm_url"):
        for given in (url, [url], {url: 1}):
            with pytest.raises(SrlibError) as told:
                load("params/smoke.yaml", **{name: given})
            assert "s3cr3t" not in str(told.value)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with pytest.raises(SrlibError, match="environment variable OPENAI_BASE_URL: ") as told:
        judge.Endpoint(settings(None).judge)
    assert "s3cr3t" not in str(told.value)


@pytest.mark.parametrize(
    "url", ["ftp://h/v1", "h/v1", "http://", "http://h:99999/v1", "http://[::1/v1", "http://h /v1", ""]
)
def test_an_address_that_is_none(url):
    with pytest.raises(SrlibError, match=r"annotate.judge.base_url: '.*' is no address such as https://"):
        load("params/smoke.yaml", **{"annotate.judge.base_url": url})


def test_a_key_in_the_params_is_refused_and_not_repeated():
    for key in ("sk-0123456789", ["sk-0123456789"], 123456789):
        with pytest.raises(SrlibError, match="annotate.judge.key: this is not the name of an environment") as told:
            load("params/smoke.yaml", **{"annotate.judge.key": key})
        assert "123456789" not in str(told.value)
    assert Params(run="x", annotate={"judge": {"key": None}}).annotate.judge.key is None


def test_a_key_in_every_dress():
    dressed = [KEY, KEY.upper(), quote(KEY), json.dumps(KEY), json.dumps(json.dumps(KEY)), repr(KEY), f"a={KEY}&b"]
    dressed += [base64.b64encode(f"{before}{KEY}:x".encode()).decode() for before in ("", "u", "us", "use")]
    for text in dressed:
        found = masked(f"before {text} after", KEY)
        assert KEY[2:8].lower() not in found.lower() and found.startswith("before ") and found.endswith(" after")
        inner = base64.b64encode(KEY.encode()).decode()[4:12]
        assert inner not in found
    assert masked("what has no key in it", KEY) == "what has no key in it"


def test_an_answer_that_repeats_the_key_is_kept_without_it(tmp_path):
    server = JudgeServer(lambda trace: [*hard_steps(trace), KEY])
    with server.serve() as url:
        told, kept = run(url, tmp_path / "a.journal.jsonl", 3)
    assert not told and len(kept) == 3 and "[key]" in (tmp_path / "a.journal.jsonl").read_text()
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)
