"""Sequence to sequence: a decoder that reads an encoder says the target, token by token (Sutskever et al., 2014).

    total = - sum over target tokens of log p(t_i | source, t_1 ... t_{i-1})

The decoder is fed the target moved one place on, behind a start token. Label smoothing takes a share s of the mass off
the right token and spreads it over the vocabulary (Szegedy et al., 2016, 1512.00567). Cost: one pass of both towers;
the head's product is made for target tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import DataError
from formwright.models.batch import Batch, Loss
from formwright.models.system import System
from formwright.objectives import base
from formwright.objectives.base import IGNORED, Gen, Models, Objective
from formwright.objectives.causal_lm import summed_nll
from formwright.registry import Paper, register


@register("objective", "seq2seq", paper=Paper("Sutskever et al.", 2014, "1409.3215"), summary="the target sequence")
class Seq2Seq(Objective):
    """Reads the encoder's input and ``targets["tokens"]`` (B, L), -100 behind each row's end. What the decoder is fed
    is made of the targets, unless the batch brings it under ``DECODER.tokens``.

    Args: start: id that opens what the decoder reads, by default the padding token, as in T5. smoothing: label
        smoothing, 0 to 1. head: name of the decoder's head where it has several. logits: numbers held at once.
    """

    def __init__(
        self, start: int | None = None, smoothing: float = 0.0, head: str | None = None, logits: int = base.LOGITS
    ) -> None:
        self.start, self.head, self.logits = start, head, logits
        self.smoothing = base.check_unit("smoothing", smoothing, 0.0, 1.0)

    def bind(self, models: Models) -> None:
        model = models["model"]
        if not isinstance(model, System) or not base.reader(model).spec.memory:
            raise DataError("seq2seq trains a system whose output tower reads another: an encoder and a decoder")
        base.head_of(model, ("tokens",), "seq2seq", self.head)
        blind = [id for id, part in base.reader(model).parts() if not part.traits.causal]
        if blind:
            raise DataError(f"seq2seq would let {blind[0]} of the decoder read the token it is to predict: not causal")

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        model = models["model"]
        batch = self.fed(model, batch)
        wanted = base.target(batch, "tokens", "seq2seq")
        _, head = base.head_of(model, ("tokens",), "seq2seq", self.head)
        notes = base.listening()
        x, ctx, _ = base.last_states(model, batch, notes=notes, **gen.context())
        if x.shape[:2] != wanted.shape:
            raise DataError(
                f"seq2seq wants one target a decoder token: {tuple(wanted.shape)} and {tuple(x.shape[:2])} differ"
            )
        chosen = wanted != IGNORED
        total = summed_nll(head, x[chosen], wanted[chosen], ctx, self.smoothing, self.logits)
        count = chosen.sum()
        whole, parts = base.with_auxiliary(total, count, notes)
        return {"model": Loss(whole, count, {"nats": total.detach(), **parts})}

    def fed(self, model: Any, batch: Batch) -> Batch:
        """The batch with what the decoder reads."""
        field = f"{model.spec.output}.tokens"
        if field in batch.inputs:
            return batch
        if batch.offsets:
            raise DataError(f"seq2seq feeds the decoder in the padded layout; a packed batch brings {field} itself")
        start = self.start
        if start is None:
            start = 0 if model.tokenizer is None else model.tokenizer.pad_id
        tokens, lengths = moved_on(base.target(batch, "tokens", "seq2seq"), start)
        return batch.replace(inputs={**batch.inputs, field: tokens}, lengths={**batch.lengths, field: lengths})


def moved_on(wanted: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Targets (B, L), -100 behind each row's end -> the ids before each of them, and (B,) lengths."""
    there = wanted != IGNORED
    lengths = there.sum(1)
    if not torch.equal(there, torch.arange(wanted.shape[1], device=wanted.device)[None] < lengths[:, None]):
        raise DataError("seq2seq: a target row has -100 before its end; then give the decoder's tokens as well")
    before = torch.cat((torch.full_like(wanted[:, :1], start), wanted[:, :-1]), 1)
    return before.masked_fill(~there, start), lengths
