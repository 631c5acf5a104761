import json

import pytest

from srlib import SrlibError, problems
from srlib.annotate import Annotated
from srlib.problems import Problem


def rows(n):
    return [Problem(id=str(i), prompt=f"{i}?", answer=str(i)) for i in range(n)]


def test_round_trip_and_draw(tmp_path):
    path = problems.write_jsonl(tmp_path / "x.jsonl", rows(20))
    assert problems.load(path) == rows(20)
    drawn = problems.load(path, 5, seed=1)
    assert drawn == problems.load(path, 5, seed=1) != problems.load(path, 5, seed=2)
    assert len({x.id for x in drawn}) == 5
    assert not list(tmp_path.glob("*.part"))


def test_errors_name_file_and_line(tmp_path):
    path = problems.write_jsonl(tmp_path / "x.jsonl", rows(3))
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
    path = problems.write_jsonl(tmp_path / "x.jsonl", rows(3))

    def broken():
        yield rows(1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        problems.write_jsonl(path, broken())
    assert problems.load(path) == rows(3)


def test_annotated_spans_are_checked(tmp_path):
    row = {"id": "1", "prompt": "?", "answer": "1", "trace": "abc", "spans": [[0, 9]], "share": 0.1, "annotator": "x"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    with pytest.raises(SrlibError, match="line 1 is not a Annotated: .*leaves"):
        problems.read_jsonl(tmp_path / "a.jsonl", Annotated)


def test_prompts_go_through_the_chat_template(tokenizer):
    assert problems.encode_prompt(tokenizer, "1+2?") == tokenizer.encode("1+2?")
