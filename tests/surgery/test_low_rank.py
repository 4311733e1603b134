"""Low rank: exact where nothing is lost, the error the spectrum says where something is, and ranks where they count."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import formwright as fw
from formwright import registry, surgery
from formwright.kit.errors import DataError, FormwrightError, Refusal, SpecError
from formwright.models.build import build
from formwright.parts.linears.dense import Dense
from formwright.parts.linears.low_rank import LowRank, break_even
from formwright.surgery.compress._factors import Inputs, axes, factorise
from formwright.surgery.compress._inputs import gather
from formwright.surgery.compress._ranks import Offer, allocate
from formwright.surgery.evidence import batches
from formwright.surgery.samples import decoder, encoder, equal, outputs, said, state, tokens


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def skewed(rows: int, width: int, seed: int = 0) -> Tensor:
    """Inputs whose directions differ in strength, with a mean of their own."""
    scales = torch.logspace(1, -2, width)
    return draw(rows, width, seed=seed) * scales @ torch.linalg.qr(draw(width, width, seed=seed + 1))[0] + 0.5


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)])
@pytest.mark.parametrize("split", ["sqrt", "left"])
def test_full_rank_is_exact(shape: tuple[int, int], split: str) -> None:
    weight, x = draw(*shape), draw(9, shape[1], seed=2)
    made = factorise(weight, min(shape), "svd", split)
    torch.testing.assert_close(x @ made.first.T @ made.second.T, x @ weight.T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("rank", [1, 7, 23])
def test_the_error_is_what_the_dropped_singular_values_say(shape: tuple[int, int], rank: int) -> None:
    weight = draw(*shape)
    made = factorise(weight, rank)
    dropped = torch.linalg.svdvals(weight.double())[rank:].square().sum().sqrt()
    error = (weight - made.second @ made.first).double().norm()
    torch.testing.assert_close(error, dropped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_whitened_loses_least_of_the_output(shape: tuple[int, int]) -> None:
    weight, x = draw(*shape), skewed(400, shape[1])
    mean = x.mean(0)
    inputs = Inputs((x - mean).T @ (x - mean) / len(x), mean)
    for rank in (2, 6, 12):
        made, plain = factorise(weight, rank, "whitened", inputs=inputs), factorise(weight, rank)
        assert made.shift is not None
        lost = (x @ made.first.T @ made.second.T + made.shift - x @ weight.T).norm()
        assert lost < 0.8 * (x @ plain.first.T @ plain.second.T - x @ weight.T).norm()
        least = torch.linalg.svdvals(((x - mean) @ weight.T).double())[rank:].square().sum().sqrt()
        torch.testing.assert_close(lost.double(), least, rtol=1e-3, atol=1e-3)
        energies = axes(weight, inputs)[0]
        torch.testing.assert_close((energies[rank:].sum() * len(x)).sqrt(), least, rtol=1e-3, atol=1e-3)


def test_inputs_that_fill_no_space_are_factorised() -> None:
    x = draw(200, 3) @ draw(3, 24, seed=1)  # rank 3; rounding leaves the covariance a little indefinite
    for columns, scale in ((24, 1.0), (24, 1e-6), (24, 0.0)):
        covariance = ((x * scale).T @ (x * scale) / len(x)).float() - 1e-6 * scale**2 * torch.eye(columns)
        made = factorise(draw(40, columns), 3, "whitened", inputs=Inputs(covariance))
        y = x * scale @ draw(40, columns).T
        torch.testing.assert_close(x * scale @ made.first.T @ made.second.T, y, rtol=1e-2, atol=1e-2 * scale)


def test_snmf_is_not_negative_and_better_than_random() -> None:
    weight = draw(24, 40).abs() - 0.3
    made, worse = (
        factorise(weight, 8, name, generator=torch.Generator().manual_seed(0)) for name in ("snmf", "random")
    )
    assert bool((made.first >= 0).all())
    assert (weight - made.second @ made.first).norm() < 0.9 * weight.norm()
    assert (weight - made.second @ made.first).norm() < (weight - worse.second @ worse.first).norm()


def test_half_of_bert_base_at_rank_256() -> None:
    """A layer holds four weights of (768, 768) and two of (768, 3072)."""
    spec = registry.resolve("recipe", "bert-base")()
    model = build(spec, device="meta")
    inside = {address: slot for address, slot in model.slots().items() if address.startswith("b")}
    before = sum(slot.in_features * slot.out_features for slot in inside.values())
    assert before == 12 * (4 * 768**2 + 2 * 768 * 3072)
    by = surgery.surgery("low-rank")
    plan = by.made(model, {}, {"ranks": dict.fromkeys(inside, 256), "solver": "svd", "split": "sqrt", "seed": 0})
    by.check(model, plan)
    by.reshape(model, plan)
    held = [slot for address, slot in model.slots().items() if address in inside]
    after = sum(slot.first.weight.numel() + slot.second.weight.numel() for slot in held)  # type: ignore[union-attr]
    assert after == 12 * 256 * (4 * (768 + 768) + 2 * (768 + 3072)) and 2 * after == before


def test_break_even_stays_dense_and_warns() -> None:
    assert break_even(32, 32) == 16 and break_even(32, 64) == 21
    model = encoder()
    with pytest.warns(UserWarning, match=r"slots stay dense, rank 16 is not below break-even 16"):
        plan = surgery.plan(model, "low-rank", rank=16)
    assert {address.rpartition(":")[2] for address in plan.decisions["ranks"]} == {"up", "down"}
    assert "break-even" in plan.decisions["kept"]["b0.attention:q"]
    surgery.apply(model, plan)
    assert type(model.slot("b0.attention:q")) is Dense and type(model.slot("b0.mlp:up")) is LowRank
    with warnings.catch_warnings(), pytest.raises(Refusal, match="no slot can be made smaller"):
        warnings.simplefilter("ignore")
        surgery.plan(encoder(), "low-rank", rank=30)


@pytest.mark.parametrize("options", [{"parameters": 0.5}, {"parameters": 0.7, "solver": "svd"}, {"rank": 0.5}])
def test_the_plan_states_the_count_that_comes_out(options: dict[str, Any]) -> None:
    model = encoder()
    plan = surgery.plan(model, "low-rank", tokens(), multiple_of=1, **options)
    before, after = plan.decisions["parameters"]
    surgery.apply(model, plan)
    held = sum(
        parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() == 2 and name[:2] != "st"
    )
    assert held == after and after <= options.get("parameters", 0.51) * before


def test_a_budget_goes_where_it_counts() -> None:
    """A weight that is of low rank already gives its budget to the ones that are not."""
    flat, steep = torch.ones(32), torch.logspace(0, -6, 32)
    ranks = allocate({"flat": Offer(32, 64, flat), "steep": Offer(32, 64, steep)}, budget=2048, step=1)
    assert 0 < ranks["steep"] < ranks["flat"] or ranks["flat"] == 0
    spent = sum((rank * 96 if rank else 2048) for rank in ranks.values())
    assert spent <= 2048
    loud = allocate({"a": Offer(32, 64, flat, 1.0), "b": Offer(32, 64, flat, 5.0)}, budget=2048, step=1)
    assert loud["b"] == 0 or loud["b"] > loud["a"] > 0


def test_energy_picks_the_least_rank() -> None:
    model = encoder()
    weight = model.slot("b0.mlp:up").weight.detach()
    plan = surgery.plan(model, "low-rank", rank="energy:0.6", multiple_of=1, where="b0.mlp:up")
    rank = plan.decisions["ranks"]["b0.mlp:up"]
    share = torch.linalg.svdvals(weight).square().cumsum(0) / weight.square().sum()
    assert share[rank - 2] < 0.6 <= share[rank - 1]


def test_whitened_keeps_the_outputs_of_a_model_better() -> None:
    evidence = tokens(16, 24)
    for made in (encoder, decoder):
        wanted, lost = said(made()), {}
        for solver in ("whitened", "svd", "random"):
            model = surgery.apply(
                made(), "low-rank", evidence, rank=0.6, solver=solver, multiple_of=1, where=["up", "down"]
            )
            lost[solver] = float((said(model)["out"] - wanted["out"]).norm())
        assert lost["whitened"] < lost["svd"] < lost["random"]


def test_covariances_are_of_real_tokens() -> None:
    model, lengths = encoder(), torch.tensor([4, 12, 0, 7])
    padded = fw.Batch(inputs={"tokens": tokens()}, lengths={"tokens": lengths})
    rows = [row[:n].tolist() for row, n in zip(tokens(), lengths) if n]
    a = gather(model, ["b1.mlp:up", "b0.attention:q"], batches(model, padded))
    b = gather(model, ["b1.mlp:up", "b0.attention:q"], batches(model, rows, rows=2))
    assert a.keys() == b.keys() and len(a) == 4
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_ranks_may_be_edited() -> None:
    model = encoder()
    plan = surgery.plan(model, "low-rank", rank=0.5, multiple_of=1)
    plan.decisions["ranks"] = {"b0.mlp:up": 3}
    surgery.apply(model, plan)
    assert model.slot("b0.mlp:up").rank == 3  # type: ignore[union-attr]
    for ranks, words in (
        ({"b0.mlp:upp": 3}, "did you mean"),
        ({"b1.mlp:up": 33}, "from 1 to 32"),
        ({"b0.mlp:up": 3}, "only a dense weight"),
    ):
        again = surgery.plan(model, "low-rank", rank=0.5, multiple_of=1)
        again.decisions["ranks"] = ranks
        before = state(model)
        with pytest.raises(SpecError, match=words):
            surgery.apply(model, again)
        assert equal(before, state(model))
    lost = surgery.Plan.from_json(surgery.plan(encoder(), "low-rank", tokens(), rank=0.5, multiple_of=1).to_json())
    with pytest.raises(SpecError, match="lost the covariance"):
        surgery.apply(encoder(), lost)


def test_gradients_reach_both_factors() -> None:
    model = surgery.apply(encoder(), "low-rank", rank=0.5, multiple_of=1, where="b0.mlp:up")
    outputs(model)["out"].square().sum().backward()
    slot = model.slot("b0.mlp:up")
    assert slot.first.weight.grad.norm() > 0 and slot.second.weight.grad.norm() > 0  # type: ignore[union-attr]
    merged = surgery.apply(model, "merge", where="b0.mlp:up")
    assert type(merged.slot("b0.mlp:up")) is Dense


@pytest.mark.parametrize(
    "options, words",
    [
        ({}, "either rank"),
        ({"rank": 2, "parameters": 0.5}, "either rank"),
        ({"rank": 0}, "above 0"),
        ({"rank": -3}, "above 0"),
        ({"rank": 1.5}, "at most 1"),
        ({"rank": "energy:2"}, "must be a number"),
        ({"rank": True}, "must be a number"),
        ({"parameters": 1.0}, "between 0 and 1"),
        ({"rank": 2, "solver": "nmf"}, "unknown solver 'nmf'"),
        ({"rank": 2, "split": "rigt"}, "unknown split"),
        ({"rank": 2, "multiple_of": 0}, "at least 1"),
        ({"rank": 2, "where": "upp"}, "matches no slot"),
        ({"rank": 2, "where": "stem:tokens"}, "would break the tie"),
        ({"rank": 2, "solver": "whitened"}, "give evidence"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(FormwrightError, match=words):
        surgery.plan(decoder(), "low-rank", **options)


def test_inputs_that_are_not_finite_are_named() -> None:
    model = encoder()
    with torch.no_grad():
        model.slot("b0.mlp:down").bias[0] = torch.nan
    with pytest.raises(DataError, match="not finite"):
        surgery.plan(model, "low-rank", tokens(), rank=0.5, multiple_of=1)
    with pytest.raises(DataError, match="empty"):
        surgery.plan(encoder(), "low-rank", [], rank=0.5)
