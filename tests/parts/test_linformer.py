"""Linformer is attention over explicitly projected keys and values."""

from __future__ import annotations

import pytest
import torch

from conformance.samples import WIDTH, draw
from formwright.kit.errors import SpecError
from formwright.ops.attention import attention_reference
from formwright.parts.context import Context, Visible
from formwright.parts.make import make_part
from mixing import mixing_matrix, one_head, projections


@pytest.mark.parametrize("share", ["headwise", "key-value", "none"])
def test_is_its_matrix(share: str) -> None:
    """softmax(q (E k)^T / sqrt(d)) F, with E and F cut to the length of the text."""
    part = one_head("linformer", length=30, rank=5, share=share)
    x, found = mixing_matrix(part, 20)
    q, k = projections(part, x, "q", "k")
    e = part.e.view(5, 30)[:, :20]
    f = e if share == "key-value" else part.f.view(5, 30)[:, :20]
    torch.testing.assert_close(found, (q @ (e @ k).T * WIDTH**-0.5).softmax(-1) @ f, rtol=1e-9, atol=1e-9)


def test_is_attention_where_nothing_is_projected() -> None:
    part = make_part({"part": "linformer", "heads": 4, "length": 9, "rank": 9, "share": "none"}, WIDTH).double()
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
        part.e.copy_(torch.eye(9))
        part.f.copy_(torch.eye(9))
    x = draw(2, 9, WIDTH)
    q, k, v = (slot(x).unflatten(-1, (4, 8)) for slot in (part.q, part.k, part.v))
    wanted = part.o(attention_reference(q, k, v)[0].flatten(2))
    torch.testing.assert_close(part(x, Context()), wanted, rtol=1e-10, atol=1e-10)


def test_causal_order_is_refused() -> None:
    part = one_head("linformer", length=9, rank=2)
    with pytest.raises(SpecError, match="linformer reads later tokens"):
        part(draw(1, 4, WIDTH), Context(visible=Visible(causal=True)))
    with pytest.raises(SpecError, match="unknown option 'causal'"):
        make_part({"part": "linformer", "heads": 2, "length": 9, "rank": 2, "causal": True}, WIDTH)
    with pytest.raises(SpecError, match="rank=0 must be at least 1"):
        make_part({"part": "linformer", "heads": 2, "length": 9, "rank": 0}, WIDTH)
