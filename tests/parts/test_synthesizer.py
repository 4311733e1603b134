"""Synthesizer: the softmax of learned or made logits, kind by kind, and weighted sums of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from conformance.samples import WIDTH, draw
from formwright.kit.errors import SpecError
from formwright.parts.context import Context, Notes
from formwright.parts.make import make_part
from mixing import mixing_matrix, one_head, projections

KINDS = ["dense", "random", "factorised-dense", "factorised-random", "dot"]
LENGTH = 20


def logits(part, kind: str, x: Tensor) -> Tensor:
    """(L, L) of one head, written out pair by pair where a table is factorised."""
    places = range(x.shape[1])
    if kind == "random":
        return part.random[0, : len(places), : len(places)]
    if kind == "factorised-random":
        return (part.left[0] @ part.right[0].T)[: len(places), : len(places)]
    if kind == "dot":
        q, k = projections(part, x, "q", "k")
        return q @ k.T * WIDTH**-0.5
    hidden = part.w1(x)[0].clamp(min=0)
    if kind == "dense":
        return hidden @ part.dense[0, :, : len(places)]
    inner, outer = hidden @ part.inner[0], hidden @ part.outer[0]
    side = inner.shape[1]
    return torch.stack([inner[:, j % side] * outer[:, j // side] for j in places], 1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_is_its_matrix(kind: str, causal: bool) -> None:
    part = one_head("synthesizer", kinds=[kind], length=23, causal=causal)
    x, found = mixing_matrix(part, LENGTH)
    wanted = logits(part, kind, x)
    if causal:
        wanted = wanted.masked_fill(torch.ones(LENGTH, LENGTH).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(found, wanted.softmax(-1).detach(), rtol=1e-9, atol=1e-9)


def test_mixtures_are_weighted_sums_of_logits() -> None:
    part = one_head("synthesizer", kinds=KINDS, length=23)
    with torch.no_grad():
        part.mixture.copy_(torch.tensor([[0.3, -1.0, 0.5, 2.0, 0.0]]))
    x, found = mixing_matrix(part, LENGTH)
    shares = part.mixture.softmax(-1)[0]
    wanted = sum(share * logits(part, kind, x) for share, kind in zip(shares, KINDS))
    torch.testing.assert_close(found, wanted.softmax(-1).detach(), rtol=1e-9, atol=1e-9)  # type: ignore[union-attr]


def test_factors_cover_the_table() -> None:
    for length in (1, 2, 9, 10, 23):
        part = make_part({"part": "synthesizer", "heads": 2, "kinds": ["factorised-dense"], "length": length}, WIDTH)
        a, c = part.inner.shape[2], part.outer.shape[2]
        assert a * c >= length > a * (c - 1) and abs(a - c) <= 1


def test_probabilities_are_noted() -> None:
    part = one_head("synthesizer", kinds=["random"], length=9)
    notes = Notes(want={("here", "probs")})
    part(draw(2, 5, WIDTH), Context(notes=notes, path="here", lengths=torch.tensor([5, 3])))
    probs = notes.got["here", "probs"]
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 1, 5).double())
    assert not probs[1, :, :, 3:].any()


def test_wrong_options() -> None:
    with pytest.raises(SpecError, match="none twice"):
        make_part({"part": "synthesizer", "heads": 2, "kinds": ["dot", "dot"], "length": 4}, WIDTH)
    with pytest.raises(SpecError, match="at least one kind"):
        make_part({"part": "synthesizer", "heads": 2, "kinds": [], "length": 4}, WIDTH)
    with pytest.raises(SpecError, match="length=0"):
        make_part({"part": "synthesizer", "heads": 2, "kinds": ["dot"], "length": 0}, WIDTH)
