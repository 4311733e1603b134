"""Performer (FAVOR+): random features whose products are the exponential kernel of softmax attention on average.

    phi(x) = m^(-1/2) exp(W x - |x|^2 / 2), x <- x / head_width^(1/4); E phi(q)^T phi(k) = exp(q^T k / sqrt(head_width))

The m rows of W are orthogonal within blocks of head_width. Features are positive, so the sums of linear attention stay
safe. ``kernel="relu"`` takes relu(W x) + eps instead, which is no softmax but often trains as well. Choromanski et al.,
2021 (2009.14794). Cost: 4 W^2 multiply-accumulates a token for the slots, 2 m W for the features and 2 m W for the
sums. State: one matrix (m, head_width + 1) for each head of keys.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from formwright.kit.errors import SpecError
from formwright.parts.context import Context, keyed_generator
from formwright.parts.mixers.linear_attention import FeatureAttention
from formwright.parts.pieces import contexts
from formwright.registry import Paper, register

#: Least divisor. Features carry their own eps, so this only makes 0 / 0 zero.
LEAST = 1e-12
#: Exponent that features of keys may reach where no maximum may be taken over tokens.
HIGHEST = 40.0


@register("mixer", "performer", paper=Paper("Choromanski et al.", 2021, "2009.14794"))
class Performer(FeatureAttention):
    """Slots as in ``attention``; ``omega`` (features, head_width) holds the random rows and does not train.

    Args:
        heads, kv_heads, head_width, bias, out_bias, dropout: as in ``attention``.
        causal: sum over earlier tokens and the own one only; streams.
        kernel: "softmax" or "relu".
        features: m; default head_width ln(head_width). 0 (only with "relu"): W is the identity.
        orthogonal: rows orthogonal in blocks, each of the length of a normal vector; False: independent rows.
        redraw: how many draws of W a training run goes through, by its progress; the last one is ``omega``, which is
            used ever after. 0: one.
        eps: added to every feature; default 1e-3 with "relu", 0 with "softmax".
    """

    examples = (
        {"heads": 2},
        {"heads": 2, "causal": True, "features": 24, "redraw": 3, "bias": False},
        {"heads": 4, "causal": True, "kernel": "relu", "features": 0},
        {"heads": 2, "kv_heads": 1, "head_width": 5, "kernel": "relu", "features": 7, "orthogonal": False},
    )

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int | None = None,
        head_width: int | None = None,
        causal: bool = False,
        kernel: Literal["softmax", "relu"] = "softmax",
        features: int | None = None,
        orthogonal: bool = True,
        redraw: int = 0,
        bias: bool = True,
        out_bias: bool | None = None,
        eps: float | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            width, heads=heads, kv_heads=kv_heads, head_width=head_width, causal=causal, eps=LEAST, bias=bias,
            out_bias=out_bias, dropout=dropout,
        )  # fmt: skip
        head = self.head_width
        count = max(1, int(head * math.log(head))) if features is None else features
        if count < 0 or redraw < 0:
            raise SpecError(f"features={features} and redraw={redraw} must not be negative")
        if count == 0 and kernel == "softmax":
            raise SpecError("features=0 (no random rows) is for kernel='relu'; the softmax kernel needs at least 1")
        self.kernel, self.orthogonal, self.redraw = kernel, orthogonal, redraw
        self.shift = (1e-3 if kernel == "relu" else 0.0) if eps is None else eps
        self.omega = nn.Parameter(torch.empty(count, head), requires_grad=False) if count else None

    def reset(self, generator: torch.Generator) -> None:
        if self.omega is not None:
            count, width = self.omega.shape
            draw = orthogonal_rows if self.orthogonal else independent_rows
            self.omega.copy_(draw(count, width, generator))

    @property
    def feature_width(self) -> int:
        return self.head_width if self.omega is None else self.omega.shape[0]

    def features(self, q: Tensor, k: Tensor, ctx: Context, most: Tensor | None = None) -> tuple[Tensor, Tensor]:
        omega = self.drawn(ctx)
        if self.kernel == "relu":
            seen = [x if omega is None else x @ omega.T for x in (q, k)]
            return seen[0].relu() + self.shift, seen[1].relu() + self.shift
        assert omega is not None
        (q, _), (k, half) = projected(q, omega), projected(k, omega)
        off = half + most if most is not None else self._highest(k, half, ctx)
        # Features are many times the tokens: |q|^2 / 2, which the quotient cancels, is left out, and what else is to
        # be taken off is one number a token, m^(-1/2) included.
        spare = math.log(omega.shape[0]) / 2
        return self._mapped(q, q.amax(-1, keepdim=True) + spare), self._mapped(k, off + spare)

    def most(self, k: Tensor, ctx: Context, size: int) -> Tensor | None:
        """The greatest exponent of each head (B, 1, kv_heads, 1), with the softmax kernel."""
        if self.kernel == "relu":
            return None
        omega = self.drawn(ctx)
        assert omega is not None
        found = [self._greatest(*projected(k[:, piece], omega), inner) for piece, inner in contexts(k, ctx, size)]
        return finite(torch.stack(found).amax(0))

    def _greatest(self, k: Tensor, half: Tensor, ctx: Context) -> Tensor:
        """The greatest exponent of padded keys W k (B, L, H, m) of each head, (B, 1, H, 1); -inf without keys."""
        most = k.amax(-1, keepdim=True) - half
        return most.masked_fill(~ctx.valid(most)[..., None, None], -torch.inf).amax(1, keepdim=True)

    def _mapped(self, exponent: Tensor, off: Tensor) -> Tensor:
        mapped = (exponent - off).exp_()
        return mapped + self.shift if self.shift else mapped

    def drawn(self, ctx: Context) -> Tensor | None:
        """``omega``, turned as a whole while training with ``redraw``, which is as good as another draw."""
        if self.omega is None or not self.training or self.redraw < 2:
            return self.omega
        number = min(int(ctx.progress * self.redraw), self.redraw - 1)
        if number == self.redraw - 1:
            return self.omega
        return self.omega @ rotation(self.head_width, number).to(self.omega)

    def _highest(self, k: Tensor, half: Tensor, ctx: Context) -> Tensor:
        """What is taken off W k (B, L, H, m) of keys: |k|^2 / 2, which is ``half`` (B, L, H, 1), and a number that is
        the same for all that a query may compare.

        The number cancels in the quotient. The greatest exponent is the safest, but it looks ahead: with ``causal`` a
        constant stands in for it, for W k - |k|^2 / 2 never passes |W|^2 / 2.
        """
        assert self.omega is not None
        if self.traits.causal or k.shape[1] == 0:
            return half + (self.omega.square().sum(1).max().to(half.dtype) / 2 - HIGHEST).relu()
        if ctx.offsets is None:
            return half + finite(self._greatest(k, half, ctx))
        most = k.amax(-1) - half[..., 0]
        lengths = torch.tensor([stop - start for start, stop in ctx.spans()], device=most.device)
        document = torch.repeat_interleave(torch.arange(len(lengths), device=most.device), lengths)
        index = document[None, :, None].expand_as(most)
        held = most.new_full((1, len(lengths), most.shape[2]), -torch.inf)
        return half + held.scatter_reduce(1, index, most, "amax").gather(1, index)[..., None]

    def mixing_macs(self, length: int, past: int) -> int:
        mapped = 0 if self.omega is None else length * (self.heads + self.kv_heads) * self.omega.numel()
        return super().mixing_macs(length, past) + mapped


def finite(most: Tensor) -> Tensor:
    """0 for what no key has."""
    return most.masked_fill(most.isinf(), 0.0)


def projected(x: Tensor, omega: Tensor) -> tuple[Tensor, Tensor]:
    """(..., head_width) -> W x (..., m) and |x|^2 / 2 (..., 1), x scaled; in float32 at least, since half precision
    would lose what a difference of exponents has to keep."""
    exact = torch.promote_types(x.dtype, torch.float32)
    x, scale = x.to(exact), x.shape[-1] ** -0.25
    # One product over all rows, whose strides in a piece would otherwise make it one for every token.
    seen = x.reshape(-1, x.shape[-1]) @ (omega.T.to(exact) * scale)
    return seen.view(*x.shape[:-1], len(omega)), x.square().sum(-1, keepdim=True) * (scale * scale / 2)


def exponents(x: Tensor, omega: Tensor) -> Tensor:
    """(..., head_width) -> (..., m): W x - |x|^2 / 2 with x scaled; exp of it, over sqrt(m), are the features."""
    seen, half = projected(x, omega)
    return seen - half


def independent_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, width) of independent normal numbers."""
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def orthogonal_rows(count: int, width: int, generator: torch.Generator) -> Tensor:
    """(count, width): rows in blocks of ``width`` are orthogonal, and each by itself is a normal vector."""
    blocks = [_turn(width, generator) for _ in range(-(-count // width))]
    return torch.cat(blocks)[:count] * independent_rows(count, width, generator).norm(dim=1, keepdim=True)


def _turn(width: int, generator: torch.Generator) -> Tensor:
    """A uniformly drawn orthogonal matrix: Q of a normal matrix, with the signs that make it unique."""
    q, r = torch.linalg.qr(independent_rows(width, width, generator))
    return q * r.diagonal().sign()


@functools.lru_cache(maxsize=16)
def rotation(width: int, number: int) -> Tensor:
    """The turn that makes draw ``number`` of the last one, the same in every run."""
    return _turn(width, keyed_generator(number, "performer"))
