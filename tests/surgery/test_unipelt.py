"""UniPELT: three methods behind gates, counted, chosen row by row, and refused where a gate cannot see a sequence."""

from __future__ import annotations

import pytest
import torch

import formwright as fw
from formwright.engine.state import State
from formwright.kit.errors import Refusal, SpecError
from formwright.surgery import apply, plan, samples
from formwright.surgery.adapt.switch import choose, use

SMALL = {"length": 2, "reduction": 8, "rank": 2}


def shaken(model):
    gen = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=gen))
    return model


@pytest.mark.parametrize(("width", "layers"), [(32, 3), (64, 2)])
def test_parameters_are_those_of_the_three_and_their_gates(width, layers):
    block = [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 2 * width}]
    spec = {
        "stem": {"part": "token-embedding", "vocab": 40, "width": width},
        "defaults": {"norm": "layernorm", "order": "post"},
        "layers": [{"repeat": layers, "layers": block}],
        "head": {"part": "mean-pool"},
    }
    model = fw.build(spec, device="meta")
    apply(model, plan(model, "unipelt", length=3, rank=2))
    d, m = width, width // 16
    gates = 4 * (d + 1)  # prefix, bottleneck, and one for each of q and v
    own = 2 * 3 * d + (2 * d * m + m + d) + 2 * 2 * 2 * d
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == layers * (own + gates)


def test_rows_of_a_batch_are_what_each_is_alone():
    model = apply(samples.encoder().double(), "unipelt", **SMALL)
    apply(model, "lora", rank=2, name="other")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    shaken(model)
    ids, names = samples.tokens(3), ["default", "other", None]
    together = model(ids, adapters=choose(model, names))
    for row, name in enumerate(names):
        assert torch.allclose(together[row], use(model, name)(ids[row : row + 1])[0], atol=1e-10)


def test_a_shut_gate_is_the_model():
    model = samples.encoder().double()
    said = model(samples.tokens())
    shaken(apply(model, "unipelt", **SMALL))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
            elif name.endswith("gate.bias"):
                parameter.fill_(-60.0)
        for item in model.walk():  # shut, a prefix still takes part of the softmax with keys of zero
            for adapter in (item.adapters or {}).values():
                if hasattr(adapter, "k"):
                    adapter.k = torch.nn.Parameter(adapter.k[:0])
                    adapter.v = torch.nn.Parameter(adapter.v[:0])
    assert torch.allclose(model(samples.tokens()), said, atol=1e-10)


def test_a_gate_refuses_a_stream_and_merging():
    model = apply(samples.decoder(), "unipelt", **SMALL)
    with pytest.raises(SpecError, match="cannot stream"):
        model(samples.tokens(1), state=State(1))
    with pytest.raises(Refusal):
        apply(model, "merge")


def test_bad_options():
    with pytest.raises(SpecError, match="alpha=0"):
        plan(samples.encoder(), "unipelt", alpha=0)
