"""What a step adds up over its micro-batches, and over processes: losses with their counts, rows, tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from formwright.kit.errors import DataError
from formwright.models.batch import Batch, Loss
from formwright.training.place import Place


@dataclass
class Tally:
    """``sums`` by name of the loss and its parts; ``count`` items that they are sums over."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    count: Tensor | float = 0.0
    rows: int = 0
    tokens: int = 0

    def add(self, loss: Loss) -> None:
        self.count = self.count + loss.count.detach().double()
        for name, value in {"loss": loss.total, **loss.parts}.items():
            self.sums[name] = self.sums.get(name, 0) + value.detach().double()

    def fed(self, place: Place, rows: int, tokens: int) -> None:
        """Count what every process has just taken."""
        for more_rows, more_tokens in place.everyone((rows, tokens)):
            self.rows, self.tokens = self.rows + more_rows, self.tokens + more_tokens

    def means(self, place: Place) -> tuple[dict[str, float], float]:
        """(mean of every loss over all processes, count of all)."""
        sums: dict[str, float] = {}
        count = 0.0
        own = {name: float(value) for name, value in self.sums.items()}
        for their_sums, their_count in place.everyone((own, float(self.count))):
            count += their_count
            for name, value in their_sums.items():
                sums[name] = sums.get(name, 0.0) + value
        return {name: value / max(count, 1e-12) for name, value in sums.items()}, count


def rows_of(batch: Batch) -> int:
    """Rows of a batch, documents where it is packed."""
    for offsets in batch.offsets.values():
        return len(offsets) - 1
    return len(next(iter(batch.inputs.values())))


def tokens_of(batch: Batch) -> int:
    """Tokens of a batch without padding, over all its fields; its rows where an input has no tokens."""
    if batch.offsets:
        return sum(int(offsets[-1]) for offsets in batch.offsets.values())
    if batch.lengths:
        return sum(int(lengths.sum()) for lengths in batch.lengths.values())
    return sum(x.shape[0] * (x.shape[1] if x.dim() in (2, 3) else 1) for x in batch.inputs.values())


def check_full(batch: Batch, index: int) -> Batch:
    """``batch``, unless there is nothing in it."""
    if not batch.inputs or rows_of(batch) == 0 or tokens_of(batch) == 0:
        raise DataError(f"batch {index} of the data is empty: leave out batches without rows or tokens")
    return batch
