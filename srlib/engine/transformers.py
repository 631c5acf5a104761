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
from copy import copy
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicCache
from transformers.modeling_outputs import MoeModelOutputWithPast

from srlib import SrlibError
from srlib.engine.models import eos_of, load_model
from srlib.engine.protocol import GREEDY, SCORE_POSITIONS, SCORE_TOKENS, Counters, Measure, Request, Sampling, Sequence
from srlib.engine.slots import ATTENTION, PADDING, Fresh, Groups, Row, Slots
from srlib.params import ModelSpec

LAYERS = {"full_attention", "sliding_attention"}  # kinds that are served, as configurations name them


class TransformersEngine:
    """A causal language model with a KV cache for each open sequence; it works in steps.

    Args:
        model: any decoder with rotary positions and full or sliding attention; may be a live PEFT model.
        tokenizer: kept for callers; the engine itself deals in ids.
        slots: how many sequences can be open at the same time.
        context: longest sequence; None: the model's own.

    Raises:
        SrlibError: it is another model.
    """

    running = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        slots: int = 64,
        context: int | None = None,
    ) -> None:
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        config = self.model.config.get_text_config()
        self.context = min(context or config.max_position_embeddings, config.max_position_embeddings)
        if reason := _unserved(self.model, self.context):
            raise _refusal(self.model, reason)
        if self.model.config._attn_implementation != ATTENTION:
            self.model.set_attn_implementation(ATTENTION)
        self.tokenizer = tokenizer
        self.slots = slots
        self.eos = eos_of(self.model.generation_config, tokenizer)
        self.counters = Counters()
        self.pending: list[Request] = []
        self._free = list(range(slots))[::-1]
        self._used = 0  # slots that have held a sequence: the first ones are taken first
        self._cache = Slots(slots, self.context)
        # (K, G) numbers of the query heads of each key
        keys = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self._heads = np.arange(config.num_attention_heads).reshape(keys, -1)
        self._query_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._query_size *= config.num_attention_heads
        # Asked once: transformers goes through the modules for each of these.
        self.device, self._dtype = self.model.device, self.model.dtype
        self._decoder, self._output = self.model.get_decoder(), self.model.get_output_embeddings()
        self._plain: bool | None = None  # whether the output layer is all that stands behind the decoder
        self._head = copy(self.model)  # all of the model but its decoder
        self._head._modules = {n: _Given() if m is self._decoder else m for n, m in self.model.named_children()}
        self._made_already = torch.empty(1, 1, 1, 1, device=self.device)  # a mask that nobody reads: see `slots`

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
        assert request.start is not None  # it was submitted
        self.truncate(request.sequence, request.start)

    def run(self, *requests: Request) -> list[Request]:
        """Submit and step until all of `requests` are done.

        Raises:
            SrlibError: one of them failed.
        """
        open_ = {self.submit(request) for request in requests}
        while open_:
            open_.difference_update(self.step())
        for request in requests:
            if request.error:
                raise request.error
        return list(requests)

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One token further for every pending request; returns those that are done, or all of them if the model fails."""
        start = time.perf_counter()
        try:
            return self._step()
        except Exception as error:  # such as a device out of memory: whoever asked is told, and others may go on
            failed, self.pending = self.pending, []
            for request in failed:
                request.error = SrlibError(f"{type(error).__name__} while a model was at work: {error}")
                request.error.__cause__ = error
            return failed
        finally:
            self.counters.seconds += time.perf_counter() - start

    def _step(self) -> list[Request]:
        writing = [r for r in self.pending if r.max_new]
        for request in writing:
            sequence = request.sequence
            if sequence.processed == len(sequence.ids) and sequence.logits is None:
                self._uncache(sequence, sequence.processed - 1)  # its last id is read again, for the logits
        behind = {id(s): s for s in (r.sequence for r in self.pending) if s.processed < len(s.ids)}
        passed = self._forward(sorted(behind.values(), key=lambda s: s.slot)) if behind else _Pass()
        ended = self._draw(writing, passed)
        done = [r for r in self.pending if not r.max_new or r in ended]
        self.pending = [r for r in self.pending if r.max_new and r not in ended]
        return done

    def score(self, sequences: list[list[int]]) -> list[list[float]]:
        """Log-probability of every id of each sequence but its first, given what stands before it.

        One padded batch of all of `sequences`, read `SCORE_TOKENS` ids at a time: choose the batch
        so that its keys and values fit.
        """
        return self._scan(sequences, lambda logprobs, ids: logprobs.gather(-1, ids[:, None])[:, 0])

    def doubts(self, sequences: list[list[int]], measure: Measure = "entropy") -> list[list[float]]:
        """As `score`, but how unsure the model is of each id; see `Doubt`."""
        return self._scan(sequences, lambda logprobs, _: uncertainty(measure, logprobs))

    @torch.inference_mode()
    def _scan(
        self, sequences: list[list[int]], reduce: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> list[list[float]]:
        """`reduce` of the log-probabilities (N, V) and the ids (N,) that came next, for each place of `sequences`."""
        longest = max(map(len, sequences))
        ids = torch.tensor([s + [s[-1]] * (longest - len(s)) for s in sequences], device=self.device)  # (B, T)
        width = max(1, SCORE_TOKENS // len(sequences))
        cache = DynamicCache(config=self.model.config) if longest > width else None
        values = []
        for chunk, after in zip(ids.split(width, 1), ids.roll(-1, 1).split(width, 1)):  # (B, W)
            hidden = self._decoder(
                input_ids=chunk, past_key_values=cache, use_cache=cache is not None
            ).last_hidden_state  # (B, W, E)
            flat = hidden.flatten(0, 1).split(SCORE_POSITIONS), after.flatten().split(SCORE_POSITIONS)
            # some places at a time: the logits of all would be larger than the model
            reduced = [reduce(self._logits(h).float().log_softmax(-1), i) for h, i in zip(*flat)]
            values.append(torch.cat(reduced).view(after.shape))
            self.counters.calls += 1
        self.counters.forward_tokens += sum(map(len, sequences))
        return [row[: len(s) - 1] for row, s in zip(torch.cat(values, 1).tolist(), sequences)]

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, V) what the model makes of its decoder's answers (N, E): it may scale or cap what its output layer says.

        Where it does not, that layer alone is asked, which takes a tiny model a tenth of a step less.
        """
        if self._plain is None:  # tried where numbers are large enough for caps to be felt
            far = torch.linspace(-100, 100, hidden.shape[1], device=hidden.device, dtype=hidden.dtype)[None]
            self._plain = torch.equal(self._output(far), self._behind(far))
        return self._output(hidden) if self._plain else self._behind(hidden)

    def _behind(self, hidden: torch.Tensor) -> torch.Tensor:
        return type(self.model).forward(self._head, inputs_embeds=hidden[None]).logits[0]

    def _uncache(self, sequence: Sequence, length: int) -> None:
        self.counters.discarded_tokens += sequence.processed - length
        sequence.processed, sequence.logits = length, None

    def _forward(self, sequences: list[Sequence]) -> _Pass:
        """Process all unprocessed ids of `sequences`."""
        device = self.device
        asking: dict[int, Request] = {id(r.sequence): r for r in self.pending if r.ask}
        # Logits only where they are used: at the places asked for, else at the last one.
        fresh = Fresh(sequences, [asking[id(s)].ask if id(s) in asking else 1 for s in sequences])
        cache = self._cache
        rows, positions = (torch.as_tensor(x, device=device) for x in (fresh.rows, fresh.positions))
        alone = len(fresh.ids) == 1
        cache.rows, cache.positions = (int(fresh.rows[0]), int(fresh.positions[0])) if alone else (rows, positions)
        self._used = max(self._used, int(fresh.slots[-1]) + 1)
        cache.reserve(int(fresh.positions.max()) + 1, self._used)
        groups: Row | Groups
        if Row.fits(fresh):
            groups = Row(fresh, self._heads, device, self._dtype)
        else:
            groups = Groups(fresh, self._alike(fresh), self._heads, device, self._dtype)
        hidden = self._decoder(
            input_ids=torch.tensor([fresh.ids], device=device),
            attention_mask=self._made_already,
            position_ids=positions[None],
            past_key_values=cache,
            use_cache=True,
            groups=groups,
        ).last_hidden_state[0]  # (N, E)
        if len(fresh.wanted) < len(fresh.ids):
            hidden = hidden[torch.as_tensor(fresh.wanted, device=device)]  # (W, E)
        passed = _Pass(self._logits(hidden).float())  # (W, V)
        for s, new, at in zip(sequences, fresh.counts.tolist(), fresh.answers.tolist()):
            request = asking.get(id(s))
            if request:
                passed.asking.append((request, at))
                at += request.ask - 1
            passed.last[id(s)] = at, s
            self.counters.prefilled_tokens += new if new > 1 else 0
            self.counters.reread_tokens += max(0, min(s.longest, len(s.ids)) - s.processed)
            s.forwarded += new
            s.processed, s.logits = len(s.ids), None
            s.longest = max(s.longest, s.processed)
        self.counters.forward_tokens += len(fresh.ids)
        self.counters.calls += 1
        return passed

    def _alike(self, fresh: Fresh) -> list[np.ndarray]:
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

    def _draw(self, writing: list[Request], passed: _Pass) -> set[Request]:
        """Write the next id of each request that writes, and answer those that ask; returns the writers that end."""
        rows = [passed.row(r.sequence) for r in writing]
        at = [(r.sequence.sampling, len(r.sequence.ids)) for r in writing]
        watched: list[int | None] = [None] * len(writing)  # None: the id that is drawn
        for request, first in passed.asking:
            end = len(request.sequence.ids)
            rows += range(first, first + request.ask)
            at += [(request.sequence.sampling, i) for i in range(end - request.ask + 1, end + 1)]
            watched += request.watch if isinstance(request.watch, tuple) else [request.watch] * request.ask
        doubts: dict[Measure, list[float]] = {r.doubt.measure: [] for r in writing if r.doubt}
        logits = passed.take(rows)  # (rows, V)
        if banned := [(row, token) for row, request in enumerate(writing) for token in request.banned]:
            logits = logits.index_put(
                torch.tensor(banned, device=logits.device).unbind(1), logits.new_tensor(-torch.inf)
            )
        drawn: list[tuple[int, float]] = []  # for each row: the id, the log-probability
        for i in range(0, len(rows), SCORE_POSITIONS):
            part = slice(i, i + SCORE_POSITIONS)
            chosen, logprobs = draw(logits[part], at[part])
            tokens = chosen.tolist()
            if passed.asking:
                columns = [token if watch is None else watch for token, watch in zip(tokens, watched[part])]
                chosen = torch.tensor(columns, device=logits.device)
            picked = logprobs.gather(1, chosen[:, None])[:, 0].tolist()
            drawn += zip(tokens, picked)
            for measure, values in doubts.items():  # of the model's own distribution, at whatever temperature it draws
                values += uncertainty(measure, logits[part].log_softmax(-1)).tolist()
        answers = iter(drawn[len(writing) :])
        for request, _ in passed.asking:
            own, watched_ = zip(*islice(answers, request.ask))
            request.own = list(own)
            if request.watch is not None:
                request.watched = list(watched_)
        ended: set[Request] = set()
        for row, (request, (token, logprob)) in enumerate(zip(writing, drawn)):
            if request.doubt and doubts[request.doubt.measure][row] > request.doubt.above:
                request.unsure = True
                ended.add(request)
                continue
            passed.last.pop(id(request.sequence), None)
            self.counters.decoded_tokens += 1
            request.sequence.ids.append(token)
            request.sequence.logits = None
            if request.add(token, logprob, self.tokenizer):
                ended.add(request)
        for row, sequence in passed.last.values():  # nothing was written after these ids yet
            assert passed.logits is not None
            sequence.logits = passed.logits[row].clone()
        return ended


