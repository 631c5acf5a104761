"""What models read of traces is kept: another threshold reads nothing again, another model only its own part."""

from itertools import islice

import pytest

from srlib import engine, params
from srlib.annotation import annotators, readings, traces
from srlib.data import arith
from srlib.data.rows import write_jsonl
from srlib.params import Arith, Data, Offload
from tests.conftest import random_model


@pytest.fixture
def asked():
    return list(islice(arith.generate(Arith(min_steps=1, max_steps=5), "traces", 0), 12))


@pytest.fixture
def models(pair, tokenizer, tmp_path):
    """Folders of a pair, and of another big model."""
    made = dict(zip(("small", "big"), pair)) | {"other": random_model(len(tokenizer), 7)}
    for name, model in made.items():
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return {name: str(tmp_path / name) for name in made}


def settings(models, big="big", **annotate):
    pair = {"small": {"path": models["small"]}, "big": {"path": models[big]}}
    annotate = {"n_traces": 12, "batch_size": 5, "threshold": 1.0, "compare": ["entropy"], **annotate}
    return params.load("params/smoke.yaml", pair=pair, annotate=annotate)


def annotate(p, folder, asked):
    """A run of the stage with fresh engines: rows, those it is compared with, and tokens read by each model."""
    folder.mkdir(exist_ok=True)
    small, big = engine.load(p.small, 8), engine.load(p.big, 8)
    rows, _ = annotators.run(p, folder, asked, small, big)
    marked = annotators.compare(p, folder, rows, small, big)
    assert len(marked["gap"]) == len(rows) and all(row in rows for row in marked["gap"])
    beside = {name: sorted(of, key=lambda row: row.id) for name, of in marked.items() if name != "gap"}
    return rows, beside, (small.counters.forward_tokens, big.counters.forward_tokens)


def size(asked, tokenizer):
    return sum(len(tokenizer.encode(x.prompt)) + len(tokenizer.encode(x.trace)) for x in asked)


def test_another_threshold_reads_nothing_again(models, asked, tokenizer, tmp_path):
    total = size(asked, tokenizer)
    first, beside, read = annotate(settings(models), tmp_path / "a", asked)
    assert read == (2 * total, total)  # the small model once for `gap`, and once for `entropy`
    again = settings(models, threshold=2.0, merge_gap=2, max_share=0.5, max_span_tokens=3)
    rows, others, read = annotate(again, tmp_path / "a", asked)
    assert read == (0, 0)
    fresh, fresh_others, read = annotate(again, tmp_path / "b", asked)
    assert read == (2 * total, total)
    assert rows == fresh and others == fresh_others
    assert rows != first and others != beside


def test_another_model_reads_for_itself_alone(models, asked, tokenizer, tmp_path):
    total = size(asked, tokenizer)
    first, *_ = annotate(settings(models), tmp_path / "a", asked)
    other, _, read = annotate(settings(models, "other"), tmp_path / "a", asked)
    assert read == (0, total) and other != first
    assert annotate(settings(models), tmp_path / "a", asked)[0] == first  # both are kept
    # other weights where the big model was
    random_model(len(tokenizer), 7).save_pretrained(models["big"])
    rows, _, read = annotate(settings(models), tmp_path / "a", asked)
    assert read[0] == 0 and rows == other


def test_other_code_and_other_ids_are_not_met(models, asked, tmp_path, monkeypatch):
    p = settings(models)
    whats = ("score", "doubts")
    assert len({readings.journal(tmp_path, spec, what) for spec in (p.small, p.big) for what in whats}) == 4
    before = readings.journal(tmp_path, p.big, "score")
    assert readings.journal(tmp_path, p.big.model_copy(update={"kv_cache_gb": 2.0}), "score") == before
    for change in (
        lambda: monkeypatch.setattr(readings, "version", lambda package: "99"),
        lambda: monkeypatch.setattr(readings.Code, "used", lambda *_: {"srlib.engine.transformers": "new"}),
    ):
        change()
        assert readings.journal(tmp_path, p.big, "score") != before
        monkeypatch.undo()
    small = engine.load(p.small, 8)
    [one], [other] = (readings.passages([x], small.tokenizer) for x in (asked[0], asked[1]))
    assert one.key != other.key != readings.Passage(other.ids, other.prompt - 1).key


def test_a_trace_is_read_behind_the_hint_that_is_written_with(models, asked, tokenizer, tmp_path):
    total, hint = size(asked, tokenizer), "=?"
    first, beside, _ = annotate(settings(models), tmp_path / "a", asked)
    hinted = settings(models).model_copy(update={"offload": Offload(hint=hint)})
    rows, others, read = annotate(hinted, tmp_path / "a", asked)
    assert read == (2 * (total + 12 * len(hint)), total + 12 * len(hint))  # all of it is read anew
    assert rows != first and others["entropy"] != beside["entropy"]
    assert [row.prompt for row in rows] == [row.prompt for row in first]  # which stand without it
    small, big = engine.load(hinted.small, 8), engine.load(hinted.big, 8)
    asked_with = asked[0].model_copy(update={"prompt": asked[0].prompt + hint})
    assert annotators.by_token(small, big, asked[0], hint) == annotators.by_token(small, big, asked_with)


def test_a_run_that_is_killed_goes_on(models, asked, tokenizer, tmp_path):
    p = settings(models)
    small, big = engine.load(p.small, 8), engine.load(p.big, 8)
    real, calls = big.score, []

    def dies(sequences):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(sum(map(len, sequences)))
        return real(sequences)

    big.score = dies
    (tmp_path / "a").mkdir()
    with pytest.raises(KeyboardInterrupt):
        annotators.run(p, tmp_path / "a", asked, small, big)
    total = size(asked, tokenizer)
    rows, _, read = annotate(p, tmp_path / "a", asked)
    assert read == (total, total - sum(calls))  # the small one had read all for `gap`
    assert rows == annotate(p, tmp_path / "b", asked)[0]


def test_numbers_are_kept_as_they_are(engines, asked, tmp_path):
    small, _ = engines
    passages = readings.passages([*asked, asked[3]], small.tokenizer)  # one twice
    file = tmp_path / "x.journal.jsonl"
    kept = readings.read(small, "score", passages, 1, file)
    assert len(file.read_text().splitlines()) == len(asked)
    exact = [small.score([passage.ids.tolist()])[0][passage.prompt - 1 :] for passage in passages]
    assert [values.tolist() for values in kept] == exact
    for other in (readings.read(None, "score", passages, 1, file), readings.read(small, "score", passages, 1)):
        assert [values.tolist() for values in other] == exact


def test_written_traces_are_named_after_what_decides_them(models, asked, tokenizer, tmp_path, monkeypatch):
    names = []

    def write(big, found, config, offload, seed, journal):
        names.append(journal.path.name)
        return [problem.model_copy(update={"trace": "1"}) for problem in found], traces.Counter()

    monkeypatch.setattr(traces, "write", write)
    given = {"traces": {"path": str(write_jsonl(tmp_path / "traces.jsonl", asked))}}
    for p in (
        settings(models, tries=2),
        settings(models, tries=2, threshold=3.0, share=0.4, method="entropy"),
        settings(models, tries=3),
        settings(models, "other", tries=2),
    ):
        traces.gather(p.model_copy(update={"data": Data(**given)}), tmp_path, tokenizer)
    assert names[0] == names[1] and len(set(names)) == 3
    assert all(name.startswith("written-") for name in names)
