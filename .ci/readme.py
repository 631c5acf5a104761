"""README.md's figures, from the files in outputs/reference/: `python .ci/readme.py` writes them, `--check` compares.

What stands between `<!-- made: NAME -->` and `<!-- end -->` is made by the function of that name in `MADE`.
A file that is not there leaves its place empty, but for results.json and manifest.json, which have to be.
Outside of these places README.md has no figure that a run could have measured: `FIGURE` says what counts as one.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import yaml
from check_results import claims
from scipy import stats

from srlib.evaluation.claims import UNTRAINED, accuracy, at_share, percent, points

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "outputs" / "reference"
PLACE = re.compile(r"(<!-- made: ([\w ]+) -->)(.*?)(<!-- end -->)", re.DOTALL)
# Percentages, points, multiples, durations; intervals; n and p. In code, which is left out, they are settings.
UNITS = "%|per ?cent|points|times|seconds|minutes|hours|tokens (a|per) second"
FIGURE = re.compile(rf"[\d½¼] ?({UNITS})|\[[-+−]?[\d.]+, [-+−]?[\d.]+\]|\b[np] ?[=<] ?\d")
SETTINGS = ("95 %",)  # the level of every interval
CODE = re.compile(r"```.*?```|`[^`\n]+`", re.DOTALL)
MEND = "`make reference` makes it"


class Kept(dict[Any, Any]):
    """An object of a file. That it lacks a key is told in one sentence."""

    def __init__(self, file: str, values: dict[Any, Any]) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, key: Any) -> NoReturn:
        sys.exit(f"outputs/reference/{self.file}: {self.name} has no {key!r}; {MEND}")

    @property
    def name(self) -> str:
        return " ".join(str(self[key]) for key in ("label", "batch", "policy") if key in self) or "it"


def there(name: str) -> bool:
    return (REFERENCE / name).is_file()


def read(name: str) -> Any:
    """A file of outputs/reference/."""
    if not there(name):
        sys.exit(f"outputs/reference/{name} is not there; {MEND}")
    return json.loads((REFERENCE / name).read_text(), object_hook=partial(Kept, name))


def alike(rows: Sequence[Kept]) -> list[Kept]:
    """Rows of a table, each with all that the others have: keys, and as many numbers in each list.

    What a sweep tries, its `values`, may be of any shape.
    """

    def shape(key: str, value: Any) -> Any:
        return _shape(dict.fromkeys(value) if key == "values" else value)

    shapes: dict[str, list[Any]] = {}
    for row in rows:
        for key, value in row.items():
            shapes.setdefault(key, []).append(shape(key, value))
    for row in rows:
        for key, found in shapes.items():
            if shape(key, row[key]) != (usual := max(found, key=found.count)):
                sys.exit(f"outputs/reference/{row.file}: {row.name} has {row[key]!r} as {key!r}, not {usual}; {MEND}")
    return list(rows)


def _shape(value: Any) -> Any:
    """What lists and objects hold: a number, a text, nothing."""
    if isinstance(value, list):
        return [_shape(part) for part in value]
    if isinstance(value, dict):
        return {key: _shape(part) for key, part in value.items()}
    return "number" if isinstance(value, int | float) else type(value).__name__


def results() -> Kept:
    """Rows by policy."""
    return Kept("results.json", {row["policy"]: row for row in alike(read("results.json"))})


# -- what stands in the places -------------------------------------------------------------------


def setting(row: Kept, *, greedy: bool = False) -> str:
    """On what an accuracy was measured."""
    k = row["samples_per_problem"]
    samples = f"{'one' if k == 1 else k} {'greedy ' if greedy else ''}sample{'s' if k > 1 else ''} each"
    return f"n = {row['n_problems']:,} unseen problems, {samples}, at most {row['max_tokens']} tokens, 95 % intervals"


def caption() -> str:
    rows = results()
    greedy = read("manifest.json")["stages"]["05_evaluate"]["parameters"]["offload"]["temperature"] == 0
    untrained = max((rows[name] for name in UNTRAINED), key=lambda row: row["accuracy"])
    made = list(claims(rows))
    failed = sum(not claim.holds for claim in made)
    return (
        f"*Arithmetic traces, {setting(rows['learned'], greedy=greedy)}. "
        f"The small model alone is right on {accuracy(rows['small'])}, the big one on {accuracy(rows['big'])}; "
        f"both together, by the learned policy, on {accuracy(rows['learned'])}, "
        f"with {percent(rows['learned']['offload_share'])} of the tokens written by the big one; "
        f"with random offloading at that share on {accuracy(rows['random_matched'])}; "
        f"reinforced, on {at_share(rows['grpo'])}. Asked where the untrained small model is unsure, by the best of three "
        f"measures ({untrained['policy']}), the big one brings it to {at_share(untrained)}. "
        f"{'All' if not failed else f'All but {failed}'} of the {len(made)} claims [below](#what-it-shows) hold here. "
        "All figures: [results.json](outputs/reference/results.json).*"
    )


def shown() -> str:
    return "\n".join(f"- {c.words}: {verdict(c.holds)} · {c.found}" for c in claims(results()))


def verdict(holds: bool | None) -> str:
    return {True: "**holds here**", False: "**does not hold here**", None: "**cannot be told here**"}[holds]


def minutes(stage: str) -> str:
    return f"{read('manifest.json')['stages'][stage]['seconds'] / 60:.1f}"


def machine() -> str:
    """Where the run was made; runs of before machines were recorded have none."""
    found = {json.dumps(stage.get("machine")) for stage in read("manifest.json")["stages"].values()}
    return "; ".join(sorted(on(json.loads(text)) for text in found if text != "null")) or "machine not recorded"


def on(where: dict[str, Any]) -> str:
    return f"{where['cpu']}, {where['cores']} cores"


class More(NamedTuple):
    """Expected: one row of a sweep has more of something than another; rows are told by place of value, and policy."""

    words: str
    one: tuple[int, str]
    other: tuple[int, str]
    of: str = "accuracy"


class Falls(NamedTuple):
    """Expected: as the value rises, a policy has less of something."""

    words: str
    policy: str
    of: str = "accuracy"


EXPECTED: dict[str, list[More | Falls]] = {
    "latency": [
        Falls("The higher the price of time, the less is handed over", "grpo", "offload_share"),
        More("The highest one costs accuracy", (0, "grpo"), (-1, "grpo")),
    ],
    "credit": [
        More("Reinforcement gains accuracy over fine-tuning", (0, "grpo"), (0, "learned")),
        More("It gains more where going on is credited, too", (0, "grpo"), (1, "grpo")),
    ],
    "rollout": [
        More("Reinforcement with a big model that answers ends higher than without", (0, "grpo"), (1, "grpo")),
        More("Without, it unlearns what fine-tuning has taught", (1, "learned"), (1, "grpo")),
    ],
    "preset": [
        More("This project's reward ends higher than the paper's", (0, "grpo"), (1, "grpo")),
        More("It ends higher than RelayLLM's", (0, "grpo"), (2, "grpo")),
    ],
    "annotator": [
        More(
            "What both models' probabilities mark teaches more than what entropy marks", (0, "learned"), (1, "learned")
        ),
        More("It teaches more than random marks", (0, "learned"), (2, "learned")),
    ],
    "threshold": [
        Falls("The higher the threshold, the less is handed over", "learned", "offload_share"),
        Falls("The higher the threshold, the lower the accuracy", "learned"),
    ],
    "merge_gap": [
        More("Fine-tuned on coarse marks alone, it hands over more", (1, "learned"), (0, "learned"), "offload_share"),
        More("It is right less often for it", (0, "learned"), (1, "learned")),
        More("Reinforcement earns where marks are coarse", (1, "grpo"), (1, "learned")),
        More("Reinforcement earns where they are fine", (0, "grpo"), (0, "learned")),
    ],
    "tag_init": [
        More("Tags that begin as signs are written sooner", (1, "learned"), (0, "learned"), "offload_share"),
        More("So they are where both begin as =", (2, "learned"), (0, "learned"), "offload_share"),
    ],
}
POLICIES = {"learned": "fine-tuned", "grpo": "reinforced"}


def named() -> list[str]:
    """The sweeps that README.md names."""
    return list(dict.fromkeys(re.findall(r"params/ablations/(\w+)\.yaml", (ROOT / "README.md").read_text())))


def sweeps() -> str:
    """Each of them whose table is there."""
    return "\n\n".join(sweep(name) for name in named() if there(f"{name}.json"))


def sweep(name: str) -> str:
    """A sweep: what it varies, its table, and what was expected of it."""
    rows = Kept(f"{name}.json", {(row["label"], row["policy"]): row for row in alike(read(f"{name}.json"))})
    about = yaml.safe_load((ROOT / "params" / "ablations" / f"{name}.yaml").read_text())["about"]
    labels = list(dict.fromkeys(label for label, _ in rows))
    shown = [policy for policy in POLICIES if (labels[0], policy) in rows]
    first = rows[labels[0], shown[0]]
    seeds = len(first["by_seed"])
    figure = f"{name}_front.png"
    drawn = f", [figure](outputs/reference/{figure})" if there(figure) else ""
    table = [["", *(POLICIES[policy] for policy in shown)], ["---"] * (1 + len(shown))]
    table += [[label, *(at_share(rows[label, policy]) for policy in shown)] for label in labels]
    lines = [
        f"**{name}.** {about}",
        "",
        *("| " + " | ".join(cells) + " |" for cells in table),
        "",
        f"*Accuracy, and the share of tokens handed over: {setting(first)} clustered by "
        f"{'training seed and ' if 'n_seeds' in first else ''}problem, {seeds} training "
        f"seed{'s' if seeds > 1 else ''} pooled. [Figures](outputs/reference/{name}.json){drawn}.{older(name)}*",
        "",
    ]
    return "\n".join([*lines, *(f"- {sentence(e, rows, labels)}" for e in EXPECTED.get(name, []))]).rstrip()


def older(name: str) -> str:
    """A warning, where other code made a sweep than the run; settings that were other ones then are code's, too."""
    made = read("made.json") if there("made.json") else {}
    code, of_the_run = (made[each]["code"] if each in made else {} for each in (name, "run"))
    if code and all(of_the_run.get(stage, digest) == digest for stage, digest in code.items()):
        return ""
    return " **Older than the run above, by another version of the code and of the default run; `make reference` renews it.**"


