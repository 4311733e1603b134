"""A whole Mamba layer for one token against the layer's own pieces, at every level of instructions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from formwright.engine.state import State
from formwright.ops import native
from formwright.ops.mamba_step import MOST, mamba_step
from formwright.parts.base import initialise
from formwright.parts.context import Context
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
    assert len(calls) == 6
    wanted, remembered = stream(part.double(), x.double())
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    for name, value in kept.items():
        torch.testing.assert_close(value.double(), remembered[name].double(), rtol=1e-4, atol=1e-5)


@built
@torch.no_grad()
def test_a_step_leaves_what_it_was_given() -> None:
    part = built_part(width=32)
    weights = part._weights()
    assert weights is not None
    x, window, h = torch.randn(2, 1, 32), torch.randn(2, 3, 64), torch.randn(2, 64, 16)
    given = [t.clone() for t in (x, window, h)]
    done = mamba_step(x, weights, window, h)
    assert done is not None
    assert all(torch.equal(a, b) for a, b in zip(given, (x, window, h)))
    h[1] = float("nan")  # of one row, which must not reach the other
    again = mamba_step(x, weights, window, h)
    assert again is not None
    assert torch.equal(again[0][0], done[0][0])
    assert again[0][1].isnan().all()


@torch.no_grad()
def test_what_takes_the_pieces() -> None:
    part = built_part(width=32)
    weights = part._weights()
    assert weights is not None

    def step(rows: int = 1, tokens: int = 1, dtype: torch.dtype = torch.float32):
        return mamba_step(
            torch.zeros(rows, tokens, 32, dtype=dtype), weights, torch.zeros(rows, 3, 64), torch.zeros(rows, 64, 16)
        )

    assert step(MOST + 1) is step(0) is step(1, 2) is step(dtype=torch.float64) is None
    with torch.enable_grad():
        assert step() is None
    watched: list[int] = []
    hook = part.x_proj.register_forward_hook(lambda *_: watched.append(0))
    assert part._weights() is None
    stream(part, torch.zeros(1, 2, 32))
    assert len(watched) == 2
    hook.remove()
    part.out_proj = type("Other", (Dense,), {})(64, 32, False, "out")
    assert part._weights() is None
    part.out_proj = nn.Identity()  # type: ignore[assignment]
    assert part._weights() is None
    assert built_part(width=32, selective=["B"])._weights() is None


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_the_bytes_of_a_stream_do_not_grow(tokens: int) -> None:
    part = built_part(width=32)
    state = State(2)
    for token in torch.zeros(2, tokens, 32).split(1, 1):
        part(token, Context(path="here", state=state))
        state.advance(None, 1)
    assert state.bytes() == 2 * 64 * (3 + 16) * 4
