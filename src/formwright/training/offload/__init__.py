"""Deep Optimizer States: AdamW's state on the host, its update shared between host and device, copies overlapped.

Maurya, Ye, Rafique, Cappello and Nicolae, 2024 (2410.21316). Parameters are cut into subgroups; with stride k every
k-th is carried to the device, updated there and carried back while the host updates the others. Cost: 12 bytes a
parameter on the host; on the device two subgroups in flight. See :mod:`.schedule` for what a step takes.

    optimizer = Interleaved(model.parameters(), lr=3e-4, subgroup=100_000_000)
"""

from formwright.training.offload.lanes import Clock, Race, Threads
from formwright.training.offload.optimizer import Interleaved
from formwright.training.offload.schedule import Rates, Sizes, balanced_stride, best_stride, places, predicted

__all__ = [
    "Clock",
    "Interleaved",
    "Race",
    "Rates",
    "Sizes",
    "Threads",
    "balanced_stride",
    "best_stride",
    "places",
    "predicted",
]
