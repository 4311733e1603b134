"""The proof of DEFT: adapters that also learn to leave hidden units silent, and a product that is paid by active unit.

Runwal et al., 2024 (2402.01911) tune RoBERTa and T5 with a density loss beside the task's. Here a ReLU model of bytes
and a GELU sentence encoder are tuned with LoRA of rank 8, with the loss and without it, from the same weights on the
same rows.

What was tried, on another seed than that of the table: see ``RELU`` and ``GELU``. ``quick``: no training; seconds.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import DataError, FormwrightError
from formwright.measure.timing import alternate
from formwright.models.batch import Batch, pad
from formwright.models.build import build
from formwright.objectives.base import Gen, Objective, make
from formwright.objectives.density import Density, activation_density, densities, soft
from formwright.ops import native
from formwright.ops.active_product import active_product
from formwright.proofs import _bytes
from formwright.proofs.base import Claim
from formwright.proofs.llm_int8 import MODEL
from formwright.registry import Paper, register
from formwright.surgery.base import apply, copy

RANK = 8
Draw = Callable[[int], Batch]


def adapted(base: Any, seed: int, **options: Any) -> Any:
    """A copy of ``base`` with LoRA in all linears of its layers."""
    return apply(copy(base), "lora", rank=RANK, seed=seed, **options)


def tuned(model: Any, draw: Draw, objective: Objective, steps: int, lr: float, seed: int) -> Any:
    """``model`` after ``steps`` of ``objective`` on the batches of ``draw``."""
    models = {"model": model}

    def nats(step: int) -> Tensor:
        loss = objective.loss(models, draw(step), Gen(seed + step, step))["model"]
        return loss.total / loss.count

    return _bytes.descend(model, nats, steps, lr)


def lines(data: Tensor, batch: int, length: int, seed: int) -> Draw:
    """Batches of rows of ``data``; a step has the same rows whatever came before."""

    def draw(step: int) -> Batch:
        generator = torch.Generator().manual_seed(seed * 100_003 + step)
        starts = torch.randint(0, len(data) - length - 1, (batch,), generator=generator).tolist()
        rows = torch.stack([data[start : start + length + 1] for start in starts])
        return Batch(inputs={"tokens": rows[:, :-1]}, targets={"tokens": rows[:, 1:]})

    return draw
