"""Visibility, positions and noise, against the plainest way of saying each."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formwright.parts.context import Context, Visible, keyed_generator

rules = st.builds(
    Visible,
    causal=st.booleans(),
    window=st.none() | st.integers(1, 4),
    prefix=st.none() | st.integers(0, 4),
    context=st.none() | st.integers(0, 4),
)


def sees(rule: Visible, q: int, k: int) -> bool:
    """One query and one key, in words."""
    if k < 0:
        return False
    if rule.prefix is not None and k < rule.prefix:
        return True
    if rule.causal and k > q:
        return False
    if rule.window is not None and abs(k - q) >= rule.window:
        return False
    return not (rule.context is not None and k >= rule.context and k != q)


@given(rule=rules, queries=st.lists(st.integers(0, 9), max_size=5), keys=st.lists(st.integers(-2, 9), max_size=5))
def test_a_mask_says_what_the_rule_says(rule: Visible, queries: list[int], keys: list[int]) -> None:
    made = rule.mask(torch.tensor([queries], dtype=torch.long), torch.tensor([keys], dtype=torch.long))
    assert made.shape == (1, len(queries), len(keys))
    assert made[0].tolist() == [[sees(rule, q, k) for k in keys] for q in queries]


@given(one=rules, two=rules, q=st.integers(0, 9), k=st.integers(0, 9))
def test_rules_add_up(one: Visible, two: Visible, q: int, k: int) -> None:
    both = one & two
    if all(rule.prefix is None and rule.context is None for rule in (one, two)):
        assert sees(both, q, k) == (sees(one, q, k) and sees(two, q, k))
    assert both.causal == (one.causal or two.causal)
    assert (Visible().simple, Visible(causal=True).simple, Visible(window=1).simple) == (True, True, False)


def test_segments_and_prefixes_of_rows() -> None:
    places = torch.arange(4)[None].expand(2, -1)
    segments = torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]])
    made = Visible(segments=segments, causal=True).mask(places, places, segments, segments)
    assert made[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    prefix = Visible(causal=True, prefix=torch.tensor([0, 3])).mask(places, places)
    assert prefix[0].int().tolist() == torch.ones(4, 4).tril().int().tolist()
    assert prefix[1, 0].int().tolist() == [1, 1, 1, 0]


def test_where_a_token_stands() -> None:
    x = torch.zeros(2, 3, 4)
    assert Context().place(x).tolist() == [[0, 1, 2]] * 2
    offsets = torch.tensor([0, 2, 2, 3])
    packed = Context(offsets=offsets)
    assert packed.place(x[:1]).tolist() == [[0, 1, 0]]
    assert packed.spans() == [(0, 2), (2, 2), (2, 3)]
    assert packed.valid(x[:1]).all()
    ragged = Context(lengths=torch.tensor([0, 2]))
    assert ragged.valid(x).tolist() == [[False] * 3, [True, True, False]]
    assert ragged.clear(x + float("nan")).isnan().sum() == 2 * 4
    assert Context().clear(x) is x and packed.clear(x) is x
    assert Context(positions=torch.tensor([[7]])).place(x).tolist() == [[7]]


def test_noise_is_keyed_by_seed_and_path() -> None:
    ctx = Context(seed=1).at("b0").at("part")
    assert ctx.path == "b0.part"
    like = torch.zeros(1, dtype=torch.float64)
    before = torch.get_rng_state()
    a = ctx.noise((4,), like)
    assert torch.equal(torch.get_rng_state(), before)
    assert a.dtype == torch.float64 and torch.equal(a, ctx.noise((4,), like))
    others = [ctx.at("x"), ctx.replace(seed=2), ctx.replace(path="b1.part")]
    assert all(not torch.equal(a, other.noise((4,), like)) for other in others)
    assert not torch.equal(a, ctx.noise((4,), like, name="second"))
    uniform = ctx.noise((2000,), like, kind="uniform")
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.05
    assert torch.equal(
        torch.rand(3, generator=keyed_generator(3, "k")), torch.rand(3, generator=keyed_generator(3, "k"))
    )


def test_a_context_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Context().path = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Context().condition["a"] = torch.zeros(1)  # type: ignore[index]
