"""Local, sparse, Longformer and BigBird: each is full attention under its mask, and says what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from formwright.engine.state import State
from formwright.kit.errors import SpecError
from formwright.ops.attention import attention_reference
from formwright.parts.base import Shape, initialise
from formwright.parts.context import Context, Notes, Visible
from formwright.parts.make import make_part

LENGTH = 23


def built(name: str, **options: Any) -> Any:
    part = make_part({"part": name, "heads": 4, **options}, 32).double().eval()
    initialise(part, 0)
    return part


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(part: Any, x: Tensor, seen: Tensor) -> Tensor:
    """Full attention with the part's own projections under a written-out mask (L, L)."""
    q, k, v = (slot(x).unflatten(-1, (-1, part.head_width)) for slot in (part.q, part.k, part.v))
    return part.o(attention_reference(q, k, v, seen=seen[None])[0].flatten(2))


def places(length: int = LENGTH) -> tuple[Tensor, Tensor]:
    steps = torch.arange(length)
    return steps[:, None], steps[None]


def masks() -> list[tuple[str, dict[str, Any], Tensor]]:
    i, j = places()
    back, same = i // 5 - j // 5, i // 5 == j // 5
    every, near = (i - j) % 5 == 0, (i - j).abs() <= 2
    stepped = ((i - j).abs() <= 6) & ((i - j) % 3 == 0)
    first = (j < 4) | (i < 4)
    everyone = (i >= 0) & (j >= 0)
    return [
        ("local", {"block": 5}, same),
        ("local", {"block": 5, "causal": True}, same & (j <= i)),
        ("local", {"block": 5, "lookback": 2}, (back >= 0) & (back <= 2)),
        ("local", {"block": 5, "lookback": 1, "causal": True, "kv_heads": 2}, (back >= 0) & (back <= 1) & (j <= i)),
        ("local", {"block": 1}, i == j),
        ("local", {"block": 99, "causal": True}, j <= i),
        ("local", {"block": LENGTH}, everyone),
        ("sparse", {"stride": 5}, ((i - j < 5) | every) & (j <= i)),
        ("sparse", {"stride": 5, "kv_heads": 1}, ((i - j <= 5) | every) & (j <= i)),
        ("sparse", {"stride": 1}, j <= i),
        ("sparse", {"stride": 99}, j <= i),
        ("sparse", {"stride": 5, "pattern": "fixed", "summary": 2}, (same | (j % 5 >= 3)) & (j <= i)),
        ("sparse", {"stride": 5, "pattern": "fixed", "summary": 5}, j <= i),
        ("longformer", {"window": 4}, near),
        ("longformer", {"window": 5, "first": 4}, near | first),
        ("longformer", {"window": 4, "dilation": 3}, stepped),
        ("longformer", {"window": 4, "dilation": 3, "first": 4, "kv_heads": 2}, stepped | first),
        ("longformer", {"window": 2 * LENGTH}, everyone),
        ("longformer", {"window": 4, "first": 99}, everyone),
        ("longformer", {"window": 3, "causal": True}, (i - j < 3) & (j <= i)),
        (
            "longformer",
            {"window": 3, "dilation": 3, "first": 4, "causal": True},
            (((i - j <= 6) & ((i - j) % 3 == 0)) | (j < 4)) & (j <= i),
        ),
        ("longformer", {"window": 1, "dilation": 99, "causal": True}, i == j),
        ("bigbird", {"block": 5, "random": 0}, everyone),
    ]


@pytest.mark.parametrize(
    ("name", "options", "seen"), masks(), ids=lambda value: str(value) if value is not None else ""
)
def test_is_full_attention_under_its_mask(name: str, options: dict[str, Any], seen: Tensor) -> None:
    part, x = built(name, **options), drawn(2, LENGTH, 32)
    notes = Notes(want={("here", "probs")})
    y = part(x, Context(notes=notes, path="here"))
    torch.testing.assert_close(y, expected(part, x, seen), rtol=1e-10, atol=1e-10)
    probs = notes.got["here", "probs"]
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, LENGTH, dtype=torch.float64))
    assert torch.equal((probs > 0).all(0).all(0), seen)


@pytest.mark.parametrize(
    "options",
    [{"block": 5, "causal": True}, {"block": 4, "lookback": 1, "causal": True}],
    ids=["own", "lookback"],
)
def test_a_stream_of_blocks_holds_no_more_than_its_blocks(options: dict[str, Any]) -> None:
    part, x = built("local", **options), drawn(1, 40, 32)
    wanted, state, pieces = part(x, Context()), State(1), []
    for step in range(40):
        pieces.append(part(x[:, step : step + 1], Context(state=state, path="here")))
        state.advance(None, 1)
        most = (1 + options.get("lookback", 0)) * options["block"]
        assert state.bytes() == 2 * 32 * 8 * min(step + 1, most) == part.cost(Shape.full(1, 1, step)).state_bytes
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=1e-10, atol=1e-10)


def test_nothing_crosses_a_border_of_blocks() -> None:
    part, x = built("local", block=5, causal=True), drawn(1, LENGTH, 32)
    changed = x.clone()
    changed[:, 7] += 1.0
    moved = (part(x, Context()) - part(changed, Context())).abs().sum(-1)[0] > 0
    assert moved.nonzero().flatten().tolist() == [7, 8, 9]


def bigbird_mask(part: Any, length: int, path: str) -> Tensor:
    notes = Notes(want={(path, "probs")})
    part(drawn(1, length, 32), Context(notes=notes, path=path))
    return notes.got[path, "probs"][0] > 0


