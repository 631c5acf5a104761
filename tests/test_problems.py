import json
import random
from collections import Counter

import pytest

from srlib import SrlibError
from srlib.annotation import answers
from srlib.data import arith, problems, prompts
from srlib.data.journal import Journal
from srlib.data.rows import Annotated, Problem, read_jsonl, write_jsonl
from srlib.params import Params, Source


def rows(n):
    return [Problem(id=str(i), prompt=f"{i}?", answer=str(i)) for i in range(n)]


def test_round_trip_and_draw(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", rows(20))
    assert problems.load(path) == rows(20)
    drawn = problems.load(path, 5, seed=1)
    assert drawn == problems.load(path, 5, seed=1) != problems.load(path, 5, seed=2)
    assert len({x.id for x in drawn}) == 5
    assert drawn == random.Random(1).sample(rows(20), 5)  # what runs have drawn, they draw again
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
    with pytest.raises(SrlibError, match=r"line 3 is not a Problem: no answer\."):
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": "1"}, "line 2 is not a Annotated: its id stands twice: '1', in line 1 too"),
        ({"spans": [[1, 2], [0, 1]]}, r"line 2 is not a Annotated: .*span \(0, 1\) is empty, overlaps another"),
        ({"spans": [[-1, 2]]}, "line 2 is not a Annotated: .*leaves"),
        ({"spans": [[0, 1.5]]}, "line 2 is not a Annotated: spans.0.1: "),
        ({"trace": "a<bigmodel>b</bigmodel>c"}, "line 2 is not a Annotated: .*it holds a tag already"),
        ({"share": float("nan")}, "line 2 is not a Annotated: share: "),
        ({"share": 20}, "line 2 is not a Annotated: share: "),
        ({"trace": None}, "line 2 is not a Annotated: trace: "),
        ({"trace": "\ud800bc"}, "line 2 is not a Annotated: .*surrogates not allowed"),
    ],
)
def test_annotated_rows_of_another_hand(tmp_path, change, message):
    row = {"id": "1", "prompt": "?", "answer": "1", "trace": "abc", "spans": [[0, 2]], "share": 0.7, "annotator": "x"}
    path = write_jsonl(tmp_path / "a.jsonl", [row, row | {"id": "2"}])
    assert [x.tagged for x in read_jsonl(path, Annotated)] == ["<bigmodel>ab</bigmodel>c"] * 2
    with pytest.raises(SrlibError, match=message) as error:
        read_jsonl(write_jsonl(path, [row, row | {"id": "2"} | change]), Annotated)
    assert "\n" not in str(error.value)


def test_prompts_go_through_the_chat_template(tokenizer):
    assert prompts.encode_prompt(tokenizer, "1+2?") == tokenizer.encode("1+2?")


def test_arguments_of_a_template_are_in_it_once_and_saved_with_it(tmp_path):
    made = arith.tokenizer()
    made.chat_template = (
        "{{ messages[0].role }}:{% if think is none %}N{% elif not think %}F{% endif %}{{ depth.most if depth }}"
    )
    for _ in range(2):  # as where a tokenizer that was saved with an adapter is loaded again
        prompts.set_template(made, {"think": False, "depth": {"most": "3 nulls"}}, "{{ x }} 'q' %}")
        made.save_pretrained(tmp_path)
        made = type(made).from_pretrained(tmp_path)
        filled = made.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
        assert filled == "system:F3 nulls"
    prompts.set_template(made, {"think": None})  # in their place
    assert made.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False) == "user:N"
    with pytest.raises(SrlibError, match="template holds 'a b', which is no name"):
        prompts.set_template(made, {"a b": 1})
    made.chat_template = None
    prompts.set_template(made, {}, "")
    with pytest.raises(SrlibError, match="has no chat template: leave template and system empty"):
        prompts.set_template(made, {}, "x")


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


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+2?"},
    {"role": "assistant", "content": "3"},
    {"role": "user", "content": "And 3*4?"},
    {"role": "assistant", "content": "<think>3*4=12;</think>\\boxed{12}"},
]


