"""Where worked traces come from, and the annotators that need no second opinion."""

from itertools import islice
from math import ceil, floor
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from srlib import SrlibError
from srlib.__main__ import main
from srlib.annotation import agreement, annotators, readings, traces
from srlib.annotation.alignment import cover, units
from srlib.data import arith, prompts, spans
from srlib.data.grade import verdict
from srlib.data.journal import Journal
from srlib.data.rows import Annotated, Problem, write_jsonl
from srlib.data.spans import Span
from srlib.engine import adapters, transformers
from srlib.params import Annotate, Arith, Offload, Params
from srlib.run import twins
from srlib.training import sft
from tests.test_translate import bytelevel, without, wrap


def test_the_first_right_generation_is_taken_and_the_rest_is_counted(tokenizer, tmp_path):
    generations = {"generations": ["no", "<bigmodel>yes</bigmodel>", "also"], "ok": [False, True, True]}
    right = {"uuid": "a", "problem": "1+1?", "answer": 2, **generations}
    rows = [
        right,
        right | {"uuid": "b", "ok": [False, False, False]},
        right | {"uuid": "c", "generations": None},
        right | {"uuid": "d", "answer": None},
        right | {"uuid": "e"},
    ]
    columns = {"id": "uuid", "prompt": "problem", "trace": "generations", "correct": "ok"}
    given = {"path": str(write_jsonl(tmp_path / "x.jsonl", rows)), "columns": columns}

    def gather(n, **source):
        p = Params(run="x", data={"traces": given | source}, annotate={"n_traces": n})
        return traces.gather(p, tmp_path, tokenizer)

    found, dropped = gather(2)
    assert sorted(problem.id for problem in found) == ["a", "e"]
    assert {(x.prompt, x.answer, x.trace) for x in found} == {("1+1?", "2", "yes")}
    assert dropped == {"no generation is marked right": 1, "no trace": 1, "no answer": 1}
    with pytest.raises(SrlibError, match=r"holds 2 traces that can be used \(1 dropped: .*\), fewer than the 3"):
        gather(3)
    with pytest.raises(SrlibError, match="has no column 'solution', but uuid, problem"):
        gather(2, columns={"prompt": "problem", "trace": "solution"})


def test_tags_that_a_set_has_either_way_they_close(tokenizer):
    texts = {
        "good": "1+2=<bigmodel>3</bigmodel>;3*4=<bigmodel>12<\\bigmodel>;",
        "open": "1+2=<bigmodel>3;",
        "stray": "1+2=3</bigmodel>;",
        "none": "1+2=3;",
    }
    asked = [Problem(id=name, prompt="?", answer="0", trace=text) for name, text in texts.items()]
    good, *bad = annotators.given(asked, Annotate(method="given"), tokenizer)
    assert good.trace == "1+2=3;3*4=12;" and good.spans == [Span(4, 5), Span(10, 12)]
    assert good.tagged.count(spans.CLOSE) == 2 and good.share == pytest.approx(3 / 13)
    assert bad == ["tags are unclosed", "tags are stray", "no span is marked"]


def test_the_controls(engines, pair, tokenizer):
    small, _ = engines
    asked = [Problem(id=str(i), prompt="3+4?", answer="7", trace=f"3+4=7;{i}*7=21;20-7=13;" * 3) for i in range(40)]
    config = Annotate(method="random", share=0.2, max_share=0.4, threshold=1.0, max_span_tokens=4, merge_gap=0)
    drawn = list(annotators.random(asked, config, tokenizer, seed=1))
    assert drawn == list(annotators.random(asked, config, tokenizer, seed=1))
    assert drawn != list(annotators.random(asked, config, tokenizer, seed=2))
    for row in drawn:
        marked = {i for span in row.spans for i in range(*span)}
        assert len(marked) == round(row.share * len(row.trace))
        for i in range(1, len(row.trace)):  # a number is marked as a whole
            assert not row.trace[i - 1 : i + 1].isdigit() or (i in marked) == (i - 1 in marked)
    words = [x.model_copy(update={"trace": "so a(b)=c;" * 9 + "e" * i}) for i, x in enumerate(asked)]
    for row in annotators.random(words, config, tokenizer, seed=1):  # the next token by lot
        assert row.share * len(row.trace) in (floor(0.2 * len(row.trace)), ceil(0.2 * len(row.trace)))
    unsure = list(annotators.entropy(small, asked[:3], config))
    assert all(row.spans for row in unsure)
    for row in unsure:
        ids = tokenizer.encode("3+4?") + tokenizer.encode(row.trace)
        with torch.no_grad():
            logprobs = pair[0](torch.tensor([ids])).logits[0, -len(row.trace) - 1 : -1].log_softmax(-1)
        exact = torch.special.entr(logprobs.exp()).sum(-1).tolist()
        marked = {i for span in row.spans for i in range(*span)}
        assert any(value > config.threshold for value in exact)
        for i in marked:  # itself unsure, or a digit of a number that is
            near = [j for j in range(i - 1, i + 2) if 0 <= j < len(exact) and (j == i or row.trace[j].isdigit())]
            assert max(exact[j] for j in near) > config.threshold


