"""Positions: rotary products depend on distances only, and every published rule gives the published numbers."""

from __future__ import annotations

import math

import pytest
import torch

from formwright.kit.errors import SpecError
from formwright.parts.activations import ACTIVATIONS, activation
from formwright.parts.positions import (
    alibi_slopes,
    check_rotary,
    distance_buckets,
    rotary_angles,
    rotary_frequencies,
    rotate,
    sinusoids,
)

SCALINGS = [
    {"kind": "default"},
    {"kind": "linear", "factor": 4.0},
    {"kind": "dynamic", "factor": 2.0, "original": 64},
    {"kind": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original": 64},
    {"kind": "yarn", "factor": 4.0, "original": 64},
    {"kind": "longrope", "factor": 4.0, "original": 64, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["kind"])
def test_scores_depend_on_the_distance_only(scaling: dict, interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    options = {"scaling": scaling}

    def score(a: int, b: int) -> float:
        turned = []
        for x, place in ((q, a), (k, b)):
            positions = torch.tensor([[place]])
            cos, sin = rotary_angles(positions, 16, options, torch.float64)
            turned.append(rotate(x, cos, sin, interleaved))
        return float((turned[0] * turned[1]).sum())

    assert score(5, 2) == pytest.approx(score(40, 37), abs=1e-9)
    assert score(5, 2) != pytest.approx(score(5, 3), abs=1e-3)


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s["kind"])
@pytest.mark.parametrize("length", [10, 200])
def test_frequencies_equal_those_of_transformers(scaling: dict, length: int) -> None:
    """Expected values: ``transformers.modeling_rope_utils`` 5.17."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = scaling["kind"]
    given = {key: value for key, value in scaling.items() if key not in ("kind", "original")}
    rope = {"rope_type": kind, "rope_theta": 10_000.0, **given}
    if "original" in scaling:
        rope["original_max_position_embeddings"] = scaling["original"]
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=2, max_position_embeddings=64, rope_parameters=rope, vocab_size=8
    )
    if kind == "default":
        theirs, factor = 1 / 10_000 ** (torch.arange(0, 16, 2) / 16), 1.0
    else:
        theirs, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), seq_len=length)
    mine, own_factor = rotary_frequencies(16, {"scaling": scaling}, length)
    torch.testing.assert_close(mine, theirs.float(), rtol=1e-6, atol=1e-9)
    assert own_factor == pytest.approx(factor)


def test_rotating_part_of_a_head_leaves_the_rest() -> None:
    x = torch.randn(1, 3, 2, 10)
    cos, sin = rotary_angles(torch.tensor([[0, 1, 2]]), 4, {}, torch.float32)
    y = rotate(x, cos, sin)
    assert torch.equal(y[..., 4:], x[..., 4:])
    torch.testing.assert_close(y[:, 0], x[:, 0])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


def test_angles_of_new_positions_are_never_those_of_old_ones() -> None:
    for start in (0, 3, 0):
        positions = torch.arange(start, start + 2)[None]
        cos, _ = rotary_angles(positions, 4, {}, torch.float64)
        torch.testing.assert_close(cos[0, :, 0, 0], torch.cos(positions[0].double()))


def test_sinusoids() -> None:
    made = sinusoids(torch.tensor([[0, 3]]), 6, torch.float64)
    for pair in range(3):
        angle = 3 / 10_000 ** (2 * pair / 6)
        assert made[0, 1, 2 * pair].item() == pytest.approx(math.sin(angle))
        assert made[0, 1, 2 * pair + 1].item() == pytest.approx(math.cos(angle))
    assert sinusoids(torch.tensor([[1]]), 5, torch.float32).shape == (1, 1, 5)


def test_alibi_slopes_of_the_paper() -> None:
    """Press et al., 2021: 8 heads get 1/2 ... 1/256; other counts interleave the next finer series."""
    torch.testing.assert_close(alibi_slopes(8), torch.tensor([2.0**-i for i in range(1, 9)]))
    torch.testing.assert_close(alibi_slopes(12)[:8], alibi_slopes(8))
    torch.testing.assert_close(alibi_slopes(12)[8:], torch.tensor([2.0 ** (-0.5 - i) for i in range(4)]))
    assert len(alibi_slopes(1)) == 1


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_equal_those_of_t5(bidirectional: bool) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    distance = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(distance, bidirectional, 32, 128)
    assert torch.equal(distance_buckets(distance, bidirectional, 32, 128), theirs)


def test_what_rotary_refuses() -> None:
    with pytest.raises(SpecError, match=r"unknown rotary option 'thetaa'; did you mean 'theta'"):
        check_rotary({"thetaa": 1})
    with pytest.raises(SpecError, match=r"unknown rotary scaling 'yarnn'; did you mean 'yarn'"):
        check_rotary({"scaling": {"kind": "yarnn"}})
    with pytest.raises(SpecError, match=r"rotary scaling 'linear' needs factor"):
        check_rotary({"scaling": {"kind": "linear"}})


def test_activations_equal_those_of_transformers() -> None:
    from transformers.activations import ACT2FN

    x = torch.linspace(-12, 12, 101, dtype=torch.float64)
    for name in set(ACTIVATIONS) & set(ACT2FN):
        torch.testing.assert_close(activation(name)(x), ACT2FN[name](x), rtol=1e-6, atol=1e-6, msg=name)
    with pytest.raises(SpecError, match=r"unknown activation 'gelo'; did you mean 'gelu'"):
        activation("gelo")
