"""Linears and tables kept in 8 bits: LLM.int8(), Dettmers et al., 2022 (2208.07339).

``Int8Linear`` holds int8 weights with a float step a row, quantises its input at every call, multiplies integers
exactly, and does outlier columns of the input in float (:mod:`formwright.ops.int8_linear`). ``Int8Table`` holds the
rows of an embedding the same way and dequantises what is looked up. Cost: a quarter of the bytes of float32 in files
and one byte product where a float product was; in memory the weight stands twice once a product has laid it out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.ops import int8_linear as op
from formwright.ops.attention.native import Heads
from formwright.ops.embedding import Source
from formwright.ops.int8_linear import (
    Packed,
    dequantize_weight,
    int8_linear,
    quantize_columns,
    quantize_weight,
    scheme_named,
)
from formwright.parts.base import Cost, LinearLike, Shape, Step, TableLike, Tail
from formwright.parts.context import Context
from formwright.parts.norms.norms import LayerNorm
from formwright.registry import Paper, register

#: Rows of a table dequantised at once for the logits of a tied head.
ROWS = 8192


def _weights(norm: nn.Module | None) -> list[Tensor | None]:
    return [] if norm is None else [norm.weight, norm.bias]  # type: ignore[list-item]


def _whole(
    slots: Sequence[Any],
    norm: nn.Module | None,
    before: bool,
    *,
    heads: Heads | None = None,
    activation: str = "none",
    joins: bool = True,
) -> Step | None:
    """One compiled step of several 8-bit slots, where they are of one scheme and search for no outliers.

    It is kept with the last slot while nothing that it was made of changes: this is asked for at every call.
    """
    packs, read = [], []
    for slot in slots:
        if slot.threshold:
            return None
        packs.append(slot.packed())
        read.append(slot._parameters["bias"])
    if norm is not None:
        if type(norm) is not LayerNorm:
            return None
        read += norm._parameters.values()
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in read):
        return None
    places = [t if t is None else t.data_ptr() for t in read]
    key = (*packs, *places, norm, before, heads, activation, joins, *[slot.scheme for slot in slots])
    last = packs[-1]
    if last.step is None or last.step.key != key:
        if any(slot.scheme != slots[0].scheme for slot in slots):
            return None
        around = None if norm is None else op.Norm(norm.weight, norm.bias, norm.eps, before)
        scheme, biases = scheme_named(slots[0].scheme), read[: len(slots)]
        last.step = op.whole(packs, biases, around, key, scheme=scheme, heads=heads, activation=activation, joins=joins)
    return last.step


def _tail(tail: Tail) -> op.Tail:
    if tail.norm is None:
        return op.Tail(tail.x)
    assert isinstance(tail.norm, LayerNorm)
    return op.Tail(tail.x, tail.norm.weight, tail.norm.bias, tail.norm.eps)


@register("linear", "int8", paper=Paper("Dettmers et al.", 2022, "2208.07339"), summary="8-bit weights and products")
class Int8Linear(LinearLike):
    """weight (out, in) int8, scale (out,) float32, bias (out,) or None.

    Args:
        scheme: where steps are shared (:data:`formwright.ops.int8_linear.SCHEMES`); shifted ones keep ``zero`` (out,).
        threshold: > 0 finds outlier columns afresh at every call, over all tokens of the batch, so that a result
            depends on its batch mates. 0: no search.
        outliers: whether some columns are always outliers, found by calibration. The buffer ``outliers`` (in,) is 0 for
            an ordinary column and the gain of an outlier column, whose weights have steps that much finer.

    The weight is frozen; the gradient of the input goes through its dequantised form. A row of zeros comes out as the
    bias; one with NaN as NaN (with one step for all rows, every row of that call does).
    """

    examples: tuple[dict[str, Any], ...] = (
        {},
        {"outliers": True},
        {"scheme": "row", "bias": False},
        {"scheme": "zeropoint-vector"},
    )

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    outliers: Tensor | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        role: str = "",
        *,
        scheme: str = "vector",
        threshold: float = 0.0,
        outliers: bool = False,
    ) -> None:
        super().__init__()
        if threshold < 0:
            raise SpecError(f"threshold={threshold} must be 0 (no outliers) or more")
        if outliers and threshold:
            raise SpecError("outliers are either fixed or found at every call, not both: set threshold=0")
        self.role, self.scheme, self.threshold = role, scheme, float(threshold)
        shared = scheme_named(scheme)
        self.by_token, shifted = shared.rows and not threshold, shared.shifted
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(out_features, dtype=torch.float32))
        self.register_buffer("zero", torch.empty(out_features, dtype=torch.float32) if shifted else None)
        self.register_buffer("outliers", torch.empty(in_features) if outliers else None)
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self._packed: Packed | None = None

    @property
    def in_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    def reset(self, generator: torch.Generator) -> None:
        std = (2.0 / (self.in_features + self.out_features)) ** 0.5
        weight = torch.randn(self.weight.shape, generator=generator) * std
        self.quantize(weight, outliers=() if self.outliers is None else range(0, self.in_features, 8))
        if self.bias is not None:
            self.bias.zero_()

    def quantize(self, weight: Tensor, bias: Tensor | None = None, outliers: Sequence[int] = ()) -> None:
        """Take the values of a float weight (out, in), a bias where it has one, and the columns of fixed outliers."""
        columns = torch.as_tensor(list(outliers), dtype=torch.long, device=weight.device)
        with torch.no_grad():
            made = quantize_weight(weight, scheme_named(self.scheme))
            for buffer, value in zip((self.weight, self.scale, self.zero), made):
                if buffer is not None and value is not None:
                    buffer.copy_(value)
            if self.bias is not None and bias is not None:
                self.bias.copy_(bias)
            if self.outliers is not None:
                self.weight[:, columns], gains = quantize_columns(weight[:, columns], made[1])
                self.outliers.zero_()
                self.outliers[columns] = gains
        self._packed = None

    def packed(self) -> Packed:
        """The weight as its product wants it: made at first use, never saved or copied."""
        if self._packed is None or self._packed.weight is not self._buffers["weight"]:
            self._packed = Packed(self.weight, self.scale, self.zero, self.outliers)
        return self._packed

    def forward(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        return self.project([self], x, ctx)[0]

    @classmethod
    def project(cls, slots: Sequence[LinearLike], x: Tensor, ctx: Context | None) -> list[Tensor]:
        """Slots that leave out the same columns quantise their common input once."""
        rest: list[Any] = list(slots)
        made: dict[int, Tensor] = {}
        while rest:
            first = rest[0]
            key = (first.scheme, first.threshold, first.packed().left_out)
            held = [slot for slot in rest if (slot.scheme, slot.threshold, slot.packed().left_out) == key]
            packs, biases = [slot.packed() for slot in held], [slot.bias for slot in held]
            results = int8_linear(x, packs, biases, scheme=scheme_named(first.scheme), threshold=first.threshold)
            if len(held) == len(slots):
                return results
            made.update({id(slot): y for slot, y in zip(held, results)})
            rest = [slot for slot in rest if id(slot) not in made]
        return [made[id(slot)] for slot in slots]

    def finishes(self, tail: Tail) -> bool:
        known = tail.norm is None or type(tail.norm) is LayerNorm
        if self.threshold or not known or tail.x.shape[-1] != self.out_features:
            return False
        return op.compiled(tail.x, [self.packed()], scheme_named(self.scheme), self.bias, *_weights(tail.norm))

    def joined(self, x: Tensor, tail: Tail) -> Tensor:
        y = op.int8_joined(x, self.packed(), self.bias, _tail(tail), scheme=scheme_named(self.scheme))
        return tail.after(self(x)) if y is None else y

    @classmethod
    def perceptron(
        cls, slots: list[LinearLike], activation: str, norm: nn.Module | None, before: bool = False, joins: bool = True
    ) -> Step | None:
        return _whole(slots, norm, before, activation=activation, joins=joins)

    @classmethod
    def attention(
        cls, slots: list[LinearLike], heads: Heads, norm: nn.Module | None, before: bool = False
    ) -> Step | None:
        # What these slots give is known to 7 bits, so that rounding it to 8 adds little to the error there is.
        return _whole(slots, norm, before, heads=Heads(*heads[:3], True))

    def dense_weight(self) -> Tensor:
        return dequantize_weight(self.weight, self.scale, self.zero, self.outliers)

    def dense_bias(self) -> Tensor | None:
        return self.bias

    def take(self, out: Tensor | None = None, inn: Tensor | None = None) -> Int8Linear:
        rows = slice(None) if out is None else out
        columns = slice(None) if inn is None else inn
        with torch.device("meta"):
            taken = Int8Linear(1, 1, self.bias is not None, self.role, scheme=self.scheme, threshold=self.threshold)
        taken.weight = self.weight[rows][:, columns].clone()
        taken.scale = self.scale[rows].clone()
        taken.zero = None if self.zero is None else self.zero[rows].clone()
        taken.outliers = None if self.outliers is None else self.outliers[columns].clone()
        if self.bias is not None:
            taken.bias = nn.Parameter(self.bias.detach()[rows].clone(), requires_grad=self.bias.requires_grad)
        return taken

    def scale_in(self, s: float) -> None:
        with torch.no_grad():
            self.scale.mul_(s)
        self._packed = None

    def cost(self, shape: Shape) -> Cost:
        held = [self.weight, self.scale, self.zero, self.bias]
        return Cost(sum(t.numel() for t in held if t is not None), self.weight.numel() * shape.tokens)

    def extra_repr(self) -> str:
        how = f", threshold={self.threshold:g}" if self.threshold else ""
        how += ", fixed outliers" if self.outliers is not None else ""
        how += f", bias={self.bias is not None}, role={self.role!r}"
        return f"{self.in_features} -> {self.out_features}, {self.scheme}{how}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def _apply(self, fn: Any, recurse: bool = True) -> Int8Linear:
        # Half precision is too coarse for steps, zero points and gains: ``model.half()`` leaves them as they are.
        kept = {name: getattr(self, name) for name in ("scale", "zero", "outliers")}
        super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(self, name)
            if new is not None and new.dtype != torch.float32:
                setattr(self, name, old.to(new.device))
        self._packed = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        # Copies make their own layout: the processor's cannot be copied.
        return {**self.__dict__, "_packed": None}


class Int8Table(TableLike):
    """A lookup table with int8 rows (rows, width) and a float step a row; frozen."""

    weight: Tensor
    scale: Tensor

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.empty(rows, width, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(rows))

    @property
    def rows(self) -> int:  # type: ignore[override]
        return self.weight.shape[0]

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.weight.shape[1]

    def reset(self, generator: torch.Generator) -> None:
        self.quantize(torch.randn(self.weight.shape, generator=generator) * 0.02)

    def quantize(self, weight: Tensor) -> None:
        """Take the values of a float table (rows, width)."""
        q, scale, _ = quantize_weight(weight)
        with torch.no_grad():
            self.weight.copy_(q)
            self.scale.copy_(scale)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.scale.dtype) * self.scale[ids][..., None]

    def dense_weight(self) -> Tensor:
        return dequantize_weight(self.weight, self.scale)

    def source(self, ids: Tensor | None, factor: float = 1.0) -> Source | None:
        return Source(self.weight, self.scale, ids, factor)

    def logits(self, x: Tensor) -> Tensor:
        """In float, some rows at a time, so that the table is never whole in float."""
        runs = range(0, self.rows, ROWS)
        made = [
            F.linear(x, dequantize_weight(self.weight[i : i + ROWS], self.scale[i : i + ROWS]).to(x.dtype))
            for i in runs
        ]
        return made[0] if len(made) == 1 else torch.cat(made, -1)

    def extra_repr(self) -> str:
        return f"{self.rows} x {self.width}, int8"
