"""Combiner: attention to every token of the support at the cost of a sparse pattern, O(L sqrt L) or O(L log L).

Ren et al., 2021 (2107.05768). A query sees some tokens directly and all others through regions: one softmax over the
direct tokens and the regions' pooled keys, and inside each region a softmax of the region's own pooled query, which all
queries share. ``reference`` is the definition, for any partition; the fast forms are runs of keys where causal
(:mod:`.runs`), batched products over a grid of tokens where not (:mod:`.plans`), or over pairs of blocks
(:mod:`.logsparse`). All are differentiable any number of times.
"""

from __future__ import annotations

from torch import Tensor

from formwright.kit.errors import SpecError, unknown
from formwright.ops.combiner import runs
from formwright.ops.combiner.grid import grid, scaled
from formwright.ops.combiner.logsparse import logsparse, products
from formwright.ops.combiner.plans import PLANS, Laid, pairs
from formwright.ops.combiner.reference import combiner_reference, partition_attention
from formwright.registry import Paper, register

__all__ = ["NAMES", "POOLS", "combiner", "combiner_macs", "combiner_reference", "partition_attention"]

NAMES = (*PLANS, "logsparse")
POOLS = ("max", "mean")


@register("op", "combiner", paper=Paper("Ren et al.", 2021, "2107.05768"), summary="full support at a sparse cost")
def combiner(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    plan: str,
    block: int | None = None,
    causal: bool = False,
    lengths: Tensor | None = None,
    pool: str = "max",
    features: tuple[Tensor, Tensor] | None = None,
    scale: float | None = None,
) -> Tensor:
    """q, k, v (B, L, H, D), finite in the padding too -> (B, L, H, D); rows hold ``lengths`` (B,) tokens each.

    block: tokens of a row of the grid; default rows of 1, 2, 3 ... tokens where causal, so that both sides grow as
    sqrt(2 L) and no token's row depends on what comes later, else of ceil(sqrt(length)); ``logsparse`` has none.
    features: what is pooled in place of q and k. SpecError for an unknown plan or pool.
    """
    if plan not in NAMES:
        raise SpecError(unknown("plan", plan, NAMES))
    if pool not in POOLS:
        raise SpecError(unknown("pool", pool, POOLS))
    if q.shape[0] == 0 or q.shape[1] == 0:
        return v
    tokens = scaled(q, k, v, features, scale)
    if plan == "logsparse":
        return logsparse(tokens.each(lambda t: t.transpose(1, 2)), causal, lengths, pool).transpose(1, 2)
    if causal:
        cells = runs.cells(q.shape[1], block)
        return runs.PLANS[plan](tokens.each(cells.filled), cells, pool)[:, : q.shape[1]]
    laid = grid(q.shape[1], lengths, block, q.device)
    return laid.read(PLANS[plan](Laid(tokens.each(laid.lay), laid.valid, causal, pool)))


def combiner_macs(plan: str, length: int, block: int | None, causal: bool) -> int:
    """Multiply-accumulates of one head for each of its entries, for one text of ``length``."""
    if plan == "logsparse":
        return products(length, causal)
    return 2 * (runs.pairs(plan, length, block) if causal else pairs(plan, length, block))
