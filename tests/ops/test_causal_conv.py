"""Short causal convolution: the general form equals the definition in both layouts and over any split of a stream."""

from __future__ import annotations

import pytest
import torch

from formwright.kit.errors import SpecError
from formwright.ops.causal_conv import causal_conv, causal_conv_reference


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("length", [0, 1, 7])
@pytest.mark.parametrize("silu", [False, True])
def test_equals_the_definition(length: int, silu: bool) -> None:
    lengths = torch.tensor([length, 0, length // 2])
    given = (drawn(3, length, 5), drawn(5, 4), drawn(5))
    found = causal_conv(*given, initial=drawn(3, 3, 5), lengths=lengths, silu=silu)
    for mine, theirs in zip(found, causal_conv_reference(*given, drawn(3, 3, 5), lengths, silu)):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_packed_documents_and_splits_change_nothing() -> None:
    x, weight = drawn(1, 9, 5), drawn(5, 3)
    whole, last = causal_conv(x, weight)
    first, window = causal_conv(x[:, :4], weight)
    second, end = causal_conv(x[:, 4:], weight, initial=window)
    torch.testing.assert_close(torch.cat((first, second), 1), whole)
    assert torch.equal(end, last)
    packed, _ = causal_conv(x, weight, offsets=torch.tensor([0, 4, 4, 9]))
    torch.testing.assert_close(packed, torch.cat((first, causal_conv(x[:, 4:], weight)[0]), 1))


def test_what_does_not_fit_is_named() -> None:
    with pytest.raises(SpecError, match="9 taps"):
        causal_conv(drawn(1, 4, 5), drawn(5, 9))
    with pytest.raises(SpecError, match="weight is for"):
        causal_conv(drawn(1, 4, 6), drawn(5, 3))
