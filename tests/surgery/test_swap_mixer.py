"""Swapping mixers: trained projections stay, what is exact stays exact, what is new or lost is said, and it heals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import formwright as fw
import small
from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.objectives.distillation import divergence
from formwright.surgery.samples import decoder, encoder, equal, reloaded, said, state, tokens

ROLES = ("q", "k", "v", "o")
#: Mixers that become full attention: a window, a block or a region as long as the text.
EXACT: list[tuple[str, dict[str, Any]]] = [
    ("attention", {"window": 64}),
    ("local", {"block": 64}),
    ("longformer", {"window": 200}),
    ("sparse", {"stride": 64}),
    ("bigbird", {"block": 64}),
    ("combiner", {"block": 64}),
]
#: Every mixer with all four slots, at sizes for tests.
KEEPING: list[tuple[str, dict[str, Any]]] = [
    ("local", {"block": 4}),
    ("longformer", {"window": 4, "first": 2}),
    ("linformer", {"rank": 4}),
    ("sinkhorn", {"block": 4}),
    ("synthesizer", {"kinds": ["random", "dot"]}),
    ("bigbird", {"block": 2, "random": 1}),
    ("combiner", {}),
    ("linear-attention", {}),
    ("performer", {"features": 8}),
    ("deltanet", {"conv": None}),
]
SLOTLESS: list[tuple[str, dict[str, Any]]] = [
    ("mamba", {"state": 2}),
    ("mamba2", {"state": 4, "head_width": 8}),
    ("lmu", {"theta": 9, "memory": 4}),
]


def can(mixer: str) -> list[Any]:
    """The samples that may hold a mixer and lose nothing: sparse looks back only, bigbird both ways."""
    return {"sparse": [decoder], "bigbird": [encoder]}.get(mixer, [encoder, decoder])


named: dict[str, Any] = {"ids": lambda value: getattr(value, "__name__", value if isinstance(value, str) else "")}


def swapped(model: Any, mixer: str, options: dict[str, Any], **how: Any) -> Any:
    return fw.apply(model, "swap-mixer", mixer=mixer, options=options, **how)


@pytest.mark.parametrize("mixer, options, make", [(*entry, make) for entry in EXACT for make in can(entry[0])], **named)
def test_what_sees_everything_is_attention_still(mixer: str, options: dict[str, Any], make: Any) -> None:
    before = said(make())
    after = said(swapped(make(), mixer, options))
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("causal", [False, True])
def test_windows_are_measured_as_the_new_mixer_measures(causal: bool) -> None:
    node = {"part": "attention", "heads": 4, "window": 3, "causal": causal}
    stem = {"part": "token-embedding", "vocab": 40, "width": 32}
    model = fw.build({"stem": stem, "layers": [node], "head": {"part": "mean-pool"}}, seed=0)
    before = said(model)
    for name, value in said(swapped(model, "longformer", {})).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mixer, options", KEEPING, **named)
def test_an_encoder_keeps_its_projections(mixer: str, options: dict[str, Any], tmp_path: Any) -> None:
    model = small.encoder()
    values = state(model)
    swapped(model, mixer, options, keep_undo=True)
    assert [line["is"] for line in model.layout()] == [mixer, "mlp"] * 2
    after = state(model)
    assert all(torch.equal(after[name], value) for name, value in values.items())
    vectors = model.encode(["a refund please", "the screen is blank", ""])
    fw.save(model, tmp_path / "swapped")
    again = fw.load(tmp_path / "swapped")
    assert (again.encode(["a refund please", "the screen is blank", ""]) == vectors).all()
    assert again.history[0].data["decisions"]["unused"] == []
    assert equal(values, state(fw.undo(model)))


@pytest.mark.parametrize(
    "mixer, options", [entry for entry in KEEPING if entry[0] not in ("linformer", "sinkhorn", "bigbird")], **named
)
def test_a_decoder_with_grouped_heads_keeps_its_projections(mixer: str, options: dict[str, Any]) -> None:
    model = decoder()
    values = state(model)
    swapped(model, mixer, {**options, "length": 32} if mixer == "synthesizer" else options)
    assert model.causal and equal(said(model), said(reloaded(model)))
    after, repeated = state(model), model.history[-1].data["decisions"]["repeated"]
    assert repeated == (["k", "v"] if mixer in ("combiner", "deltanet") else [])
    for name, value in values.items():
        if name.split(".")[-2] in repeated:  # head by head: 2 heads of 8 rows, each for 2 queries
            value = value.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("mixer, options", SLOTLESS, **named)
def test_mixers_without_the_slots_start_anew_and_say_so(mixer: str, options: dict[str, Any]) -> None:
    model = decoder()
    with pytest.warns(UserWarning, match=f"Put {mixer} .*nothing of their weights was kept; starting anew: "):
        swapped(model, mixer, options)
    said_of = model.history[-1].data["decisions"]
    assert said_of["unused"] == list(ROLES) and said_of["lost"] == ["rotary"] and said_of["fresh"]
    assert model.causal and model.streams and equal(said(model), said(reloaded(model)))
    with pytest.warns(UserWarning, match="lost: sight of later tokens"):
        assert swapped(encoder(), mixer, options).causal


def test_slots_without_a_place_are_named() -> None:
    with pytest.warns(UserWarning, match="slots v, o kept .*; without a place in it: q, k; starting anew: dense, w1"):
        swapped(encoder(), "synthesizer", {"kinds": ["dense"]})


@pytest.mark.parametrize("mixer, options", [("linformer", {"rank": 4}), ("synthesizer", {"kinds": ["random", "dot"]})])
def test_tables_are_as_long_as_the_positions(mixer: str, options: dict[str, Any]) -> None:
    model = swapped(encoder(), mixer, options)
    assert {part.traits.length for _, part in model.parts()} == {32, "any"} and model.limit == 32
    assert swapped(encoder(), mixer, {**options, "length": 20}).limit == 20
    endless = fw.build({**encoder().spec.to_dict(), "stem": {"part": "token-embedding", "vocab": 40, "width": 32}})
    with pytest.raises(Refusal, match=rf"b0.attention: {mixer} has a table .*say options=\{{'length': TOKENS\}}"):
        swapped(endless, mixer, options)
    assert swapped(endless, mixer, {**options, "length": 20}).limit == 20


def test_generation_ends_with_the_table() -> None:
    model = swapped(decoder(), "synthesizer", {"kinds": ["random", "dot"], "length": 12})
    said_of = fw.generate(model, [[1, 2, 3], [4, 5]], max_new=40)
    assert [len(row) for row in said_of] == [10, 11]
    with pytest.raises(DataError, match="prompt 0 has 13 tokens and the model 12 positions"):
        fw.generate(model, [[1] * 13], max_new=1)


def test_from_one_pattern_to_another_and_back() -> None:
    model = encoder()
    before = said(model)
    swapped(model, "local", {"block": 4})
    assert not equal(before, said(model))
    for name, value in said(swapped(model, "attention", {}, where="*.attention")).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_an_adapter_and_int8_move_along() -> None:
    model = fw.apply(fw.apply(decoder(), "llm-int8", tokens(), outliers="none"), "lora", rank=2, where=["k", "v"])
    before = said(model)
    for name, value in said(swapped(model, "combiner", {"block": 64})).items():
        assert (value - before[name]).norm() < 0.02 * before[name].norm()  # a last bit may round an int8 otherwise
    assert {line["slots"]["k"] for line in model.layout() if "k" in line["slots"]} == {"lora(int8)"}
    assert equal(said(model), said(reloaded(model)))


TEXTS = [text for text, _ in small.sentences(160, seed=3)]
HEALED = [("local", {"block": 3}), ("linear-attention", {}), ("linformer", {"rank": 8})]


@pytest.mark.parametrize("mixer, options", HEALED, **named)
def test_an_encoder_heals(mixer: str, options: dict[str, Any]) -> None:
    original = small.encoder()
    with torch.no_grad():
        for _, part in original.parts():
            if hasattr(part, "q"):
                part.q.weight.mul_(3.0)
                part.v.weight.mul_(3.0)
    model = swapped(fw.copy(original), mixer, options)
    values = state(original)

    def apart() -> float:
        one, two = (m.encode(TEXTS[:32], as_tensor=True) for m in (model, original))
        return 1.0 - float(F.cosine_similarity(one, two).mean())

    before = apart()
    result = fw.heal(model, original, TEXTS, steps=30, lr=2e-3, show=False)
    assert result.steps == 30 and apart() < 0.8 * before
    assert model.history[-1].name == "healed" and equal(values, state(original))


def test_a_decoder_with_grouped_heads_heals() -> None:
    original = decoder()
    original.tokenizer = None
    model = swapped(fw.copy(original), "linear-attention", {})
    rows = tokens(32, 12)

    def apart() -> float:
        with torch.no_grad():
            return float(divergence(model(rows), original(rows))) / rows.numel()

    before = apart()
    settings = {"objective": "distillation", "others": {"teacher": original}, "steps": 20, "lr": 3e-3, "show": False}
    fw.train(model, [fw.Batch({"tokens": rows})], **settings)
    assert apart() < 0.7 * before


def test_refusals() -> None:
    with pytest.raises(Refusal, match="is causal and attention would not be: give options="):
        fw.plan(decoder(), "swap-mixer", mixer="attention", options={"causal": False})
    with pytest.raises(Refusal, match="is causal and linformer would not be: choose a causal mixer"):
        fw.plan(decoder(), "swap-mixer", mixer="linformer", options={"rank": 2, "length": 32})
    with pytest.raises(Refusal, match="local needs block: say options="):
        fw.plan(encoder(), "swap-mixer", mixer="local")
    with pytest.raises(Refusal, match="slot q is 32 x 32, and in local 16 x 32; leave out the options"):
        fw.plan(encoder(), "swap-mixer", mixer="local", options={"block": 4, "head_width": 4})
    with pytest.raises(Refusal, match="slot k is 32 x 32, and in local 16 x 32"):
        fw.plan(encoder(), "swap-mixer", mixer="local", options={"block": 4, "kv_heads": 2})
    with pytest.raises(Refusal, match="reads 'length-projection', which no conditioner of this model fills"):
        fw.plan(encoder(), "swap-mixer", mixer="linformer", options={"rank": 2, "share": "layerwise"})
    with pytest.raises(SpecError, match="did you mean 'combiner'"):
        fw.plan(encoder(), "swap-mixer", mixer="combinr")
    with pytest.raises(SpecError, match="unknown item"):
        fw.plan(encoder(), "swap-mixer", mixer="combiner", where="b9.*")
