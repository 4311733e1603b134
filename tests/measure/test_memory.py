"""The memory of a training step: what a run without numbers says is what autograd saves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import formwright as fw
from formwright import registry
from formwright.kit.errors import Refusal, SpecError
from formwright.measure.memory import Memory, measured, predict
from formwright.models.build import build
from formwright.objectives.base import Gen
from formwright.objectives.causal_lm import CausalLM
from formwright.surgery.samples import WIDTH, classifier, decoder, encoder

ROWS, LENGTH = 3, 20


def hybrid() -> Any:
    attention = {"part": "attention", "heads": 4, "causal": True}
    return build(
        {
            "stem": {"part": "token-embedding", "vocab": 40, "width": WIDTH},
            "layers": [
                {"part": "mamba"},
                {"part": "mamba2", "head_width": 16},
                attention,
                {"part": "mlp", "hidden": 48},
            ],
            "final_norm": "layernorm",
            "head": {"part": "lm", "tied": True},
        },
        seed=4,
    )


def whole(model: Any) -> Any:
    return model


def lora(model: Any) -> Any:
    where = [a for a in model.slots() if a.rpartition(":")[2] in ("q", "v", "out")]
    return fw.apply(model, "lora", rank=2, where=where)


def only(word: str) -> Callable[[Any], Any]:
    def chosen(model: Any) -> Any:
        names = [name for name, _ in model.named_parameters() if word in name]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names if names else name.startswith("stem"))
        return model

    return chosen


WAYS = {"full": whole, "lora": lora, "biases": only("bias"), "head": only("heads")}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("made", [encoder, decoder, classifier, hybrid])
def test_what_is_said_before_is_what_is_saved(made: Any, way: str) -> None:
    model = WAYS[way](made())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said, found = predict(model, ROWS, LENGTH), measured(model, ROWS, LENGTH)
    assert abs(said.saved - found.saved) <= 0.05 * found.saved and said.saved > 0
    assert said.categories == found.categories and said.items == found.items
    assert said.how == ("probe" if made is hybrid else "dry run") and found.how == "measured"
    assert said.peak >= said.weights + said.optimizer + said.saved
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def count(model: Any, loss: Callable[[Any], torch.Tensor]) -> int:
    """Bytes saved by plain counting: distinct storages that are no parameter's."""
    own = {p.untyped_storage()._cdata for p in model.parameters()}
    held: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage()._cdata] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(model)
    return sum(t.untyped_storage().nbytes() for key, t in held.items() if key not in own)


def test_a_perceptron_by_hand() -> None:
    """Post-norm up, gelu, down: the two inputs, gelu's, the norm's with mean and deviation; nothing twice."""
    spec = {
        "stem": {"part": "linear", "features": 8, "width": 8},
        "defaults": {"norm": "layernorm", "order": "post"},
        "layers": [{"part": "mlp", "hidden": 16}],
        "head": {"part": "states"},
    }
    model = build(spec)
    tokens = 2 * 5
    said = predict(model, 2, 5, loss="states")
    assert said.categories == {
        "linear inputs": 4 * tokens * (8 + 16),
        "activations": 4 * tokens * 16,
        "norms": 4 * tokens * (8 + 2),
    }
    assert said.items == {"b0.mlp": 4 * tokens * (8 + 16 + 16 + 8 + 2)}
    batch = {"values": torch.randn(2, 5, 8)}
    assert said.saved == count(model, lambda made: made(batch).sum()) - batch["values"].nbytes
    assert said.trainable == sum(p.numel() for p in model.parameters())
    assert said.optimizer == 2 * said.gradients == 2 * said.weights
    for parameter in model.item("b0.mlp").part.parameters():
        parameter.requires_grad_(False)
    # A frozen linear needs its weight and not its input.
    assert "linear inputs" not in predict(model, 2, 5, loss="states").categories


def test_dropout_and_logits_have_categories() -> None:
    spec = {**decoder().spec.to_dict(), "layers": [{"part": "mlp", "hidden": 16, "dropout": 0.5}]}
    model = build(spec)
    objective = CausalLM()

    def loss(model: Any, batch: Any) -> torch.Tensor:
        tokens = batch.inputs["tokens"]
        return objective.loss({"model": model}, batch.replace(targets={"tokens": tokens}), Gen())["model"].total

    found = measured(model, ROWS, LENGTH, loss=loss)
    assert found.categories["dropout"] >= ROWS * LENGTH * WIDTH
    assert "head" in measured(model, ROWS, LENGTH).items
    assert found.categories.get("losses", 0) < 4 * ROWS * LENGTH * 40  # the fused loss keeps no logits
    # Which tokens have a target is a question about numbers, so a row or two are run.
    said = predict(model, ROWS, LENGTH, loss=loss)
    assert said.how == "probe" and abs(said.saved - found.saved) <= 0.05 * found.saved
    with pytest.raises(Refusal, match="load it first"):
        predict(build(spec, device="meta"), ROWS, LENGTH, loss=loss)


def test_checkpointed_items_hold_their_inputs() -> None:
    def loss(model: Any, batch: Any) -> torch.Tensor:
        x, ctx = model.embed(batch)
        for item in model.items():
            x = checkpoint(lambda x, item=item: item(x, ctx)[0], x, use_reentrant=False, preserve_rng_state=False)
        return x.sum()

    model = encoder()
    said, found = predict(model, ROWS, LENGTH, loss=loss), measured(model, ROWS, LENGTH, loss=loss)
    assert said.saved == found.saved
    assert said.saved < 0.3 * predict(model, ROWS, LENGTH, loss="states").saved


def test_sizes_before_there_is_memory() -> None:
    hollow = build(encoder().spec, device="meta")
    assert predict(hollow, ROWS, LENGTH) == predict(encoder(), ROWS, LENGTH)
    large = predict(build(registry.resolve("recipe", "bert-base")(), device="meta"), 32, 512)
    assert isinstance(large, Memory) and large.saved > 5e9 and large.peak > large.total
    assert large.categories["linear inputs"] > large.categories["norms"]


def test_saved_grows_with_rows_and_what_trains() -> None:
    one, four = predict(encoder(), 1, LENGTH), predict(encoder(), 4, LENGTH)
    assert four.saved == pytest.approx(4 * one.saved, rel=0.02)
    assert predict(only("heads")(classifier()), 4, LENGTH).saved < 0.05 * predict(classifier(), 4, LENGTH).saved


@pytest.mark.parametrize(
    "how, words",
    [
        ({"rows": 0}, "at least one row"),
        ({"length": 0}, "at least one row"),
        ({"loss": "output"}, "did you mean 'outputs'"),
        ({"optimizer": "adamx"}, "did you mean 'adam'"),
    ],
)
def test_what_makes_no_sense(how: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        predict(encoder(), **{"rows": 1, "length": 4, **how})
