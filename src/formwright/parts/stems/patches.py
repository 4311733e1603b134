"""The stem of pictures: cut into square patches, a linear of each, special tokens in front, learned positions.

Dosovitskiy et al., 2020 (2010.11929); the second special token: DeiT, Touvron et al., 2020 (2012.12877).
Cost: patches x (channels patch^2) x width multiply-accumulates.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, SpecError
from formwright.parts.base import Cost, Shape
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.parts.stems.tokens import Stem
from formwright.registry import Paper, register


@register("stem", "patches", paper=Paper("Dosovitskiy et al.", 2020, "2010.11929"))
class Patches(Stem):
    """Reads ``pixels`` (B, C, H, W); slot ``patch`` (W, C p p). Sets ``grid`` and ``prefix`` of the context.

    Args: ``image`` size (side, or [height, width]), ``patch`` side, ``channels``, ``special`` tokens in front (1: the
        class token of ViT, 2: DeiT's).
    """

    examples = ({"image": 8, "patch": 4, "channels": 1}, {"image": [8, 12], "patch": 4, "special": 2})

    def __init__(
        self, width: int, *, image: int | list[int], patch: int, channels: int = 3, special: int = 1, bias: bool = True
    ) -> None:
        super().__init__()
        height, across = (image, image) if isinstance(image, int) else tuple(image)
        if height % patch or across % patch:
            raise SpecError(f"patch={patch} does not divide the image {height} x {across}")
        self.width, self.side, self.channels = width, patch, channels
        self.grid = (height // patch, across // patch)
        self.patch = Dense(channels * patch * patch, width, bias, "patch")
        self.special = nn.Parameter(torch.empty(special, width))
        self.places = nn.Parameter(torch.empty(special + self.grid[0] * self.grid[1], width))

    def reset(self, generator: torch.Generator) -> None:
        for parameter in (self.special, self.places):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)

    def field(self) -> str:
        return "pixels"

    def sample(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        height, across = (side * self.side for side in self.grid)
        return {"pixels": torch.randn(batch, self.channels, height, across, generator=generator)}

    def forward(self, inputs: dict[str, Tensor], ctx: Context) -> tuple[Tensor, Context]:
        if "pixels" not in inputs:
            raise DataError(f"this model reads 'pixels'; the batch holds {', '.join(sorted(inputs)) or 'nothing'}")
        pixels = inputs["pixels"]
        wanted = (self.channels, self.grid[0] * self.side, self.grid[1] * self.side)
        if tuple(pixels.shape[1:]) != wanted:
            raise DataError(f"pixels have shape {tuple(pixels.shape[1:])}; this model reads {wanted} (C, H, W)")
        cut = pixels.unflatten(3, (-1, self.side)).unflatten(2, (-1, self.side))
        cut = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        x = torch.cat((self.special.expand(len(cut), -1, -1), self.patch(cut, ctx)), 1) + self.places
        return x, ctx.replace(grid=self.grid, prefix=self.special.shape[0], lengths=None, positions=None)

    def shape_after(self, shape: Shape) -> Shape:
        return Shape((self.places.shape[0],) * len(shape.lengths), shape.past, shape.memory)

    def cost(self, shape: Shape) -> Cost:
        each = Shape.full(len(shape.lengths), self.grid[0] * self.grid[1])
        return self.patch.cost(each) + Cost(self.special.numel() + self.places.numel())
