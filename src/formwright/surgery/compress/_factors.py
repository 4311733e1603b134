"""Two factors of a weight W (out, in): first (r, in) and second (out, r) with second first close to W.

svd       U U^T W with the r leading left singular vectors of W: least error of the weight (Eckart and Young, 1936).
whitened  U U^T W with those of W L, where L L^T = C is the covariance of the inputs: least error of the *output* over
          those inputs, since W L holds the outputs' principal axes. Where there is a bias it takes up the mean of
          what is lost, so C may be taken about the mean, which loses less still.
snmf      semi-non-negative: first >= 0 (Ding et al., 2010), by multiplicative updates from the SVD.
random    normal factors; the start of training from scratch, and the zero point of comparisons.

The length of each row of U^T W (for ``svd`` the singular value) goes half to each side (``sqrt``, which trains better)
or all into first (``left``). Cost: the eigenvectors of the smaller of W C W^T and L^T W^T W L, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from formwright.kit.errors import DataError, SpecError, unknown

SOLVERS = ("svd", "whitened", "random", "snmf")
SPLITS = ("sqrt", "left")
#: Share of the mean variance added to every variance, so that directions no input took are kept apart from nothing.
RIDGE = 1e-6
SNMF_ROUNDS = 10


@dataclass(frozen=True)
class Inputs:
    """What a slot was given: the mean (in,) and the covariance (in, in), about the mean or, without bias, about 0."""

    covariance: Tensor
    mean: Tensor | None = None

    def wide(self) -> Tensor:
        """C in float64, a little of the mean variance added to each."""
        c = self.covariance.double()
        ridge = RIDGE * c.diagonal().mean().clamp(min=1e-30)
        return c + ridge * torch.eye(len(c), dtype=c.dtype, device=c.device)

    def root(self) -> Tensor:
        """L with L L^T = C. Sums rounded to float32 may leave C a little indefinite; the ridge then grows."""
        c = self.wide()
        step = torch.eye(len(c), dtype=c.dtype, device=c.device) * c.diagonal().abs().mean()
        for ridge in (0.0, *(RIDGE * 10.0**power for power in range(6))):
            found, failed = torch.linalg.cholesky_ex(c + ridge * step)
            if not failed:
                return found
        raise DataError("the covariance of a slot's inputs is no covariance: its entries are not finite")


@dataclass(frozen=True)
class Factors:
    first: Tensor
    second: Tensor
    #: What to add to the bias.
    shift: Tensor | None = None


def axes(weight: Tensor, inputs: Inputs | None = None, vectors: bool = True) -> tuple[Tensor, Tensor]:
    """(energies (n,), U (out, n)) of W or W L, largest first; n is the smaller side. Without ``vectors`` U is empty."""
    w = weight.detach().double()
    rows, columns = w.shape
    if rows <= columns:
        gram = w @ w.T if inputs is None else w @ inputs.wide() @ w.T
        root = None
    else:
        root = None if inputs is None else inputs.root()
        w = w if root is None else w @ root
        gram = w.T @ w
    if not vectors:
        return torch.linalg.eigvalsh(gram).flip(0).clamp(min=0), w.new_zeros(rows, 0)
    energies, found = torch.linalg.eigh(gram)
    energies, found = energies.flip(0).clamp(min=0), found.flip(1)
    if rows <= columns:
        return energies, found
    lengths = energies.sqrt()
    # Axes without energy have no direction; they add nothing and may be zero.
    seen = lengths > 1e-12 * lengths[0].clamp(min=1e-300)
    return energies, torch.where(seen, w @ found / lengths.clamp(min=1e-300), 0.0)


def factorise(
    weight: Tensor,
    rank: int,
    solver: str = "svd",
    split: str = "sqrt",
    inputs: Inputs | None = None,
    generator: torch.Generator | None = None,
) -> Factors:
    """Factors of ``weight`` in its own dtype. ``inputs`` for "whitened", ``generator`` for "random"."""
    if solver not in SOLVERS:
        raise SpecError(unknown("solver", solver, SOLVERS))
    if split not in SPLITS:
        raise SpecError(unknown("split", split, SPLITS))
    if solver == "whitened" and inputs is None:
        raise SpecError("the whitened solver needs the inputs' covariance")
    wide = weight.detach().double()
    rows, columns = wide.shape
    shift = None
    if solver == "random":
        first = torch.randn(rank, columns, generator=generator, dtype=torch.float64).to(wide) * columns**-0.5
        second = torch.randn(rows, rank, generator=generator, dtype=torch.float64).to(wide) * rank**-0.5
    elif solver == "snmf":
        first, second = _snmf(wide, rank)
    else:
        used = inputs if solver == "whitened" else None
        second = axes(wide, used)[1][:, :rank]
        first = second.T @ wide
        if split == "sqrt":
            lengths = first.norm(dim=1).clamp(min=1e-300).sqrt()
            first, second = first / lengths[:, None], second * lengths
        if used is not None and used.mean is not None:
            mean = used.mean.double()
            shift = wide @ mean - second @ (first @ mean)
    return Factors(first.to(weight), second.to(weight), None if shift is None else shift.to(weight))


def _snmf(wide: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """W ~ F G^T with G >= 0: F by least squares, G by its multiplicative update."""
    g = (axes(wide)[1][:, :rank].T @ wide).T.abs() + 0.2 * wide.abs().mean()
    for _ in range(SNMF_ROUNDS):
        f = _least_squares(wide, g)
        cross, square = wide.T @ f, f.T @ f
        above = cross.clamp(min=0) + g @ (-square).clamp(min=0)
        below = (-cross).clamp(min=0) + g @ square.clamp(min=0)
        g = g * (above / below.clamp(min=1e-12)).sqrt()
    return g.T, _least_squares(wide, g)


def _least_squares(wide: Tensor, g: Tensor) -> Tensor:
    """F that makes F G^T closest to W."""
    gram = g.T @ g
    ridge = 1e-9 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(gram + ridge, g.T @ wide.T).T
