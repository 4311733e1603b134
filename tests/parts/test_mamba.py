"""Mamba is the recurrence it is written as, starts as published, and its two directions share what they say they do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import SpecError
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.parts.base import Shape, initialise
from formwright.parts.context import Context, Visible
from formwright.parts.make import make_part
from formwright.training.parameters import groups


def made(name: str, width: int = 8, **options) -> torch.nn.Module:
    with torch.device("meta"):
        part = make_part({"part": name, **options}, width)
    part.to_empty(device="cpu").double()
    initialise(part, 0)
    return part.eval()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(part, u: Tensor) -> Tensor:
    """The formulas of the paper, one token after another."""
    x, z = (u @ part.in_proj.weight.T).chunk(2, -1)
    taps = part.conv.weight.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0)).transpose(1, 2)
    x = F.silu(F.conv1d(padded, part.conv.weight[:, None], part.conv.bias, groups=x.shape[2])).transpose(1, 2)
    state = part.A_log.shape[1]
    d, B, C = (x @ part.x_proj.weight.T).split([part.dt_proj.in_features, state, state], -1)
    step = F.softplus(d @ part.dt_proj.weight.T + part.dt_bias)
    h, outputs = torch.zeros(len(u), *part.A_log.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        decay = torch.exp(-step[:, t, :, None] * part.A_log.exp())
        h = decay * h + (step[:, t] * x[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + part.D * x[:, t])
    return (torch.stack(outputs, 1) * F.silu(z)) @ part.out_proj.weight.T


def test_it_is_the_recurrence_of_the_paper() -> None:
    part, u = made("mamba", state=4, rank=2), draw(2, 9, 8)
    torch.testing.assert_close(part(u, Context()), by_hand(part, u), rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_it_starts_as_published() -> None:
    part = made("mamba", width=256, depth=4)
    torch.testing.assert_close(part.A_log.exp(), torch.arange(1.0, 17.0, dtype=torch.float64).expand(512, 16))
    assert bool((part.D == 1).all())
    steps = F.softplus(part.dt_bias.detach())
    assert float(steps.min()) >= 1e-3 * (1 - 1e-4) and float(steps.max()) <= 1e-1 * (1 + 1e-4)
    assert abs(float(steps.log().mean()) - math.log(1e-2)) < 0.2  # even over the orders of magnitude
    for slot, factor in ((part.in_proj, 1.0), (part.x_proj, 1.0), (part.dt_proj, 1.0), (part.out_proj, 0.5)):
        bound = factor * slot.in_features**-0.5
        assert 0.99 * bound < float(slot.weight.abs().max()) <= bound
        assert abs(float(slot.weight.std()) / bound - 3**-0.5) < 0.01
    assert float(part.conv.weight.abs().max()) <= 0.5 and float(part.conv.bias.abs().max()) <= 0.5


def test_with_nothing_selective_it_is_a_convolution() -> None:
    """The same kernel for every token: sum_n C_n exp(Delta A_n)^k Delta B_n."""
    part, x = made("mamba", state=3, selective=[]), draw(2, 11, 16)
    delta, B, C = part.selected(x, Context())
    assert all(bool((t == t[:1, :1]).all()) for t in (delta, B, C))
    step, A = F.softplus(part.dt_bias), -part.A_log.exp()
    kernel = torch.stack([(torch.exp(step[:, None] * A * k) * part.B * part.C).sum(1) * step for k in range(11)], 1)
    seen = part.conv(x, Context())
    wanted = F.conv1d(F.pad(seen, (0, 0, 10, 0)).transpose(1, 2), kernel.flip(1)[:, None], groups=16).transpose(1, 2)
    gate = draw(2, 11, 16, seed=1)
    torch.testing.assert_close(part.mixed(x, gate, Context()), (wanted + part.D * seen) * F.silu(gate))


@pytest.mark.parametrize("chosen", [["delta"], ["B"], ["C"], ["C", "delta"]], ids=str)
def test_each_choice_can_be_made_a_constant(chosen: list[str]) -> None:
    part, x = made("mamba", state=3, selective=chosen), draw(2, 5, 16)
    for name, value in zip(("delta", "B", "C"), part.selected(x, Context())):
        assert bool((value == value[:1, :1]).all()) == (name not in chosen)


def test_state_is_that_of_the_published_model() -> None:
    model = build(recipe("mamba-130m"), device="meta")
    assert model.cost(Shape.full(1, 64)).state_bytes == model.cost(Shape.full(1, 4096)).state_bytes == 4 * 700_416


def shared(merge: str) -> tuple:
    """The form with shared projections, and the general one holding the same weights twice."""
    both = made("bimamba-s", state=3, merge=merge)
    apart = made("bidirectional", mixer={"part": "mamba", "state": 3}, merge=merge)
    for whole, core in zip(apart.parts, (both.ahead, both.back)):
        whole.load_state_dict({**core.state_dict(), **projections(both)})
    return both, apart


def projections(part) -> dict[str, Tensor]:
    return {name: value for name, value in part.state_dict().items() if name.startswith(("in_proj", "out_proj"))}


@pytest.mark.parametrize("merge", ["sum", "mean", "multiply"])
def test_one_pass_of_shared_projections_is_two_whole_passes(merge: str) -> None:
    both, apart = shared(merge)
    x = draw(3, 7, 8)
    ctx = Context(lengths=torch.tensor([7, 3, 0]))
    mine, theirs = both(x, ctx), apart(x, ctx)
    torch.testing.assert_close(mine[ctx.valid(x)], theirs[ctx.valid(x)], rtol=1e-12, atol=1e-12)
    mine.square().sum().backward()
    theirs.square().sum().backward()
    for name in ("in_proj", "out_proj"):  # a shared weight's gradient is the sum of both uses
        uses = sum(getattr(part, name).weight.grad for part in apart.parts)
        torch.testing.assert_close(getattr(both, name).weight.grad, uses)


def test_reversing_the_input_and_swapping_the_directions_reverses_the_output() -> None:
    part, x = made("bimamba-s", state=3), draw(2, 7, 8)
    y = part(x, Context())
    part.ahead, part.back = part.back, part.ahead
    torch.testing.assert_close(part(x.flip(1), Context()).flip(1), y, rtol=1e-13, atol=1e-13)


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(SpecError, match=r"unknown selective 'Delta'; did you mean 'delta'"):
        made("mamba", selective=["Delta"])
    for options in ({"state": 0}, {"expand": 0}, {"rank": 0}, {"depth": 0}):
        with pytest.raises(SpecError, match=f"{next(iter(options))}.* must be at least 1"):
            made("mamba", **options)
    with pytest.raises(SpecError, match="takes no window"):
        made("mamba")(draw(1, 3, 8), Context(visible=Visible(causal=True, window=2)))
    with pytest.raises(SpecError, match="takes no rule of visibility"):
        made("bimamba-s")(draw(1, 3, 8), Context(visible=Visible(causal=True)))


def test_rates_do_not_decay() -> None:
    held = dict(build(recipe("mamba-130m", vocab=50, width=32, layers=1, state=4), device="meta").named_parameters())
    decay, keep = groups(held, 0.1)
    free = {id(parameter) for parameter in keep["params"]}
    assert {name.rpartition(".")[2] for name, p in held.items() if id(p) in free and "norm" not in name} == {
        "A_log",
        "D",
        "dt_bias",
        "bias",
    }
    assert len(decay["params"]) + len(keep["params"]) == len(held)
