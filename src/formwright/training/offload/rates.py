"""How fast this machine copies between host and device and updates on either: measured once, median of three.

Cost: a few tenths of a second and 64 MiB on each side.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch.optim.adamw import adamw as adamw_

from formwright.training.offload.schedule import Rates

#: Numbers in a probe.
PROBE = 1 << 22


def measured(device: torch.device, width: int = 4) -> Rates:
    """Rates between the host and ``device``; width: bytes of a weight on the device."""
    pinned = device.type == "cuda"
    host = torch.zeros(PROBE, pin_memory=pinned)
    there = torch.zeros(PROBE, device=device)

    def seconds(run: Callable[[], object]) -> float:
        run()
        taken = []
        for _ in range(3):
            started = time.perf_counter()
            run()
            if pinned:
                torch.cuda.synchronize(device)
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def update(place: torch.device) -> float:
        weight, gradient, mean, square = (torch.zeros(PROBE, device=place) for _ in range(4))
        steps = [torch.zeros((), device=place)]

        def run() -> None:
            adamw_(
                [weight], [gradient], [mean], [square], [], steps, fused=True, amsgrad=False, beta1=0.9, beta2=0.999,
                lr=1e-3, weight_decay=0.0, eps=1e-8, maximize=False,
            )  # fmt: skip

        return PROBE / seconds(run)

    low = torch.zeros(PROBE, dtype=torch.bfloat16)
    return Rates(
        up=4 * PROBE / seconds(lambda: there.copy_(host, non_blocking=True)),
        down=4 * PROBE / seconds(lambda: host.copy_(there, non_blocking=True)),
        host=update(torch.device("cpu")),
        device=update(device),
        cast=math.inf if width == 4 else PROBE / seconds(lambda: low.copy_(host)),
    )