def test_rows_of_messages_go_through_the_template_turn_by_turn(tmp_path):
    """With a hint, and a format of the question, in the last turn, and the row's own system turn before all."""
    row = {"id": "a", "messages": TURNS, "answer": "12"}
    path = str(write_jsonl(tmp_path / "x.jsonl", [row, row | {"id": "b", "messages": TURNS[1:]}]))
    columns = {"prompt": "messages", "trace": "messages"}
    made = arith.tokenizer()
    made.chat_template = "{% for m in messages %}({{ m.role }}){{ m.content }}{% endfor %}{% if add_generation_prompt %}(assistant){% endif %}"
    found = problems.load(Source(path=path, columns=columns, prompt="Q: {question}"), worked=True)
    assert [problem.trace for problem in found] == 2 * [TURNS[-1]["content"]]
    assert Problem(**json.loads(found[0].model_dump_json())) == found[0]
    asked = [*TURNS[:3], {"role": "user", "content": "Q: And 3*4? Box it."}]
    wanted = [made.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in (asked, asked[1:])]

    def encoded():
        return [made.decode(ids) for ids in prompts.encode_prompts(made, [x.prompt + " Box it." for x in found])]

    assert encoded() == wanted
    prompts.set_template(made, {}, "Be wise.")
    assert encoded() == [wanted[0], "(system)Be wise." + wanted[1]]
    assert found[0].prompt.count("Q: ") == 1
    assert prompts.readable(found[0].prompt) == "system: Be brief.\n\nuser: 1+2?\n\nassistant: 3\n\nuser: Q: And 3*4?"
    assert prompts.readable("1+2?") == "1+2?"
    row = problems.load(Source(path=path, columns=columns), worked=True)[1]
    assert "user: And 3*4?" in answers.prompt_of(row, 0.2)
    made.chat_template = None
    with pytest.raises(SrlibError, match="has no chat template, and a problem is a conversation"):
        encoded()
    made.chat_template = "{{ raise_exception('Roles must alternate') if messages | length > 1 }}"
    with pytest.raises(SrlibError, match="takes no such conversation: Roles must alternate"):
        encoded()


SCHEMA, FOREIGN = {}, {"id": "uid", "prompt": "question", "answer": "target", "trace": "solution", "correct": "ok"}


def written(tmp_path, given, columns):
    """A source of `given` (rows by field, or lines as they are), whose columns are called as `columns` say."""
    named = (row if isinstance(row, str) else {columns.get(key, key): row[key] for key in row} for row in given)
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in named))
    there = {key for row in given if isinstance(row, dict) for key in row}
    return Source(path=str(path), columns={key: name for key, name in columns.items() if key in there})


GOOD = {"id": "p1", "prompt": "6*7?", "answer": "42"}


