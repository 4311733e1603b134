"""A linear with named changes beside it: the one wrapper that every method of adapting a linear uses.

    y = change(x, base(x))          one change for the whole call, or for each row its own (``ctx.adapters``)

``base`` may be any linear: dense, int8, low-rank. What a method does is a :class:`Change`, registered under the
method's name, that sees the input, what the base said of it and the base itself; it never knows which kind that is.
Several changes, of different methods, stand side by side under their names; each has a number, by which rows of a
batch choose (-1: none), and ``active`` is the number used where a call chooses none. Switching is setting a number, so
nothing is compiled anew. Cost: that of the changes that a call may use; rows of the others are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formwright import registry
from formwright.kit.errors import Refusal, SpecError
from formwright.parts.base import Cost, LinearLike, Shape, dropout
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.registry import register


class Change(nn.Module):
    """What one method does to one linear. Subclasses give ``forward``, ``folded``, ``take`` and ``scale_in``.

    ``number`` is what ``ctx.adapters`` calls it, the same in every slot of a model. ``rate``: dropout of its input in
    training. ``key`` names its noise. Constructors take the sizes of the linear and make empty parameters.
    """

    #: Shell patterns of its parameters that train; the others are fixed, and saved with them.
    trained: ClassVar[tuple[str, ...]] = ("*",)
    #: Whether, untrained, it changes nothing, to the last bit.
    identity: ClassVar[bool] = True
    #: Options beside the sizes that the tests build it with.
    examples: ClassVar[tuple[dict[str, Any], ...]] = ({},)

    def __init__(self, number: int = 0, rate: float = 0.0) -> None:
        super().__init__()
        self.number, self.rate, self.key = number, rate, ""

    def reset(self, generator: torch.Generator) -> None:
        """Fill the parameters."""

    def start(self, base: LinearLike) -> None:
        """What the start takes from the linear itself; after ``reset``."""

    def before(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """The input of the base, (..., in)."""
        return x

    def forward(self, x: Tensor, y: Tensor, base: LinearLike, ctx: Context | None, mask: Tensor | None) -> Tensor:
        """x (..., in) and y = base(x) (..., out) -> (..., out); where ``mask`` (..., 1) is False, y."""
        return y

    def alone(self, x: Tensor, base: LinearLike, ctx: Context | None) -> Tensor:
        """The whole map, base included, where all rows use this change."""
        x = self.before(x, None)
        return self(x, base(x, ctx), base, ctx, None)

    def folded(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The base's dense weight (out, in) and bias (out,) with this change in them."""
        raise NotImplementedError

    def take(self, base: LinearLike, out: Tensor | None, inn: Tensor | None) -> Change:
        """A new change for ``base.take(out, inn)``."""
        raise NotImplementedError

    def scale_in(self, s: float) -> None:
        """What must follow when the base's input side is multiplied by ``s``."""

    def cost(self, shape: Shape) -> Cost:
        """Parameters, and multiply-accumulates of a call in which it is used."""
        return Cost(sum(parameter.numel() for parameter in self.parameters()))

    def dropped(self, x: Tensor, ctx: Context | None) -> Tensor:
        """x with dropout, in training."""
        if self.rate == 0.0 or not self.training:
            return x
        if ctx is None:
            raise SpecError(f"{self.key or 'an adapter'} drops inputs, so its linear must be given the context")
        return dropout(x, self.rate, ctx, True, self.key)


