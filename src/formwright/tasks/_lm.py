"""Language modelling: bits per byte of held-out text.

    bits per byte = sum over predicted tokens of -log2 p(token | tokens before it in its window) / bytes they cover

Bytes, not tokens, so that models with different tokenizers compare. Texts are cut into windows of ``length`` tokens;
a window's bytes are those of the text from the end of its first token to the end of its last target. The metric is a
ratio of sums over windows, and is resampled as one. Cost of a score: one forward pass over the split's tokens.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import log, log2
from typing import Any

import numpy as np
import torch

from formwright.kit.errors import DataError, SpecError
from formwright.models.batch import Batch, Score, View, pad
from formwright.tasks import _encoding
from formwright.tasks._documents import PIECE, cut
from formwright.tasks._splits import RULE, deal, order_key
from formwright.tasks.base import SPLITS, Index, Task, digest

#: calibrate (which is also what training reads), select, test.
SHARES = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Window:
    """``tokens`` and, one further on, ``targets``; ``bytes`` of text that the targets cover."""

    tokens: list[int]
    targets: list[int]
    bytes: int


def pieces(text: str, most: int = PIECE) -> list[str]:
    """``text`` in runs of whole lines of at most ``most`` characters; a longer line is cut."""
    return list(cut([text], most))


def most_of(length: int) -> int:
    """Characters of a scored piece of text: a split then shows many places of the corpus, and nearly all windows of
    ``length`` tokens are full."""
    return max(PIECE, 16 * length)


def windows(tokenizer: Any, text: str, length: int) -> list[Window]:
    """Non-overlapping windows of at most ``length`` predicted tokens; the token before a window opens it.

    A tokenizer with a ``start_id`` opens the text with it, so that the first token is predicted too.
    """
    ids, spans = tokenizer.offsets(text)
    ends = [end for _, end in spans]
    first = getattr(tokenizer, "start_id", None)
    if first is not None:
        ids, ends = [first, *ids], [0, *ends]
    found = []
    for start in range(0, len(ids) - 1, length):
        stop = min(start + length, len(ids) - 1)
        covered = text[ends[start] : ends[stop]]
        found.append(Window(ids[start:stop], ids[start + 1 : stop + 1], len(_bytes(covered))))
    return found


class LanguageTask(Task):
    """Bits per byte over given documents; subclasses say where they come from.

    documents: (name, text) of each; it stays whole on one side of the splits, and so do documents of equal text.
    length: tokens a window. rows: windows a batch. limit: bytes of text that select and test are scored on at most,
    drawn by a seeded order, so that a score takes minutes on any corpus.
    """

    needs = "outputs"
    metric = "bits/byte"
    higher_is_better = False

    def __init__(
        self,
        name: str,
        documents: Any,
        *,
        length: int = 256,
        rows: int = 8,
        limit: int = 400_000,
        seed: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        if length < 1 or rows < 1 or limit < 1:
            raise SpecError(f"task {name}: length, rows and limit must be at least 1, not {length}, {rows}, {limit}")
        self.name, self.length, self.rows, self.seed, self.notes = name, length, rows, seed, list(notes)
        self.limit = limit
        self.parts: dict[str, list[str]] = {}
        self._fingerprint = self._deal(documents)
        self._tokenizer: Any = None
        self._windows: dict[str, list[Window]] = {}

    def _deal(self, documents: Any) -> str:
        """Fill ``parts`` and ``documents``; the fingerprint."""
        texts: dict[str, str] = {}
        for _, text in documents:
            if text.strip():
                texts.setdefault(digest(text), text)
        self._count(len(texts))
        place = deal({key: len(text) for key, text in texts.items()}, SHARES, self.seed)
        parts: dict[str, list[str]] = {split: [] for split in SPLITS}
        for key in sorted(texts, key=lambda key: order_key(self.seed, key)):
            parts[place[key]] += pieces(texts[key], most_of(self.length))
        for split in SPLITS:
            self.parts[split] = _draw(parts[split], None if split == "calibrate" else self.limit, self.seed)
        return digest([self.version, RULE, SHARES, PIECE, self.seed, self.length, self.limit], self.parts)

    def _count(self, different: int) -> None:
        """Take down how many different texts there are. DataError for too few."""
        self.documents = different
        if different < len(SPLITS):
            raise DataError(f"{self.name} has {different} different texts; three splits need at least {len(SPLITS)}")

    def bind(self, model: Any) -> None:
        self._tokenizer = _encoding.tokenizer_of(model, self.name, "offsets")
        self._windows = {}
        most = _encoding.limit_of(model)
        if most is not None and self.length > most:
            raise DataError(
                f"task {self.name} has windows of {self.length} tokens; {_encoding.model_name(model)} takes {most}: "
                f"say length={most}"
            )

    def _cut(self, text: str) -> list[Window]:
        if self._tokenizer is None:
            raise DataError(f"task {self.name} is not bound to a model: call task.bind(model) first")
        return windows(self._tokenizer, text, self.length)

    def _batch(self, chosen: Sequence[Window]) -> Batch:
        tokens, lengths = pad([window.tokens for window in chosen], self._tokenizer.pad_id)
        targets, _ = pad([window.targets for window in chosen], -100)
        return Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}, targets={"tokens": targets})

    def batches(self, split: str, *, seed: int, budget: int, policy: Any = None) -> Iterator[Batch]:
        """``tokens`` (B, L) and ``targets["tokens"]`` (B, L), the next tokens, -100 where there is none.

        Texts are tokenised as they come, in an order from (seed, epoch); 64 batches' worth of windows are
        mixed. The last window of a text is shorter than L, so L is ``length`` in nearly every batch.
        """
        self.check_split(split)
        done = epoch = 0
        while done < budget:
            rng = np.random.default_rng([seed, epoch])
            pool: list[Window] = []
            for i in rng.permutation(len(self.parts[split])):
                pool += self._cut(self.parts[split][i])
                while len(pool) >= 64 * self.rows and done < budget:
                    yield self._batch([pool.pop(int(rng.integers(len(pool)))) for _ in range(self.rows)])
                    done += 1
                if done == budget:
                    return
            if not pool:
                raise DataError(f"task {self.name}: the texts of {split} have no token to predict")
            while pool and done < budget:
                size = min(self.rows, len(pool))
                yield self._batch([pool.pop(int(rng.integers(len(pool)))) for _ in range(size)])
                done += 1
            epoch += 1

    def score(self, view: View, split: str) -> Score:
        """Bits per byte; ``per_item`` is bits of each window, ``curves["bytes"]`` its bytes."""
        self.check_split(split)
        if split not in self._windows:
            cut = [window for text in self.parts[split] for window in self._cut(text)]
            self._windows[split] = sorted(cut, key=lambda window: -len(window.tokens))
        found = self._windows[split]
        bits = []
        for chosen in _encoding.chunks(found, self.rows):
            batch = self._batch(chosen)
            logits = view.outputs(batch).get("logits")
            if logits is None or logits.dim() != 3 or logits.shape[:2] != batch.inputs["tokens"].shape:
                shape = "none" if logits is None else tuple(logits.shape)
                raise DataError(f"task {self.name} needs logits (rows, length, vocabulary); the model gives {shape}")
            targets = batch.targets["tokens"].to(logits.device)
            nats = torch.nn.functional.cross_entropy(
                logits.detach().float().flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="none"
            )
            bits.append(nats.view_as(targets).double().sum(1).cpu() / log(2))
        return _ratio(torch.cat(bits), torch.tensor([window.bytes for window in found]))

    def resampled(self, score: Score, index: Index) -> float:
        assert score.per_item is not None
        rows = np.asarray(index)
        return float(score.per_item.numpy()[rows].sum() / score.curves["bytes"].numpy()[rows].sum())

    def baselines(self, split: str) -> Mapping[str, Score]:
        """``uniform``: 8 bits; ``byte entropy``: byte frequencies of calibrate; ``zlib``: its best level on the split.

        The items of the first two are texts of the split, not windows, which only a tokenizer makes.
        """
        texts = [_bytes(text) for text in self.parts[self.check_split(split)]]
        sizes = torch.tensor([len(text) for text in texts])
        counts: Counter[int] = Counter()
        for text in self.parts["calibrate"]:
            counts.update(_bytes(text))
        # One is added to every byte, so that one never seen does not cost infinitely many bits.
        total = sum(counts.values()) + 256
        price = np.array([-log2((counts[byte] + 1) / total) for byte in range(256)])
        bits = torch.tensor([float(price[np.frombuffer(text, dtype=np.uint8)].sum()) for text in texts])
        whole = b"".join(texts)
        return {
            "uniform": _ratio(8.0 * sizes.double(), sizes),
            "byte entropy": _ratio(bits.double(), sizes),
            "zlib": Score(8.0 * len(zlib.compress(whole, 9)) / len(whole)),
        }

    def texts(self, split: str) -> list[str]:
        return list(self.parts[self.check_split(split)])

    def describe(self) -> list[str]:
        return [
            *self.notes,
            f"{self.documents} different texts",
            "splits: " + ", ".join(f"{split} {size / 1e6:.2f} MB" for split, size in self.sizes().items()),
            f"metric: {self.metric} in windows of {self.length} tokens; lower is better",
            f"fingerprint {self.fingerprint()[:12]}",
        ]

    def sizes(self) -> dict[str, int]:
        """Bytes of text of each split."""
        return {split: sum(len(_bytes(text)) for text in self.parts[split]) for split in SPLITS}

    def fingerprint(self) -> str:
        return self._fingerprint


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _ratio(bits: torch.Tensor, sizes: torch.Tensor) -> Score:
    return Score(float(bits.sum() / sizes.sum()), bits, curves={"bytes": sizes})


def _draw(texts: list[str], limit: int | None, seed: int) -> list[str]:
    """All texts, or as many as fit into ``limit`` bytes in a seeded order, at least one."""
    if limit is None:
        return texts
    chosen: list[str] = []
    size = 0
    for text in sorted(texts, key=lambda text: order_key(seed, text)):
        size += len(_bytes(text))
        if chosen and size > limit:
            break
        chosen.append(text)
    return chosen