def sentence(expected: More | Falls, rows: Kept, labels: list[str]) -> str:
    """What was expected, whether it came, and by how much: training seeds are the units."""
    which = ("accuracy", "offload_share").index(expected.of)

    def seeds(label: str, policy: str) -> list[float]:
        return [point[which] for point in rows[label, policy]["by_seed"]]

    if isinstance(expected, Falls):
        holds, found = falls([seeds(label, expected.policy) for label in labels])
    else:
        pair = [seeds(labels[place], policy) for place, policy in (expected.one, expected.other)]
        holds, found = more([one - other for one, other in zip(*pair, strict=True)])
    return f"{expected.words}: {verdict(holds)} · {found}"


def falls(columns: list[list[float]]) -> tuple[bool | None, str]:
    """Page's (1963) test of an ordered alternative. Args: columns: by value, rising; in each one number a seed."""
    table = np.array(columns).T
    means = ", ".join(f"{100 * mean:.1f}" for mean in table.mean(0))
    if table.shape[0] < 2 or table.shape[1] < 3:
        return None, f"{means} %"
    down, up = (stats.page_trend_test(ordered).pvalue for ordered in (table[:, ::-1], table))
    p = f"= {down:.2g}" if down >= 0.001 else "< 0.001"
    return told(down, up), f"{means} % (means over {len(table)} seeds; Page's trend test, p {p})"