@pytest.fixture(scope="module")
def words():
    """A tokenizer of pieces of words, and of bytes where it knows none."""
    return wrap(bytelevel(without(set())))


@pytest.mark.parametrize("share", [0.05, 0.2, 0.3, 0.5])
@pytest.mark.parametrize("settings", [{}, {"max_span_tokens": 3, "merge_gap": 6}], ids=["", "near ones joined"])
def test_random_marks_the_share_that_is_asked_for(tokenizer, words, r1_traces, share, settings):
    config = Annotate(method="random", share=share, max_share=max(share, 0.3), **settings)
    short = list(islice(arith.generate(Arith(), "traces", 0), 400))
    long = [Problem(id=str(i), prompt="?", answer="0", trace=text) for i, text in enumerate(r1_traces)]
    for problems, encode in ((short, tokenizer), (long, words)):
        rows = list(annotators.random(problems, config, encode))
        assert fmean(row.share for row in rows) == pytest.approx(share, rel=0.05)
        for row in rows:
            offsets = encode(row.trace, return_offsets_mapping=True)["offset_mapping"]
            lengths = [b - a for a, b in (cover(span, offsets) for span in row.spans)]
            assert max(lengths, default=0) <= config.max_span_tokens
            assert sum(lengths) == pytest.approx(row.share * len(offsets))
            whole = [b - a for a, b in units(row.trace, offsets)]
            assert sum(lengths) < share * len(offsets) + max(whole, default=1)


def test_a_passage_longer_than_a_span_may_be_is_cut_into_some_that_touch(tokenizer):
    text = "<think>1+2=<bigmodel>3;3*45=135;</bigmodel>135-1=134;</think>"
    (row,) = annotators.given(
        [Problem(id="a", prompt="?", answer="0", trace=text)],
        Annotate(method="given", max_span_tokens=4, max_share=0.6),
        tokenizer,
    )
    assert row.tagged == (
        "<think>1+2=<bigmodel>3;3*</bigmodel><bigmodel>45=</bigmodel><bigmodel>135;</bigmodel>135-1=134;</think>"
    )
    assert spans.parse(row.tagged) == row.spans and not spans.faults(row.tagged)
    ids = tokenizer.encode(row.tagged, add_special_tokens=False)
    tags = spans.Tags.of(tokenizer)
    assert [b - a for a, b in spans.parse(ids, tags)] == [4, 3, 4] and not spans.faults(ids, tags)
    (few,) = annotators.given(
        [Problem(id="a", prompt="?", answer="0", trace=text)], Annotate(method="given", max_span_tokens=2), tokenizer
    )
    assert max(b - a for a, b in few.spans) == 2  # the longest number is cut, too
    assert few.share <= 0.3  # what is more than may be marked is left out


def test_agreement_on_a_case_worked_by_hand(tokenizer):
    row = Annotated(
        id="a", prompt="?", answer="0", trace="1+2=3;4+5=9;", spans=[Span(0, 4)], share=1 / 3, annotator="x"
    )
    found = agreement.agreement([row], {"a": [Span(2, 5)]}, tokenizer)
    # 12 tokens: 2 marked by both, 2 by the first alone, 1 by the second alone, 7 by neither
    assert found.f1 == pytest.approx(4 / 7) and (found.precision, found.recall) == (2 / 4, 2 / 3)
    chance = (4 * 3 + 8 * 9) / 144
    assert found.kappa == pytest.approx((9 / 12 - chance) / (1 - chance))