@pytest.mark.parametrize("columns", [SCHEMA, FOREIGN], ids=["schema", "columns"])
@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"answer": 42}, {}),
        ({"answer": ["42"]}, {}),
        ({"answer": [4.5]}, {"answer": "4.5"}),
        ({"answer": 10**400}, {"answer": "1" + "0" * 400}),
        ({"id": 7}, {"id": "7"}),
        ({"id": None}, {"id": "0"}),
        ({"trace": None}, {}),
        ({"trace": " "}, {}),
        ({"trace": ["", "seven", "six"]}, {"trace": "seven"}),
        ({"trace": ["first", "second"], "correct": [False, True]}, {"trace": "second"}),
        ({"trace": ["first", "second"], "correct": [False, False]}, {}),
        ({"trace": ["first", "second"], "correct": [0, True]}, {"trace": "second"}),
        ({"trace": ["first", "second"], "correct": True}, {"trace": "first"}),
        ({"prompt": "6*7\ud800?"}, {"prompt": "6*7\\ud800?"}),
        (
            {"trace": ["x\udfff"], "meta": {"\udc80": ["\ud800"]}},
            {"trace": "x\\udfff", "meta": {"\\udc80": ["\\ud800"]}},
        ),
        ({"prompt": "6*7\\\ud800\\ud800?"}, {"prompt": "6*7\\\\ud800\\ud800?"}),
        ({"prompt": "6*7\U0001f600?"}, {"prompt": "6*7\U0001f600?"}),
        ({"prompt": [{"role": "user", "content": "6*7?"}]}, {}),
        ({"prompt": [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42"}]}, {}),
        ({"trace": [{"role": "user", "content": "6*7?"}, {"role": "assistant", "content": "42"}]}, {"trace": "42"}),
        ({"trace": [{"role": "assistant", "content": "42"}, {"role": "user", "content": "6*7?"}]}, {}),
        ({"meta": {"level": 3}}, {"meta": {"level": 3}}),
        ({"meta": "of another kind", "year": 1999}, {}),
    ],
)
def test_what_a_row_may_hold(tmp_path, columns, row, problem):
    assert problems.load(written(tmp_path, [GOOD | row], columns)) == [Problem(**(GOOD | problem))]


@pytest.mark.parametrize("columns", [SCHEMA, FOREIGN], ids=["schema", "columns"])
@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answer": None}, "no answer"),
        ({"answer": "\t "}, "answer is blank"),
        ({"answer": "\u200b\u00a0"}, "answer is blank"),
        ({"answer": True}, "answer is true or false"),
        ({"answer": [False]}, "answer is true or false"),
        ({"answer": []}, "answer is a list of 0"),
        ({"answer": ["42", "forty-two", "XLII"]}, "answer is a list of 3"),
        ({"answer": {"value": 42}}, "answer is a mapping"),
        ({"answer": float("nan")}, "answer is not a number"),
        ({"prompt": ""}, "prompt is blank"),
        ({"prompt": {"text": "6*7?"}}, "prompt is a mapping"),
        ({"prompt": [{"role": "system", "content": "Be brief."}]}, "prompt is a conversation that cannot be asked"),
        (
            {"prompt": [{"role": "tool", "content": "42"}, {"role": "user", "content": "?"}]},
            "prompt is a conversation that cannot be asked",
        ),
        ({"prompt": [{"role": "user", "content": "6\x1e7?"}]}, "prompt is a conversation that cannot be asked"),
        ({"prompt": [{"role": "user", "content": None}]}, "no a turn of prompt"),
        ({"prompt": [{"role": "user"}, 7]}, "prompt is a list of 2"),
        ({"id": ["p", "1"]}, "id is a list of 2"),
        ({"id": " "}, "id is blank"),
        ({"trace": {"text": "seven sixes"}}, "trace is a mapping"),
        ({"trace": [{"role": "assistant", "content": {"text": "42"}}]}, "trace is a mapping"),
        ({"trace": [False, "seven sixes"]}, "trace is true or false"),
        ({"trace": ["x", "y"], "correct": [True, "true"]}, "correct is text"),
        ({"trace": ["x", "y"], "correct": [True, 2]}, "correct is a number"),
        ({"trace": ["x", "y"], "correct": [True]}, "correct has not one mark for each generation"),
        ({"trace": "x", "correct": [True, False]}, "correct has not one mark for each generation"),
        ('{"id": "p1", "prompt": ', "Invalid JSON"),
        ('["p1", "6*7?", "42"]', "a line is one object, and this is a list of 3"),
        ("[", "a list begins here, and a file is one object a line"),
        ("null", "a line is one object, and this is null"),
        ('{"prompt": "6*7?", "answer": "42", "answer": "43"}', "a key stands twice"),
        ('{"prompt": "6*7?", "answer": "42", "meta": {"a": {"level": 1, "level": 2}}}', "a key stands twice"),
        ('{"prompt": "6*7?", "answer": ' + "[" * 9000 + "]" * 9000 + "}", "Invalid JSON"),
        ('{"prompt": "6\x00*7?"}', "Invalid JSON"),
        ({"answer": [["42"]]}, "answer is a list of 1"),
        ({"answer": float("-inf")}, "answer is not a number"),
        (GOOD | {"id": "0", "prompt": "1+1?"}, "its id stands twice"),
    ],
)
def test_a_bad_row_is_an_error_or_is_left_out_and_counted(tmp_path, columns, row, reason):
    given = [GOOD | {"id": "0"}, row if isinstance(row, str) else GOOD | row, GOOD | {"id": "2"}]
    source = written(tmp_path, given, columns)
    with pytest.raises(SrlibError, match=rf"rows\.jsonl, line 2 is not a Problem: {reason}") as error:
        problems.load(source)
    assert "\n" not in str(error.value)
    dropped = Counter({"of earlier": 1})
    assert [x.id for x in problems.load(source, on_bad="drop", dropped=dropped)] == ["0", "2"]
    assert dropped == {"of earlier": 1, reason: 1}
    wanted = rf"holds 2 problems that can be used \(1 dropped: {reason}\), fewer than the 3 asked for"
    with pytest.raises(SrlibError, match=wanted):
        problems.load(source, 3, on_bad="drop")


