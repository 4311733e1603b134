"""What a Legendre memory answers to an impulse and to a start, kept for each (order, theta, dtype, device).

All powers are taken in float64 and rounded once: repeated products in float32 would drift.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from formwright.ops.legendre_memory.reference import matrices


@functools.lru_cache(maxsize=64)
def powers(order: int, theta: float, index: int) -> np.ndarray:
    """transition^(2^index) in float64."""
    if index == 0:
        return matrices(order, theta)[0]
    root = powers(order, theta, index - 1)
    return root @ root


#: Norm of a power of the transition below which it leaves nothing of a memory, not even in float64.
NOTHING = 1e-15


@functools.lru_cache(maxsize=256)
def size_of(order: int, theta: float, index: int) -> float:
    """The norm of transition^(2^index)."""
    return float(np.linalg.norm(powers(order, theta, index)))


def reach(order: int, theta: float, length: int) -> int:
    """Of ``length`` steps, those in which a memory at their start is still felt: a power of two, or all."""
    index = 0
    while 2**index < length and size_of(order, theta, index) > NOTHING:
        index += 1
    return min(2**index, length)


class Response:
    """See the module. Lengths are rounded up to a power of two, so that few are ever computed."""

    def __init__(self, order: int, theta: float, dtype: torch.dtype, device: torch.device) -> None:
        self.order, self.theta, self.dtype, self.device = order, theta, dtype, device
        self._impulse = np.zeros((0, order))
        self._values = torch.zeros(0, order, dtype=dtype, device=device)
        self._spectra: dict[int, Tensor] = {}
        self._powers: dict[int, Tensor] = {}

    def impulse(self, length: int) -> Tensor:
        """H (length, order): the memory 0, 1, ... steps after an impulse."""
        if len(self._values) < length:
            values = matrices(self.order, self.theta)[1][None]
            index = 0
            while len(values) < length:
                values = np.concatenate((values, values @ powers(self.order, self.theta, index).T))
                index += 1
            self._values = self._made(values)
        return self._values[:length]

    def spectrum(self, length: int) -> Tensor:
        """The transform of H, padded to 2 length, along time: (length + 1, order), complex."""
        if length not in self._spectra:
            if len(self._spectra) >= 8:
                self._spectra.clear()
            with torch.inference_mode(False):
                self._spectra[length] = torch.fft.rfft(self.impulse(length), 2 * length, dim=0)
        return self._spectra[length]

    def power(self, index: int) -> Tensor:
        """transition^(2^index), transposed, (order, order)."""
        if index not in self._powers:
            self._powers[index] = self._made(powers(self.order, self.theta, index).T)
        return self._powers[index]

    def after(self, start: Tensor, length: int) -> Tensor:
        """start (B, order) -> transition^t start for t = 1 .. length, (B, length, order), by doubling."""
        steps = (start @ self.power(0))[:, None]
        index = 0
        while steps.shape[1] < length:
            steps = torch.cat((steps, steps[:, : length - steps.shape[1]] @ self.power(index)), 1)
            index += 1
        return steps

    def _made(self, values: np.ndarray) -> Tensor:
        # Kept for later calls, which may want gradients: a tensor born in inference mode could not be saved for them.
        with torch.inference_mode(False):
            return torch.tensor(values, dtype=self.dtype, device=self.device)


_cached = functools.lru_cache(maxsize=32)(Response)


def response_of(order: int, theta: float, like: Tensor) -> Response:
    """The response for the dtype and device of ``like``; a passing one while torch is traced or watched, since a
    tensor made there is not one to keep."""
    watched = torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()
    made = Response if watched or torch.compiler.is_compiling() else _cached
    return made(order, theta, like.dtype, like.device)