def more(each: list[float]) -> tuple[bool | None, str]:
    """Student's t over the differences of the seeds."""
    mean, by_seed = sum(each) / len(each), ", ".join(f"{100 * value:+.1f}" for value in each).replace("-", "−")
    if len(set(each)) < 2:
        return None, f"{by_seed} points"
    test = stats.ttest_1samp(each, 0)
    above, below = (stats.ttest_1samp(each, 0, alternative=side).pvalue for side in ("greater", "less"))
    found = points(mean, test.confidence_interval())
    return told(above, below), f"{found} over {len(each)} seeds ({by_seed})"


def told(expected: float, opposite: float) -> bool | None:
    """What two one-sided p-values say at 2.5 % each; None: nothing."""
    return True if expected < 0.025 else False if opposite < 0.025 else None


def bench() -> str:
    if not there("bench.json"):
        return ""
    found = read("bench.json")
    rows = alike([row for row in found["rows"] if row["policy"] != "generate"])
    plain = alike([row for row in found["rows"] if row["policy"] == "generate"])
    table = [
        "| pair and policy | batch | efficiency | with the reading counted as work | controller |",
        "|---" * 5 + "|",
    ]
    mixed = [row for row in rows if row["policy"] not in ("small", "big")]
    for policy in dict.fromkeys(row["policy"] for row in mixed):
        own = [row for row in mixed if row["policy"] == policy]
        cells = [("batch", "d"), ("efficiency", ".2f"), ("with_reading", ".2f"), ("controller_share", ".1%")]
        texts = [", ".join(f"{row[key]:{form}}" for row in own).replace("%", " %") for key, form in cells]
        table.append(f"| arithmetic, {policy} | {' | '.join(texts)} |")
    how = found["settings"]
    ours = {row["batch"]: 1 / row["speed"] for row in plain}
    checks = ", ".join(f"{check['one_pass']:.2f}" for check in alike(found["closing_check"]))
    return "\n".join(
        [
            *table,
            "",
            f"*{on(found['machine'])}; the settings of params/cpu.yaml, at most {how['max_tokens']} tokens a trace, "
            f"{how['traces_per_slot']} traces a place and at least {how['min_traces']}, medians of {how['repeats']} "
            f"rounds; with a batch of {', '.join(str(row['batch']) for row in own)} there are "
            f"{', '.join(str(row['under_way']) for row in own)} traces under way. At most "
            f"{percent(max(row['reread_share'] for row in mixed))} of the tokens were read twice. The small model alone "
            f"writes {', '.join(f'{value:.2f}' for value in ours.values())} times as many tokens a second as `generate`; "
            f"to ask at each token whether the big model should end takes {checks} times a pass that only reads. "
            "Figures: [bench.json](outputs/reference/bench.json).*",
        ]
    )


