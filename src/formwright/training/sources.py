"""Where the batches of a run come from: a task, a function of (seed, index), a list of batches, or rows of ids.

The order is a function of the seed and the index, so a resumed run goes on exactly where it was. ``draw`` is asked
for indices in ascending order. Cost: a function, a list, rows, or a task that knows its order (``drawer``) skip
for free; another task's earlier batches are drawn again and thrown away, without running a model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formwright.kit.errors import DataError
from formwright.models.batch import Batch
from formwright.tasks.base import Task

#: Told to a task as its number of batches: the run's end is not the task's business, and the order depends on it never.
ENDLESS = 1 << 40
#: Rows are sorted by length within so many batches, so that a batch's rows are alike in length.
BUCKET = 16


class Source:
    """``draw(index)`` -> the batch of that index; ``fingerprint`` says which data it is, for the history."""

    def draw(self, index: int) -> Batch:
        raise NotImplementedError

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Complain if the checkpoint was written with other data."""


class FromTask(Source):
    """The batches of one split of a task, in its own order."""

    def __init__(self, task: Task, split: str, seed: int) -> None:
        self.task, self.split, self.seed = task, task.check_split(split), seed
        self._any: Callable[[int], Batch] | None = None
        self._iterator: Iterator[Batch] | None = None
        self._next = 0

    def draw(self, index: int) -> Batch:
        if self._any is None and self._iterator is None:
            self._any = self.task.drawer(self.split, self.seed)
        if self._any is not None:
            return self._any(index)
        if self._iterator is None or index < self._next:
            self._iterator, self._next = iter(self.task.batches(self.split, seed=self.seed, budget=ENDLESS)), 0
        while True:
            batch = next(self._iterator, None)
            if batch is None:
                raise DataError(f"task {self.task.name} has no batch {self._next} in split {self.split}")
            self._next += 1
            if self._next > index:
                return batch

    def fingerprint(self) -> dict[str, Any]:
        return {"task": self.task.name, "split": self.split, "fingerprint": self.task.fingerprint()}

    def state_dict(self) -> dict[str, Any]:
        return self.task.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.task.load_state_dict(state)


class FromFunction(Source):
    """``make(seed, index)`` -> Batch."""

    def __init__(self, make: Callable[[int, int], Batch], seed: int) -> None:
        self.make, self.seed = make, seed

    def draw(self, index: int) -> Batch:
        return self.make(self.seed, index)


class FromList(Source):
    """Given batches, each epoch in a new order from (seed, epoch)."""

    def __init__(self, batches: Sequence[Batch], seed: int) -> None:
        if not batches:
            raise DataError("there are no batches to train on")
        self.batches, self.seed = batches, seed

    def draw(self, index: int) -> Batch:
        epoch, place = divmod(index, len(self.batches))
        return self.batches[int(np.random.default_rng([self.seed, epoch]).permutation(len(self.batches))[place])]

    def fingerprint(self) -> dict[str, Any]:
        sha = hashlib.sha256()
        for batch in self.batches:
            for tensors in (batch.inputs, batch.targets):
                for name, tensor in sorted(tensors.items()):
                    sha.update(name.encode())
                    sha.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return {"batches": len(self.batches), "fingerprint": sha.hexdigest()}


class Buckets:
    """Rows of given lengths dealt into batches of ``size`` rows alike in length, each epoch anew from (seed, epoch).

    ``at(index)`` -> the row numbers of a batch. Within an epoch every row comes once.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, size: int, seed: int) -> None:
        if not len(lengths):
            raise DataError("there are no texts to train on")
        self.lengths, self.size, self.seed = np.asarray(lengths), size, seed
        self.per_epoch = -(-len(lengths) // size)
        self._epoch = -1
        self._order: list[np.ndarray] = []

    def at(self, index: int) -> np.ndarray:
        epoch, place = divmod(index, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._deal(epoch)
        return self._order[place]

    def _deal(self, epoch: int) -> list[np.ndarray]:
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        dealt = []
        for start in range(0, len(order), self.size * BUCKET):
            near = order[start : start + self.size * BUCKET]
            near = near[np.argsort(self.lengths[near], kind="stable")]
            dealt += [near[at : at + self.size] for at in range(0, len(near), self.size)]
        return [dealt[i] for i in rng.permutation(len(dealt))]


def source_of(data: Any, seed: int, split: str | None = None) -> Source:
    """A source from a task, a function, or a sequence of batches; DataError for anything else."""
    if isinstance(data, Source):
        return data
    if isinstance(data, Task):
        return FromTask(data, split or ("train" if "train" in data.splits else "calibrate"), seed)
    if isinstance(data, Sequence) and all(isinstance(batch, Batch) for batch in data):
        return FromList(data, seed)
    if callable(data):
        return FromFunction(data, seed)
    raise DataError(
        "train reads a task, a function (seed, index) -> Batch, or a list of batches, "
        f"not a {type(data).__name__}; texts become a task with fw.task"
    )
