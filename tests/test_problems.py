import json

import pytest

from srlib import SrlibError
from srlib.data import arith, problems, prompts
from srlib.data.rows import Annotated, Problem, read_jsonl, write_jsonl
from srlib.params import Source


def rows(n):
    return [Problem(id=str(i), prompt=f"{i}?", answer=str(i)) for i in range(n)]


def test_round_trip_and_draw(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", rows(20))
    assert problems.load(path) == rows(20)
    drawn = problems.load(path, 5, seed=1)
    assert drawn == problems.load(path, 5, seed=1) != problems.load(path, 5, seed=2)
    assert len({x.id for x in drawn}) == 5
    assert not list(tmp_path.glob("*.part"))


def test_errors_name_file_and_line(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", rows(3))
    with pytest.raises(SrlibError, match="holds 3 problems, fewer than the 4"):
        problems.load(path, 4)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:-5], lines[2]]))
    with pytest.raises(SrlibError, match=r"x.jsonl, line 2 is not a Problem: Invalid JSON"):
        problems.load(path)
    path.write_text("\n".join([*lines[:2], '{"id": "2", "prompt": "?"}']))
    with pytest.raises(SrlibError, match=r"line 3 is not a Problem: answer: Field required"):
        problems.load(path)
    path.write_text("")
    with pytest.raises(SrlibError, match="is empty"):
        problems.load(path)
    with pytest.raises(SrlibError, match="There is no file"):
        problems.load(tmp_path / "y.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", rows(3))

    def broken():
        yield rows(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(path, broken())
    assert problems.load(path) == rows(3)


def test_annotated_spans_are_checked(tmp_path):
    row = {"id": "1", "prompt": "?", "answer": "1", "trace": "abc", "spans": [[0, 9]], "share": 0.1, "annotator": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(SrlibError, match="line 1 is not a Annotated: .*leaves"):
        read_jsonl(tmp_path / "a.jsonl", Annotated)


def test_prompts_go_through_the_chat_template(tokenizer):
    assert prompts.encode_prompt(tokenizer, "1+2?") == tokenizer.encode("1+2?")


def test_each_tokenizer_has_its_own_template_and_tokens(tokenizer):
    texts = ["1+2?", "<bigmodel>3*4?"]
    plain, polite, other_end = arith.tokenizer(), arith.tokenizer(), arith.tokenizer()
    polite.chat_template = "{{ messages[0]['content'] }}={{ eos_token }}"
    other_end.chat_template, other_end.eos_token = polite.chat_template, "?"
    bare = arith.tokenizer()
    bare.chat_template = None
    tokenizers = [tokenizer, plain, polite, other_end, bare]
    encoded = prompts.encode_for_each(tokenizers, texts)
    for each, ids in zip(tokenizers[:-1], encoded):
        messages = [[{"role": "user", "content": text}] for text in texts]
        assert ids == each.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encoded[-1] == bare(texts)["input_ids"]
    assert len({str(ids) for ids in encoded[:-1]}) == 4
    assert prompts.encode_for_each(tokenizers, []) == [[]] * 5


def test_columns_of_other_names(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "1+1?", "target": 2.0, "level": 1}])
    source = Source(path=str(path), columns={"prompt": "question", "answer": "target"})
    assert problems.load(source) == [Problem(id="0", prompt="1+1?", answer="2.0")]
    with pytest.raises(SrlibError, match=r"x.jsonl has no column 'problem', but question, target, level. Name it"):
        problems.load(Source(path=str(path), columns={"prompt": "problem"}))


def test_a_data_set_on_the_hub_is_streamed_and_mapped(monkeypatch):
    from datasets import Dataset

    asked = []

    def load_dataset(*args, **settings):
        asked.append((args, settings))
        rows = Dataset.from_list([{"uuid": f"u{i}", "problem": f"{i}?", "answer": str(i)} for i in range(9)])
        return rows.to_iterable_dataset()

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = Source(path="some/traces", config="default", columns={"id": "uuid", "prompt": "problem"})
    assert problems.load(source)[3] == Problem(id="u3", prompt="3?", answer="3")
    assert asked == [(("some/traces", "default"), {"split": "train", "streaming": True})]
    drawn = problems.load(source, 4, seed=1)
    assert drawn == problems.load(source, 4, seed=1) != problems.load(source, 4, seed=2) and len(drawn) == 4
    with pytest.raises(SrlibError, match="some/traces holds 9 problems, fewer than the 10"):
        problems.load(source, 10)


def test_a_hub_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SrlibError, match="some/traces is no file here, and the hub gave no such data set"):
        problems.load(Source(path="some/traces"))
