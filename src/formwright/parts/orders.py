"""Scan orders: in which order a mixer of sequences reads the cells of a picture or a volume.

An order is a permutation of the cells of a grid, which lie row-major: ``x[:, order(name, grid)]`` is what the mixer
reads, and ``y[:, inverse(name, grid)]`` puts its output back; :func:`walk` does so for whatever layout a call has. The
orders are those of Vim (Zhu et al., 2024, 2401.09417), VMamba's cross-scan (Liu et al., 2024, 2401.10166), PlainMamba's
continuous ones (Yang et al., 2024, 2403.17695), LocalMamba's windows (Huang et al., 2024, 2403.09338) and SegMamba's
slices (Xing et al., 2024, 2401.13560), with the space-filling curves of Morton (1966) and Hilbert (Skilling, 2004).
Cost: one sort a grid, kept.

Names, for a grid of any number of axes:

    row             the last axis runs fastest                  column          the first axis runs fastest
    snake           row, turning back at every border           column-snake    column, turning back at every border
    diagonal        cells of equal sum of coordinates together  axes-DIGITS     axes from slowest to fastest: axes-120
    z               Morton's curve: bits of coordinates mixed   windows-SIDE    row inside windows, then over them
    hilbert         Hilbert's curve, cut to the grid            NAME-reversed   any of these, last cell first
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from formwright.kit.errors import SpecError, unknown
from formwright.parts.context import Context

#: VMamba's four: every cell is reached from all sides.
CROSS = ("row", "column", "row-reversed", "column-reversed")
#: The continuous four of PlainMamba: every step goes to a neighbouring cell.
CONTINUOUS = ("snake", "column-snake", "snake-reversed", "column-snake-reversed")
#: SegMamba's three for a volume whose first axis counts the slices.
SLICES = ("row", "row-reversed", "axes-120")

_REVERSED = "-reversed"
Grid = tuple[int, ...]


def order(name: str, grid: Sequence[int]) -> Tensor:
    """(cells,) int64: the cell that is read at each step."""
    return torch.from_numpy(_order(name, tuple(grid))).clone()


def inverse(name: str, grid: Sequence[int]) -> Tensor:
    """(cells,) int64: the step at which each cell is read."""
    return torch.from_numpy(_inverse(name, tuple(grid))).clone()


def scan(x: Tensor, names: Sequence[str], grid: Sequence[int]) -> Tensor:
    """x (B, cells, ...) read in several orders: (B, orders, cells, ...). With :data:`CROSS` this is the cross-scan."""
    return torch.stack([x[:, order(name, grid).to(x.device)] for name in names], 1)


def merge(y: Tensor, names: Sequence[str], grid: Sequence[int]) -> Tensor:
    """The adjoint of :func:`scan`: y (B, orders, cells, ...) put back in place and summed: (B, cells, ...)."""
    back = [y[:, index, inverse(name, grid).to(y.device)] for index, name in enumerate(names)]
    return torch.stack(back).sum(0)


@dataclass(frozen=True)
class Walk:
    """The tokens of a call in another order, row by row: places (L,) or (B, L), or None where the order is theirs."""

    away: Tensor | None = None
    home: Tensor | None = None

    def there(self, x: Tensor) -> Tensor:
        """x (B, L, ...) as the walk meets it."""
        return _placed(x, self.away)

    def back(self, y: Tensor) -> Tensor:
        """The inverse of :meth:`there`."""
        return _placed(y, self.home)


def walk(name: str, x: Tensor, ctx: Context) -> Walk:
    """The walk over the tokens of x (B, L, ...), padded or packed.

    Within ``ctx.grid`` every row or document is one grid behind its ``ctx.prefix`` special tokens, which come first,
    or last in a reversed order. Without a grid each row is a line: only a reversed order moves anything, each row
    within its own length.
    """
    if ctx.grid is not None:
        return _over_grid(name, x, ctx)
    check_order(name)
    if not name.endswith(_REVERSED):
        return Walk()
    turned = _turned(x, ctx)
    return Walk(turned, turned)


def _placed(x: Tensor, places: Tensor | None) -> Tensor:
    if places is None:
        return x
    if places.dim() == 1:
        return x.index_select(1, places)
    return x.gather(1, places.reshape(*places.shape, *[1] * (x.dim() - 2)).expand_as(x))


def _turned(x: Tensor, ctx: Context) -> Tensor:
    """Places of the tokens of a line from the last to the first; padding stays where it is."""
    steps = torch.arange(x.shape[1], device=x.device)
    if ctx.offsets is not None:
        ends = torch.repeat_interleave(ctx.offsets[:-1] + ctx.offsets[1:], ctx.offsets.diff(), output_size=x.shape[1])
        return ends - 1 - steps
    if ctx.lengths is None:
        return steps.flip(0)
    last = ctx.lengths[:, None] - 1 - steps
    return torch.where(last >= 0, last, steps)


def _over_grid(name: str, x: Tensor, ctx: Context) -> Walk:
    cells, prefix = order(name, ctx.grid or ()), torch.arange(ctx.prefix)
    ahead = (cells + ctx.prefix, prefix.flip(0)) if name.endswith(_REVERSED) else (prefix, cells + ctx.prefix)
    one = torch.cat(ahead)
    size = len(one)
    if ctx.offsets is not None:
        sizes = [stop - start for start, stop in ctx.spans()]
        away = torch.cat([one + start for start, stop in ctx.spans() if stop > start] or [one[:0]])
    else:
        sizes = [x.shape[1]] if ctx.lengths is None else ctx.lengths.tolist()
        away = torch.cat((one, torch.arange(size, max(size, x.shape[1]))))
    wrong = next((found for found in sizes if found not in (0, size)), None)
    if wrong is not None:
        raise SpecError(
            f"{ctx.path}: scan order {name} reads whole grids of {ctx.grid} behind {ctx.prefix} tokens, "
            f"{size} in all, and a row has {wrong}"
        )
    away = away[: x.shape[1]] if x.shape[1] >= size else torch.arange(x.shape[1])
    return Walk(away.to(x.device), away.argsort().to(x.device))


def check_order(name: str) -> None:
    """SpecError with the nearest name where ``name`` is no order of any grid."""
    plain = name.removesuffix(_REVERSED)
    family, _, detail = plain.partition("-")
    parametric = (family == "axes" and sorted(detail) == [str(n) for n in range(len(detail))] and detail) or (
        family == "windows" and detail.isdecimal() and int(detail) > 0
    )
    if plain not in _PLAIN and not parametric:
        raise SpecError(
            unknown("scan order", name, [*_PLAIN, "axes-021", "windows-2"]) + f"; each may end in {_REVERSED}"
        )


@lru_cache(maxsize=256)
def _order(name: str, grid: Grid) -> np.ndarray:
    check_order(name)
    if not grid or any(side < 0 for side in grid):
        raise SpecError(f"scan order {name}: a grid has at least one axis and no negative side, not {grid}")
    plain = name.removesuffix(_REVERSED)
    places = np.indices(grid).reshape(len(grid), -1)
    found = np.lexsort(_keys(plain, places, grid)[::-1])
    return (found[::-1] if name.endswith(_REVERSED) else found).copy()


@lru_cache(maxsize=256)
def _inverse(name: str, grid: Grid) -> np.ndarray:
    return np.argsort(_order(name, grid))


# What cells are sorted by: arrays (cells,) from the slowest to the fastest, given the coordinates (axes, cells).


def _keys(plain: str, places: np.ndarray, grid: Grid) -> list[np.ndarray]:
    if plain in _PLAIN:
        return _PLAIN[plain](places, grid)
    family, _, detail = plain.partition("-")
    if family == "windows":
        return [*(places // int(detail)), *(places % int(detail))]
    if len(detail) != len(grid):
        raise SpecError(f"scan order {plain} is for {len(detail)} axes, and this grid is {grid}")
    return [places[int(axis)] for axis in detail]


def _row(places: np.ndarray, grid: Grid) -> list[np.ndarray]:
    return list(places)


def _column(places: np.ndarray, grid: Grid) -> list[np.ndarray]:
    return list(places[::-1])


def _snake(places: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """Each axis runs backwards wherever the cells passed on the slower ones add up to an odd number of turns."""
    keys: list[np.ndarray] = []
    turns = np.zeros_like(places[0])
    for axis, side in zip(places, grid):
        keys.append(np.where(turns % 2 == 1, side - 1 - axis, axis))
        turns = turns * side + keys[-1]
    return keys


def _column_snake(places: np.ndarray, grid: Grid) -> list[np.ndarray]:
    return _snake(places[::-1], grid[::-1])


def _diagonal(places: np.ndarray, grid: Grid) -> list[np.ndarray]:
    return [places.sum(0), *places]


def _z(places: np.ndarray, grid: Grid) -> list[np.ndarray]:
    return _bits(places, grid)


def _hilbert(places: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """Skilling's transform: coordinates become the transposed index along the curve, bit by bit from the top."""
    if len(grid) == 1:
        return _row(places, grid)
    axes = places.copy()
    top = 1 << (_depth(grid) - 1)
    bit = top
    while bit > 1:
        low = bit - 1
        for axis in axes:
            swapped = (axes[0] ^ axis) & low
            turned = (axis & bit) != 0
            first = np.where(turned, axes[0] ^ low, axes[0] ^ swapped)
            axis[:] = np.where(turned, axis, axis ^ swapped)
            axes[0] = first
        bit >>= 1
    for index in range(1, len(axes)):
        axes[index] ^= axes[index - 1]
    flips = np.zeros_like(axes[0])
    bit = top
    while bit > 1:
        flips = np.where(axes[-1] & bit, flips ^ (bit - 1), flips)
        bit >>= 1
    return _bits(axes ^ flips, grid)


def _depth(grid: Grid) -> int:
    """Bits of the largest coordinate, at least 1."""
    return max(1, (max(grid) - 1).bit_length())


def _bits(axes: np.ndarray, grid: Grid) -> list[np.ndarray]:
    """Bits of all axes from the highest down, the first axis before the others."""
    return [(axis >> bit) & 1 for bit in reversed(range(_depth(grid))) for axis in axes]


_PLAIN: dict[str, Callable[[np.ndarray, Grid], list[np.ndarray]]] = {
    "row": _row,
    "column": _column,
    "snake": _snake,
    "column-snake": _column_snake,
    "diagonal": _diagonal,
    "z": _z,
    "hilbert": _hilbert,
}
