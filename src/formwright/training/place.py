"""Where a run happens: in this process, in several that hold replicas, or in several that hold a shard each.

Everything in the loop that depends on it is a method here. In one process all of them are nearly nothing, and the
bits are those of plain PyTorch. Several processes (``torchrun --nproc-per-node N``, on any number of machines) are
found and joined by ``accelerate``. Objectives call a model's pieces themselves, so nothing is wrapped around a model:

* replicas: micro-batch i belongs to process i mod N, and gradients are summed once a step, after the last micro-batch;
* shards: FSDP2 (Zhao et al., 2023, 2304.11277) over copies of the models that train, one group an item of the flat
  list and one for what stands around it; the caller's own model gets the result at the end.

Cost a step: replicas, one reduction of all gradients; shards, two gatherings of all weights and one scattering of all
gradients a micro-batch, for 1/N of the memory of weights, gradients and optimizer; both, a few numbers as objects.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.training.checkpoint import fill, tensors_of

#: Numbers summed over processes in one message.
BUCKET = 1 << 23


class Place:
    """One process on the model's own device: it has nobody to agree with."""

    rank, size = 0, 1

    @property
    def main(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.rank == 0

    def enter(self, models: Mapping[str, Any], trained: Sequence[str]) -> dict[str, Any]:
        """The models to run with, in place of the caller's."""
        return dict(models)

    def leave(self) -> None:
        """Give the caller's models what the run made of theirs."""

    def everyone(self, value: Any) -> list[Any]:
        """What each process says, in the order of their ranks; plain data, asked by all at the same point."""
        return [value]

    def on_main(self, act: Callable[[], Any]) -> Any:
        """What ``act`` gives in the main process, for all; its complaint is everyone's."""
        return act()

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> float:
        """Sum gradients over processes in place; returns the factor by which they are too small still."""
        return 1.0

    def spans(self, every: int) -> int:
        """How many items may be computed again together, where ``every`` are wanted."""
        return every

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that may be a shard, whole."""
        return tensor

    def like(self, value: Tensor, pattern: Tensor) -> Tensor:
        """A whole tensor laid out as ``pattern``."""
        return value


class Replicas(Place):
    """Several processes, each with all of every model on a device of its own."""

    def __init__(self) -> None:
        self.state = _accelerate().PartialState(cpu=not torch.accelerator.is_available())
        atexit.register(self.state.destroy_process_group)
        self.rank, self.size = self.state.process_index, self.state.num_processes

    def enter(self, models: Mapping[str, Any], trained: Sequence[str]) -> dict[str, Any]:
        self._check_equal(models)
        for model in models.values():
            if isinstance(model, nn.Module):
                model.to(self.state.device)
        return dict(models)

    def _check_equal(self, models: Mapping[str, Any]) -> None:
        held = [model for model in models.values() if isinstance(model, nn.Module)]
        sums = [float(t.detach().double().sum()) for model in held for t in tensors_of(model).values()]
        if any(other != sums for other in self.everyone(sums)):
            raise DataError("the processes hold different models: build or load the same one in each, with one seed")

    def everyone(self, value: Any) -> list[Any]:
        return _accelerate().utils.gather_object([value])

    def on_main(self, act: Callable[[], Any]) -> Any:
        said: tuple[Any, Exception | None] = (None, None)
        if self.main:
            try:
                said = (act(), None)
            except Exception as error:
                said = (None, error)
        result, complaint = self.everyone(said)[0]
        if complaint is not None:
            raise complaint
        return result

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> float:
        # A parameter that was used in any process gets a gradient in all, as it would in one.
        used = [any(one) for one in zip(*self.everyone([p.grad is not None for p in parameters]))]
        for parameter, one in zip(parameters, used):
            if one and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for group in _buckets([p.grad for p, one in zip(parameters, used) if one and p.grad is not None]):
            flat = torch._utils._flatten_dense_tensors(group)
            torch.distributed.all_reduce(flat)
            for gradient, summed in zip(group, torch._utils._unflatten_dense_tensors(flat, group)):
                gradient.copy_(summed)
        return 1.0


class Shards(Replicas):
    """Several processes, each with a part of every trained parameter; models that do not train are whole in each."""

    def __init__(self) -> None:
        super().__init__()
        self._pairs: list[tuple[nn.Module, nn.Module]] = []

    def enter(self, models: Mapping[str, Any], trained: Sequence[str]) -> dict[str, Any]:
        self._check_equal(models)
        inside = dict(models)
        for name, model in models.items():
            if name in trained:
                inside[name] = self._sharded(name, model)
                self._pairs.append((model, inside[name]))
            elif isinstance(model, nn.Module):
                model.to(self.state.device)
        return inside

    def _sharded(self, name: str, model: Any) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        if hasattr(model, "towers"):
            raise Refusal(f"shard cuts models of one tower; {name!r} has {len(model.towers)}: train it in replicas")
        made = copy.deepcopy(model)
        mesh = init_device_mesh(self.state.device.type, (self.size,))
        seen: dict[int, int] = {}
        for _, parameter in made.named_parameters(remove_duplicate=False):
            seen[id(parameter)] = seen.get(id(parameter), 0) + 1
        for item in made.items():
            own = list(item.parameters())
            if own and all(seen[id(parameter)] == 1 for parameter in own):  # what is shared goes with the rest
                fully_shard(item, mesh=mesh)
        fully_shard(made, mesh=mesh)
        # Objectives begin a pass here, so this is where the group around the items is gathered.
        register_fsdp_forward_method(made, "embed")
        return made

    def leave(self) -> None:
        for model, made in self._pairs:
            values = {key: self.whole(value) for key, value in tensors_of(made).items()}
            fill(model, values, "the run")

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> float:
        return float(self.size)  # FSDP has scattered their mean

    def spans(self, every: int) -> int:
        # A span of several groups would gather and leave them in an order that FSDP loses gradients over.
        return min(every, 1)

    def whole(self, tensor: Tensor) -> Tensor:
        return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor

    def like(self, value: Tensor, pattern: Any) -> Tensor:
        if not hasattr(pattern, "device_mesh") or value.shape != pattern.shape:
            return value
        from torch.distributed.tensor import distribute_tensor

        value = value.to(pattern.device)
        return distribute_tensor(value, pattern.device_mesh, pattern.placements)


def here(shard: bool = False) -> Place:
    """The place of this process: its own, or among those that ``torchrun`` started with it."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if shard and not several:
        raise SpecError("shard cuts a model over processes: start several, torchrun --nproc-per-node N -m formwright …")
    return Shards() if shard else Replicas() if several else Place()


def _accelerate() -> Any:
    try:
        import accelerate
    except ImportError:
        raise SpecError("several processes need the package accelerate: pip install 'formwright[train]'") from None
    return accelerate


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Tensors in order, in groups of one type and about ``BUCKET`` numbers."""
    groups: list[list[Tensor]] = []
    size = 0
    for tensor in tensors:
        if not groups or groups[-1][0].dtype != tensor.dtype or size >= BUCKET:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.numel()
    return groups
