"""Heads that decide: language model, classifiers of sequences and of tokens, regression, pairs.

Each may first transform (a linear and an activation, and a norm for masked language models), as pretrained families do.
Slot ``out`` is the last linear; a language-model head tied to the stem's table has none. Cost: one product a token for
token heads, one a row for the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, SpecError
from formwright.parts.activations import activation as activation_named
from formwright.parts.base import Cost, Shape, TableLike, cost_sum, costed, dropout, hooked, own_parameters
from formwright.parts.context import Context
from formwright.parts.heads.pooling import Head, Pool, check_pool, pool
from formwright.parts.linears.dense import Dense, Table
from formwright.parts.make import make
from formwright.registry import register


class Transform(nn.Module):
    """act(dense(x)), then a norm where given: what stands between the body and the last linear of many heads."""

    def __init__(self, width: int, to: int, activation: str, norm: dict | str | None = None, bias: bool = True) -> None:
        super().__init__()
        self.dense = Dense(width, to, bias, "transform")
        self.activation = activation_named(activation)
        self.norm = None if norm is None else make("norm", norm, to)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = self.activation(self.dense(x, ctx))
        return x if self.norm is None else self.norm(x)

    def cost(self, shape: Shape) -> Cost:
        return cost_sum([child.cost(shape) for _, child in costed(self)])


def read_transform(options: dict[str, Any] | None, width: int) -> Transform | None:
    """{"width", "activation", "norm", "bias"} or None."""
    if options is None:
        return None
    known = ("width", "activation", "norm", "bias")
    spare = set(options) - set(known)
    if spare:
        raise SpecError(f"transform has unknown options {', '.join(sorted(spare))} (known: {', '.join(known)})")
    return Transform(
        width,
        options.get("width", width),
        options.get("activation", "tanh"),
        options.get("norm"),
        options.get("bias", True),
    )


@register("head", "lm", summary="logits over the vocabulary, tied to the stem or not")
class LanguageModel(Head):
    """(B, L, vocab) logits.

    Args:
        vocab: rows of its own slot ``out``; leave out when ``tied``.
        tied: use the stem's token table (and its projection backwards, where the table is narrower).
        bias: of the last product. transform: see :class:`Transform`. scale: factor on the states before the product.
    """

    kind = "tokens"
    examples = ({"vocab": 50}, {"tied": True, "bias": True, "transform": {"activation": "gelu", "norm": "layernorm"}})

    def __init__(
        self,
        width: int,
        *,
        vocab: int | None = None,
        tied: bool = False,
        bias: bool = False,
        transform: dict[str, Any] | None = None,
        scale: float = 1.0,
        project: int | None = None,
    ) -> None:
        super().__init__()
        if tied == (vocab is not None):
            raise SpecError("a language-model head is either tied (no vocab) or has a vocab of its own")
        self.tied, self.scale = tied, scale
        self.transform = read_transform(transform, width)
        inner = width if self.transform is None else self.transform.dense.out_features
        self.project = Dense(inner, project, False, "project") if project else None
        inner = project or inner
        self.out = None if tied else Dense(inner, vocab or 0, bias, "out")
        self.wants_bias = bias and tied
        self.bias: nn.Parameter | None = None
        self._table: list[TableLike] = []

    def tie(self, table: TableLike) -> None:
        """Use ``table`` for the last product; called by the model with its stem's table."""
        self._table = [table]
        if self.wants_bias and self.bias is None:
            self.bias = nn.Parameter(torch.empty(table.rows))

    def check_width(self, width: int) -> None:
        """SpecError where states of ``width`` do not meet the rows of the table."""
        brought = width if self.transform is None else self.transform.dense.out_features
        brought = brought if self.project is None else self.project.out_features
        if self.table is not None and self.table.width != brought:
            raise SpecError(
                f"the table has width {self.table.width} and the states before the last product {brought}; "
                f"add project={self.table.width}"
            )

    def reset(self, generator: torch.Generator) -> None:
        if self.bias is not None:
            self.bias.zero_()

    @property
    def table(self) -> TableLike | None:
        return self._table[0] if self._table else None

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = self._before(x, ctx)
        if self.out is not None:
            return self.out(x, ctx)
        table = self.table
        if table is None:
            raise SpecError("a tied language-model head needs a stem with a token table")
        logits = table.logits(x)
        return logits if self.bias is None else logits + self.bias

    def _before(self, x: Tensor, ctx: Context) -> Tensor:
        """What the last product reads."""
        if self.transform is not None:
            x = self.transform(x, ctx)
        if self.project is not None:
            x = self.project(x, ctx)
        return x if self.scale == 1.0 else x * self.scale

    def product(self, x: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor | None] | None:
        last: Any = self.table if self.out is None else self.out
        if type(last) not in (Dense, Table) or hooked(last) or hooked(self):
            return None
        bias = self.bias if self.out is None else self.out.bias
        x = self._before(x, ctx)
        return x, last.weight.to(x.dtype), None if bias is None else bias.to(x.dtype)

    def cost(self, shape: Shape) -> Cost:
        total = cost_sum([child.cost(shape) for _, child in costed(self)]) + own_parameters(self)
        if self.table is not None:
            total = total + Cost(0, self.table.rows * self.table.width * shape.tokens)
        return total


