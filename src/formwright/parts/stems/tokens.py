"""The stem of text: a table of token embeddings, with positions, types, norm and projection where a model has them.

Cost: a look-up a token, and one product where the table is narrower than the stream.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, SpecError, unknown
from formwright.ops.embedding import embedding
from formwright.parts.base import Cost, Shape, cost_sum, costed, dropout, hooked
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense, Table
from formwright.parts.make import make, module_dict
from formwright.parts.norms.norms import LayerNorm
from formwright.parts.positions import sinusoids
from formwright.registry import register

POSITIONS = ("learned", "sinusoidal")


class Stem(nn.Module):
    """forward(inputs, ctx) -> x (B, L, W) and the context with positions set. ``field`` is the input it reads."""

    width: int
    examples: tuple[dict, ...] = ({},)

    def forward(self, inputs: dict[str, Tensor], ctx: Context) -> tuple[Tensor, Context]:
        raise NotImplementedError

    def sample(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Random valid inputs, for tests, costs and tracing."""
        raise NotImplementedError

    def field(self) -> str:
        """The input whose second axis is the length of the sequence."""
        raise NotImplementedError

    def cost(self, shape: Shape) -> Cost:
        return cost_sum([child.cost(shape) for _, child in costed(self)])

    def shape_after(self, shape: Shape) -> Shape:
        """The shape of the stream it makes, from the shape of its input."""
        return shape

    @property
    def limit(self) -> int | None:
        """The longest sequence it can place, or None."""
        return None


class Places(nn.Module):
    """Absolute positions added to a stem: a learned table (``offset`` rows are skipped) or sinusoids."""

    def __init__(self, width: int, kind: str, longest: int | None, offset: int = 0) -> None:
        super().__init__()
        if kind not in POSITIONS:
            raise SpecError(unknown("positions", kind, POSITIONS))
        if kind == "learned" and not longest:
            raise SpecError("learned positions need 'max', the longest length")
        self.kind, self.offset, self.width = kind, offset, width
        self.table = Table((longest or 0) + offset, width) if kind == "learned" else None

    @property
    def limit(self) -> int | None:
        return None if self.table is None else self.table.rows - self.offset

    def rows(self, places: Tensor, longest: int) -> Tensor:
        """The rows of the table for places below ``longest``; DataError where it is too short."""
        if self.limit is not None and longest > self.limit:
            raise DataError(
                f"a sequence of {longest} tokens exceeds the {self.limit} positions of this model; "
                f"cut it to {self.limit} (max_length={self.limit})"
            )
        return places + self.offset if self.offset else places

    def forward(self, places: Tensor, longest: int, dtype: torch.dtype) -> Tensor:
        if self.table is None:
            return sinusoids(places, self.width, dtype)
        return self.table(self.rows(places, longest))

    def cost(self, shape: Shape) -> Cost:
        return Cost() if self.table is None else self.table.cost(shape)


def read_positions(positions: dict[str, Any] | None, width: int) -> Places | None:
    """{"kind", "max", "offset"} -> the module, unknown keys refused."""
    if positions is None:
        return None
    for key in positions:
        if key not in ("kind", "max", "offset"):
            raise SpecError(unknown("positions option", key, ("kind", "max", "offset")))
    return Places(width, positions.get("kind", "learned"), positions.get("max"), positions.get("offset", 0))


def placed(positions: Places | None, x: Tensor, dtype: torch.dtype, ctx: Context) -> Tensor | None:
    """What ``positions`` adds to the tokens of ``x``; padding behind a stream's last token is given the first place."""
    return None if positions is None else positions(*spots(x, ctx), dtype)


def spots(x: Tensor, ctx: Context) -> tuple[Tensor, int]:
    """The places of the tokens of ``x``, and one past the largest."""
    places = ctx.place(x)
    if ctx.state is not None and ctx.lengths is not None:
        places = torch.where(ctx.valid(x), places, 0)
    return places, reach(places, ctx)


def reach(places: Tensor, ctx: Context) -> int:
    """One past the largest position of this call, without reading the device when the layout already tells."""
    if ctx.borders is not None:
        return max((b - a for a, b in zip(ctx.borders[:-1], ctx.borders[1:])), default=0)
    if ctx.state is None and ctx.positions is None and ctx.offsets is None:
        return places.shape[1]
    return int(places.max()) + 1 if places.numel() else 0


