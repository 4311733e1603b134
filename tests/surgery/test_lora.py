"""LoRA: nothing at the start, a choice for each row, what merging gives back, and the same numbers as peft."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import formwright as fw
from formwright import registry, surgery
from formwright.kit.errors import FormwrightError, Refusal, SpecError
from formwright.models.build import build
from formwright.models.text import packed
from formwright.parts.linears.adapted import Adapted
from formwright.surgery.adapt.switch import choose, numbers, use
from formwright.surgery.samples import MODELS, classifier, decoder, encoder, equal, outputs, said, state, tokens


def shake(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def two(model: Any) -> Any:
    fw.apply(model, "lora", rank=2, name="one")
    return shake(fw.apply(model, "lora", rank=3, name="two", where=["q", "down"]))


def run(model: Any, batch: Any, **context: Any) -> Tensor:
    with torch.no_grad():
        return model(batch, seed=0, **context)


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_starts_as_nothing(name: str) -> None:
    model = MODELS[name]()
    before = said(model)
    fw.apply(model, "lora", rank=2)
    assert equal(before, said(model))
    assert not equal(before, said(shake(model)))


@pytest.mark.parametrize("rank", [1, 4])
def test_counts(rank: int) -> None:
    """4 r d L for q and v of L square layers of width d."""
    for recipe, width, layers in (("bert-mini", 256, 4), ("bert-base", 768, 12)):
        model = build(registry.resolve("recipe", recipe)(), device="meta")
        plan = surgery.plan(model, "lora", rank=rank)
        surgery.surgery("lora").reshape(model, plan)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * rank * width * layers


def test_only_the_adapter_moves_in_training() -> None:
    model = fw.apply(classifier(), "lora", rank=2, train="heads.*")
    before = state(model)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(20):
        loss = outputs(model, tokens(seed=step))["out"].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ".adapters." in name or name.startswith("heads.")}


@pytest.mark.parametrize("made", [encoder, decoder])
def test_rows_choose_their_adapter_padded_and_packed(made: Any) -> None:
    model = two(made())
    rows = [row[:n].tolist() for row, n in zip(tokens(4, 12), (5, 12, 1, 8))]
    names = ["two", None, "one", "two"]
    lengths = torch.tensor([len(row) for row in rows])
    filled = torch.stack([torch.tensor(row + [0] * (12 - len(row))) for row in rows])
    padded = fw.Batch(inputs={"tokens": filled}, lengths={"tokens": lengths})
    picked = choose(model, names)
    whole, flat = run(model, padded, adapters=picked), run(model, packed(model, rows), adapters=picked)
    first = 0
    for index, (row, name) in enumerate(zip(rows, names)):
        alone = run(use(model, name), torch.tensor([row]))[0]
        use(model, "one")
        cut = whole[index] if whole.dim() == 2 else whole[index, : len(row)]
        piece = flat[index] if whole.dim() == 2 else flat[0, first : first + len(row)]
        first += len(row)
        torch.testing.assert_close(cut, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(piece, alone, rtol=1e-4, atol=1e-5)


def test_each_row_depends_on_its_own_adapter_alone() -> None:
    model = two(encoder())
    before = run(model, tokens(), adapters=choose(model, ["one", "two", None, "one"]))
    with torch.no_grad():
        for slot in model.slots().values():
            if isinstance(slot, Adapted) and "two" in slot.adapters:
                slot.adapters["two"].B.mul_(3.0)
    after = run(model, tokens(), adapters=choose(model, ["one", "two", None, "one"]))
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and not torch.equal(before[1], after[1])


def test_merge_keeps_the_function_and_undo_brings_the_adapter_back() -> None:
    model = shake(fw.apply(encoder(), "lora", rank=4, where=["q", "k", "v", "o", "up", "down"]))
    before, values = said(model)["out"], state(model)
    fw.apply(model, "merge", keep_undo=True)
    assert not any(isinstance(slot, Adapted) for slot in model.slots().values())
    assert float((said(model)["out"] - before).abs().max()) <= 1e-5
    assert all(parameter.requires_grad for parameter in model.parameters())
    fw.undo(model)
    assert equal(values, state(model)) and torch.equal(said(model)["out"], before)
    fw.undo(model)
    assert equal(state(encoder()), state(model)) and not model.history


def test_merging_one_of_several() -> None:
    model = two(encoder())
    with pytest.raises(Refusal, match="holds adapters one, two: say which"):
        fw.apply(model, "merge")
    wanted = run(use(model, "two"), tokens())
    fw.apply(model, "merge", adapter="two")
    torch.testing.assert_close(run(model, tokens()), wanted, rtol=1e-4, atol=1e-5)
    with pytest.raises(Refusal, match="nothing to fold in"):
        fw.apply(model, "merge")


def test_merging_into_integers_is_refused() -> None:
    model = fw.apply(fw.apply(encoder(), "llm-int8", outliers="none"), "lora", rank=2)
    before = state(model)
    with pytest.raises(Refusal, match="would round them anew"):
        fw.apply(model, "merge")
    assert equal(before, state(model))


def test_scaling() -> None:
    for options, scaling in (
        ({"rank": 4}, 2.0),
        ({"rank": 4, "alpha": 4}, 1.0),
        ({"rank": 4, "alpha": 16, "rslora": True}, 8.0),
    ):
        assert surgery.plan(encoder(), "lora", **options).decisions["scaling"] == scaling


def test_dropout_is_of_the_adapter_and_only_in_training() -> None:
    model = shake(fw.apply(encoder(), "lora", rank=2, dropout=0.5))
    still = run(model, tokens())
    assert torch.equal(still, run(model, tokens()))
    model.train()
    a, b = (run(model, tokens(), adapters=None) for _ in range(2))
    other = model(tokens(), seed=1)
    model.eval()
    assert torch.equal(a, b) and not torch.equal(a, still) and not torch.equal(other, a)


def test_names() -> None:
    model = two(encoder())
    assert numbers(model) == {"one": 0, "two": 1}
    with pytest.raises(SpecError, match="did you mean 'two'"):
        choose(model, ["twoo"])
    with pytest.raises(SpecError, match="already has an adapter named 'one'"):
        fw.apply(model, "lora", rank=1, name="one")
    with pytest.raises(SpecError, match="3 adapters were chosen for 4 rows"):
        run(model, tokens(), adapters=choose(model, ["one", "two", None]))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"rank": 0}, "at least 1"),
        ({"rank": -1}, "at least 1"),
        ({"rank": 33}, "at most 32"),
        ({"rank": 2.0}, "whole number"),
        ({"rank": 2, "alpha": 0}, "above 0"),
        ({"rank": 2, "dropout": 1.0}, "below 1"),
        ({"rank": 2, "where": "z"}, "matches no slot"),
        ({"rank": 2, "name": "a.b"}, "adapter name"),
        ({"rank": 2, "train": "haeds.*"}, "unknown parameter"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    model = encoder()
    before = state(model)
    with pytest.raises(FormwrightError, match=words):
        fw.apply(model, "lora", **options)
    assert equal(before, state(model)) and not model.history


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_says_the_same(rslora: bool, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    theirs = BertModel(config, add_pooling_layer=False).eval()
    theirs.save_pretrained(tmp_path / "bert")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(tokenizer|head).*")
        ours = fw.load(tmp_path / "bert")
    settings = peft.LoraConfig(r=4, lora_alpha=16, target_modules=["query", "value"], use_rslora=rslora)
    theirs = peft.get_peft_model(theirs, settings).eval()
    fw.apply(ours, "lora", rank=4, alpha=16, rslora=rslora)
    mine = {address: slot for address, slot in ours.slots().items() if isinstance(slot, Adapted)}
    held = [module for module in theirs.modules() if isinstance(module, peft.tuners.lora.Linear)]
    assert len(held) == len(mine) == 4
    with torch.no_grad():
        for module, slot in zip(held, mine.values()):  # both go layer by layer, q before v
            module.lora_B["default"].weight.normal_()
            slot.only().A.copy_(module.lora_A["default"].weight)
            slot.only().B.copy_(module.lora_B["default"].weight)
            assert slot.only().scaling == module.scaling["default"]
        x = torch.randint(0, 60, (3, 9))
        wanted = theirs(x).last_hidden_state
        found, _ = ours.run(*ours.embed(x))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        merged = theirs.merge_and_unload()
        fw.apply(ours, "merge")
        weights = [
            merged.encoder.layer[0].attention.self.query.weight,
            merged.encoder.layer[1].attention.self.value.weight,
        ]
        for weight, address in zip(weights, ("b0.attention:q", "b1.attention:v")):
            torch.testing.assert_close(ours.slot(address).weight, weight, rtol=1e-5, atol=1e-6)
