"""The matrix that a mixer applies along the length, found by feeding it values that are the identity."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from conformance.samples import WIDTH, draw
from formwright.parts.base import Part, initialise
from formwright.parts.context import Context
from formwright.parts.make import make_part


def one_head(name: str, seed: int = 0, **options: Any) -> Any:
    """A mixer of one head as wide as the stream, in double precision, whose slot ``o`` is the identity."""
    part = make_part({"part": name, "heads": 1, "bias": False, **options}, WIDTH)
    initialise(part, seed)
    part.double().eval()
    with torch.no_grad():
        part.o.weight.copy_(torch.eye(WIDTH))
    return part


def mixing_matrix(part: Any, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """x (1, length, W) and what the part makes of it with v = identity: (length, length), row t what token t reads."""
    x = draw(1, length, WIDTH, seed=seed)
    with torch.no_grad():
        part.v.weight.copy_(torch.linalg.lstsq(x[0], torch.eye(length, WIDTH).double()).solution.T)
        return x, part(x, Context(seed=0))[0, :, :length]


def projections(part: Part, x: Tensor, *names: str) -> list[Tensor]:
    """(length, W) of the named slots."""
    with torch.no_grad():
        return [getattr(part, name)(x)[0] for name in names]
