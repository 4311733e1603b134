"""Tasks of a few lines in the user's own file: a generator of samples, or a reader of rows.

    @fw.task.generated("echo", vocabulary=3, classes=2, metric="accuracy")
    def echo(rng, length):
        tokens = rng.integers(1, 3, length)
        return tokens, int(tokens[0] == tokens[-1])

``rng`` is ``numpy.random.default_rng([seed, split, index])``: a sample depends on nothing else, so workers and order do
not matter and splits are different streams. Streams may still draw the same tokens; ``check`` counts that, and looks
for the shortcuts that make a generated task worthless. Cost: the generator's own.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Score, View
from formwright.tasks import _encoding
from formwright.tasks._classification import Classifying, Row, TextClassification, classification_score
from formwright.tasks.base import SPLITS, digest

Sample = tuple[np.ndarray, int]
#: Samples drawn twice by the check, and samples from which shortcuts are learnt and on which they are judged.
CHECKED, SHORTCUT = 64, 512


class GeneratedTask(Classifying):
    """Classification of generated token sequences; what ``task.generated`` makes.

    vocabulary: token ids are 0 … vocabulary - 1, 0 is padding. classes: labels are 0 … classes - 1.
    length, seed: options of the task. size: samples of select and of test. rows: samples a batch.
    """

    def __init__(
        self,
        name: str,
        sample: Callable[[np.random.Generator, int], tuple[Any, int]],
        *,
        vocabulary: int,
        classes: int,
        metric: str | None = None,
        length: int = 64,
        seed: int = 0,
        size: int = 1000,
        rows: int = 32,
    ) -> None:
        if vocabulary < 2 or classes < 2 or min(length, size, rows) < 1:
            raise SpecError(f"task {name}: vocabulary and classes are at least 2; length, size and rows at least 1")
        self.name, self.sample = name, sample
        self.vocabulary, self.classes, self.length = vocabulary, classes, length
        self.seed, self.size, self.rows = seed, size, rows
        self.labels = [str(label) for label in range(classes)]
        self._drawn: dict[str, list[Sample]] = {}
        counts = Counter(label for _, label in self._samples("calibrate"))
        if len(counts) < 2:
            raise DataError(f"task {name}: {size} samples all have the label {next(iter(counts))}; check the generator")
        self._metric_line = self.set_metric(metric, {str(k): n / size for k, n in sorted(counts.items())})

    def draw(self, split: str, index: int) -> Sample:
        """Sample ``index`` of a split: (tokens (L,) int64, label); DataError when it is not what was declared."""
        rng = np.random.default_rng([self.seed, SPLITS.index(self.check_split(split)), index])
        where = f"task {self.name}, sample {index} of {split}"
        try:
            tokens, label = self.sample(rng, self.length)
            ids = np.asarray(tokens)
            integer = ids.ndim == 1 and len(ids) > 0 and np.issubdtype(ids.dtype, np.integer)
            whole = int(label) == label
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: {error}; a sample is (tokens, label)") from error
        if not integer:
            raise DataError(f"{where}: tokens are a one-dimensional array of integers, not {ids.dtype} {ids.shape}")
        if ids.min() < 0 or ids.max() >= self.vocabulary:
            raise DataError(f"{where}: tokens {ids.min()} … {ids.max()} are outside 0 … {self.vocabulary - 1}")
        if not (whole and 0 <= label < self.classes):
            raise DataError(f"{where}: label {label} is not one of 0 … {self.classes - 1}")
        return ids.astype(np.int64), int(label)

    def _samples(self, split: str) -> list[Sample]:
        if split not in self._drawn:
            self._drawn[split] = [self.draw(split, index) for index in range(self.size)]
        return self._drawn[split]

    def bind(self, model: Any) -> None:
        """Refuses a classifier of another number of classes; there is no text, so no tokenizer is asked for."""
        names = _encoding.classes_of(model)
        if names and len(names) != self.classes:
            raise DataError(
                f"task {self.name} has {self.classes} classes, {_encoding.model_name(model)} {len(names)} labels"
            )

    def batches(self, split: str, *, seed: int, budget: int, policy: Any = None) -> Iterator[Batch]:
        """Fresh samples; those of *calibrate* with another ``seed`` are others, so training never runs out of them."""
        self.check_split(split)
        for turn in range(budget):
            # Indices beyond any scored sample, in a range of their own for every seed.
            first = (seed + 1) * 2**40 + turn * self.rows
            yield self._batch([self.draw(split, first + row) for row in range(self.rows)])

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        batch = _encoding.token_batch([tokens.tolist() for tokens, _ in samples], 0)
        return batch.replace(targets={"label": torch.tensor([label for _, label in samples])})

    def score(self, view: View, split: str) -> Score:
        samples = self._samples(self.check_split(split))
        ids = [tokens.tolist() for tokens, _ in samples]
        predicted = _encoding.in_order(ids, 0, self.rows, lambda batch: self.predict(view, batch, self.classes))
        return classification_score(self.metric, predicted, torch.tensor([label for _, label in samples]))

    def baselines(self, split: str) -> Mapping[str, Score]:
        """``majority``: calibrate's most frequent label; ``one-token shortcut``: the best rule that reads one token."""
        samples = self._samples(self.check_split(split))
        target = torch.tensor([label for _, label in samples])
        learnt = self._samples("calibrate")
        majority = _most_common([label for _, label in learnt])
        shortcut = torch.tensor(_shortcut(learnt, samples))
        return {
            "majority": classification_score(self.metric, torch.full_like(target, majority), target),
            "one-token shortcut": classification_score(self.metric, shortcut, target),
        }

    def check(self) -> list[str]:
        """The line printed before any work: repeatability, label shares, majority, shortcut, collisions of splits.

        Raises:
            DataError: two draws of the same sample differ; the generator uses something other than its ``rng``.
        """
        for index in range(CHECKED):
            once, again = self.draw("calibrate", index), self.draw("calibrate", index)
            if once[1] != again[1] or not np.array_equal(once[0], again[0]):
                raise DataError(
                    f"task {self.name}: sample {index} drawn twice with seed {self.seed} differs: "
                    "draw everything from the rng that is given"
                )
        learnt = [self.draw("calibrate", index) for index in range(SHORTCUT)]
        judged = [self.draw("select", index) for index in range(SHORTCUT)]
        labels = [label for _, label in judged]
        shares = "/".join(f"{100 * labels.count(label) / len(labels):.1f}" for label in range(self.classes))
        majority = labels.count(_most_common([label for _, label in learnt])) / len(labels)
        hits = sum(a == b for a, b in zip(_shortcut(learnt, judged), labels)) / len(labels)
        return [
            f"task check: {CHECKED} samples drawn twice with seed {self.seed}: equal · labels {shares} · "
            f"majority {majority:.2f} · one-token shortcut {hits:.2f}",
            f"splits: {self.collisions()} of {2 * self.size} select and test samples also stand in another split",
        ]

    def collisions(self) -> int:
        """How many samples of select and test have tokens that another split's first samples have too."""
        held = {split: [tokens.tobytes() for tokens, _ in self._samples(split)] for split in SPLITS}
        return sum(
            any(key in others for others in [set(held[other]) for other in SPLITS if other != split])
            for split in SPLITS[1:]
            for key in held[split]
        )

    def describe(self) -> list[str]:
        return [
            f"{self.name}: generated, length {self.length}, vocabulary {self.vocabulary}, {self.classes} classes",
            *self.check(),
            self._metric_line,
            f"splits: calibrate unlimited, select {self.size}, test {self.size}",
            f"fingerprint {self.fingerprint()[:12]}",
        ]

    def fingerprint(self) -> str:
        """Of the options and of what is drawn, so that a change in the generator changes it."""
        drawn = [[(tokens.tolist(), label) for tokens, label in self._samples(split)] for split in SPLITS]
        return digest([self.version, self.metric, self.vocabulary, self.classes, self.length, self.seed], drawn)


