"""The engine on transformers: CPU or one GPU, ragged batches over a slot cache.

Every open sequence owns a slot of pre-allocated keys and values. A step gathers what is
waiting, whatever its length or age, into one forward pass for the sequences with a single new
token and one for those with more, so that each token is processed once and decoding is not
padded to the length of a prompt that came in beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.utils import logging

from srlib import SrlibError
from srlib.engine import Counters, Request, Sequence, check
from srlib.params import ModelSpec


@dataclass
class _Where:
    """Where the forward pass under way reads and writes the slots."""

    slots: torch.Tensor | slice  # (B,)
    rows: torch.Tensor  # (N,) slot of each new token
    positions: torch.Tensor  # (N,) position of each new token
    real: torch.Tensor | None  # (B, T) which of the inputs are tokens and not padding; None: all
    length: int  # S, the longest row


class _SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, (slots, heads, length, head size)."""

    is_sliding = False

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.slots, self.length, self.where = slots, 0, None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys, self.values = (
            x.new_zeros(self.slots, x.shape[1], 0, x.shape[3]) for x in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        where = self.where
        if where.length > self.length:
            self.length = max(64, 2 * self.length, where.length)
            self.keys, self.values = (
                torch.cat([x, x.new_zeros(*x.shape[:2], self.length - x.shape[2], x.shape[3])], 2)
                for x in (self.keys, self.values)
            )
        answers = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            new = new.transpose(1, 2)  # (B, T, heads, head size)
            store[where.rows, :, where.positions] = new.flatten(0, 1) if where.real is None else new[where.real]
            answers.append(store[where.slots, :, : where.length])  # (B, heads, S, head size)
        return tuple(answers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.where.length, 0

    def get_seq_length(self) -> int:
        return self.where.length if self.where else 0

    def get_max_length(self) -> int:
        return -1


class TransformersEngine:
    """A causal language model with a KV cache for each open sequence.

    Args:
        model: any decoder with rotary positions and full attention; may be a live PEFT model.
        tokenizer: kept for callers; the engine itself deals in ids.
        slots: how many sequences can be open at the same time.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, slots: int = 64) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.tokenizer = tokenizer
        self.slots = slots
        self.context = self.model.config.max_position_embeddings
        eos = self.model.generation_config.eos_token_id
        eos = eos if isinstance(eos, list) else [eos]
        self.eos = frozenset(i for i in (*eos, tokenizer.eos_token_id) if i is not None)
        self.counters = Counters()
        self.pending: list[Request] = []
        self._free = list(range(slots))[::-1]
        self._layers = [_SlotLayer(slots) for _ in range(self.model.config.num_hidden_layers)]
        self._cache = Cache(layers=self._layers)

    @property
    def device(self) -> torch.device:
        return self.model.device

    def open(self, ids: list[int], temperature: float = 0.0, top_p: float = 1.0, seed: int = 0) -> Sequence:
        """Give a sequence a slot; nothing is computed yet. Temperature 0 is greedy.

        Raises:
            RuntimeError: all slots are taken.
        """
        if not self._free:
            raise RuntimeError(f"all {self.slots} slots are taken; close a sequence first")
        return Sequence(self._free.pop(), list(ids), temperature, top_p, seed)

    def close(self, sequence: Sequence) -> None:
        """Give the slot back."""
        self._free.append(sequence.slot)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Take back all but the first `length` ids of a sequence."""
        del sequence.ids[length:]
        if sequence.processed > length:
            self._uncache(sequence, length)

    def submit(self, request: Request) -> Request:
        """Ask for work; it is done in later steps."""
        request.sequence.ids += request.feed
        self.pending.append(request)
        return request

    def run(self, *requests: Request) -> list[Request]:
        """Submit and step until all of `requests` are done."""
        open_ = {id(self.submit(request)) for request in requests}
        while open_:
            open_ -= {id(request) for request in self.step()}
        return list(requests)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One token further for every pending request; returns those that are done."""
        start = time.perf_counter()
        for request in self.pending:
            sequence = request.sequence
            if request.max_new and sequence.processed == len(sequence.ids) and sequence.logits is None:
                self._uncache(sequence, sequence.processed - 1)  # its last id is read again, for the logits
        behind = [len(r.sequence.ids) - r.sequence.processed for r in self.pending]
        for batch in (
            [r for r, n in zip(self.pending, behind) if n == 1],
            [r for r, n in zip(self.pending, behind) if n > 1],
        ):
            if batch:
                self._forward(sorted(batch, key=lambda r: r.sequence.slot))
        self._sample([r for r in self.pending if r.max_new])
        done = [r for r in self.pending if len(r.ids) >= r.max_new or r.stopped]
        finished = set(done)
        self.pending = [r for r in self.pending if r not in finished]
        self.counters.seconds += time.perf_counter() - start
        return done

    @torch.inference_mode()
    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability of every id of each sequence but its first, given what stands before it.

        One padded forward pass over all of `sequences`, without a cache: choose the batch to fit.
        """
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [s[-1]] * (longest - len(s)) for s in sequences], device=self.device)  # (B, T)
        logits = self.model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # (B, T-1, V)
        logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)  # (B, T-1)
        self.counters.forward_tokens += sum(map(len, sequences))
        self.counters.calls += 1
        return [row[: len(s) - 1] for row, s in zip(logprobs.tolist(), sequences)]

    def _uncache(self, sequence: Sequence, length: int) -> None:
        self.counters.discarded_tokens += sequence.processed - length
        sequence.processed, sequence.logits = length, None

    def _forward(self, batch: list[Request]) -> None:
        """Process all unprocessed ids of `batch`; leaves the last logits with each sequence."""
        sequences = [r.sequence for r in batch]
        new = [s.ids[s.processed :] for s in sequences]
        width = max(map(len, new))  # T
        ids = torch.tensor([x + [0] * (width - len(x)) for x in new], device=self.device)  # (B, T)
        start = torch.tensor([s.processed for s in sequences], device=self.device)  # (B,)
        positions = start[:, None] + torch.arange(width, device=self.device)  # (B, T)
        slots = torch.tensor([s.slot for s in sequences], device=self.device)  # (B,)
        counts = torch.tensor([len(x) for x in new], device=self.device)
        real = None if width == 1 else torch.arange(width, device=self.device) < counts[:, None]  # (B, T)
        rows = slots[:, None].expand_as(positions)
        length = max(len(s.ids) for s in sequences)  # S
        first, last = sequences[0].slot, sequences[-1].slot
        where = _Where(
            # neighbouring slots are read in place, others are gathered
            slots=slice(first, last + 1) if last - first + 1 == len(sequences) else slots,
            rows=rows.flatten() if real is None else rows[real],
            positions=positions.flatten() if real is None else positions[real],
            real=real,
            length=length,
        )
        for layer in self._layers:
            layer.where = where
        mask = torch.arange(length, device=self.device) <= positions[:, :, None]  # (B, T, S)
        hidden = self.model.get_decoder()(
            input_ids=ids,
            attention_mask=mask[:, None],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        ).last_hidden_state  # (B, T, D)
        # Logits only where they are used: at fed positions of an extend, else at the last one.
        wanted = [
            (row, column)
            for row, (request, x) in enumerate(zip(batch, new))
            for column in range(len(x) - max(1, 0 if request.max_new else len(request.feed)), len(x))
        ]
        row, column = torch.tensor(wanted, device=self.device).T
        logits = self.model.get_output_embeddings()(hidden[row, column]).float()  # (N, V)
        self.counters.calls += 1
        at = 0
        for request, x in zip(batch, new):
            sequence, asked = request.sequence, 0 if request.max_new else len(request.feed)
            here = logits[at : at + max(1, asked)]
            at += max(1, asked)
            sequence.processed, sequence.logits = len(sequence.ids), here[-1]
            sequence.forwarded += len(x)
            self.counters.forward_tokens += len(x)
            if asked:
                request.own = [self._draw(sequence, line) for line in here]
                if request.watch is not None:
                    scale = sequence.temperature or 1.0
                    request.watched = (here / scale).log_softmax(-1)[:, request.watch].tolist()

    def _sample(self, requests: list[Request]) -> None:
        """Write the next id of each request."""
        if not requests:
            return
        logits = torch.stack([r.sequence.logits for r in requests])  # (R, V)
        scale = torch.tensor([r.sequence.temperature or 1.0 for r in requests], device=logits.device)
        logprobs = (logits / scale[:, None]).log_softmax(-1)
        chosen = logits.argmax(-1).tolist()
        for i, request in enumerate(requests):
            if request.sequence.temperature:
                chosen[i] = self._draw(request.sequence, logits[i])
        picked = logprobs[range(len(chosen)), chosen].tolist()
        self.counters.decoded_tokens += len(requests)
        for request, token, logprob in zip(requests, chosen, picked):
            request.sequence.ids.append(token)
            request.ids.append(token)
            request.logprobs.append(logprob)

    def _draw(self, sequence: Sequence, logits: torch.Tensor) -> int:
        """The next id of one sequence from its logits (V,), with the sequence's own random state."""
        if not sequence.temperature:
            return int(logits.argmax())
        if sequence.generator is None:
            sequence.generator = torch.Generator(logits.device).manual_seed(sequence.seed)
        scores = logits[None] / sequence.temperature
        if sequence.top_p < 1:
            scores = TopPLogitsWarper(sequence.top_p)(None, scores)
        return int(torch.multinomial(scores.softmax(-1), 1, generator=sequence.generator))


