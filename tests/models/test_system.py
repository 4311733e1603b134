"""Systems: towers that read each other, towers that are one, shared stems, and whose choice is whose."""

from __future__ import annotations

import pytest
import torch

from formwright import Batch, build
from formwright.engine.state import State
from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import pack, pad
from formwright.parts.base import Shape
from formwright.parts.context import Notes
from formwright.spec import SystemSpec

WIDTH = 16
STEM = {"part": "token-embedding", "vocab": 30, "width": WIDTH}
SELF = {"part": "attention", "heads": 2}
CAUSAL = {**SELF, "causal": True, "rotary": {}}
CROSS = {**SELF, "memory": "encoder"}
MLP = {"part": "mlp", "hidden": 24}
ENCODER = {"stem": STEM, "layers": [{**SELF, "dropout": 0.5}, {"loop": 2, "layers": [MLP]}], "final_norm": "layernorm"}
DECODER = {
    "stem": {"use": "encoder.stem"},
    "layers": [{**CAUSAL, "dropout": 0.5}, CROSS, MLP],
    "memory": ["encoder"],
    "head": {"part": "lm", "tied": True},
}


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def system():
    return build({"towers": {"encoder": ENCODER, "decoder": DECODER}}, seed=0).double()


def batch_of(sources: list[list[int]], targets: torch.Tensor) -> Batch:
    tokens, lengths = pad(sources)
    return Batch(inputs={"encoder.tokens": tokens, "decoder.tokens": targets}, lengths={"encoder.tokens": lengths})


SOURCES = [some(5).tolist(), some(2, seed=1).tolist(), some(3, seed=2).tolist()]


def test_a_decoder_reads_its_encoder(system) -> None:
    targets = some(3, 4, seed=3)
    out = system(batch_of(SOURCES, targets))
    assert out.shape == (3, 4, 30)
    for index, source in enumerate(SOURCES):  # padding of the memory changes nothing
        alone = system(batch_of([source], targets[index : index + 1]))
        torch.testing.assert_close(alone[0], out[index], rtol=1e-10, atol=1e-10)
    flat, offsets = pack(SOURCES)
    packed = Batch(inputs={"encoder.tokens": flat, "decoder.tokens": targets}, offsets={"encoder.tokens": offsets})
    torch.testing.assert_close(system(packed), out, rtol=1e-10, atol=1e-10)
    assert system.spec == SystemSpec.from_json(system.spec.to_json())


def test_a_decoder_streams_over_one_memory(system) -> None:
    targets = some(3, 6, seed=3)
    batch = batch_of(SOURCES, targets)
    whole = system(batch)
    memory = system.remember(batch, "decoder")
    assert set(memory) == {"encoder"}
    state, found = State(3), []
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        piece = Batch(inputs={"decoder.tokens": targets[:, start:stop]})
        found.append(system(piece, memory=memory, state=state))
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-9, atol=1e-9)
    decoder = system.tower("decoder")
    assert set(state.values) == set(decoder.state_slots())
    assert state.bytes() == decoder.cost(Shape.full(3, 1, past=5, memory=5)).state_bytes


def test_a_shared_stem_is_one_set_of_tensors(system) -> None:
    assert system.tower("decoder").stem is system.tower("encoder").stem
    parameters = sum(p.numel() for p in system.parameters())
    assert system.cost(Shape.full(1, 3, memory=3)).parameters == parameters
    slots = system.slots()
    assert "decoder/b1.attention:k" in slots and "encoder/b1.loop.b0.mlp:up" in slots
    assert system.slot("decoder/b2.mlp:up") is slots["decoder/b2.mlp:up"]
    old = system.slot("decoder/b2.mlp:up")
    new = old.take()
    assert system.set_slot("decoder/b2.mlp:up", new) is old
    assert system.slot("decoder/b2.mlp:up") is new
    assert {line["tower"] for line in system.layout()} == {"encoder", "decoder"}
    assert next(iter(system.walk())).id == "b0.attention"
    assert "encoder/stem:tokens" in system.tables()
    with pytest.raises(SpecError, match=r"unknown tower 'decodr'; did you mean 'decoder'"):
        system.slot("decodr/b2.mlp:up")


def test_two_names_of_one_tower() -> None:
    tower = {"stem": STEM, "layers": [SELF], "head": {"part": "mean-pool"}}
    model = build({"towers": {"query": tower, "document": "query", "again": "document"}, "output": "query"})
    assert model.tower("document") is model.tower("again") is model.tower("query")
    assert sum("tokens.weight" in name for name in model.state_dict()) == 1
    x = some(2, 3)
    one = model(Batch(inputs={"query.tokens": x}))
    torch.testing.assert_close(model(Batch(inputs={"again.tokens": x}), tower="again"), one)
    reader = {"stem": STEM, "layers": [{**SELF, "memory": "document"}], "memory": ["document"]}
    model = build({"towers": {"query": tower, "document": "query", "reader": reader}})
    assert model(Batch(inputs={"document.tokens": x, "reader.tokens": some(2, 4)})).shape == (2, 4, WIDTH)


def test_every_tower_has_notes_and_noise_of_its_own(system) -> None:
    batch = batch_of(SOURCES, some(3, 4, seed=3))
    notes = Notes(want={("encoder.b0.attention", "probs"), ("b0.attention", "probs"), ("b1.attention", "probs")})
    system(batch, notes=notes)
    shapes = {path: tuple(value.shape) for (path, _), value in notes.got.items()}
    assert shapes == {
        "encoder.b0.attention": (3, 2, 5, 5),
        "b0.attention": (3, 2, 4, 4),
        "b1.attention": (3, 2, 4, 5),
    }
    cross = notes.got["b1.attention", "probs"]
    torch.testing.assert_close(cross.sum(-1), torch.ones_like(cross[..., 0]))
    assert not cross[1, ..., 2:].any()
    system.train()
    assert torch.equal(system(batch, seed=1), system(batch, seed=1))
    assert not torch.allclose(system(batch, seed=1), system(batch, seed=2))


def test_a_knob_of_one_tower_is_no_error_in_another(system) -> None:
    batch = batch_of(SOURCES, some(3, 4))
    assert not torch.allclose(system(batch, knobs={"loops": 1}), system(batch))
    torch.testing.assert_close(system(batch, knobs={"loops": 2}), system(batch))
    with pytest.raises(SpecError, match=r"unknown knob 'lops'; did you mean 'loops'"):
        system(batch, knobs={"lops": 1})


def test_a_head_is_named(system) -> None:
    batch = batch_of(SOURCES, some(3, 4))
    assert torch.equal(system(batch, head="out"), system(batch))
    x, ctx = system.embed(batch)
    decoder = system.tower("decoder")
    torch.testing.assert_close(decoder.read(*decoder.run(x, ctx)), system(batch))


def test_what_a_system_refuses(system) -> None:
    with pytest.raises(DataError, match=r"tower 'encoder' got no input; name its fields encoder.tokens"):
        system(Batch(inputs={"decoder.tokens": some(1, 2)}))
    with pytest.raises(SpecError) as caught:
        build(
            {
                "towers": {
                    "encoder": {**ENCODER, "layers": [{"part": "atention"}]},
                    "decoder": {**DECODER, "stem": {"use": "encoder"}},
                    "keys": ENCODER,
                }
            }
        )
    said = str(caught.value)
    assert "tower 'encoder': layers[0]: unknown part 'atention'" in said
    assert "tower 'decoder': stem: {'use': 'encoder'} must name an earlier tower's stem" in said
    assert "tower 'keys' cannot be used" in said
