"""LoRA: a frozen linear plus a small product for each adapter, chosen row by row.

    y = base(x) + scaling B A dropout(x),   A (rank, in), B (out, rank)

Hu et al., 2021 (2106.09685); scaling is alpha / rank, or alpha / sqrt(rank) (Kalajdzievski, 2023, 2312.03732). A starts
uniform in +-1/sqrt(in) and B at zero, so an adapter begins as nothing at all. ``base`` may be any linear: dense, int8,
low-rank. Each adapter's pair is stored apart, since each trains, is saved and goes by itself; ``ctx.adapters`` picks
one for each row (each document, when packed), -1 for none. Cost: rank (in + out) multiply-accumulates a token for each
adapter that a call may use; rows of other adapters are masked where the product is only ``rank`` wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import Refusal, SpecError
from formwright.parts.base import Cost, LinearLike, Shape, dropout
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.registry import Paper, register


class Adapter(nn.Module):
    """One pair. ``number`` is what ``ctx.adapters`` calls it, the same in every slot of a model."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, scaling: float, number: int = 0, rate: float = 0.0
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise SpecError(
                f"rank={rank} must be at least 1 and at most {min(in_features, out_features)}, the smaller side of a "
                f"{out_features} x {in_features} weight"
            )
        self.scaling, self.number, self.rate = scaling, number, rate
        self.A = nn.Parameter(torch.empty(rank, in_features))
        self.B = nn.Parameter(torch.empty(out_features, rank))

    def reset(self, generator: torch.Generator) -> None:
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.rand(self.A.shape, generator=generator) * (2 * bound) - bound)
        self.B.zero_()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """scaling B A x; where ``mask`` (..., 1) is False, zeros."""
        inner = F.linear(x.to(self.A.dtype), self.A) * self.scaling
        if mask is not None:
            inner = torch.where(mask, inner, 0.0)
        return F.linear(inner, self.B)

    def weight(self) -> Tensor:
        """scaling B A, (out, in)."""
        return self.scaling * (self.B @ self.A)

    def extra_repr(self) -> str:
        return f"rank={self.A.shape[0]}, scaling={self.scaling:g}, number={self.number}"


