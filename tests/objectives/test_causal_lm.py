"""Causal language modelling whose head and loss are one op: the same sums and gradients as by way of the logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import formwright as fw
from formwright.models.batch import Batch
from formwright.models.text import packed
from formwright.objectives.base import Gen
from formwright.objectives.causal_lm import CausalLM

HEADS = {
    "own": {"part": "lm", "vocab": 23},
    "tied": {"part": "lm", "tied": True, "bias": True, "scale": 0.5},
    "transformed": {"part": "lm", "vocab": 23, "bias": True, "transform": {"width": 8, "activation": "gelu"}},
}


def model(head: dict) -> fw.Model:
    spec = {
        "stem": {"part": "token-embedding", "width": 16, "vocab": 23},
        "layers": [{"part": "attention", "heads": 2, "causal": True, "rotary": {}}, {"part": "mlp", "hidden": 24}],
        "final_norm": "rmsnorm",
        "head": head,
    }
    return fw.build(spec, seed=0).double()


def documents(sizes: tuple[int, ...] = (5, 1, 9, 3)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 23, (size + 1,), generator=generator).tolist() for size in sizes]


def batch_of(m: fw.Model, rows: list[list[int]]) -> Batch:
    """The documents packed, each predicting its next tokens."""
    batch = packed(m, [row[:-1] for row in rows])
    return batch.replace(targets={"tokens": torch.tensor([token for row in rows for token in row[1:]])[None]})


def gradients(m: fw.Model, batch: Batch, objective: CausalLM) -> tuple[Tensor, dict[str, Tensor]]:
    m.zero_grad()
    loss = objective.loss({"model": m}, batch, Gen())["model"]
    loss.total.backward()
    return loss.total.detach(), {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("options", [{}, {"smoothing": 0.1, "z": 0.01, "logits": 50}])
def test_a_plain_head_gives_what_its_logits_give(name: str, options: dict) -> None:
    m = model(HEADS[name])
    batch = batch_of(m, documents())
    one = gradients(m, batch, CausalLM(**options))
    m.heads["out"].register_forward_hook(lambda *args: None)  # who watches a head wants it to be called
    two = gradients(m, batch, CausalLM(**options))
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, check_dtype=False)  # logits are lost in float32
    assert {key for key in one[1] if key.startswith("heads")} == {key for key in two[1] if key.startswith("heads")}


@pytest.mark.parametrize("name", HEADS)
def test_a_packed_batch_is_the_sum_of_its_documents(name: str) -> None:
    m, rows = model(HEADS[name]), documents()
    together, grads = gradients(m, batch_of(m, rows), CausalLM())
    alone = [gradients(m, batch_of(m, [row]), CausalLM()) for row in rows]
    torch.testing.assert_close(together, sum(total for total, _ in alone), rtol=1e-12, atol=1e-12)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, sum(own[key] for _, own in alone), rtol=1e-10, atol=1e-12)


def test_an_adapted_head_is_called() -> None:
    m = model(HEADS["own"])
    adapted = fw.apply(m, "lora", where=["head:out"], rank=2)
    torch.nn.init.ones_(next(p for key, p in adapted.named_parameters() if p.requires_grad and "head" in key))
    batch = batch_of(adapted, documents())
    _, grads = gradients(adapted, batch, CausalLM())
    assert any(float(grad.abs().sum()) > 0 for grad in grads.values())
