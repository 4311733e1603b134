"""What a task is: data and a metric, seeded and fingerprinted, that sees a model only as a View.

A task binds to a model (tokenizer, labels, head: every complaint before any work), yields batches for calibrating and
healing, and scores a view on one of three disjoint splits: *calibrate* (rank moves, train), *select* (choose) and
*test* (touched once). Adding a task is one file under ``tasks/`` with one registered class; nothing else is edited::

    @register("task", "my/task", summary="what it asks, in one line")
    class MyTask(Task): ...
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np

from formwright.kit.errors import DataError, SpecError, unknown
from formwright.models.batch import Batch, Score, View

Index = Any  # a numpy int array or a LongTensor, (n,)
Rows = TypeVar("Rows")
SPLITS = ("calibrate", "select", "test")


class Task:
    """Base of all tasks; a subclass fills in what raises NotImplementedError and whatever else differs.

    name: as registered, or what the user called it. version: raised when the same data would give other scores.
    metric: what ``Score.value`` is, e.g. ``"mrr@10/1500"``. needs: the face of a view that ``score`` calls.
    chance: the metric's level for a model that knows nothing, or None where none is meaningful.
    """

    name: str = ""
    version: str = "1"
    metric: str = ""
    higher_is_better: bool = True
    needs: Literal["encode", "outputs", "generate", "act"] = "outputs"
    splits: tuple[str, ...] = SPLITS
    chance: float | None = None

    def bind(self, model: Any) -> None:
        """Take the model's tokenizer, labels and length limit; DataError with every complaint, before any work."""

    def batches(self, split: str, *, seed: int, budget: int, policy: Any = None) -> Iterator[Batch]:
        """``budget`` training batches of a split, epoch after epoch, in an order fixed by ``seed``.

        policy: who acts, in tasks whose data come from acting; tasks with data of their own have no use for it.
        """
        raise NotImplementedError(f"task {self.name} has no batches")

    def drawer(self, split: str, seed: int) -> Callable[[int], Batch] | None:
        """index -> the training batch of that index, for tasks that need not draw those before it; None otherwise."""
        return None

    def score(self, view: View, split: str) -> Score:
        """The metric of a view on a split, deterministic for a deterministic view."""
        raise NotImplementedError(f"task {self.name} has no score")

    def baselines(self, split: str) -> Mapping[str, Score]:
        """What knowing nothing, or something simple, scores on the split: random, majority, BM25 and the like."""
        self.check_split(split)
        return {}

    def texts(self, split: str) -> list[str]:
        """The split's texts without labels, for calibration and healing; empty for tasks without texts."""
        self.check_split(split)
        return []

    def resampled(self, score: Score, index: Index) -> float:
        """The metric on the items ``index`` (n,) of a score, repeats allowed: the mean, unless overridden."""
        if score.per_item is None:
            raise DataError(f"task {self.name} has no per-item values to resample")
        return float(score.per_item.numpy()[np.asarray(index)].mean())

    def describe(self) -> list[str]:
        """The lines to print before work: sizes, what was skipped or guessed, the metric and why, the fingerprint."""
        return [f"metric: {self.metric}", f"fingerprint {self.fingerprint()[:12]}"]

    def fingerprint(self) -> str:
        """sha256 (hex) of everything that fixes a score besides the model: contents, version, split rule, options."""
        raise NotImplementedError(f"task {self.name} has no fingerprint")

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON that identifies the task in a checkpoint; tasks that carry more add to it."""
        return {"name": self.name, "version": self.version, "metric": self.metric, "fingerprint": self.fingerprint()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that a checkpoint was written with this very task; DataError when scores would not compare."""
        for key, now in self.state_dict().items():
            if key in state and state[key] != now:
                raise DataError(f"the run was started with task {key} {state[key]}, this task has {key} {now}")

    def with_options(self, **options: Any) -> Task:
        """The task with options changed; a finished task object has none."""
        if options:
            raise SpecError(f"task {self.name!r} takes no options, so {', '.join(sorted(options))} cannot be set")
        return self

    def check_split(self, split: str) -> str:
        """``split`` itself, or SpecError with the nearest name."""
        if split not in self.splits:
            raise SpecError(unknown("split", split, self.splits))
        return split


def digest(*parts: Any) -> str:
    """sha256 (hex) of plain data; independent of dict order, locale and process."""
    sha = hashlib.sha256()
    for part in parts:
        data = json.dumps(part, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode("ascii")
        sha.update(len(data).to_bytes(8, "big") + data)
    return sha.hexdigest()


def epochs(rows: Sequence[Rows], size: int, *, seed: int, budget: int) -> Iterator[list[Rows]]:
    """``budget`` lists of at most ``size`` rows: each epoch a new order from (seed, epoch), the short rest included."""
    done = epoch = 0
    while done < budget and len(rows):
        order = np.random.default_rng([seed, epoch]).permutation(len(rows))
        for start in range(0, len(order), size):
            if done == budget:
                return
            yield [rows[i] for i in order[start : start + size]]
            done += 1
        epoch += 1


def lines_listed(numbers: Sequence[int], most: int = 8, unit: str = "line") -> str:
    """``"line 18"``, ``"lines 18, 307"`` or ``"lines 18, 307, … (40 in all)"``."""
    listed = ", ".join(str(number) for number in numbers[:most])
    rest = f", … ({len(numbers)} in all)" if len(numbers) > most else ""
    return f"{unit}{'s' if len(numbers) != 1 else ''} {listed}{rest}"
