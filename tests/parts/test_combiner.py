"""Combiner: every fast plan is its partition written out, with the support and ranks it promises."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from formwright.kit.errors import SpecError
from formwright.ops.attention import attention
from formwright.ops.combiner import NAMES, POOLS, combiner, combiner_reference
from formwright.ops.combiner.reference import partitions
from formwright.parts.context import Context, Visible
from formwright.parts.make import make_part

CASES = [(plan, causal, block) for plan, causal in product(NAMES, (True, False)) for block in (None, 3, 20)]
CASES = [case for case in CASES if case[0] != "logsparse" or case[2] is None]
each = pytest.mark.parametrize("plan, causal, block", CASES)


def draw(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, length, 2, 4, generator=generator, dtype=torch.float64)
    return q, k, v


@each
@pytest.mark.parametrize("pool", POOLS)
def test_fast_form_is_the_partition_written_out(plan: str, causal: bool, block: int | None, pool: str) -> None:
    for length in (0, 1, 2, 7, 12, 17):
        q, k, v = draw(3, length)
        features = (torch.relu(q + 0.1), torch.relu(k - 0.1))
        for lengths in (None, torch.tensor([length, length // 2, 0])):
            how = {"plan": plan, "causal": causal, "block": block, "pool": pool}
            found = combiner(q, k, v, **how, lengths=lengths, features=features)  # type: ignore[arg-type]
            wanted, _ = combiner_reference(q, k, v, **how, lengths=lengths, features=features)  # type: ignore[arg-type]
            if lengths is not None:
                found = found * (torch.arange(length) < lengths[:, None])[..., None, None]
            torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)


@each
def test_gradients_are_those_of_the_partition(plan: str, causal: bool, block: int | None) -> None:
    found, wanted = (tuple(t.requires_grad_() for t in draw(1, 11)) for _ in range(2))
    combiner(*found, plan=plan, causal=causal, block=block).square().sum().backward()
    combiner_reference(*wanted, plan=plan, causal=causal, block=block)[0].square().sum().backward()
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


@each
def test_effective_matrix_has_full_support(plan: str, causal: bool, block: int | None) -> None:
    """Read from the fast form: values that are unit vectors come out as the rows of the matrix."""
    length = 13
    q, k, _ = draw(1, length)
    units = torch.eye(length, dtype=torch.float64)[None, :, None].expand(-1, -1, 2, -1)
    matrix = combiner(q, k, units, plan=plan, causal=causal, block=block)[0].transpose(0, 1)
    seen = torch.ones(length, length, dtype=torch.bool)
    seen = seen.tril() if causal else seen
    torch.testing.assert_close(matrix.sum(-1), torch.ones(2, length, dtype=torch.float64))
    assert (matrix[:, seen] > 0).all() and not matrix[:, ~seen].any()


@pytest.mark.parametrize("causal", [True, False])
def test_partitions_are_partitions(causal: bool) -> None:
    for plan, block, length in product(NAMES, (None, 1, 4), (1, 2, 9, 21)):
        for partition in partitions(plan, length, block, causal):
            for i, seen in enumerate(partition):
                members = [*seen.direct, *(j for region in seen.regions for j in region.members)]
                assert sorted(members) == list(range(i + 1 if causal else length))


def test_logsparse_blocks_tile_the_past_exactly() -> None:
    for i, seen in enumerate(partitions("logsparse", 200, None, True)[0]):
        sizes = [len(region.members) for region in seen.regions]
        assert len(seen.direct) + len(sizes) == 1 + i.bit_count()
        assert all(region.members[0] % len(region.members) == 0 for region in seen.regions)


@pytest.mark.parametrize("causal", [True, False])
def test_one_row_or_blocks_of_one_are_plain_attention(causal: bool) -> None:
    q, k, v = draw(2, 14)
    wanted = attention(q, k, v, causal=causal)
    for plan, block in [*((plan, 14) for plan in NAMES if plan != "logsparse"), ("fixed", 1)]:
        torch.testing.assert_close(combiner(q, k, v, plan=plan, causal=causal, block=block), wanted)


def test_a_region_has_rank_one() -> None:
    q, k, v = draw(1, 12)
    matrix = combiner_reference(q, k, v, plan="fixed", block=4, causal=True)[1][0, 0]
    assert torch.linalg.matrix_rank(matrix[8:, :4]) == 1 and torch.linalg.matrix_rank(matrix[:4, :4]) == 4


def test_bad_options_and_rules() -> None:
    for options, words in (
        ({"heads": 3}, "heads=3"),
        ({"heads": 4, "block": 0}, "block=0"),
        ({"heads": 4, "plan": "logsparse", "block": 4}, "takes none"),
        ({"heads": 4, "plan": "fixd"}, "plan"),
        ({"heads": 4, "scale": -1.0}, "above 0"),
        ({"heads": 4, "rotary": {"width": 9}}, "cannot be 9"),
    ):
        with pytest.raises(SpecError, match=words):
            make_part({"part": "combiner", **options}, 32)
    part = make_part({"part": "combiner", "heads": 4}, 32)
    for rule in (Visible(causal=True), Visible(window=3)):
        with pytest.raises(SpecError, match="no rule of visibility"):
            part(torch.zeros(1, 4, 32), Context(visible=rule))
    q, k, v = draw(1, 3)
    with pytest.raises(SpecError, match="did you mean 'fixed'"):
        combiner(q, k, v, plan="fixd")
    with pytest.raises(SpecError, match="unknown pool"):
        combiner(q, k, v, plan="fixed", pool="sum")