def whole(name: str, value: Any, least: int = 1, most: int | None = None) -> None:
    """SpecError unless ``value`` is a whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least or (most is not None and value > most):
        bound = f"at least {least}" + ("" if most is None else f" and at most {most}")
        raise SpecError(f"{name}={value!r} must be a whole number of {bound}")


def cut(tensor: nn.Parameter, axis: int, index: Tensor | None) -> nn.Parameter:
    """A copy of ``tensor`` with the chosen places of one axis, trainable as it was."""
    value = tensor.detach() if index is None else tensor.detach().index_select(axis, index)
    return nn.Parameter(value.clone(), requires_grad=tensor.requires_grad)


@register("linear", "adapted", summary="any linear with named changes beside it, such as LoRA's")
class Adapted(LinearLike):
    """``base`` and ``adapters`` by name. ``active`` is the number used where a call names none; it is not saved."""

    examples = ({"method": "lora", "rank": 2}, {"method": "lora", "rank": 3, "names": ("one", "two")})

    def __init__(
        self,
        in_features: int = 0,
        out_features: int = 0,
        bias: bool = True,
        role: str = "",
        *,
        base: LinearLike | None = None,
        method: str | None = None,
        names: Sequence[str] = ("default",),
        **options: Any,
    ) -> None:
        """Around ``base``, or around a new dense linear of the given size; ``method`` adds one change of that kind
        for each of ``names``, with ``options``."""
        super().__init__()
        self.base = Dense(in_features, out_features, bias, role) if base is None else base
        self.adapters = nn.ModuleDict()
        self.active = 0
        for number, name in enumerate(names if method is not None else ()):
            made = registry.resolve("change", method or "")
            self.add(name, made(self.in_features, self.out_features, number=number, **options))

    def add(self, name: str, change: Change) -> None:
        """Put a change beside the others."""
        self.adapters[name] = change
        change.key = f"{self.role}.{name}"

    def settle(self) -> None:
        """After the parameters are filled: what changes take from the base."""
        for change in self.held().values():
            change.start(self.base)

    def held(self) -> dict[str, Change]:
        return self.adapters._modules  # type: ignore[return-value]

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
    def kind(self) -> str:
        """Its methods, as layouts tell them: ``lora``, ``lora+ia3``."""
        names = dict.fromkeys(getattr(type(change), "registered", ("", "change"))[1] for change in self.held().values())
        return "+".join(names) or "adapted"

    @property
    def numbers(self) -> dict[str, int]:
        """Adapter name -> the number by which ``ctx.adapters`` picks it."""
        return {name: change.number for name, change in self.held().items()}

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        changes = self.held().values()
        if ctx is None or ctx.adapters is None:
            for change in changes:
                if change.number == self.active:
                    return change.alone(x, self.base, ctx)
            return self.base(x, ctx)
        chosen = spread(ctx.adapters, x, ctx)
        masks = [chosen == change.number for change in changes]
        for change, mask in zip(changes, masks):
            x = change.before(x, mask)
        y = self.base(x, ctx)
        for change, mask in zip(changes, masks):
            y = change(x, y, self.base, ctx, mask)
        return y

    def only(self, name: str | None = None) -> Change:
        """The named change, or the only one; a Refusal where a choice is needed."""
        held = self.held()
        if name is not None and name in held:
            return held[name]
        if name is None and len(held) == 1:
            return next(iter(held.values()))
        raise Refusal(
            f"slot {self.role!r} holds adapters {', '.join(held)}, chosen row by row, so no one weight says what it "
            "does: name one to merge"
        )

    def folded(self, name: str | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the named change, or the only one, folded in; the base's own where it is elsewhere."""
        weight, bias = self.base.dense_weight(), self.base.dense_bias()
        return (weight, bias) if name is not None and name not in self.held() else self.only(name).folded(weight, bias)

    def dense_weight(self) -> Tensor:
        return self.folded()[0]

    def dense_bias(self) -> Tensor | None:
        return self.folded()[1]

    def take(self, out: Tensor | None = None, inn: Tensor | None = None) -> Adapted:
        taken = Adapted(base=self.base.take(out, inn))
        taken.active = self.active
        for name, change in self.held().items():
            made = change.take(self.base, out, inn)
            made.number, made.rate = change.number, change.rate
            taken.add(name, made.train(change.training))
        return taken

    def scale_in(self, s: float) -> None:
        self.base.scale_in(s)
        with torch.no_grad():
            for change in self.held().values():
                change.scale_in(s)

    def cost(self, shape: Shape) -> Cost:
        """All changes' parameters; products of a call that names none: the active one's."""
        total = self.base.cost(shape)
        for change in self.held().values():
            own = change.cost(shape)
            total = total + Cost(own.parameters, own.macs if change.number == self.active else 0)
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
