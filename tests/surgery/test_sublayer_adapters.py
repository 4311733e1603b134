"""Adapters of whole sublayers, prefixes and prompts: what they leave alone, what rows choose, what streams see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import formwright as fw
from formwright import registry, surgery
from formwright.engine.state import State
from formwright.kit.errors import FormwrightError, Refusal
from formwright.models.build import build
from formwright.models.text import packed
from formwright.parts.base import Shape
from formwright.surgery.adapt.prefix_tuning import fold
from formwright.surgery.adapt.switch import choose, numbers, use
from formwright.surgery.samples import classifier, decoder, encoder, equal, said, state, tokens

METHODS: dict[str, dict[str, Any]] = {
    "sequential-adapter": {"style": "houlsby", "hidden": 3},
    "parallel-adapter": {"hidden": 3},
    "compacter": {"hidden": 4, "n": 2, "plus": False},
    "prefix-tuning": {"length": 3, "hidden": 4},
    "p-tuning-v2": {"length": 2},
    "mam": {"length": 2, "network": 0, "hidden": 2},
    "prompt-tuning": {"length": 3},
}
EXACT = ("sequential-adapter", "parallel-adapter", "compacter")
each = pytest.mark.parametrize("method", METHODS)


def shake(model: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def adapted(model: Any, method: str, **more: Any) -> Any:
    return shake(fw.apply(model, method, **METHODS[method], **more))


def run(model: Any, batch: Any, **context: Any) -> Tensor:
    with torch.no_grad():
        return model(batch, seed=0, **context)


def trained(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


COUNTS: list[tuple[str, dict[str, Any], Any]] = [
    ("sequential-adapter", {"hidden": 24}, lambda d, n: (2 * d * 24 + 24 + d) * n),
    ("sequential-adapter", {"hidden": 24, "style": "houlsby"}, lambda d, n: 2 * (2 * d * 24 + 24 + d) * n),
    ("sequential-adapter", {"hidden": 24, "skip": 2}, lambda d, n: (2 * d * 24 + 24 + d) * (n - 2)),
    ("parallel-adapter", {"hidden": 16}, lambda d, n: (2 * d * 16 + 16 + d) * n),
    ("compacter", {"hidden": 12}, lambda d, n: (3 * (d + 12)) * n + 64),
    ("p-tuning-v2", {"length": 30}, lambda d, n: 2 * 30 * d * n),
    ("mam", {"network": 0}, lambda d, n: (2 * 16 * d + 2 * d * 16 + 16 + d) * n),
    ("prompt-tuning", {"length": 20}, lambda d, n: 20 * d),
    (
        "prefix-tuning",
        {"length": 30, "hidden": 8},
        lambda d, n: 30 * d + 8 * (d + 1) + 2 * d * (8 + 1) * n,
    ),
]


@pytest.mark.parametrize("method, options, wanted", COUNTS)
def test_counts(method: str, options: dict[str, Any], wanted: Any) -> None:
    for recipe, width, layers in (("bert-mini", 256, 4), ("bert-base", 768, 12)):
        model = build(registry.resolve("recipe", recipe)(), device="meta")
        surgery.surgery(method).reshape(model, surgery.plan(model, method, **options))
        assert trained(model) == wanted(width, layers)
        assert model.cost(Shape.full(1, 4)).parameters == sum(p.numel() for p in model.parameters())


@each
def test_the_start_is_exact_or_stated_not_to_be(method: str) -> None:
    for made in (encoder, decoder, classifier):
        model = made()
        before = said(model)
        fw.apply(model, method, **METHODS[method])
        off = max(float((said(model)[head] - value).abs().max()) for head, value in before.items())
        assert off <= 1e-6 if method in EXACT else off > 1e-6
        assert not equal(before, said(shake(model)))


@each
@pytest.mark.parametrize("made", [encoder, decoder])
def test_rows_choose_their_adapter_padded_and_packed(method: str, made: Any) -> None:
    model = adapted(made(), method, name="one")
    adapted(model, "sequential-adapter", name="two")
    shorter = {"length": 5} if "length" in METHODS[method] else {}
    shake(fw.apply(model, method, **{**METHODS[method], **shorter}, name="three"), 3)
    assert numbers(model) == {"one": 0, "two": 1, "three": 2}
    rows = [row[:n].tolist() for row, n in zip(tokens(5, 12), (5, 12, 1, 8, 3))]
    names = ["two", None, "one", "three", "one"]
    filled = torch.full((5, 12), 7)
    for index, row in enumerate(rows):
        filled[index, : len(row)] = torch.tensor(row)
    padded = fw.Batch(inputs={"tokens": filled}, lengths={"tokens": torch.tensor([len(row) for row in rows])})
    picked = choose(model, names)
    whole, flat = run(model, padded, adapters=picked), run(model, packed(model, rows), adapters=picked)
    first = 0
    for index, (row, name) in enumerate(zip(rows, names)):
        alone = run(use(model, name), torch.tensor([row]))[0]
        cut = whole[index] if whole.dim() == 2 else whole[index, : len(row)]
        piece = flat[index] if whole.dim() == 2 else flat[0, first : first + len(row)]
        first += len(row)
        torch.testing.assert_close(cut, alone, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(piece, alone, rtol=1e-5, atol=2e-6)
    with pytest.raises(FormwrightError, match="2 adapters were chosen for 4 rows"):
        run(model, tokens(), adapters=choose(model, ["one", "two"]))


@each
def test_a_stream_is_one_pass(method: str) -> None:
    model, ids = adapted(decoder(), method), tokens(3, 9)
    names = torch.tensor([0, -1, 0])
    whole = run(model, ids, adapters=names)
    stream, got = State(3), [[], [], []]
    starts = [0, 0, 0]
    for brought in ((2, 0, 5), (1, 4, 0), (0, 1, 3), (6, 4, 1)):
        rows = torch.full((3, 6), 99 % 40)
        for index, count in enumerate(brought):
            rows[index, :count] = ids[index, starts[index] : starts[index] + count]
        batch = fw.Batch(inputs={"tokens": rows}, lengths={"tokens": torch.tensor(brought)})
        out = run(model, batch, state=stream, adapters=names)
        for index, count in enumerate(brought):
            got[index].append(out[index, :count])
            starts[index] += count
    for index in range(3):
        torch.testing.assert_close(torch.cat(got[index]), whole[index], rtol=1e-4, atol=1e-5)


@each
def test_generation_equals_full_passes(method: str) -> None:
    model = adapted(decoder(), method)
    prompts = [[3, 4, 5], [6]]
    made = fw.generate(model, prompts, max_new=4)
    for prompt, new in zip(prompts, made):
        row = list(prompt)
        for token in new:
            assert int(run(model, torch.tensor([row]))[0, -1].argmax()) == token
            row.append(token)


@each
@pytest.mark.parametrize("below", [{}, {"llm-int8": {"outliers": "none"}}, {"low-rank": {"rank": 8}}])
def test_saved_alone_and_undone_over_any_linear(method: str, below: dict[str, Any], tmp_path: Path) -> None:
    def base() -> Any:
        model = decoder()
        for name, options in below.items():
            fw.apply(model, name, tokens(), **options)
        return model

    model = base()
    before, plain = state(model), said(model)
    adapted(model, method, name="mine")
    _save(model, tmp_path)
    again = base()
    fw.apply(again, "lora", rank=1, name="other")
    _load(again, tmp_path)
    assert equal(said(use(model, "mine")), said(use(again, "mine")))
    assert equal(plain, said(use(again, None))) or method == "prompt-tuning"
    fw.undo(model)
    assert equal(before, state(model)) and equal(plain, said(model)) and not numbers(model)


def _save(model: Any, folder: Path) -> None:
    from formwright.hub import save_adapter

    save_adapter(model, "mine", folder / "mine")


def _load(model: Any, folder: Path) -> None:
    from formwright.hub import load_adapter

    load_adapter(model, folder / "mine")


@each
def test_beside_lora_in_either_order(method: str) -> None:
    one, two = encoder(), encoder()
    adapted(one, method, name="around")
    fw.apply(one, "lora", rank=2, name="within")
    fw.apply(two, "lora", rank=2, name="within")
    fw.apply(two, method, **METHODS[method], name="around")
    for model in (one, two):
        shake(model, 5)
        assert sorted(numbers(model).values()) == [0, 1]
    values = {name: value for name, value in one.named_parameters() if "adapters." in name}
    with torch.no_grad():
        for name, value in two.named_parameters():
            if name in values:
                value.copy_(values[name])
    for name in ("around", "within"):
        torch.testing.assert_close(run(use(one, name), tokens()), run(use(two, name), tokens()))


@pytest.mark.parametrize("mixer", ["mamba", "mamba2", "deltanet", "linear-attention", "lmu"])
def test_a_recurrent_mixer_learns_its_initial_state(mixer: str) -> None:
    options = {"mamba": {}, "mamba2": {"head_width": 16}, "lmu": {"theta": 9, "batch_norm": False}}.get(
        mixer, {"heads": 2}
    )
    causal = {"causal": True} if mixer == "linear-attention" else {}
    model = build(
        {
            "stem": {"part": "token-embedding", "vocab": 40, "width": 32},
            "layers": [{"part": mixer, **options, **causal}, {"part": "mlp", "hidden": 32}],
            "head": {"part": "lm", "tied": True},
        },
        seed=1,
    )
    before = run(model, tokens())
    fw.apply(model, "p-tuning-v2")
    torch.testing.assert_close(run(model, tokens()), before, rtol=0, atol=1e-6)
    whole = run(shake(model), tokens())
    assert (whole - before).abs().max() > 1e-4
    stream = State(4)
    pieces = [run(model, tokens()[:, a:b], state=stream) for a, b in ((0, 5), (5, 6), (6, 12))]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-4, atol=1e-5)
    rows = [row[:n].tolist() for row, n in zip(tokens(), (12, 3, 7, 1))]
    flat = run(model, packed(model, rows))[0]
    torch.testing.assert_close(flat[:12], whole[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flat[12:15], whole[1, :3], rtol=1e-4, atol=1e-5)
    model(tokens(), seed=0).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


def test_a_mixer_without_keys_or_state_is_named() -> None:
    layers = [{"part": "attention", "heads": 2}, {"part": "linformer", "heads": 2, "length": 16, "rank": 4}]
    stem = {"part": "token-embedding", "vocab": 40, "width": 32}
    model = build({"stem": stem, "layers": layers, "head": {"part": "mean-pool"}})
    with pytest.raises(Refusal, match=r"linformer.* has neither keys of its own nor a state .* leave it out"):
        fw.apply(model, "p-tuning-v2")
    fw.apply(model, "p-tuning-v2", where="attention")


def test_folding_keeps_what_the_network_made(tmp_path: Path) -> None:
    model = adapted(encoder(), "mam")
    with pytest.raises(Refusal, match="has no network"):
        fold(model)
    fw.undo(model)
    model = shake(fw.apply(model, "mam", length=2, network=5, hidden=2, name="mine"))
    before, size = said(model)["out"], trained(model)
    fold(model, "mine")
    torch.testing.assert_close(said(model)["out"], before)
    assert trained(model) < size and not model.adapters
    again = fw.load(fw.save(model, tmp_path / "model"))
    assert torch.equal(said(again)["out"], said(model)["out"])
    _save(model, tmp_path)
    fresh = encoder()
    _load(fresh, tmp_path)
    assert torch.equal(said(fresh)["out"], said(model)["out"])
    fw.undo(model)
    assert equal(state(encoder()), state(model))


def test_a_prefix_is_seen_whatever_the_rule() -> None:
    """Against keys and values written out by hand, with a window, grouped heads and distances."""
    from formwright.ops.attention import Ahead, attention, attention_reference, packed_attention

    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    q, k, v, bias = draw(2, 7, 4, 8), draw(2, 7, 2, 8), draw(2, 7, 2, 8), draw(1, 4, 7, 7)
    have = torch.tensor([[True, True, False], [True, False, False]])
    front = Ahead(draw(2, 3, 2, 8), draw(2, 3, 2, 8), have)
    steps = torch.arange(7)
    near = (steps[None] <= steps[:, None]) & (steps[None] > steps[:, None] - 3)
    seen = torch.cat((have[:, None].expand(-1, 7, -1), near.expand(2, -1, -1)), 2)
    keys, values = front.before(k, v)
    added = torch.nn.functional.pad(bias, (3, 0))
    wanted, _ = attention_reference(q, keys, values, seen=seen, bias=added)
    found = attention(
        q,
        k,
        v,
        causal=True,
        window=3,
        mask=lambda rows, columns: near[None, rows, columns],
        bias=lambda rows, columns: bias[:, :, rows, columns],
        ahead=front,
    )
    torch.testing.assert_close(found, wanted)
    flat = [t.flatten(0, 1)[None] for t in (q, k, v)]
    causal = torch.cat((have[:, None].expand(-1, 7, -1), (steps[None] <= steps[:, None]).expand(2, -1, -1)), 2)
    wanted, _ = attention_reference(q, keys, values, seen=causal)
    found = packed_attention(*flat, [(0, 7), (7, 14)], causal=True, ahead=front)
    torch.testing.assert_close(found[0].unflatten(0, (2, 7)), wanted)


def test_kronecker_maps_are_sums_of_kronecker_products() -> None:
    model = adapted(encoder(), "compacter")
    adapter = model.item("b0.mlp").adapters["default"]
    down, rule = adapter.down, model.adapters["default"].A
    weight = sum(torch.kron(a, torch.outer(s, t)) for a, s, t in zip(rule, down.s, down.t))
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(down(x), x @ weight + down.bias)


def test_a_prompt_is_tokens_before_the_text() -> None:
    """Started from a text, it says what that text before each row would, in its places, and no output is its own."""
    model, ids = decoder(), tokens(3, 6)
    before = torch.tensor([[5, 6, 7]]).expand(3, -1)
    wanted = run(model, torch.cat((before, ids), 1))[:, 3:]
    fw.apply(model, "prompt-tuning", length=3, text=[5, 6, 7])
    torch.testing.assert_close(run(model, ids), wanted, rtol=1e-4, atol=1e-5)
    other = encoder()
    reach = other.reach
    fw.apply(other, "prompt-tuning", length=4)
    assert other.reach == reach - 4 and run(other, tokens(2, reach - 4)).shape == (2, 32)


def test_the_lowest_layers_can_go_without() -> None:
    model = fw.apply(encoder(), "sequential-adapter", hidden=2, skip=2)
    assert [item.id for item in model.walk() if item.adapters is not None] == ["b2.mlp"]


@pytest.mark.parametrize(
    "method, options, words",
    [
        ("sequential-adapter", {"reduction": 64}, "leaves nothing of a width of 32"),
        ("sequential-adapter", {"reduction": 0.5}, "at least 1"),
        ("sequential-adapter", {"hidden": 33}, "at most the width, 32"),
        ("sequential-adapter", {"activation": "gelo"}, "did you mean 'gelu"),
        ("sequential-adapter", {"start": "bart"}, "did you mean 'bert'"),
        ("sequential-adapter", {"style": "houlsbi"}, "did you mean 'houlsby'"),
        ("sequential-adapter", {"where": "attentoin"}, "did you mean 'attention'"),
        ("sequential-adapter", {"skip": 9}, "leaves no layer"),
        ("sequential-adapter", {"name": "a.b"}, "adapter name"),
        ("sequential-adapter", {"train": "haeds.*"}, "unknown parameter"),
        ("parallel-adapter", {"scale": 0}, "above 0"),
        ("compacter", {"n": 3}, "must divide the width, 32"),
        ("compacter", {"hidden": 6}, "must divide the width, 32, and hidden=6"),
        ("prefix-tuning", {"length": 0}, "at least 1"),
        ("prompt-tuning", {"length": 32}, "leaves no place for a text: this model has 32 positions"),
        ("prompt-tuning", {"start": "vocabulry"}, "did you mean 'vocabulary'"),
        ("prompt-tuning", {"text": [99]}, "ids from 0 to 39"),
        ("prompt-tuning", {"text": "a text"}, "carries no tokenizer"),
    ],
)
def test_options_that_make_no_sense(method: str, options: dict[str, Any], words: str) -> None:
    model = encoder()
    before = state(model)
    with pytest.raises(FormwrightError, match=words):
        fw.apply(model, method, **options)
    assert equal(before, state(model)) and not model.history


@each
def test_what_no_weight_can_say_is_not_merged(method: str) -> None:
    model = adapted(encoder(), method, name="mine")
    for options in ({}, {"adapter": "mine"}):
        with pytest.raises(Refusal, match="no weight says what it does"):
            fw.apply(model, "merge", **options)
    with pytest.raises(FormwrightError, match="already has an adapter named 'mine'"):
        fw.apply(model, method, **METHODS[method], name="mine")


def test_swapping_a_mixer_below_a_prefix_is_refused() -> None:
    model = fw.apply(encoder(), "p-tuning-v2", length=2)
    with pytest.raises(Refusal, match="would mean nothing to linear-attention; undo it first"):
        fw.apply(model, "swap-mixer", mixer="linear-attention")
    fw.apply(model, "swap-mixer", mixer="attention", options={"window": 3})
