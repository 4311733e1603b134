"""Linear attention: keys and values are summed once, and every query reads the sums.

    o_t = phi(q_t)^T S_t / (phi(q_t)^T z_t),   S_t = sum_{s <= t} phi(k_s) v_s^T,   z_t = sum_{s <= t} phi(k_s)

Katharopoulos et al., 2020 (2006.16236). Queries and keys come already mapped by phi. A column of ones behind the values
makes z one more column of S, so that the whole op is one causal product (see ``product``) and a division; without
``causal`` the sums run over the whole document. ``reference`` is the definition. Cost: 2 D (E + 1)
multiply-accumulates a token and head, and (D + E + 1) CHUNK inside chunks when causal. State: D (E + 1) a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.ops.linear_attention.product import by_document, causal_product, causal_product_macs
from formwright.ops.linear_attention.reference import linear_attention_reference
from formwright.registry import Paper, register

__all__ = ["causal_product", "linear_attention", "linear_attention_macs", "linear_attention_reference"]


@register(
    "op",
    "linear_attention",
    paper=Paper("Katharopoulos et al.", 2020, "2006.16236"),
    summary="attention by sums of mapped keys and values",
)
def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    state: Tensor | None = None,
    borders: Sequence[int] | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """q and k (B, L, H, D), mapped and not negative, v (B, L, H, E) -> o (B, L, H, E), the state behind the last token.

    ``state`` (B, H, D, E + 1) holds the sums so far of k [v, 1]^T; None stands for zeros. ``borders`` (0, ..., L) are
    those of documents laid end to end in one row (B = 1); each has a state of its own, (documents, H, D, E + 1).
    A token that shall not count has k = 0. ``eps`` is added to the divisor, so a query that meets no key gives zeros.
    Half precision is summed in float32, which is then the state's dtype; o has the dtype of v.
    """
    exact = torch.promote_types(v.dtype, torch.float32)
    q, k, values = q.to(exact), k.to(exact), F.pad(v.to(exact), (0, 1), value=1.0)
    start = None if state is None else state.to(exact)
    if causal:
        sums, state = causal_product(q, k, values, start, borders)
    else:
        sums, state = by_document(_whole, (q, k, values), start, borders)
    return (sums[..., :-1] / (sums[..., -1:] + eps)).to(v.dtype), state


def _whole(q: Tensor, k: Tensor, values: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every query reads the sums over all keys of its row."""
    total = k.permute(0, 2, 3, 1) @ values.transpose(1, 2)
    total = total if start is None else total + start
    return (q.transpose(1, 2) @ total).transpose(1, 2), total


def linear_attention_macs(length: int, inner: int, outer: int, causal: bool) -> int:
    """Multiply-accumulates of one row and head of ``length`` tokens; ``inner`` features, ``outer`` values."""
    return causal_product_macs(length, inner, outer + 1) if causal else 2 * length * inner * (outer + 1)
