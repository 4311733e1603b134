"""Performer: features that estimate the softmax kernel, better with more and with orthogonal rows; the redraw rule."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from conformance.samples import WIDTH, draw, keyed
from formwright.kit.errors import SpecError
from formwright.parts.context import Context
from formwright.parts.make import make_part
from formwright.parts.mixers.performer import exponents, independent_rows, orthogonal_rows, rotation
from mixing import mixing_matrix, one_head, projections


@pytest.mark.parametrize("causal", [False, True])
def test_is_its_matrix(causal: bool) -> None:
    """The stabilisers cancel, whichever they are."""
    part = one_head("performer", causal=causal, features=40)
    x, found = mixing_matrix(part, 20)
    q, k = (exponents(t, part.omega).exp() for t in projections(part, x, "q", "k"))
    wanted = q @ k.T
    wanted = wanted.tril() if causal else wanted
    torch.testing.assert_close(found, wanted / wanted.sum(-1, keepdim=True), rtol=1e-9, atol=1e-9)


def test_relu_kernel_without_rows_is_what_its_formula_says() -> None:
    part = one_head("performer", kernel="relu", features=0)
    assert part.omega is None
    x, found = mixing_matrix(part, 20)
    q, k = (t.relu() + 1e-3 for t in projections(part, x, "q", "k"))
    wanted = q @ k.T
    torch.testing.assert_close(found, wanted / wanted.sum(-1, keepdim=True), rtol=1e-9, atol=1e-9)


def test_error_falls_with_the_number_of_features() -> None:
    errors = {}
    for count in (32, 512):
        found = []
        for seed in range(6):
            part = one_head("performer", features=count, seed=0)
            with torch.no_grad():
                part.omega.copy_(orthogonal_rows(count, WIDTH, keyed(seed)))
                part.q.weight.mul_(0.4)  # the variance rises with exp(|q + k|^2)
                part.k.weight.mul_(0.4)
            x, matrix = mixing_matrix(part, 16)
            q, k = projections(part, x, "q", "k")
            found.append((matrix - (q @ k.T * WIDTH**-0.5).softmax(-1)).norm())
        errors[count] = float(torch.stack(found).mean())
    # 16 times as many features: a quarter of the error, as the square root says.
    assert 2.8 < errors[32] / errors[512] < 5.7


def test_orthogonal_rows() -> None:
    rows = orthogonal_rows(40, 16, keyed())
    assert rows.shape == (40, 16)
    for block in rows.split(16):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-9)
    norms = torch.cat([orthogonal_rows(16, 16, keyed(seed)) for seed in range(200)]).square().sum(1)
    assert abs(float(norms.mean()) - 16) < 0.5  # as those of normal vectors
    assert independent_rows(3, 5, keyed()).shape == (3, 5)


def test_redraw_follows_progress_and_ends_with_the_rows_that_are_kept() -> None:
    part = one_head("performer", features=40, redraw=4).train()
    x = draw(1, 9, WIDTH)
    ys = [part(x, Context(progress=at, seed=seed)) for seed, at in enumerate((0.0, 0.2, 0.3, 0.5, 0.8, 1.0))]
    assert torch.equal(ys[0], ys[1]) and torch.equal(ys[4], ys[5])
    assert not any(torch.allclose(a, b) for a, b in pairwise(ys[1:5]))
    assert torch.equal(part.eval()(x, Context()), ys[5])
    assert torch.equal(part(x, Context(progress=0.0)), ys[5])
    turn = rotation(WIDTH, 2)
    torch.testing.assert_close(turn @ turn.T, torch.eye(WIDTH).double(), rtol=0, atol=1e-12)


def test_all_but_the_random_rows_train() -> None:
    part = one_head("performer")
    part(draw(2, 8, WIDTH), Context()).square().sum().backward()
    assert {name for name, p in part.named_parameters() if p.grad is None} == {"omega"}
    assert all(bool(p.grad.any()) for name, p in part.named_parameters() if name != "omega")


@pytest.mark.parametrize("causal", [False, True])
def test_large_keys_do_not_overflow(causal: bool) -> None:
    part = make_part({"part": "performer", "heads": 1, "head_width": 160, "causal": causal}, WIDTH)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(generator=keyed())
        for size in (1.0, 30.0, 1e4):
            assert torch.isfinite(part(size * draw(2, 50, WIDTH, dtype=torch.float32), Context())).all()


def test_wrong_options() -> None:
    with pytest.raises(SpecError, match=r"features=0 .* is for kernel='relu'"):
        make_part({"part": "performer", "heads": 2, "features": 0}, WIDTH)
    with pytest.raises(SpecError, match="must not be negative"):
        make_part({"part": "performer", "heads": 2, "redraw": -1}, WIDTH)
