"""AdamW over named parameters, with its state as named tensors (Loshchilov and Hutter, 2019, 1711.05101).

One fused pass where the device has one. Cost: two numbers kept a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError
from formwright.training.offload import Interleaved
from formwright.training.parameters import groups
from formwright.training.recipe import Recipe


def adamw(parameters: Mapping[str, nn.Parameter], recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW as the recipe says, its state on the host where it is to be; lr is set before every step."""
    held = {(p.device.type, p.is_floating_point()) for p in parameters.values()}
    fused = all(device in ("cpu", "cuda") and floating for device, floating in held)
    kind = Interleaved if recipe.offload else torch.optim.AdamW
    return kind(groups(parameters, recipe.weight_decay), lr=recipe.lr, betas=recipe.betas, eps=recipe.eps, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def state_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``name|key`` -> tensor for everything the optimizer remembers."""
    return {
        f"{name}|{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    values: Mapping[str, Tensor],
    like: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """The opposite of :func:`state_tensors`; DataError for names that are no trained parameter.

    ``like`` lays a value out as its parameter.
    """
    for full, value in values.items():
        name, _, key = full.rpartition("|")
        if name not in parameters:
            raise DataError(
                f"the checkpoint's optimizer knows {name}, which is not trained now; keep the recipe as it was"
            )
        optimizer.state[parameters[name]][key] = like(value, parameters[name])
    if isinstance(optimizer, Interleaved):
        optimizer.refresh()
