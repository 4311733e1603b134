"""Masked language modelling: hidden tokens are guessed from both sides (Devlin et al., 2019, 1810.04805).

    total = - sum over hidden tokens of log p(token | the row with them hidden)

A share of each row's tokens, whole words, or spans is hidden; of these, 80 % are shown as the mask token, 10 % as any
other token, and 10 % as they are. What is hidden is a function of (seed, step, micro-batch, row), so a resumed run
hides the same. Cost: one pass; the head's product is made for hidden tokens only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formwright.kit.errors import DataError
from formwright.models.batch import Batch, Loss
from formwright.models.masking import Masking, masking_of
from formwright.objectives import base
from formwright.objectives.base import IGNORED, Gen, Models, Objective
from formwright.objectives.causal_lm import summed_nll, vocabulary
from formwright.registry import Paper, register


@register("objective", "masked-lm", paper=Paper("Devlin et al.", 2019, "1810.04805"), summary="the hidden tokens")
class MaskedLM(Objective):
    """Reads ``tokens`` (B, L), or (1, T) packed, as they are in the text, and hides some of them. A batch that brings
    ``targets["tokens"]`` (-100 where nothing is to be guessed) is taken as hidden already.

    Args: rate: share of a row's tokens that are hidden. unit: ``token``, ``word`` or ``span``. replaced, random:
        shares of them shown as the mask token and as any other. mask: its id, where the tokenizer does not say.
        head: name of the head where there are several. smoothing: label smoothing. logits: numbers held at once.
    """

    def __init__(
        self,
        rate: float = 0.15,
        unit: str = "token",
        replaced: float = 0.8,
        random: float = 0.1,
        mask: int | None = None,
        head: str | None = None,
        smoothing: float = 0.0,
        logits: int = base.LOGITS,
    ) -> None:
        Masking(rate, unit, 0, 1, np.zeros(1, bool), np.zeros(1, bool), np.zeros(1, bool), replaced, random)
        self.rate, self.unit, self.replaced, self.random, self.mask = rate, unit, replaced, random, mask
        self.head, self.smoothing, self.logits = head, base.check_unit("smoothing", smoothing, 0.0, 1.0), logits

    def bind(self, models: Models) -> None:
        model = models["model"]
        base.head_of(model, ("tokens",), "masked-lm", self.head)
        if base.reader(model).causal:
            raise DataError(
                "masked-lm guesses tokens from both sides, and no part of this model sees later tokens; build it with "
                "attention that is not causal, or train it with causal-lm"
            )

    def masking(self, model: Any) -> Masking:
        """How rows of this model's tokens are masked."""
        _, head = base.head_of(model, ("tokens",), "masked-lm", self.head)
        return masking_of(
            model,
            "masked-lm",
            rate=self.rate,
            unit=self.unit,
            mask=self.mask,
            vocab=vocabulary(head),
            replaced=self.replaced,
            random=self.random,
        )

    def hide(self, model: Any, batch: Batch, gen: Gen) -> Batch:
        """``batch`` with tokens hidden and ``targets["tokens"]`` that say which and what they were."""
        if "tokens" in batch.targets:
            return batch
        field = base.reader(model).stem.field()
        tokens = batch.inputs[field]
        shown, wanted = masked(self.masking(model), tokens, batch, gen.generator("mask"))
        return replace(batch, inputs={**batch.inputs, field: shown}, targets={**batch.targets, "tokens": wanted})

    def items(self, models: Models, batch: Batch, gen: Gen) -> Tensor:
        return super().items(models, self.hide(models["model"], batch, gen), gen)

    def loss(self, models: Models, batch: Batch, gen: Gen) -> Mapping[str, Loss]:
        model = models["model"]
        batch = self.hide(model, batch, gen)
        wanted = batch.targets["tokens"]
        _, head = base.head_of(model, ("tokens",), "masked-lm", self.head)
        notes = base.listening()
        x, ctx, _ = base.last_states(model, batch, notes=notes, **gen.context())
        if x.shape[:2] != wanted.shape:
            raise DataError(
                f"masked-lm wants one target a token: targets {tuple(wanted.shape)}, tokens {tuple(x.shape[:2])}"
            )
        chosen = wanted != IGNORED
        total = summed_nll(head, x[chosen], wanted[chosen], ctx, self.smoothing, self.logits)
        count = chosen.sum()
        whole, parts = base.with_auxiliary(total, count, notes)
        return {"model": Loss(whole, count, {"nats": total.detach(), **parts})}


def masked(masking: Masking, tokens: Tensor, batch: Batch, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(what the model sees, what it is to guess with -100 elsewhere), both of the shape of ``tokens``."""
    ids = tokens.cpu().numpy()
    shown, wanted = ids.copy(), np.full_like(ids, IGNORED)
    rng = np.random.default_rng(generator.initial_seed())
    for where in base.spans_of(batch, tokens):
        row = ids[where]
        hidden = masking.hidden(row, rng)
        shown[where] = masking.shown(row, hidden, rng)
        wanted[where][hidden] = row[hidden]
    return torch.from_numpy(shown).to(tokens.device), torch.from_numpy(wanted).to(tokens.device)
