"""The cases of the conformance suite, read from the registry, and the inputs that every check uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from conformance.exemptions import EXEMPT
from formwright import registry
from formwright.parts.base import initialise
from formwright.parts.context import Context, Memory
from formwright.parts.make import make, make_part

WIDTH = 32
#: Unequal rows: an empty one, one of a single token, and the longest not at the end.
LENGTHS = (7, 0, 1, 12, 5)
LAYER_KINDS = ("mixer", "channel", "combinator")


@dataclass(frozen=True)
class Case:
    """One registered class with one of its examples."""

    kind: str
    name: str
    index: int
    options: dict[str, Any] = field(hash=False, compare=False)

    @property
    def id(self) -> str:
        return f"{self.kind}:{self.name}-{self.index}"

    def node(self) -> dict[str, Any]:
        name = f"{self.kind}:{self.name}" if self.kind in LAYER_KINDS else self.name
        return {"part": name, **self.options}

    def construct(self) -> Any:
        if self.kind in LAYER_KINDS:
            return make_part(self.node(), WIDTH)
        if self.kind == "linear":
            return registry.resolve("linear", self.name)(WIDTH, 24, **self.options)
        return make(self.kind, self.node(), WIDTH)

    def build(self, dtype: torch.dtype = torch.float64, seed: int = 0, shake: bool = True) -> Any:
        """Laid out on meta, filled by ``reset``, then shaken, so that gates and biases that start at zero are not."""
        with torch.device("meta"):
            made = self.construct()
        made.to_empty(device="cpu")
        initialise(made, seed)
        made.to(dtype).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in made.parameters() if shake else ():
                if parameter.is_floating_point():
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return made


def cases(*kinds: str) -> list[Case]:
    found = []
    for kind in kinds:
        for name in registry.names(kind):
            for index, options in enumerate(getattr(registry.resolve(kind, name), "examples", ({},))):
                found.append(Case(kind, name, index, options))
    return found


def each(
    check: str, *kinds: str, only: Callable[[Any], bool] = lambda made: True
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a check for every case of ``kinds`` that is not exempt and whose module satisfies ``only``."""
    chosen = []
    for case in cases(*kinds):
        if (f"{case.kind}:{case.name}", check) in EXEMPT:
            continue
        with torch.device("meta"):
            if only(case.construct()):
                chosen.append(case)
    CHECKS.setdefault(check, set()).update(kinds)

    def marked(run: Callable[..., None]) -> Callable[..., None]:
        run.only = only  # type: ignore[attr-defined]
        return pytest.mark.parametrize("case", chosen, ids=lambda case: case.id)(run)

    return marked


#: check -> the kinds it is for, so that an exemption cannot name a check that does not exist
CHECKS: dict[str, set[str]] = {}


def keyed(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Normal values that are the same in every dtype, up to rounding."""
    return torch.randn(shape, generator=keyed(seed), dtype=torch.float64).to(dtype)


def rows(lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float64, seed: int = 1) -> list[Tensor]:
    flat = draw(sum(lengths), WIDTH, dtype=dtype, seed=seed)
    return list(flat.split(list(lengths)))


def padded(parts: list[Tensor], garbage: float = 0.0, spare: int = 0) -> tuple[Tensor, Tensor]:
    """(B, Lmax + spare, W) with ``garbage`` in the padding, and lengths."""
    lengths = torch.tensor([len(part) for part in parts])
    longest = int(lengths.max()) + spare if len(parts) else spare
    out = torch.full((len(parts), longest, WIDTH), garbage, dtype=parts[0].dtype if parts else torch.float64)
    for index, part in enumerate(parts):
        out[index, : len(part)] = part
    return out, lengths


def packed(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """(1, T, W) and offsets."""
    return torch.cat(parts)[None], torch.tensor([0, *(len(part) for part in parts)]).cumsum(0)


@st.composite
def cuts(draw_from: st.DrawFn, rows: int, longest: int) -> tuple[list[int], list[list[int]]]:
    """Lengths of rows, and the new tokens of every row in each of some calls: 0 included, all fed at the end."""
    lengths = draw_from(st.lists(st.integers(0, longest), min_size=rows, max_size=rows))
    calls, left = [], list(lengths)
    for wanted in draw_from(st.lists(st.lists(st.integers(0, 6), min_size=rows, max_size=rows), max_size=4)):
        calls.append([min(size, rest) for size, rest in zip(wanted, left)])
        left = [rest - size for rest, size in zip(left, calls[-1])]
    return lengths, [*calls, left]


def furnished(module: nn.Module, x: Tensor, seed: int = 2, **fields: Any) -> Context:
    """A context for the padded ``x`` that holds whatever the module says it reads."""
    ctx = Context(seed=7, **fields)
    furnish = getattr(module, "furnish", None)
    return ctx if furnish is None else furnish(ctx, x, keyed(seed))


def row_of(ctx: Context, index: int, rows: int) -> Context:
    """The context of one row of ``rows``: memories and conditions that have a row each are cut to it."""

    def cut(value: Tensor | None) -> Tensor | None:
        per_row = value is not None and value.dim() > 0 and value.shape[0] == rows
        return value[index : index + 1] if per_row else value  # type: ignore[index]

    memory = {name: Memory(cut(m.x), cut(m.lengths)) for name, m in ctx.memory.items()}  # type: ignore[arg-type]
    condition: Mapping[str, Any] = {name: cut(value) for name, value in ctx.condition.items()}
    return ctx.replace(memory=memory, condition=condition)
