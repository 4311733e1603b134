"""Seeded splits that do not depend on the order of the data.

Units (a module, a file, a group of identical texts) are sorted by a keyed hash of their name or content and dealt out
along the shares, so that the same unit lands in the same split wherever and whenever the data are read, and every
split gets its share whatever the hashes are. Cost: one hash per unit.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

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
    total = float(sum(sizes.values())) or 1.0
    borders = [sum(shares[: i + 1]) / sum(shares) for i in range(len(shares))]
    dealt: dict[str, str] = {}
    passed = 0
    for name in sorted(sizes, key=lambda unit: (order_key(seed, unit), unit)):
        middle = (passed + sizes[name] / 2) / total
        place = next((i for i, border in enumerate(borders) if middle < border), len(borders) - 1)
        dealt[name] = SPLITS[place]
        passed += sizes[name]
    held = Counter(dealt.values())
    for split in SPLITS:
        if not held[split] and len(dealt) >= len(SPLITS):
            donor = max(SPLITS, key=lambda other: held[other])
            given = min((name for name in dealt if dealt[name] == donor), key=lambda name: sizes[name])
            dealt[given] = split
            held.update({split: 1, donor: -1})
    return dealt
