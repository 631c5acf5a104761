"""What a step is worth: a model that knows one problem by heart, sure of its mistake, unsure of what does not matter."""

import pytest
import torch

from srlib.annotation import annotators, worth
from srlib.data.grade import grade
from srlib.data.journal import Journal
from srlib.data.rows import Problem
from srlib.decoding.policies import Never
from srlib.decoding.scheduler import Offloader
from srlib.decoding.steps import starts
from srlib.engine.transformers import TransformersEngine
from srlib.params import Annotate, Offload, Worth
from tests.conftest import random_model

TRACE = "<think>{a}3+4=7;{b}7*2={c};{a}{c}-1={d};</think>\\boxed{{{d}}}"
PROBLEM = Problem(id="one", prompt="3+4*2-1?", answer="13", trace=TRACE.format(a=">", b=">", c=14, d=13))
CONFIG, OFFLOAD = Worth(continuations=6, jump=0.3), Offload(max_tokens=60)


@pytest.fixture(scope="module")
def heart(tokenizer):
    """Trained on one problem: how a step begins is drawn, the product is 15 three times in five, and all else is sure."""
    model = random_model(len(tokenizer), 5).train()
    prompt = tokenizer.encode(PROBLEM.prompt)
    rows = []
    for i in range(20):
        wrong = i >= 8
        text = TRACE.format(a=">~"[i % 2], b=">~"[i // 2 % 2], c=15 if wrong else 14, d=14 if wrong else 13)
        rows.append(prompt + tokenizer.encode(text) + [0])
    ids = torch.tensor(rows)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def small(heart, tokenizer):
    return TransformersEngine(heart, tokenizer, slots=8)


def values(small, folder, problems=(PROBLEM,), config=CONFIG, batch_size=4):
    with Journal(folder / "worth.journal.jsonl") as journal:
        return list(worth.values(small, problems, config, OFFLOAD, journal, batch_size, 0))


def marked(small, values):
    tokens = small.tokenizer.tokenize(PROBLEM.trace)
    return [i for i, value in enumerate(values) if value > CONFIG.jump], tokens


def test_what_goes_wrong_is_marked_and_what_is_only_unsure_is_not(small, tmp_path):
    """The mark that a step begins with has more entropy than the product, and nothing comes of it."""
    (found,) = values(small, tmp_path)
    places, tokens = marked(small, found)
    product = tokens.index("*") + 4  # *2=14: the second digit of 14 is the one that may be a 5
    assert tokens[product] == "4" and places == [product]
    unsure = Annotate(threshold=0.5, max_share=1.0)
    (row,) = annotators.entropy(small, [PROBLEM], unsure)
    assert [PROBLEM.trace[a:b] for a, b in row.spans if PROBLEM.trace[a] == ">"]


def test_continuations_that_write_a_step_as_it_stands_are_those_from_behind_it(small, tmp_path, tokenizer):
    """So they need not be written again: what is kept of one is what is written from each place on it."""
    (one,) = worth._worked(tokenizer, [PROBLEM], OFFLOAD)
    one.found = [[] for _ in range(6)]
    worth._write(small, [(one, one.steps)], CONFIG, OFFLOAD, 0)
    assert 6 <= sum(map(len, one.found)) < 6 * (len(one.steps) - 1)
    settings = OFFLOAD.settings | {"temperature": CONFIG.temperature, "max_tokens": 90}
    writer = Offloader(small, None, Never(), **settings)
    checked = 0
    for at in one.steps[:-1]:
        begun = [(one.ids[:at], [0] * at)] * 6
        for j, trace in enumerate(writer.run([PROBLEM.prompt] * 6, numbers=range(6), begun=begun)):
            assert grade(trace.text(tokenizer), "13").correct is one.right(j, at)
            checked += all(s.start != at for s in one.found[j])
    assert checked  # some of them were not written


def test_a_run_that_was_ended_goes_on_and_nothing_is_written_twice(small, heart, tokenizer, tmp_path):
    others = [PROBLEM.model_copy(update={"id": str(i)}) for i in range(3)]
    whole = values(small, tmp_path / "whole", others, batch_size=1)
    with Journal(tmp_path / "worth.journal.jsonl") as journal:
        next(worth.values(small, others, CONFIG, OFFLOAD, journal, 1, 0))
        next(worth.values(small, others, CONFIG, OFFLOAD, journal, 1, 0))
    assert values(small, tmp_path, others, batch_size=1) == whole
    again = TransformersEngine(heart, tokenizer, slots=8)
    assert values(again, tmp_path, others) == whole and again.counters.decoded_tokens == 0
    lower = values(again, tmp_path, others, config=CONFIG.model_copy(update={"jump": 0.99}))  # no new continuations
    assert again.counters.decoded_tokens == 0 and len(lower) == 3


def test_the_cost_is_told_before(small, tmp_path, capsys, tokenizer):
    expected = worth.estimate([PROBLEM], CONFIG, OFFLOAD, tokenizer)
    assert expected.continuations == 6 * 4  # three steps, and what stands behind them
    assert small.counters.decoded_tokens == 0
    values(small, tmp_path)
    assert str(expected) in capsys.readouterr().out
    length = len(tokenizer.encode(PROBLEM.trace))
    assert 6 * length < expected.written < 6 * 4 * length
    # Within a hard step at most log2 of its length more places are tried.
    assert small.counters.decoded_tokens < expected.written + 6 * 4 * length


def test_where_steps_begin(tokenizer):
    text = "<think>3+4=7;7*2=14;</think>\\boxed{14}"
    ids = tokenizer.encode(text)
    at = starts(ids, tokenizer, [";", "</think>"])
    assert [tokenizer.decode(ids[a:b]) for a, b in zip(at, [*at[1:], len(ids)])] == [
        "<think>3+4=7;",
        "7*2=14;",
        "</think>",
        "\\boxed{14}",
    ]
    assert starts([], tokenizer, [";"]) == [] and starts(ids, tokenizer, ["?"]) == [0]
