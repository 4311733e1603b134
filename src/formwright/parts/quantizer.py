"""Product quantization: a vector as a few short codes, one for each stretch of its entries.

Jegou, Douze and Schmid, 2011; as trained within attention by Gui et al., 2023 (2310.10365): distances are sums of
absolute differences, and a code is the nearest of ``codewords`` points. Cost: width x codewords additions a vector; a
vector's codes take one byte for each stretch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import SpecError

#: Distances are at least this, so that their inverses are finite.
LEAST = 1e-5
#: Differences held at once while encoding.
NUMBERS = 1 << 22


class ProductQuantizer(nn.Module):
    """``codebook`` (stretches, codewords, code_width); ``width`` is what it encodes."""

    def __init__(self, width: int, codewords: int = 16, code_width: int = 8) -> None:
        super().__init__()
        if code_width < 1 or width % code_width:
            raise SpecError(f"code_width={code_width} does not divide the head width {width}")
        if not 2 <= codewords <= 256:
            raise SpecError(f"codewords={codewords} must be from 2 to 256, so that a code is one byte")
        self.codebook = nn.Parameter(torch.empty(width // code_width, codewords, code_width))

    def reset(self, generator: torch.Generator) -> None:
        self.codebook.copy_(torch.randn(self.codebook.shape, generator=generator))

    def stretches(self, x: Tensor) -> Tensor:
        """(..., width) -> (stretches, n, code_width)."""
        return x.reshape(-1, *self.codebook.shape[::2]).transpose(0, 1)

    def distances(self, x: Tensor) -> Tensor:
        """(..., width) -> (stretches, n, codewords), in float32 at least."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.cdist(self.stretches(x.to(wide)), self.codebook.to(wide), p=1.0)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """(..., width) -> codes (..., stretches) uint8."""
        flat = x.reshape(-1, x.shape[-1])
        size = max(1, NUMBERS // max(1, self.codebook.numel()))
        found = [self.distances(part).argmin(-1).T for part in flat.split(size)]
        codes = torch.cat(found) if found else flat.new_zeros(0, len(self.codebook))
        return codes.to(torch.uint8).reshape(*x.shape[:-1], len(self.codebook))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (..., stretches) -> (..., width)."""
        stretch = torch.arange(len(self.codebook), device=codes.device)
        return self.codebook[stretch, codes.long()].flatten(-2)

    def products(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., stretches, codewords): of each stretch with each of its codewords."""
        return torch.einsum("...mw,mew->...me", x.unflatten(-1, (len(self.codebook), -1)), self.codebook.to(x.dtype))

    def loss(self, x: Tensor) -> Tensor:
        """The mean squared gap of softly chosen points to the nearest, and of x to the nearest; () float.

        Soft weights are inverse distances, normalised. Nothing is held fixed: codewords move to the vectors and the
        vectors to the codewords.
        """
        z, book = self.stretches(x), self.codebook.to(x.dtype)
        inverse = 1.0 / torch.cdist(z, book, p=1.0).clamp(min=LEAST)
        soft = (inverse / inverse.sum(-1, keepdim=True)) @ book
        hard = torch.gather(book, 1, inverse.argmax(-1)[..., None].expand_as(z))
        return F.mse_loss(soft, hard) + F.mse_loss(z, hard)

    @torch.no_grad()
    def fit(self, x: Tensor, generator: torch.Generator, rounds: int = 10) -> None:
        """Set the codebook by k-medians on ``x`` (n, width): medians are what sums of absolute differences ask for.

        A codeword that no vector is nearest to is put on a random one.
        """
        z = self.stretches(x)
        starts = torch.randint(0, z.shape[1], self.codebook.shape[:2], generator=generator)
        book = torch.gather(z, 1, starts[..., None].expand(-1, -1, z.shape[-1]).to(z.device)).clone()
        for _ in range(rounds):
            nearest = torch.cdist(z, book, p=1.0).argmin(-1)
            for stretch, (points, owner) in enumerate(zip(z, nearest)):
                for code in range(book.shape[1]):
                    mine = points[owner == code]
                    if len(mine):
                        book[stretch, code] = mine.median(0).values
                    else:
                        book[stretch, code] = points[int(torch.randint(0, len(points), (1,), generator=generator))]
        self.codebook.copy_(book)
