"""Small labelled sequences that LMUFormer's proof learns: written digits step by step, and short sounds in noise."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from formwright.kit.errors import DataError


class Rows(NamedTuple):
    """values (N, L, features) and labels (N,) to learn from, and others to test with."""

    values: Tensor
    labels: Tensor
    tested: Tensor
    wanted: Tensor


def digits(by: str, seed: int) -> Rows:
    """scikit-learn's 1,797 digits of 8 x 8, a quarter held out: ``by`` "row" (8 steps of 8) or "pixel" (64 steps of 1
    in an order drawn once). Each one to learn from comes also shifted by a pixel to each of four sides."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from None
    held = load_digits()
    images = torch.tensor(held.images, dtype=torch.float32) / 8 - 1
    labels = torch.tensor(held.target, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    learned, tested = order[len(order) // 4 :], order[: len(order) // 4]
    shifts = [(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    moved = torch.cat([padded[learned, 1 + i : 9 + i, 1 + j : 9 + j] for i, j in shifts])
    places = torch.randperm(64, generator=torch.Generator().manual_seed(0))

    def steps(pictures: Tensor) -> Tensor:
        return pictures if by == "row" else pictures.flatten(1)[:, places, None]

    return Rows(steps(moved), labels[learned].repeat(len(shifts)), steps(images[tested]), labels[tested])


#: Frequencies (start, middle, end) of each sound, as shares of the highest.
SOUNDS = (
    (0.25, 0.25, 0.25),
    (0.65, 0.65, 0.65),
    (0.2, 0.45, 0.7),
    (0.7, 0.45, 0.2),
    (0.25, 0.65, 0.25),
    (0.65, 0.25, 0.65),
    (0.25, 0.25, 0.65),
    (0.65, 0.25, 0.25),
)


def sounds(count: int, frames: int, bands: int, seed: int) -> tuple[Tensor, Tensor]:
    """(count, frames, bands) log energies of tones and chirps in noise, and which of ``SOUNDS`` each is.

    A sound takes 35 to 50 % of the time and begins in the first fifth.
    """
    generator = torch.Generator().manual_seed(seed)
    hop, window = 2 * bands, 4 * bands
    samples = hop * (frames - 1)

    def drawn(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, generator=generator)

    labels = torch.randint(len(SOUNDS), (count,), generator=generator)
    start, length = drawn(0.0, 0.2), drawn(0.35, 0.5)
    place = (torch.arange(samples) / samples - start) / length
    course = torch.tensor(SOUNDS)[labels] + drawn(-0.04, 0.04)
    share = place.clamp(0, 1) * 2
    first = course[:, :1] + (course[:, 1:2] - course[:, :1]) * share
    second = course[:, 1:2] + (course[:, 2:] - course[:, 1:2]) * (share - 1)
    frequency = torch.where(share < 1, first, second)
    heard = torch.sin(math.pi * frequency.cumsum(1)) * ((place >= 0) & (place < 1))
    wave = drawn(0.5, 1.0) * heard + 0.3 * torch.randn(count, samples, generator=generator)
    spectrum = torch.stft(wave, window, hop, window=torch.hann_window(window), return_complex=True).abs().square()
    energies = spectrum[:, : 2 * bands].unflatten(1, (bands, 2)).sum(2)
    values = torch.log(energies + 1e-3).transpose(1, 2)
    return (values - values.mean()) / values.std(), labels


def fit(model: Any, values: Tensor, labels: Tensor, epochs: int, seed: int, lr: float, batch: int = 50) -> Any:
    """Adam with a decaying rate on cross-entropy; returns the model in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.95, 0.999))
    total = epochs * math.ceil(len(values) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / total))
    )
    model.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(values), generator=generator).split(batch):
            loss = F.cross_entropy(model(values[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def accuracy(model: Any, values: Tensor, labels: Tensor) -> float:
    return float((model(values).argmax(-1) == labels).float().mean())
