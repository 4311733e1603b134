"""The short causal convolution inside recurrent mixers, with its window as a stream's state.

Cost: K multiply-adds a token and channel (elementwise, so no closed-form product); state: the last K-1 tokens. Gu and
Dao, 2023 (2312.00752), use K = 4, a bias and SiLU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.ops.causal_conv import WIDEST, causal_conv
from formwright.parts.base import Cost, Shape, Slot, element_bytes
from formwright.parts.context import Context


class ShortConv(nn.Module):
    """weight (C, K), whose last tap multiplies the present token, and bias (C,) or None.

    Args:
        kernel: K, 2 to 8.
        silu: apply SiLU to the result.
        std: of a normal start of the weight, with a zero bias; None: uniform within K ** -0.5 as PyTorch's ``Conv1d``,
            bias alike.
    """

    role = "conv"

    def __init__(
        self, channels: int, kernel: int = 4, *, bias: bool = True, silu: bool = True, std: float | None = None
    ) -> None:
        super().__init__()
        if not 2 <= kernel <= WIDEST:
            raise SpecError(f"short convolution: kernel={kernel!r} must be 2 to {WIDEST}")
        self.silu, self.std = silu, std
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset(self, generator: torch.Generator) -> None:
        if self.std is not None:
            self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * self.std)
        else:
            self.weight.copy_(self._uniform(self.weight, generator))
        if self.bias is not None:
            self.bias.copy_(self._uniform(self.bias, generator) if self.std is None else torch.zeros(self.bias.shape))

    def _uniform(self, like: Tensor, generator: torch.Generator) -> Tensor:
        return (2 * torch.rand(like.shape, generator=generator) - 1) * self.weight.shape[1] ** -0.5

    def slot(self, name: str) -> dict[str, Slot]:
        """What a stream remembers, to be merged into the mixer's ``slots()``."""
        channels, kernel = self.weight.shape
        return {name: Slot("fixed", (kernel - 1, channels))}

    def forward(self, x: Tensor, ctx: Context, name: str = "conv") -> Tensor:
        """x (B, L, C), padded or packed -> the same shape; padding is not read. The window is kept under ``name``."""
        if ctx.offsets is not None:
            if ctx.state is not None:
                raise SpecError(f"{ctx.path}: a short convolution streams in the padded layout; give lengths instead")
            return causal_conv(x, self.weight, self.bias, offsets=ctx.offsets, silu=self.silu)[0]
        channels, kernel = self.weight.shape
        initial = ctx.slot(name, lambda: x.new_zeros(len(x), kernel - 1, channels))
        y, final = causal_conv(x, self.weight, self.bias, initial=initial, lengths=ctx.lengths, silu=self.silu)
        ctx.keep(name, final)
        return y

    def cost(self, shape: Shape) -> Cost:
        """Parameters and the window's bytes: it makes no matrix product."""
        channels, kernel = self.weight.shape
        window = len(shape.lengths) * (kernel - 1) * channels * element_bytes(self)
        return Cost(channels * kernel + (channels if self.bias is not None else 0), 0, window)

    def extra_repr(self) -> str:
        channels, kernel = self.weight.shape
        return f"{channels}, kernel={kernel}, bias={self.bias is not None}, silu={self.silu}"
