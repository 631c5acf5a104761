"""What is measured: stage 05 and `srlib bench`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from srlib.params.models import Section
from srlib.params.own import OR_OWN

Alone = Literal["small", "big"]
Trained = Literal["learned", "grpo", "learned_off", "rejection"]
Doubting = Literal["entropy", "margin", "confidence"]
ByStep = Literal["glimpse", "specreason"]
PolicyName = Literal[Alone, Trained, "random", Doubting, "speculative", ByStep]


class Evaluate(Section):
    """Accuracy against offload share."""

    protocol: Literal["own", "published", "quick"] = Field(
        "own",
        description="own: as set here and in offload; published: as accuracies are published; quick: for a look; "
        "see srlib/data/benchmarks.py",
    )
    n_problems: int = Field(
        1000, ge=2, description="unseen problems, drawn at random; of a set on the hub the other protocols decide it"
    )
    samples_per_problem: int = Field(
        1, ge=1, description="traces each policy writes for a problem, where the protocol does not decide it"
    )
    n_refused: int = Field(
        300, ge=0, description="problems in which each request of the policy learned is refused once; 0: none"
    )
    policies: list[Annotated[PolicyName, *OR_OWN]] = Field(
        [name for name in get_args(PolicyName) if name not in get_args(ByStep)],
        min_length=1,
        description="each model alone; tuned; reinforced; tuned but never answered; baselines, two of them by step (glimpse, "
        "specreason), and path.py:name, a class of your own; in any order",
    )
    random_shares: list[float] = Field(
        [0.05, 0.1, 0.2, 0.4, 0.7],
        description="random: probabilities with which the big model writes; a row for each, and one more at learned's share",
    )
    random_chunk: int = Field(4, ge=1, description="random: tokens that one model writes in a row")
    rejections: list[float] = Field(
        [0.25, 0.5, 0.75], description="rejection: probabilities with which a request is refused; a row for each"
    )
    chunks: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 2, 4],
        min_length=1,
        description="entropy, margin, confidence: tokens the big model writes in a row; the best of these is taken",
    )
    n_tuned: int = Field(
        200,
        ge=2,
        description="entropy, margin, confidence, glimpse, specreason: problems to train on, by which their thresholds and "
        "chunks are chosen",
    )
    draft_tokens: int = Field(4, ge=1, description="speculative: tokens the small model drafts")

    @model_validator(mode="after")
    def _rows(self) -> Evaluate:
        for name in ("random_shares", "rejections"):
            named: dict[str, float] = {}
            for value in getattr(self, name):
                if not 0 < value < 1:
                    raise ValueError(f"{name} holds {value}, which is not between 0 and 1")
                if (row := f"{value:.2f}") in named:
                    raise ValueError(f"{name} holds {named[row]} and {value}, whose rows would both be called {row}")
                named[row] = value
        return self


class Bench(Section):
    """What `python -m srlib bench` measures."""

    policies: list[Literal["learned", "random", "speculative"]] = Field(
        ["learned", "random", "speculative"], description="beside each model alone"
    )
    batch_sizes: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 16, 64], description="as offload.batch_size, one after the other; empty: only cost_ratios are measured"
    )
    repeats: int = Field(3, ge=1, description="runs whose median is taken, after one to warm up")
    max_tokens: int = Field(64, ge=2, description="most tokens of a trace (07: if offload has not fewer)")
    traces_per_slot: int = Field(2, ge=1, description="traces of a run, for each of the batch's places")
    min_traces: int = Field(16, ge=1, description="traces at least; of a few, random may give none to the big model")
    random_share: float = Field(0.05, gt=0, lt=1, description="probability with which random has the big model write")
    random_chunk: int = Field(16, ge=1, description="tokens one owner writes in a row under random")
    draft_tokens: int = Field(4, ge=1, description="tokens the small model drafts in speculative decoding")
    cost_ratios: list[Annotated[float, Field(ge=1)]] = Field(
        [],
        description="seconds of a token of the big model over those of the small one, which inert layers behind it "
        "give it, for the measured speed-up; empty: not measured",
    )
    speed_batches: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 16], min_length=1, description="cost_ratios, and 07: as batch_sizes"
    )
    speed_traces: int = Field(12, ge=1, description="cost_ratios: traces of a run at least, and four for each place")
    stream_chunk: int = Field(16, ge=0, description="cost_ratios, and 07: as offload.stream_chunk")
    peek_tokens: int = Field(
        8, ge=1, description="cost_ratios, and 07: tokens the public code's way generates to look for a closing tag"
    )
