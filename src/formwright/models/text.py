"""Texts in, vectors or labels out: the face of a model for people who bring texts.

Texts are sorted by length and run in the packed layout, so that no product is spent on padding; results come back in
the caller's order. A batch is run in pieces of about ``BUDGET`` tokens, so that activations stay in the cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formwright.kit.errors import DataError
from formwright.models.batch import Batch

#: Tokens run at once. Small enough that the widest activation of a small encoder stays in a core's share of cache.
BUDGET = 2048


class TextFace:
    """Mixed into a model: ``encode``, ``outputs``, ``predict``."""

    tokenizer: Any = None
    max_length: int | None = None
    prompts: Mapping[str, str] = {}

    @property
    def labels(self) -> list[str] | None:
        """Names of the classes of its classifier, where it has one and knows them."""
        for head in self.heads.values():  # type: ignore[attr-defined]
            if getattr(head, "labels", None):
                return list(head.labels)
        return None

    @property
    def limit(self) -> int | None:
        """The longest sequence it reads: its own setting or what its tables take, whichever is shorter."""
        known = [length for length in (self.max_length, self.reach) if length is not None]  # type: ignore[attr-defined]
        return min(known) if known else None

    def rows(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> list[list[int]]:
        """Ids of texts, cut to the limit; cut ones are counted in one warning."""
        if self.tokenizer is None:
            raise DataError(f"{self.name or 'this model'} carries no tokenizer, so it reads ids, not texts")  # type: ignore[attr-defined]
        before = self.tokenizer.cut
        rows = self.tokenizer.encode(texts, pairs, max_length=self.limit)
        cut = self.tokenizer.cut - before
        if cut:
            warnings.warn(f"{cut} of {len(texts)} texts were cut to {self.limit} tokens", stacklevel=3)
        return rows

    def encode(self, texts: Sequence[str] | str | Batch, *, batch_size: int = 32, as_tensor: bool = False) -> Any:
        """Vectors (n, width) of texts, float32 NumPy (tensors with ``as_tensor``), normalised as the model says.

        A single string gives one vector. A :class:`Batch` gives the tensor of its rows. Empty texts are allowed.
        """
        if isinstance(texts, Batch):
            return self.vectors(texts)
        single = isinstance(texts, str)
        texts = [texts] if isinstance(texts, str) else list(texts)
        rows = self.rows(texts)
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        out = torch.zeros(len(rows), self.width)  # type: ignore[attr-defined]
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            out[chosen] = self.vectors(packed(self, [rows[index] for index in chosen])).float().cpu()
        out = out[0] if single else out
        return out if as_tensor else np.asarray(out)

    def vectors(self, batch: Batch) -> Tensor:
        """(B, width) of a batch of ids, without gradient, in pieces of about ``BUDGET`` tokens."""
        head = next((h for h in self.heads.values() if h.kind == "vectors"), None)  # type: ignore[attr-defined]
        if head is None:
            raise DataError(
                f"{self.name or 'this model'} has no pooling head, so it gives no vector for a text; "  # type: ignore[attr-defined]
                "attach one: formwright apply MODEL head --kind mean-pool"
            )
        name = next(key for key, value in self.heads.items() if value is head)  # type: ignore[attr-defined]
        with reading(self):
            made = [self(piece, head=name) for piece in pieces(self, batch)]  # type: ignore[operator]
            return made[0] if len(made) == 1 else torch.cat(made)

    def outputs(self, batch: Batch) -> dict[str, Tensor]:
        """What the heads say of a batch, without gradient: ``logits`` of the only head, or by name; padded rows."""
        with reading(self):
            out = self(batch.to(self.device))  # type: ignore[operator,attr-defined]
        return out if isinstance(out, dict) else {"logits": out}

    def predict(self, texts: Sequence[str], pairs: Sequence[str] | None = None, batch_size: int = 32) -> list[dict]:
        """One {"label", "probability"} a text, by its sequence classifier."""
        head = next((h for h in self.heads.values() if h.kind == "sequence"), None)  # type: ignore[attr-defined]
        if head is None:
            raise DataError(f"{self.name or 'this model'} has no classifier head, so it predicts no labels")  # type: ignore[attr-defined]
        labels = self.labels or [str(index) for index in range(head.out.out_features)]
        rows = self.rows(texts, pairs)
        types = self.tokenizer.types(texts, pairs, self.limit) if pairs is not None else None
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        found: list[dict] = [{} for _ in rows]
        name = next(key for key, value in self.heads.items() if value is head)  # type: ignore[attr-defined]
        for first in range(0, len(order), batch_size):
            chosen = order[first : first + batch_size]
            batch = packed(self, [rows[i] for i in chosen], None if types is None else [types[i] for i in chosen])
            with reading(self):
                logits = torch.cat([self(piece, head=name) for piece in pieces(self, batch)])  # type: ignore[operator]
            for index, probabilities in zip(chosen, logits.float().softmax(-1)):
                best = int(probabilities.argmax())
                found[index] = {"label": labels[best], "probability": float(probabilities[best])}
        return found


def _there(module: Any) -> bool:
    return module is not None


@contextmanager
def reading(model: Any) -> Iterator[None]:
    """Inside, ``model`` is evaluated and keeps no gradient; every module is left in the mode it was in."""
    training, found = [], [model]
    for module in found:  # as ``modules`` walks, without the names and the set: this is done for every batch
        held = module.__dict__
        if held["training"]:
            training.append(module)
        if held["_modules"]:
            found += filter(_there, held["_modules"].values())
    for module in training:
        module.training = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def packed(model: Any, rows: list[list[int]], types: list[list[int]] | None = None) -> Batch:
    """Rows of ids as one packed batch on the model's device."""
    flat = torch.tensor([token for row in rows for token in row], dtype=torch.long)[None]
    offsets = torch.tensor([0] + [len(row) for row in rows]).cumsum(0)
    inputs = {"tokens": flat}
    if types is not None:
        inputs["types"] = torch.tensor([kind for row in types for kind in row], dtype=torch.long)[None]
    return Batch(inputs=inputs, offsets={"tokens": offsets}).to(model.device)


