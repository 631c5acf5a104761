"""The cache of the engine on transformers: a slot for each sequence, and attention over ragged batches of them."""

from __future__ import annotations

import math
import mmap
from contextlib import suppress
from itertools import chain
from typing import Any, NamedTuple

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
SCORES = 2**26  # of queries with keys, that are held at the same time where torch has no kernel for a model's attention


class Kind(NamedTuple):
    """What a layer's attention does beside the usual."""

    scaling: float | None = None  # of the scores; None: by the root of the head size
    window: int | None = None  # a position sees so many, itself among them; None: all before it
    softcap: float | None = None  # scores approach ± this (Gemma 2, arXiv 2408.00118)
    sinks: torch.Tensor | None = None  # (H,) a score that takes its part of the softmax and adds nothing (gpt-oss)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, kind: Kind, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attention by torch's kernels, and by hand where they do not know what a model does.

    Args: q: (B, K, Q, D). k, v: (B, K, S, D). mask: (B, 1, Q, S), added to the scores. sinks: (K, Q), of each query.
    """
    if kind.softcap is None and sinks is None:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=kind.scaling)
    width, most = q.shape[2], max(1, SCORES // (q.shape[0] * k.shape[1] * k.shape[2]))
    if width > most:
        parts = [slice(i, i + most) for i in range(0, width, most)]
        masks = [mask if mask is None else mask[:, :, part] for part in parts]
        some = [sinks if sinks is None else sinks[:, part] for part in parts]
        return torch.cat([attention(q[:, :, p], k, v, m, kind, s) for p, m, s in zip(parts, masks, some)], 2)
    scores = q @ k.mT * (q.shape[3] ** -0.5 if kind.scaling is None else kind.scaling)
    if kind.softcap is not None:
        scores = (scores / kind.softcap).tanh() * kind.softcap
    if mask is not None:
        scores = scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks[None, :, :, None].expand(len(q), -1, -1, 1)), 3)
    return scores.softmax(3, dtype=torch.float32)[..., : k.shape[2]].to(v.dtype) @ v


def _sinks(kind: Kind, heads: tuple[int, ...], width: int) -> torch.Tensor | None:
    """(K, T·G) of `width` = T queries of each of the (K, G) `heads`."""
    if kind.sinks is None:
        return None
    return kind.sinks.view(heads[0], 1, heads[1]).expand(-1, width, -1).reshape(heads[0], -1)


def _added(unseen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask to add to scores."""
    return torch.zeros(unseen.shape, dtype=dtype, device=unseen.device).masked_fill_(unseen, -torch.inf)


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
        self.ends = fresh.starts + 1  # (N,)
        self.heads = heads.shape  # K, G
        self.slots = slice(int(fresh.slots[0]), int(fresh.slots[-1]) + 1)
        self.device, self.dtype = device, dtype
        self.views: dict[int | None, tuple[slice, torch.Tensor | None]] = {}

    def view(self, window: int | None) -> tuple[slice, torch.Tensor | None]:
        """The positions that are read, S of them, and the mask over them, if one is needed."""
        if window not in self.views:
            ends = self.ends[:, None]
            read = slice(max(0, int(ends.min()) - window) if window else 0, int(ends.max()))
            at = np.arange(read.start, read.stop)
            unseen = (at >= ends) | (at < ends - window) if window else at >= ends  # (N, S)
            mask = _added(torch.as_tensor(unseen, device=self.device), self.dtype)[:, None, None]
            self.views[window] = read, mask if unseen.any() else None
        return self.views[window]

    @staticmethod
    def fits(fresh: Fresh) -> bool:
        """Whether a pass is one."""
        n = len(fresh.ids)
        return n == len(fresh.slots) == int(fresh.slots[-1]) - int(fresh.slots[0]) + 1

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Args: query: (1, H, N, D). key, value: the stores. Returns: (1, N, H, D)."""
        _, heads, n, size = query.shape
        q = query[0].transpose(0, 1).reshape(n, *self.heads, size)  # (N, K, G, D)
        read, mask = self.view(kind.window)
        k, v = (x[self.slots, :, read] for x in (key, value))
        answer = attention(q, k, v, mask, kind, _sinks(kind, self.heads, 1))
        return answer.reshape(1, n, heads, -1)


class _Group:
    """Sequences of a forward pass that attend in one call, padded to the longest of them."""

    def __init__(
        self, fresh: Fresh, chosen: np.ndarray, heads: np.ndarray, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Args: chosen: which of the sequences. heads: (K, G) numbers of the query heads of each key."""
        slots, starts, counts = fresh.slots[chosen], fresh.starts[chosen], fresh.counts[chosen]
        self.least, self.length = int(starts.min()), int((starts + counts).max())
        width = int(counts.max())  # T
        # Most slots of a stretch: it is read in place, idle slots and all. Few: theirs are copied.
        whole = 2 * len(slots) > slots[-1] - slots[0]
        rows = slots - slots[0] if whole else np.arange(len(slots))
        self.slots = slice(slots[0], slots[-1] + 1) if whole else torch.as_tensor(slots, device=device)
        size = int(rows[-1]) + 1  # B
        self.shape = (size, len(heads), width * heads.shape[1])  # B, K, T·G
        columns = np.minimum(np.arange(width), counts[:, None] - 1)  # (n, T), padding repeats the last
        places = np.zeros((size, width), dtype=np.int64)  # in the packed row
        last = np.full_like(places, self.least)  # position of each query
        self.places = places[rows] = fresh.firsts[chosen, None] + columns
        last[rows] = starts[:, None] + columns
        self.answers = rows[:, None] * width + columns  # (n, T) among the B·T of the call
        # (B, T) in the packed row → (B, K, T, G) in that of all heads
        queries = places[:, None, :, None] * heads.size + heads[:, None]
        self.queries = torch.as_tensor(queries.ravel(), device=device)
        self.heads, self.width, self.dtype = heads.shape, width, dtype
        self.last = torch.as_tensor(last, device=device)[..., None]  # (B, T, 1)
        self.views: dict[int | None, tuple[slice, torch.Tensor]] = {}

    def view(self, window: int | None) -> tuple[slice, torch.Tensor]:
        """The positions that are read, S of them, and the mask over them."""
        if window not in self.views:
            read = slice(max(0, self.least + 1 - window) if window else 0, self.length)
            at = torch.arange(read.start, read.stop, device=self.last.device)
            unseen = at > self.last  # (B, T, S)
            if window:
                unseen |= at <= self.last - window
            mask = _added(unseen, self.dtype)
            grouped = self.width > 1 < self.heads[1]
            self.views[window] = read, (mask.repeat_interleave(self.heads[1], 1) if grouped else mask)[:, None]
        return self.views[window]

    def attend(self, packed: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Args: packed: (N·H, D), queries. key, value: the stores. Returns: (B, K, T·G, D)."""
        # The heads that share a key stand beside each other as queries, so that keys are not repeated.
        q = packed.index_select(0, self.queries).view(*self.shape, -1)  # (B, K, T·G, D)
        read, mask = self.view(kind.window)
        k, v = (x[:, :, read] for x in (key, value))
        k, v = (x[self.slots] if isinstance(self.slots, slice) else x.index_select(0, self.slots) for x in (k, v))
        return attention(q, k, v, mask, kind, _sinks(kind, self.heads, self.width))


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

    def attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, kind: Kind) -> torch.Tensor:
        """Args: query: (1, H, N, D). key, value: the stores. Returns: (1, N, H, D)."""
        packed = query[0].transpose(0, 1).reshape(-1, query.shape[3])  # (N·H, D)
        answers = [group.attend(packed, key, value, kind).transpose(1, 2).flatten(0, 2) for group in self.groups]
        return torch.cat(answers).index_select(0, self.order).view(1, query.shape[2], self.heads, -1)


class Slots(Cache):
    """Keys and values of every layer, (slots, heads, length, head size).

    On a CPU a store has the length of the context from the start, and takes the memory of what was written to it. Where
    there are no addresses for that, and on a GPU, it grows.
    """

    def __init__(self, slots: int, context: int) -> None:
        super().__init__(layers=[])
        self.slots, self.context = slots, context
        self.length = 0  # that every store has
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        # (N,) slot and position of each token of the pass under way; of one token, two numbers
        self.rows: torch.Tensor | int = 0
        self.positions: torch.Tensor | int = 0

    def reserve(self, length: int, used: int) -> None:
        """Make room for sequences of `length` ids in the first `used` slots: at least twice what there was.

        A store grows some tokens before the next one does, so that no step of a sequence that grows copies all of them.
        """
        stores = [(store, layer) for store in (self.keys, self.values) for layer in store]
        if length + len(stores) <= self.length:
            return
        if not stores:
            self.length = max(length, min(64, self.context))
        for ahead, (store, layer) in enumerate(stores):
            x, needed = store[layer], min(length + ahead, self.context)
            if needed > x.shape[2]:
                longer = max(needed, min(2 * x.shape[2], self.context))
                store[layer] = _zeros(x, self.slots, x.shape[1], longer, x.shape[3])
                store[layer][:used, :, : x.shape[2]] = x[:used]
        if stores:
            self.length = min(store[layer].shape[2] for store, layer in stores)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, ...]:
        answers = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx not in store:
                store[layer_idx] = self._store(new)
            if isinstance(self.rows, int):
                store[layer_idx][self.rows, :, self.positions] = new[0, :, 0]  # (heads, head size)
            else:
                store[layer_idx][self.rows, :, self.positions] = new[0].transpose(0, 1)  # (N, heads, head size)
            answers.append(store[layer_idx])
        return tuple(answers)

    def _store(self, new: torch.Tensor) -> torch.Tensor:
        """For a layer with heads as in `new`, (1, heads, N, head size)."""
        if new.device.type == "cpu":
            with suppress(OSError):  # the system has no addresses for so much
                return _zeros(new, self.slots, new.shape[1], self.context, new.shape[3])
        return _zeros(new, self.slots, new.shape[1], self.length, new.shape[3])


def _zeros(like: torch.Tensor, *shape: int) -> torch.Tensor:
    """Of dtype and device of `like`. On a CPU the system gives a page when it is first written.

    Raises:
        OSError: it gives none.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    given = mmap.mmap(-1, math.prod(shape) * like.itemsize, access=mmap.ACCESS_COPY)
    with suppress(AttributeError, OSError):  # not on every system
        given.madvise(mmap.MADV_NOHUGEPAGE)  # of 2 MB, of which a slot would need a few kB
    return torch.frombuffer(given, dtype=like.dtype).view(shape)


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    groups: Row | Groups | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over the slots: query (1, H, N, D); key and value are the stores. Without `groups`, over what is given.

    There the mask knows of the window.

    Raises:
        ValueError: the model has laid something of its own into the mask of the engine, which would be lost.
    """
    kind = Kind(scaling, sliding_window, softcap, s_aux)
    if groups is not None:
        if attention_mask is None or attention_mask.numel() > 1:
            raise ValueError(f"{type(module).__name__} makes a mask of its own")
        return groups.attend(query, key, value, kind), None
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    batch, heads, width, size = query.shape
    keys, length = key.shape[1:3]
    mask = attention_mask  # None: what stands before a position
    if mask is None:
        mask = torch.ones(1, 1, width, length, dtype=torch.bool, device=query.device).tril(length - width)
    if mask.dtype == torch.bool:  # the least number, as a row of padding sees nothing
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    q = query.view(batch, keys, -1, width, size).transpose(2, 3).reshape(batch, keys, -1, size)  # (B, K, T·G, D)
    mask = mask.repeat_interleave(heads // keys, 2)
    answer = attention(q, key, value, mask, kind, _sinks(kind, (keys, heads // keys), width))
    answer = answer.view(batch, keys, width, heads // keys, -1).transpose(1, 2)
    return answer.flatten(2, 3), None  # (B, T, H, D)


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