@pytest.mark.parametrize(
    ("mark", "trace"), [(1, "x"), (0, None), (1.0, "x"), ("true", SrlibError), ({"by": "hand"}, SrlibError)]
)
def test_a_column_of_marks_that_is_named_holds_marks(tmp_path, mark, trace):
    source = written(tmp_path, [GOOD | {"trace": "x", "correct": mark}], FOREIGN)
    if trace is SrlibError:
        with pytest.raises(SrlibError, match="line 1 is not a Problem: correct is (text|a mapping)"):
            problems.load(source)
    else:
        assert problems.load(source)[0].trace == trace


def test_names_that_no_file_can_have():
    for path in ("x" * 5000 + ".jsonl", "x\0.jsonl"):
        with pytest.raises(SrlibError, match="There is no file x"):
            problems.load(path)


def test_what_is_written_is_read_again(tmp_path):
    rows = [{"text": "\ud800 \\ud800 \\\udfff \u202e\0\u2028é", "\udc00": ["\ud83d", 1]}, {"text": "\\"}]
    assert read_jsonl(write_jsonl(tmp_path / "x.jsonl", rows), dict) == rows
    for _ in range(2):
        with Journal(tmp_path / "x.journal.jsonl") as journal:
            if not journal.records:
                journal.append(*({"key": str(i), **row} for i, row in enumerate(rows)))
            assert list(journal.records.values()) == [{"key": str(i), **row} for i, row in enumerate(rows)]


def test_both_lines_of_an_id_are_named(tmp_path):
    source = written(tmp_path, [GOOD | {"id": "q"}, GOOD | {"id": 5}, "", GOOD | {"id": "5"}], SCHEMA)
    with pytest.raises(SrlibError, match="line 4 is not a Problem: its id stands twice: '5', in line 2 too"):
        problems.load(source)


@pytest.mark.parametrize("columns", [SCHEMA, FOREIGN], ids=["schema", "columns"])
def test_a_row_that_needs_a_trace(tmp_path, columns):
    unmarked = GOOD | {"trace": ["wrong", "wrong too"], "correct": [False, None]}
    given = [GOOD | {"id": "a", "trace": "<think>"}, GOOD | {"id": "b"}, unmarked]
    given = [{"correct": True} | row for row in given]
    source, dropped = written(tmp_path, given, columns), Counter()
    assert [x.id for x in problems.load(source, 1, worked=True, on_bad="drop", dropped=dropped)] == ["a"]
    assert dropped == {"no trace": 1, "no generation is marked right": 1}
    with pytest.raises(SrlibError, match="line 2 is not a Problem: no trace"):
        problems.load(source, worked=True)
    assert [x.trace for x in problems.load(source)] == ["<think>", None, None]


def test_a_column_called_correct_by_chance_is_left_alone(tmp_path):
    source = written(tmp_path, [GOOD | {"trace": ["x", "y"], "correct": "B"}], SCHEMA)
    assert problems.load(source, worked=True)[0].trace == "x"


def test_the_draw_is_of_the_usable_rows(tmp_path):
    good = rows(30)
    lines = [row.model_dump_json() for row in good]
    source = written(tmp_path, [*lines[:9], "{", *lines[9:]], SCHEMA)
    assert problems.load(source, 12, 3, on_bad="drop") == random.Random(3).sample(good, 12)