def to_packed(batch: Batch) -> Batch:
    """A padded batch of tokens in the packed layout."""
    lengths = batch.lengths.get("tokens")
    tokens = batch.inputs["tokens"]
    if lengths is None:
        lengths = torch.full((tokens.shape[0],), tokens.shape[1], device=tokens.device)
    valid = torch.arange(tokens.shape[1], device=tokens.device)[None] < lengths[:, None]
    inputs = {key: value[valid][None] if key in ("tokens", "types") else value for key, value in batch.inputs.items()}
    offsets = torch.cat((lengths.new_zeros(1), lengths.cumsum(0)))
    return batch.replace(inputs=inputs, lengths={}, offsets={"tokens": offsets})


def pieces(model: Any, batch: Batch) -> list[Batch]:
    """The batch packed and cut between documents into pieces of about ``BUDGET`` tokens."""
    if "tokens" not in batch.inputs or len(batch.inputs) > 1 + ("types" in batch.inputs):
        return [batch]
    if batch.marks or batch.condition:  # these belong to rows or tokens, and are not cut
        return [batch]
    if "tokens" not in batch.offsets:
        batch = to_packed(batch)
    if batch.inputs["tokens"].shape[1] <= BUDGET:
        return [batch]
    borders = batch.offsets["tokens"].tolist()
    cuts, last = [0], 0
    for index in range(1, len(borders)):
        if borders[index] - borders[last] > BUDGET and index - 1 > last:
            cuts.append(index - 1)
            last = index - 1
    cuts.append(len(borders) - 1)
    found = []
    for first, stop in pairwise(cuts):
        if first == stop:
            continue
        a, b = borders[first], borders[stop]
        inputs = {key: value[:, a:b] for key, value in batch.inputs.items()}
        found.append(
            Batch(
                inputs=inputs,
                offsets={"tokens": torch.tensor(borders[first : stop + 1], device=inputs["tokens"].device) - a},
            )
        )
    return found or [batch]
