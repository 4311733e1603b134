"""Every proof runs in its quick form, states figures, and what must be right whatever the machine holds."""

from __future__ import annotations

import warnings

import pytest

from formwright import registry
from formwright.proofs.base import prove

#: Words of claims about speed, or about quality after so short a training: figures, which may not hold.
FIGURES = ("fast", "cost", "beats", "half", "8 bits fail", "keeps", "bfloat16", "train", "heal", "order")


@pytest.mark.parametrize("name", registry.names("proof"))
def test_quick_form(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what checkpoints and kept-dense slots warn of is no claim
        proof = prove(name, quick=True, seed=0)
    assert proof.claims and proof.quick and proof.minutes < 5
    for claim in proof.claims:
        assert claim.claim and claim.published and claim.bar and claim.measured, claim
        assert isinstance(claim.holds, bool), claim
    exact = [claim for claim in proof.claims if not any(word in claim.claim for word in FIGURES)]
    assert exact and all(claim.holds for claim in exact), [claim for claim in exact if not claim.holds]