def test_bigbird_sees_near_global_and_drawn_blocks() -> None:
    part, length, block = built("bigbird", block=4, random=2, seed=3), 45, 4
    seen = bigbird_mask(part, length, "b0.bigbird")
    count = -(-length // block)
    blocks = seen[:, ::block, ::block]
    assert torch.equal(seen, blocks.repeat_interleave(block, 1).repeat_interleave(block, 2)[:, :length, :length])
    assert blocks[:, [0, -1]].all() and blocks[:, :, [0, -1]].all()
    for u in range(1, count - 1):
        known = {0, count - 1, u - 1, u, u + 1}
        for head in range(4):
            found = set(blocks[head, u].nonzero().flatten().tolist())
            assert known <= found and len(found - known) == 2
    assert not torch.equal(seen[0], seen[1]), "heads draw alike"
    assert torch.equal(seen, bigbird_mask(part, length, "b0.bigbird"))
    assert not torch.equal(seen, bigbird_mask(part, length, "b1.bigbird"))
    assert not torch.equal(seen, bigbird_mask(built("bigbird", block=4, random=2), length, "b0.bigbird"))


def test_bigbird_is_full_attention_under_its_mask() -> None:
    part, x = built("bigbird", block=4, random=2, kv_heads=2), drawn(2, 45, 32)
    seen = bigbird_mask(part, 45, "here")
    q, k, v = (slot(x).unflatten(-1, (-1, 8)) for slot in (part.q, part.k, part.v))
    k, v = (t.repeat_interleave(2, 2) for t in (k, v))
    alone = [
        attention_reference(q[:, :, h : h + 1], k[:, :, h : h + 1], v[:, :, h : h + 1], seen=seen[None, h])[0]
        for h in range(4)
    ]
    wanted = part.o(torch.cat(alone, 2).flatten(2))
    torch.testing.assert_close(part(x, Context(path="here")), wanted, rtol=1e-10, atol=1e-10)


def test_global_rows_have_their_own_projections() -> None:
    part, x = built("longformer", window=4, first=3, separate=True), drawn(2, LENGTH, 32)
    i, j = places()
    y = part(x, Context())
    rest = expected(part, x, ((i - j).abs() <= 2) | (j < 3) | (i < 3))
    torch.testing.assert_close(y[:, 3:], rest[:, 3:], rtol=1e-10, atol=1e-10)
    part.q, part.k, part.v = part.q_global, part.k_global, part.v_global
    torch.testing.assert_close(y[:, :3], expected(part, x, (i >= 0) & (j >= 0))[:, :3], rtol=1e-10, atol=1e-10)


def test_products_are_those_of_the_pattern() -> None:
    """Beyond the projections, a query takes its blocks' keys and no more."""

    def mixing(part: Any, length: int) -> int:
        return part.cost(Shape.full(1, length)).macs - 4 * 32 * 32 * length

    assert mixing(built("local", block=64), 1024) == 2 * 32 * 1024 * 64
    assert mixing(built("local", block=64, causal=True), 1024) <= 2 * 32 * 1024 * 64
    assert mixing(built("longformer", window=128, causal=True), 4096) <= 2 * 32 * 4096 * 256
    assert mixing(built("bigbird", block=64, random=3), 4096) <= 1.05 * 2 * 32 * (4096 * 8 * 64 + 2 * 64 * 4096)
    assert mixing(built("sparse", stride=64), 4096) <= 2 * 32 * 4096 * 4 * 64


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("local", {"block": 0}, r"local: block=0 must be at least 1"),
        ("local", {"block": 4, "lookback": -1}, r"lookback=-1 must be at least 0"),
        ("local", {}, r"option 'block' is missing"),
        ("sparse", {"stride": 0}, r"sparse: stride=0 must be at least 1"),
        ("sparse", {"stride": 4, "pattern": "fixd"}, r"fixd"),
        ("sparse", {"stride": 4, "pattern": "fixed", "summary": 5}, r"summary=5 must not be above stride=4"),
        ("longformer", {"window": 4, "dilation": 0}, r"longformer: dilation=0 must be at least 1"),
        ("longformer", {"window": 0}, r"window=0"),
        ("longformer", {"window": 4, "first": -1}, r"first=-1"),
        ("longformer", {"window": 4, "separate": True}, r"separate projections are for the global tokens"),
        ("longformer", {"window": 4, "first": 1, "separate": True, "causal": True}, r"not causal"),
        ("bigbird", {"block": 0}, r"block=0"),
        ("bigbird", {"block": 4, "causal": True}, r"unknown option 'causal'"),
        ("local", {"block": 4, "kv_heads": 3}, r"kv_heads=3 must divide heads=4"),
        ("local", {"block": 4, "heads": 5}, r"heads=5 does not divide width 32"),
        ("local", {"block": 4, "rotary": {"width": 3}}, r"rotary turns pairs"),
    ],
)
def test_what_is_wrong_is_said(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        built(name, **options)


def test_calls_that_cannot_be() -> None:
    part, x = built("local", block=4, causal=True), drawn(1, 6, 32)
    with pytest.raises(SpecError, match=r"here: local cannot keep the rule 'window'; use attention"):
        part(x, Context(visible=Visible(window=2), path="here"))
    with pytest.raises(SpecError, match=r"bigbird reads later tokens"):
        built("bigbird", block=4)(x, Context(visible=Visible(causal=True)))
    part(x, Context(visible=Visible(causal=True)))
    with pytest.raises(SpecError, match=r"local streams in the padded layout"):
        part(x, Context(offsets=torch.tensor([0, 6]), borders=(0, 6), state=State(1)))
