"""Documents of the state-space dual laid out so that each begins a chunk.

Inside a chunk every token meets every later one in a product, and nothing times NaN is NaN: documents that share a
chunk are apart only while all of it is finite. So a chunk ends where a document does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _since(resets: Tensor) -> Tensor:
    """(B, L): tokens since the document, or the row, began."""
    at = torch.arange(resets.shape[1], device=resets.device)
    return at - torch.where(resets, at, 0).cummax(1).values


def begins(resets: Tensor, chunk: int) -> Tensor:
    """(B, L) bool: tokens at which chunks of at most ``chunk`` tokens begin."""
    return _since(resets) % chunk == 0


def apart(run: Callable[..., tuple[Tensor, Tensor]], given: list[Any], chunk: int) -> tuple[Tensor, Tensor]:
    """``run(x, dt, A, B, C, D, start, resets)`` over rows filled up so that every document begins at a multiple of
    ``chunk``; a token of zeros changes nothing. How long rows get depends on the values of ``resets``."""
    x, dt, A, B, C, D, start, resets = given
    resets = resets.expand(x.shape[:2])
    since = _since(resets)
    index = (since % chunk == 0).cumsum(1) - 1
    places = torch.arange(len(x), device=x.device)[:, None], index * chunk + since % chunk
    length = chunk * (1 + int(index.max())) if index.numel() else 0

    def spread(t: Tensor) -> Tensor:
        return t.new_zeros(len(x), length, *t.shape[2:]).index_put(places, t.expand(*x.shape[:2], *t.shape[2:]))

    y, final = run(spread(x), spread(dt), A, spread(B), spread(C), D, start, spread(resets))
    return y[places], final
