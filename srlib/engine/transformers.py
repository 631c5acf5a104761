"""The engine on transformers: CPU or one GPU, ragged batches over a slot cache.

Every open sequence owns a slot of pre-allocated keys and values. A step packs what is waiting,
whatever its length or age, into one row of tokens without padding and does one forward pass.
Only attention sees sequences: those with about as many new tokens share a call, which reads
the keys and values where they lie.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from itertools import chain, islice

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import Cache, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface
from transformers.utils import logging

from srlib import SrlibError
from srlib.engine import GREEDY, SCORE_POSITIONS, SCORE_TOKENS, Counters, Request, Sampling, Sequence, check
from srlib.params import ModelSpec

ATTENTION = "srlib_slots"
PADDING = 150_000  # multiplications of queries with keys, in one layer, that cost about as much as one more call


class _Fresh:
    """What a forward pass processes: the unprocessed ids of some sequences, one after the other in a packed row."""

    def __init__(self, sequences: list[Sequence], asked: list[int]) -> None:
        """Args: sequences: ordered by slot. asked: at how many of its last ids each wants logits."""
        fresh = [s.ids[s.processed :] for s in sequences]
        self.ids = list(chain.from_iterable(fresh))  # (N,)
        self.slots = np.array([s.slot for s in sequences])  # (n,), as the next three
        self.starts = np.array([s.processed for s in sequences])
        self.counts = np.array(list(map(len, fresh)))
        self.firsts = self.counts.cumsum() - self.counts  # place of the first id of each in the packed row
        self.rows = self.slots.repeat(self.counts)  # (N,) slot and position of each id
        self.positions = np.arange(len(self.ids)) + (self.starts - self.firsts).repeat(self.counts)
        counts = np.array(asked)
        self.answers = counts.cumsum() - counts  # (n,) the first row of logits of each
        places = self.firsts + self.counts - counts - self.answers
        self.wanted = np.arange(counts.sum()) + places.repeat(counts)  # (W,) places with logits in the packed row


class _Group:
    """Sequences of a forward pass that attend in one call, padded to the longest of them."""

    def __init__(self, fresh: _Fresh, chosen: np.ndarray, heads: np.ndarray, device, dtype) -> None:
        """Args: chosen: which of the sequences. heads: (K, G) numbers of the query heads of each key."""
        slots, starts, counts = fresh.slots[chosen], fresh.starts[chosen], fresh.counts[chosen]
        self.length = int((starts + counts).max())  # S
        width = int(counts.max())  # T
        # Most slots of a stretch: it is read in place, idle slots and all. Few: theirs are copied.
        whole = 2 * len(slots) > slots[-1] - slots[0]
        rows = slots - slots[0] if whole else np.arange(len(slots))
        self.slots = slice(slots[0], slots[-1] + 1) if whole else torch.as_tensor(slots, device=device)
        size = int(rows[-1]) + 1  # B
        self.shape = (size, len(heads), width * heads.shape[1])  # B, K, T·G
        columns = np.minimum(np.arange(width), counts[:, None] - 1)  # (n, T), padding repeats the last
        places, last = np.zeros((2, size, width), dtype=np.int64)  # in the packed row, and position of each query
        self.places = places[rows] = fresh.firsts[chosen, None] + columns
        last[rows] = starts[:, None] + columns
        self.answers = rows[:, None] * width + columns  # (n, T) among the B·T of the call
        # (B, T) in the packed row → (B, K, T, G) in that of all heads
        queries = places[:, None, :, None] * heads.size + heads[:, None]
        self.queries = torch.as_tensor(queries.ravel(), device=device)
        unseen = torch.arange(self.length, device=device) > torch.as_tensor(last, device=device)[..., None]  # (B, T, S)
        mask = torch.zeros(unseen.shape, dtype=dtype, device=device).masked_fill_(unseen, -torch.inf)
        self.mask = (mask.repeat_interleave(heads.shape[1], 1) if width > 1 < heads.shape[1] else mask)[:, None]


class _Groups:
    """The groups of a forward pass, and where each token finds its answers among theirs."""

    def __init__(self, fresh: _Fresh, parts: list[np.ndarray], heads: np.ndarray, device, dtype) -> None:
        self.groups = [_Group(fresh, part, heads, device, dtype) for part in parts]
        order, before = np.empty_like(fresh.positions), 0
        for group in self.groups:
            order[group.places] = before + group.answers
            before += len(group.queries) // heads.size
        # Answers come as (B, T, G, K), and go as (N, K, G).
        order = order[:, None] * heads.size + heads.reshape(heads.shape[::-1]).T.ravel()
        self.order = torch.as_tensor(order.ravel(), device=device)  # (N·H,)


class _Slots(Cache):
    """Keys and values of every layer, (slots, heads, length, head size)."""

    def __init__(self, slots: int, context: int) -> None:
        super().__init__(layers=[])
        self.slots, self.context, self.length = slots, context, 0
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.rows = self.positions = None  # (N,) slot and position of each token of the pass under way

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` ids."""
        if length > self.length:
            self.length = max(length, min(max(64, 2 * self.length), self.context))
            for store in (self.keys, self.values):
                for layer, x in store.items():
                    store[layer] = x.new_zeros(*x.shape[:2], self.length, x.shape[3])
                    store[layer][:, :, : x.shape[2]] = x

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        answers = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx not in store:
                store[layer_idx] = new.new_zeros(self.slots, new.shape[1], self.length, new.shape[3])
            store[layer_idx][self.rows, :, self.positions] = new[0].transpose(0, 1)  # (N, heads, head size)
            answers.append(store[layer_idx])
        return tuple(answers)