MADE: dict[str, Callable[..., str]] = {f.__name__: f for f in (caption, shown, minutes, machine, sweeps, bench)}


# -- README.md -----------------------------------------------------------------------------------


def made(place: re.Match[str]) -> str:
    """A place with what belongs into it: on lines of its own, if it stands on lines of its own."""
    name, *arguments = place[2].split()
    if name not in MADE:
        sys.exit(f"README.md: nothing makes {name!r}; there are {', '.join(MADE)}")
    text = MADE[name](*arguments)
    return f"{place[1]}\n{text}\n{place[4]}" if place[3].startswith("\n") else f"{place[1]}{text}{place[4]}"


def stray(text: str) -> tuple[int, str] | None:
    """Line and text of the first figure that no file is behind."""
    blank = partial(re.sub, r"[^\n]", " ")
    for hidden in (PLACE, CODE):
        text = hidden.sub(lambda found: blank(found[0]), text)
    for allowed in SETTINGS:
        text = text.replace(allowed, " " * len(allowed))
    found = FIGURE.search(text)
    if not found:
        return None
    line = text.count("\n", 0, found.start()) + 1
    return line, text.splitlines()[line - 1].strip()[:120]


def main(check: bool) -> None:
    path = ROOT / "README.md"
    is_ = path.read_text()
    marks = [is_.count("<!-- made:"), is_.count("<!-- end -->"), len(PLACE.findall(is_))]
    if len(set(marks)) > 1:
        sys.exit(f"README.md: {marks[0]} places begin and {marks[1]} end; each is <!-- made: NAME --> … <!-- end -->")
    if found := stray(is_):
        sys.exit(f"README.md, line {found[0]}: a figure that no file in outputs/reference/ is behind: {found[1]}")
    if not check:
        path.write_text(PLACE.sub(made, is_))
        return
    for place in PLACE.finditer(is_):
        line = is_.count("\n", 0, place.start())
        pairs = zip(f"{place[0]}\n".split("\n"), f"{made(place)}\n".split("\n"))
        for number, (one, other) in enumerate(pairs, line + 1):
            if one != other:
                sys.exit(f"README.md, line {number}: {one!r} is {other!r} by outputs/reference/; run .ci/readme.py")


if __name__ == "__main__":
    main("--check" in sys.argv[1:])
