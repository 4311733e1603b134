"""What a spec becomes: ids that last, addresses of every slot, sharing, loops, skips, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from formwright import build
from formwright.engine.state import State
from formwright.kit.errors import Refusal, SpecError
from formwright.models.items import Residual
from formwright.parts.base import Shape
from formwright.parts.linears.dense import Dense, Table

STEM = {"part": "token-embedding", "vocab": 30, "width": 16}
ATTENTION = {"part": "attention", "heads": 2, "causal": True}
MLP = {"part": "mlp", "hidden": 24}


def model_of(*layers, seed: int = 0, **more):
    return build({"stem": STEM, "layers": list(layers), **more}, seed=seed)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(0))


def ids(model) -> list[str]:
    return [item.id for item in model.walk()]


def test_ids_and_blocks() -> None:
    model = model_of(
        {"repeat": 2, "layers": [ATTENTION, MLP, MLP]},
        {"bare": {"part": "layernorm"}},
        {"loop": 2, "layers": [ATTENTION, {"repeat": 2, "layers": [MLP]}]},
        {**MLP, "id": "last"},
    )
    assert ids(model) == [
        *("b0.attention", "b0.mlp", "b0.mlp_2", "b1.attention", "b1.mlp", "b1.mlp_2"),
        *("b2.layernorm", "b3.loop", "b3.loop.b0.attention", "b3.loop.b1.mlp", "b3.loop.b2.mlp", "b4.last"),
    ]
    assert [item.block for item in model.items()] == [0, 0, 0, 1, 1, 1, 2, 3, 4]
    for item in model.walk():
        assert model.item(item.id) is item
        assert model.get_submodule(item.id) is item, "a tensor's name begins with its item's id"
    names = {name.rsplit(".", 1)[0] for name, _ in model.named_parameters()}
    assert any(name.startswith("b3.loop.b0.attention.part.q") for name in names)
    with pytest.raises(SpecError, match=r"unknown item 'b0.atention'; did you mean 'b0.attention'"):
        model.item("b0.atention")


def test_a_repeat_inside_a_repeat_belongs_to_the_outer_block() -> None:
    model = model_of({"repeat": 2, "layers": [{"repeat": 2, "layers": [MLP]}, ATTENTION]})
    assert ids(model) == [f"b{block}.{name}" for block in (0, 1) for name in ("mlp", "mlp_2", "attention")]


@pytest.mark.parametrize("order", ["pre", "post", "sandwich"])
def test_drop_and_restore(order: str) -> None:
    model = model_of({"repeat": 2, "layers": [ATTENTION, MLP]}, defaults={"order": order})
    x = tokens(2, 7)
    before, names = model(x), list(model.state_dict())
    item = model.item("b1.mlp")
    assert isinstance(item, Residual)
    inside, ctx = model.run(*model.embed(x), stop="b1.mlp")
    norm = item.norm
    removed = item.drop()
    after, _ = item(inside, ctx)
    assert torch.equal(after, norm(inside) if order == "post" else inside)
    assert ids(model) == ["b0.attention", "b0.mlp", "b1.attention", "b1.mlp"]
    kept = [name for name in model.state_dict() if name.startswith("b1.mlp")]
    assert kept == (["b1.mlp.norm.weight", "b1.mlp.norm.bias"] if order == "post" else [])
    assert [r.id for r in model.residuals()] == ["b0.attention", "b0.mlp", "b1.attention"]
    assert model.layout()[3] == {"id": "b1.mlp", "block": 1, "is": "nothing", "slots": {}}
    assert "b1.mlp:up" not in model.slots()
    with pytest.raises(SpecError, match=r"b1.mlp is already dropped"):
        item.drop()
    item.restore(removed)
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), before)


def test_orders_are_what_they_say() -> None:
    x = torch.randn(1, 4, 16)
    for order, wanted in (
        ("pre", lambda item, x, f: x + f(item.norm(x))),
        ("post", lambda item, x, f: item.norm(x + f(x))),
        ("sandwich", lambda item, x, f: x + item.norm_out(f(item.norm(x)))),
    ):
        model = model_of({**MLP, "order": order})
        (item,) = model.items()
        ctx = model.embed(tokens(1, 4))[1]
        run = functools.partial(item.part, ctx=ctx)
        torch.testing.assert_close(item(x, ctx)[0], wanted(item, x, run))
    model = model_of({**MLP, "norm": None, "combine": {"part": "add", "scale": 0.5}})
    (item,) = model.items()
    torch.testing.assert_close(item(x, ctx)[0], x + 0.5 * item.part(x, ctx))


def test_addresses_reach_every_slot_and_table() -> None:
    model = build(
        {
            "stem": {**STEM, "embed_width": 8, "types": 2, "positions": {"kind": "learned", "max": 20}},
            "conditioners": {"relative-bias": {"part": "relative-bias", "heads": 2}},
            "layers": [
                {"part": "attention", "heads": 2, "distance": {"kind": "relative"}},
                {"part": "chain", "parts": [MLP, {"part": "parallel", "parts": [ATTENTION, MLP]}]},
                {"tap": "skip"},
                {**MLP, "combine": {"part": "concat"}},
                {"join": "skip", "combine": "concat"},
                {"loop": 2, "layers": [MLP]},
                {"use": "A"},
                {"use": "A"},
                {"reshape": {"part": "resize", "to": 8}},
                {"bare": {"part": "mlp", "hidden": 4}},
            ],
            "shared": {"A": [ATTENTION]},
            "head": {"words": {"part": "lm", "tied": True}, "label": {"part": "sequence-classifier", "classes": 2}},
        }
    )
    slots, tables = model.slots(), model.tables()
    assert set(tables) == {"stem:tokens", "stem:positions.table", "stem:types", "conditioner.relative-bias:table"}
    for address in (
        *("stem:project", "b0.attention:q", "b1.chain:parts.0.up", "b1.chain:parts.1.parts.0.k"),
        *("b3.mlp:combine.join", "b3.mlp:up", "b4.join:combine.join", "b5.loop.b0.mlp:down"),
        *("shared.A.b0.attention:q", "b8.resize:resize", "b9.mlp:up", "head.label:out"),
    ):
        assert address in slots
    linear_names = [name for name, module in model.named_modules() if isinstance(module, Dense)]
    assert len(slots) == len(linear_names), "every linear has exactly one address"
    for address, slot in slots.items():
        assert model.slot(address) is slot
        new = Dense(slot.in_features, slot.out_features, role=slot.role)
        assert model.set_slot(address, new) is slot
        assert model.slot(address) is new
        model.set_slot(address, slot)
    for address, table in tables.items():
        new = Table(table.rows, table.width)
        assert model.set_slot(address, new) is table
        assert model.tables()[address] is new
        model.set_slot(address, table)
    lines = {line["id"]: line["slots"] for line in model.layout()}
    assert lines["b0.attention"] == dict.fromkeys("qkvo", "dense")
    assert {f"{id}:{name}" for id, names in lines.items() for name in names} == {
        address for address in slots if not address.startswith(("stem", "head", "conditioner"))
    }
    for address in ("b0.attention:qq", "b0.atention:q", "b2.tap:q", "nothing", "b0.attention:q.x"):
        with pytest.raises(SpecError, match=r"unknown slot"):
            model.slot(address)
        with pytest.raises(SpecError, match=r"unknown slot"):
            model.set_slot(address, Dense(2, 2))


class Wrapped(Dense):
    """A slot around another, as adapters are."""

    def __init__(self, base: Dense) -> None:
        super().__init__(base.in_features, base.out_features, False, base.role)
        self.base = base
        nn.init.zeros_(self.weight)

    def forward(self, x, ctx=None):
        return self.base(x, ctx) + super().forward(x, ctx)


def test_a_wrapper_has_the_address_of_what_it_wraps() -> None:
    model = model_of(ATTENTION)
    x = tokens(1, 5)
    before, addresses = model(x), list(model.slots())
    for address in addresses:
        model.set_slot(address, Wrapped(model.slot(address)))
    assert list(model.slots()) == addresses
    torch.testing.assert_close(model(x), before)


def test_tied_heads_follow_the_table() -> None:
    model = model_of(MLP, head={"part": "lm", "tied": True, "bias": True})
    x = tokens(2, 4)
    assert model(x).shape == (2, 4, 30)
    new = Table(30, 16)
    new.weight.data.zero_()
    model.set_slot("stem:tokens", new)
    assert torch.equal(model(x), model.head().bias.expand(2, 4, 30))
    states, ctx = model.run(*model.embed(x))
    new.weight.data = torch.eye(30, 16)
    torch.testing.assert_close(model.read(states, ctx), states @ new.weight.T)
    with pytest.raises(SpecError, match=r"head: a tied head needs a stem with a token table"):
        build(
            {"stem": {"part": "linear", "features": 2, "width": 4}, "layers": [], "head": {"part": "lm", "tied": True}}
        )
    narrow = {**STEM, "embed_width": 8}
    with pytest.raises(SpecError, match=r"head: the table has width 8.*project=8"):
        build({"stem": narrow, "layers": [MLP], "head": {"part": "lm", "tied": True}})
    fits = build({"stem": narrow, "layers": [MLP], "head": {"part": "lm", "tied": True, "project": 8}})
    assert fits(x).shape == (2, 4, 30)


def test_shared_lists_have_one_set_of_tensors_and_a_state_per_use() -> None:
    model = model_of({"use": "A"}, MLP, {"use": "A"}, shared={"A": [ATTENTION, MLP]})
    assert ids(model) == ["b0.A", "shared.A.b0.attention", "shared.A.b1.mlp", "b1.mlp", "b2.A"]
    names = list(model.state_dict())
    assert sum("attention.part.q.weight" in name for name in names) == 1
    assert set(model.state_slots()) == {f"{use}.b0.attention.{slot}" for use in ("b0.A", "b2.A") for slot in "kv"}
    x = tokens(2, 6)
    whole, state = model(x), State(2)
    parts = [model(x[:, a:b], state=state) for a, b in ((0, 1), (1, 4), (4, 6))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    assert set(state.values) == set(model.state_slots())
    cost = model.cost(Shape.full(2, 6))
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    assert cost.state_bytes == state.bytes()


def test_loops_run_their_list_again_with_a_state_for_every_round() -> None:
    model = model_of({"loop": 3, "layers": [ATTENTION, MLP]})
    flat = model_of(*[ATTENTION, MLP] * 3)
    named = model.state_dict()
    copied = {}
    for name in flat.state_dict():
        block, *rest = name.split(".")
        inner = f"b0.loop.b{int(block[1:]) % 2}" if block[0] == "b" and block[1:].isdigit() else block
        copied[name] = named[".".join((inner, *rest))]
    flat.load_state_dict(copied)
    x = tokens(2, 5)
    torch.testing.assert_close(model(x), flat(x))
    assert set(model.state_slots()) == {f"b0.loop@{round}.b0.attention.{s}" for round in range(3) for s in "kv"}
    state = State(2)
    torch.testing.assert_close(
        torch.cat([model(x[:, :2], state=state), model(x[:, 2:], state=state)], 1), model(x), rtol=1e-5, atol=1e-5
    )
    assert set(state.values) == set(model.state_slots())
    cost = model.cost(Shape.full(2, 5))
    assert cost.macs == flat.cost(Shape.full(2, 5)).macs
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    # The knob
    assert model.knobs() == {"loops": "how many times every loop runs"}
    torch.testing.assert_close(model(x, knobs={"loops": 3}), model(x))
    assert not torch.allclose(model(x, knobs={"loops": 1}), model(x))
    for wrong in (0, -1, "two", 1.5):
        with pytest.raises(SpecError, match=r"knob loops is a whole number of at least 1"):
            model(x, knobs={"loops": wrong})
    with pytest.raises(SpecError, match=r"unknown knob 'loop'; did you mean 'loops'"):
        model(x, knobs={"loop": 2})
    with pytest.raises(SpecError, match=r"unknown knob 'loops'"):
        flat(x, knobs={"loops": 2})


def test_taps_and_joins() -> None:
    model = model_of({"tap": "skip"}, MLP, ATTENTION, {"join": "skip", "combine": {"part": "add", "scale": 0.5}})
    x = tokens(2, 5)
    start, ctx = model.embed(x)
    inside, _ = model.run(start, ctx, stop="b3.join")
    torch.testing.assert_close(model(x), inside + 0.5 * start)
    with pytest.raises(SpecError) as caught:
        model_of({"join": "skip"}, {"tap": "skip"}, {"join": "skp"})
    assert "layers[0]: unknown tap 'skip'; a tap stands before its join" in str(caught.value)
    assert "layers[2]: unknown tap 'skp'; did you mean 'skip'" in str(caught.value)
    with pytest.raises(SpecError, match=r"join 'a' was tapped at width 16, and the stream has 8 here"):
        model_of({"tap": "a"}, {"reshape": {"part": "resize", "to": 8}}, {"join": "a"})


def test_reshapes_change_width_and_length() -> None:
    model = model_of(
        ATTENTION,
        {"reshape": {"part": "shorten", "by": 2}},
        {"reshape": {"part": "resize", "to": 8}},
        {"part": "attention", "heads": 2},
        head={"part": "sequence-classifier", "classes": 3, "pool": "mean"},
        final_norm="layernorm",
    )
    assert model.width == 8
    assert model(tokens(2, 7)).shape == (2, 3)
    states, ctx = model.run(*model.embed(tokens(2, 7), lengths=torch.tensor([7, 4])))
    assert states.shape == (2, 4, 8)
    assert ctx.lengths.tolist() == [4, 2]
    assert not model.causal and not model.streams
    with pytest.raises(Refusal, match=r"does not stream: b3.attention, b1.shorten need whole sequences"):
        model(tokens(2, 7), state=State(2))
    from conformance.counting import Counter

    with torch.no_grad(), Counter() as counted:
        model(tokens(2, 7))
    assert model.cost(Shape.full(2, 7)).macs == counted.macs


def test_a_model_that_needs_whole_sequences_refuses_a_state() -> None:
    model = model_of({"part": "attention", "heads": 2})
    with pytest.raises(Refusal, match=r"this model does not stream: b0.attention"):
        model(tokens(1, 3), state=State(1))
    streams = model_of(ATTENTION)
    with pytest.raises(SpecError, match=r"lengths instead of offsets"):
        streams(tokens(1, 3), state=State(1), offsets=torch.tensor([0, 3]))


def test_everything_wrong_is_said_at_once_with_its_place() -> None:
    with pytest.raises(SpecError) as caught:
        build(
            {
                "stem": {**STEM, "vocabulary": 3},
                "defaults": {"order": "pree"},
                "conditioners": {"c": {"part": "labl"}, "values": {"part": "relative-bias", "heads": 2}},
                "layers": [
                    {"part": "atention", "heads": 2, "order": "pre"},
                    {"part": "attention", "head": 2, "order": "pre"},
                    {"part": "attention", "heads": "two", "order": "pre"},
                    {"part": "attention", "heads": 3, "order": "pre"},
                    {"part": "mlp", "hidden": 4, "activation": "gelo", "order": "pre"},
                    MLP,
                    {"repeat": "2", "layers": [MLP]},
                    {"loop": 0, "layers": []},
                    {"loop": 2, "layers": [{"reshape": {"part": "resize", "to": 4}}]},
                    {"tap": "a", "name": "b"},
                    {"use": "B"},
                    {"part": "mlp", "hidden": 4, "order": "pre", "id": "a.b"},
                    {"part": "mlp", "hidden": 4, "order": "pre", "id": "half"},
                    {"part": "mlp", "hidden": 4, "order": "pre", "norm": {"part": "layernom"}},
                    {"what": 1},
                    5,
                    {"part": "mlp", "hidden": 4, "order": "pre", "combine": {"part": "gated", "stat": 0.1}},
                ],
                "shared": {"A": [MLP]},
                "final_norm": {"part": "rmsnrm"},
                "head": {"a": {"part": "lm"}, "b": {"part": "sequence-classifier"}},
            }
        )
    said = str(caught.value)
    for sentence in (
        "stem: token-embedding: unknown option 'vocabulary'; did you mean 'vocab'",
        "conditioners.c: unknown conditioner 'labl'; did you mean 'label'",
        "conditioners: conditioner 'values' cannot be used",
        "layers[0]: unknown part 'atention'; did you mean 'attention'",
        "layers[1]: attention: unknown option 'head'; did you mean 'heads'",
        "layers[1]: attention: option 'heads' is missing",
        "layers[2]: attention: option heads='two'",
        "layers[3]: attention: heads=3 does not divide width 16; give head_width",
        "layers[4]: mlp: unknown activation 'gelo'; did you mean 'gelu'",
        "layers[5]: unknown order 'pree'; did you mean 'pre'",
        "layers[6] must be {'repeat': N, 'layers': [...]}",
        "layers[7]: a loop runs at least once, not 0 times",
        "layers[8]: a loop must end at the width it begins with (16, not 4)",
        "layers[9]: unknown key of a tap 'name'",
        "layers[10]: unknown shared list 'B'",
        "layers[11]: id 'a.b' must be a word",
        "layers[12]: id 'half' cannot be used",
        "layers[13]: unknown norm 'layernom'; did you mean 'layernorm'",
        "layers[14]: a layer is one of part, repeat",
        "layers[15] must be an object, not 5",
        "layers[16]: gated: unknown option 'stat'; did you mean 'start'",
        "final_norm: unknown norm 'rmsnrm'; did you mean 'rmsnorm'",
        "head.a: lm: a language-model head is either tied",
        "head.b: sequence-classifier: option 'classes' is missing",
    ):
        assert sentence in said, sentence
    assert said.count("\n") == 23


def test_a_shared_list_cannot_use_itself() -> None:
    with pytest.raises(SpecError, match=r"shared list 'A' uses itself: A > B > A"):
        model_of({"use": "A"}, shared={"A": [{"use": "B"}], "B": [{"use": "A"}]})
    with pytest.raises(SpecError, match=r"shared list 'a.b' must be a word"):
        model_of({"use": "a.b"}, shared={"a.b": [MLP]})


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"heads": 2, "kv_heads": 3}, "kv_heads=3 must divide heads=2"),
        ({"heads": 2, "window": 0}, "window=0 must be at least 1"),
        ({"heads": 16, "rotary": {}}, "rotary turns pairs of a head's 1 entries, so its width cannot be 1"),
        ({"heads": 2, "rotary": {"width": 10}}, "its width cannot be 10"),
        ({"heads": 2, "rotary": {"thta": 1}}, "unknown rotary option 'thta'; did you mean 'theta'"),
        ({"heads": 2, "rotary": {"scaling": {"kind": "yarn"}}}, "rotary scaling 'yarn' needs factor, original"),
        ({"heads": 2, "distance": {"kind": "alibbi"}}, "unknown distance 'alibbi'; did you mean 'alibi'"),
        ({"heads": 2, "memory": "m", "causal": True}, "cross-attention takes no causal"),
        ({"heads": 2, "qk_norm": "batchnorm"}, "option qk_norm='batchnorm'"),
    ],
)
def test_attention_refuses_what_cannot_be(options: dict, sentence: str) -> None:
    with pytest.raises(SpecError, match=r"layers.0.: attention: ") as caught:
        model_of({"part": "attention", **options})
    assert sentence in str(caught.value)
