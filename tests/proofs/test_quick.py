"""Every proof runs in its quick form, states figures, and what must be right whatever the machine holds."""

from __future__ import annotations

import warnings

import pytest

from formwright import registry
from formwright.proofs.base import prove


@pytest.mark.parametrize("name", registry.names("proof"))
def test_quick_form(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what checkpoints and kept-dense slots warn of is no claim
        proof = prove(name, quick=True, seed=0)
    assert proof.claims and proof.quick and proof.minutes < 5
    for claim in proof.claims:
        assert claim.claim and claim.published and claim.bar and claim.measured, claim
        assert isinstance(claim.holds, bool), claim
    exact = [claim for claim in proof.claims if claim.needs is None]
    assert exact and all(claim.holds for claim in exact), [claim for claim in exact if not claim.holds]
