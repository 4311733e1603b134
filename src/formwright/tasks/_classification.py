"""Text classification over given rows: stratified splits, labels matched to the model's, accuracy or macro-F1.

    macro-F1 = mean over classes of 2 tp / (2 tp + fp + fn), over the classes that occur among the targets

Accuracy is judged above the share of the largest class; where that share exceeds 60 % accuracy says little, and
macro-F1 is the default. Identical texts stay on one side of the splits. Cost of a score: one forward pass per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from formwright.kit.errors import DataError, SpecError, unknown
from formwright.models.batch import Batch, Score, View
from formwright.tasks import _encoding
from formwright.tasks._splits import RULE, deal
from formwright.tasks.base import SPLITS, Index, Task, digest, epochs

SHARES = (0.3, 0.3, 0.4)
METRICS = ("accuracy", "macro-f1")
#: Above this share of the largest class the default metric is macro-F1.
SKEWED = 0.60


@dataclass(frozen=True)
class Row:
    """One text (or a pair of texts) and its label; ``id`` is the user's own, or empty."""

    text: str
    label: str
    pair: str | None = None
    id: str = ""


def split_rows(rows: Sequence[Row], seed: int) -> dict[str, list[Row]]:
    """Rows of each split: every label dealt out by the shares, identical texts together, in an order of their own."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(digest([row.text, row.pair]), []).append(row)
    strata: dict[str, dict[str, int]] = {}
    for key, members in groups.items():
        counts = Counter(row.label for row in members)
        label = min(counts, key=lambda name: (-counts[name], name))
        strata.setdefault(label, {})[key] = len(members)
    place: dict[str, str] = {}
    for sizes in strata.values():
        place.update(deal(sizes, SHARES, seed))
    out: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for key in sorted(groups):
        out[place[key]] += sorted(groups[key], key=lambda row: (row.label, row.id))
    return out


def macro_f1(predicted: np.ndarray, target: np.ndarray) -> float:
    """Mean F1 over the classes among the targets; predictions and targets are (n,) class numbers, -1 is no class."""
    classes = int(max(predicted.max(), target.max())) + 1
    right = np.bincount(target[predicted == target], minlength=classes)
    called = np.bincount(predicted[predicted >= 0], minlength=classes)
    there = np.bincount(target, minlength=classes)
    occurs = there > 0
    return float((2.0 * right[occurs] / (called[occurs] + there[occurs])).mean())


def classification_score(metric: str, predicted: torch.Tensor, target: torch.Tensor) -> Score:
    """The score of predicted class numbers (n,), -1 where the model gave no number; ``extra`` has both metrics."""
    correct = (predicted == target).double()
    values = {"accuracy": float(correct.mean()), "macro-f1": macro_f1(predicted.numpy(), target.numpy())}
    return Score(values[metric], correct, curves={"predicted": predicted, "target": target}, extra=values)


class Classifying(Task):
    """What every task with one class per item shares: the metric, its resampling, predictions from logits."""

    needs = "outputs"

    def resampled(self, score: Score, index: Index) -> float:
        if self.metric != "macro-f1":
            return super().resampled(score, index)
        rows = np.asarray(index)
        return macro_f1(score.curves["predicted"].numpy()[rows], score.curves["target"].numpy()[rows])

    def set_metric(self, metric: str | None, shares: Mapping[str, float]) -> str:
        """Choose the metric and its chance level from the shares of the classes; the sentence that says why."""
        if metric is not None and metric not in METRICS:
            raise SpecError(unknown("metric", metric, METRICS))
        largest = max(shares.values())
        self.metric = metric or ("macro-f1" if largest > SKEWED else "accuracy")
        constant = {"accuracy": largest, "macro-f1": 2 * largest / (1 + largest) / len(shares)}
        self.chance = constant[self.metric]
        side = "over" if largest > SKEWED else "at most"
        why = "as asked" if metric else f"the largest class holds {largest:.0%}, {side} {SKEWED:.0%}"
        return f"metric: {self.metric} ({why}), kept above {self.chance:.3f}, what always naming that class scores"

    def predict(self, view: View, batch: Batch, classes: int) -> torch.Tensor:
        """(B,) the class of the largest logit, -1 where a logit is not a number; DataError without (B, C) logits."""
        outputs = view.outputs(batch)
        logits = outputs.get("logits")
        if logits is None or logits.dim() != 2 or logits.shape[1] < classes:
            shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise DataError(f"task {self.name} needs logits (rows, {classes} classes or more); the model gives {shape}")
        logits = logits.detach().float().cpu()
        return torch.where(torch.isfinite(logits).all(1), logits.argmax(1), -1)


class TextClassification(Classifying):
    """Classification of given rows; subclasses say where they come from.

    metric: accuracy, macro-f1, or None for the choice above. labels_by_index: the i-th label of the data, sorted,
    is the model's i-th class. rows: texts a batch. notes: lines for ``describe``.
    """

    def __init__(
        self,
        name: str,
        samples: Sequence[Row],
        *,
        metric: str | None = None,
        seed: int = 0,
        labels_by_index: bool = False,
        rows: int = 32,
        notes: Sequence[str] = (),
    ) -> None:
        if rows < 1:
            raise SpecError(f"task {name}: rows must be at least 1, not {rows}")
        self.name, self.rows, self.labels_by_index, self.notes = name, rows, labels_by_index, list(notes)
        counts = Counter(row.label for row in samples)
        if len(counts) < 2:
            only = f'only the class "{next(iter(counts))}"' if counts else "no rows"
            raise DataError(f"{name} has {only}: classification needs at least two classes")
        self.labels = sorted(counts, key=_natural)
        self.shares = {label: counts[label] / len(samples) for label in self.labels}
        self._metric_line = self.set_metric(metric, self.shares)
        self.parts = split_rows(samples, seed)
        small = [split for split in SPLITS if not self.parts[split]]
        if small:
            listed = ", ".join(small)
            raise DataError(f"{name} has {len(samples)} usable rows, too few for three splits: {listed} would be empty")
        self._fingerprint = digest(
            [self.version, RULE, SHARES, seed, self.metric],
            [[(row.text, row.pair, row.label) for row in self.parts[split]] for split in SPLITS],
        )
        self._tokenizer: Any = None
        self._limit: int | None = None
        self._classes = {label: index for index, label in enumerate(self.labels)}
        self._matched: list[str] = []
        self._ids: dict[str, tuple[list[list[int]], list[list[int]] | None]] = {}

    def bind(self, model: Any) -> None:
        """Tokenizer, limit and labels of a classifier; DataError for a model without a classifier head."""
        tokenizer = _encoding.tokenizer_of(model, self.name)
        names = _encoding.classes_of(model)
        if not names:
            who = _encoding.model_name(model)
            raise DataError(
                f"{self.name} needs a classifier head; {who} has none. Train one first: "
                f"formwright train {who} --task classification --data {self.name} --out DIR"
            )
        self._classes, self._matched = match_labels(self.name, self.labels, names, self.labels_by_index)
        self._tokenizer, self._limit, self._ids = tokenizer, _encoding.limit_of(model), {}
        self._width = len(names)

    def _encode(self, rows: Sequence[Row]) -> tuple[list[list[int]], list[list[int]] | None]:
        """Ids of the rows, and for pairs which text each token is of, where the tokenizer says so."""
        if self._tokenizer is None:
            raise DataError(f"task {self.name} is not bound to a model: call task.bind(model) first")
        texts = [row.text for row in rows]
        if rows[0].pair is None:
            return self._tokenizer.encode(texts, max_length=self._limit), None
        pairs = [row.pair or "" for row in rows]
        ids = self._tokenizer.encode(texts, pairs, max_length=self._limit)
        known = hasattr(self._tokenizer, "types")
        return ids, self._tokenizer.types(texts, pairs, self._limit) if known else None

    def score(self, view: View, split: str) -> Score:
        """The metric; ``per_item`` is 1 for right rows, ``curves`` hold predicted and target class numbers."""
        rows = self.parts[self.check_split(split)]
        if split not in self._ids:
            self._ids[split] = self._encode(rows)
        ids, types = self._ids[split]
        predicted = _encoding.in_order(
            ids, self._tokenizer.pad_id, self.rows, lambda batch: self.predict(view, batch, self._width), types
        )
        return classification_score(self.metric, predicted, self._targets(rows))

    def _targets(self, rows: Sequence[Row]) -> torch.Tensor:
        return torch.tensor([self._classes[row.label] for row in rows])

    def batches(self, split: str, *, seed: int, budget: int, policy: Any = None) -> Iterator[Batch]:
        """Token batches with ``targets["label"]`` (B,) in the model's class numbers."""
        for rows in epochs(self.parts[self.check_split(split)], self.rows, seed=seed, budget=budget):
            ids, types = self._encode(rows)
            batch = _encoding.token_batch(ids, self._tokenizer.pad_id, types=types)
            yield batch.replace(targets={"label": self._targets(rows)})

    def baselines(self, split: str) -> Mapping[str, Score]:
        """``majority``: always the most frequent class of the calibrate split."""
        counts = Counter(self._classes[row.label] for row in self.parts["calibrate"])
        majority = min(counts, key=lambda index: (-counts[index], index))
        target = self._targets(self.parts[self.check_split(split)])
        return {"majority": classification_score(self.metric, torch.full_like(target, majority), target)}

    def texts(self, split: str) -> list[str]:
        rows = self.parts[self.check_split(split)]
        return [row.text if row.pair is None else f"{row.text}\n{row.pair}" for row in rows]

    def describe(self) -> list[str]:
        rows = sum(len(self.parts[split]) for split in SPLITS)
        ranked = sorted(self.labels, key=lambda label: (-self.shares[label], label))
        listed = ", ".join(f"{label} {self.shares[label]:.0%}" for label in ranked[:8])
        rest = f", … {len(ranked) - 8} more" if len(ranked) > 8 else ""
        missing = [
            label
            for label in self.labels
            if any(all(row.label != label for row in self.parts[split]) for split in SPLITS)
        ]
        lines = [f"{rows} rows, {len(self.labels)} classes ({listed}{rest})", *self.notes, *self._matched]
        if missing:
            lines.append(f"too few rows for every split: {', '.join(missing)}")
        return [
            *lines,
            self._metric_line,
            "splits: " + ", ".join(f"{split} {len(self.parts[split])}" for split in SPLITS),
            "rows that the model was trained on inflate every figure: give rows it has not seen",
            f"fingerprint {self.fingerprint()[:12]}",
        ]

    def fingerprint(self) -> str:
        return self._fingerprint


