"""Credit for going on: what the small model decides at the big one's tokens is part of the policy that is trained.

At every token of a span but the first the small model has decided not to take control back. It does so with
probability 1 − p, where p is what it gives to the closing tag; and it takes control back with probability p. The
probability of a whole trace y under the policy π is then, with the big model's distribution β over what it writes,

    Π π(y_t | not a close)  ·  Π (1 − p_t) β(y_t)  ·  Π p_t
    small model's tokens       big tokens, but first    closing tags

(a first token is not decided on: a span has one). The gradient of its logarithm, which policy gradients are made of
(Williams 1992; GRPO: Shao et al. 2024, eq. 3), has no term of β, as that does not depend on the weights: the big model's
*token* is not learned from, the decision at it is. Without its (1 − p_t) only closing would be reinforced, never
waiting: the tag at the end of a good span would become likelier, and likelier everywhere in spans to come.

Outside of spans a close cannot be drawn (see `srlib.decoding.writer`), so probabilities are those among all other tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOTrainer

from srlib.data.spans import Tags
from srlib.decoding.trace import BIG, Trace

# Of logits that are scaled or capped, by which p cannot be told from a decoder's answers alone, as it is here.
MORE = ("final_logit_softcapping", "logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
LEAST = 1e-7  # a probability below is taken for it, so that its logarithm and its gradient are finite


def went_on(trace: Trace) -> list[bool]:
    """For each id, whether it is a token at which the small model could have taken control back, and did not."""
    owners = trace.owners
    return [owner == BIG and before == BIG for before, owner in zip([None, *owners], owners)]


def decided(logprobs: Tensor, closing: Tensor, ids: Tensor, before: Tensor, tags: Tags[tuple[int, ...]]) -> Tensor:
    """(B, T) log-probabilities of what the small model decided at each id of traces that two models wrote.

    Args:
        logprobs: (B, T) of the ids themselves, among all tokens.
        closing: (B, T) of the closing tag in their place.
        ids: (B, T), `before`: (B, T) those one place before.
    """
    (opening,), (close,) = tags.open, tags.close
    opened, closed = before == opening, before == close
    inside = (opened.long().cumsum(1) - closed.long().cumsum(1)) > 0
    other = (-torch.expm1(closing)).clamp(min=LEAST).log()  # not to close
    waits = inside & ~opened & (ids != close)
    return torch.where(inside, torch.where(waits, other, logprobs), logprobs - other)


def unknown_logits(model: PreTrainedModel) -> str:
    """What a model makes of its output layer's answers beside giving them, as its configuration calls it; else nothing."""
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        return "a bias"
    config = model.config.get_text_config()
    return next((name for name in MORE if getattr(config, name, None) not in (None, 1)), "")


class Credited(GRPOTrainer):
    """A trainer whose log-probabilities are those of the decisions.

    `closes_as` is set by who makes it: the tags, one token each; None: log-probabilities are those of the tokens.
    """

    closes_as: Tags[tuple[int, ...]] | None = None

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        tags = self.closes_as
        if tags is None:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        base = self.accelerator.unwrap_model(model)
        base = base.get_base_model() if hasattr(base, "get_base_model") else base
        with _answers(base.base_model) as hidden:
            logprobs, *more = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
            )
        ids, before = input_ids[:, -logits_to_keep:], input_ids[:, -logits_to_keep - 1 : -1]
        states = torch.cat([h[:, -logits_to_keep - 1 : -1] for h in hidden])  # (B, T, E)
        weight = base.get_output_embeddings().weight  # (V, E)
        own, close = (states * weight[ids]).sum(-1), states @ weight[tags.close[0]]  # (B, T) logits
        closing = logprobs + (close - own).float() / self.temperature
        return decided(logprobs, closing.clamp(max=0), ids, before, tags), *more


@contextmanager
def _answers(decoder: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What a decoder answers meanwhile, (B, T, E) each time it is asked."""
    found: list[Tensor] = []
    handle = decoder.register_forward_hook(lambda _, __, output: found.append(output.last_hidden_state))
    try:
        yield found
    finally:
        handle.remove()
