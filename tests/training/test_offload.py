"""Interleaved offloading is AdamW: any stride, any subgroup, any machine; and a forgotten wait is noticed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from formwright.kit.errors import SpecError
from formwright.training.offload import (
    Interleaved,
    Race,
    Rates,
    Sizes,
    Threads,
    balanced_stride,
    best_stride,
    places,
    predicted,
)

RATES = Rates(up=4e9, down=4e9, host=1e8, device=1e9)
SHAPES = [(7,), (33, 5), (1001,), (1,), (64, 40), (130,)]


def parameters(kind: torch.dtype = torch.float32) -> list[nn.Parameter]:
    gen = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=gen).to(kind)) for shape in SHAPES]


def groups(held: list[nn.Parameter]) -> list[dict]:
    return [{"params": held[:3], "weight_decay": 0.1}, {"params": held[3:], "weight_decay": 0.0, "lr": 3e-3}]


def gradients(held: list[nn.Parameter], step: int) -> None:
    gen = torch.Generator().manual_seed(100 + step)
    for number, p in enumerate(held):
        p.grad = None if (number, step) == (1, 2) else torch.randn(p.shape, generator=gen).to(p.dtype)


def run(optimizer: torch.optim.Optimizer, held: list[nn.Parameter], steps: range, **how: float) -> None:
    for step in steps:
        gradients(held, step)
        if how and not isinstance(optimizer, Interleaved):
            for p in held:
                p.grad = None if p.grad is None else p.grad * how["scale"]
            optimizer.step()
        else:
            optimizer.step(**how)


def equal(one: torch.optim.Optimizer, other: torch.optim.Optimizer) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a["state"].keys() == b["state"].keys() and all(
        torch.equal(a["state"][key][name], value) for key, kept in b["state"].items() for name, value in kept.items()
    )


@settings(max_examples=25, deadline=None)
@given(
    stride=st.sampled_from([1, 2, 3, 5, None, "auto"]),
    subgroup=st.sampled_from([1, 64, 300, 2000, 10**9]),
    resident=st.integers(0, 1),
    scale=st.sampled_from([1.0, 0.37]),
)
def test_weights_and_state_are_those_of_adamw(stride, subgroup, resident, scale):
    mine, plain = parameters(), parameters()
    optimizer = Interleaved(groups(mine), stride=stride, subgroup=subgroup, resident=resident, rates=RATES, fused=False)
    reference = torch.optim.AdamW(groups(plain), foreach=False)
    run(optimizer, mine, range(6), scale=scale)
    run(reference, plain, range(6), scale=scale)
    assert all(torch.equal(a, b) for a, b in zip(mine, plain))
    assert equal(optimizer, reference)
    optimizer.close()


def test_fused_kernels_give_fused_adamw():
    mine, plain = parameters(), parameters()
    optimizer = Interleaved(groups(mine), stride=2, subgroup=500_000, rates=RATES)
    reference = torch.optim.AdamW(groups(plain), fused=True)
    run(optimizer, mine, range(6))
    run(reference, plain, range(6))
    assert all(torch.equal(a, b) for a, b in zip(mine, plain))
    optimizer.close()


def test_gradients_that_go_down_during_the_backward_pass():
    def losses(optimizer, layers, x):
        for _ in range(4):
            for part in (0.3, 0.7):  # two micro-batches, the second one ends the step
                last = part == 0.7
                loss = part * layers(x).square().mean()
                if last and isinstance(optimizer, Interleaved):
                    with optimizer.during_backward():
                        loss.backward()
                else:
                    loss.backward()
            yield loss.item()
            if isinstance(optimizer, Interleaved):
                optimizer.step(scale=0.5)
            else:
                for p in layers.parameters():
                    p.grad.mul_(0.5)
                optimizer.step()
            optimizer.zero_grad()

    found = []
    for kind in ("interleaved", "plain"):
        torch.manual_seed(0)
        layers, x = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(5, 8)
        if kind == "plain":
            optimizer = torch.optim.AdamW(layers.parameters(), foreach=False)
        else:
            optimizer = Interleaved(layers.parameters(), stride=2, subgroup=64, rates=RATES, fused=False)
        found.append(([*losses(optimizer, layers, x)], [p.detach() for p in layers.parameters()]))
    assert found[0][0] == found[1][0] and len(set(found[0][0])) > 1
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


def test_low_precision_weights_keep_a_float32_master():
    held = parameters(torch.bfloat16)
    optimizer = Interleaved(held, lr=1e-4, stride=2, subgroup=300, rates=RATES, fused=False)
    start = [p.detach().float() for p in held]
    masters = [nn.Parameter(value.clone()) for value in start]
    reference = torch.optim.AdamW(masters, lr=1e-4, foreach=False)
    for step in range(8):
        gradients(held, step)
        for p, master in zip(held, masters):
            master.grad = None if p.grad is None else p.grad.float()
        optimizer.step()
        reference.step()
    assert all(torch.equal(p, master.bfloat16()) for p, master in zip(held, masters))
    kept = optimizer.state_dict()["state"]
    assert all(torch.equal(kept[i]["master"], master) for i, master in enumerate(masters))


@pytest.mark.parametrize("saved_by", ["interleaved", "plain"])
def test_a_run_goes_on_with_another_stride(saved_by):
    whole = parameters()
    reference = torch.optim.AdamW(whole, foreach=False)
    run(reference, whole, range(9))
    first = parameters()
    if saved_by == "plain":
        begun = torch.optim.AdamW(first, foreach=False)
    else:
        begun = Interleaved(first, stride=3, subgroup=300, resident=1, rates=RATES, fused=False)
    run(begun, first, range(5))
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = Interleaved(second, stride=1, subgroup=1000, rates=RATES, fused=False)
    resumed.load_state_dict(begun.state_dict())
    run(resumed, second, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(second, whole))
    assert equal(resumed, reference)


def test_every_forgotten_wait_that_matters_is_noticed():
    """Each derived wait is dropped in turn on a throttled machine; whatever then comes too early is a Race."""
    slow = Rates(up=5e5, down=5e5, host=5e4, device=5e5)

    def noticed(forget: int) -> bool:
        held = parameters()
        lanes = Threads(throttled=True, forget=forget)
        optimizer = Interleaved(held, stride=2, subgroup=700, rates=slow, lanes=lanes, fused=False)
        try:
            run(optimizer, held, range(1))
        except Race:
            return True
        finally:
            lanes.close()
        return False

    caught = [forget for forget in range(20) if noticed(forget)]
    # The host's updates need gradients, the weights need updates, the flush needs the device's update.
    assert len(caught) >= 3


def test_places():
    assert places(5, 2) == ["host", "device"] * 2 + ["host"]
    assert places(4, 1) == ["device"] * 4
    assert places(4, None) == ["host"] * 4
    assert places(4, 2, resident=2) == ["host", "device", "resident", "resident"]


def test_the_closed_form_and_the_clock_agree():
    """Many equal subgroups of which the host updates some: the least step is at the balanced stride."""
    rates = Rates(up=55e9, down=55e9, host=2e9, device=1e11, cast=8.7e9)
    sizes = Sizes([10**8] * 60, weight=2, gradient=2)
    assert balanced_stride(rates) == 2 == min(range(2, 9), key=lambda stride: predicted(sizes, stride, rates))
    # Two ways at once, a link of that speed carries all states in less time than the host needs for half of them.
    assert best_stride(sizes, rates) == 1
    host_bound = Rates(up=1e8, down=1e8, host=2e9, device=1e11)
    assert best_stride(Sizes([10**8] * 60), host_bound) is None


def test_a_step_on_the_clock_is_its_longest_lane_and_the_edges():
    rates = Rates(up=24e9, down=24e9, host=1e9, device=8e9)
    only_host = predicted(Sizes([10**9] * 4), None, rates)
    assert math.isclose(only_host, 4 * 1.0 + 4 / 24)  # four updates, and the last weights on their way up
    assert predicted(Sizes([10**9] * 40), 2, rates) < 0.6 * predicted(Sizes([10**9] * 40), None, rates)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"subgroup": 0}, "subgroup=0"),
        ({"stride": 0}, "stride=0"),
        ({"stride": 1.5}, "stride=1.5"),
        ({"resident": 99}, "resident=99"),
    ],
)
def test_bad_settings(how, says):
    with pytest.raises(SpecError, match=says):
        Interleaved(parameters(), **{"rates": RATES, "stride": 2, **how})


def test_bad_parameters_and_gradients():
    with pytest.raises(SpecError, match="several devices"):
        Interleaved([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, device="meta"))], rates=RATES)
    with pytest.raises(SpecError, match="up=0"):
        Rates(up=0, down=1, host=1, device=1)
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = Interleaved(table.parameters(), rates=RATES)
    table(torch.tensor([1])).sum().backward()
    before = table.weight.detach().clone()
    with pytest.raises(SpecError, match="sparse"):
        optimizer.step()
    assert torch.equal(before, table.weight)


def test_rates_are_measured():
    optimizer = Interleaved(parameters(), subgroup=300)
    assert min(vars(optimizer.rates).values()) > 1e6


def test_a_run_with_its_state_on_the_host_is_the_same_run(tmp_path):
    """Weights and losses to the bit."""
    import formwright as fw
    from formwright.models.batch import Batch
    from formwright.models.recipes import recipe

    def batch(seed: int, index: int) -> Batch:
        ids = torch.arange(12).repeat(4, 1) + index % 4
        return Batch(inputs={"tokens": ids}, targets={"tokens": ids})

    def run(name: str, offload: bool) -> tuple[list, list]:
        model = fw.build(recipe("gpt-tiny", vocab=64, width=32, layers=2), seed=0)
        out = tmp_path / name
        done = fw.train(model, batch, steps=6, lr=3e-3, offload=offload, show=False, out=out, plot=False)
        return done.losses, [p.detach() for p in model.parameters()]

    (plain, wanted), (mine, found) = run("plain", False), run("host", True)
    assert mine == plain and all(torch.equal(a, b) for a, b in zip(found, wanted))


def test_offload_goes_with_no_shards_and_no_weights_set_beside_it():
    import formwright as fw
    from formwright.surgery import apply, samples

    model = apply(samples.decoder(), "diff-pruning")
    with pytest.raises(SpecError, match="sets weights of its own"):
        fw.train(model, lambda seed, index: None, steps=2, offload=True, show=False)