@register("stem", "token-embedding", summary="tokens, with positions, types and norm")
class TokenEmbedding(Stem):
    """Reads ``tokens`` (B, L) int64, and ``types`` (B, L) where ``types`` > 0 (zeros when absent).

    Args:
        vocab, width: size of the table and of the stream.
        embed_width: width of the table where it is narrower; slot ``project`` widens it.
        positions: {"kind": "learned", "max", "offset"} or {"kind": "sinusoidal"}; added to the embedding.
        types: number of token types. norm: after the sum (and before the projection). scale: factor on the tokens.
    """

    examples = (
        {"vocab": 50},
        {
            "vocab": 50,
            "positions": {"kind": "learned", "max": 64, "offset": 2},
            "types": 2,
            "norm": {"part": "layernorm"},
        },
        {"vocab": 50, "embed_width": 16, "positions": {"kind": "sinusoidal"}, "scale": 4.0},
    )

    def __init__(
        self,
        width: int,
        *,
        vocab: int,
        embed_width: int | None = None,
        positions: dict[str, Any] | None = None,
        types: int = 0,
        norm: dict[str, Any] | str | None = None,
        scale: float = 1.0,
        dropout: float = 0.0,
        project_bias: bool = True,
        positions_after_project: bool = False,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        inner = width if embed_width is None else embed_width
        self.width, self.scale, self.rate, self.late = width, scale, dropout, positions_after_project
        self.tokens = Table(vocab, inner, std)
        self.positions = read_positions(positions, width if positions_after_project else inner)
        self.types = Table(types, inner) if types else None
        self.norm = make("norm", norm, inner) if norm is not None else None
        self.project = Dense(inner, width, project_bias, "project") if inner != width else None

    def field(self) -> str:
        return "tokens"

    @property
    def limit(self) -> int | None:
        return None if self.positions is None else self.positions.limit

    def sample(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"tokens": torch.randint(0, self.tokens.rows, (batch, length), generator=generator)}

    def forward(self, inputs: dict[str, Tensor], ctx: Context) -> tuple[Tensor, Context]:
        if "tokens" not in inputs:
            raise DataError(f"this model reads 'tokens'; the batch holds {', '.join(sorted(inputs)) or 'nothing'}")
        ids, types = inputs["tokens"], inputs.get("types")
        x = self._at_once(ids, types, ctx)
        if x is None:
            x = self._one_by_one(ids, types, ctx)
        if self.project is not None:
            x = self.project(x, ctx)
        if self.late and (added := placed(self.positions, ids, x.dtype, ctx)) is not None:
            x = x + added
        return dropout(x, self.rate, ctx.at("stem"), self.training, "dropout"), ctx

    def _at_once(self, ids: Tensor, types: Tensor | None, ctx: Context) -> Tensor | None:
        """Tables and norm in one call for the packed layout, where all are plain."""
        norm, positions = self.norm, None if self.late else self.positions
        if ctx.offsets is None or type(norm) not in (LayerNorm, type(None)):
            return None
        if positions is not None and positions.table is None:
            return None
        terms: list[tuple[Any, Tensor | None, float]] = [(self.tokens, ids, self.scale)]
        if self.types is not None:
            terms.append((self.types, types, 1.0))
        if positions is not None:
            terms.append((positions.table, positions.rows(*spots(ids, ctx)), 1.0))
        sources = []
        for table, rows, factor in terms:
            source = None if hooked(table) else table.source(rows, factor)
            if source is None:
                return None
            sources.append(source)
        return embedding(sources) if norm is None else embedding(sources, norm.weight, norm.bias, norm.eps)

    def _one_by_one(self, ids: Tensor, types: Tensor | None, ctx: Context) -> Tensor:
        x = self.tokens(ids)
        if self.scale != 1.0:
            x = x * self.scale
        if self.types is not None:
            x = x + (self.types.dense_weight()[0] if types is None else self.types(types))
        if not self.late and (added := placed(self.positions, ids, x.dtype, ctx)) is not None:
            x = x + added
        return x if self.norm is None else self.norm(x)


@register("stem", "linear", summary="a linear of feature vectors")
class LinearValues(Stem):
    """Reads ``values`` (B, L, features) float; slot ``values`` (W, features), positions as in token-embedding."""

    examples = ({"features": 7}, {"features": 3, "positions": {"kind": "learned", "max": 64}})

    def __init__(
        self,
        width: int,
        *,
        features: int,
        bias: bool = True,
        positions: dict[str, Any] | None = None,
        norm: dict[str, Any] | str | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self.values = Dense(features, width, bias, "values")
        self.positions = read_positions(positions, width)
        self.norm = make("norm", norm, width) if norm is not None else None

    def field(self) -> str:
        return "values"

    @property
    def limit(self) -> int | None:
        return None if self.positions is None else self.positions.limit

    def sample(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"values": torch.randn(batch, length, self.values.in_features, generator=generator)}

    def forward(self, inputs: dict[str, Tensor], ctx: Context) -> tuple[Tensor, Context]:
        if "values" not in inputs:
            raise DataError(f"this model reads 'values'; the batch holds {', '.join(sorted(inputs)) or 'nothing'}")
        x = self.values(inputs["values"], ctx)
        added = placed(self.positions, x, x.dtype, ctx)
        x = x if added is None else x + added
        return (x if self.norm is None else self.norm(x)), ctx


@register("stem", "composed", summary="several inputs summed, concatenated or interleaved")
class Composed(Stem):
    """Named stems over the same rows.

    Args: ``stems``: name -> stem; input ``name.field`` (or ``field`` where only one stem reads it) goes to each.
        how: "sum" (equal lengths), "concat" (one after another along the length) or "interleave" (token by token).
    """

    examples = (
        {
            "stems": {"a": {"part": "token-embedding", "vocab": 20}, "b": {"part": "linear", "features": 3}},
            "how": "sum",
        },
        {
            "stems": {"a": {"part": "linear", "features": 2}, "b": {"part": "linear", "features": 3}},
            "how": "interleave",
        },
    )

    def __init__(
        self, width: int, *, stems: dict[str, dict], how: Literal["sum", "concat", "interleave"] = "sum"
    ) -> None:
        super().__init__()
        if not stems:
            raise SpecError("a composed stem needs at least one stem")
        self.width, self.how = width, how
        self.stems = module_dict("stem", {name: make("stem", node, width) for name, node in stems.items()})

    def field(self) -> str:
        name, stem = next(iter(self.stems.items()))
        return f"{name}.{stem.field()}"  # type: ignore[operator]

    def sample(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": value
            for name, stem in self.stems.items()
            for key, value in stem.sample(batch, length, generator).items()  # type: ignore[operator]
        }

    def forward(self, inputs: dict[str, Tensor], ctx: Context) -> tuple[Tensor, Context]:
        if ctx.offsets is not None and self.how != "sum":
            raise SpecError(f"a stem composed by {self.how} needs the padded layout")
        made = []
        if self.how == "interleave" and ctx.state is not None:
            # Of the tokens seen, each stem has made its share.
            steps = torch.arange(inputs[self.field()].shape[1], device=ctx.state.seen.device)
            ctx = ctx.replace(positions=ctx.state.seen[:, None] // len(self.stems) + steps)
        for name, stem in self.stems.items():
            own = {key.removeprefix(f"{name}."): value for key, value in inputs.items() if key.startswith(f"{name}.")}
            shared = {key: value for key, value in inputs.items() if "." not in key}
            made.append(stem({**shared, **own}, ctx.at(name))[0])
        if self.how == "sum":
            if len({t.shape[1] for t in made}) > 1:
                raise DataError(f"inputs to be summed differ in length: {[t.shape[1] for t in made]}")
            return sum(made[1:], made[0]), ctx
        if ctx.lengths is not None and self.how == "concat" and bool((ctx.lengths != made[0].shape[1]).any()):
            raise DataError("inputs to be concatenated must fill their rows; give them without lengths")
        if self.how == "concat":
            return torch.cat(made, 1), ctx.replace(lengths=None, positions=None)
        lengths = None if ctx.lengths is None else ctx.lengths * len(made)
        return torch.stack(made, 2).flatten(1, 2), ctx.replace(lengths=lengths, positions=None)

    def shape_after(self, shape: Shape) -> Shape:
        if self.how == "sum":
            return shape
        if self.how == "interleave":
            return Shape(tuple(length * len(self.stems) for length in shape.lengths), shape.past, shape.memory)
        made = [stem.shape_after(shape).lengths for stem in self.stems.values()]  # type: ignore[operator]
        return Shape(tuple(sum(row) for row in zip(*made)), shape.past, shape.memory)
