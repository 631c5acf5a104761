"""The section `data`: where problems come from."""

from collections import Counter

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
    """What the hub is asked for: path, configuration, split, and a revision."""
    asked: list[tuple] = []

    def load_dataset(path: str, config: str | None, split: str, streaming: bool, **pinned: str) -> object:
        asked.append((path, config, split, *pinned.values()))
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


@shows(*both("revision"))
def the_revision_of_a_set_on_the_hub(case: Case) -> None:
    asked = hub(case)
    loaded(case, "v2", {"path": "some/set"})
    assert asked == [("some/set", None, "train", "v2")]


@shows(*both("columns"))
def the_column_a_field_is_read_from(case: Case) -> None:
    path = write_jsonl(case.folder / "rows.jsonl", ROWS[:1])
    assert [x.prompt for x in loaded(case, {"prompt": "question"}, {"path": str(path)})] == ["0+2?"]


@shows(*both("prompt"))
def how_a_question_is_put(case: Case) -> None:
    path = write_jsonl(case.folder / "rows.jsonl", ROWS[:1])
    assert [x.prompt for x in loaded(case, "Say {question}", {"path": str(path)})] == ["Say 0+1?"]


@shows("data.decontaminate")
def problems_of_the_test_set(case: Case) -> None:
    rows = [row | {"prompt": f"{row['id']} apples and {row['id']} pears: how many?"} for row in ROWS]
    traces = [row | {"prompt": f"So, {row['prompt']}"} for row in rows[:2]] + [ROWS[2]]
    files = {
        side: write_jsonl(case.folder / f"{side}.jsonl", some) for side, some in (("traces", traces), ("test", rows))
    }
    p = case.params({f"data.{side}": str(file) for side, file in files.items()} | {"data.decontaminate": 4})
    assert [x.id for x in problems.load(p.traces)] == ["0", "1", "2"]
    dropped: Counter[str] = Counter()
    assert [x.id for x in problems.traces(p, 1, dropped=dropped)] == ["2"] and dropped.total() == 2