def test_a_long_trace_is_read_in_chunks(engines, prompts, monkeypatch):
    small, _ = engines
    asked = [ids * 6 for ids in prompts[:5]]
    whole, unsure = small.score(asked), small.doubts(asked)
    monkeypatch.setattr(transformers, "SCORE_TOKENS", 64)
    for one, other in zip(whole + unsure, small.score(asked) + small.doubts(asked)):
        assert one == pytest.approx(other, abs=1e-4)


def test_traces_that_the_big_model_writes_are_kept_if_right(engines, tmp_path, monkeypatch):
    _, big = engines
    asked = [Problem(id=str(i), prompt=f"{i}+4?", answer=str(i)) for i in range(6)]
    graded = []

    def verdict(text, problem, hint):  # an untrained model is never right: every third answer passes for right
        graded.append(problem)
        return type("Grade", (), {"correct": len(graded) % 3 == 0})

    monkeypatch.setattr(traces.grade, "verdict", verdict)
    config, offload = Annotate(tries=3, temperature=1.0), Offload(max_tokens=200, batch_size=4)
    with Journal(tmp_path / "w.journal.jsonl") as journal:
        written, dropped = traces.write(big, asked, config, offload, 0, journal)
        assert len(written) + dropped.total() == 6 and written and all(problem.trace for problem in written)
        before = len(graded)
        assert traces.write(big, asked, config, offload, 0, journal) == (written, dropped)
        assert len(graded) == before  # nothing is written twice


TEMPLATES = {
    "opens": "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}",
    "switched off": "[{{ messages[0].content }}]<think>\n\n</think>\n\n",
    "without": "[{{ messages[0].content }}]",
}


@pytest.fixture(params=TEMPLATES)
def templated(request):
    made = twins.trained()
    adapters.add_tags(made)
    made.chat_template = TEMPLATES[request.param]
    return made


def test_a_thought_is_opened_once(templated, tmp_path):
    """By the prompt or by the trace, in what is scored, learned and graded; with a line break or without."""
    opened = prompts.opening(templated)
    assert bool(opened) == (templated.chat_template == TEMPLATES["opens"])
    texts = ["<think>\n3+4=7;</think>\\boxed{7}", "<think>3+4=7;</think>\\boxed{7}", "3+4=7;</think>\\boxed{7}"]
    rows = [{"id": str(i), "prompt": "3+4?", "answer": "7", "trace": text} for i, text in enumerate(texts)]
    p = Params(run="x", data={"traces": str(write_jsonl(tmp_path / "x.jsonl", rows))}, annotate={"n_traces": 3})
    found, dropped = traces.gather(p, tmp_path, templated)
    assert not dropped and len(found) == 3
    for problem in found:
        given = texts[int(problem.id)]
        passage = readings.passages([problem], templated)[0].ids.tolist()
        row = Annotated(
            **problem.model_dump(include={"id", "prompt", "answer", "trace"}), spans=[], share=0, annotator="x"
        )
        learned = sft.example(templated, row)["input_ids"][:-1]
        own = row.model_copy(update={"trace": given})  # annotated traces of one's own come as they are
        assert sft.example(templated, own)["input_ids"][:-1] == learned == passage
        read = templated.decode(passage)
        assert read.count("<think>") == (2 if "off" in opened else 1) or templated.chat_template != TEMPLATES["opens"]
        assert read.endswith(given.removeprefix("<think>").lstrip("\n"))
        asked = templated.apply_chat_template(
            [{"role": "user", "content": "3+4?"}], add_generation_prompt=True, tokenize=False
        )
        assert read.startswith(asked)
        assert prompts.with_opening(templated, problem.worked).startswith("<think>") == (
            bool(opened) or "<think>" in given
        )


def test_a_thought_that_the_prompt_opened_is_still_open_where_it_was_cut(templated):
    cut = "Maybe \\boxed{7}? Wait, no"
    problem = Problem(id="0", prompt="3+4?", answer="7")
    graded = verdict(prompts.with_opening(templated, cut), problem)
    assert graded.correct == (not prompts.opening(templated))
    assert graded.reason == ("still thinking" if prompts.opening(templated) else "same text")


