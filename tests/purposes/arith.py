"""The section `arith`."""

from itertools import islice

from srlib.data import arith
from tests.purposes import Case, shows


def problems(case: Case, n: int, changes: dict) -> list:
    return list(islice(arith.generate(case.params(changes).arith, "train", 0), n))


@shows("arith.min_steps")
def fewest_operations(case: Case) -> None:
    made = problems(case, 50, {"arith.min_steps": 5, "arith.max_steps": 6})
    assert {problem.meta["steps"] for problem in made} == {5, 6}


@shows("arith.max_steps")
def most_operations(case: Case) -> None:
    made = problems(case, 50, {"arith.max_steps": 4})
    assert {problem.meta["steps"] for problem in made} == {3, 4}
