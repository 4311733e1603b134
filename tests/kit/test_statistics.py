"""Kept, the paired bootstrap and the smallest certifiable loss, against closed forms and simulation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from formwright.kit.errors import DataError
from formwright.kit.statistics import (
    TYPICAL_CHANGE,
    Z95,
    influence,
    kept,
    paired_bootstrap,
    smallest_certifiable_loss,
    standard_error,
)

positive = st.floats(0.01, 100, allow_nan=False)


def score(items: Any, value: float | None = None, **more: Any) -> SimpleNamespace:
    items = np.asarray(items, float)
    return SimpleNamespace(value=float(items.mean()) if value is None else value, per_item=items, **more)


def mean(scored: Any, index: np.ndarray) -> float:
    return float(scored.per_item[index].mean())


@given(positive, positive)
def test_kept_is_the_ratio_in_the_direction_of_the_metric(candidate: float, original: float) -> None:
    assert kept(candidate, original) == pytest.approx(candidate / original)
    assert kept(candidate, original, higher_is_better=False) == pytest.approx(original / candidate)


@given(st.floats(0.1, 0.9), st.floats(0.01, 0.5), st.floats(0, 1))
def test_kept_above_chance(chance: float, gain: float, share: float) -> None:
    """A candidate at chance keeps nothing, whatever its plain score; in between it is linear."""
    assert kept(chance + share * gain, chance + gain, chance=chance) == pytest.approx(share, abs=1e-9)
    assert kept(chance - share * gain, chance - gain, False, chance) == pytest.approx(share, abs=1e-9)


def test_kept_by_hand() -> None:
    assert kept(0.75, 0.93, chance=0.61) == pytest.approx(0.14 / 0.32)
    assert kept(float("nan"), 0.5) == 0.0
    assert kept(float("inf"), 3.0, higher_is_better=False) == 0.0


@pytest.mark.parametrize("original,chance", [(0.33, 0.33), (0.2, 0.33), (0.0, None), (float("nan"), None)])
def test_nothing_to_keep_is_said(original: float, chance: float | None) -> None:
    with pytest.raises(DataError, match=r"no better than .*: there is nothing to keep"):
        kept(0.5, original, chance=chance)


def test_bootstrap_of_an_unchanged_model_is_one() -> None:
    same = score(np.random.default_rng(0).random(200))
    assert paired_bootstrap(None, same, same) == 1.0


@given(st.integers(0, 2**31), st.integers(20, 200))
@settings(max_examples=10, deadline=None)
def test_vectorised_mean_equals_the_callable(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    a, b = score(rng.random(n)), score(rng.random(n) + 0.2)
    fast = paired_bootstrap(None, a, b, seed=1, resamples=4000)
    slow = paired_bootstrap(mean, a, b, seed=1, resamples=4000)
    assert fast == pytest.approx(slow, abs=4 * (0.3 / np.sqrt(n)) / np.sqrt(4000) * 3)


def test_bootstrap_is_seeded_and_below_the_estimate() -> None:
    rng = np.random.default_rng(0)
    original = score(rng.random(300) < 0.9)
    candidate = score(np.where(rng.random(300) < 0.05, 0, original.per_item))
    bound = paired_bootstrap(None, candidate, original, seed=3)
    assert bound == paired_bootstrap(None, candidate, original, seed=3)
    assert bound < kept(candidate.value, original.value) < 1


def test_pairing_is_what_makes_the_bound_tight() -> None:
    rng = np.random.default_rng(0)
    original = score(rng.random(500))
    near = score(original.per_item + rng.normal(0, 0.01, 500))
    shuffled = score(rng.permutation(near.per_item))
    assert paired_bootstrap(None, near, original) > 0.995
    assert paired_bootstrap(None, shuffled, original) < 0.97


@pytest.mark.parametrize("chance", [None, 0.5])
def test_coverage_of_the_bound(chance: float | None) -> None:
    """The true kept lies above the 95 % bound in about 95 % of simulated test sets (300: 2 sd are 2.5 points)."""
    rng = np.random.default_rng(7)
    right, lost, won = 0.85, 0.06, 0.03
    truth = kept(right * (1 - lost) + (1 - right) * won, right, chance=chance)
    above = 0
    for trial in range(300):
        original = rng.random(400) < right
        candidate = np.where(original, rng.random(400) >= lost, rng.random(400) < won)
        above += truth >= paired_bootstrap(
            None, score(candidate), score(original), chance=chance, resamples=400, seed=trial
        )
    assert 0.91 <= above / 300 <= 0.985


def test_ratio_metric_is_resampled_as_a_ratio() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 1000, 200)
    original = score(sizes * 2.0, 2.0, sizes=sizes)
    candidate = score(sizes * 2.2, 2.2, sizes=sizes)

    def ratio(scored: Any, index: np.ndarray) -> float:
        return float(scored.per_item[index].sum() / scored.sizes[index].sum())

    # Every window is 10 % worse: no resample changes that.
    assert paired_bootstrap(ratio, candidate, original, higher_is_better=False) == pytest.approx(1 / 1.1)
    assert np.allclose(influence(original, ratio), 0, atol=1e-9)


def test_resamples_without_an_original_count_as_nothing_kept() -> None:
    original = score([1.0] + [0.0] * 9)
    assert paired_bootstrap(None, original, original) == 0.0


def test_unequal_tests_are_refused() -> None:
    with pytest.raises(DataError, match="3 items of the candidate, 4 of the original"):
        paired_bootstrap(None, score([1, 0, 1]), score([1, 0, 1, 1]))
    with pytest.raises(DataError, match="no per-item values"):
        paired_bootstrap(None, SimpleNamespace(value=1.0, per_item=None), score([1]))


@given(st.integers(2, 400), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_standard_error_of_a_mean(n: int, seed: int) -> None:
    items = score(np.random.default_rng(seed).random(n))
    textbook = items.per_item.std(ddof=1) / np.sqrt(n)
    assert standard_error(items) == pytest.approx(textbook)
    assert standard_error(items, mean) == pytest.approx(textbook, rel=1e-6)


def test_certifiable_loss_of_right_or_wrong_items() -> None:
    """The docstring's example: 1.645 sqrt(0.05 / 124) / 0.93, and the same above chance."""
    original = score([1.0] * 93 + [0.0] * 7)
    half = Z95 * np.sqrt(TYPICAL_CHANGE / 124)
    assert smallest_certifiable_loss(original, 124) == pytest.approx(half / 0.93)
    assert smallest_certifiable_loss(original, 124) == pytest.approx(0.036, abs=0.001)
    assert smallest_certifiable_loss(original, 124, chance=0.61) == pytest.approx(half / 0.32)
    assert smallest_certifiable_loss(original, 124, resampled=mean) == pytest.approx(half / 0.93)


