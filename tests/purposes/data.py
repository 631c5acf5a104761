"""The section `data`: where problems come from."""

from datasets import Dataset

from srlib.data import problems
from srlib.data.rows import Problem, write_jsonl
from tests.purposes import Case, shows

ROWS = [{"id": str(i), "prompt": f"{i}+1?", "question": f"{i}+2?", "answer": str(i), "trace": "1"} for i in range(3)]


def both(setting: str) -> list[str]:
    return [f"data.{side}.{setting}" for side in ("traces", "test")]


def loaded(case: Case, value: object, others: dict[str, object]) -> list[Problem]:
    """What a run reads; where it names nothing, what its stage 00 has written."""
    _, side, setting = case.key.split(".")
    p = case.params({f"data.{side}.{name}": given for name, given in {**others, setting: value}.items()})
    own = case.folder / p.run / "00_arith_pair"
    own.mkdir(parents=True)
    write_jsonl(own / f"{side}.jsonl", [{"id": "own", "prompt": "?", "answer": "0"}])
    return problems.traces(p, 1) if side == "traces" else problems.load(p.test)


def hub(case: Case) -> list[tuple]:
    """What the hub is asked for: path, configuration and split."""
    asked: list[tuple] = []

    def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> object:
        asked.append((path, config, split))
        return Dataset.from_list(ROWS).to_iterable_dataset()

    case.fixture("monkeypatch").setattr("datasets.load_dataset", load_dataset)
    return asked


@shows(*both("path"))
def the_file_that_is_named(case: Case) -> None:
    path = write_jsonl(case.folder / "rows.jsonl", ROWS[:1])
    assert [x.prompt for x in loaded(case, str(path), {})] == ["0+1?"]


@shows(*both("config"))
def the_configuration_of_a_set_on_the_hub(case: Case) -> None:
    asked = hub(case)
    loaded(case, "extended", {"path": "some/set"})
    assert asked == [("some/set", "extended", "train")]


@shows(*both("split"))
def the_split_of_a_set_on_the_hub(case: Case) -> None:
    asked = hub(case)
    loaded(case, "dev", {"path": "some/set"})
    assert asked == [("some/set", None, "dev")]


@shows(*both("columns"))
def the_column_a_field_is_read_from(case: Case) -> None:
    path = write_jsonl(case.folder / "rows.jsonl", ROWS[:1])
    assert [x.prompt for x in loaded(case, {"prompt": "question"}, {"path": str(path)})] == ["0+2?"]


@shows(*both("prompt"))
def how_a_question_is_put(case: Case) -> None:
    path = write_jsonl(case.folder / "rows.jsonl", ROWS[:1])
    assert [x.prompt for x in loaded(case, "Say {question}", {"path": str(path)})] == ["Say 0+1?"]
