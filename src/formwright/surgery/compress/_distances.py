"""How far one output is from another: the distances by which FinerCut ranks sublayers.

z is the original's output and y the changed model's, (T, V) rows of logits (or vectors), p = softmax(z) and
q = softmax(y); means run over rows.

    js            (KL(p||m) + KL(q||m)) / 2 with m = (p + q) / 2
    kl            KL(p||q)
    published-js  (KL(m||p) + KL(m||q)) / 2, averaged over the vocabulary too: what the authors' code computes
    angular       arccos of the cosine of z and y, clamped to [0, 1]
    cosine        1 - cos(z, y)
    norm          Frobenius norm of z - y over each sequence, mean over sequences

Every one is exactly zero where z = y, to the last bit, and is summed in float64. Cost: a pass over the logits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

#: Entries of z worked on at once, so that temporaries stay small beside the logits.
CHUNK = 1 << 21


def _js(z: Tensor, y: Tensor) -> Tensor:
    # With d = (p - q) / (p + q): KL terms p log(p/m) = m (1 + d) log1p(d), so equal p and q give an exact zero.
    p, q = torch.softmax(z, -1), torch.softmax(y, -1)
    total = p + q
    d = torch.where(total > 0, (p - q) / total, 0.0)
    terms = torch.special.xlog1py(1 + d, d) + torch.special.xlog1py(1 - d, -d)
    return (total * terms).sum(-1, dtype=torch.float64) / 4


def _kl(z: Tensor, y: Tensor) -> Tensor:
    p, q = torch.log_softmax(z, -1), torch.log_softmax(y, -1)
    weight = p.exp()
    return torch.where(weight > 0, weight * (p - q), 0.0).sum(-1, dtype=torch.float64)


def _published_js(z: Tensor, y: Tensor) -> Tensor:
    p, q = torch.log_softmax(z, -1), torch.log_softmax(y, -1)
    m = (p.exp() + q.exp()) / 2
    # log m - log p = log((1 + e^t) / 2) with t = log q - log p, and the same with -t: their sum in a form that neither
    # overflows nor misses zero at t = 0.
    t = (q - p).abs()
    terms = torch.where(m > 0, m * (t + 2 * torch.log1p(torch.expm1(-t) / 2)), 0.0)
    return terms.sum(-1, dtype=torch.float64) / 2 / z.shape[-1]


def _apart(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    u, v = (torch.nn.functional.normalize(t.double(), dim=-1) for t in (z, y))
    return (u - v).norm(dim=-1), (u + v).norm(dim=-1)


def _angular(z: Tensor, y: Tensor) -> Tensor:
    apart, together = _apart(z, y)
    return (2 * torch.atan2(apart, together)).clamp(max=torch.pi / 2)


def _cosine(z: Tensor, y: Tensor) -> Tensor:
    return _apart(z, y)[0].square() / 2


def _squares(z: Tensor, y: Tensor) -> Tensor:
    return (z - y).double().square().sum(-1)


_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "js": _js,
    "kl": _kl,
    "published-js": _published_js,
    "angular": _angular,
    "cosine": _cosine,
    "norm": _squares,
}
NAMES = tuple(_ROWS)


def distance(name: str, z: Tensor, y: Tensor, sizes: Tensor) -> tuple[float, int]:
    """(sum, count) of the distance of y (T, V) to z; ``sizes`` (S,) says how many rows each sequence has."""
    step = max(1, CHUNK // max(1, z.shape[-1]))
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    rows = torch.cat([_ROWS[name](a.to(wide), b.to(wide)) for a, b in zip(z.split(step), y.split(step))])
    if name == "norm":
        each = torch.segment_reduce(rows, "sum", lengths=sizes[sizes > 0])
        return float(each.sqrt().sum()), len(each)
    return float(rows.sum()), len(rows)