@given(st.integers(10, 10_000))
def test_certifiable_loss_falls_with_the_root_of_the_items(n: int) -> None:
    original = score(np.linspace(0, 1, 50))
    assert smallest_certifiable_loss(original, 4 * n) == pytest.approx(smallest_certifiable_loss(original, n) / 2)


def test_certifiable_loss_predicts_the_bootstrap() -> None:
    """A candidate that differs on 5 % of the items without losing gets a bound that far below its estimate."""
    rng = np.random.default_rng(0)
    n = 2000
    original = score(1.0 / rng.integers(1, 11, n))
    promised = smallest_certifiable_loss(original)
    gaps = []
    for trial in range(20):
        # A changed item takes the value of another item, given that it is a different value.
        other = rng.permutation(original.per_item)
        pool = np.flatnonzero(other != original.per_item)
        changed = original.per_item.copy()
        picked = rng.choice(pool, int(TYPICAL_CHANGE * n), replace=False)
        changed[picked] = other[picked]
        candidate = score(changed)
        gaps.append(kept(candidate.value, original.value) - paired_bootstrap(None, candidate, original, seed=trial))
    assert np.mean(gaps) == pytest.approx(promised, rel=0.15)


def test_certifiable_loss_needs_something_to_lose() -> None:
    with pytest.raises(DataError, match="nothing to keep"):
        smallest_certifiable_loss(score([0.0, 0.0]))
    with pytest.raises(DataError, match="no test items"):
        smallest_certifiable_loss(score([1.0, 0.0]), 0)
    assert smallest_certifiable_loss(score([1.0] * 50)) == pytest.approx(Z95 * np.sqrt(TYPICAL_CHANGE / 50))
