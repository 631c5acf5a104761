import json
from itertools import islice

import pytest
from transformers import AutoTokenizer

from srlib.data import arith
from srlib.data.grade import grade
from srlib.params import Arith
from srlib.training import arith_pair

CONFIG = Arith(min_steps=1, max_steps=6)


@pytest.mark.parametrize("seed", [0, 1])
def test_problems_are_right_and_distinct(seed):
    batch = list(islice(arith.generate(CONFIG, "train", seed), 300))
    assert len({x.prompt for x in batch}) == 300
    for problem in batch:
        assert grade(problem.trace, problem.answer).correct
        right = arith.step_accuracy(problem.trace, problem.trace)
        assert all(a == n for a, n in right.values())
        assert sum(n for _, n in right.values()) == problem.meta["steps"]
        assert {o: n for o, (_, n) in right.items()} == {o: problem.meta["operations"].count(o) for o in "+-*"}


def test_the_dials_change_neither_problems_nor_what_else_is_drawn():
    """Off they change nothing; free choices change no number, and misconceptions no question, which a model still answers."""
    free = CONFIG.model_copy(update={"free_choices": 0.5})
    for plain, marked, believed in islice(
        zip(*(arith.generate(*how) for how in ((CONFIG, "test", 3), (free, "test", 3), (free, "test", 3, 1.0)))), 100
    ):
        assert plain.prompt == marked.prompt == believed.prompt and plain.answer == marked.answer
        assert (
            "".join(c for c in marked.trace if c not in arith.CHOICES[1:])
            .replace(";>", ";")
            .replace("<think>>", "<think>")
            == plain.trace
        )
        right = arith.step_accuracy(marked.trace, marked.trace)
        assert right == arith.step_accuracy(plain.trace, plain.trace) and all(a == n for a, n in right.values())
        as_sums = arith.step_accuracy(marked.trace, believed.trace)
        assert as_sums["+"] == right["+"] and as_sums["-"] == right["-"]
        assert grade(believed.trace, believed.answer).correct
        assert len(arith.hard_spans(marked.trace)) == right["*"][1]


def test_more_misconceptions_are_the_fewer_and_others():
    shares = [arith.misconceived(CONFIG, share) for share in (0.0, 0.25, 0.5, 1.0)]
    assert [len(factors) for factors in shares] == [0, 4, 7, 14]  # of 2 to 15
    assert shares[0] < shares[1] < shares[2] < shares[3] == set(range(2, 16))


def test_splits_never_share_a_problem():
    config = Arith(min_steps=1, max_steps=2)  # a small world, where a clash would be likely
    drawn = {
        split: {x.prompt for seed in range(3) for x in islice(arith.generate(config, split, seed), 400)}
        for split in arith.SPLITS
    }
    assert not drawn["train"] & drawn["test"]
    assert not drawn["train"] & drawn["traces"]
    assert not drawn["traces"] & drawn["test"]


def test_seed_decides():
    def first(seed):
        return list(islice(arith.generate(CONFIG, "test", seed), 20))

    assert first(0) == first(0) != first(1)


def test_tokenizer_saves_and_loads(tmp_path):
    made = arith.tokenizer()
    made.save_pretrained(tmp_path)
    arith_pair.model(CONFIG.small, len(made), 0).config.save_pretrained(tmp_path)  # it decides the tokenizer's class
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is type(made)
    assert json.loads(loaded.backend_tokenizer.to_str()) == json.loads(made.backend_tokenizer.to_str())
    printable = "".join(map(chr, range(32, 127)))
    for each in (made, loaded):
        assert each.encode(printable) == list(range(3, 98))
        assert each.decode(each.encode(f"{printable} 1 + 2")) == f"{printable} 1 + 2"
    for problem in islice(arith.generate(CONFIG, "test", 0), 50):
        ids = loaded.encode(problem.trace)
        assert ids == made.encode(problem.trace)
        assert loaded.decode(ids) == problem.trace
    assert len(loaded.encode("<think>1</think>")) == 3
    assert loaded.eos_token_id == made.eos_token_id == 0


def test_step_accuracy_counts_an_error_where_it_is_made():
    trace = "<think>2*3=6;6+1=7;</think>\\boxed{7}"
    counts = arith.step_accuracy(trace, "<think>2*3=5;5+1=6;</think>\\boxed{6}")
    assert counts == {"+": (1, 1), "-": (0, 0), "*": (0, 1)}
    assert arith.step_accuracy(trace, "nonsense;")["+"] == (0, 0)
