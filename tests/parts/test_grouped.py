"""Grouped keys and values are those of more heads, repeated; one table of Linformer's may serve all layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from conformance.samples import WIDTH, draw, keyed
from formwright import build
from formwright.engine.state import State
from formwright.kit.errors import SpecError
from formwright.parts.base import Part, initialise
from formwright.parts.context import Context
from formwright.parts.make import make_part

GROUPED: list[dict[str, Any]] = [
    {"part": "linear-attention"},
    {"part": "linear-attention", "causal": True},
    {"part": "performer", "features": 12},
    {"part": "performer", "causal": True, "kernel": "relu"},
    {"part": "linformer", "length": 20, "rank": 4},
    {"part": "linformer", "length": 20, "rank": 4, "share": "key-value"},
    {"part": "synthesizer", "length": 20, "kinds": ["random", "dot"], "causal": True},
]


def made(options: dict[str, Any]) -> Any:
    part = make_part({"heads": 4, **options}, WIDTH)
    initialise(part, 0)
    for slot in (part.q, part.k, part.v):
        torch.nn.init.normal_(slot.bias, generator=keyed())
    return part.double().eval()


def spread(part: Any, options: dict[str, Any]) -> Part:
    """The mixer whose every head has the keys and values of its group."""
    full = made(options)
    held = {name: value for name, value in part.state_dict().items() if not name.startswith(("k.", "v."))}
    full.load_state_dict(held, strict=False)
    rows = torch.arange(part.k.out_features).unflatten(0, (part.kv_heads, -1)).repeat_interleave(2, 0).flatten()
    full.k, full.v = part.k.take(out=rows), part.v.take(out=rows)
    return full


@pytest.mark.parametrize("options", GROUPED, ids=str)
def test_heads_of_a_group_read_the_same_keys_and_values(options: dict[str, Any]) -> None:
    part = made({**options, "kv_heads": 2})
    full = spread(part, options)
    x = draw(2, 13, WIDTH)
    ctx = Context(lengths=torch.tensor([13, 6]))
    assert part.k.out_features == WIDTH // 2 and part.kv_heads == 2
    torch.testing.assert_close(part(x, ctx)[0], full(x, ctx)[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part(x, ctx)[1, :6], full(x, ctx)[1, :6], rtol=1e-12, atol=1e-12)
    if part.traits.streams:
        states = State(2), State(2)
        for mixer, state in zip((part, full), states):
            mixer(x, Context(state=state, path="here"))
        assert 2 * states[0].bytes() == states[1].bytes()


def layered(share: str, table: bool = True, **sizes: int) -> Any:
    node = {"part": "linformer", "heads": 4, "length": 20, "rank": 4, "share": share}
    shared = {"length-projection": {"part": "length-projection", "length": 20, "rank": 4, **sizes}} if table else {}
    stem = {"part": "linear", "features": 3, "width": WIDTH}
    return build({"stem": stem, "conditioners": shared, "layers": [{"repeat": 3, "layers": [node]}]}, seed=0)


def test_one_table_serves_every_layer() -> None:
    model, alone = layered("layerwise"), layered("key-value", table=False)
    table = model.conditioners["length-projection"].e
    values = {name: value for name, value in model.state_dict().items() if not name.startswith("conditioners")}
    alone.load_state_dict(values, strict=False)
    with torch.no_grad():
        for _, part in alone.parts():
            part.e.copy_(table)
    x = draw(2, 9, 3, dtype=torch.float32)
    said, wanted = model(x), alone(x)
    torch.testing.assert_close(said, wanted, rtol=1e-6, atol=1e-6)
    assert sum(p.numel() for p in alone.parameters()) - sum(p.numel() for p in model.parameters()) == 2 * table.numel()
    said.square().sum().backward()
    wanted.square().sum().backward()
    tables = [part.e.grad for _, part in alone.parts()]
    torch.testing.assert_close(table.grad, torch.stack(tables).sum(0), rtol=1e-4, atol=1e-4)


def test_a_table_that_is_missing_or_of_another_size_is_named() -> None:
    x = draw(2, 9, 3, dtype=torch.float32)
    with pytest.raises(SpecError, match=r"b0.linformer: .*'length-projection' of \(4, 20\), which no conditioner"):
        layered("layerwise", table=False)(x)
    with pytest.raises(SpecError, match=r"which is \(4, 19\) here; give the model a conditioner"):
        layered("layerwise", length=19)(x)
    with pytest.raises(SpecError, match="rank=0 must be at least 1"):
        layered("layerwise", rank=0)


@pytest.mark.parametrize("options", GROUPED[::2], ids=str)
def test_groups_must_divide_heads(options: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="kv_heads=3 must divide heads=4"):
        make_part({"heads": 4, **options, "kv_heads": 3}, WIDTH)
