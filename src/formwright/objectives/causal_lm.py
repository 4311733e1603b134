"""Causal language modelling: every token predicts the next (Bengio et al., 2003; Radford et al., 2018).

    total = - sum over tokens with a target of log p(target | tokens up to this one)

Logits are made for tokens that have a target only, a few at a time, and never kept: a plain head's product and its loss
are one op (:mod:`formwright.ops.linear_cross_entropy`), whose gradients are made in the same pass. Other heads make
their logits once more in the backward pass where they would exceed ``LOGITS`` numbers. Memory does not grow with
vocabulary x tokens. ``z`` adds z * log(sum of exp(logits))^2 a token (Chowdhery et al., 2022, 2204.02311), which keeps
logits from drifting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from formwright.kit.errors import DataError
from formwright.models.batch import Batch, Loss
from formwright.objectives import base
from formwright.objectives.base import Gen, Models, Objective
from formwright.ops.linear_cross_entropy import linear_cross_entropy
from formwright.parts.context import Context
from formwright.registry import Paper, register

IGNORED = -100


@register("objective", "causal-lm", paper=Paper("Bengio et al.", 2003), summary="the next token")
class CausalLM(Objective):
    """Reads ``targets["tokens"]`` (B, L), or (1, T) packed: the id that follows each token, -100 where there is none.

    Args: head: name of the head where the model has several that speak of tokens. smoothing: label smoothing, 0 to 1.
        z: weight of the squared logarithm of the normaliser, 0 to 1. logits: numbers of logits held at once at most.
    """

    def __init__(
        self, head: str | None = None, smoothing: float = 0.0, z: float = 0.0, logits: int = base.LOGITS
    ) -> None:
        self.head = head
        self.smoothing = base.check_unit("smoothing", smoothing, 0.0, 1.0)
        self.z = base.check_unit("z", z, 0.0, 1.0)
        self.logits = logits

    def bind(self, models: Models) -> None:
        model = models["model"]
        base.head_of(model, ("tokens",), "causal-lm", self.head)
        owner = base.reader(model)
        # A decoder that cross-attends declares itself causal through its self-attention.
        blind = [id for id, part in owner.parts() if not part.traits.causal]
        if blind:
            raise DataError(
                f"causal-lm would let {blind[0]} read the token it is to predict: that part is not causal; "
                "build the model with causal attention, or train it with an objective that masks"
            )

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        model = models["model"]
        wanted = base.target(batch, "tokens", "causal-lm")
        _, head = base.head_of(model, ("tokens",), "causal-lm", self.head)
        notes = base.listening()
        x, ctx, _ = base.last_states(model, batch, notes=notes, **gen.context())
        if x.shape[:2] != wanted.shape:
            raise DataError(
                f"causal-lm wants one target a token: targets {tuple(wanted.shape)}, tokens {tuple(x.shape[:2])}"
            )
        chosen = wanted != IGNORED
        total = summed_nll(head, x[chosen], wanted[chosen], ctx, self.smoothing, self.logits, self.z)
        count = chosen.sum()
        whole, parts = base.with_auxiliary(total, count, notes)
        return {"model": Loss(whole, count, {"nats": total.detach(), **parts})}


def summed_nll(
    head: Any, states: Tensor, ids: Tensor, ctx: Context, smoothing: float, most: int, z: float = 0.0
) -> Tensor:
    """Sum of -log p of ``ids`` (N,) given states (N, W) before the head; ``most``: numbers of logits held at once."""
    if not len(ids):
        return states.sum() * 0.0  # nothing to predict, but still a graph to go back through
    product = head.product(states[None], base.flat_context(ctx, 0))
    if product is not None:
        x, weight, bias = product
        return linear_cross_entropy(x[0], weight, ids, bias, smoothing=smoothing, z=z, logits=most)

    def piece(part: Tensor, ids: Tensor, inner: Context) -> Tensor:
        logits = head(part[None], inner)[0].float()
        loss = F.cross_entropy(logits, ids, reduction="sum", label_smoothing=smoothing)
        return loss + z * logits.logsumexp(-1).square().sum() if z else loss

    chunks = list(base.token_chunks(len(ids), vocabulary(head), most))
    if len(chunks) == 1:
        return piece(states, ids, base.flat_context(ctx, 0))
    again = torch.is_grad_enabled()
    total = states.new_zeros((), dtype=torch.float32)
    for index, where in enumerate(chunks):
        inner = base.flat_context(ctx, index)
        part, own = states[where], ids[where]
        total = total + (checkpoint(piece, part, own, inner, use_reentrant=False) if again else piece(part, own, inner))
    return total


def vocabulary(head: Any) -> int:
    """Number of classes of a token head."""
    table = getattr(head, "table", None)
    return table.rows if table is not None else head.out.out_features
