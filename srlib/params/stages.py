"""A section of the params file for each stage and each command: names, types, limits, and what they are."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PrivateAttr, model_validator

from srlib.params.models import ModelSpec, Section
from srlib.params.names import unknown
from srlib.params.own import OR_OWN, named
from srlib.params.paths import find
from srlib.params.secrets import Address, Variable
from srlib.params.written import Anything, Plain


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


class Sft(Section):
    """Fine-tuning on annotated traces, by a LoRA adapter."""

    annotated: str | None = Field(
        None, min_length=1, description="a JSONL file of annotated traces of your own, in place of what 01 writes"
    )
    tags: Literal["token", "plain"] = Field(
        "token", description="a tag is one added token, or plain text; the embeddings it is written with are trained"
    )
    lora_rank: int = Field(16, ge=1, description="rank of the adapter's matrices")
    lora_alpha: int = Field(32, ge=1, description="the adapter is scaled by lora_alpha / lora_rank")
    epochs: float = Field(3, gt=0, description="times every trace is trained on")
    batch_size: int = Field(32, ge=1, description="traces that a step is trained on, by all processes together")
    processes: int = Field(1, ge=1, description="that share a step's batch, on cuda:0 and on or all on the CPU")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="parts in which a process works through its share of the batch"
    )
    gradient_checkpointing: bool = Field(False, description="keep less of the forward pass, and compute it again")
    learning_rate: float = Field(
        3e-3, gt=0, description="highest; after the warm-up down along a cosine, to 0 behind the last step"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="part of the steps in which the learning rate rises")
    max_length: int = Field(1024, ge=16, description="most tokens of a prompt and its trace; longer ones are left out")
    n_validation: int = Field(
        0, ge=0, description="annotated traces held out, whose loss is taken each time that of training is logged"
    )
    save_steps: int = Field(
        50,
        ge=1,
        description="steps between checkpoints, at a step whose loss is logged; the last is kept, for a killed run",
    )
    report_to: str = Field(
        "none",
        description="tracker that is told the log, such as tensorboard (in the stage's folder), wandb, trackio: what "
        "transformers' report_to takes; each is a package of its own",
    )
    trainer: dict[str, Anything] = Field(
        {}, description="more arguments of TRL's SFTConfig, such as {weight_decay: 0.01}"
    )
    lora: dict[str, Anything] = Field({}, description="more arguments of PEFT's LoraConfig, such as {use_dora: true}")
    n_watch: int = Field(256, ge=1, description="unseen problems on which the tuned model is watched")

    @model_validator(mode="after")
    def _parts_alike(self) -> Sft:
        if self.batch_size % (parts := self.processes * self.gradient_accumulation_steps):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of processes × gradient_accumulation_steps = {parts}"
            )
        return self


ModelSize = Literal["1.5B", "7B", "8B", "14B", "32B", "70B"]
GpuName = Literal["a6000", "rtx4090", "l40s", "a100", "h100", "h200"]


class Latency(Section):
    """Where the seconds of the latency model come from."""

    source: Literal["a6000", "calibrate", "roofline"] = Field(
        "a6000",
        description="of the seconds in the reward of 03: a named table, measured on this machine, or the data sheet "
        "of a GPU",
    )
    small: ModelSize = Field("1.5B", description="a6000, roofline, and 07: the model that stands for the small one")
    big: ModelSize = Field("32B", description="a6000, roofline, and 07: the model that stands for the big one")
    gpu: GpuName = Field("h100", description="roofline, and 07: the GPU whose data sheet it is")
    devices: int = Field(1, ge=1, description="roofline, and 07: GPUs that share every layer of the big model")
    handover_s: float = Field(
        0.0, ge=0, description="seconds a hand-over costs on top, to the big model and back; 07: in what is simulated"
    )
    prompt: int = Field(512, ge=1, description="07: tokens of a prompt in what is simulated")
    decode: int = Field(4096, ge=16, description="07: tokens of a trace")
    span: int = Field(128, ge=1, description="07: tokens the big model writes in a row")
    gpu_hour: float = Field(2.0, gt=0, description="07: price of a GPU for an hour, in any currency")
    gpus: list[Annotated[int, Field(ge=1)]] = Field(
        [1, 8, 1000], min_length=1, description="07: numbers of GPUs to plan for"
    )
    n_check: int = Field(12, ge=1, description="07: problems on which prediction and clock are compared")


REWARD_NAMES = ("accuracy", "scaffold", "tag_count", "coverage", "latency", "help_seeking", "overlong")


REGISTERED: set[str] = set()  # names of others, given in a notebook; see `srlib.training.rewards.register`


class Grpo(Section):
    """Reinforcement of the tuned small model, by TRL's GRPO."""

    rollout: Literal["true_offload", "self"] = Field(
        "true_offload",
        description="the big model answers in the rollouts, or the small one writes it all, as in the paper",
    )
    preset: Literal["offload", "paper", "relay"] = Field("offload", description="ready-made weights of the rewards")
    reward_weights: dict[str, float] = Field(
        {},
        description=f"laid over those of the preset, for each of {', '.join(REWARD_NAMES)}, and path.py:name, a function of "
        "your own; scale_rewards decides what a weight does",
    )
    coverage_target: float = Field(0.4, gt=0, lt=1, description="offload share at which the reward coverage is highest")
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = Field(
        "sum_then_normalize",
        description="advantages of the weighted sum of rewards, or of each reward in its group, weighted and summed",
    )
    n_problems: int = Field(4000, ge=1, description="problems that rollouts are written for, drawn at random")
    max_steps: int = Field(100, ge=1, description="steps of training")
    batch_size: int = Field(
        128, ge=2, description="rollouts a step, of all processes together; a multiple of num_generations"
    )
    num_generations: int = Field(8, ge=2, description="rollouts of one problem, which are compared with each other")
    gradient_accumulation_steps: int = Field(
        1, ge=1, description="parts in which a process works through its share of the batch"
    )
    gradient_checkpointing: bool = Field(False, description="keep less of the forward pass, and compute it again")
    rollouts_at_once: int = Field(0, ge=0, description="written at the same time by a process; 0: offload.batch_size")
    use_vllm: bool = Field(False, description="vLLM writes the small model's part of the rollouts")
    vllm_url: Address | None = Field(
        None, description="use_vllm: a server of the small model; empty: loaded beside training, in each process"
    )
    vllm_kv_cache_gb: float | None = Field(None, gt=0, description="use_vllm: size of the KV cache in GiB")
    processes: int = Field(
        1, ge=1, description="that share a step's batch, each with both models, on cuda:0 and on or all on the CPU"
    )
    learning_rate: float = Field(
        2e-4,
        gt=0,
        description="highest, after a tenth of the steps, at most 5; from there straight down, to 0 behind the last",
    )
    temperature: float = Field(
        1.0,
        gt=0,
        description="of the small model in rollouts, which draws from all tokens there; the big one draws as offload says",
    )
    credit_waiting: bool = Field(
        True,
        description="true_offload, tags that are tokens: at each token of the big model the decision not to take control "
        "back is reinforced as taking it is; else only the latter",
    )
    beta: float = Field(0.0, ge=0, description="weight of the KL to the policy of stage 02")
    loss_type: Literal["grpo", "dr_grpo", "dapo"] = Field(
        "dapo",
        description="how tokens' losses are averaged: grpo: in each rollout, then over those; dapo: over all tokens of "
        "the step; dr_grpo: their sum by the rollouts times offload.max_tokens",
    )
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "none",
        description="whose standard deviation advantages are divided by; none, batch: a reward counts in proportion to its "
        "weight, so that a price is a price; group: where one alone differs in a group, any weight of it does the same",
    )
    save_steps: int = Field(50, ge=1, description="steps between checkpoints, of which the last is kept")
    report_to: str = Field(
        "none",
        description="tracker that is told the log, such as tensorboard (in the stage's folder), wandb, trackio: what "
        "transformers' report_to takes; each is a package of its own",
    )
    trainer: dict[str, Anything] = Field(
        {}, description="more arguments of TRL's GRPOConfig, such as {epsilon_high: 0.28}"
    )
    sample_every: int = Field(10, ge=1, description="steps between completions kept in samples.jsonl")

    @model_validator(mode="after")
    def _consistent(self) -> Grpo:
        whole = self.num_generations * self.processes  # a group is written by one process
        if self.batch_size % whole:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of num_generations × processes = {whole}")
        if self.batch_size % (parts := self.processes * self.gradient_accumulation_steps):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of processes × gradient_accumulation_steps = {parts}"
            )
        if not self.use_vllm and (self.vllm_url or self.vllm_kv_cache_gb):
            raise ValueError("vllm_url and vllm_kv_cache_gb need use_vllm: true")
        if self.n_problems < (groups := self.batch_size // self.num_generations):
            raise ValueError(f"n_problems {self.n_problems} is below the {groups} that a step has rollouts of")
        if self.scale_rewards != "group" and self.aggregation == "normalize_then_sum":
            raise ValueError(
                f"scale_rewards {self.scale_rewards} needs aggregation: sum_then_normalize; the other divides each reward "
                "by its group's standard deviation, and their sum by the batch's"
            )
        for name in self.reward_weights:
            if name not in (known := {*REWARD_NAMES, *REGISTERED}) and not named(name):
                raise ValueError(f"reward_weights: {unknown(name, sorted(known))}")
        return self


class Offload(Section):
    """How two models write a trace."""

    max_tokens: int = Field(96, ge=1, description="most tokens of one trace, tags included")
    span_budget: int = Field(
        8, ge=1, description="most tokens the big model writes in one span, as annotate.max_span_tokens or more"
    )
    batch_size: int = Field(
        64, ge=1, description="most traces that one model is asked for at a time, to write them or to read along"
    )
    temperature: float = Field(0.0, ge=0, description="of both models; 0: always the likeliest token")
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="above temperature 0: probability that the tokens drawn from have together; 1: all tokens",
    )
    top_k: int = Field(0, ge=0, description="above temperature 0: number of likeliest tokens drawn from; 0: all tokens")
    control_chunk: int = Field(
        1, ge=1, description="big tokens between two looks of the small model; always 1 where a tag is plain text"
    )
    stream_chunk: int = Field(
        0, ge=0, description="the big model reads along every so many small tokens; 0: when asked"
    )
    overlap: bool = Field(
        False,
        description="the big model writes on while the small one looks at its last chunk; worth it where both work at "
        "the same time (process, vllm)",
    )
    oversubscribe: float = Field(
        0.0, ge=0, description="traces under way beyond batch_size, as a part of it: they stand in for those at the big"
    )
    hint: str = Field("", description="put behind every problem that is written; for a model trained with one")
    step_ends: list[Annotated[str, Field(min_length=1)]] = Field(
        [";", "\n"],
        min_length=1,
        description="texts that a step of a trace ends with: for annotate.method worth, glimpse and specreason",
    )
    n_demo: int = Field(64, ge=1, description="problems in the batch of notebook 04")

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of an `Offloader`."""
        return self.model_dump(exclude={"n_demo", "step_ends"})

    @property
    def slots(self) -> int:
        """Sequences an engine has open."""
        return slots_for(self.batch_size, self.oversubscribe)


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
        [1, 16, 64], min_length=1, description="as offload.batch_size, one after the other"
    )
    repeats: int = Field(3, ge=1, description="runs whose median is taken, after one to warm up")
    max_tokens: int = Field(64, ge=2, description="most tokens of a trace (07: if offload has not fewer)")
    traces_per_slot: int = Field(2, ge=1, description="traces of a run, for each of the batch's places")
    min_traces: int = Field(16, ge=1, description="traces at least; of a few, random may give none to the big model")
    random_share: float = Field(0.05, gt=0, lt=1, description="probability with which random has the big model write")
    random_chunk: int = Field(16, ge=1, description="tokens one owner writes in a row under random")
    draft_tokens: int = Field(4, ge=1, description="tokens the small model drafts in speculative decoding")


class Base(Section):
    """Another run that has done some of the stages already."""

    folder: str = Field(description="folder of that run, with its manifest")
    stages: list[str] = Field(
        min_length=1, description="stages whose artefacts are taken from there, such as 00_arith_pair"
    )


class Hardware(Section):
    """What a run may use; `python -m srlib plan` compares the needs with it."""

    gpus: int = Field(0, ge=0, description="number of GPUs; 0: the CPU and its memory")
    gpu_gb: float = Field(24.0, gt=0, description="memory of one GPU, in GiB")
    gpu: GpuName = Field("h100", description="the GPU whose data sheet `plan` takes hours from")


def slots_for(batch_size: int, oversubscribe: float) -> int:
    """Slots for the traces under way at a batch size."""
    return batch_size + math.ceil(batch_size * oversubscribe)
