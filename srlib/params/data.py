"""Where problems come from, and the arithmetic world, whose problems and models are made here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from srlib.params.models import Section
from srlib.params.paths import find
from srlib.params.written import Plain


class ArithModel(Section):
    """One model of the arithmetic pair, Qwen2 architecture, and how long it is trained."""

    hidden_size: int = Field(32, ge=8, description="numbers that stand for a token; a multiple of the heads")
    num_hidden_layers: int = Field(3, ge=1, description="layers of the model")
    num_attention_heads: int = Field(1, ge=1, description="heads of each layer; 32 numbers a head suit every engine")
    intermediate_size: int = Field(64, ge=8, description="numbers inside a layer's feed-forward part")
    train_steps: int = Field(800, ge=1, description="steps of training, each on arith.batch_size fresh problems")
    learning_rate: float = Field(1e-2, gt=0, description="highest, after 20 steps; from there straight down to 0")
    misconceptions: float = Field(
        0.0,
        ge=0,
        le=1,
        description="share of the factors with which this model learns a product as if it were a sum: wrong, and sure of it",
    )

    @model_validator(mode="after")
    def _heads_divide(self) -> ArithModel:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class Arith(Section):
    """The arithmetic world: how hard its problems are, how many, and the two models."""

    min_steps: int = Field(3, ge=1, le=20, description="fewest operations of a problem")
    max_steps: int = Field(5, ge=1, le=20, description="most operations of a problem")
    product_share: float = Field(0.4, ge=0, le=1, description="probability that an operation is a product")
    max_factor: int = Field(
        15, ge=2, le=99, description="largest factor on the right of a product; on the left is a result, below 100"
    )
    free_choices: float = Field(
        0.0,
        ge=0,
        le=1,
        description="probability that a step begins with a mark, one of four that are equally good: unsure, and nothing at stake",
    )
    n_traces: int = Field(4000, ge=1, description="worked traces written for annotation")
    n_test: int = Field(1000, ge=1, description="unseen problems written for evaluation")
    batch_size: int = Field(32, ge=1, description="problems of a training step")
    small: ArithModel = Field(ArithModel(), description="the small model, and how long it is trained")
    big: ArithModel = Field(
        ArithModel(
            hidden_size=96,
            num_hidden_layers=3,
            num_attention_heads=3,
            intermediate_size=256,
            train_steps=1100,
            learning_rate=5e-3,
        ),
        description="the big model, and how long it is trained",
    )

    @model_validator(mode="after")
    def _steps_ordered(self) -> Arith:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps {self.min_steps} is above max_steps {self.max_steps}")
        return self


class Source(Section):
    """Where problems come from; in the params a plain string is its `path`."""

    path: str = Field(min_length=1, description="a JSONL file, a set on the hub, or a name of srlib/data/benchmarks.py")
    config: str | None = Field(None, description="hub: configuration of the data set; empty: of a named set its own")
    split: str | None = Field(
        None, description="hub: its split; empty: train, or of a named set its own. arith: train, traces or test"
    )
    revision: str | None = Field(
        None, min_length=1, description="hub: branch, tag or commit of the data set; empty: the newest"
    )
    columns: dict[Literal["id", "prompt", "answer", "trace", "correct"], str] = Field(
        {},
        description="field: its column, of text or of messages; empty: columns are named like the fields. A named set has its own",
    )
    prompt: str = Field("", description="plain, boxed, base, or a text with {question}; empty: asked as it is")
    _world: Arith = PrivateAttr(Arith())  # of the set arith

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        return {"path": str(given)} if isinstance(given, str | Path | Plain) else given

    @property
    def file(self) -> Path | None:
        """The JSONL file, seen from here or from the clone; None: a data set on the hub."""
        behind = self.path.partition(":")[2] or self.path  # of a benchmark's name
        found = find(self.path) or find(behind)
        return found or (Path(behind) if behind.endswith(".jsonl") else None)


class Data(Section):
    """Problems; empty: what stage 00 writes."""

    traces: Source | None = Field(
        None, description="worked traces to annotate, and problems for rollouts; a plain text is its path"
    )
    test: Source | None = Field(None, description="unseen problems; a plain text is its path")
    decontaminate: int = Field(
        13,
        ge=0,
        description="words in a row that no problem of traces may share with one of test, spaces, signs and case left out; "
        "one that does is dropped. 0: not looked for, as in the arithmetic world, whose splits share none",
    )