def _attend(module, query, key, value, attention_mask, scaling=None, groups: _Groups | None = None, **kwargs):
    """Attention over the slots: query (1, H, N, D); key and value are the stores. Without `groups` it is SDPA."""
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    heads, size = query.shape[1], query.shape[3]
    packed = query[0].transpose(0, 1).reshape(-1, size)  # (N·H, D)
    answers = []
    for group in groups.groups:
        # The heads that share a key stand beside each other as queries, so that keys are not repeated.
        q = packed.index_select(0, group.queries).view(*group.shape, size)  # (B, K, T·G, D)
        k, v = (x[:, :, : group.length] for x in (key, value))
        k, v = (x[group.slots] if isinstance(group.slots, slice) else x.index_select(0, group.slots) for x in (k, v))
        answer = scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scaling)
        answers.append(answer.transpose(1, 2).reshape(-1, size))
    return torch.cat(answers).index_select(0, groups.order).view(1, -1, heads, size), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class TransformersEngine:
    """A causal language model with a KV cache for each open sequence; it works in steps.

    Args:
        model: any decoder with rotary positions and full attention; may be a live PEFT model.
        tokenizer: kept for callers; the engine itself deals in ids.
        slots: how many sequences can be open at the same time.
        context: longest sequence; None: the model's own.
    """

    running = False
    attention = ATTENTION

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: int = 64,
        context: int | None = None,
    ) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if self.model.config._attn_implementation != ATTENTION:
            self.model.set_attn_implementation(ATTENTION)
        self.tokenizer = tokenizer
        self.slots = slots
        config = self.model.config
        self.context = min(context or config.max_position_embeddings, config.max_position_embeddings)
        self.eos = eos_of(self.model.generation_config, tokenizer)
        self.counters = Counters()
        self.pending: list[Request] = []
        self._free = list(range(slots))[::-1]
        self._cache = _Slots(slots, self.context)
        # (K, G) numbers of the query heads of each key
        self._heads = np.arange(config.num_attention_heads).reshape(config.num_key_value_heads, -1)
        self._query_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._query_size *= config.num_attention_heads

    @property
    def device(self) -> torch.device:
        return self.model.device

    def open(self, ids: list[int], sampling: Sampling = GREEDY) -> Sequence:
        """Give a sequence a slot; nothing is computed yet.

        Raises:
            RuntimeError: all slots are taken.
        """
        if not self._free:
            raise RuntimeError(f"all {self.slots} slots are taken; close a sequence first")
        return Sequence(self._free.pop(), list(ids), sampling)

    def close(self, sequence: Sequence) -> None:
        """Give the slot back; what was asked for the sequence is forgotten."""
        self.pending = [r for r in self.pending if r.sequence is not sequence]
        self._free.append(sequence.slot)

    def truncate(self, sequence: Sequence, length: int) -> None:
        """Take back all but the first `length` ids of a sequence."""
        del sequence.ids[length:]
        if sequence.processed > length:
            self._uncache(sequence, length)

    def submit(self, request: Request) -> Request:
        """Ask for work; it is done in later steps."""
        request.start = len(request.sequence.ids)
        request.sequence.ids += request.feed
        self.pending.append(request)
        return request

    def cancel(self, request: Request) -> None:
        """Take a request back: it is not answered, and the sequence is as it was before it."""
        if request in self.pending:
            self.pending.remove(request)
        self.truncate(request.sequence, request.start)

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
        writing = [r for r in self.pending if r.max_new]
        for request in writing:
            sequence = request.sequence
            if sequence.processed == len(sequence.ids) and sequence.logits is None:
                self._uncache(sequence, sequence.processed - 1)  # its last id is read again, for the logits
        behind = {id(s): s for s in (r.sequence for r in self.pending) if s.processed < len(s.ids)}
        asking = self._forward(sorted(behind.values(), key=lambda s: s.slot)) if behind else []
        ended = self._draw(writing, asking)
        done = [r for r in self.pending if not r.max_new or r in ended]
        self.pending = [r for r in self.pending if r.max_new and r not in ended]
        self.counters.seconds += time.perf_counter() - start
        return done

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability of every id of each sequence but its first, given what stands before it.

        One padded batch of all of `sequences`, read `SCORE_TOKENS` ids at a time: choose the batch
        so that its keys and values fit.
        """
        return self._scan(sequences, lambda logprobs, ids: logprobs.gather(-1, ids[:, None])[:, 0])

    def entropies(self, sequences: list[list[int]]) -> list[list[float]]:
        """As `score`, but the entropy in nats of the distribution that each id was drawn from."""
        return self._scan(sequences, lambda logprobs, _: torch.special.entr(logprobs.exp()).sum(-1))

    @torch.inference_mode()
    def _scan(
        self, sequences: list[list[int]], reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> list[list[float]]:
        """`reduce` of the log-probabilities (N, V) and the ids (N,) that came next, for each place of `sequences`."""
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [s[-1]] * (longest - len(s)) for s in sequences], device=self.device)  # (B, T)
        width = max(1, SCORE_TOKENS // len(sequences))
        cache = DynamicCache(config=self.model.config) if longest > width else None
        head, values = self.model.get_output_embeddings(), []
        for chunk, after in zip(ids.split(width, 1), ids.roll(-1, 1).split(width, 1)):  # (B, W)
            hidden = self.model.get_decoder()(
                input_ids=chunk, past_key_values=cache, use_cache=cache is not None
            ).last_hidden_state  # (B, W, E)
            flat = hidden.flatten(0, 1).split(SCORE_POSITIONS), after.flatten().split(SCORE_POSITIONS)
            # some places at a time: the logits of all would be larger than the model
            reduced = [reduce(head(h).float().log_softmax(-1), i) for h, i in zip(*flat)]
            values.append(torch.cat(reduced).view(after.shape))
            self.counters.calls += 1
        self.counters.forward_tokens += sum(map(len, sequences))
        return [row[: len(s) - 1] for row, s in zip(torch.cat(values, 1).tolist(), sequences)]

    def _uncache(self, sequence: Sequence, length: int) -> None:
        self.counters.discarded_tokens += sequence.processed - length
        sequence.processed, sequence.logits = length, None

    def _forward(self, sequences: list[Sequence]) -> list[tuple[Request, torch.Tensor]]:
        """Process all unprocessed ids of `sequences`; leaves the last logits with each.

        Returns:
            the requests that ask, each with the logits (ask, V) of the places it asks about.
        """
        device = self.device
        asking: dict[int, Request] = {id(r.sequence): r for r in self.pending if r.ask}
        # Logits only where they are used: at the places asked for, else at the last one.
        fresh = _Fresh(sequences, [asking[id(s)].ask if id(s) in asking else 1 for s in sequences])
        cache = self._cache
        cache.rows, cache.positions = (torch.as_tensor(x, device=device) for x in (fresh.rows, fresh.positions))
        cache.reserve(int(fresh.positions.max()) + 1)
        hidden = self.model.get_decoder()(
            input_ids=torch.tensor([fresh.ids], device=device),
            attention_mask=torch.empty(1, 1, 1, 1, device=device),  # stands for "made already": see _Group
            position_ids=cache.positions[None],
            past_key_values=cache,
            use_cache=True,
            groups=_Groups(fresh, self._alike(fresh), self._heads, device, self.model.dtype),
        ).last_hidden_state  # (1, N, E)
        wanted = torch.as_tensor(fresh.wanted, device=device)
        logits = self.model.get_output_embeddings()(hidden[0, wanted]).float()  # (W, V)
        asked: list[tuple[Request, torch.Tensor]] = []
        for s, new, at in zip(sequences, fresh.counts.tolist(), fresh.answers.tolist()):
            request = asking.get(id(s))
            if request:
                asked.append((request, logits[at : at + request.ask]))
                at += request.ask - 1
            self.counters.prefilled_tokens += new if new > 1 else 0
            self.counters.reread_tokens += max(0, min(s.longest, len(s.ids)) - s.processed)
            s.forwarded += new
            s.processed, s.logits = len(s.ids), logits[at]
            s.longest = max(s.longest, s.processed)
        self.counters.forward_tokens += len(fresh.ids)
        self.counters.calls += 1
        return asked

    def _alike(self, fresh: _Fresh) -> list[np.ndarray]:
        """Sequences of about as many new tokens: a wider group takes a narrower one in if that costs little."""
        ends = fresh.starts + fresh.counts
        parts: list[np.ndarray] = []
        for width in sorted(set(fresh.counts.tolist())):
            part = np.flatnonzero(fresh.counts == width)
            if parts:
                both = np.sort(np.concatenate((parts[-1], part)))
                padding = width * len(both) - fresh.counts[both].sum()
                if padding * ends[both].max() * self._query_size <= PADDING:
                    parts.pop()
                    part = both
            parts.append(part)
        return parts

    def _draw(self, writing: list[Request], asking: list[tuple[Request, torch.Tensor]]) -> set[Request]:
        """Write the next id of each request that writes, and answer those that ask; returns the writers that end."""
        rows = [r.sequence.logits for r in writing]  # each (V,)
        at = [(r.sequence.sampling, len(r.sequence.ids)) for r in writing]
        watched: list[int | None] = [None] * len(writing)  # None: the id that is drawn
        for request, logits in asking:
            end = len(request.sequence.ids)
            rows += logits.unbind()
            at += [(request.sequence.sampling, i) for i in range(end - request.ask + 1, end + 1)]
            watched += [request.watch] * request.ask
        unsure = any(r.max_entropy is not None for r in writing)
        drawn: list[tuple[int, float, float]] = []  # for each row: the id, the log-probability, the entropy in nats
        for i in range(0, len(rows), SCORE_POSITIONS):
            part = slice(i, i + SCORE_POSITIONS)
            chosen, logprobs = draw(torch.stack(rows[part]), at[part])
            columns = [token if watch is None else watch for token, watch in zip(chosen, watched[part])]
            picked = logprobs[range(len(columns)), columns].tolist()
            entropies = torch.special.entr(logprobs.exp()).sum(-1).tolist() if unsure else [0.0] * len(chosen)
            drawn += zip(chosen, picked, entropies)
        answers = iter(drawn[len(writing) :])
        for request, _ in asking:
            own, picked, _ = zip(*islice(answers, request.ask))
            request.own = list(own)
            if request.watch is not None:
                request.watched = list(picked)
        ended: set[Request] = set()
        for request, (token, logprob, entropy) in zip(writing, drawn):
            if request.max_entropy is not None and entropy > request.max_entropy:
                request.unsure = True
                ended.add(request)
                continue
            self.counters.decoded_tokens += 1
            request.sequence.ids.append(token)
            if request.add(token, logprob, self.tokenizer):
                ended.add(request)
        return ended


def draw(logits: torch.Tensor, at: list[tuple[Sampling, int]]) -> tuple[list[int], torch.Tensor]:
    """The next id for each row of logits (N, V), and log-probabilities (N, V) at each row's temperature.

    By inverse transform of a number in [0, 1) that is made of the seed and the position.

    Args:
        at: for each row how it is sampled, and the position of the id that is drawn.
    """
    temperatures = torch.tensor([s.temperature or 1.0 for s, _ in at], device=logits.device)
    logprobs = (logits / temperatures[:, None]).log_softmax(-1)
    chosen = logits.argmax(-1).tolist()
    alike: dict[tuple[float, int], list[int]] = defaultdict(list)
    for row, (sampling, _) in enumerate(at):
        if sampling.temperature:
            alike[sampling.top_p, sampling.top_k].append(row)
    for (top_p, top_k), rows in alike.items():
        scores = logprobs[rows]
        if top_k:
            scores = TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1:
            scores = TopPLogitsWarper(top_p)(None, scores)
        heights = scores.softmax(-1).double().cumsum(-1)
        drawn = torch.tensor([[uniform(*at[row])] for row in rows], dtype=torch.double)
        picked = torch.searchsorted(heights, drawn.to(heights.device) * heights[:, -1:], right=True)
        for row, token in zip(rows, picked.squeeze(-1).tolist()):
            chosen[row] = min(token, logits.shape[1] - 1)
    return chosen, logprobs


def uniform(sampling: Sampling, position: int) -> float:
    """A number in [0, 1) that seed and position decide."""
    return (sampling.number(position) >> 11) / 2**53


def eos_of(generation_config, tokenizer) -> frozenset[int]:
    """The ids that end a text."""
    eos = generation_config.eos_token_id
    eos = eos if isinstance(eos, list) else [eos]
    return frozenset(i for i in (*eos, tokenizer.eos_token_id) if i is not None)


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


def load_model(spec: ModelSpec, trainable: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a spec; an adapter is merged, laid beside or left trainable, and brings its tokenizer.

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
        model = PeftModel.from_pretrained(model, spec.adapter, is_trainable=trainable)
        if spec.merge and not trainable and spec.quantization == "none":
            model = model.merge_and_unload()
    return model.eval(), tokenizer


def _quantization(spec: ModelSpec) -> BitsAndBytesConfig | None:
    if spec.quantization == "none":
        return None
    return BitsAndBytesConfig(
        load_in_4bit=spec.quantization == "nf4",
        load_in_8bit=spec.quantization == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,  # the scales in 8 bits: 0.4 bits a weight less
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
    return TransformersEngine(*load_model(spec), slots, spec.context)
