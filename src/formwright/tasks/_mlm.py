"""Masked language modelling: how well hidden tokens of held-out text are guessed from both sides.

    bits per masked token = sum over hidden tokens of -log2 p(token | window with them hidden) / hidden tokens

Rows are windows of ``length`` tokens; in a scored split the same tokens are always hidden, all behind the mask token.
The figure compares models of one tokenizer; ``extra`` holds accuracy, and bits per byte of hidden text for others.
Baselines guess by how often a token follows its visible left neighbour, or occurs at all. Cost of a score: one forward
pass over the split's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import log
from typing import Any

import numpy as np
import torch

from formwright.kit.errors import DataError
from formwright.models.batch import Batch, Score, View, pad
from formwright.models.masking import Masking, masking_of
from formwright.tasks import _encoding
from formwright.tasks._lm import LanguageTask, Window
from formwright.tasks._ngrams import Bigram
from formwright.tasks.base import Index, digest

Hidden = tuple[Window, np.ndarray]


class MaskedTask(LanguageTask):
    """Bits per masked token over given documents; options as in ``lm``, and the masking's ``rate`` and ``unit``."""

    metric = "bits/masked token"
    objective = "masked-lm"
    masked = True

    def __init__(
        self,
        name: str,
        documents: Sequence[tuple[str, str]],
        *,
        rate: float = 0.15,
        unit: str = "token",
        mask: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(name, documents, **options)
        self.rate, self.unit, self.mask = rate, unit, mask
        self._fingerprint = digest([self._fingerprint, "masked", rate, unit])
        self._masking: Masking | None = None
        self._hidden: dict[str, list[Hidden]] = {}
        self._bigram: Bigram | None = None

    def bind(self, model: Any) -> None:
        super().bind(model)
        self._hidden, self._bigram = {}, None
        self._masking = masking_of(
            model, f"task {self.name}", rate=self.rate, unit=self.unit, mask=self.mask, vocab=self._tokenizer.size
        )

    def _cut(self, text: str) -> list[Window]:
        """Non-overlapping windows of at most ``length`` tokens, with the bytes of text of each token as targets."""
        if self._tokenizer is None:
            raise DataError(f"task {self.name} is not bound to a model: call task.bind(model) first")
        ids, spans = self._tokenizer.offsets(text)
        sizes = [len(text[start:end].encode("utf-8", "surrogatepass")) for start, end in spans]
        cuts = range(0, len(ids), self.length)
        return [
            Window(ids[at : at + self.length], sizes[at : at + self.length], sum(sizes[at : at + self.length]))
            for at in cuts
        ]

    def _batch(self, chosen: Sequence[Window]) -> Batch:
        """``tokens`` (B, L) as they are in the text; what is hidden is the objective's business."""
        tokens, lengths = pad([window.tokens for window in chosen], self._tokenizer.pad_id)
        return Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths})

    def hidden(self, split: str) -> list[Hidden]:
        """The windows of a split, longest first, each with the tokens that are hidden in it (n,) bool."""
        self.check_split(split)
        if split not in self._hidden:
            cut = [window for text in self.parts[split] for window in self._cut(text)]
            assert self._masking is not None
            rng = np.random.default_rng([self.seed, len(cut)])
            found = [(window, self._masking.hidden(np.asarray(window.tokens), rng)) for window in cut]
            self._hidden[split] = sorted(found, key=lambda pair: -len(pair[0].tokens))
        return self._hidden[split]

    def score(self, view: View, split: str) -> Score:
        """Bits per masked token; ``per_item`` is bits of each window, ``curves`` its hidden tokens and their bytes."""
        nats, right = [], []
        for chosen in _encoding.chunks(self.hidden(split), self.rows):
            batch, wanted = self._covered(chosen)
            logits = view.outputs(batch).get("logits")
            if logits is None or logits.dim() != 3 or logits.shape[:2] != wanted.shape:
                shape = "none" if logits is None else tuple(logits.shape)
                raise DataError(f"task {self.name} needs logits (rows, length, vocabulary); the model gives {shape}")
            flat, targets = logits.detach().float().flatten(0, 1), wanted.flatten().to(logits.device)
            losses = torch.nn.functional.cross_entropy(flat, targets, ignore_index=-100, reduction="none")
            nats.append(losses.view_as(wanted).double().sum(1).cpu())
            right.append((flat.argmax(-1) == targets).view_as(wanted).sum(1).cpu())
        return self._score(split, torch.cat(nats).numpy(), torch.cat(right).numpy())

    def _covered(self, chosen: Sequence[Hidden]) -> tuple[Batch, torch.Tensor]:
        """Windows with their hidden tokens behind the mask token, and what stood there, -100 elsewhere."""
        batch = self._batch([window for window, _ in chosen])
        tokens = batch.inputs["tokens"]
        hidden = torch.zeros_like(tokens, dtype=torch.bool)
        for row, (_, where) in enumerate(chosen):
            hidden[row, : len(where)] = torch.from_numpy(where)
        assert self._masking is not None
        covered = tokens.masked_fill(hidden, self._masking.mask)
        return batch.replace(inputs={"tokens": covered}), tokens.masked_fill(~hidden, -100)

    def _score(self, split: str, nats: np.ndarray, right: np.ndarray) -> Score:
        """From the nats and the right guesses of each window."""
        found = self.hidden(split)
        tokens = np.array([int(where.sum()) for _, where in found])
        sizes = np.array([int(np.asarray(window.targets)[where].sum()) for window, where in found])
        bits = nats / log(2)
        extra = {"accuracy": float(right.sum() / tokens.sum()), "bits/byte": float(bits.sum() / sizes.sum())}
        curves = {"tokens": torch.from_numpy(tokens), "bytes": torch.from_numpy(sizes)}
        return Score(float(bits.sum() / tokens.sum()), torch.from_numpy(bits), curves, extra)

    def resampled(self, score: Score, index: Index) -> float:
        assert score.per_item is not None
        rows = np.asarray(index)
        return float(score.per_item.numpy()[rows].sum() / score.curves["tokens"].numpy()[rows].sum())

    def baselines(self, split: str) -> Mapping[str, Score]:
        """``unigram`` and ``bigram``, counted on calibrate; none before the task is bound, since tokens are counted."""
        if self._tokenizer is None:
            return super(LanguageTask, self).baselines(split)
        counts = self._counts()
        return {
            name: self._score(split, *map(np.array, zip(*self._guessed(split, counts, left)))) for name, left in WAYS
        }

    def _guessed(self, split: str, counts: Bigram, left: bool) -> Iterator[tuple[float, int]]:
        """(nats, right guesses) of each window by counting."""
        for window, where in self.hidden(split):
            row = np.asarray(window.tokens)
            before = np.concatenate(([-1], np.where(where, -1, row)[:-1])) if left else np.full(len(row), -1)
            nats = counts.nats(before[where], row[where])
            yield float(nats.sum()), int((counts.best(before[where]) == row[where]).sum())

    def _counts(self) -> Bigram:
        if self._bigram is None:
            rows = self._tokenizer.encode(self.parts["calibrate"], special=False)
            self._bigram = Bigram(rows, self._tokenizer.size)
        return self._bigram


#: Baselines, and whether they look at the left neighbour.
WAYS = (("unigram", False), ("bigram", True))
