"""A whole Mamba layer for one token against the layer's own pieces, at every level of instructions."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from formwright import build
from formwright.engine.state import State
from formwright.kit.errors import SpecError
from formwright.models.model import Model
from formwright.ops import native
from formwright.ops.mamba_step import MOST, Layer, Memory, mamba_step
from formwright.parts.base import Step, initialise
from formwright.parts.context import Context, Visible
from formwright.parts.linears.dense import Dense
from formwright.parts.mixers import mamba
from formwright.parts.mixers.mamba import Mamba

built = pytest.mark.skipif(native.library() is None, reason="no compiled ops")
SHAPES = ({"width": 32}, {"width": 23, "state": 5, "rank": 3, "conv": 2}, {"width": 36, "state": 19, "conv": 7})


@pytest.fixture(params=[0, 1, 2])
def levels(request: pytest.FixtureRequest) -> Iterator[None]:
    native.level(request.param)
    yield
    native.level(2)


def built_part(**options) -> Mamba:
    part = Mamba(**options)
    initialise(part, 0)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return part


@torch.no_grad()
def stream(part: Mamba, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    state = State(len(x), x.device)
    found = []
    for token in x.split(1, 1):
        found.append(part(token, Context(path="here", state=state)))
        state.advance(None, 1)
    return torch.cat(found, 1), state.values


@built
@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_step_equals_the_pieces(options: dict, biased: bool, rows: int, levels: None, monkeypatch) -> None:
    part = built_part(**options, bias=biased, conv_bias=biased)
    x = torch.randn(rows, 6, options["width"], generator=torch.Generator().manual_seed(0))
    calls = []
    monkeypatch.setattr(mamba, "mamba_step", lambda *given: calls.append(0) or mamba_step(*given))
    found, kept = stream(part, x)
    assert calls == [0] * 6
    wanted, remembered = stream(part.double(), x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    for name, value in kept.items():
        torch.testing.assert_close(value.double(), remembered[name].double(), rtol=1e-4, atol=1e-5)


def built_model(**options) -> Model:
    """Two layers, an MLP and another layer."""
    norm = {"part": "rmsnorm", "eps": 1e-5}
    layers = [{"part": "mamba", **options}, {"part": "mamba", "state": 3}, {"part": "mlp", "hidden": 8}]
    spec = {
        "stem": {"part": "linear", "features": 5, "width": 32},
        "defaults": {"norm": norm, "order": "pre"},
        "layers": [*layers, {"part": "mamba"}],
        "final_norm": norm,
        "head": {"part": "states"},
    }
    return build(spec, seed=0)


@torch.no_grad()
def told(model: Model, x: torch.Tensor) -> tuple[torch.Tensor, State]:
    state = State(len(x))
    return torch.cat([model({"values": token}, state=state) for token in x.split(1, 1)], 1), state


@built
@pytest.mark.parametrize("rows", [1, MOST])
def test_neighbouring_layers_run_together(rows: int, levels: None, monkeypatch) -> None:
    model, x = built_model(bias=True), torch.randn(rows, 6, 5, generator=torch.Generator().manual_seed(0))
    calls = []
    monkeypatch.setattr(mamba, "mamba_step", lambda *given: calls.append(len(given[1])) or mamba_step(*given))
    found, state = told(model, x)
    assert calls == [2, 1] * 6
    wanted, exact = told(model.double(), x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert state.values.keys() == exact.values.keys()
    for name, value in state.values.items():
        torch.testing.assert_close(value.double(), exact.values[name].double(), rtol=1e-4, atol=1e-5)


@built
def test_who_hooks_in_is_called() -> None:
    model, x = built_model(), torch.randn(1, 3, 5)
    wanted = told(model, x)[0]
    places = [model.item("b0.mamba"), model.item("b0.mamba").part, model.item("b0.mamba").norm]
    for place in places:
        watched: list[int] = []
        hook = place.register_forward_hook(lambda *_: watched.append(0))  # noqa: B023
        torch.testing.assert_close(told(model, x)[0], wanted)
        assert len(watched) == 3
        hook.remove()


@built
def test_weights_that_change_are_seen() -> None:
    model, x = built_model(), torch.randn(1, 3, 5)
    before = told(model, x)[0]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for part in (model.item("b0.mamba").part, model.item("b3.mamba").part):
            part.D.add_(1.0)
            part.out_proj.weight.data = part.out_proj.weight * 2
    changed = told(model, x)[0]
    torch.testing.assert_close(changed.double(), told(model.double(), x.double())[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(changed, before)
    assert torch.equal(told(copied, x)[0], before)


@built
@torch.no_grad()
def test_a_step_leaves_what_it_was_given() -> None:
    weights = built_part(width=32)._weights()
    assert weights is not None
    layers = [Layer(weights, 0.0, False)] * 2
    x, memories = torch.randn(2, 1, 32), [Memory(torch.randn(2, 3, 64), torch.randn(2, 64, 16)) for _ in layers]
    held = [x, *memories[0], *memories[1]]
    given = [t.clone() for t in held]
    y, _ = mamba_step(x, layers, memories)
    assert all(torch.equal(a, b) for a, b in zip(given, held))
    memories[0].h[1] = float("nan")  # of one row, which must not reach the other
    again, after = mamba_step(x, layers, memories)
    assert torch.equal(again[0], y[0])
    assert again[1].isnan().all()
    assert after[1].h[1].isnan().all()


@torch.no_grad()
def test_what_takes_the_pieces() -> None:
    part = built_part(width=32)

    def step(part: Mamba = part, rows: int = 1, **context) -> Step | None:
        return part.step(Context(path="here", **{"state": State(rows), **context}), None)

    fits = native.library() is not None
    assert (step() is not None) == fits
    if fits:
        assert step().takes(torch.zeros(1, 1, 32))
        assert not step().takes(torch.zeros(1, 2, 32))
        assert not step().takes(torch.zeros(1, 1, 32, dtype=torch.float64))
    assert step(rows=MOST + 1) is step(rows=0) is step(state=None) is step(lengths=torch.ones(1)) is None
    assert step(visible=Visible(window=3)) is None
    with torch.enable_grad():
        assert step() is None
    remembers = State(1)
    remembers.put("here.h", torch.zeros(1, 64, 16, dtype=torch.float64))
    assert step(state=remembers) is None
    assert step(built_part(width=32).double()) is step(built_part(width=32, selective=["B"])) is None
    watched: list[int] = []
    hook = part.x_proj.register_forward_hook(lambda *_: watched.append(0))
    assert step() is None
    stream(part, torch.zeros(1, 2, 32))
    assert len(watched) == 2
    hook.remove()
    part.out_proj = type("Other", (Dense,), {})(64, 32, False, "out")
    assert step() is None
    part.out_proj = nn.Identity()  # type: ignore[assignment]
    assert step() is None


@built
@torch.no_grad()
def test_other_rows_than_the_streams_are_refused() -> None:
    state = State(2)
    part = built_part(width=32)
    part(torch.zeros(2, 1, 32), Context(path="here", state=state))
    with pytest.raises(SpecError, match="here: a stream of 2 rows is given 3"):
        part(torch.zeros(3, 1, 32), Context(path="here", state=state))


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_the_bytes_of_a_stream_do_not_grow(tokens: int) -> None:
    part = built_part(width=32)
    state = State(2)
    for token in torch.zeros(2, tokens, 32).split(1, 1):
        part(token, Context(path="here", state=state))
        state.advance(None, 1)
    assert state.bytes() == 2 * 64 * (3 + 16) * 4
