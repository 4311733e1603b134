"""Initial state: what a recurrent mixer remembers before the first token, learned.

The counterpart of a prefix where there are no keys: every slot of a stream's state starts from values of its own. They
start at zero, as without it, so that the model's function is unchanged. Cost: one row's state in parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.beside import Adapter
from formwright.parts.context import Context
from formwright.registry import register


@register("adapter", "initial-state", summary="a recurrent mixer's learned initial state")
class InitialState(Adapter):
    """``values``: one parameter for each slot.

    Args: ``slots``: name -> shape a row. ``exact``: names of those that the mixer keeps in float32 at least.
    """

    examples = ({"slots": {"h": [4, 2], "conv": [3, 4]}, "exact": ["h"]},)

    def __init__(self, width: int, *, slots: dict[str, list[int]], exact: Sequence[str] = ()) -> None:
        super().__init__()
        if not slots:
            raise SpecError("an initial state needs at least one slot")
        self.names, self.exact = tuple(slots), frozenset(exact)
        self.values = nn.ParameterList([nn.Parameter(torch.empty(*shape)) for shape in slots.values()])

    def reset(self, generator: torch.Generator) -> None:
        for value in self.values:
            value.zero_()

    def begin(self, x: Tensor, ctx: Context) -> Mapping[str, Tensor]:
        def kind(name: str) -> torch.dtype:
            return torch.promote_types(x.dtype, torch.float32) if name in self.exact else x.dtype

        return {name: value.to(kind(name))[None] for name, value in zip(self.names, self.values)}
