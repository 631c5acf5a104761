"""The section `annotate.judge`: what is on the wire, how much is under way, what it costs."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from srlib import SrlibError, engine
from srlib.annotation import annotators, batch, endpoint, judge
from srlib.params import ModelSpec, Params
from tests.judge_server import JudgeServer, hard_steps
from tests.purposes import Case, shows
from tests.purposes.annotate import worked

LOCAL = "annotate.judge.local"


def judged(case: Case, server: JudgeServer, value: Any, n: int = 1, **judge: Any) -> dict[str, Any]:
    """The report of a run in which a judge at `server` is asked about `n` traces."""
    with case.fixture("monkeypatch").context() as patch, server.serve() as url:
        patch.setenv("OPENAI_API_KEY", "its-own-key")
        given = {"model": "judge", "base_url": url, **judge}
        p = settings(case, value, given)
        return annotators.run(p, case.folder, worked(n), *case.fixture("engines"))[1]


def settings(case: Case, value: Any, judge: dict[str, Any]) -> Params:
    return case.params({"annotate.method": "judge", "annotate.judge": judge, case.key: value})


def bodies(case: Case, value: Any, faults: int = 0, **judge: Any) -> list[dict[str, Any]]:
    """The requests about one trace, of which the first `faults` are answered with nothing."""
    server = JudgeServer(hard_steps, lambda _, n: "empty" if n < faults else None)
    judged(case, server, value, **judge)
    ((_, asked),) = server.bodies.items()
    return asked


@shows("annotate.judge.model")
def the_name_of_the_model(case: Case) -> None:
    assert bodies(case, "the-best")[0]["model"] == "the-best"


@shows("annotate.judge.base_url")
def the_address(case: Case) -> None:
    other, server = JudgeServer(hard_steps), JudgeServer(hard_steps)
    with case.fixture("monkeypatch").context() as patch, other.serve() as elsewhere, server.serve() as url:
        patch.setenv("OPENAI_BASE_URL", elsewhere)
        patch.setenv("OPENAI_API_KEY", "its-own-key")
        p = settings(case, url, {"model": "judge"})
        annotators.run(p, case.folder, worked(1), *case.fixture("engines"))
    assert (server.requests, other.requests) == (1, 0)


@shows("annotate.judge.key")
def the_key(case: Case) -> None:
    server = JudgeServer(hard_steps)
    case.fixture("monkeypatch").setenv("ANOTHER_KEY", "another")
    judged(case, server, "ANOTHER_KEY")
    assert [headers["Authorization"] for headers in server.headers] == ["Bearer another"]


@shows("annotate.judge.temperatures")
def the_temperatures(case: Case) -> None:
    sent = bodies(case, [0.2, None, 0.9], faults=2)
    assert [body.get("temperature") for body in sent] == [0.2, None, 0.9]


@shows("annotate.judge.max_tokens")
def the_longest_answer(case: Case) -> None:
    assert [body["max_tokens"] for body in bodies(case, 99)] == [99]


@shows("annotate.judge.max_tokens_retry")
def the_longest_after_a_bad_one(case: Case) -> None:
    assert [body["max_tokens"] for body in bodies(case, 9999, faults=2)] == [8192, 9999, 9999]


@shows("annotate.judge.limit_by")
def what_the_limit_is_called(case: Case) -> None:
    (body,) = bodies(case, "max_completion_tokens")
    assert body.get("max_completion_tokens") == 8192 and "max_tokens" not in body


@shows("annotate.judge.extra_body")
def more_of_a_request(case: Case) -> None:
    assert bodies(case, {"reasoning_effort": "low"})[0].get("reasoning_effort") == "low"


@shows("annotate.judge.batch")
def all_in_one_file(case: Case) -> None:
    case.fixture("monkeypatch").setattr(batch, "POLL_S", 0.01)
    server = JudgeServer(hard_steps)
    judged(case, server, True, n=3)
    assert [len(file.splitlines()) for file in server.batches.files.values()] == [3, 3]  # asked, and answered
    assert len(server.batches.made) == 1


@shows("annotate.judge.concurrency")
def requests_under_way(case: Case) -> None:
    under_way: list[int] = []
    most = []

    def slow(trace: str) -> list[str]:
        under_way.append(1)
        until = time.monotonic() + 0.1
        while len(under_way) < 3 and time.monotonic() < until:
            time.sleep(0.005)
        most.append(len(under_way))
        under_way.pop()
        return hard_steps(trace)

    judged(case, JudgeServer(slow), 2, n=4)
    assert max(most) == 2


@shows("annotate.judge.requests_per_minute")
def the_rate(case: Case) -> None:
    slept: list[float] = []
    clock = SimpleNamespace(monotonic=lambda: 0.0, sleep=slept.append)  # one that stands still
    case.fixture("monkeypatch").setattr(endpoint, "time", clock)
    judged(case, JudgeServer(hard_steps), 120, n=4)
    assert sorted(slept) == [0.0, 0.5, 1.0, 1.5]


@shows("annotate.judge.retries")
def how_often_what_passes_is_met(case: Case) -> None:
    server = JudgeServer(hard_steps, lambda _, n: "429" if n < 3 else None)
    with pytest.raises(SrlibError, match="gave no answer on 1 of 1 traces"):
        judged(case, server, 1)
    assert server.requests == 2


@shows("annotate.judge.timeout_s")
def how_long_a_server_may_be_silent(case: Case) -> None:
    sent: list[dict[str, Any]] = []
    real = endpoint.Endpoint._sending

    def sending(self: endpoint.Endpoint, request: Any) -> None:
        sent.append(request.extensions["timeout"])
        real(self, request)

    case.fixture("monkeypatch").setattr(endpoint.Endpoint, "_sending", sending)
    judged(case, JudgeServer(hard_steps), 7.5)
    assert [timeout["read"] for timeout in sent] == [7.5]


def cost(case: Case, price: float, **judge: Any) -> float:
    """Of a request of 1,000 tokens, 600 of them in the cache, and an answer of 100."""
    usage = {"prompt_tokens": 1000, "completion_tokens": 100, "prompt_tokens_details": {"cached_tokens": 600}}
    choice = {"message": {"content": f"```\n{hard_steps(worked(1)[0].worked)[0]}\n```"}, "finish_reason": "stop"}
    server = JudgeServer(hard_steps, lambda *_: (200, {"choices": [choice], "usage": usage}))
    return judged(case, server, price, **judge)["cost"]


@shows("annotate.judge.price_in")
def of_what_is_read(case: Case) -> None:
    assert cost(case, 5.0) == pytest.approx(1000 * 5e-6)


@shows("annotate.judge.price_cached")
def of_what_was_read_before(case: Case) -> None:
    assert cost(case, 0.5, price_in=5.0) == pytest.approx(400 * 5e-6 + 600 * 0.5e-6)


@shows("annotate.judge.price_out")
def of_what_is_written(case: Case) -> None:
    assert cost(case, 20.0) == pytest.approx(100 * 20e-6)


@shows("annotate.judge.max_cost")
def the_most_a_run_may_cost(case: Case) -> None:
    server = JudgeServer(hard_steps)
    with pytest.raises(SrlibError, match="more than annotate.judge.max_cost = 1e-09"):
        judged(case, server, 1e-9, price_in=1.0)
    assert server.requests == 0


VLLM = {"url": "http://127.0.0.1:1", "kv_cache_gb": 3.0, "tensor_parallel": 2, "pipeline_parallel": 2}
OTHERS = {
    "path": "another",
    "revision": "v2",
    "adapter": "an/adapter",
    "merge": False,
    "template": {"quick": True},
    "system": "Be brief.",
    "engine": "vllm",
    "process": True,
    "device": "cuda:1",
    "dtype": "float16",
    "quantization": "nf4",
    "context": 512,
    **VLLM,
    "ray": True,
    "eager": True,
}


@shows(*(f"{LOCAL}.{setting}" for setting in ModelSpec.model_fields))
def a_judge_here_is_loaded_as_it_is_set(case: Case) -> None:
    """What each does to a model that is loaded, the section `pair` shows."""
    setting = case.key.removeprefix(f"{LOCAL}.")
    loaded: list[ModelSpec] = []
    case.fixture("monkeypatch").setattr(engine, "load", lambda spec, slots: loaded.append(spec))
    vllm = {"engine": "vllm"} if setting in VLLM or setting in ("ray", "eager") else {}
    p = case.params({"annotate.method": "judge", LOCAL: {"path": "judge", **vllm}, case.key: OTHERS[setting]})
    judge.chosen(p, None)
    assert [getattr(spec, setting) for spec in loaded] == [OTHERS[setting]]
