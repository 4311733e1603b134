"""Adapters saved alone: a small directory that fits the weights it was trained on and no others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import formwright as fw
from formwright import registry
from formwright.hub import load_adapter, save_adapter
from formwright.hub.adapters import adapters, base_sha256
from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.models.model import Entry
from formwright.surgery.adapt.switch import numbers, use
from formwright.surgery.base import surgery

SPEC: dict[str, Any] = {
    "stem": {"part": "token-embedding", "vocab": 30, "width": 16},
    "layers": [{"repeat": 2, "layers": [{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 24}]}],
    "head": {"part": "sequence-classifier", "classes": 3},
}
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


def trained(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def answer(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)


@pytest.mark.parametrize("int8", [False, True])
def test_an_adapter_is_small_and_gives_the_same_answers(tmp_path: Path, int8: bool) -> None:
    base = fw.build(SPEC)
    if int8:
        fw.apply(base, "llm-int8", outliers="none")
    fw.save(base, tmp_path / "base")
    model = trained(fw.apply(fw.load(tmp_path / "base"), "lora", rank=2, train=["heads.*"], name="mine"))
    model.history.append(Entry("event", "trained", {"steps": 5}))
    place = tmp_path / "base" / "adapters" / "mine"
    save_adapter(model, "mine", place)
    assert sorted(f.name for f in place.iterdir()) == ["adapter.json", "adapter.safetensors"]
    again = load_adapter(fw.load(tmp_path / "base"), place, verify=True)
    assert torch.equal(answer(again), answer(model)) and not torch.equal(answer(again), answer(base))
    assert again.history == model.history
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]
    fw.save(base, tmp_path / "base")  # saving the base again keeps what stands beside it
    load_adapter(fw.load(tmp_path / "base"), place)
    save_adapter(model, "mine", place)


@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("method", [*registry.names("change"), "bitfit", "layernorm-tuning"])
def test_every_method_is_saved_alone(tmp_path: Path, method: str, int8: bool) -> None:
    """Fixed tensors of an adapter included; the number of tensors is that of the adapter."""

    def base() -> Any:
        made = fw.build({**SPEC, "defaults": {"norm": "layernorm"}})
        return fw.apply(made, "llm-int8", outliers="none") if int8 else made

    options = {key: value for key, value in surgery(method).examples[0].items() if key != "name"}
    model = fw.apply(base(), method, **options)
    name = next(iter(adapters(model)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    before = answer(model)
    save_adapter(model, name, tmp_path / "a")
    again = load_adapter(fw.apply(base(), "lora", rank=1, name="elsewhere"), tmp_path / "a")
    if name in numbers(again):
        use(again, name)
    else:
        use(again, None)
    assert torch.equal(answer(again), before) and not torch.equal(before, answer(base()))
    if surgery(method).promises(adapters(again)[name]).undo:
        fw.undo(again)
        assert torch.equal(answer(use(again, None)), answer(base()))


def test_adapters_of_one_model_load_in_any_order(tmp_path: Path) -> None:
    model = fw.build(SPEC)
    for seed, name in enumerate(("one", "two")):
        trained(fw.apply(model, "lora", rank=2, name=name, where=["q"] if seed else ["q", "o"]), seed)
        save_adapter(model, name, tmp_path / name)
    assert list(adapters(model)) == ["one", "two"]
    again = fw.build(SPEC)
    for name in ("two", "one"):
        load_adapter(again, tmp_path / name)
    for name in ("one", "two"):
        assert torch.equal(answer(use(again, name)), answer(use(model, name)))
    assert base_sha256(model) == base_sha256(again) == base_sha256(fw.build(SPEC))
    before = answer(again)
    with pytest.raises(SpecError, match="already has an adapter named 'one'"):
        load_adapter(again, tmp_path / "one")
    assert torch.equal(answer(again), before)


def test_an_adapter_of_other_weights_is_refused_and_nothing_changed(tmp_path: Path) -> None:
    save_adapter(trained(fw.apply(fw.build(SPEC), "lora", rank=2)), "default", tmp_path / "a")
    other = fw.build(SPEC, seed=1)
    other.name, before, layout = "other", answer(other), other.layout()
    with pytest.raises(DataError, match="'default' was trained on other weights than those of other"):
        load_adapter(other, tmp_path / "a")
    assert torch.equal(answer(other), before) and other.layout() == layout and not other.history


def test_what_cannot_be_saved_alone(tmp_path: Path) -> None:
    model = fw.build(SPEC)
    with pytest.raises(DataError, match="holds no adapter, so no 'x'"):
        save_adapter(model, "x", tmp_path / "a")
    fw.apply(model, "lora", rank=2, name="mine")
    with pytest.raises(DataError, match="unknown adapter 'mien'; did you mean 'mine'"):
        save_adapter(model, "mien", tmp_path / "a")
    with torch.no_grad():
        model.slot("b0.attention:q").adapters["mine"].B[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"NaN or infinite values in .*B: adapter not saved"):
        save_adapter(model, "mine", tmp_path / "a")
    fw.apply(model, "llm-int8", outliers="none")
    with pytest.raises(Refusal, match=r"changed afterwards \(llm-int8\); save the whole model"):
        save_adapter(model, "mine", tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_damaged_adapters_leave_the_model_as_it_was(tmp_path: Path) -> None:
    save_adapter(trained(fw.apply(fw.build(SPEC), "lora", rank=2)), "default", tmp_path / "a")
    model = fw.build(SPEC)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (tmp_path / "b/adapter.safetensors").write_bytes((tmp_path / "a/adapter.safetensors").read_bytes()[:-4])
    with pytest.raises(DataError, match="is truncated"):
        load_adapter(model, tmp_path / "b")
    record = json.loads((tmp_path / "a/adapter.json").read_text())
    record["plan"]["decisions"]["slots"] = dict.fromkeys(record["plan"]["decisions"]["slots"], 1)
    (tmp_path / "a/adapter.json").write_text(json.dumps(record))
    with pytest.raises(DataError, match=r"has shape .2, 16.; this model needs .1, 16."):
        load_adapter(model, tmp_path / "a")
    assert model.layout() == fw.build(SPEC).layout() and torch.equal(answer(model), answer(fw.build(SPEC)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    with pytest.raises(DataError, match=r"none holds no adapter\.json"):
        load_adapter(model, tmp_path / "none")
