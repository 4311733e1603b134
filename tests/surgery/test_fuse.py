"""Partly learnable projections: blocks, fixed halves, roles, fusing, preconditioned steps, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import formwright as fw
from formwright.hub import load_adapter, save_adapter
from formwright.kit.errors import SpecError
from formwright.parts.base import initialise
from formwright.surgery.adapt.fuse import halves
from formwright.surgery.adapt.partly_learnable import PartlyLearnable
from formwright.surgery.adapt.precondition import Preconditioner, preconditioned
from formwright.surgery.adapt.switch import use
from formwright.surgery.samples import encoder, equal, said, state, tokens


def pair(model: Any, **options: Any) -> Any:
    """A content and a style adapter, both as if trained."""
    given = {"rank": 4, "where": ["q", "v"], **options}
    for index, role in enumerate(("content", "style")):
        fw.apply(model, "partly-learnable", role=role, name=role, **given)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for change in halves(model, role).values():
                for half in (change.B, change.D):
                    half.add_(0.2 * torch.randn(half.shape, generator=generator))
    return model


def test_fusing_takes_the_content_of_one_and_the_style_of_the_other() -> None:
    model = fw.apply(pair(encoder()), "fuse")
    fused, content, style = (halves(model, name) for name in ("fused", "content", "style"))
    for address, change in fused.items():
        assert torch.equal(change.up(), style[address].up())
        assert torch.equal(change.D, content[address].D) and torch.equal(change.C, style[address].C)
    assert [n for n, p in model.named_parameters() if p.requires_grad and not n.endswith((".B", ".D"))] == []
    before = said(use(model, "fused"))
    fw.apply(model, "merge", adapter="fused", keep_undo=True)
    torch.testing.assert_close(said(model)["out"], before["out"], rtol=1e-5, atol=1e-5)
    fw.undo(fw.undo(model))
    assert set(halves(model, "content")) == set(content) and not halves(model, "fused")


def test_what_cannot_be_fused() -> None:
    model = encoder()
    with pytest.raises(SpecError, match="unknown adapter 'content'"):
        fw.plan(model, "fuse")
    fw.apply(model, "partly-learnable", rank=4, name="content", where=["q", "v"])
    for name, options, words in (
        ("seed", {"seed": 1}, "the fixed halves differ; make both adapters with the same seed"),
        ("rank", {"rank": 2}, "the ranks are 4 and 2"),
        ("places", {"where": ["q"]}, "must be partly learnable and in the same slots, not b0.attention:v"),
    ):
        fw.apply(model, "partly-learnable", **{"rank": 4, "where": ["q", "v"], "name": name, **options})
        with pytest.raises(SpecError, match=words):
            fw.plan(model, "fuse", style=name)
    fw.apply(model, "lora", rank=2, name="other", where=["q", "v"])
    with pytest.raises(SpecError, match="must be partly learnable"):
        fw.plan(model, "fuse", style="other")
    with pytest.raises(SpecError, match="did you mean 'content'"):
        fw.plan(model, "partly-learnable", rank=2, role="contents", name="x")
    with pytest.raises(SpecError, match="both sides must be even"):
        PartlyLearnable(7, 4, rank=2)


def test_fixed_halves_stay_under_weight_decay() -> None:
    model = fw.apply(encoder(), "partly-learnable", rank=4, role="content")
    before = state(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    for step in range(20):
        model(tokens(seed=step)).square().sum().neg().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name.rpartition(".")[2] for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {"D"}


def test_saved_alone_a_fused_adapter_brings_its_halves(tmp_path: Path) -> None:
    model = fw.apply(pair(encoder()), "fuse")
    save_adapter(model, "fused", tmp_path / "fused")
    again = load_adapter(encoder(), tmp_path / "fused")
    assert equal(said(use(again, "fused")), said(use(model, "fused")))


def test_a_preconditioned_step_does_not_know_how_the_product_is_split() -> None:
    up, down, wanted = (torch.randn(*shape, dtype=torch.float64) for shape in ((8, 3), (3, 6), (8, 6)))
    steps = []
    for s in (1.0, 0.1, 10.0):
        u, d = s * up, down / s
        residual = u @ d - wanted
        to_up, to_down = preconditioned(u, d, residual @ d.T, u.T @ residual)
        steps.append((u - 0.1 * to_up) @ (d - 0.1 * to_down) - u @ d)
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0], rtol=1e-9, atol=1e-9)
    same = preconditioned(torch.zeros(8, 3), torch.zeros(3, 6), torch.ones(8, 3), torch.ones(3, 6))
    assert all(torch.equal(t, torch.ones_like(t)) for t in same)


def test_training_preconditions_where_it_is_asked_to() -> None:
    change = PartlyLearnable(6, 8, rank=2)
    initialise(change, 0)
    change.B.grad, change.D.grad = torch.ones_like(change.B), torch.ones_like(change.D)
    Preconditioner([change], 1e-3).gradients(None)
    assert not torch.equal(change.B.grad, torch.ones_like(change.B))
    model = fw.apply(encoder(), "partly-learnable", rank=2, precondition=0.0)
    from formwright.training.companions import companions

    assert len(companions(model)) == 1 and not companions(fw.apply(encoder(), "partly-learnable", rank=2))