@register("linear", "lora", paper=Paper("Hu et al.", 2021, "2106.09685"), summary="a linear with low-rank adapters")
class LoRA(LinearLike):
    """``base`` and ``adapters`` by name. ``active`` is the number used where a call names none; it is not saved."""

    examples = ({"rank": 2}, {"rank": 3, "names": ("one", "two")})

    def __init__(
        self,
        in_features: int = 0,
        out_features: int = 0,
        bias: bool = True,
        role: str = "",
        *,
        base: LinearLike | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        names: Sequence[str] = ("default",),
    ) -> None:
        """Around ``base``, or around a new dense linear of the given size; ``rank`` adds one adapter for each name."""
        super().__init__()
        self.base = Dense(in_features, out_features, bias, role) if base is None else base
        self.adapters = nn.ModuleDict()
        self.active = 0
        for number, name in enumerate(names if rank is not None else ()):
            assert rank is not None
            self.adapters[name] = Adapter(
                self.in_features, self.out_features, rank, (2.0 * rank if alpha is None else alpha) / rank, number
            )

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.base.in_features

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.base.out_features

    @property
    def role(self) -> str:  # type: ignore[override]
        return self.base.role

    @property
    def numbers(self) -> dict[str, int]:
        """Adapter name -> the number by which ``ctx.adapters`` picks it."""
        return {name: adapter.number for name, adapter in self._held().items()}

    def _held(self) -> Mapping[str, Adapter]:
        return dict(self.adapters.items())  # type: ignore[arg-type]

    @property
    def A(self) -> Tensor:
        """(n, rank, in): all adapters' A, scaled, padded with zeros to the largest rank; for kernels that gather."""
        return self._stacked([adapter.A * adapter.scaling for adapter in self._held().values()], 0)

    @property
    def B(self) -> Tensor:
        """(n, out, rank): all adapters' B, padded with zeros to the largest rank."""
        return self._stacked([adapter.B for adapter in self._held().values()], 1)

    @staticmethod
    def _stacked(tensors: list[Tensor], axis: int) -> Tensor:
        most = max(tensor.shape[axis] for tensor in tensors)
        padding = [(0, 0, 0, most - t.shape[0]) if axis == 0 else (0, most - t.shape[1]) for t in tensors]
        return torch.stack([F.pad(tensor, pad) for tensor, pad in zip(tensors, padding)])

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        y = self.base(x, ctx)
        chosen = None if ctx is None or ctx.adapters is None else spread(ctx.adapters, x, ctx)
        for name, adapter in self._held().items():
            if chosen is None and adapter.number != self.active:
                continue
            seen = self._dropped(x, ctx, adapter, name)
            y = y + adapter(seen, None if chosen is None else chosen == adapter.number).to(y.dtype)
        return y

    def _dropped(self, x: Tensor, ctx: Context | None, adapter: Adapter, name: str) -> Tensor:
        if adapter.rate == 0.0 or not self.training:
            return x
        if ctx is None:
            raise SpecError(f"slot {self.role!r} drops inputs of its adapter, so it must be given the context")
        return dropout(x, adapter.rate, ctx, True, f"{self.role}.{name}")

    def only(self, name: str | None = None) -> Adapter:
        """The named adapter, or the only one; a Refusal where a choice is needed."""
        held = self._held()
        if name is not None and name in held:
            return held[name]
        if name is None and len(held) == 1:
            return next(iter(held.values()))
        raise Refusal(
            f"slot {self.role!r} holds adapters {', '.join(held)}, chosen row by row, so no one weight says what it "
            "does: name one to merge"
        )

    def dense_weight(self) -> Tensor:
        """base + scaling B A, where there is one adapter."""
        adapter = self.only()
        return self.base.dense_weight() + adapter.weight().to(self.base.dense_weight().dtype)

    def dense_bias(self) -> Tensor | None:
        return self.base.dense_bias()

    def take(self, out: Tensor | None = None, inn: Tensor | None = None) -> LoRA:
        taken = LoRA(base=self.base.take(out, inn))
        taken.active = self.active
        for name, old in self._held().items():
            a, b = old.A.detach(), old.B.detach()
            a, b = a if inn is None else a[:, inn], b if out is None else b[out]
            with torch.device("meta"):
                # The bound on the rank holds for new adapters; one that is cut may end narrower than its rank.
                new = Adapter(len(a), len(a), len(a), old.scaling, old.number, old.rate)
            new.A = nn.Parameter(a.clone(), requires_grad=old.A.requires_grad)
            new.B = nn.Parameter(b.clone(), requires_grad=old.B.requires_grad)
            taken.adapters[name] = new
        return taken

    def scale_in(self, s: float) -> None:
        self.base.scale_in(s)
        with torch.no_grad():
            for adapter in self._held().values():
                adapter.A.mul_(s)

    def cost(self, shape: Shape) -> Cost:
        """All adapters' parameters; products of a call that names none: the active one's."""
        total = self.base.cost(shape)
        for adapter in self._held().values():
            size = adapter.A.numel() + adapter.B.numel()
            total = total + Cost(size, size * shape.tokens if adapter.number == self.active else 0)
        return total


def spread(adapters: Tensor, x: Tensor, ctx: Context) -> Tensor:
    """The adapter of every token of ``x``, shaped (B, 1, 1), (1, T, 1) when packed, or (B, 1) for pooled rows."""
    if x.dim() == 3 and ctx.offsets is not None:
        if len(adapters) != len(ctx.offsets) - 1:
            raise SpecError(f"{len(adapters)} adapters were chosen for {len(ctx.offsets) - 1} documents")
        return torch.repeat_interleave(adapters, ctx.offsets.diff())[None, :, None]
    if len(adapters) != len(x):
        raise SpecError(f"{len(adapters)} adapters were chosen for {len(x)} rows")
    return adapters.reshape(-1, *[1] * (x.dim() - 1))