def device_of(spec: ModelSpec) -> str:
    """The device a spec asks for; `auto` is the GPU if there is one.

    Raises:
        SrlibError: a GPU is asked for, and there is none.
    """
    if spec.device.startswith("cuda") and not torch.cuda.is_available():
        raise SrlibError(f"device is {spec.device}, but torch sees no GPU here; set it to auto or cpu.")
    return spec.device if spec.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def dtype_of(spec: ModelSpec) -> torch.dtype:
    """The dtype a spec asks for; `auto` is fp32 on a CPU, where bf16 is emulated and slow."""
    if spec.dtype != "auto":
        return getattr(torch, spec.dtype)
    return torch.float32 if device_of(spec) == "cpu" else torch.bfloat16


def load_model(spec: ModelSpec, merge: bool = True) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a spec; an adapter is merged or left trainable, and brings its tokenizer with the tags.

    On quantised weights an adapter is never merged: to round it into four bits would undo it.

    Raises:
        SrlibError: no such model or adapter, or one of its files is damaged.
    """
    check(spec)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            spec.path,
            dtype=dtype_of(spec),
            attn_implementation="sdpa",
            use_safetensors=True,
            quantization_config=_quantization(spec),
            device_map={"": device_of(spec)},
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise SrlibError(f"{spec.path} is no folder here, and the hub gave no such model: {reason}") from None
    tokenizer = AutoTokenizer.from_pretrained(spec.adapter or spec.path)
    if spec.adapter is not None:
        from peft import PeftModel

        fit_embeddings(model, tokenizer)
        model = PeftModel.from_pretrained(model, spec.adapter, is_trainable=not merge)
        model = model.merge_and_unload() if merge and spec.quantization == "none" else model
    return model.eval(), tokenizer


def _quantization(spec: ModelSpec) -> BitsAndBytesConfig | None:
    if spec.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=spec.quantization == "nf4",
        load_in_8bit=spec.quantization == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype_of(spec),
    )


def fit_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Grow the embeddings if the tokenizer has ids beyond them; many models have rows to spare."""
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # how the new rows start is of no matter: they are trained, or loaded
        model.resize_token_embeddings(len(tokenizer))
        logging.set_verbosity(verbosity)


def load(spec: ModelSpec, slots: int) -> TransformersEngine:
    """See `srlib.engine.load`."""
    return TransformersEngine(*load_model(spec), slots)
