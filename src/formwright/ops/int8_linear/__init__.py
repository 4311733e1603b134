"""The 8-bit linear map: most of a product in integers, a few outlier columns in float.

Dettmers, Lewis, Belkada, Zettlemoyer, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", 2022
(2208.07339). ``reference`` is the definition. ``native`` does all of it in one pass over memory where it was built;
elsewhere ``products`` multiplies the integers, exactly, by the fastest route of the machine, and this file quantises,
puts the steps back and adds the outlier columns. This file also differentiates.

Cost: T K O byte products, one pass over x and y (three and one without ``native``), plus 2 T n O for n outlier columns.
Error of a product without outliers, by element: ``sum_k |x| s_w/2 + |W| s_x/2``, with s_w = c_w/127 and
s_x = c_x/levels. ``levels`` is 127 where byte products are added in 32 bits (``native``, VNNI, CUDA) and 64 for oneDNN
on AVX2, where more would clip: the term of x is then c_x/128 instead of c_x/254. :func:`backend` says which holds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from formwright.ops import native as library
from formwright.ops.attention.native import Heads
from formwright.ops.int8_linear.native import ACTIVATIONS, NativeWeight, Norm, Step, Tail, Term, linear
from formwright.ops.int8_linear.products import Product, onednn_levels, route
from formwright.ops.int8_linear.reference import (
    MAGIC,
    SCHEMES,
    Scheme,
    dequantize_weight,
    input_range,
    int8_linear_reference,
    outlier_columns,
    quantize_columns,
    quantize_weight,
    scheme_named,
)
from formwright.registry import Paper, register

__all__ = [
    "SCHEMES",
    "Norm",
    "Packed",
    "Product",
    "Quantized",
    "Step",
    "Tail",
    "backend",
    "dequantize_weight",
    "int8_joined",
    "int8_linear",
    "int8_linear_reference",
    "outlier_columns",
    "prepare",
    "quantize_columns",
    "quantize_weight",
    "scheme_named",
    "whole",
]

#: Instruction sets on which the compiled kernels are the fastest route.
FAST = ("avx512-vnni",)
#: Elements quantised at once where rows are independent: three passes over what is still in the cache.
RUN = 1 << 19


def backend(device: torch.device | str = "cpu") -> str:
    """One line for ``doctor``: how 8-bit products are made on a device, and how exactly."""
    device = torch.device(device)
    if device.type == "cpu" and library.level() in FAST:
        return f"compiled kernels ({library.why()}), exact integers at 127 levels a side"
    name, levels = route(device)
    if name == "onednn":
        why = "32-bit sums" if levels == 127 else "16-bit pair sums, no VNNI: inputs are quantised to 7 bits"
        return f"oneDNN byte kernels, exact integers at {levels} levels a side ({why})"
    if name == "int_mm":
        return f"torch._int_mm, exact integers at {levels} levels a side"
    if device.type == "cpu" and onednn_levels() is None:
        return f"float32 products of integers, exact at {levels} levels a side, not faster than float (no oneDNN bytes)"
    return f"float32 products of integers, exact at {levels} levels a side, not faster than float"


class Packed:
    """What is derived from a quantised weight and kept beside it: its layout for products, the float columns of fixed
    outliers. With ``product`` that route is taken; otherwise the fastest."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero: Tensor | None = None,
        gains: Tensor | None = None,
        product: Product | None = None,
    ) -> None:
        self.weight, self.zero, self.gains = weight, zero, gains
        self.scale = scale.float()
        #: Indices of the fixed outliers, as a tensor and as plain numbers to compare by.
        self.outliers = torch.nonzero(gains)[:, 0] if gains is not None and bool(gains.any()) else None
        self.left_out: tuple[int, ...] = () if self.outliers is None else tuple(self.outliers.tolist())
        self.columns = None if self.outliers is None else self.float_columns(self.outliers)
        self._product = product
        self._term: Term | None = None
        #: The compiled sublayer that ends with this weight, where one was made.
        self.step: Step | None = None

    @functools.cached_property
    def native(self) -> NativeWeight | None:
        """The weight laid out for the compiled kernels, made when first asked for; None where they do not take it."""
        plain = self._product is None and self.zero is None and 0 not in self.weight.shape
        if plain and self.weight.device.type == "cpu" and library.level() in FAST:
            return NativeWeight(self.weight, self.scale)
        return None

    @functools.cached_property
    def product(self) -> Product:
        """The weight laid out for the general route, made when first asked for."""
        return Product(self.weight) if self._product is None else self._product

    @property
    def levels(self) -> int:
        """Input levels a side."""
        return 127 if self.native is not None else self.product.levels

    def term(self, bias: Tensor | None, columns: Tensor | None = None, outliers: Tensor | None = None) -> Term:
        """What the compiled kernels need to know; the fixed outliers where none are given."""
        assert self.native is not None
        if outliers is not None:
            return Term(self.native, bias, outliers, columns)
        if self._term is None or self._term.bias != (None if bias is None else bias.data_ptr()):
            self._term = Term(self.native, bias, self.outliers, self.columns)
        return self._term

    def float_columns(self, outliers: Tensor) -> Tensor:
        """(n, O) float32: the dequantised columns, transposed."""
        gains = None if self.gains is None else self.gains[outliers]
        return dequantize_weight(self.weight[:, outliers], self.scale, self.zero, gains).T.contiguous()

    def dense(self) -> Tensor:
        """(O, K) float32, dequantised."""
        return dequantize_weight(self.weight, self.scale, self.zero, self.gains)


