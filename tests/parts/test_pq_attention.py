"""Attention over matching codes: dense when it reads everything, exact counts of keys, and a codebook that learns."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from formwright import build
from formwright.kit.errors import SpecError
from formwright.parts.base import initialise
from formwright.parts.context import Context, Notes
from formwright.parts.mixers.attention import Attention
from formwright.parts.mixers.pq_attention import PQAttention
from formwright.parts.quantizer import ProductQuantizer
from formwright.surgery import apply, plan


def mixer(dtype=torch.float64, **options) -> PQAttention:
    made = PQAttention(32, heads=2, **options).to(dtype).eval()
    with torch.no_grad():
        initialise(made, 0)
    return made


@pytest.mark.parametrize("select", ["codes", "products", "exact"])
@pytest.mark.parametrize("causal", [False, True])
def test_reading_every_key_is_attention(select, causal):
    mine = mixer(causal=causal, fraction=1.0, select=select, rotary={})
    dense = Attention(32, heads=2, causal=causal, rotary={}).double()
    dense.load_state_dict({name: t for name, t in mine.state_dict().items() if "quantizer" not in name})
    x = torch.randn(3, 11, 32, dtype=torch.float64)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    ctx = Context(lengths=torch.tensor([11, 4, 0]))
    a, b = mine(one, ctx), dense(other, ctx)
    valid = ctx.valid(x)
    assert torch.allclose(a[valid], b[valid], atol=1e-12)
    a[valid].square().sum().backward()
    b[valid].square().sum().backward()
    assert torch.allclose(one.grad, other.grad, atol=1e-11)


@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 40), keys=st.integers(1, 12), select=st.sampled_from(["codes", "products", "exact"]))
def test_a_causal_query_reads_its_number_of_distinct_earlier_keys(length, keys, select):
    mine = mixer(causal=True, keys=keys, select=select)
    q, k = (torch.randn(1, length, 2, 16, dtype=torch.float64) for _ in range(2))
    places = torch.arange(length)[None]
    listed = mine._listed(q, k, places, places)
    for row in range(length):
        for head in range(2):
            read = [place for place in listed[0, head, row].tolist() if place >= 0]
            assert len(read) == len(set(read)) == min(keys, row + 1)
            assert max(read) <= row


def test_most_matching_codes_are_read_and_the_nearer_of_equals():
    mine = mixer(keys=2, code_width=16, codewords=2, select="codes")
    with torch.no_grad():
        mine.quantizer.codebook[0, 0].fill_(-1.0)
        mine.quantizer.codebook[0, 1].fill_(1.0)
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, 1.0], dtype=torch.float64)
    q = k = signs[None, :, None, None].expand(1, 6, 2, 16)
    places = torch.arange(6)[None]
    listed = mine._listed(q, k, places, places)
    assert [sorted(row) for row in listed[0, 0].tolist()] == [[0, 2], [1, 3], [0, 2], [1, 3], [4, 5], [4, 5]]


def test_probabilities_are_noted_where_asked():
    mine = mixer(keys=3)
    notes = Notes(want={("", "probs")})
    mine(torch.randn(1, 7, 32, dtype=torch.float64), Context(notes=notes))
    probs = notes.got[("", "probs")]
    assert torch.allclose(probs.sum(-1), torch.ones(1, 2, 7, dtype=torch.float64))
    assert int((probs > 0).sum(-1).max()) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_every_precision(dtype):
    x = torch.randn(2, 9, 32)
    y = mixer(dtype, fraction=1.0)(x.to(dtype), Context())
    wanted = mixer(fraction=1.0)(x.double(), Context())
    assert y.dtype == dtype
    assert (y.double() - wanted).norm() / wanted.norm() < {torch.float32: 1e-5}.get(dtype, 0.05)


def test_its_loss_trains_the_codebook_and_all_else_gets_its_own_gradient():
    mine = mixer().train()
    notes = Notes()
    y = mine(torch.randn(2, 8, 32, dtype=torch.float64), Context(notes=notes, lengths=torch.tensor([8, 3])))
    (y.square().sum() + sum(notes.losses)).backward()
    assert len(notes.losses) == 1
    # A bias shared by all keys moves no softmax.
    assert all(p.grad.abs().sum() > 0 for name, p in mine.named_parameters() if name != "k.bias")


def test_quantizer_loss_by_hand():
    quantizer = ProductQuantizer(2, codewords=2, code_width=2).double()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[[0.0, 0.0], [1.0, 1.0]]]))
    x = torch.tensor([[0.25, 0.25]], dtype=torch.float64)
    soft = 0.25  # distances 0.5 and 1.5, weights 0.75 and 0.25
    assert quantizer.loss(x).item() == pytest.approx((soft - 0.0) ** 2 + 0.25**2)
    assert quantizer.encode(x).tolist() == [[0]]
    assert quantizer.decode(quantizer.encode(torch.tensor([[0.9, 0.8]]))).tolist() == [[1.0, 1.0]]


def test_fitting_brings_codewords_to_the_vectors():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(500, 8, generator=gen) * 0.1 + 3.0
    quantizer = ProductQuantizer(8)
    with torch.no_grad():
        quantizer.reset(gen)
        before = quantizer.loss(x).item()
        quantizer.fit(x, gen)
        assert quantizer.loss(x).item() < 0.01 * before


def test_codebooks_are_fitted_to_evidence():
    from formwright.surgery import samples

    model = samples.decoder()
    ids = samples.tokens()
    drawn, fitted = plan(model, "spt", code_width=4), plan(model, "spt", ids, code_width=4)
    assert not drawn.tensors and set(fitted.tensors) == {"b0.attention", "b1.attention", "b2.attention"}
    apply(model, fitted)
    part = model.item("b0.attention").part
    assert torch.equal(part.quantizer.codebook, fitted.tensors["b0.attention"])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"code_width": 5}, "code_width=5"),
        ({"codewords": 1}, "codewords=1"),
        ({"fraction": 0.0}, "fraction=0"),
        ({"keys": 0}, "keys=0"),
        ({"select": "code"}, "codes"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(SpecError, match=says):
        mixer(**options)


def test_a_share_does_not_stream_and_says_how():
    from formwright.engine.state import State

    with pytest.raises(SpecError, match="keys=N"):
        mixer(causal=True)(torch.randn(1, 3, 32, dtype=torch.float64), Context(state=State(1)))


def test_an_unknown_rule_is_refused():
    with pytest.raises(SpecError, match="keeps no rule"):
        from formwright.parts.context import Visible

        mixer()(torch.randn(1, 3, 32, dtype=torch.float64), Context(visible=Visible(window=2)))


def test_build_from_spec():
    spec = {"stem": {"part": "linear", "features": 3, "width": 32}, "layers": [{"part": "pq-attention", "heads": 2}]}
    assert build(spec, seed=0)(torch.randn(1, 9, 3)).shape == (1, 9, 32)
