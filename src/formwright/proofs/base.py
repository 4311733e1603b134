"""Proofs: each published claim, scaled to a laptop, with its bar and the figure measured here.

A proof is one file that registers ``prove(quick, seed) -> list[Claim]``. What does not hold on a small machine stays
in the table as not held.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from formwright import registry


@dataclass(frozen=True)
class Claim:
    """One line: what is claimed, the published figure, the bar set here, the figure measured, and whether it holds.

    ``needs``: what the figure must have to mean anything: "time" on a quiet machine, "training" at full size, or the
    "install" of what is missing here. A quick run may miss such a bar; claims that need nothing hold in every run.
    """

    claim: str
    published: str
    bar: str
    measured: str
    holds: bool
    needs: Literal["time", "training", "install"] | None = None


@dataclass(frozen=True)
class Proof:
    """The outcome of one proof."""

    name: str
    paper: str
    claims: tuple[Claim, ...]
    seed: int
    quick: bool
    minutes: float

    @property
    def holds(self) -> bool:
        return all(claim.holds for claim in self.claims)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def prove(name: str, *, quick: bool = False, seed: int = 0) -> Proof:
    """Run the registered proof ``name``; ``quick`` takes seconds and is what continuous integration runs."""
    run: Callable[[bool, int], list[Claim]] = registry.resolve("proof", name)
    started = time.perf_counter()
    claims = tuple(run(quick, seed))
    minutes = (time.perf_counter() - started) / 60
    return Proof(name, str(getattr(run, "paper", "") or ""), claims, seed, quick, minutes)
