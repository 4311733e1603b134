"""Skip zeros: which products it takes, what they say then, beside adapters too, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import formwright as fw
from formwright.kit.errors import FormwrightError, Refusal, SpecError
from formwright.parts.linears.skipping import Skipping
from formwright.proofs._bytes import spec
from formwright.surgery import surgery
from formwright.surgery.base import core

IDS = torch.tensor([[5, 200, 31, 7], [9, 9, 64, 250]])


def model(activation: str = "relu") -> Any:
    return fw.build(spec(32, 2, activation=activation), seed=0).eval()


def said(made: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return made(ids)


def laid_out(made: Any) -> list[str]:
    return [address for address, slot in made.slots().items() if isinstance(core(slot), Skipping)]


@pytest.mark.parametrize("activation", ["relu", "relu2"])
def test_products_behind_true_zeros_say_the_same(activation: str) -> None:
    made = model(activation)
    wanted = said(made)
    decided = fw.plan(made, "skip-zeros")
    fw.apply(made, decided)
    assert laid_out(made) == ["b0.mlp:down", "b1.mlp:down"]
    torch.testing.assert_close(said(made), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said(made, IDS[:1, :1]), wanted[:1, :1], rtol=1e-5, atol=1e-5)  # the compiled form
    assert "2 products pass over hidden values that are zero." in surgery("skip-zeros").words(decided)


def test_a_tolerance_takes_any_activation_and_is_what_it_says() -> None:
    made = model("gelu")
    wanted = said(made)
    fw.apply(made, "skip-zeros", tolerance=1e-3)
    assert len(laid_out(made)) == 2
    apart = float((said(made) - wanted).abs().max())
    assert 0 < apart < 1e-2
    assert "of up to 10" in surgery("skip-zeros").words(fw.plan(model("gelu"), "skip-zeros", tolerance=10))


def test_weights_below_adapters_are_laid_out() -> None:
    made = fw.apply(model(), "lora", rank=2, where=["down"])
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.1)
    wanted = said(made)
    fw.apply(made, "skip-zeros")
    assert len(laid_out(made)) == 2
    torch.testing.assert_close(said(made), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tolerance", [-0.1, float("inf"), float("nan"), True, "0.1", None])
def test_a_wrong_tolerance_is_one_sentence(tolerance: Any) -> None:
    with pytest.raises(SpecError, match=r"skip-zeros: tolerance=.* must be a finite number of at least 0"):
        fw.plan(model(), "skip-zeros", tolerance=tolerance)


def test_nothing_to_skip_is_refused() -> None:
    with pytest.raises(Refusal, match="no dense down projection stands behind an activation that gives zeros"):
        fw.plan(model("gelu"), "skip-zeros")
    twice = fw.apply(model(), "skip-zeros")
    with pytest.raises(Refusal, match="no dense down projection"):
        fw.plan(twice, "skip-zeros")


def test_unknown_names_name_the_nearest() -> None:
    with pytest.raises(SpecError, match=r"'dwn' matches no slot.*down"):
        fw.plan(model(), "skip-zeros", where=["dwn"])
    with pytest.raises(FormwrightError, match="tolerance"):
        fw.plan(model(), "skip-zeros", tolerence=0.1)


def test_a_plan_of_another_model_is_refused() -> None:
    decided = fw.plan(model(), "skip-zeros")
    changed = fw.apply(model(), "low-rank", rank=4, where=["down"], solver="svd")
    with pytest.raises(FormwrightError, match="down"):
        surgery("skip-zeros").check(changed, decided)
