"""Mixtures of tasks: shares by hand and as drawn, tags, and an order that does not depend on where a run began."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from formwright.kit.errors import SpecError
from formwright.models.batch import Batch
from formwright.training.mixture import Mixture, exponent, shares

SIZES = {"large": 900, "small": 100}


def mixture(**how) -> Mixture:
    def of(name: str):
        place = list(SIZES).index(name)
        return lambda seed, index: Batch(inputs={"tokens": torch.tensor([[place, index], [seed, index]])})

    return Mixture({name: of(name) for name in SIZES}, SIZES, **how)


def test_shares_by_hand():
    assert shares(SIZES, exponent("proportional")) == {"large": 0.9, "small": 0.1}
    assert shares(SIZES, exponent("uniform")) == {"large": 0.5, "small": 0.5}
    assert shares(SIZES, exponent("temperature", 2.0)) == pytest.approx({"large": 0.75, "small": 0.25})
    assert shares(SIZES, 1.0, cap=300) == {"large": 0.75, "small": 0.25}
    assert exponent("annealed", progress=0.0) == 1.0 and exponent("annealed", progress=1.0) == pytest.approx(0.2)
    annealed = mixture(sampler="annealed", draws=101)
    assert annealed.shares(0) == {"large": 0.9, "small": 0.1}
    assert annealed.shares(100) == pytest.approx(shares(SIZES, 0.2))


@pytest.mark.parametrize("sampler", ["proportional", "uniform", "temperature"])
def test_draws_follow_the_shares(sampler):
    mixed, count = mixture(sampler=sampler), 2000
    found = Counter(mixed.task_at(index) for index in range(count))
    share = mixed.shares(0)["small"]
    assert abs(found["small"] - count * share) < 3 * (count * share * (1 - share)) ** 0.5


def test_batches_are_tagged_and_each_task_keeps_its_own_order():
    mixed = mixture(sampler="uniform", seed=4)
    drawn = [mixed.draw(index) for index in range(40)]
    for name, place in (("large", 0), ("small", 1)):
        own = [batch for batch in drawn if batch.meta[0]["task"] == name]
        assert [int(batch.inputs["tokens"][0, 1]) for batch in own] == list(range(len(own)))
        assert all(int(batch.inputs["tokens"][0, 0]) == place for batch in own)
        assert all(batch.meta == ({"task": name},) * 2 for batch in own)
    later = mixture(sampler="uniform", seed=4)
    for index in (25, 39, 3):
        assert torch.equal(later.draw(index).inputs["tokens"], drawn[index].inputs["tokens"])
        assert torch.equal(later.draw(index).inputs["tokens"], drawn[index].inputs["tokens"])


def test_refusals():
    for how in ({"sampler": "even"}, {"temperature": 0}, {"cap": 0}, {"sampler": "annealed"}):
        with pytest.raises(SpecError):
            mixture(**how)
    with pytest.raises(SpecError, match="sizes lacks task 'b'"):
        Mixture({"b": []}, {})
