"""Spans that are computed again give the same gradients, to the bit, and keep less."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from formwright.models.batch import Batch, pack
from formwright.models.build import build
from formwright.objectives.base import Gen
from formwright.objectives.causal_lm import CausalLM
from formwright.parts.context import Notes

RATE = {"dropout": 0.3}
ATTENTION = {"part": "attention", "heads": 2, "causal": True, "rotary": {}, **RATE}
MLP = {"part": "mlp", "hidden": 24, **RATE}
LAYERS = {
    "plain": [ATTENTION, MLP, ATTENTION, MLP, MLP],
    "streams": [ATTENTION, {"tap": "skip"}, MLP, {"join": "skip", "combine": "add"}, ATTENTION],
    "loop": [{"loop": 2, "layers": [ATTENTION, MLP]}, MLP],
    "averages": [{"part": "lmu", "theta": 5}, MLP, {"part": "lmu", "theta": 5}],
}


def model(layers):
    stem = {"part": "token-embedding", "vocab": 32, "width": 16, **RATE}
    return build({"stem": stem, "layers": layers, "head": {"part": "lm", "tied": True}}, seed=0)


def batch(packed: bool) -> Batch:
    draw = torch.Generator().manual_seed(1)
    if not packed:
        tokens = torch.randint(0, 32, (3, 8), generator=draw)
        lengths = {"tokens": torch.tensor([8, 5, 1])}
        return Batch({"tokens": tokens}, lengths=lengths, targets={"tokens": tokens.roll(-1, 1)})
    rows = [torch.randint(0, 32, (n,), generator=draw).tolist() for n in (7, 3, 5)]
    tokens, offsets = pack(rows)
    return Batch({"tokens": tokens}, offsets={"tokens": offsets}, targets={"tokens": tokens.roll(-1, 1)})


def passed(layers, every: int, packed: bool = False) -> tuple[dict[str, Tensor], float, int]:
    """Gradients and buffers, the loss, and the bytes that a forward pass keeps besides parameters."""
    made = model(layers).train()
    made.recompute = every
    own = {p.untyped_storage().data_ptr() for p in made.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = CausalLM().loss({"model": made}, batch(packed), Gen(seed=5))["model"].total
    spans = -(-len(layers) // every) if every else 0
    stream = 4 * 16 * batch(packed).inputs["tokens"].numel()  # of every span its input is kept outside the hooks
    loss.backward()
    found = {name: p.grad for name, p in made.named_parameters()}
    return {**found, **dict(made.named_buffers())}, loss.item(), sum(kept.values()) + spans * stream


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layers", LAYERS)
def test_gradients_are_equal_to_the_bit_and_less_is_kept(layers, packed):
    whole, loss, much = passed(LAYERS[layers], 0, packed)
    for every in (1, 2, 9):
        again, same, less = passed(LAYERS[layers], every, packed)
        assert same == loss and whole.keys() == again.keys()
        assert [name for name in whole if not torch.equal(whole[name], again[name])] == []
        assert less < 0.75 * much


def test_what_a_span_says_to_the_side_is_said_once():
    made = model(LAYERS["plain"]).train()
    item = next(made.items())
    plain = type(item).forward

    class Speaking(type(item)):
        def forward(self, x, ctx):
            ctx.loss(x.square().mean())
            return plain(self, x, ctx)

    item.__class__ = Speaking
    found = {}
    for every in (0, 1, 3):
        made.recompute = every
        made.zero_grad()
        loss = CausalLM().loss({"model": made}, batch(False), Gen(seed=5))["model"]
        loss.total.backward()
        found[every] = (loss.total.item(), float(loss.parts["auxiliary"]), [p.grad.clone() for p in made.parameters()])
    assert found[0][1] > 0
    for every in (1, 3):
        assert found[every][:2] == found[0][:2]
        assert all(torch.equal(a, b) for a, b in zip(found[every][2], found[0][2]))


def test_inner_notes_and_streams_run_as_always():
    made = model(LAYERS["plain"]).train()
    made.recompute = 1
    notes = Notes(want={("b0.attention", "output")})
    made(batch(False), notes=notes, seed=0).sum().backward()
    assert ("b0.attention", "output") in notes.got
    made.eval()
    with torch.no_grad():
        one = made(batch(False))
        made.recompute = 0
        assert torch.equal(one, made(batch(False)))
