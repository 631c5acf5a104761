"""The cache of the engine on transformers: a slot for each sequence, and attention over ragged batches of them."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from srlib.engine.protocol import Sequence

ATTENTION = "srlib_slots"
PADDING = 150_000  # multiplications of queries with keys, in one layer, that cost about as much as one more call


class Fresh:
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


class Row:
    """Sequences of a forward pass with one new token each, whose slots stand side by side: attended in place, in one call.

    Nothing is gathered or copied; a sequence alone needs no mask and no index either.
    """

    def __init__(self, fresh: Fresh, heads: np.ndarray, device: torch.device, dtype: torch.dtype) -> None:
        ends = fresh.starts + 1
        self.heads = heads.shape  # K, G
        self.length = int(ends.max())  # S
        self.slots = slice(int(fresh.slots[0]), int(fresh.slots[-1]) + 1)
        self.mask = None
        if int(ends.min()) < self.length:
            unseen = np.arange(self.length) >= ends[:, None]  # (N, S)
            mask = torch.zeros(unseen.shape, dtype=dtype, device=device)
            self.mask = mask.masked_fill_(torch.as_tensor(unseen, device=device), -torch.inf)[:, None, None]

    @staticmethod
    def fits(fresh: Fresh) -> bool:
        """Whether a pass is one."""
        n = len(fresh.ids)
        return n == len(fresh.slots) == int(fresh.slots[-1]) - int(fresh.slots[0]) + 1

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Args: query: (1, H, N, D). key, value: the stores. Returns: (1, N, H, D)."""
        _, heads, n, size = query.shape
        q = query[0].transpose(0, 1).reshape(n, *self.heads, size)  # (N, K, G, D)
        k, v = (x[self.slots, :, : self.length] for x in (key, value))
        answer = scaled_dot_product_attention(q, k, v, attn_mask=self.mask, scale=scaling)
        return answer.reshape(1, n, heads, size)


class _Group:
    """Sequences of a forward pass that attend in one call, padded to the longest of them."""

    def __init__(
        self, fresh: Fresh, chosen: np.ndarray, heads: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> None:
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


class Groups:
    """The groups of a forward pass, and where each token finds its answers among theirs."""

    def __init__(
        self, fresh: Fresh, parts: list[np.ndarray], heads: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.groups = [_Group(fresh, part, heads, device, dtype) for part in parts]
        order, before = np.empty_like(fresh.positions), 0
        for group in self.groups:
            order[group.places] = before + group.answers
            before += len(group.queries) // heads.size
        # Answers come as (B, T, G, K), and go as (N, K, G).
        order = order[:, None] * heads.size + heads.reshape(heads.shape[::-1]).T.ravel()
        self.order = torch.as_tensor(order.ravel(), device=device)  # (N·H,)
        self.heads = heads.size

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None
    ) -> torch.Tensor:
        """Args: query: (1, H, N, D). key, value: the stores. Returns: (1, N, H, D)."""
        size = query.shape[3]
        packed = query[0].transpose(0, 1).reshape(-1, size)  # (N·H, D)
        answers = []
        for group in self.groups:
            # The heads that share a key stand beside each other as queries, so that keys are not repeated.
            q = packed.index_select(0, group.queries).view(*group.shape, size)  # (B, K, T·G, D)
            k, v = (x[:, :, : group.length] for x in (key, value))
            k, v = (
                x[group.slots] if isinstance(group.slots, slice) else x.index_select(0, group.slots) for x in (k, v)
            )
            answer = scaled_dot_product_attention(q, k, v, attn_mask=group.mask, scale=scaling)
            answers.append(answer.transpose(1, 2).reshape(-1, size))
        return torch.cat(answers).index_select(0, self.order).view(1, -1, self.heads, size)


class Slots(Cache):
    """Keys and values of every layer, (slots, heads, length, head size)."""

    def __init__(self, slots: int, context: int) -> None:
        super().__init__(layers=[])
        self.slots, self.context, self.length = slots, context, 0
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        # (N,) slot and position of each token of the pass under way; of one token, two numbers
        self.rows: torch.Tensor | int = 0
        self.positions: torch.Tensor | int = 0

    def reserve(self, length: int) -> None:
        """Make room for sequences of `length` ids."""
        if length > self.length:
            self.length = max(length, min(max(64, 2 * self.length), self.context))
            for store in (self.keys, self.values):
                for layer, x in store.items():
                    store[layer] = x.new_zeros(*x.shape[:2], self.length, x.shape[3])
                    store[layer][:, :, : x.shape[2]] = x

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        answers = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx not in store:
                store[layer_idx] = new.new_zeros(self.slots, new.shape[1], self.length, new.shape[3])
            if isinstance(self.rows, int):
                store[layer_idx][self.rows, :, self.positions] = new[0, :, 0]  # (heads, head size)
            else:
                store[layer_idx][self.rows, :, self.positions] = new[0].transpose(0, 1)  # (N, heads, head size)
            answers.append(store[layer_idx])
        return tuple(answers)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    groups: Row | Groups | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the slots: query (1, H, N, D); key and value are the stores. Without `groups` it is SDPA."""
    if groups is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    return groups.attend(query, key, value, scaling), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
