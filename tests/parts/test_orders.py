"""Scan orders are permutations with exact inverses, merging is the adjoint of scanning, and walks keep rows apart."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.parts.base import initialise
from formwright.parts.context import Context, Visible
from formwright.parts.make import make_part
from formwright.parts.orders import CONTINUOUS, CROSS, SLICES, inverse, merge, order, scan, walk

GRIDS = ((4, 4), (3, 5), (1, 6), (6, 1), (1, 1), (7,), (2, 3, 4), (4, 4, 4), (0, 3))
NAMES = ("row", "column", "snake", "column-snake", "diagonal", "z", "hilbert", "windows-2", "windows-7")


def strides(name: str, grid: tuple[int, ...]) -> Tensor:
    """How many cells away each step goes."""
    places = torch.stack(torch.unravel_index(order(name, grid), grid), 1)
    return places.diff(dim=0).abs().sum(1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_order_is_a_permutation_with_its_inverse(grid: tuple[int, ...]) -> None:
    x = torch.randn(2, math.prod(grid), 3)
    for name in NAMES:
        there = order(name, grid)
        assert sorted(there.tolist()) == list(range(x.shape[1])), name
        assert torch.equal(order(f"{name}-reversed", grid), there.flip(0)), name
        for either in (name, f"{name}-reversed"):
            assert torch.equal(x[:, order(either, grid)][:, inverse(either, grid)], x), either


def test_orders_are_as_named() -> None:
    assert order("row", (2, 3)).tolist() == [0, 1, 2, 3, 4, 5]
    assert order("column", (2, 3)).tolist() == [0, 3, 1, 4, 2, 5]
    assert order("snake", (3, 3)).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8]
    assert order("diagonal", (3, 3)).tolist() == [0, 1, 3, 2, 4, 6, 5, 7, 8]
    assert order("z", (2, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert order("windows-2", (2, 4)).tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    volume = torch.arange(2 * 3 * 4).reshape(2, 3, 4)
    assert torch.equal(order("axes-120", (2, 3, 4)), volume.permute(1, 2, 0).flatten())
    # What the slices of a volume scan: position = offset * slices + slice.
    assert order(SLICES[2], (2, 1, 3)).tolist() == [0, 3, 1, 4, 2, 5]


def test_continuous_orders_go_to_neighbours() -> None:
    for grid in ((3, 5), (4, 4), (2, 3, 5), (1, 4)):
        assert all(bool((strides(name, grid) == 1).all()) for name in CONTINUOUS)
    for grid in ((8, 8), (4, 4, 4), (2, 2)):
        assert bool((strides("hilbert", grid) == 1).all())


@pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 7)], ids=str)
def test_cross_merge_is_the_adjoint_of_cross_scan(grid: tuple[int, int]) -> None:
    x = torch.randn(2, math.prod(grid), 3, dtype=torch.float64)
    y = torch.randn(2, 4, math.prod(grid), 3, dtype=torch.float64)
    torch.testing.assert_close((scan(x, CROSS, grid) * y).sum(), (x * merge(y, CROSS, grid)).sum())
    assert torch.equal(merge(scan(x, CROSS, grid), CROSS, grid), 4 * x)


def test_transposing_a_picture_swaps_rows_and_columns() -> None:
    picture = torch.arange(15).reshape(3, 5)
    rows, columns = scan(picture.reshape(1, -1), ("row", "column"), (3, 5))[0]
    turned = scan(picture.T.reshape(1, -1), ("column", "row"), (5, 3))[0]
    assert torch.equal(torch.stack((rows, columns)), turned)


def test_walks_over_grids_in_every_layout() -> None:
    """Special tokens first, or last where the order is reversed; spare padding and empty rows stay."""
    ctx = Context(grid=(2, 3), prefix=1)
    one = [0, 1, 4, 2, 5, 3, 6]
    x = torch.arange(14.0).reshape(2, 7, 1)
    there = walk("column", x, ctx)
    assert there.there(x)[0, :, 0].tolist() == one
    backwards = walk("column-reversed", x, ctx).there(x)
    assert torch.equal(backwards, there.there(x).flip(1))
    padded = torch.arange(18.0).reshape(2, 9, 1)
    lengths = torch.tensor([7, 0])
    path = walk("column", padded, ctx.replace(lengths=lengths))
    assert path.there(padded)[0, :, 0].tolist() == [*one, 7, 8]
    offsets = torch.tensor([0, 7, 7, 14])
    flat = x.reshape(1, 14, 1)
    documents = walk("column", flat, ctx.replace(offsets=offsets))
    assert documents.there(flat)[0, :, 0].tolist() == [*one, *(7 + place for place in one)]
    for path, whole in ((there, x), (documents, flat)):
        assert torch.equal(path.back(path.there(whole)), whole)
    with pytest.raises(SpecError, match=r"whole grids of \(2, 3\) behind 1 tokens, 7 in all, and a row has 5"):
        walk("row", padded, ctx.replace(lengths=torch.tensor([7, 5])))


def scanner(orders: list[str], **options) -> torch.nn.Module:
    mixer = {"part": "attention", "heads": 2, "causal": True}
    with torch.device("meta"):
        part = make_part({"part": "scan", "mixer": mixer, "orders": orders, **options}, 8)
    part.to_empty(device="cpu").double()
    initialise(part, 0)
    return part.eval()


@pytest.mark.parametrize(
    ("orders", "reached"),
    [(list(CROSS), 15), (["snake", "snake-reversed"], 15), (["row"], 8), (["column"], 8), (["row-reversed"], 8)],
    ids=str,
)
def test_reach_of_the_centre(orders: list[str], reached: int) -> None:
    """Both ways through a picture reach all of it; one way reaches only what it has passed."""
    x = torch.randn(1, 15, 8, dtype=torch.float64, requires_grad=True)
    scanner(orders)(x, Context(grid=(3, 5)))[0, 7].sum().backward()
    assert x.grad is not None
    assert int((x.grad[0].abs().sum(1) > 0).sum()) == reached


def test_a_shared_cross_scan_turns_with_the_picture() -> None:
    part, picture = scanner(list(CROSS), share=True), torch.randn(1, 3, 5, 8, dtype=torch.float64)
    upright = part(picture.reshape(1, 15, 8), Context(grid=(3, 5))).reshape(1, 3, 5, 8)
    turned = part(picture.transpose(1, 2).reshape(1, 15, 8), Context(grid=(5, 3))).reshape(1, 5, 3, 8)
    torch.testing.assert_close(turned.transpose(1, 2), upright)
    around = part(picture.flip(1, 2).reshape(1, 15, 8), Context(grid=(3, 5))).reshape(1, 3, 5, 8)
    torch.testing.assert_close(around.flip(1, 2), upright)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(SpecError, match=r"unknown scan order 'snak'; did you mean 'snake'"):
        order("snak", (2, 2))
    with pytest.raises(SpecError, match="is for 3 axes"):
        order("axes-012", (2, 2))
    with pytest.raises(SpecError, match="at least one axis"):
        order("row", ())
    with pytest.raises(SpecError, match="must be causal"):
        make_part({"part": "scan", "mixer": {"part": "attention", "heads": 2}}, 8)
    with pytest.raises(SpecError, match="takes no reverse"):
        mixer = {"part": "attention", "heads": 2, "causal": True}
        make_part({"part": "bidirectional", "mixer": mixer, "reverse": mixer, "share": True}, 8)
    with pytest.raises(SpecError, match="takes no rule of visibility"):
        scanner(["row"])(torch.zeros(1, 2, 8, dtype=torch.float64), Context(visible=Visible(window=3)))
