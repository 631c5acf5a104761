"""Stages 02 and 03: fine-tuning and reinforcement of the small model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from srlib.params.models import Section
from srlib.params.names import unknown
from srlib.params.own import named
from srlib.params.secrets import Address
from srlib.params.written import Anything

Tracker = Annotated[
    str,
    Field(
        description="tracker that is told the log, such as tensorboard (in the stage's folder), wandb, trackio: what "
        "transformers' report_to takes; each is a package of its own"
    ),
]


class Sft(Section):
    """Fine-tuning on annotated traces, by a LoRA adapter or of all weights."""

    annotated: str | None = Field(
        None, min_length=1, description="a JSONL file of annotated traces of your own, in place of what 01 writes"
    )
    tags: Literal["token", "plain"] = Field(
        "token", description="a tag is one added token, or plain text; the embeddings it is written with are trained"
    )
    tag_init: Annotated[list[str], Field(min_length=2, max_length=2)] | None = Field(
        None,
        description="words for the opening and the closing tag, such as [ask the big model, take back]: the embedding of "
        "an added token begins as the mean of those of its words' pieces; empty: as the model has it, or drawn at random",
    )
    method: Literal["lora", "full"] = Field(
        "lora",
        description="what is trained: an adapter, or all weights, in fp32, as in the paper; these want a lower "
        "learning_rate (the paper's is 5e-5), and 03 lays an adapter as described below on what has come of them",
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
    group_by_length: bool = Field(
        False, description="traces about as long as each other share a batch, for less padding"
    )
    packing: bool = Field(
        False,
        description="traces share rows of max_length tokens, in which none sees another, and rows are what epochs and "
        "batch_size then count; the rows of a pass stand one behind the other, and their mask takes the square of all of it",
    )
    n_validation: int = Field(
        0, ge=0, description="annotated traces held out, whose loss is taken each time that of training is logged"
    )
    save_steps: int = Field(
        50,
        ge=1,
        description="steps between checkpoints, at a step whose loss is logged; the last is kept, for a killed run",
    )
    report_to: Tracker = "none"
    trainer: dict[str, Anything] = Field(
        {}, description="more arguments of TRL's SFTConfig, such as {weight_decay: 0.01}"
    )
    lora: dict[str, Anything] = Field({}, description="more arguments of PEFT's LoraConfig, such as {use_dora: true}")
    n_watch: int = Field(256, ge=1, description="unseen problems on which the tuned model is watched")

    @model_validator(mode="after")
    def _tags_are_added(self) -> Sft:
        if self.tag_init is not None and self.tags == "plain":
            raise ValueError(
                "tag_init needs tags: token; plain tags are written with embeddings that are there already"
            )
        return self

    @model_validator(mode="after")
    def _parts_alike(self) -> Sft:
        if self.batch_size % (parts := self.processes * self.gradient_accumulation_steps):
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of processes × gradient_accumulation_steps = {parts}"
            )
        return self


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
    eval_steps: int = Field(
        0,
        ge=0,
        description="steps between looks: the policy as it stands writes problems it is not trained on, greedily, behind "
        "the last step, too; the one with the highest reward is kept. 0: none, and the last is kept",
    )
    n_validation: int = Field(128, ge=1, description="eval_steps: problems of a look, held out from those trained on")
    save_steps: int = Field(50, ge=1, description="steps between checkpoints, of which the last is kept")
    report_to: Tracker = "none"
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