class _Given(torch.nn.Module):
    """Stands in for a decoder, and answers what it is given."""

    def forward(self, *_: Any, inputs_embeds: torch.Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


class _Pass:
    """The logits of a forward pass, and whose they are."""

    def __init__(self, logits: torch.Tensor | None = None) -> None:
        self.logits = logits  # (W, V)
        self.last: dict[int, tuple[int, Sequence]] = {}  # of each sequence, the row after its last id
        self.asking: list[tuple[Request, int]] = []  # the requests that ask, with the first of their rows
        self._kept: list[torch.Tensor] = []  # (V,) of sequences that had nothing to process

    def row(self, sequence: Sequence) -> int:
        """Where the logits are from which the next id of `sequence` is drawn; beyond those of the pass, if kept before."""
        if id(sequence) in self.last:
            return self.last[id(sequence)][0]
        self._kept.append(sequence.logits)
        return (0 if self.logits is None else len(self.logits)) + len(self._kept) - 1

    def take(self, rows: list[int]) -> torch.Tensor:
        """(len(rows), V) the logits of some rows."""
        if not rows:
            return torch.empty(0, 0)
        parts = [] if self.logits is None else [self.logits]
        if self._kept:
            parts.append(torch.stack(self._kept))
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        return logits if rows == list(range(len(logits))) else logits[rows]


def draw(logits: torch.Tensor, at: list[tuple[Sampling, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The next id (N,) for each row of logits (N, V), and log-probabilities (N, V) at each row's temperature.

    By inverse transform of a number in [0, 1) that is made of the seed and the position.

    Args:
        at: for each row how it is sampled, and the position of the id that is drawn.
    """
    chosen = logits.argmax(-1)
    if not any(s.temperature for s, _ in at):
        return chosen, logits.log_softmax(-1)
    temperatures = torch.tensor([s.temperature or 1.0 for s, _ in at], device=logits.device)
    logprobs = (logits / temperatures[:, None]).log_softmax(-1)
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
        chosen[rows] = picked.squeeze(-1).clamp_(max=logits.shape[1] - 1)
    return chosen, logprobs


def uncertainty(measure: Measure, logprobs: torch.Tensor) -> torch.Tensor:
    """(N,) what `Doubt` measures, of log-probabilities (N, V)."""
    if measure == "entropy":
        return torch.special.entr(logprobs.exp()).sum(-1)
    first, second = logprobs.topk(2).values.exp().unbind(-1)
    return 1 - (first - second if measure == "margin" else first)


def uniform(sampling: Sampling, position: int) -> float:
    """A number in [0, 1) that seed and position decide."""
    return (sampling.number(position) >> 11) / 2**53


def _unserved(model: PreTrainedModel, context: int) -> str | None:
    """What a model has that this engine knows nothing of."""
    config = model.config.get_text_config()
    if kinds := set(getattr(config, "layer_types", None) or ()) - LAYERS:
        return f"it has layers of the kind {min(kinds)}"
    if getattr(config, "kv_lora_rank", None):
        return "it keeps its keys compressed, and would unpack those of all slots at every step"
    if not model._supports_attention_backend:
        return "its attention is its own, and cannot be replaced"
    if not any(module is model.get_decoder() for module in model.children()):
        return "its decoder and its output layer do not stand side by side"
    rope = getattr(config, "rope_parameters", None) or {}
    for each in (rope, *rope.values()):  # of all layers, or of each kind
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            # A pass knows one scale, for whatever it packs, and keys that are kept have the one they were made with.
            if context > (short := each["original_max_position_embeddings"]):
                return f"beyond {short} tokens it scales all positions anew; with a context of {short} it runs"
    return None


def _refusal(model: PreTrainedModel, reason: str) -> SrlibError:
    return SrlibError(
        f"{type(model).__name__} does not run on the transformers engine ({reason}), which serves decoders with rotary "
        "positions and full or sliding attention; take another model, or set its engine to vllm."
    )


def load(spec: ModelSpec, slots: int) -> TransformersEngine:
    """See `srlib.engine.load`. It is tried once: what a configuration does not tell is seen here, and not hours later."""
    engine = TransformersEngine(*load_model(spec), slots, spec.context)
    sequence = engine.open([0, 0])
    try:
        engine.run(Request(sequence, max_new=2))
    except SrlibError as error:
        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        raise _refusal(engine.model, str(error)) from error.__cause__
    engine.close(sequence)
    engine.counters = Counters()
    return engine