def _natural(label: str) -> tuple[int, float, str]:
    """Numbers in numeric order before words, so that "10" follows "9" when labels are matched by index."""
    try:
        return (0, float(label), label)
    except ValueError:
        return (1, 0.0, label)


def match_labels(
    name: str, labels: Sequence[str], known: Sequence[str], by_index: bool
) -> tuple[dict[str, int], list[str]]:
    """Label of the data -> class number of the model, and the lines that say how.

    By exact text, then with case folded where that names one class only; by index when asked. DataError listing both
    sets when a label of the data is not the model's.
    """
    if by_index:
        if len(labels) > len(known):
            raise DataError(f"{name} has {len(labels)} labels, the model {len(known)}: they cannot match by index")
        told = ", ".join(f'"{label}" = {index} "{known[index]}"' for index, label in enumerate(labels[:8]))
        return {label: index for index, label in enumerate(labels)}, [f"labels by index: {told}"]
    exact = {label: index for index, label in enumerate(known)}
    folded: dict[str, list[int]] = {}
    for index, label in enumerate(known):
        folded.setdefault(label.strip().casefold(), []).append(index)
    matched: dict[str, int] = {}
    lines, strangers = [], []
    for label in labels:
        alike = folded.get(label.strip().casefold(), [])
        if label in exact:
            matched[label] = exact[label]
        elif len(alike) == 1:
            matched[label] = alike[0]
            lines.append(f'label "{label}" of the data is "{known[alike[0]]}" of the model (case)')
        else:
            strangers.append(label)
    if strangers:
        listed = ", ".join(f'"{label}"' for label in strangers)
        raise DataError(
            f"{name}: the model does not know the label{'s' if len(strangers) > 1 else ''} {listed} "
            f"(data: {', '.join(labels)}; model: {', '.join(known)}); "
            "--labels-by-index matches them in sorted order"
        )
    return matched, lines
