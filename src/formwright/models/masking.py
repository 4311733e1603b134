"""Which tokens of a row are hidden, and behind what: masking of tokens, whole words, or spans.

A row is cut into units (its tokens, its words, or spans of random length); units are taken in a random order until
``rate`` of the row's tokens are hidden, at least one. Devlin et al., 2019 (1810.04805) for tokens and words; Joshi et
al., 2020 (1907.10529) for spans, whose lengths are geometric. Cost: a sort of the units of a row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from formwright.kit.errors import DataError, SpecError, all_of, unknown

UNITS = ("token", "word", "span")
#: Joshi et al.: lengths are geometric with 0.2 a step, and longer ones than 10 are drawn again; their mean is 3.8.
SPAN_STEP, SPAN_MOST = 0.2, 10


@dataclass(frozen=True)
class Masking:
    """How rows are masked.

    rate: share of a row's tokens that are hidden. unit: token, word or span. mask: the id that stands for a hidden
    token. vocab: ids are below it. spared (vocab,) bool: ids that are never hidden nor drawn. begins, ends (vocab,)
    bool, for words: a token goes on with the word before it if it ``begins`` inside a word and that one ``ends``
    inside one. replaced, random: shares of the hidden tokens shown as ``mask`` and as any token; the rest is left as
    it was.
    """

    rate: float
    unit: str
    mask: int
    vocab: int
    spared: np.ndarray
    begins: np.ndarray | None = None
    ends: np.ndarray | None = None
    replaced: float = 0.8
    random: float = 0.1

    def __post_init__(self) -> None:
        problems = [] if self.unit in UNITS else [unknown("unit of masking", self.unit, UNITS)]
        if not 0.0 < self.rate <= 1.0:
            problems.append(f"masking: rate={self.rate} must be above 0 and at most 1")
        if self.replaced < 0 or self.random < 0 or self.replaced + self.random > 1.0 + 1e-9:
            problems.append(
                f"masking: replaced={self.replaced} and random={self.random} are shares that sum to at most 1"
            )
        if not 0 <= self.mask < self.vocab:
            problems.append(f"masking: mask={self.mask} is no id below {self.vocab}")
        if self.unit == "word" and (self.begins is None or self.ends is None):
            problems.append("masking: whole words need a tokenizer that says where words begin")
        all_of(SpecError, problems)

    def hidden(self, row: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(n,) bool: which tokens of the row of ids are hidden; none where all are spared."""
        places = np.flatnonzero(~self.spared[row])
        out = np.zeros(len(row), dtype=bool)
        if not len(places):
            return out
        unit = self._units(row, places, rng)
        order = rng.permutation(int(unit[-1]) + 1)
        budget = max(1, round(self.rate * len(places)))
        reached = np.cumsum(np.bincount(unit)[order])
        taken = order[: int(np.searchsorted(reached, budget)) + 1]
        out[places[np.isin(unit, taken)]] = True
        return out

    def _units(self, row: np.ndarray, places: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """(places,) number of the unit of each place, ascending from 0."""
        count = len(places)
        if self.unit == "token":
            return np.arange(count)
        if self.unit == "span":
            return np.repeat(np.arange(count), _lengths(count, rng))[:count]
        assert self.begins is not None and self.ends is not None
        ids = row[places]
        joined = self.begins[ids[1:]] & self.ends[ids[:-1]] & (np.diff(places) == 1)
        return np.concatenate(([0], np.cumsum(~joined)))

    def shown(self, row: np.ndarray, hidden: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The row as the model sees it: hidden tokens as ``mask``, as another token, or as they were."""
        out = row.copy()
        places = np.flatnonzero(hidden)
        draw = rng.random(len(places))
        others = np.flatnonzero(~self.spared)
        out[places[draw < self.replaced]] = self.mask
        swapped = places[(draw >= self.replaced) & (draw < self.replaced + self.random)]
        out[swapped] = others[rng.integers(len(others), size=len(swapped))]
        return out


def _lengths(count: int, rng: np.random.Generator) -> np.ndarray:
    """(count,) lengths of spans, each at least 1 and at most ``SPAN_MOST``: geometric, with the tail drawn again."""
    chances = (1.0 - SPAN_STEP) ** np.arange(SPAN_MOST)
    return 1 + rng.choice(SPAN_MOST, size=count, p=chances / chances.sum())


def masking_of(
    model: Any,
    who: str,
    *,
    rate: float,
    unit: str,
    mask: int | None = None,
    vocab: int,
    replaced: float = 0.8,
    random: float = 0.1,
) -> Masking:
    """The masking for a model's tokenizer; DataError where it has no mask token and none was given."""
    tokenizer = getattr(model, "tokenizer", None)
    if mask is None:
        mask = None if tokenizer is None else tokenizer.mask_id
    if mask is None:
        raise DataError(
            f"{who} hides tokens behind one that the tokenizer of {getattr(model, 'name', '') or 'the model'} lacks: "
            "say which id with mask=ID, or train a tokenizer with mask=True"
        )
    spared = np.zeros(vocab, dtype=bool)
    spared[[id for id in {mask, *(() if tokenizer is None else tokenizer.special_ids)} if 0 <= id < vocab]] = True
    begins = ends = None
    if unit == "word" and tokenizer is not None:
        begins, ends = word_tables(tokenizer.tokens(), vocab)
    return Masking(rate, unit, mask, vocab, spared, begins, ends, replaced, random)


def word_tables(tokens: Iterable[str], vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """(vocab,) bool twice: which pieces begin inside a word, and which end so that a next piece may go on with it.

    WordPiece marks what goes on with ``##``; byte-level BPE and SentencePiece mark what follows a space, and there a
    piece goes on if a letter, digit or underscore meets another.
    """
    pieces = list(tokens)[:vocab]
    begins, ends = np.zeros(vocab, dtype=bool), np.zeros(vocab, dtype=bool)
    if any(piece.startswith("##") for piece in pieces):
        begins[: len(pieces)] = [piece.startswith("##") for piece in pieces]
        ends[: len(pieces)] = True
        return begins, ends
    begins[: len(pieces)] = [_wordlike(piece[:1]) for piece in pieces]
    ends[: len(pieces)] = [_wordlike(piece[-1:]) for piece in pieces]
    return begins, ends


def _wordlike(character: str) -> bool:
    """A letter, digit or underscore, where ``Ġ``, ``Ċ`` and ``▁`` are a tokenizer's spaces and line ends."""
    return (character.isalnum() or character == "_") and character not in "ĠĊĉč▁"
