"""Will it fit? What each stage needs on each device, from the models' configurations alone.

Counted are weights, KV caches at the longest sequence and the concurrency of the params file,
activations, what training adds, and the CUDA context. Nothing is loaded, and the models that
the params files name are known without asking the hub.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from srlib import SrlibError
from srlib.cost.costs import GPUS
from srlib.cost.shapes import Shape, qwen2, shape
from srlib.data import benchmarks
from srlib.engine.protocol import SCORE_POSITIONS, SCORE_TOKENS
from srlib.engine.vllm.arguments import seats
from srlib.params import ROOT, ModelSpec, Params, build

GIB = 2**30
PROMPT = 512  # tokens allowed for a prompt, on top of `offload.max_tokens`
VLLM_TOKENS = 8192  # and those vLLM reads in one pass, all with logits when it scores
TRAINABLE = 4 + 4 + 8  # bytes of a trained parameter: itself, its gradient, Adam's two moments, in fp32
PROCESS = 1.0  # GiB a process takes on a device: CUDA context 0.3 to 0.6, workspaces, what the allocator cannot use
# TRL's fused loss computes logits in fp32 tiles of so many tokens and vocabulary entries.
TILE = (4096, 32768)
# Bytes of a parameter in a linear layer. nf4: 4 bits, a scale of 8 bits for each 64, one of 32 bits for each 256 of
# these (QLoRA, arXiv 2305.14314, double quantisation). awq, gptq: for each 128 a 16-bit scale and a 4-bit zero point.
QUANTIZED = {"nf4": 4 / 8 + 1 / 64 + 4 / (64 * 256), "int8": 1.0, "fp8": 1.0, "awq": 0.5 + 2.5 / 128}
QUANTIZED["gptq"] = QUANTIZED["awq"]
STAGES = ("01_annotate", "02_sft", "03_grpo", "04_offload", "05_evaluate", "07_latency", "bench")
CHECKED = 16  # most traces at a time in the check of stage 07
KINDS = ("weights", "caches", "activations", "training", "process")


@dataclass(frozen=True)
class Need:
    """GiB of one kind (see KINDS) that a stage needs for something, on one device."""

    stage: str
    kind: str
    what: str
    device: str
    gib: float


@dataclass(frozen=True)
class _Model:
    """A model of a run, as it is loaded."""

    p: Params
    spec: ModelSpec
    shape: Shape

    @property
    def bytes(self) -> int:
        """Of a number in the model's dtype."""
        auto = "float32" if self.devices() == ["cpu"] else "bfloat16"
        return 4 if (auto if self.spec.dtype == "auto" else self.spec.dtype) == "float32" else 2

    @property
    def context(self) -> int:
        """Tokens there is room for."""
        return self.spec.context or self.shape.context

    @property
    def tokens(self) -> int:
        """Of the longest sequence."""
        return min(PROMPT + self.p.offload.max_tokens, self.context)

    def devices(self) -> list[str]:
        """Those that share it. A server on this machine is taken to have the last GPUs; one elsewhere needs none."""
        gpus, n = self.p.hardware.gpus, self.spec.tensor_parallel * self.spec.pipeline_parallel
        if self.spec.url:
            here = re.match(r"https?://(127\.|localhost)", self.spec.url)
            return [f"cuda:{i}" for i in range(max(0, gpus - n), gpus)] if here else []
        if self.spec.device == "cpu" or not gpus:
            return ["cpu"]
        first = int(self.spec.device.partition(":")[2] or 0)
        return [f"cuda:{first + i}" for i in range(n)]

    def weights(self) -> float:
        """Bytes. Quantisation leaves embeddings and output layer as they are, and the adapter beside the weights."""
        s, quantized = self.shape, self.spec.quantization != "none"
        beside = self.spec.adapter is not None and (quantized or not self.spec.merge)
        each = QUANTIZED.get(self.spec.quantization, self.bytes)
        return s.linear * each + s.rest * self.bytes + (4 * s.lora(self.p.sft.lora_rank) if beside else 0)

    def cache(self, tokens: int) -> float:
        """Bytes of keys and values."""
        return 2 * self.shape.layers * self.shape.kv * self.bytes * tokens

    def caches(self, slots: int) -> float:
        """Bytes. On a GPU the transformers engine doubles its cache as sequences grow, up to the context."""
        if self.spec.kv_cache_gb:
            return self.spec.kv_cache_gb * GIB * len(self.devices())
        doubles = self.spec.engine == "transformers" and self.devices() != ["cpu"]
        return self.cache(slots * (min(2 * self.tokens, self.context) if doubles else self.tokens))

    def reading(self, batch: int, width: int, length: int, logits: int) -> float:
        """Bytes to read `width` new tokens of each sequence: one layer, the mask over `length` positions if it is
        given, `logits` in the model's dtype and twice in fp32, and for bitsandbytes one matrix unpacked.
        """
        s, e = self.shape, self.bytes
        buffer = s.hidden * s.inner * e if self.spec.quantization in ("nf4", "int8") else 0
        mask = batch * width * length * e * s.queries // s.kv
        return batch * width * e * (8 * s.hidden + 3 * s.inner) + mask + logits * s.vocabulary * (e + 8) + buffer

    def generating(self, slots: int) -> float:
        """Bytes: all prompts at once, or what the other model has written since the last look."""
        if self.spec.engine == "vllm":
            return self.reading(1, VLLM_TOKENS, 0, seats(slots))
        width = max(PROMPT, self.p.offload.stream_chunk or self.tokens)
        return self.reading(slots, min(width, self.tokens), self.tokens, slots)

    def scoring(self, batch: int, length: int) -> float:
        """Bytes for the log-probabilities of whole traces."""
        if self.spec.engine == "vllm":
            return self.reading(1, min(VLLM_TOKENS, batch * length), 0, min(VLLM_TOKENS, batch * length))
        if batch * length <= SCORE_TOKENS:
            return self.reading(batch, length, 0, SCORE_POSITIONS)
        width = max(1, SCORE_TOKENS // batch)  # read in several passes, with a cache
        return self.cache(batch * length) + self.reading(batch, width, length, SCORE_POSITIONS)

    def whole(self, workers: int) -> float:
        """Bytes that training of all weights adds to them: they are in fp32 then, and each pass in 16 bits has a copy.

        Of several processes each holds the gradients once more, in what it sends them with.
        """
        s = self.shape
        copy = s.linear * self.bytes if self.bytes == 2 else 0
        return (TRAINABLE + (4 if workers > 1 else 0)) * s.parameters + copy - self.weights()

    def training(self, batch: int, length: int, checkpointing: bool, full: bool = False, packed: bool = False) -> float:
        """Bytes of activations of a batch, under LoRA or with all weights trained.

        A layer keeps 36 h + 5 e f + 2 e k bytes a token (h hidden, k keys, f inner size, e bytes of a number), as
        measured on Qwen2 with PEFT; for GPT with f = 4 h it is 34 h (Korthikanti et al., arXiv 2205.05198). There is
        no term in length², as attention is fused. With checkpointing each layer keeps its input, e h, and one layer
        at a time is computed again, with its gradients. Packed rows stand one behind the other, and their mask says
        of each pair of tokens whether they are of one trace, as a truth and as a number to be added.
        """
        s, e, n = self.shape, self.bytes, batch * length
        layer = 36 * s.hidden + 5 * e * s.inner + 2 * e * s.kv
        layers = s.layers * e * s.hidden + 2 * layer if checkpointing else s.layers * layer
        tile = 4 * min(n, TILE[0]) * min(s.vocabulary, TILE[1]) + 4 * n * s.hidden
        # Embeddings with the tags' rows laid in, and their gradients.
        ends = 0 if full else s.vocabulary * s.hidden * (4 + 3 * e)
        return n * layers + tile + ends + (n * n * (1 + e) if packed else 0)


def as_written(p: Params, stage: str) -> Params:
    """The params with `offload` as a stage has it: 05 by its protocol, the bench and the check of 07 with their own size."""
    update = {}
    if stage == "05_evaluate":
        return p.model_copy(update={"offload": benchmarks.protocol(p).offload})
    if stage == "07_latency":
        update = {"batch_size": CHECKED, "max_tokens": min(p.bench.max_tokens, p.offload.max_tokens)}
    if stage == "bench":
        update = {"batch_size": max(p.bench.batch_sizes), "max_tokens": p.bench.max_tokens}
    return p.model_copy(update={"offload": p.offload.model_copy(update=update)})


def models(p: Params, stage: str) -> dict[str, _Model]:
    """The models a stage holds at the same time. Stage 05 loads its small models one after the other."""
    p = as_written(p, stage)
    if stage == "01_annotate":
        local = {"judge": p.annotate.judge.local} if p.annotate.method == "judge" and p.annotate.judge.local else {}
        specs = {side: getattr(p, side) for side in p.annotate.engines} | local
        return {side: _Model(p, spec, _shape(p, spec, side)) for side, spec in specs.items()}
    specs = {"small": p.tuned, "big": p.big}
    needless = p.grpo.rollout == "self" and p.latency.source != "calibrate"
    if stage == "02_sft" or (stage == "03_grpo" and needless):
        del specs["big"]
    if stage == "03_grpo" and p.grpo.use_vllm:
        specs["rollouts"] = p.rollout_small
    return {side: _Model(p, spec, _shape(p, spec, side)) for side, spec in specs.items()}


def _shape(p: Params, spec: ModelSpec, side: str) -> Shape:
    side = "big" if side == "big" else "small"
    path = p.small.path if spec.path == p.learner.path else spec.path  # what 02 merges has the same shape
    if path != str(p.where("00_arith_pair") / side):
        return shape(path, spec.revision)
    a = getattr(p.arith, side)  # 100: printable ASCII, the end, two tags of thought and two of this method
    heads = a.num_attention_heads
    return qwen2(a.hidden_size, a.num_hidden_layers, heads, heads, a.intermediate_size, 100, 512, tied=True)


def contexts(p: Params) -> list[int]:
    """Tokens that each model of the pair holds which reads traces in stage 01."""
    held = models(p, "01_annotate")
    return [held[side].context for side in p.annotate.engines]


def needs(p: Params, stages: tuple[str, ...] = STAGES) -> list[Need]:
    """All that the stages need, by kind and device."""
    return [need for stage in stages if stage in STAGES for need in _needs(p, stage)]


def _needs(p: Params, stage: str) -> Iterator[Need]:
    p = as_written(p, stage)
    workers = {"02_sft": p.sft.processes, "03_grpo": p.grpo.processes}.get(stage, 1)
    slots = p.rollout_slots if stage == "03_grpo" else p.offload.slots
    passes: dict[tuple[str, int], float] = {}  # by device and process: models of one process work in turn
    for side, model in models(p, stage).items():
        trained = side == "small" and stage in ("02_sft", "03_grpo")
        own, served = model.devices(), -1 if model.spec.engine == "vllm" else 0  # -1: vLLM's own process
        places = [(own, served)]
        if workers > 1 and not model.spec.url:  # a copy in each process, on a GPU of its own
            copies = [(own if own == ["cpu"] else [f"cuda:{i}"], i + 1) for i in range(workers)]
            places = places + copies if side == "big" else copies
        together = slots * (workers if model.spec.url else 1)
        length = min(p.sft.max_length, model.shape.context)  # of a worked trace
        parts = {"weights": model.weights(), "caches": model.caches(together)}
        active = model.generating(together)
        writes = side == "judge" or (side == "big" and p.annotate.tries)
        if stage == "01_annotate" and not writes:
            active = model.scoring(p.annotate.batch_size, length)
            parts["caches"] = 0.0 if model.spec.engine == "transformers" else model.caches(p.annotate.batch_size)
        if trained:
            c = p.sft if stage == "02_sft" else p.grpo
            batch = c.batch_size // workers // c.gradient_accumulation_steps
            length = length if stage == "02_sft" else model.tokens
            if p.grpo.use_vllm and stage == "03_grpo":  # another copy writes
                parts["caches"], active = 0.0, 0.0
            full, packed = (stage == "02_sft" and each for each in (p.sft.method == "full", p.sft.packing))
            parts["training"] = model.whole(workers) if full else TRAINABLE * model.shape.lora(p.sft.lora_rank)
            active = max(active, model.training(batch, length, c.gradient_checkpointing, full, packed))
        for devices, process in places:
            for device in devices:
                yield from (Need(stage, kind, side, device, size / GIB / len(devices)) for kind, size in parts.items())
                passes[device, process] = max(passes.get((device, process), 0.0), active / GIB)
    for (device, _), gib in sorted(passes.items()):
        yield Need(stage, "activations", "a forward pass", device, gib)
        yield Need(stage, "process", "CUDA context", device, PROCESS)


def limit(p: Params, device: str) -> float:
    """GiB there are on a device."""
    if device == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    return p.hardware.gpu_gb if int(device.partition(":")[2]) < p.hardware.gpus else 0.0


def totals(p: Params, stage: str) -> dict[str, dict[str, float]]:
    """GiB by device and kind."""
    sums: dict[str, dict[str, float]] = {}
    for need in needs(p, (stage,)):
        kinds = sums.setdefault(need.device, dict.fromkeys(KINDS, 0.0))
        kinds[need.kind] += need.gib
    return sums


def faults(p: Params, stage: str) -> list[str]:
    """What does not fit, a clause for each device and cache."""
    found = []
    for device, kinds in totals(p, stage).items():
        total, there = sum(kinds.values()), limit(p, device)
        if not there:
            found.append(f"there is no {device}, as hardware.gpus is {p.hardware.gpus}")
        elif total > there:
            parts = ", ".join(f"{kind} {gib:.1f}" for kind, gib in kinds.items() if gib >= 0.05)
            found.append(f"{total:.1f} GiB are needed on {device} ({parts}), and there are {there:.1f}")
    held = models(p, stage)
    for key in _in_bf16(p, held):
        found.append(f"{key} is bfloat16, in which a {p.hardware.gpu} does not compute")
    for side, model in held.items():
        if model.spec.kv_cache_gb and model.devices() and sequences(model) < 1:
            one, given = model.cache(model.tokens) / GIB / len(model.devices()), model.spec.kv_cache_gb
            found.append(f"one sequence takes {one:.2f} GiB, and {_cache_key(side)} is {given:g}")
    return found


def _in_bf16(p: Params, held: dict[str, _Model]) -> list[str]:
    """The parameters that ask for bfloat16 on a GPU (`hardware.gpu`) that has none."""
    if GPUS[p.hardware.gpu].bf16:
        return []
    sections = {
        "small": "pair.tuned" if p.pair.tuned else "pair.small",
        "big": "pair.big",
        "judge": "annotate.judge.local",
    }
    there = {side: model for side, model in held.items() if side in sections and model.devices() not in ([], ["cpu"])}
    return [f"{sections[side]}.dtype" for side, model in there.items() if model.spec.dtype == "bfloat16"]


def _cache_key(side: str) -> str:
    """The parameter for the size of a model's KV cache."""
    return "grpo.vllm_kv_cache_gb" if side == "rollouts" else f"pair.{side}.kv_cache_gb"


def sequences(model: _Model) -> int:
    """How many sequences of full length a KV cache of given size holds."""
    return int(model.caches(1) // model.cache(model.tokens))


def check(p: Params, stage: str) -> None:
    """Refuse a stage that does not fit, before anything is loaded.

    Raises:
        SrlibError: what is needed, what there is, and a change of parameters with which it fits.
    """
    if found := faults(p, stage):
        raise SrlibError(f"{stage} does not fit: {'; '.join(found)}. {mend(p, stage)}")


def mend(p: Params, stage: str) -> str:
    """A sentence that names the first change, or else the first few together, with which a stage fits."""
    knobs = list(_knobs(p, stage))
    for key, values in knobs:
        for value in values:
            if (change := _fitting(p, stage, {key: value})) is not None:
                return change
    together: dict[str, Any] = {}
    for key, values in knobs:
        for value in values:
            together |= {key: value}
            if (change := _fitting(p, stage, together)) is not None:
                for name in list(together):  # those that are not needed
                    rest = {k: v for k, v in together.items() if k != name}
                    if (fewer := _fitting(p, stage, rest)) is not None:
                        together, change = rest, fewer
                return change
    return "No setting alone or together mends that: it needs smaller models or more memory."


def _fitting(p: Params, stage: str, change: dict[str, Any]) -> str | None:
    """The sentence for a change with which the stage fits, else None."""
    values = p.model_dump()
    for key, value in change.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section[name]
        section[last] = value
    try:
        changed = build(values, "changed", Params)
    except SrlibError:
        return None
    if faults(changed, stage):
        return None
    gib = max((sum(kinds.values()) for kinds in totals(changed, stage).values()), default=0.0)
    return f"It fits with {', '.join(f'{key}: {value}' for key, value in change.items())} ({gib:.1f} GiB)."


def _knobs(p: Params, stage: str) -> Iterator[tuple[str, list[Any]]]:
    """Parameters that save memory, and values to try, gentlest first."""

    def down(value: int, least: int) -> list[int]:
        return [value >> i for i in range(1, value.bit_length()) if value >> i >= least]

    held, gpus = models(p, stage), p.hardware.gpus
    for key in _in_bf16(p, held):
        yield key, ["float16"]
    if stage in ("02_sft", "03_grpo"):
        yield f"{stage[3:]}.gradient_checkpointing", [True]
        c = p.sft if stage == "02_sft" else p.grpo
        own = c.batch_size // c.processes
        yield f"{stage[3:]}.gradient_accumulation_steps", sorted(own // micro for micro in down(own, 1))
    if stage == "02_sft":
        yield "sft.packing", [False] if p.sft.packing else []
        yield "sft.method", ["lora"] if p.sft.method == "full" else []
    if stage == "01_annotate":
        yield "annotate.batch_size", down(p.annotate.batch_size, 1)
    if "big" in held and gpus > 1:
        big = held["big"].spec
        if big.engine == "vllm":
            yield "pair.big.tensor_parallel", [n for n in (2, 4, 8, 16) if big.tensor_parallel < n <= gpus]
        else:
            yield "pair.big.device", [f"cuda:{i}" for i in range(1, gpus)]
    for side in held:
        if size := held[side].spec.kv_cache_gb:
            one = held[side].cache(held[side].tokens) / GIB / max(1, len(held[side].devices()))
            yield _cache_key(side), [round(x * one + 0.05, 1) for x in (64, 16, 4, 1) if x * one != size]
    if not p.offload.stream_chunk:
        yield "offload.stream_chunk", [256]
    if p.offload.oversubscribe:
        yield "offload.oversubscribe", [0]
    at_once = "grpo.rollouts_at_once" if stage == "03_grpo" and p.grpo.rollouts_at_once else "offload.batch_size"
    if stage == "bench":
        sizes = sorted(p.bench.batch_sizes)
        yield "bench.batch_sizes", [sizes[:n] for n in range(len(sizes) - 1, 0, -1)]
    elif stage != "07_latency":
        yield at_once, down(p.grpo.rollouts_at_once if "grpo" in at_once else p.offload.batch_size, 1)
    for side in ("big", "small"):
        if side in held and held[side].spec.quantization == "none":
            yield f"pair.{side}.quantization", ["fp8" if held[side].spec.engine == "vllm" else "nf4"]
    longest = "bench.max_tokens" if stage in ("07_latency", "bench") else "offload.max_tokens"
    yield longest, down(p.bench.max_tokens, 16) if longest == "bench.max_tokens" else down(p.offload.max_tokens, 256)
    if stage in ("01_annotate", "02_sft"):
        yield "sft.max_length", down(p.sft.max_length, 256)


def table(p: Params) -> tuple[str, bool]:
    """What `python -m srlib plan` prints, and whether all of it fits."""
    lines, notes = [], []
    names: dict[str, _Model] = {}
    for stage in (stage for stage in STAGES if stage not in p.left_out):
        alike: dict[str, list[str]] = {}  # devices by their figures
        for device, kinds in sorted(totals(p, stage).items()):
            total, there = sum(kinds.values()), limit(p, device)
            cells = "".join(f"{gib:>12.2f}" for gib in (*kinds.values(), total, there))
            alike.setdefault(f"{cells}  {'yes' if total <= there else 'NO'}", []).append(device)
        for cells, devices in alike.items():
            several = f"…{devices[-1].rpartition(':')[2]}" if devices[1:] else ""
            lines.append(f"{stage:<13}{devices[0] + several:<9}{cells}")
        if found := faults(p, stage):
            notes.append(f"{stage} does not fit: {'; '.join(found)}. {mend(p, stage)}")
        if stage not in ("07_latency", "bench"):  # whose traces are shorter
            names |= models(p, stage)
    head = f"{'stage':<13}{'device':<9}" + "".join(f"{name:>12}" for name in (*KINDS, "total", "there is")) + "  fits"
    about = [_about(side, model) for side, model in names.items()]
    parts = (f"{p.run}, in GiB", "", *about, "", head, *lines, "", *(notes or ["Every stage fits."]))
    return "\n".join(parts), not notes


def _about(side: str, model: _Model) -> str:
    """Two lines on one model."""
    spec, where = model.spec, ", ".join(model.devices()) or "another machine"
    size = model.shape.parameters
    count = f"{size / 1e9:.3f} billion" if size > 1e8 else f"{size:,}"
    how = spec.quantization if spec.quantization != "none" else f"{8 * model.bytes} bits"
    lines = (
        f"{side:<9}{str(spec.path).removeprefix(f'{ROOT}/')}: {count} parameters, {how}, {model.weights() / GIB:.2f} GiB, ",
        f"{spec.engine}{' server' if spec.url else ''} on {where}\n",
        f"         a sequence of {model.tokens:,} tokens takes {model.cache(model.tokens) / GIB:.2f} GiB of KV cache",
        f", and the cache holds {sequences(model)} of them" if spec.kv_cache_gb else "",
    )
    return "".join(lines)
