"""Everything a run depends on: the sections of a params file together."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from srlib.params.annotation import Annotate
from srlib.params.cost import Hardware, Latency
from srlib.params.data import Arith, Data, Source
from srlib.params.decoding import Offload, slots_for
from srlib.params.evaluation import Bench, Evaluate
from srlib.params.models import ModelSpec, Pair, Section
from srlib.params.paths import ROOT, find
from srlib.params.training import Grpo, Sft


class Base(Section):
    """Another run that has done some of the stages already."""

    folder: str = Field(description="folder of that run, with its manifest")
    stages: list[str] = Field(
        min_length=1, description="stages whose artefacts are taken from there, such as 00_arith_pair"
    )


class Params(Section):
    """Everything a run depends on. Each field is one section of the YAML file."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the folder in outputs/")
    seed: int = Field(0, ge=0, description="of the problems, of training and of every draw")
    threads: int = Field(0, ge=0, description="CPU threads of torch; 0: its own choice")
    outputs: str = Field("outputs", description="folder that holds the runs, seen from the clone")
    base: Base | None = Field(None, description="a run whose earlier stages this one shares")
    hardware: Hardware = Field(Hardware(), description="what a run may use; every stage compares its needs with it")
    pair: Pair = Field(Pair(), description="the small and the big model")
    data: Data = Field(Data(), description="traces and problems of your own")
    arith: Arith = Field(Arith(), description="00: the arithmetic world, and a pair of models made for it")
    annotate: Annotate = Field(Annotate(), description="01: which parts of a trace the big model should write")
    sft: Sft = Field(Sft(), description="02: the small model learns to ask, from the annotated traces")
    latency: Latency = Field(Latency(), description="03 and 07: what a trace takes in seconds")
    grpo: Grpo = Field(Grpo(), description="03: the small model learns when asking pays")
    offload: Offload = Field(
        Offload(), description="how two models write a trace, in every stage that has some written"
    )
    evaluate: Evaluate = Field(Evaluate(), description="05: which policies are measured, on how many problems")
    bench: Bench = Field(
        Bench(),
        description="what `srlib bench` measures; repeats, max_tokens and random's share and chunk are 07's check's, too",
    )

    @model_validator(mode="after")
    def _rollouts_can(self) -> Params:
        if self.grpo.use_vllm and self.pair.small.quantization != "none":
            raise ValueError(
                f"grpo.use_vllm merges what is trained into the weights, and pair.small.quantization is "
                f"{self.pair.small.quantization}; set one to false or the other to none"
            )
        return self

    @model_validator(mode="after")
    def _draws_differ(self) -> Params:
        o, e = self.offload, self.evaluate
        if self.annotate.tries > 1 and o.top_k == 1:
            raise ValueError(
                f"annotate.tries is {self.annotate.tries}, but at offload.top_k 1 all of them are the same"
            )
        if e.protocol == "own" and e.samples_per_problem > 1 and (o.temperature == 0 or o.top_k == 1):
            why = "offload.temperature 0" if o.temperature == 0 else "offload.top_k 1"
            raise ValueError(
                f"evaluate.samples_per_problem is {e.samples_per_problem}, but at {why} all of them are the same"
            )
        return self

    @model_validator(mode="after")
    def _adapter_can_be_merged(self) -> Params:
        small = self.pair.small
        if small.adapter is None or self.pair.tuned is not None:
            return self
        if not small.merge or small.quantization != "none":
            held = "merge is false" if not small.merge else f"quantization is {small.quantization}"
            raise ValueError(
                f"stage 02 merges pair.small.adapter into the weights before it trains, and "
                f"pair.small.{held}; set merge to true and quantization to none"
            )
        return self

    @model_validator(mode="after")
    def _weights_can_be_trained(self) -> Params:
        held = self.pair.small.quantization
        if self.sft.method == "full" and self.pair.tuned is None and held != "none":
            raise ValueError(
                f"sft.method full trains all weights, and pair.small.quantization is {held}; set it to none, or "
                "sft.method to lora"
            )
        return self

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stages that make the tuned small model, where one is given."""
        return ("01_annotate", "02_sft", "03_grpo") if self.pair.tuned is not None else ()

    @property
    def to_tune(self) -> list[str]:
        """Policies of stage 05 whose thresholds are set on problems to train on; none where there are no such problems."""
        alike = self.data.traces is not None or self.data.test is None or self.data.test.path == "arith"
        tuned = ("entropy", "margin", "confidence", "glimpse", "specreason")
        return [name for name in tuned if alike and name in self.evaluate.policies]

    @property
    def kept_apart(self) -> bool:
        """Whether problems of the test set are dropped from the traces; the splits of the arithmetic world share none."""
        named = self.data.traces is not None and self.data.test is not None and self.data.test.path != "arith"
        return bool(self.data.decontaminate) and named

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
        if self.base is not None and stage in self.base.stages:
            return ROOT / self.base.folder / stage
        return self.run_dir / stage

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
    def learner(self) -> ModelSpec:
        """The small model that adapters are laid on: stage 02 merges one given in `pair.small` in, or trains all of it."""
        if self.pair.small.adapter is None and self.sft.method == "lora":
            return self.small
        made = self.where("02_sft") / ("model" if self.sft.method == "full" else "merged")
        return self.small.model_copy(update={"path": str(made), "adapter": None, "revision": None})

    @property
    def tuned(self) -> ModelSpec:
        """The small model as stage 02 leaves it, with its adapter on top if it trains one, or the one that is given."""
        if self.pair.tuned is not None:
            return self._resolve(self.pair.tuned, "small")
        if self.sft.method == "full":
            return self.learner
        return self.learner.model_copy(update={"adapter": str(self.where("02_sft") / "adapter")})

    @property
    def reinforced(self) -> ModelSpec:
        """The small model with the adapter of stage 03 on top."""
        return self.learner.model_copy(update={"adapter": str(self.where("03_grpo") / "adapter")})

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
        return self._made(self.data.traces, "traces")

    @property
    def test(self) -> Source:
        return self._made(self.data.test, "test")

    @property
    def dataset(self) -> str:
        """Name of the test problems."""
        return "arith" if self.data.test is None else Path(self.test.path).stem

    @property
    def annotated(self) -> Path:
        """The annotated traces that stage 02 learns from."""
        given = self.sft.annotated
        return (find(given) or Path(given)) if given else self.where("01_annotate") / "annotated.jsonl"

    def _made(self, source: Source | None, split: str) -> Source:
        """What the params name, or what stage 00 has written; the set arith is that of the section."""
        if source is None:
            return Source(path=str(self.where("00_arith_pair") / f"{split}.jsonl"))
        if source.path != "arith":
            return source
        made = source.model_copy(update={"split": source.split or split})
        made._world = self.arith
        return made

    def _resolve(self, spec: ModelSpec, name: str) -> ModelSpec:
        named = {"path": spec.path or str(self.where("00_arith_pair") / name), "adapter": spec.adapter}
        local = {key: str(find(path) or path) for key, path in named.items() if path is not None}
        return spec.model_copy(update=local)
