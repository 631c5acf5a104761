"""How a judge's answer is read, whatever it is, and what it is asked with."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srlib import SrlibError
from srlib.annotation import judge, traces
from srlib.annotation.answers import Usage, answer_of, read
from srlib.data.rows import Problem
from srlib.engine.transformers import TransformersEngine
from srlib.params import Judge, load, reference
from tests.conftest import random_model
from tests.judge_server import JudgeServer, hard_steps
from tests.test_judge import go, key, problems, settings  # noqa: F401 (a fixture)

TRACE = "<think>\nWe add 12 and 30, so 42.\nThen 42 * 7 = 294.\n</think>\n\nThe answer is 294 in all."
ENDS_A_THOUGHT = "Then 42 * 7 = 294.\n</think>\n\nThe answer"
PASSAGES = ["We add 12 and 30, so 42.", ENDS_A_THOUGHT, "is 294 in all."]


def fenced(*passages, fence="```", language="", line="\n"):
    return line.join(f"{fence}{language}{line}{p.replace(chr(10), line)}{line}{fence}" for p in passages)


@pytest.mark.parametrize(
    ("answer", "expected"),
    {
        "as asked": (fenced(*PASSAGES), PASSAGES),
        "CRLF": (fenced(*PASSAGES, line="\r\n"), PASSAGES),
        "longer fences": (fenced(*PASSAGES, fence="`````"), PASSAGES),
        "a language": (fenced(*PASSAGES, language="latex"), PASSAGES),
        "fences in a passage": (fenced("a\n```python\nx\n```", fence="````") + fenced(TRACE), ["a\n```python\nx\n```"]),
        "indented": ("  " + fenced(PASSAGES[0]).replace("\n", "\n  "), PASSAGES[:1]),
        "a thought": (f"<think>\nWhich?\n</think>\n{fenced(*PASSAGES)}", PASSAGES),
        "a thought with fences": (f"<think>\n{fenced('a draft')}\n</think>\n{fenced(*PASSAGES)}", PASSAGES),
        "a thought that the prompt began": (f"{fenced('a draft')}\nno.</think>\n{fenced(*PASSAGES)}", PASSAGES),
        "a thought that leaves a fence open": (f"<think>\n```\na draft\n</think>\n{fenced(*PASSAGES)}", PASSAGES),
        "two thoughts": (f"a</think>{fenced('x')}\nb\n</think>\n{fenced(*PASSAGES)}", PASSAGES),
        "an end of thought behind it all": (f"{fenced(*PASSAGES)}\n</think>", PASSAGES),
        "the last fence left open": (fenced(*PASSAGES).removesuffix("\n```"), PASSAGES),
    }.values(),
    ids=lambda value: None,
)
def test_passages(answer, expected):
    found, reason = read(answer, TRACE + "a\n```python\nx\n```", 0.85)
    if expected == ["a\n```python\nx\n```"]:
        assert found[0] == expected[0]
    else:
        assert [p.strip() for p in found] == [p.strip() for p in expected]
    assert bool(found) != bool(reason)


@given(st.lists(st.sampled_from([*PASSAGES, "</think>", "<think>", "```x"]), min_size=1, max_size=4), st.integers(3, 6))
def test_whatever_a_passage_quotes_it_is_found(passages, length):
    """A thought with fences or none before it changes nothing."""
    fences = fenced(*passages, PASSAGES[0], fence="`" * length)
    for thought in ("", "<think>\nhm\n</think>\n", f"<think>\n{fenced('hm')}\n</think>\n\n"):
        assert read(thought + fences, TRACE, 0.85)[0] == [*passages, PASSAGES[0]]


def completion(content="", **choice):
    message = {"role": "assistant", "content": content}
    return {"choices": [{"message": message, "finish_reason": "stop", **choice}], "usage": {"prompt_tokens": 3}}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "thinking", "thinking": [{"type": "text", "text": "x"}]}, {"type": "text", "text": "a"}], "a"),
        ([{"type": "text", "text": "a"}, "b", {"text": "c"}, {"type": "output_text", "text": "d"}], "abcd"),
        ([{"type": "reasoning", "text": "x"}, {"type": "image_url"}], ""),
        ([], ""),
        (None, ""),
    ],
)
def test_content(content, text):
    answer = answer_of(completion(content), 16)
    assert (answer.text, answer.fault, answer.usage.prompt_tokens) == (text, "", 3)


@pytest.mark.parametrize("content", [5, True, {"text": "a"}, [5], [{"type": "text"}], [{"type": "text", "text": 1}]])
def test_content_that_is_none(content):
    assert answer_of(completion(content), 16).fault == "malformed answer"


@pytest.mark.parametrize(
    ("choice", "fault"),
    [
        ({"finish_reason": "length"}, "cut at 16 tokens"),
        ({"finish_reason": "max_tokens"}, "cut at 16 tokens"),
        ({"finish_reason": None}, "cut at 16 tokens"),  # a fence is open
        ({"finish_reason": "content_filter"}, "withheld by the server's content filter"),
        ({"finish_reason": "error"}, "malformed answer"),
        ({"finish_reason": "insufficient_system_resource"}, "malformed answer"),
        ({"finish_reason": ["stop"]}, ""),
        ({"message": None}, "malformed answer"),
        ({"message": "text"}, "malformed answer"),
        ({"message": {}}, ""),  # which is an empty answer
    ],
)
def test_how_an_answer_ends(choice, fault):
    assert answer_of(completion("```\na\n```\n```\nb", **choice), 16).fault == fault


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(json_values, json_values, json_values, json_values)
def test_no_field_is_trusted_to_have_its_type(one, two, three, four):
    for body in (
        one,
        {"choices": one, "usage": two},
        {"choices": [one, two], "usage": {"prompt_tokens": three, "prompt_tokens_details": four}},
        {"choices": [{"message": one, "finish_reason": two}], "usage": {"completion_tokens": three}},
        completion(one) | {"usage": {"prompt_tokens": two, "prompt_tokens_details": {"cached_tokens": three}}},
    ):
        answer = answer_of(body, 16)
        found, reason = read(answer.text, TRACE, 0.85)
        assert isinstance(answer.text, str) and bool(found) != bool(reason)
        assert all(isinstance(n, int) and n >= 0 for n in vars(answer.usage).values())


WRONG = [None, [], "text", {"choices": None}, {"choices": {}}, {"choices": [None]}, {"choices": [{"message": 3}]}]


@pytest.mark.parametrize("body", WRONG)
def test_a_wrong_answer_is_asked_for_again(tmp_path, body):
    asked = problems(3)
    server = JudgeServer(hard_steps, lambda trace, n: (200, body) if trace == asked[1].trace and n == 0 else None)
    with server.serve() as url:
        records = go(settings(url), asked, tmp_path / "a.journal.jsonl")
    assert all(record["snippets"] for record in records.values())
    assert records[traces.key(asked[1])]["requests"] == 2


def test_an_answer_that_is_cut_is_asked_for_with_more_room(tmp_path):
    asked, path = problems(3), tmp_path / "a.journal.jsonl"
    cut = {"message": {"content": fenced(asked[0].trace[:9], asked[0].trace[9:])[:-4]}, "finish_reason": "length"}
    server = JudgeServer(hard_steps)
    server.fault = lambda trace, n: cut if trace == asked[0].trace else None
    with server.serve() as url:
        records = go(settings(url, max_tokens=100), asked, path)
        assert records[traces.key(asked[0])]["reason"] == "cut at 100 tokens"
        assert [body["max_tokens"] for body in server.bodies[asked[0].trace]] == [100] * 3
        before = server.requests
        go(settings(url, max_tokens=100), asked, path)
        assert server.requests == before
        server.fault = lambda trace, n: cut if trace == asked[0].trace and n == 3 else None
        records = go(settings(url, max_tokens=100, max_tokens_retry=400), asked, path)
    assert records[traces.key(asked[0])]["snippets"] == hard_steps(asked[0].trace)
    assert [body["max_tokens"] for body in server.bodies[asked[0].trace]] == [100] * 4 + [400]
    assert server.requests == before + 2  # the others stand


def test_settings_of_models_that_reason(tmp_path):
    server = JudgeServer(hard_steps, lambda trace, n: "empty" if n == 0 else None)
    changed = {"limit_by": "max_completion_tokens", "temperatures": [None, 0.5], "max_tokens": 99}
    changed["extra_body"] = {"reasoning_effort": "low", "thinking": {"type": "enabled"}}
    with server.serve() as url:
        go(settings(url, **changed), problems(2), tmp_path / "a.journal.jsonl")
    for first, second in server.bodies.values():
        assert first.keys() == {"model", "messages", "max_completion_tokens", *changed["extra_body"]}
        assert second == first | {"temperature": 0.5}
        assert first["max_completion_tokens"] == 99 and first["thinking"] == {"type": "enabled"}


def test_cached_tokens_have_a_price(tmp_path):
    usage = Usage(1, 1_000_000, 100_000, 400_000)
    prices = {"price_in": 2.0, "price_out": 10.0}
    assert usage.cost(Judge(**prices)) == pytest.approx(2 + 1)
    assert usage.cost(Judge(**prices, price_cached=0.5)) == pytest.approx(0.6 * 2 + 0.4 * 0.5 + 1)
    body = completion("```\na\n```") | {"usage": {"prompt_tokens": 10, "prompt_tokens_details": {"cached_tokens": 8}}}
    server = JudgeServer(hard_steps, lambda trace, n: (200, body) if n < 2 else None)
    with server.serve() as url:
        (record,) = go(settings(url), problems(1), tmp_path / "a.journal.jsonl").values()
    assert record["requests"] == 3 and record["cached_tokens"] == 16 < record["prompt_tokens"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"extra_body": {"stream": True}}, "extra_body holds stream"),
        ({"extra_body": {"max_tokens": 3}}, "extra_body holds max_tokens"),
        ({"max_tokens": 64, "max_tokens_retry": 32}, "max_tokens_retry 32 is below max_tokens 64"),
        ({"max_tokens_retry": 9000, "temperatures": [0.0]}, "max_tokens_retry needs a second of temperatures"),
        ({"local": {"path": "x"}, "temperatures": [None]}, "need a server"),
        ({"local": {"path": "x"}, "batch": True}, "need a server"),
        ({"local": {"path": "x"}, "extra_body": {"a": 1}}, "need a server"),
        ({"price_cached": -1}, "greater than or equal to 0"),
    ],
)
def test_settings_that_do_not_go_together(wrong, told):
    with pytest.raises(SrlibError, match=told):
        load("params/smoke.yaml", annotate={"method": "judge", "judge": {"model": "m", **wrong}})


def test_numbers_in_extra_body_are_numbers(tmp_path):
    """As they stand in a file, and so they are sent."""
    (tmp_path / "x.yaml").write_text(
        "run: x\nannotate: {judge: {model: m, extra_body: {top_k: 20, min_p: 0.5, a: {b: [1, on, null, 0131]}}}}"
    )
    config = load(tmp_path / "x.yaml").annotate.judge
    body = json.loads(json.dumps(judge.Endpoint(config.model_copy(update={"key": None})).body("?", 0)))
    assert {"top_k": 20, "min_p": 0.5}.items() <= body.items() and body["a"]["b"][0] == 1


def test_the_reference_says_what_extra_body_holds():
    assert "mapping of names to" in reference.table("annotate.judge.extra_body")


def test_half_a_character_in_an_answer_is_kept(tmp_path):
    asked, path = problems(1), tmp_path / "a.journal.jsonl"
    server = JudgeServer(lambda trace: [*hard_steps(trace), "\ud83d"])  # which JSON writes as an escape
    with server.serve() as url:
        (record,) = go(settings(url), asked, path).values()
        assert record["snippets"][-1] == "\ud83d"
        assert go(settings(url), asked, path) == {record["key"]: record}
    assert server.requests == 1


def test_an_answer_of_a_local_model_that_is_cut(tokenizer):
    """A model with random weights writes until its room ends; the second time it has more."""
    model = random_model(len(tokenizer), 0, context=4096)
    asked = [Problem(id="a", prompt="1+1?", answer="2", trace="1+1=2;")]
    config = settings(None, max_tokens=16, max_tokens_retry=32, temperatures=[0.0, 0.0])
    local = judge.Local(config.judge, TransformersEngine(model, tokenizer, slots=1), 1)
    (verdict,) = local.judge(asked, config)
    assert verdict.reason == "cut at 32 tokens" and verdict.usage.completion_tokens == 16 + 32


def test_a_local_model_that_is_asked_again_draws_anew(tokenizer, monkeypatch):
    model = random_model(len(tokenizer), 0, context=4096)
    asked = [Problem(id="a", prompt="1+1?", answer="2", trace="1+1=2;")]
    config = settings(None, max_tokens=16, temperatures=[1.0, 1.0, 1.0])
    written = []

    def judged(verdict, answer, config):
        written.append(answer.text)
        verdict.reason = "bad"

    monkeypatch.setattr(judge, "judged", judged)
    list(judge.Local(config.judge, TransformersEngine(model, tokenizer, slots=1), 1).judge(asked, config))
    assert len(set(written)) == len(written) == 3
