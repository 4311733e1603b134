"""Stand-ins for models: a byte tokenizer, and views whose answers are known."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from formwright.models.batch import Batch


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORMWRIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)


class Bytes:
    """Id = byte + 2; 1 parts a pair; characters of several bytes give several tokens of the same span."""

    pad_id = 0
    size = 258
    files = {"bytes": b""}

    def encode(
        self, texts: list[str], pairs: list[str] | None = None, max_length: int | None = None, special: bool = True
    ) -> list[list[int]]:
        joined = texts if pairs is None else [f"{text}\x00{pair}" for text, pair in zip(texts, pairs)]
        return [[1 if byte == 0 else byte + 2 for byte in text.encode()][:max_length] for text in joined]

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        spans = [(i, i + 1) for i, character in enumerate(text) for _ in character.encode()]
        return [byte + 2 for byte in text.encode()], spans


class HashView:
    """``encode``: random-looking vectors that depend on the ids only, so that padding and order must not matter."""

    def __init__(self, vector: Callable[[tuple[int, ...]], np.ndarray] | None = None) -> None:
        self.vector = vector or self.hashed
        self.shapes: list[tuple[int, int]] = []

    @staticmethod
    def hashed(ids: tuple[int, ...]) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(str(ids).encode()).digest()[:4], "big")
        return np.random.default_rng(seed).standard_normal(16)

    def encode(self, batch: Batch) -> torch.Tensor:
        tokens, lengths = batch.inputs["tokens"], batch.lengths["tokens"]
        self.shapes.append(tuple(tokens.shape))
        rows = [tuple(row[:n].tolist()) for row, n in zip(tokens, lengths)]
        return torch.tensor(np.stack([self.vector(row) for row in rows]), dtype=torch.float32)


class LogitView:
    """``outputs``: logits by a function of the batch."""

    def __init__(self, logits: Callable[[Batch], torch.Tensor]) -> None:
        self.logits = logits

    def outputs(self, batch: Batch) -> dict[str, torch.Tensor]:
        return {"logits": self.logits(batch)}


@pytest.fixture
def make() -> Any:
    """``make.model(...)``, ``make.hash_view(...)``, ``make.logit_view(...)``, ``make.tokenizer()``."""

    def model(**given: Any) -> SimpleNamespace:
        return SimpleNamespace(**{"name": "toy", "tokenizer": Bytes(), "max_length": None, "labels": None, **given})

    return SimpleNamespace(model=model, hash_view=HashView, logit_view=LogitView, tokenizer=Bytes)
