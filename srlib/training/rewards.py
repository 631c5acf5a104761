"""What a rollout is paid for: small pure functions on one signature.

Each takes the rollouts of one batch, those of a prompt sharing a `group`, and gives one number
for each. A reward is their weighted sum; `PRESETS` name ready-made weights. Tokens are counted
in the completion alone, tags left out (the paper counts characters, of a text that includes
the prompt's hint).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

from srlib import SrlibError
from srlib.cost.latency import PairSpeed
from srlib.data.spans import CLOSE, OPEN
from srlib.params import Grpo, own, training


@dataclass(frozen=True)
class Rollout:
    """One completion and its counts."""

    text: str  # tags included, and a `<think>` that the prompt ends with
    correct: bool
    group: str  # of the prompt
    prompt_tokens: int
    small_tokens: int  # tags excluded
    big_tokens: int  # between the tags, whoever wrote them
    handovers: int
    well_formed: bool
    max_tokens: int
    tokens: int  # of the completion, tags included

    @property
    def share(self) -> float:
        total = self.small_tokens + self.big_tokens
        return self.big_tokens / total if total else 0.0


@dataclass(frozen=True)
class Targets:
    """What the rewards aim at."""

    speed: PairSpeed
    coverage: float = 0.4  # offload share at which `coverage` peaks
    overlong: float = 0.1  # last part of the budget in which length is punished


Reward = Callable[[Sequence[Rollout], Targets], list[float]]


def accuracy(rollouts: Sequence[Rollout], targets: Targets) -> list[float]:
    """1 for a right answer, else 0."""
    return [float(r.correct) for r in rollouts]


def scaffold(rollouts: Sequence[Rollout], targets: Targets) -> list[float]:
    """Paper, *format*: 1 for `<think>…</think>` and an answer behind it, and 1 for well-nested tags, also for none.

    Deviation: the paper pays for `<think>…</think><answer>…</answer>` alone, which neither R1 nor the arithmetic
    world writes; here the answer may also stand in a box, with words around it.
    """
    shape = re.compile(r"\s*<think>.*</think>.*(<answer>.*</answer>|\\boxed\s*\{.*\}).*", re.DOTALL)
    return [float(bool(shape.fullmatch(r.text))) + float(r.well_formed) for r in rollouts]


def tag_count(rollouts: Sequence[Rollout], targets: Targets) -> list[float]:
    """Paper, *tag count*, without its coverage term.

    0.5 for `<think>` and `</think>` each, 0.25 for `<answer>` and `</answer>` each, 0.5 for
    `\\boxed`, and floor(c / 2) for n offloading tags, c = n / 2 up to n = 8 and
    4 − (n − 8) / 2 above; −2 where opening and closing tags do not match in number.
    """
    worth = {"<think>": 0.5, "</think>": 0.5, "<answer>": 0.25, "</answer>": 0.25, "\\boxed": 0.5}
    rewards = []
    for r in rollouts:
        opened, closed = r.text.count(OPEN), r.text.count(CLOSE)
        n = opened + closed
        count = 0.5 * n if n <= 8 else 4 - 0.5 * (n - 8)
        total = sum(value for tag, value in worth.items() if tag in r.text) + count // 2
        rewards.append(total - 2.0 * (opened != closed))
    return rewards


def coverage(rollouts: Sequence[Rollout], targets: Targets) -> list[float]:
    """Paper, *coverage*: share r / 0.4 up to r = 0.4, then straight down to −1 at r = 1 (0.4 is a parameter)."""
    peak = targets.coverage
    return [r.share / peak if r.share <= peak else 1 - 2 * (r.share - peak) / (1 - peak) for r in rollouts]


def latency(rollouts: Sequence[Rollout], targets: Targets) -> list[float]:
    """Minus the seconds of this rollout relative to the big model writing all of it (latency model of `PairSpeed`).

    −1 costs as much as the big model alone; the small model alone is nearest to 0.
    """
    speed = targets.speed
    return [
        -speed.seconds(r.prompt_tokens, r.small_tokens, r.big_tokens, r.handovers)
        / max(speed.alone(r.prompt_tokens, r.small_tokens + r.big_tokens), 1e-12)
        for r in rollouts
    ]


def help_seeking(rollouts: Sequence[Rollout], targets: Targets) -> list[float]:
    """RelayLLM's group reward (arXiv 2601.05167).

    Where some member of the group is right without a call: 1.5 for right without, 1 − share for
    right with a call, 0 for wrong. Where only callers are right: those get 1 − share, and wrong
    without a call gets −1. Where nobody is right: the share, so that asking is tried.
    """
    groups = defaultdict(list)
    for r in rollouts:
        groups[r.group].append(r)

    def one(r: Rollout) -> float:
        right = [member for member in groups[r.group] if member.correct]
        if not right:
            return r.share
        if r.correct:
            return 1 - r.share if r.big_tokens else 1.5
        only_callers = all(member.big_tokens for member in right)
        return -1.0 if only_callers and not r.big_tokens else 0.0

    return [one(r) for r in rollouts]


def overlong(rollouts: Sequence[Rollout], targets: Targets) -> list[float]:
    """DAPO's soft punishment of long completions (arXiv 2503.14476, eq. 13), from TRL."""
    from trl.rewards import get_soft_overlong_punishment

    return [
        get_soft_overlong_punishment(r.max_tokens, max(1, int(targets.overlong * r.max_tokens)))([range(r.tokens)])[0]
        for r in rollouts
    ]


