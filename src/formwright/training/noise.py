"""Noise of a run: keyed by (seed, step, micro-batch), with the caller's own generators left as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from formwright.parts.context import keyed_generator


def step_seed(seed: int, step: int, part: int = 0) -> int:
    """The seed of one micro-batch, a function of (run seed, step, micro-batch)."""
    return keyed_generator(seed, f"step {step}.{part}").initial_seed()


@contextlib.contextmanager
def private_random(seed: int, device: torch.device) -> Iterator[None]:
    """Within, PyTorch's own generators start from ``seed``; the caller's are put back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed & 0x7FFF_FFFF_FFFF_FFFF)
        yield