def _most_common(labels: Sequence[int]) -> int:
    counts = Counter(labels)
    return min(counts, key=lambda label: (-counts[label], label))


def _token_at(place: int, tokens: np.ndarray) -> int:
    return int(tokens[place]) if -len(tokens) <= place < len(tokens) else -1


def _holds(token: int, tokens: np.ndarray) -> int:
    return int((tokens == token).any())


def _shortcut(learnt: Sequence[Sample], judged: Sequence[Sample]) -> list[int]:
    """Predictions for ``judged`` of the rule, best on ``learnt``, that reads one token.

    A rule names the label most frequent for the token at one place (counted from the start or the end; the 32 first and
    last are tried), or for the presence of one token (the 64 most frequent are tried).
    """
    reach = min(32, max(len(tokens) for tokens, _ in learnt))
    seen = Counter(int(token) for tokens, _ in learnt for token in np.unique(tokens))
    places = (*range(reach), *range(-reach, 0))
    rules: list[Callable[[np.ndarray], int]] = [
        *(functools.partial(_token_at, place) for place in places),
        *(functools.partial(_holds, token) for token, _ in seen.most_common(64)),
    ]
    majority = _most_common([label for _, label in learnt])
    best: tuple[int, Callable[[np.ndarray], int], dict[int, int]] | None = None
    for rule in rules:
        groups: dict[int, list[int]] = {}
        for tokens, label in learnt:
            groups.setdefault(rule(tokens), []).append(label)
        table = {value: _most_common(labels) for value, labels in groups.items()}
        hits = sum(labels.count(table[value]) for value, labels in groups.items())
        if best is None or hits > best[0]:
            best = (hits, rule, table)
    assert best is not None
    return [best[2].get(best[1](tokens), majority) for tokens, _ in judged]