def test_a_damaged_file_of_a_run_is_an_error_and_rows_of_a_given_one_are_dropped(tmp_path):
    own = tmp_path / "run" / "00_arith_pair"
    own.mkdir(parents=True)
    (own / "traces.jsonl").write_text(json.dumps(GOOD) + "\n{")
    with pytest.raises(SrlibError, match="traces.jsonl, line 2 is not a Problem: Invalid JSON"):
        problems.traces(Params(run="run", outputs=str(tmp_path)), 1)
    dropped = Counter()
    given = Params(run="run", outputs=str(tmp_path), data={"traces": str(own / "traces.jsonl")})
    assert problems.traces(given, 1, dropped=dropped) == [Problem(**GOOD)] and dropped == {"Invalid JSON": 1}


def test_encodings(tmp_path):
    path, line = tmp_path / "x.jsonl", json.dumps(GOOD | {"prompt": "sechs × 7?"}, ensure_ascii=False)
    path.write_bytes(line.encode("utf-8-sig") + b"\r\n" + line.replace("p1", "p2").encode("utf-8-sig"))
    assert [(x.id, x.prompt) for x in problems.load(path)] == [("p1", "sechs × 7?"), ("p2", "sechs × 7?")]
    for encoding, byte in (("latin-1", "0xd7"), ("utf-16", "0xff")):
        path.write_bytes(line.encode(encoding))
        for on_bad in ("raise", "drop"):
            with pytest.raises(SrlibError, match=f"x.jsonl is not UTF-8: line 1 has the byte {byte}. Save it as UTF-8"):
                problems.load(path, on_bad=on_bad)
    path.write_bytes(b"\xef\xbb\xbf\n")
    with pytest.raises(SrlibError, match="x.jsonl is empty"):
        problems.load(path)


def test_columns_of_other_names(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"question": "1+1?", "target": 2.0, "level": 1}])
    source = Source(path=str(path), columns={"prompt": "question", "answer": "target"})
    assert problems.load(source) == [Problem(id="0", prompt="1+1?", answer="2.0")]
    with pytest.raises(SrlibError, match=r"x.jsonl has no column 'problem', but question, target, level. Name it"):
        problems.load(Source(path=str(path), columns={"prompt": "problem"}))
    with pytest.raises(SrlibError, match="x.jsonl has no column 'prompt', but question, target, level"):
        problems.load(path, on_bad="drop")
    with pytest.raises(SrlibError, match="x.jsonl has no column 'uid'"):  # named, so it is to be there
        problems.load(source.model_copy(update={"columns": source.columns | {"id": "uid"}}))


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


def test_bad_rows_of_a_stream_are_passed_over(monkeypatch):
    from datasets import Dataset

    answers = [None if i % 3 else str(i) for i in range(30)]
    stream = Dataset.from_list([{"prompt": f"{i}?", "answer": each} for i, each in enumerate(answers)])
    monkeypatch.setattr(problems, "hub_rows", lambda source: stream.to_iterable_dataset())
    dropped = Counter()
    drawn = problems.load("some/traces", 4, on_bad="drop", dropped=dropped)
    assert len(drawn) == 4 and all(f"{x.answer}?" == x.prompt for x in drawn)
    assert set(dropped) == {"no answer"} and dropped.total() < 20  # it stops when it has enough
    with pytest.raises(SrlibError, match=r"holds 10 problems that can be used \(20 dropped: no answer\)"):
        problems.load("some/traces", 11, on_bad="drop")
    with pytest.raises(SrlibError, match="some/traces, row 2 is not a Problem: no answer"):
        problems.load("some/traces")
    with pytest.raises(SrlibError, match="some/traces has no column 'trace', but prompt, answer"):
        problems.load("some/traces", 1, worked=True, on_bad="drop")


def test_a_hub_that_is_not_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(SrlibError, match="some/traces is no file here, and the hub gave no such data set"):
        problems.load(Source(path="some/traces"))