REWARDS: dict[str, Reward] = {
    f.__name__: f for f in (accuracy, scaffold, tag_count, coverage, latency, help_seeking, overlong)
}
PRESETS: dict[str, dict[str, float]] = {
    "offload": {"accuracy": 1.0, "latency": 0.25},
    "paper": {"accuracy": 1.0, "scaffold": 1.0, "tag_count": 1.0, "coverage": 2.0},
    "relay": {"help_seeking": 1.0},
}


def register(reward: Reward) -> Reward:
    """Pay for `reward` under its own name, in this process: for a cell of a notebook, before the params name it.

    For good, and where several processes train, a reward stands in a file, which the params name as `path.py:name`.

    Raises:
        SrlibError: it takes something else than rollouts and targets.
    """
    own.takes(reward, f"The reward {reward.__name__}", "rollouts", "targets")
    REWARDS[reward.__name__] = reward
    training.REGISTERED.add(reward.__name__)
    return reward


def named(name: str) -> Reward:
    """The reward of a name that `grpo.reward_weights` has.

    Raises:
        SrlibError: there is none, or one of one's own takes something else.
    """
    if not own.named(name):
        if name not in REWARDS:
            raise SrlibError(
                f"The reward {name} was registered in another process; name it by its file, as path.py:{name}."
            )
        return REWARDS[name]
    found: Reward = own.load(name)
    own.takes(found, f"The reward {name}", "rollouts", "targets")
    return found


def pay(name: str, rollouts: Sequence[Rollout], targets: Targets) -> list[float]:
    """What a reward gives, one finite number for each rollout.

    Raises:
        SrlibError: it gives something else.
    """
    given = named(name)(rollouts, targets)
    try:
        paid = [float(value) for value in given]
    except (TypeError, ValueError):
        raise SrlibError(f"The reward {name} gave {given!r}, which is no list of numbers.") from None
    if len(paid) != len(rollouts):
        raise SrlibError(f"The reward {name} gave {len(paid)} numbers for {len(rollouts)} rollouts.")
    if wrong := [value for value in paid if not isfinite(value)]:
        raise SrlibError(f"The reward {name} gave {wrong[0]}, which is no finite number.")
    return paid


def weights(config: Grpo) -> dict[str, float]:
    """Weight of each reward: those of the preset, with `reward_weights` laid over them."""
    return {**PRESETS[config.preset], **config.reward_weights}