class Generated:
    """A generator waiting for its options; made by ``task.generated``. Calling it gives the task."""

    def __init__(
        self, name: str, sample: Callable[..., Any], vocabulary: int, classes: int, metric: str | None
    ) -> None:
        self.name, self.sample, self.vocabulary, self.classes, self.metric = name, sample, vocabulary, classes, metric
        self.__module__ = sample.__module__  # it belongs to the file that decorates, which may be a plug-in

    def __call__(
        self, length: int = 64, seed: int = 0, size: int = 1000, rows: int = 32, metric: str | None = None
    ) -> GeneratedTask:
        """The task with sequences of ``length``; ``size`` samples each of select and test."""
        return GeneratedTask(
            self.name,
            self.sample,
            vocabulary=self.vocabulary,
            classes=self.classes,
            metric=metric or self.metric,
            length=length,
            seed=seed,
            size=size,
            rows=rows,
        )


class FromFiles:
    """A reader waiting for its data; made by ``task.from_files``. Calling it gives the task."""

    def __init__(
        self, name: str, reader: Callable[..., Iterable[Any]], data: str | Path | None, metric: str | None
    ) -> None:
        self.name, self.reader, self.data, self.metric = name, reader, data, metric
        self.__module__ = reader.__module__

    def __call__(
        self,
        data: str | Path | None = None,
        metric: str | None = None,
        seed: int = 0,
        labels_by_index: bool = False,
        rows: int = 32,
    ) -> TextClassification:
        """The task over what the reader yields for ``data`` (a file or folder)."""
        source = data if data is not None else self.data
        if source is None:
            raise SpecError(f"task {self.name} reads files: say data=PATH")
        path = Path(source).expanduser()
        if not path.exists():
            raise DataError(f"{path} does not exist")
        samples = [_row(self.name, index, record) for index, record in enumerate(self.reader(path))]
        return TextClassification(
            self.name, samples, metric=metric or self.metric, seed=seed, labels_by_index=labels_by_index, rows=rows
        )


def _row(name: str, index: int, record: Any) -> Row:
    if not isinstance(record, (tuple, list)) or len(record) not in (2, 3):
        raise DataError(f"task {name}, row {index}: (text, label) or (text, second text, label) is expected")
    texts, label = record[:-1], str(record[-1])
    if not all(isinstance(text, str) and text.strip() for text in texts) or not label.strip():
        raise DataError(f"task {name}, row {index}: an empty text or label, or a text that is not a string")
    return Row(texts[0], label, texts[1] if len(texts) == 2 else None)


def generated(
    name: str, *, vocabulary: int, classes: int, metric: str | None = "accuracy"
) -> Callable[[Callable[..., Any]], Generated]:
    """Decorator: ``sample(rng, length) -> (tokens, label)`` becomes a task.

    vocabulary: tokens are 0 … vocabulary - 1, 0 being padding. classes: labels are 0 … classes - 1. metric: accuracy,
    macro-f1, or None to choose by the shares of the labels.
    """
    return lambda sample: Generated(name, sample, vocabulary, classes, metric)


def from_files(
    name: str, *, data: str | Path | None = None, metric: str | None = None
) -> Callable[[Callable[..., Iterable[Any]]], FromFiles]:
    """Decorator: ``reader(path)`` yielding (text, label) or (text, second text, label) becomes a task over files.

    data: what it reads where the task is asked for without data. metric: as in ``classification``.
    """
    return lambda reader: FromFiles(name, reader, data, metric)
