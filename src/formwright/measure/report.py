"""``measure``: what one model costs and, with a task, how good it is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from formwright.kit.errors import SpecError
from formwright.measure.timing import Timing, alternate
from formwright.measure.workload import Workload, workload
from formwright.parts.base import Shape


@dataclass(frozen=True)
class Measurement:
    """bytes: of parameters and buffers as they lie in memory. macs: multiply-accumulates of one call of ``shape``.

    ms: milliseconds of that call (median); ms_item: of one text or token of it; per_second: items a second.
    """

    model: str
    parameters: int
    bytes: int
    macs: int
    state_bytes: int
    shape: str
    ms: float
    ms_item: float
    per_second: float
    spread: float
    noisy: bool
    threads: int
    quality: float | None = None
    metric: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def model_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, each storage once."""
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[(tensor.data_ptr(), tensor.numel(), tensor.dtype)] = tensor.numel() * tensor.element_size()
    return sum(seen.values())


def model_parameters(model: torch.nn.Module) -> int:
    """Numbers that the model holds, quantised ones included and index buffers not."""
    count = sum(p.numel() for p in model.parameters())
    return count + sum(b.numel() for b in model.buffers() if b.dtype in (torch.int8, torch.uint8))


def macs(model: Any, shape: Shape) -> int:
    return model.cost(shape).macs


def measured(model: Any, load: Workload, timing: Timing) -> dict[str, Any]:
    """The figures of one model on one workload, from a timing already taken."""
    cost = model.cost(load.shape)
    return {
        "parameters": model_parameters(model),
        "bytes": model_bytes(model),
        "macs": cost.macs,
        "state_bytes": cost.state_bytes,
        "ms": timing.median * 1e3,
        "ms_item": timing.median * 1e3 / load.items,
        "per_second": load.items / timing.median,
        "spread": timing.spread,
        "noisy": timing.noisy,
    }


def measure(model: Any, *, task: Any = None, shape: str | None = None, rounds: int = 7, seed: int = 0) -> Measurement:
    """Parameters, bytes, multiply-accumulates and time of ``model`` (a model or a name that loads).

    ``task`` (a task or its name) adds the quality on its test split, and its texts as the workload. ``shape``:
    ``encode:32xnatural``, ``encode:32x128``, ``decode:1x512`` or ``prefill:1x1024``.
    """
    from formwright.hub import load as load_model

    name = model if isinstance(model, str) else (model.name or "model")
    model = load_model(model) if isinstance(model, str) else model
    quality = metric = None
    if task is not None:
        from formwright.tasks import task as make_task

        task = make_task(task) if isinstance(task, str) else task
        task.bind(model)
        quality, metric = task.score(model, "test").value, task.metric
    load = workload(model, shape, task=task, seed=seed)
    if rounds < 1:
        raise SpecError(f"rounds={rounds} must be at least 1")
    timing = alternate({"model": lambda: load.run(model)}, rounds=rounds)["model"]
    return Measurement(
        model=name,
        shape=load.name,
        threads=torch.get_num_threads(),
        quality=quality,
        metric=metric,
        **measured(model, load, timing),
    )
