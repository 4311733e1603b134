"""Reformer: attention over the pairs that hashing finds, each once however many rounds find it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from conformance.samples import WIDTH, draw
from formwright.kit.errors import SpecError
from formwright.parts.base import initialise
from formwright.parts.context import Context, Visible
from formwright.parts.make import make_part
from formwright.parts.mixers import reformer
from mixing import mixing_matrix, one_head, projections

LENGTH = 30


def pairs(buckets: Tensor, chunk: int, same_bucket: bool, causal: bool) -> Tensor:
    """(L, L) bool by the words of the definition: buckets (R, L); sort, cut, look at the own and the previous chunk."""
    seen = torch.zeros(LENGTH, LENGTH, dtype=torch.bool)
    for row in buckets.tolist():
        order = sorted(range(LENGTH), key=lambda token: (row[token], token))
        for i, query in enumerate(order):
            for j, key in enumerate(order):
                near = 0 <= i // chunk - j // chunk <= 1
                if near and not (same_bucket and row[query] != row[key]) and not (causal and key > query):
                    seen[query, key] = True
    return seen


@pytest.mark.parametrize("same_bucket", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rounds", [1, 3])
def test_is_attention_over_the_pairs_found(rounds: int, causal: bool, same_bucket: bool) -> None:
    part = one_head("reformer", chunk=4, buckets=6, rounds=rounds, causal=causal, same_bucket=same_bucket)
    x, found = mixing_matrix(part, LENGTH)
    (q,) = projections(part, x, "q")
    seen = pairs(part.hashed(q[None, None], Context())[0, 0], 4, same_bucket, causal)
    alone = ~seen.fill_diagonal_(False).any(-1)
    seen[alone, alone.nonzero()[:, 0]] = True
    scores = q @ F.normalize(q, dim=-1).T * WIDTH**-0.5
    wanted = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("see_self", [False, True])
def test_one_bucket_is_dense_attention_with_shared_queries_and_keys(see_self: bool) -> None:
    part = one_head("reformer", chunk=LENGTH, buckets=1, see_self=see_self)
    x, found = mixing_matrix(part, LENGTH)
    (q,) = projections(part, x, "q")
    scores = q @ F.normalize(q, dim=-1).T * WIDTH**-0.5
    if not see_self:
        scores.fill_diagonal_(-torch.inf)
    torch.testing.assert_close(found, scores.softmax(-1), rtol=1e-9, atol=1e-9)


def test_rounds_of_one_hash_are_one_round() -> None:
    part = one_head("reformer", chunk=4, buckets=6)
    q, v = draw(1, LENGTH, 2, 8), draw(1, LENGTH, 2, 8, seed=1)
    real = torch.ones(1, LENGTH).bool()
    buckets = torch.randint(0, 6, (1, 2, 1, LENGTH), generator=torch.Generator().manual_seed(0))
    once = part.attend(q, v, buckets, real)
    part.rounds = 5
    torch.testing.assert_close(part.attend(q, v, buckets.expand(-1, -1, 5, -1), real), once, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", ({"rounds": 1}, {"rounds": 3}, {"rounds": 2, "causal": True, "same_bucket": True}))
def test_parts_of_the_list_are_the_list(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """One chunk at a time, as a long text would be taken without a gradient, and a text that fills none of them."""
    part = make_part({"part": "reformer", "heads": 2, "chunk": 4, "buckets": 6, **options}, WIDTH)
    initialise(part, 0)
    part.double().eval()
    x, ctx = draw(2, LENGTH + 1, WIDTH), Context(lengths=torch.tensor([LENGTH + 1, 5]))
    whole = part(x, ctx).detach()
    monkeypatch.setattr(reformer, "HELD", 1)
    with torch.no_grad():
        torch.testing.assert_close(part(x, ctx), whole, rtol=1e-12, atol=1e-12)


def test_which_tokens_meet_depends_on_later_ones() -> None:
    """With ``causal`` a later token's value is never read, yet it moves the cuts: the part does not claim to be
    causal, and refuses the rule."""
    part = one_head("reformer", chunk=2, buckets=8, causal=True)
    _, matrix = mixing_matrix(part, LENGTH)
    assert float(matrix.triu(1).abs().max()) < 1e-12
    x, other = draw(1, LENGTH, WIDTH), draw(1, LENGTH, WIDTH)
    other[:, 20:] = draw(1, 10, WIDTH, seed=9)
    assert not torch.allclose(part(x, Context())[:, :20], part(other, Context())[:, :20])
    assert not part.traits.causal and not part.traits.streams
    with pytest.raises(SpecError, match="reformer reads later tokens"):
        part(x, Context(visible=Visible(causal=True)))


def test_rotations_are_new_in_training_calls_with_a_seed_only() -> None:
    part = one_head("reformer", chunk=4, buckets=6)
    x = draw(1, LENGTH, WIDTH)
    assert torch.equal(part(x, Context(seed=1)), part(x, Context(seed=2)))
    part.train()
    assert torch.equal(part(x, Context(seed=1)), part(x, Context(seed=1)))
    assert not torch.allclose(part(x, Context(seed=1)), part(x, Context(seed=2)))
    assert torch.equal(part(x, Context()), part.eval()(x, Context()))


def test_zero_tokens_have_finite_gradients() -> None:
    part = one_head("reformer", chunk=4, buckets=6, rounds=2)
    x = torch.zeros(1, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    part(x, Context()).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_wrong_options() -> None:
    with pytest.raises(SpecError, match="buckets=7 must be even"):
        make_part({"part": "reformer", "heads": 2, "buckets": 7}, WIDTH)
    with pytest.raises(SpecError, match="chunk=0"):
        make_part({"part": "reformer", "heads": 2, "chunk": 0}, WIDTH)
