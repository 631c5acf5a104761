"""Stage 01: which parts of a trace the big model should write, and who is asked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from srlib.params.models import ModelSpec, Section
from srlib.params.own import OR_OWN, named
from srlib.params.secrets import Address, Variable
from srlib.params.written import Anything


class Judge(Section):
    """Who is asked which parts of a trace are hard: a server with the OpenAI protocol, or a model loaded here."""

    model: str = Field("", description="the server's name of its model")
    base_url: Address | None = Field(
        None, description="such as https://api.deepseek.com/v1; empty: of the environment variable OPENAI_BASE_URL"
    )
    key: Variable | None = Field(
        "OPENAI_API_KEY",
        description="environment variable that holds the key, never the key itself; empty: the server wants none",
    )
    local: ModelSpec | None = Field(None, description="a model that is loaded here, in place of a server")
    temperatures: list[float | None] = Field(
        [0.0, 0.3, 0.6],
        min_length=1,
        description="of the first request for a trace, and of those after a bad answer; null: the server's own, as "
        "some that reason take no other",
    )
    max_tokens: int = Field(8192, ge=16, description="longest answer, a reasoning judge's thinking included")
    max_tokens_retry: int | None = Field(
        None, ge=16, description="the same for requests after a bad answer, or one cut there; empty: max_tokens"
    )
    limit_by: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", description="what a request calls that limit; OpenAI's models that reason take the second alone"
    )
    extra_body: dict[str, Anything] = Field(
        {}, description="more of each request, as the server names it, such as {reasoning_effort: low}"
    )
    batch: bool = Field(
        False, description="ask by the provider's batch API (/files and /batches): up to a day, often half the price"
    )
    concurrency: int = Field(16, ge=1, description="requests under way at the same time")
    requests_per_minute: int = Field(0, ge=0, description="most that are sent in a minute; 0: no limit")
    retries: int = Field(
        6, ge=0, description="of a request that met what passes: 429, 5xx, a lost connection; the pause grows"
    )
    timeout_s: float = Field(300.0, gt=0, description="seconds a server may be silent")
    price_in: float = Field(0.0, ge=0, description="of a million tokens that are read, in any currency")
    price_cached: float | None = Field(
        None, ge=0, description="of a million of those that the server had in its cache; empty: as the others"
    )
    price_out: float = Field(0.0, ge=0, description="of a million tokens that are written, in the same")
    max_cost: float | None = Field(
        None, gt=0, description="a run that would cost more does not begin, or stops; in the currency of the prices"
    )

    @model_validator(mode="after")
    def _can_be_asked(self) -> Judge:
        if self.max_cost is not None and not self.price_in + self.price_out:
            raise ValueError("max_cost needs price_in and price_out, the prices of a million tokens")
        if self.max_tokens_retry is not None and self.max_tokens_retry < self.max_tokens:
            raise ValueError(f"max_tokens_retry {self.max_tokens_retry} is below max_tokens {self.max_tokens}")
        if self.max_tokens_retry is not None and len(self.temperatures) == 1:
            raise ValueError("max_tokens_retry needs a second of temperatures: it is for the requests after the first")
        fixed = {"model", "messages", "temperature", "max_tokens", "max_completion_tokens", "stream", "n"}
        if taken := fixed.intersection(self.extra_body):
            raise ValueError(f"extra_body holds {sorted(taken)[0]}, which the other settings and the reader decide")
        if self.local is not None and (self.batch or self.extra_body or None in self.temperatures):
            raise ValueError("batch, extra_body and a temperature of null need a server, and local is a model here")
        if self.local is not None and (self.model or self.base_url):
            raise ValueError("model and base_url name a server, and local a model here; leave one away")
        if self.local is not None and self.temperatures.count(0) > 1 and self.max_tokens_retry is None:
            raise ValueError("temperatures holds 0 more than once, where a model here writes the same answer again")
        return self


class Worth(Section):
    """How the worth of a step is measured: by what becomes of a trace where the small model goes on without it."""

    continuations: int = Field(8, ge=1, description="that the small model writes from each place between two steps")
    temperature: float = Field(1.0, gt=0, description="at which it writes them, in place of offload.temperature")
    jump: float = Field(
        0.5,
        ge=0,
        lt=1,
        description="share of the continuations right behind a step that end wrong without it; more, and it is hard",
    )


Method = Literal["gap", "judge", "random", "entropy", "worth", "given"]


class Annotate(Section):
    """Which parts of a trace the big model should write."""

    method: Annotated[Method, *OR_OWN] = Field(
        "gap",
        description="gap: where the big model is much surer; judge: what a judge names; random: anything; "
        "entropy: where the small model is unsure; worth: what it ends wrong without (minutes to hours); "
        "given: what the traces' own tags mark; path.py:name: a function of your own",
    )
    n_traces: int = Field(4000, ge=1, description="traces to annotate, drawn at random")
    tries: int = Field(0, ge=0, description="traces the big model writes until one is right; 0: they are given")
    temperature: float = Field(0.6, ge=0, description="at which it writes them, in place of offload.temperature")
    threshold: float = Field(0.5, gt=0, description="gap of log-probabilities, or entropy, that marks a token, in nats")
    share: float = Field(
        0.2, gt=0, le=1, description="of the tokens: what random marks in the mean, and a judge is asked for"
    )
    merge_gap: int = Field(0, ge=0, description="marks this many tokens apart, or fewer, become one span")
    max_span_tokens: int = Field(
        8,
        ge=1,
        description="longest span; a longer one is cut into spans that touch. offload.span_budget should hold it",
    )
    max_share: float = Field(0.3, gt=0, le=1, description="most of a trace that may be marked, in tokens")
    min_score: float = Field(0.85, gt=0.5, le=1, description="likeness from which a passage is what a judge quotes")
    batch_size: int = Field(128, ge=1, description="traces that a model reads at a time")
    compare: list[Literal["gap", "random", "entropy", "worth"]] = Field(
        ["random", "entropy"], description="annotators put beside the chosen one"
    )
    n_compare: int = Field(500, ge=1, description="traces on which they are compared, drawn at random")
    judge: Judge = Field(Judge(), description="who is asked with method judge")
    worth: Worth = Field(Worth(), description="how worth is measured")

    @model_validator(mode="after")
    def _someone_to_ask(self) -> Annotate:
        local = self.judge.local
        if self.method == "judge" and not self.judge.model and (local is None or local.path is None):
            raise ValueError("method judge needs judge.model, the name of a server's model, or judge.local.path")
        if self.tries > 1 and not self.temperature:
            raise ValueError(f"tries is {self.tries}, but at temperature 0 all of them are the same")
        asks = {"judge", "random"} & {self.method, *self.compare}
        if asks and self.share > self.max_share:
            raise ValueError(
                f"share {self.share} is above max_share {self.max_share}, and {' and '.join(sorted(asks))} may not mark "
                "it: lower the one or raise the other"
            )
        return self

    @property
    def methods(self) -> set[str]:
        """The annotators that mark something."""
        return {self.method, *self.compare}

    @property
    def engines(self) -> tuple[str, ...]:
        """The models of the pair that are loaded for it."""
        methods = self.methods
        mine = any(map(named, methods))
        small = "small" if mine or methods & {"gap", "entropy", "worth"} else None
        big = "big" if mine or "gap" in methods or self.tries else None
        return tuple(side for side in (small, big) if side)
