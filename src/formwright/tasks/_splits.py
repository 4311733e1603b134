"""Seeded splits that do not depend on the order of the data.

Units (a module, a file, a group of identical texts) are sorted by a keyed hash of their name or content and dealt out
along the shares, so that the same unit lands in the same split wherever and whenever the data are read, and every
split gets its share whatever the hashes are. Cost: one hash per unit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from formwright.tasks.base import SPLITS

#: The rule's name, part of every fingerprint.
RULE = "keyed-order/1"


def order_key(seed: int, name: str) -> bytes:
    """The place of a unit in the seeded order."""
    return hashlib.sha256(f"{seed}\0{name}".encode("utf-8", "surrogatepass")).digest()


def deal(sizes: Mapping[str, int], shares: Sequence[float], seed: int) -> dict[str, str]:
    """Unit name -> split name, for units of the given sizes and one share per split.

    Walking through the seeded order, a unit goes to the split in whose share its middle falls, so that small numbers
    are dealt evenly too: of one unit, the middle share gets it; of three under (0.3, 0.3, 0.4), each gets one. Where
    there are units enough and a split got none, it takes the smallest of the split that has most.
    """
    names = sorted(sizes, key=lambda unit: (order_key(seed, unit), unit))
    places = dealt(np.array([sizes[name] for name in names], dtype=np.int64), shares)
    return {name: SPLITS[place] for name, place in zip(names, places)}


def dealt(sizes: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """The number of the split of each unit, for the sizes (n,) of units in their seeded order; see :func:`deal`."""
    borders = [sum(shares[: i + 1]) / sum(shares) for i in range(len(shares))]
    middles = (np.cumsum(sizes) - sizes / 2) / (float(sizes.sum()) or 1.0)
    place = np.minimum(np.searchsorted(borders, middles, side="right"), len(borders) - 1)
    held = np.bincount(place, minlength=len(SPLITS))
    for split in range(len(SPLITS)):
        if not held[split] and len(sizes) >= len(SPLITS):
            donor = int(held.argmax())
            units = np.flatnonzero(place == donor)
            place[units[sizes[units].argmin()]] = split
            held[donor] -= 1
            held[split] = 1
    return place
