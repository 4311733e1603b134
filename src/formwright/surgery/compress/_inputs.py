"""What the linears of a model are given: mean and covariance of each slot's inputs, over evidence.

Cost: one pass, in^2 products a token for each different input, and a matrix (in, in) for each slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError
from formwright.models.batch import Batch
from formwright.parts.context import Context
from formwright.surgery.base import core
from formwright.surgery.compress._factors import Inputs
from formwright.surgery.evidence import evaluating


def inputs_of(tensors: dict[str, Tensor], address: str) -> Inputs | None:
    """One slot's statistics among a plan's tensors."""
    covariance = tensors.get(f"{address}.covariance")
    return None if covariance is None else Inputs(covariance, tensors.get(f"{address}.mean"))


def gather(model: Any, slots: Iterable[str], evidence: list[Batch]) -> dict[str, Tensor]:
    """``ADDRESS.covariance`` (in, in) and, where there is a bias to take up a shift, ``ADDRESS.mean`` (in,).

    Over all tokens of the evidence but padding; batches are added up in float64. About the mean where there is one,
    else about zero.
    """
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    handles = []
    whole = not hasattr(model, "run") or any(address.startswith("head") for address in slots)

    latest: list[Any] = [None, ()]

    def watch(address: str) -> Any:
        def hook(module: nn.Module, given: tuple) -> None:
            x, ctx = given[0], given[1] if len(given) > 1 else None
            if latest[0] is not x:  # q, k and v are given the same tensor, one after another
                rows = _rows(x, ctx)
                latest[:] = x, ((rows.T @ rows).double(), rows.sum(0, dtype=torch.float64), len(rows))
            before = sums.get(address, (0.0, 0.0, 0))
            sums[address] = tuple(old + new for old, new in zip(before, latest[1]))  # type: ignore[assignment]

        return hook

    for address in slots:
        handles.append(core(model.slot(address)).register_forward_pre_hook(watch(address)))
    try:
        with evaluating(model):
            for batch in evidence:
                if whole:
                    model(batch, seed=0)
                else:
                    model.run(*model.embed(batch, seed=0))
    finally:
        for handle in handles:
            handle.remove()
    found = {}
    for address, (square, total, count) in sums.items():
        if count == 0:
            continue
        covariance, mean = square / count, total / count
        if not bool(torch.isfinite(covariance).all()):
            raise DataError(f"the inputs of {address} are not finite on this evidence; check the model's numbers")
        if core(model.slot(address)).dense_bias() is not None:
            covariance = covariance - mean[:, None] * mean
            found[f"{address}.mean"] = mean.float()
        found[f"{address}.covariance"] = covariance.float()
    return found


def _rows(x: Tensor, ctx: Context | None) -> Tensor:
    """(n, in) of the real tokens of ``x``."""
    padded = ctx is not None and ctx.offsets is None and ctx.lengths is not None and x.dim() == 3
    if padded and len(x) == len(ctx.lengths):  # type: ignore[union-attr, arg-type]
        return x[ctx.valid(x)]  # type: ignore[union-attr]
    return x.flatten(0, -2)
