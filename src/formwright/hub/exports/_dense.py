"""Plain float equivalents of what a slot or table became, for formats that know only matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from formwright.kit.errors import Refusal, all_of
from formwright.parts.linears.dense import Dense, Table, dense_of
from formwright.surgery.base import copy


def not_plain(model: Any) -> dict[str, nn.Module]:
    """Address -> every slot and table that is not a plain float one."""
    slots = {address: slot for address, slot in model.slots().items() if type(slot) is not Dense}
    return {**slots, **{address: table for address, table in model.tables().items() if type(table) is not Table}}


def integers(module: nn.Module) -> bool:
    """Whether it keeps weights as integers."""
    held = (*module.parameters(), *module.buffers())
    return any(not t.is_floating_point() and t.dtype != torch.bool and t.dim() > 1 for t in held)


def as_dense(model: Any) -> Any:
    """A copy (of the structure; plain tensors are the same memory) in which every slot and table is a plain float one.

    Integer products become float products, so outputs may differ by what rounding the inputs cost. Raises Refusal,
    with all reasons, for slots that no one matrix equals.
    """
    made = copy(model, share=True)
    problems = []
    for address, module in not_plain(made).items():
        try:
            made.set_slot(address, _plain(module))
        except Refusal as refusal:
            problems.append(f"{address}: {refusal}")
    all_of(Refusal, problems)
    return made


def _plain(module: Any) -> nn.Module:
    if hasattr(module, "in_features"):
        return dense_of(module)
    weight = module.dense_weight().detach()
    with torch.device("meta"):
        table = Table(*weight.shape)
    table.weight = nn.Parameter(weight.clone())
    return table
