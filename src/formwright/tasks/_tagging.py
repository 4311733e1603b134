"""Token classification: every piece of a text gets the label of the span that it stands in.

A piece's label is that of the span over its first character that is no white space; pieces of white space alone, and
those that no span covers, have none and do not count. Texts are cut into windows of ``length`` pieces. Accuracy over
labelled pieces, with macro-F1 beside it. Cost of a score: one forward pass over the split's tokens.
"""

from __future__ import annotations

import functools
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Score, View, pad
from formwright.tasks import _encoding
from formwright.tasks._classification import Classifying, classification_score, match_labels
from formwright.tasks._splits import RULE, order_key
from formwright.tasks.base import SPLITS, digest

#: (first character, one past the last, label), ascending and apart.
Span = tuple[int, int, str]
#: Windows that are mixed before batches are drawn from them, in batches.
POOL = 64


@dataclass(frozen=True)
class Tagged:
    """``tokens`` of a window and the class number of each, -100 for none."""

    tokens: list[int]
    labels: list[int]


class TaggingTask(Classifying):
    """Labels of pieces over given documents; subclasses say where they and their spans come from.

    parts: split -> texts. labels: all that occur. tagger: text -> its spans. length: pieces a window. rows: windows a
    batch. limit: characters of texts, whole ones, that select and test are scored on at most.
    """

    objective = "classification"
    head_kind = "token-classifier"

    def __init__(
        self,
        name: str,
        parts: Mapping[str, Sequence[str]],
        labels: Sequence[str],
        tagger: Callable[[str], Iterable[Span]],
        *,
        length: int = 128,
        rows: int = 16,
        limit: int = 200_000,
        seed: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        if length < 1 or rows < 1 or limit < 1:
            raise SpecError(f"task {name}: length, rows and limit must be at least 1, not {length}, {rows}, {limit}")
        self.name, self.labels, self.length, self.rows, self.notes = name, list(labels), length, rows, list(notes)
        empty = [split for split in SPLITS if not parts.get(split)]
        if empty:
            raise DataError(f"{name} has no texts in {', '.join(empty)}")
        self.metric = "accuracy"
        self.parts = {
            split: list(parts[split]) if split == "calibrate" else _drawn(parts[split], limit, seed) for split in SPLITS
        }
        self._spans = functools.lru_cache(maxsize=None)(lambda text: list(tagger(text)))
        self._fingerprint = digest([self.version, RULE, seed, length, limit, self.labels], self.parts)
        self._tokenizer: Any = None
        self._classes: dict[str, int] = {}
        self._windows: dict[str, list[Tagged]] = {}

    def bind(self, model: Any) -> None:
        """Tokenizer, limit and labels of a token classifier; DataError for a model without one."""
        tokenizer = _encoding.tokenizer_of(model, self.name, "offsets")
        who, most = _encoding.model_name(model), _encoding.limit_of(model)
        heads = [head for head in getattr(model, "heads", {}).values() if getattr(head, "labels", None)]
        tagging = [head for head in heads if head.kind == "tokens"]
        if not tagging:
            raise DataError(
                f"{self.name} needs a token-classifier head with labels; {who} has none: attach one with "
                f"formwright.apply(model, 'head', kind='token-classifier', labels={self.labels})"
            )
        if most is not None and self.length > most:
            raise DataError(f"task {self.name} has windows of {self.length} tokens; {who} takes {most}: length={most}")
        self._classes, _ = match_labels(self.name, self.labels, tagging[0].labels, False)
        self._tokenizer, self._windows, self._width = tokenizer, {}, len(tagging[0].labels)
        self.chance = self.baselines("select")["majority"].value

    def tagged(self, text: str) -> list[Tagged]:
        """The windows of a text."""
        if self._tokenizer is None:
            raise DataError(f"task {self.name} is not bound to a model: call task.bind(model) first")
        ids, places = self._tokenizer.offsets(text)
        spans = self._spans(text)
        starts = [start for start, _, _ in spans]
        labels = [self._label(text[start:end], start, spans, starts) for start, end in places]
        cuts = range(0, len(ids), self.length)
        return [Tagged(ids[at : at + self.length], labels[at : at + self.length]) for at in cuts]

    def _label(self, piece: str, start: int, spans: Sequence[Span], starts: Sequence[int]) -> int:
        if not piece.strip():
            return -100
        place = start + len(piece) - len(piece.lstrip())
        found = bisect_right(starts, place) - 1
        return self._classes[spans[found][2]] if found >= 0 and place < spans[found][1] else -100

    def _batch(self, chosen: Sequence[Tagged]) -> Batch:
        tokens, lengths = pad([window.tokens for window in chosen], self._tokenizer.pad_id)
        labels, _ = pad([window.labels for window in chosen], -100)
        return Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}, targets={"label": labels})

    def batches(self, split: str, *, seed: int, budget: int, policy: Any = None) -> Iterator[Batch]:
        """``tokens`` and ``targets["label"]`` (B, L), -100 where there is none, in an order of (seed, epoch)."""
        texts = self.parts[self.check_split(split)]
        done = epoch = 0
        while done < budget:
            rng = np.random.default_rng([seed, epoch])
            pool: list[Tagged] = []
            for place, i in enumerate(rng.permutation(len(texts))):
                pool += self.tagged(texts[i])
                last = place == len(texts) - 1
                while done < budget and (len(pool) >= POOL * self.rows or (last and pool)):
                    size = min(self.rows, len(pool))
                    yield self._batch([pool.pop(int(rng.integers(len(pool)))) for _ in range(size)])
                    done += 1
                if done == budget:
                    return
            epoch += 1

    def windows(self, split: str) -> list[Tagged]:
        """The windows of a split, longest first."""
        self.check_split(split)
        if split not in self._windows:
            found = [window for text in self.parts[split] for window in self.tagged(text)]
            self._windows[split] = sorted(found, key=lambda window: -len(window.tokens))
        return self._windows[split]

    def score(self, view: View, split: str) -> Score:
        """Accuracy over labelled pieces; ``extra`` has macro-F1 too, ``curves`` predicted and target classes."""
        predicted, target = [], []
        for chosen in _encoding.chunks(self.windows(split), self.rows):
            batch = self._batch(chosen)
            labels = batch.targets["label"]
            logits = view.outputs(batch).get("logits")
            if logits is None or logits.shape[:2] != labels.shape or logits.shape[-1] < self._width:
                shape = "none" if logits is None else tuple(logits.shape)
                raise DataError(f"task {self.name} needs logits (rows, length, {self._width}); the model gives {shape}")
            logits = logits.detach().float().cpu()
            best = torch.where(torch.isfinite(logits).all(-1), logits.argmax(-1), -1)
            predicted.append(best[labels != -100])
            target.append(labels[labels != -100])
        return classification_score(self.metric, torch.cat(predicted), torch.cat(target))

    def baselines(self, split: str) -> Mapping[str, Score]:
        """``majority``: the most frequent label of the split; ``piece``: the most frequent of the same piece in it.

        Both are counted on the scored split itself, so they are at least what calibrate could give.
        """
        flat = [(t, label) for w in self.windows(split) for t, label in zip(w.tokens, w.labels) if label != -100]
        target = torch.tensor([label for _, label in flat])
        by_piece: dict[int, Counter[int]] = {}
        for token, label in flat:
            by_piece.setdefault(token, Counter())[label] += 1
        best = {token: _first(counts) for token, counts in by_piece.items()}
        majority = _first(Counter(label for _, label in flat))
        guesses = {
            "majority": torch.full_like(target, majority),
            "piece": torch.tensor([best[token] for token, _ in flat]),
        }
        return {name: classification_score(self.metric, guess, target) for name, guess in guesses.items()}

    def texts(self, split: str) -> list[str]:
        return list(self.parts[self.check_split(split)])

    def describe(self) -> list[str]:
        sizes = {split: sum(map(len, self.parts[split])) for split in SPLITS}
        return [
            *self.notes,
            f"{len(self.labels)} labels: {', '.join(self.labels)}",
            "splits: " + ", ".join(f"{split} {size / 1e6:.2f} million characters" for split, size in sizes.items()),
            f"metric: {self.metric} over labelled pieces in windows of {self.length}",
            f"fingerprint {self.fingerprint()[:12]}",
        ]

    def fingerprint(self) -> str:
        return self._fingerprint


def _first(counts: Counter[int]) -> int:
    """The most frequent label, the smaller of equals."""
    return min(counts, key=lambda label: (-counts[label], label))


def _drawn(texts: Sequence[str], limit: int, seed: int) -> list[str]:
    """Whole texts in a seeded order, as many as fit into ``limit`` characters, at least one."""
    found: list[str] = []
    size = 0
    for text in sorted(texts, key=lambda text: order_key(seed, text)):
        if found and size + len(text) > limit:
            continue
        found.append(text)
        size += len(text)
    return found