def test_two_models_are_asked_with_prompts_that_end_alike(tokenizer):
    """Whatever their templates: what either writes goes on behind both."""
    opens, without, bare = (twins.trained() for _ in range(3))
    opens.chat_template, without.chat_template = TEMPLATES["opens"], TEMPLATES["without"]
    bare.chat_template = None
    for first, end in ((opens, "<think>\n"), (without, "]")):
        for ids, each in zip(prompts.encode_for_each([first, opens, without], ["3+4?"]), (first, opens, without)):
            assert each.decode(ids[0]).endswith(end)
    assert bare.decode(prompts.encode_for_each([opens, bare], ["3+4?"])[1][0]) == "3+4?<think>\n"


def test_what_is_too_long_is_dropped_before_any_is_scored(tokenizer, tmp_path):
    rows = [{"id": str(n), "prompt": "3+4?", "answer": "7", "trace": "3+4=7;" * n} for n in (1, 10, 30)]
    path = str(write_jsonl(tmp_path / "x.jsonl", rows))

    def kept(max_length, *contexts):
        p = Params(run="x", data={"traces": path}, annotate={"n_traces": 3}, sft={"max_length": max_length})
        models = {str(at): SimpleNamespace(context=context) for at, context in enumerate(contexts)}
        found, dropped = traces.gather(p, tmp_path, tokenizer, models)
        return sorted(int(x.id) for x in found), dropped

    assert kept(1000) == ([1, 10, 30], {})
    assert kept(65) == ([1, 10], {"it has more tokens than sft.max_length or a model's context holds (65)": 1})
    assert kept(64)[0] == [1] and kept(1000, 500, 65)[0] == [1, 10]
    with pytest.raises(SrlibError, match=r"No trace can be annotated: 3 dropped: it has more tokens .* \(16\)"):
        p = Params(run="x", data={"traces": path}, annotate={"n_traces": 3}, sft={"max_length": 16})
        traces.gather(
            p.model_copy(update={"offload": p.offload.model_copy(update={"hint": "!" * 9})}), tmp_path, tokenizer
        )


def test_the_plan_says_how_many_traces_are_too_long(tokenizer, tmp_path, capsys, monkeypatch):
    lengths = [1 + n % 50 for n in range(200)]
    rows = [{"id": str(i), "prompt": "3+4?", "answer": "7", "trace": "3+4=7;" * n} for i, n in enumerate(lengths)]
    path = str(write_jsonl(tmp_path / "x.jsonl", [*rows, {"id": "no", "prompt": "3+4?", "answer": "7"}]))
    asked = ["plan", "params/smoke.yaml", "--set", f"outputs={tmp_path}", "--set"]
    main([*asked, "data.traces=elsewhere.jsonl"])
    assert "How many traces are too long is not known: elsewhere.jsonl is no file here." in capsys.readouterr().out
    main([*asked, f"data.traces={path}"])
    assert f"of {path} are too long is not known: the tokenizer of {tmp_path}" in capsys.readouterr().out
    tokenizer.save_pretrained(tmp_path / "smoke" / "00_arith_pair" / "small")
    main([*asked, f"data.traces={path}", "--set", "sft.max_length=125", "--set", "offload.hint='!!'"])
    told = capsys.readouterr().out.splitlines()[-1]
    # 6 for the prompt and its hint, one for the end
    share = sum(6 + 6 * n + 1 > 125 for n in lengths) / 200
    assert told == (
        f"{share:.0%} of 200 traces drawn from the 200 of {path} have more than 125 tokens, which is what sft.max_length "
        "or a model's context holds, and would be dropped; of its other rows 1 dropped: no trace."
    )
    p = Params(
        run="smoke", outputs=str(tmp_path), data={"traces": path}, sft={"max_length": 125}, offload={"hint": "!!"}
    )
    p = p.model_copy(update={"annotate": p.annotate.model_copy(update={"n_traces": 200})})
    assert traces.gather(p, tmp_path, tokenizer)[1].total() - 1 == round(200 * share)  # as many as there really are
    assert traces.foreseen(p, [512, 61]).startswith(f"{sum(6 + 6 * n + 1 > 61 for n in lengths) / 200:.0%} of 200")
    monkeypatch.setattr(traces, "SAMPLE", 50)
    assert " of 50 traces drawn from the 200 of " in traces.foreseen(p, [512])