class Quantized:
    """An input quantised once, for all slots that read it. q (T, K) as the product wants it; step and zero (T or 1, 1);
    ``kept`` (T, n) the float values of the columns left out."""

    __slots__ = ("kept", "q", "step", "zero")

    def __init__(self, q: Tensor, step: Tensor, zero: Tensor | None, kept: Tensor | None) -> None:
        self.q, self.step, self.zero, self.kept = q, step, zero, kept


def _whole(pieces: list[Tensor | None]) -> Tensor | None:
    return torch.cat([p for p in pieces if p is not None]) if pieces[0] is not None else None


def prepare(x: Tensor, product: Product, scheme: Scheme, outliers: Tensor | None = None) -> Quantized:
    """x (T, K) float32 -> its integers for ``product``, without the columns ``outliers``."""
    if scheme.rows and x.numel() > 2 * RUN:
        runs = [prepare(rows, product, scheme, outliers) for rows in x.split(max(1, RUN // x.shape[1]))]
        q, step = torch.cat([run.q for run in runs]), torch.cat([run.step for run in runs])
        return Quantized(q, step, _whole([run.zero for run in runs]), _whole([run.kept for run in runs]))
    kept: Tensor | None = None
    if outliers is not None:
        kept = x.index_select(1, outliers)
        x = x.index_fill(1, outliers, 0.0)
    if 0 in x.shape:
        step = x.new_ones(x.shape[0] if scheme.rows else 1, 1)
        return Quantized(x.to(product.dtype), step, None, kept)
    per_unit, zero = input_range(x, scheme, product.levels)
    wide = x.mul(per_unit)
    if zero is None:
        # The low byte of x / s + MAGIC, read as an integer, is the rounded value: cheaper than round, then convert.
        q = wide.add_(MAGIC + product.offset).view(torch.int32).to(product.dtype)
    else:
        wide.round_().add_(zero).clamp_(-product.levels, product.levels)
        q = wide.nan_to_num_(0.0).add_(product.offset).to(product.dtype)
    return Quantized(q, per_unit.reciprocal_(), zero, kept)


def finish(given: Quantized, packed: Packed, bias: Tensor | None, columns: Tensor | None) -> Tensor:
    """A prepared input through a packed weight, with the float ``columns`` (n, O) of what was left out: (T, O)."""
    y = packed.product(given.q, packed.scale)
    if given.zero is not None or packed.zero is not None:
        y = _shifted(given, packed, y)
    y = y.mul_(given.step) if bias is None else torch.addcmul(bias.float(), y, given.step, out=y)
    return y if given.kept is None or columns is None else y.addmm_(given.kept, columns)


def _shifted(given: Quantized, packed: Packed, y: Tensor) -> Tensor:
    """s_w sum_k (q_x - z_x)(q_w - z_w) from y = s_w sum_k q_x q_w. In float64: the terms cancel."""
    rows = (given.q.to(torch.int32).sum(1, keepdim=True) - packed.product.offset * given.q.shape[1]).double()
    q_w = packed.weight.to(torch.int32).sum(1).double()
    z_x = 0.0 if given.zero is None else given.zero.double()
    z_w = 0.0 if packed.zero is None else packed.zero.double()
    taken = z_x * q_w + rows * z_w - given.q.shape[1] * z_x * z_w
    return (y.double() - taken * packed.scale.double()).float()


def compiled(x: Tensor, packs: Sequence[Packed], scheme: Scheme, *others: Tensor | None) -> bool:
    """Whether the compiled kernels take this call."""
    if not scheme.rows or scheme.shifted:
        return False
    for packed in packs:
        if packed.native is None:
            return False
    return library.usable(x, *[t for t in others if t is not None])


def forward(
    x: Tensor, packs: Sequence[Packed], biases: Sequence[Tensor | None], scheme: Scheme, threshold: float
) -> list[Tensor]:
    """x (T, K) float32 through several weights, quantised once. ``threshold`` > 0 finds the outliers of this call."""
    if threshold == 0 and compiled(x, packs, scheme, *biases):
        return linear(x.contiguous(), [pack.term(bias) for pack, bias in zip(packs, biases)])
    outliers, columns = packs[0].outliers, [packed.columns for packed in packs]
    if threshold > 0:
        found = outlier_columns(x, threshold)
        outliers = found if len(found) else None
        columns = [packed.float_columns(found) if len(found) else None for packed in packs]
        if compiled(x, packs, scheme, *biases):
            terms = [pack.term(bias, held, outliers) for pack, bias, held in zip(packs, biases, columns)]
            return linear(x.contiguous(), terms)
    given = prepare(x, packs[0].product, scheme, outliers)
    return [finish(given, *each) for each in zip(packs, biases, columns)]


class _Int8Linear(torch.autograd.Function):
    """The gradient of the input goes through the dequantised weight; steps and integers count as constants."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scheme: Scheme, threshold: float, packs: Sequence[Packed], *biases: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.packs = packs
        return tuple(forward(x, packs, biases, scheme, threshold))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        to_x = None
        if ctx.needs_input_grad[0]:
            terms = [g @ packed.dense() for g, packed in zip(gradients, ctx.packs)]
            to_x = sum(terms[1:], terms[0])
        to_biases = [g.sum(0) if need else None for g, need in zip(gradients, ctx.needs_input_grad[4:])]
        return (to_x, None, None, None, *to_biases)


@register(
    "op", "int8-linear", paper=Paper("Dettmers et al.", 2022, "2208.07339"), summary="8-bit products, float outliers"
)
def int8_linear(
    x: Tensor,
    packs: Sequence[Packed],
    biases: Sequence[Tensor | None],
    *,
    scheme: Scheme = SCHEMES["vector"],
    threshold: float = 0.0,
) -> list[Tensor]:
    """x (..., K) through the packed weights that read it -> one (..., O) each, in the dtype of x.

    The packs share ``outliers`` (those of the first are used); with ``threshold`` > 0 the columns with an entry of that
    magnitude are found afresh, so results then depend on what else is in the call. A row that holds NaN
    comes out as NaN, one that holds infinity has no finite entry, a row of zeros comes out as the bias.
    """
    flat = (x.flatten(0, -2) if x.dim() > 1 else x[None]).float()
    if torch.is_grad_enabled() and (flat.requires_grad or any(b is not None and b.requires_grad for b in biases)):
        made = list(_Int8Linear.apply(flat, scheme, threshold, packs, *biases))
    else:
        made = forward(flat, packs, biases, scheme, threshold)
    return [y.to(x.dtype).view(*x.shape[:-1], y.shape[-1]) for y in made]


def whole(
    packs: Sequence[Packed],
    biases: Sequence[Tensor | None],
    norm: Norm | None,
    key: Any,
    *,
    scheme: Scheme,
    joins: bool = True,
    heads: Heads | None = None,
    activation: str = "none",
) -> Step | None:
    """A whole sublayer as one compiled :class:`Step`: q, k, v and o around attention of ``heads``, or up and down
    around ``activation``. The same integers, sums and softmax as the calls one by one.

    ``key`` says what it was made of. None where the compiled kernels do not take these weights.
    """
    others = [*biases, *(() if norm is None else norm[:2])]
    plain = scheme.rows and not scheme.shifted and all(packed.native is not None for packed in packs)
    alike = heads is None or all(packed.left_out == packs[0].left_out for packed in packs[1:3])
    floats = all(t is None or (type(t) in library.PLAIN and t.dtype == torch.float32 and t.is_cpu) for t in others)
    if not (plain and alike and floats and activation in ACTIVATIONS):
        return None
    terms = [packed.term(bias) for packed, bias in zip(packs, biases)]
    return Step(key, terms, norm, joins=joins, heads=heads, activation=activation)


def int8_joined(
    x: Tensor, packed: Packed, bias: Tensor | None, tail: Tail, *, scheme: Scheme = SCHEMES["vector"]
) -> Tensor | None:
    """``tail`` over one linear: LayerNorm(residual + W x + b), or without the norm.

    None where the compiled kernels do not take it.
    """
    if not compiled(x, (packed,), scheme, bias, *tail[:3]):
        return None
    y = linear(x.reshape(-1, x.shape[-1]), [packed.term(bias)], _flat(tail))[0]
    return y.view(*x.shape[:-1], y.shape[-1])


def _flat(tail: Tail | None) -> Tail | None:
    return None if tail is None else tail._replace(residual=tail.residual.contiguous())
