"""Sinkhorn attention: a doubly stochastic order of blocks, and attention to the own and the brought block."""

from __future__ import annotations

import pytest
import torch

from conformance.samples import WIDTH, draw
from formwright.kit.errors import SpecError
from formwright.parts.context import Context, Notes, Visible
from formwright.parts.make import make_part
from formwright.parts.mixers.sinkhorn import sinkhorn
from mixing import mixing_matrix, one_head, projections


def test_rows_and_columns_add_up_to_one() -> None:
    """Among real blocks; the others are zero and change nothing."""
    logits = 2 * draw(2, 3, 7, 7)
    real = torch.ones(2, 7).bool()
    real[1, 4:] = False
    order = sinkhorn(logits, real, 20)
    for row, count in ((0, 7), (1, 4)):
        inside = order[row, :, :count, :count]
        for axis in (1, 2):
            torch.testing.assert_close(inside.sum(axis), torch.ones(3, count).double(), rtol=0, atol=1e-2)
    assert not order[1, :, 4:].any() and not order[1, :, :, 4:].any()
    torch.testing.assert_close(order[1:, :, :4, :4], sinkhorn(logits[1:, :, :4, :4], real[1:, :4], 20))
    assert torch.isfinite(sinkhorn(1e4 * logits, real, 8)).all()


@pytest.mark.parametrize("blocks", [None, 6])
def test_is_its_matrix(blocks: int | None) -> None:
    """20 tokens in blocks of 4, keys and values mixed block by block as the noted order says."""
    part = one_head("sinkhorn", block=4, blocks=blocks, iterations=3)
    x, found = mixing_matrix(part, 20)
    notes = Notes(want={("here", "order")})
    part(x, Context(notes=notes, path="here"))
    order = notes.got["here", "order"][0, 0]
    q, k = projections(part, x, "q", "k")
    brought = torch.einsum("uv,vbw->ubw", order, k.view(5, 4, -1))
    values = torch.einsum("uv,vbw->ubw", order, torch.eye(20).double().view(5, 4, 20))
    wanted = []
    for u in range(5):
        own = slice(4 * u, 4 * u + 4)
        scores = q[own] @ torch.cat((k[own], brought[u])).T * WIDTH**-0.5
        wanted.append(scores.softmax(-1) @ torch.cat((torch.eye(20).double()[own], values[u])))
    torch.testing.assert_close(found, torch.cat(wanted).detach(), rtol=1e-9, atol=1e-9)


def test_one_block_is_attention() -> None:
    part = one_head("sinkhorn", block=32)
    x, found = mixing_matrix(part, 20)
    q, k = projections(part, x, "q", "k")
    torch.testing.assert_close(found, (q @ k.T * WIDTH**-0.5).softmax(-1), rtol=1e-9, atol=1e-9)


def test_sorting_has_an_effect() -> None:
    """Exchanging two blocks that are not the query's own changes nothing where blocks are compared, since the order
    follows them; the order itself is another for each block, and its slots get gradients."""
    part = one_head("sinkhorn", block=4)
    x = draw(1, 20, WIDTH)
    swapped = torch.cat((x[:, :4], x[:, 12:16], x[:, 8:12], x[:, 4:8], x[:, 16:]), 1)
    torch.testing.assert_close(part(swapped, Context())[:, :4], part(x, Context())[:, :4])
    notes = Notes(want={("here", "order")})
    part(x, Context(notes=notes, path="here")).square().sum().backward()
    order = notes.got["here", "order"][0, 0]
    assert float((order[0] - order[1]).detach().abs().max()) > 0.1
    assert all(bool(getattr(part, name).weight.grad.any()) for name in ("sort_q", "sort_k"))


def test_noise_only_while_training() -> None:
    part = one_head("sinkhorn", block=4, gumbel=1.0)
    x = draw(1, 20, WIDTH)
    assert torch.equal(part(x, Context(seed=1)), part(x, Context()))
    part.train()
    assert not torch.allclose(part(x, Context(seed=1)), part(x, Context(seed=2)))


def test_causal_order_is_refused_and_options_are_checked() -> None:
    with pytest.raises(SpecError, match="sinkhorn reads later tokens"):
        one_head("sinkhorn")(draw(1, 4, WIDTH), Context(visible=Visible(causal=True)))
    for options, words in (
        ({"block": 0}, "block=0"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"blocks": 0}, "blocks=0"),
    ):
        with pytest.raises(SpecError, match=words):
            make_part({"part": "sinkhorn", "heads": 2, **options}, WIDTH)
