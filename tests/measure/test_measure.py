"""Measuring: closed forms equal what is there, timing alternates fairly, workloads are what their name says."""

from __future__ import annotations

import pytest
import torch

import formwright as fw
import small
from formwright.kit.errors import Refusal, SpecError
from formwright.measure import Timing, alternate, measure
from formwright.measure.report import model_bytes, model_parameters
from formwright.measure.workload import workload


def test_counts() -> None:
    model = small.encoder()
    expected = sum(p.numel() for p in model.parameters())
    assert model_parameters(model) == expected and model_bytes(model) == 4 * expected
    shared = fw.copy(model, share=True)
    assert model_bytes(torch.nn.ModuleList([model, shared])) == 4 * expected


def test_int8_counts_its_numbers_and_bytes() -> None:
    model = small.encoder()
    before = model_parameters(model)
    fw.apply(model, "llm-int8", outliers="none")
    assert before <= model_parameters(model) <= before * 1.05
    assert model_bytes(model) < 4 * before


def test_measure_is_plain_data() -> None:
    found = measure(small.encoder(), shape="encode:2x8", rounds=3)
    assert found.to_dict()["macs"] == small.encoder().cost(workload(small.encoder(), "encode:2x8").shape).macs
    assert found.ms_item == pytest.approx(found.ms / 2) and found.per_second == pytest.approx(1e3 / found.ms_item)
    with pytest.raises(SpecError, match="rounds"):
        measure(small.encoder(), shape="encode:2x8", rounds=0)


def test_every_contender_runs_every_round_in_turning_order() -> None:
    seen: list[str] = []
    times = alternate({name: (lambda name=name: seen.append(name)) for name in "ab"}, rounds=4, warmup=0)
    assert "".join(seen) == "abbaabba" and {len(t.seconds) for t in times.values()} == {4}


def test_a_turn_is_several_calls_in_a_row() -> None:
    seen: list[str] = []
    times = alternate({name: (lambda name=name: seen.append(name)) for name in "ab"}, rounds=2, warmup=0, turn=3)
    assert "".join(seen) == "aaabbbbbbaaa" and {len(t.seconds) for t in times.values()} == {2}


def test_timing_figures() -> None:
    fast, slow = Timing((1.0, 1.0, 1.0, 1.0)), Timing((2.0, 2.0, 2.0, 4.0))
    assert fast.over(slow) == 2.0 and slow.best == 2.0 and not fast.noisy and slow.noisy


def test_workloads() -> None:
    model = small.encoder()
    with pytest.raises(Refusal, match="streams"):
        workload(model, "decode:1x8")
    for wrong in ("encode", "encode:0x8", "prefill:1xnatural", "encode:1x0", "sing:1x8"):
        with pytest.raises(SpecError, match="shape"):
            workload(model, wrong)
    decoder = fw.build(
        {
            "stem": {"part": "token-embedding", "width": 16, "vocab": 20},
            "layers": [{"part": "attention", "heads": 2, "causal": True}, {"part": "mlp", "hidden": 16}],
            "head": {"part": "lm", "tied": True},
        }
    )
    load = workload(decoder, "decode:2x8")
    cut = fw.copy(decoder)
    cut.item("b0.attention").drop()
    for _ in range(2):  # every contender has a stream of its own, whatever ran before
        assert load.run(decoder).shape == load.run(cut).shape == (2, 1, 20)
    assert load.items == 2 * 8 and load.shape.past == 8
