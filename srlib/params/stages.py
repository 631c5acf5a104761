"""Typed parameters of every stage, read from one YAML file and checked before any work.

A file in `params/` is a scale: the same notebooks run on a laptop or on a node, and only
the file differs. This module knows names, types and limits; it knows nothing of models.
"""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rapidfuzz import fuzz, process

from srlib import SrlibError

ROOT = Path(__file__).resolve().parents[1]  # the clone: holds params/, notebooks/, outputs/


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


class ModelSpec(Section):
    """Where a model is and how it is loaded."""

    path: str | None = Field(None, description="folder or hub name; empty: the one stage 00 trains")
    adapter: str | None = Field(None, description="folder of a LoRA adapter to lay on top")
    merge: bool = Field(True, description="fold the adapter into the weights when it is loaded")
    engine: Literal["transformers", "vllm"] = "transformers"
    url: str | None = Field(None, description="vllm: address of a running server, such as http://127.0.0.1:8000")
    process: bool = Field(
        False, description="transformers: in a process of its own, so that both models of a pair work at the same time"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["none", "nf4", "int8", "awq", "gptq", "fp8"] = Field(
        "none", description="nf4 and int8: by bitsandbytes, either engine (vllm: nf4 alone); the others: vllm"
    )
    context: int | None = Field(None, ge=16, description="longest sequence there is room for; empty: the model's own")
    kv_cache_gb: float | None = Field(None, gt=0, description="vllm: size of the KV cache in GiB, on each device")
    tensor_parallel: int = Field(1, ge=1, description="vllm: devices that share every layer")
    pipeline_parallel: int = Field(1, ge=1, description="vllm: groups of devices that share the layers out")
    ray: bool = Field(False, description="vllm: the devices are on several machines, under Ray")
    compile: bool = Field(False, description="vllm: compile the model and replay CUDA graphs; slower to start")

    @model_validator(mode="after")
    def _engine_can(self) -> ModelSpec:
        if self.engine == "transformers":
            if self.quantization in ("awq", "gptq", "fp8"):
                raise ValueError(
                    f"quantization {self.quantization} needs engine: vllm; transformers takes nf4 and int8"
                )
            if self.url or self.ray or self.compile or self.tensor_parallel * self.pipeline_parallel > 1:
                raise ValueError("url, ray, compile and the parallel settings need engine: vllm")
        elif self.process:
            raise ValueError("process needs engine: transformers; vllm works by itself")
        if self.engine == "vllm" and self.quantization == "int8":
            raise ValueError("quantization int8 needs engine: transformers; vllm takes nf4, awq, gptq and fp8")
        return self


class Pair(Section):
    small: ModelSpec = ModelSpec()
    big: ModelSpec = ModelSpec()
    tuned: ModelSpec | None = Field(
        None, description="a small model that writes the tags already: 01 to 03 are left out"
    )


class ArithModel(Section):
    """One model of the arithmetic pair, Qwen2 architecture, and how long it is trained."""

    hidden_size: int = Field(32, ge=8)
    num_hidden_layers: int = Field(3, ge=1)
    num_attention_heads: int = Field(1, ge=1)
    intermediate_size: int = Field(64, ge=8)
    train_steps: int = Field(800, ge=1)
    learning_rate: float = Field(1e-2, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> ArithModel:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        return self


class Arith(Section):
    """The arithmetic world: how hard its problems are, how many, and the two models."""

    min_steps: int = Field(3, ge=1, le=20)
    max_steps: int = Field(5, ge=1, le=20)
    product_share: float = Field(0.4, ge=0, le=1, description="probability that an operation is a product")
    max_factor: int = Field(15, ge=2, le=99, description="largest factor in a product")
    n_traces: int = Field(4000, ge=1, description="worked traces written for annotation")
    n_test: int = Field(1000, ge=1, description="unseen problems written for evaluation")
    batch_size: int = Field(32, ge=1)
    small: ArithModel = ArithModel()
    big: ArithModel = ArithModel(
        hidden_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=256,
        train_steps=1100,
        learning_rate=5e-3,
    )

    @model_validator(mode="after")
    def _steps_ordered(self) -> Arith:
        if self.min_steps > self.max_steps:
            raise ValueError(f"min_steps {self.min_steps} is above max_steps {self.max_steps}")
        return self


class Source(Section):
    """Where problems come from; in the params a plain string is its `path`."""

    path: str = Field(min_length=1, description="a JSONL file, a set on the hub, or a name of srlib/benchmarks.py")
    config: str | None = Field(None, description="hub: configuration of the data set")
    split: str = Field("train", description="hub: its split")
    columns: dict[Literal["id", "prompt", "answer", "trace", "correct"], str] = Field(
        {}, description="field: column it is read from; empty: the columns are named like the fields"
    )
    prompt: str = Field("", description="plain, boxed, base, or a text with {question}; empty: asked as it is")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        return {"path": str(given)} if isinstance(given, str | Path) else given

    @property
    def file(self) -> Path | None:
        """The JSONL file, seen from here or from the clone; None: a data set on the hub."""
        behind = self.path.partition(":")[2] or self.path  # of a benchmark's name
        found = find(self.path) or find(behind)
        return found or (Path(behind) if behind.endswith(".jsonl") else None)


class Data(Section):
    """Problems; empty: what stage 00 writes."""

    traces: Source | None = Field(None, description="worked traces to annotate")
    test: Source | None = Field(None, description="unseen problems")


class Judge(Section):
    """Who is asked which parts of a trace are hard: a server with the OpenAI protocol, or a model loaded here."""

    model: str = Field("", description="the server's name of its model")
    base_url: str | None = Field(
        None, description="such as https://api.deepseek.com/v1; empty: of the environment variable OPENAI_BASE_URL"
    )
    key: str | None = Field(
        "OPENAI_API_KEY",
        pattern=r"^[A-Z][A-Z0-9_]*$",
        description="environment variable that holds the key, never the key itself; empty: the server wants none",
    )
    local: ModelSpec | None = Field(None, description="a model that is loaded here, in place of a server")
    temperatures: list[float] = Field(
        [0.0, 0.3, 0.6], min_length=1, description="of the first request for a trace, and of those after a bad answer"
    )
    max_tokens: int = Field(8192, ge=16, description="longest answer, a reasoning judge's thinking included")
    concurrency: int = Field(16, ge=1, description="requests under way at the same time: a batch")
    requests_per_minute: int = Field(0, ge=0, description="0: no limit")
    retries: int = Field(6, ge=0, description="of a request that met what passes: 429, 5xx, a lost connection")
    timeout_s: float = Field(300.0, gt=0, description="seconds a server may be silent")
    price_in: float = Field(0.0, ge=0, description="of a million tokens that are read, in any currency")
    price_out: float = Field(0.0, ge=0, description="of a million tokens that are written")
    max_cost: float | None = Field(None, gt=0, description="a run does not begin, or stops, that would cost more")

    @model_validator(mode="after")
    def _prices(self) -> Judge:
        if self.max_cost is not None and not self.price_in + self.price_out:
            raise ValueError("max_cost needs price_in and price_out, the prices of a million tokens")
        return self


Method = Literal["gap", "judge", "random", "entropy", "given"]


class Annotate(Section):
    method: Method = Field(
        "gap",
        description="big model much likelier; a judge's choice; at random; small model unsure; tags the traces have",
    )
    n_traces: int = Field(4000, ge=1)
    tries: int = Field(0, ge=0, description="traces the big model writes until one is right; 0: they are given")
    temperature: float = Field(0.6, ge=0, description="at which it writes them")
    threshold: float = Field(0.5, gt=0, description="gap of log-probabilities, or entropy, that marks a token, in nats")
    share: float = Field(0.2, gt=0, le=1, description="of a trace: what random marks, and a judge is asked for")
    merge_gap: int = Field(0, ge=0, description="marks this many tokens apart, or fewer, become one span")
    max_span_tokens: int = Field(16, ge=1)
    max_share: float = Field(0.3, gt=0, le=1, description="most of a trace that may be marked, in tokens")
    min_score: float = Field(0.85, gt=0.5, le=1, description="likeness from which a passage is what a judge quotes")
    batch_size: int = Field(128, ge=1)
    compare: list[Literal["gap", "random", "entropy"]] = Field(
        ["random", "entropy"], description="annotators put beside the chosen one"
    )
    n_compare: int = Field(500, ge=1, description="traces on which they are compared")
    judge: Judge = Judge()

    @model_validator(mode="after")
    def _someone_to_ask(self) -> Annotate:
        if self.method == "judge" and not self.judge.model and self.judge.local is None:
            raise ValueError("method judge needs judge.model, the name of a server's model, or judge.local")
        if self.tries > 1 and not self.temperature:
            raise ValueError(f"tries is {self.tries}, but at temperature 0 all of them are the same")
        return self

    @property
    def engines(self) -> tuple[str, ...]:
        """The models of the pair that are loaded for it."""
        methods = {self.method, *self.compare}
        small = "small" if methods & {"gap", "entropy"} else None
        big = "big" if "gap" in methods or self.tries else None
        return tuple(side for side in (small, big) if side)


class Sft(Section):
    tags: Literal["token", "plain"] = Field("token", description="a tag is one added token, or plain text")
    lora_rank: int = Field(16, ge=1)
    lora_alpha: int = Field(32, ge=1)
    epochs: float = Field(3, gt=0)
    batch_size: int = Field(32, ge=1)
    gradient_accumulation_steps: int = Field(1, ge=1)
    gradient_checkpointing: bool = Field(False, description="keep less of the forward pass, and compute it again")
    learning_rate: float = Field(3e-3, gt=0)
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    max_length: int = Field(1024, ge=16)
    n_watch: int = Field(256, ge=1, description="unseen problems on which the tuned model is watched")


class Latency(Section):
    """Where the seconds of the latency model come from."""

    source: Literal["a6000", "calibrate", "roofline"] = Field(
        "a6000", description="a named table, measured on this machine, or from the data sheet of a GPU"
    )
    small: str = Field("1.5B", description="the table's model that stands for the small one")
    big: str = "32B"
    gpu: str = Field("h100", description="roofline: the GPU, as srlib/costs.py names it")
    devices: int = Field(1, ge=1, description="roofline: GPUs that share every layer of the big model")
    handover_s: float = Field(0.0, ge=0, description="seconds a hand-over costs on top")
    prompt: int = Field(512, ge=1, description="07: tokens of a prompt in what is simulated")
    decode: int = Field(4096, ge=16, description="07: tokens of a trace")
    span: int = Field(128, ge=1, description="07: tokens the big model writes in a row")
    gpu_hour: float = Field(2.0, gt=0, description="07: price of a GPU for an hour, in any currency")
    gpus: list[int] = Field([1, 8, 1000], min_length=1, description="07: numbers of GPUs to plan for")
    n_check: int = Field(12, ge=1, description="07: problems on which prediction and clock are compared")


REWARD_NAMES = ("accuracy", "scaffold", "tag_count", "coverage", "latency", "help_seeking", "overlong")


class Grpo(Section):
    rollout: Literal["true_offload", "self"] = Field(
        "true_offload",
        description="the big model answers in the rollouts, or the small one writes it all, as in the paper",
    )
    preset: Literal["offload", "paper", "relay"] = Field("offload", description="ready-made reward weights")
    reward_weights: dict[str, float] = Field({}, description="weights by reward, laid over those of the preset")
    coverage_target: float = Field(0.4, gt=0, lt=1)
    aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = "sum_then_normalize"
    n_problems: int = Field(4000, ge=1)
    max_steps: int = Field(100, ge=1)
    batch_size: int = Field(128, ge=2, description="rollouts a step; a multiple of num_generations")
    num_generations: int = Field(8, ge=2)
    gradient_accumulation_steps: int = Field(1, ge=1, description="parts in which a batch is trained on")
    gradient_checkpointing: bool = Field(False, description="keep less of the forward pass, and compute it again")
    rollouts_at_once: int = Field(0, ge=0, description="written at the same time by a process; 0: offload.batch_size")
    use_vllm: bool = Field(False, description="vLLM writes the small model's part of the rollouts")
    vllm_url: str | None = Field(
        None, description="use_vllm: a server of the small model; empty: loaded beside training, in each process"
    )
    vllm_kv_cache_gb: float | None = Field(None, gt=0, description="use_vllm: size of the KV cache in GiB")
    processes: int = Field(1, ge=1, description="more than one: under `accelerate launch`, or torchrun on a CPU")
    accelerate_config: str | None = Field(None, description="file for `accelerate launch`; empty: plain data parallel")
    learning_rate: float = Field(2e-4, gt=0)
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.0, ge=0, description="weight of the KL to the policy of stage 02")
    loss_type: Literal["grpo", "dr_grpo", "dapo", "bnpo"] = "dapo"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    save_steps: int = Field(50, ge=1)
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
        if self.accelerate_config and find(self.accelerate_config) is None:
            raise ValueError(f"there is no file {self.accelerate_config} (accelerate_config)")
        for name in self.reward_weights:
            if name not in REWARD_NAMES:
                raise ValueError(f"reward_weights: {_unknown(name, list(REWARD_NAMES))}")
        return self


class Pipelining(Section):
    """How far the two models of a pair work at the same time."""

    control_chunk: int = Field(1, ge=1, description="big tokens between two looks of the small model")
    stream_chunk: int = Field(
        0, ge=0, description="the big model reads along every so many small tokens; 0: when asked"
    )
    overlap: bool = Field(False, description="the big model writes on while the small one looks at its last chunk")
    oversubscribe: float = Field(
        0.0, ge=0, description="traces under way beyond batch_size, as a part of it: they stand in for those at the big"
    )


class Offload(Pipelining):
    max_tokens: int = Field(96, ge=1, description="most tokens of one trace, tags included")
    span_budget: int = Field(8, ge=1, description="most tokens the big model writes in one span")
    batch_size: int = Field(64, ge=1, description="most traces that one model is asked for at a time")
    temperature: float = Field(0.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: all tokens")
    hint: str = Field("", description="put behind every problem that is written; for a model trained with one")
    n_demo: int = Field(64, ge=1, description="problems in the batch of notebook 04")

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments of an `Offloader`."""
        return self.model_dump(exclude={"n_demo"})

    @property
    def slots(self) -> int:
        """Sequences an engine has open."""
        return slots_for(self.batch_size, self.oversubscribe)


class Evaluate(Section):
    protocol: Literal["own", "published", "quick"] = Field(
        "own", description="as set here and in offload; as accuracies are published; for a look (srlib/benchmarks.py)"
    )
    n_problems: int = Field(1000, ge=2)
    samples_per_problem: int = Field(1, ge=1)
    n_refused: int = Field(300, ge=0, description="problems whose requests are each refused once; 0: none")
    policies: list[
        Literal["small", "big", "learned", "grpo", "learned_off", "random", "rejection", "entropy", "speculative"]
    ] = Field(
        ["small", "big", "learned", "grpo", "learned_off", "random", "rejection", "entropy", "speculative"],
        min_length=1,
    )
    random_shares: list[float] = [0.05, 0.1, 0.2, 0.4, 0.7]
    random_chunk: int = Field(4, ge=1, description="tokens one owner writes in a row under random and entropy")
    rejections: list[float] = Field([0.25, 0.5, 0.75], description="probabilities with which requests are refused")
    entropies: list[float] = Field([0.5, 1.0], description="nats above which the entropy policy asks")
    draft_tokens: int = Field(4, ge=1, description="tokens the small model drafts in speculative decoding")

    @model_validator(mode="after")
    def _shares(self) -> Evaluate:
        for name in ("random_shares", "rejections"):
            for share in getattr(self, name):
                if not 0 < share < 1:
                    raise ValueError(f"{name} holds {share}, which is not between 0 and 1")
        for threshold in self.entropies:
            if threshold <= 0:
                raise ValueError(f"entropies holds {threshold}, which is not above 0")
        return self


class Bench(Section):
    """What `python -m srlib bench` measures."""

    policies: list[Literal["learned", "random", "speculative"]] = Field(
        ["learned", "random", "speculative"], description="beside each model alone"
    )
    batch_sizes: list[int] = Field([1, 16, 64], min_length=1)
    repeats: int = Field(3, ge=1, description="runs whose median is taken, after one to warm up")
    max_tokens: int = Field(64, ge=2, description="tokens of a trace")
    traces_per_slot: int = Field(2, ge=1, description="traces for each of the batch's places")
    min_traces: int = Field(16, ge=1, description="traces at least; of a few, random may give none to the big model")
    random_share: float = Field(0.05, gt=0, lt=1)
    random_chunk: int = Field(16, ge=1)
    draft_tokens: int = Field(4, ge=1, description="tokens the small model drafts in speculative decoding")
    pipelined: Pipelining | None = Field(
        None, description="learned and random are measured a second time with these settings of offload"
    )
    big_process: bool = Field(False, description="pipelined on transformers: a second big model, in its own process")


class Base(Section):
    """Another run that has done some of the stages already."""

    folder: str = Field(description="folder of that run, with its manifest")
    stages: list[str] = Field(min_length=1, description="stages whose artefacts are taken from there")


class Hardware(Section):
    """What a run may use; `python -m srlib plan` compares the needs with it."""

    gpus: int = Field(0, ge=0, description="0: the CPU and its memory")
    gpu_gb: float = Field(24.0, gt=0, description="memory of one GPU, in GiB")


class Params(Section):
    """Everything a run depends on. Each field is one section of the YAML file."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the folder in outputs/")
    seed: int = Field(0, ge=0)
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0: its own choice")
    outputs: str = Field("outputs", description="folder that holds the runs")
    base: Base | None = Field(None, description="a run whose earlier stages this one shares")
    hardware: Hardware = Hardware()
    pair: Pair = Pair()
    data: Data = Data()
    arith: Arith = Arith()
    annotate: Annotate = Annotate()
    sft: Sft = Sft()
    latency: Latency = Latency()
    grpo: Grpo = Grpo()
    offload: Offload = Offload()
    evaluate: Evaluate = Evaluate()
    bench: Bench = Bench()

    @model_validator(mode="after")
    def _rollouts_can(self) -> Params:
        if self.grpo.use_vllm and self.pair.small.quantization != "none":
            raise ValueError(
                f"grpo.use_vllm merges what is trained into the weights, and pair.small.quantization is "
                f"{self.pair.small.quantization}; set one to false or the other to none"
            )
        return self

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stages that make the tuned small model, where one is given."""
        return ("01_annotate", "02_sft", "03_grpo") if self.pair.tuned is not None else ()

    @property
    def rollout_slots(self) -> int:
        """Rollouts that one process of stage 03 has under way."""
        at_once = slots_for(self.grpo.rollouts_at_once or self.offload.batch_size, self.offload.oversubscribe)
        return min(at_once, self.grpo.batch_size // self.grpo.processes)

    @property
    def run_dir(self) -> Path:
        """The run's folder; a relative `outputs` is taken from the clone."""
        return ROOT / self.outputs / self.run

    def where(self, stage: str) -> Path:
        """The folder of a stage's artefacts, which may be another run's."""
        shared = self.base is not None and stage in self.base.stages
        return (ROOT / self.base.folder if shared else self.run_dir) / stage

    def stage_dir(self, stage: str) -> Path:
        """The folder for a stage's artefacts in this run, made if it is not there."""
        folder = self.run_dir / stage
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @property
    def small(self) -> ModelSpec:
        """The small model as it is before fine-tuning."""
        return self._resolve(self.pair.small, "small")

    @property
    def tuned(self) -> ModelSpec:
        """The small model with the adapter of stage 02 on top, or the one that is given."""
        if self.pair.tuned is not None:
            return self._resolve(self.pair.tuned, "small")
        return self.small.model_copy(update={"adapter": str(self.where("02_sft") / "adapter")})

    @property
    def reinforced(self) -> ModelSpec:
        """The small model with the adapter of stage 03 on top."""
        return self.small.model_copy(update={"adapter": str(self.where("03_grpo") / "adapter")})

    @property
    def rollout_small(self) -> ModelSpec:
        """The small model as vLLM has it for the rollouts of stage 03: merged, in its stage's folder."""
        spec, g = self.tuned, self.grpo
        return spec.model_copy(
            update={"engine": "vllm", "url": g.vllm_url, "kv_cache_gb": g.vllm_kv_cache_gb, "merge": True}
        )

    @property
    def big(self) -> ModelSpec:
        return self._resolve(self.pair.big, "big")

    @property
    def traces(self) -> Source:
        return self.data.traces or Source(path=str(self.where("00_arith_pair") / "traces.jsonl"))

    @property
    def test(self) -> Source:
        return self.data.test or Source(path=str(self.where("00_arith_pair") / "test.jsonl"))

    @property
    def dataset(self) -> str:
        """Name of the test problems."""
        return "arith" if self.data.test is None else Path(self.test.path).stem

    @property
    def annotated(self) -> Path:
        return self.where("01_annotate") / "annotated.jsonl"

    def _resolve(self, spec: ModelSpec, name: str) -> ModelSpec:
        path = spec.path or str(self.where("00_arith_pair") / name)
        local = find(path)
        return spec.model_copy(update={"path": str(local) if local else path})


Model = TypeVar("Model", bound=BaseModel)


def find(path: str | Path) -> Path | None:
    """`path` as it is seen from here or, failing that, from the clone; None if in neither."""
    return next((p for p in (Path(path), ROOT / path) if p.exists()), None)


def slots_for(batch_size: int, oversubscribe: float) -> int:
    """Slots for the traces under way at a batch size."""
    return batch_size + math.ceil(batch_size * oversubscribe)


def load(path: str | Path, **overrides: Any) -> Params:
    """Read a params file and check every value.

    Args:
        path: YAML file, relative to the working folder or to the clone.
        **overrides: values laid on top; a name may be dotted, as `**{"sft.epochs": 1}`, and a
            mapping replaces only the keys it names.

    Raises:
        SrlibError: the file is not there or not YAML, a key is unknown (the nearest valid one
            is named), a value has the wrong type or is impossible.
    """
    found = find(path)
    if found is None or not found.is_file():
        near = nearest(Path(path).name, [p.name for p in (ROOT / "params").glob("*.yaml")])
        raise SrlibError(f"There is no params file {path}{near and f'; did you mean params/{near}?'}")
    try:
        values = yaml.safe_load(found.read_text())
    except yaml.YAMLError as error:
        raise SrlibError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SrlibError(f"{path} holds {type(values).__name__}, but a params file is a mapping of sections.")
    for key, value in overrides.items():
        _lay(values, key.split("."), value)
    return build(values, str(path))


def build(values: dict[str, Any], source: str, model: type[Model] = Params) -> Model:
    """Check `values`; `source` is named in the error."""
    try:
        return model(**values)
    except ValidationError as error:
        raise SrlibError(f"{source}: {_explain(error.errors()[0], model)}") from None


def from_notebook(scope: dict[str, Any]) -> Params:
    """The parameters of a notebook, from what its `parameters` cell and papermill left in `scope`.

    By hand, `params_file` is read. papermill's `-f params/x.yaml` puts every key of that file
    into the notebook: as such a file always names its `run`, it is then used alone, and
    `params_file` is not read. Single values (`-p seed 1`) are laid on top of `params_file`.

    Raises:
        SrlibError: as `load`; also for a name papermill was given that is no parameter.
    """
    for cell in scope.get("In", []):
        if cell.startswith("# Parameters"):  # papermill's own cell: it only warns of unknown names
            names = [t.id for node in ast.parse(cell).body if isinstance(node, ast.Assign) for t in node.targets]
            for name in names:
                if name != "params_file" and name not in Params.model_fields:
                    raise SrlibError(f"papermill: {_unknown(name, list(Params.model_fields))}")
    given = {name: scope[name] for name in Params.model_fields if scope.get(name) is not None}
    if "run" in given:
        return build(given, "papermill's parameters")
    return load(scope["params_file"], **given)


def parse_override(text: str, several: bool = False) -> tuple[str, Any]:
    """`"sft.epochs=1"` to `("sft.epochs", 1)`; the value is read as YAML, with `several` as a list of values."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise SrlibError(f"--set {text!r} is not of the form section.key=value")
    return key, yaml.safe_load(f"[{value}]" if several else value)


def nearest(name: str, names: list[str]) -> str:
    """The one of `names` most like `name`, or an empty string if none is alike."""
    match = process.extractOne(name, names, scorer=fuzz.WRatio, score_cutoff=60)
    return match[0] if match else ""


def _lay(values: dict[str, Any], keys: list[str], value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _lay(values, [*keys, key], inner)
        return
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        if not isinstance(values[key], dict):
            raise SrlibError(f"{'.'.join(keys)} cannot be set: {key} is {values[key]!r}, not a section.")
        values = values[key]
    values[keys[-1]] = value


def _explain(error: dict[str, Any], model: type[BaseModel]) -> str:
    """One sentence out of a pydantic error."""
    where = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            *sections, key = error["loc"]
            for section in sections:
                model = model.model_fields[section].annotation
            return f"{_unknown(key, list(model.model_fields))}{f' (in section {sections[-1]})' if sections else ''}"
        case "missing":
            return f"{where} is missing; give it a value."
        case "value_error":
            return f"{where}: {error['ctx']['error']}."
        case _:
            return f"{where} is {error['input']!r}: {error['msg'][0].lower()}{error['msg'][1:]}."


def _unknown(key: str, names: list[str]) -> str:
    near = nearest(str(key), names)
    return f"unknown key {key!r}" + (f"; did you mean {near!r}?" if near else f"; there are {', '.join(names)}.")