@register("head", "sequence-classifier", summary="one label a row")
class SequenceClassifier(Head):
    """(B, classes) logits of the pooled row. ``transform`` as in BERT's pooler; ``dropout`` before the last linear."""

    kind = "sequence"
    examples = ({"classes": 3}, {"classes": 4, "pool": "mean", "transform": {"activation": "tanh"}})

    def __init__(
        self,
        width: int,
        *,
        classes: int,
        pool: Pool = "first",
        transform: dict[str, Any] | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__()
        if classes < 1 or (labels is not None and len(labels) != classes):
            raise SpecError(f"classes={classes} must be at least 1 and equal the number of labels")
        self.how, self.rate, self.labels = check_pool(pool), dropout, labels
        self.transform = read_transform(transform, width)
        inner = width if self.transform is None else self.transform.dense.out_features
        self.out = Dense(inner, classes, bias, "out")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        y = pool(x, ctx, self.how)
        flat = ctx.replace(lengths=None, offsets=None, borders=None)
        y = y if self.transform is None else self.transform(y, flat)
        return self.out(dropout(y, self.rate, ctx.at("head"), self.training, "dropout"), flat)


@register("head", "regression", summary="real numbers for a row")
class Regression(SequenceClassifier):
    """(B, outputs) real values from the pooled row."""

    kind = "values"
    examples = ({"outputs": 2}, {"outputs": 1, "pool": "mean"})

    def __init__(
        self,
        width: int,
        *,
        outputs: int = 1,
        pool: Pool = "first",
        transform: dict[str, Any] | None = None,
        dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__(width, classes=outputs, pool=pool, transform=transform, dropout=dropout, bias=bias)


@register("head", "token-classifier", summary="one label a token")
class TokenClassifier(Head):
    """(B, L, classes) logits. ``transform`` as in ELECTRA's discriminator, whose single class is "was replaced"."""

    kind = "tokens"
    examples = ({"classes": 5}, {"classes": 1, "transform": {"activation": "gelu"}})

    def __init__(
        self,
        width: int,
        *,
        classes: int,
        transform: dict[str, Any] | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        labels: list[str] | None = None,
    ) -> None:
        super().__init__()
        if classes < 1 or (labels is not None and len(labels) != classes):
            raise SpecError(f"classes={classes} must be at least 1 and equal the number of labels")
        self.rate, self.labels = dropout, labels
        self.transform = read_transform(transform, width)
        inner = width if self.transform is None else self.transform.dense.out_features
        self.out = Dense(inner, classes, bias, "out")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        x = x if self.transform is None else self.transform(x, ctx)
        return self.out(dropout(x, self.rate, ctx.at("head"), self.training, "dropout"), ctx)

    def cost(self, shape: Shape) -> Cost:
        return cost_sum([child.cost(shape) for _, child in costed(self)])


@register("head", "pair", summary="one label for two neighbouring rows")
class Pair(Head):
    """Rows 2i and 2i+1 are the two sides: (B/2, classes) logits of [u, v, |u - v|] (Reimers and Gurevych, 2019)."""

    kind = "pair"
    examples = ({"classes": 3},)

    def __init__(self, width: int, *, classes: int, pool: Pool = "mean", labels: list[str] | None = None) -> None:
        super().__init__()
        self.how, self.labels = check_pool(pool), labels
        self.out = Dense(3 * width, classes, True, "out")

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        y = pool(x, ctx, self.how)
        if len(y) % 2:
            raise DataError(f"a pair head reads an even number of rows, not {len(y)}")
        u, v = y[0::2], y[1::2]
        return self.out(torch.cat((u, v, (u - v).abs()), -1), ctx.replace(lengths=None, offsets=None, borders=None))

    def cost(self, shape: Shape) -> Cost:
        return self.out.cost(Shape.full(len(shape.lengths) // 2, 1))


@register("head", "states", summary="the last states themselves")
class States(Head):
    """(B, L, W): what the body says, unread; for base models and towers that are only cross-attended.

    ``transform`` as in OPT, whose states leave in the width of its token table.
    """

    kind = "states"
    examples = ({}, {"transform": {"width": 16, "activation": "identity", "bias": False}})

    def __init__(self, width: int, *, transform: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.transform = read_transform(transform, width)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return x if self.transform is None else self.transform(x, ctx)

    def cost(self, shape: Shape) -> Cost:
        return cost_sum([child.cost(shape) for _, child in costed(self)])
