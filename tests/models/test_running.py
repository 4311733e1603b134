"""Running a model: cut anywhere, padded or packed, several heads and stems, conditions, notes, noise, streams."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conformance.samples import cuts
from formwright import Batch, build
from formwright.engine.state import State
from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.models.batch import pack, pad
from formwright.parts.base import Part, Traits
from formwright.parts.context import Context, Memory, Notes

STEM = {"part": "token-embedding", "vocab": 30, "width": 16}
ATTENTION = {"part": "attention", "heads": 2, "causal": True, "rotary": {}}
MLP = {"part": "mlp", "hidden": 24}
BLOCKS = [{"repeat": 2, "layers": [ATTENTION, MLP]}]


def decoder(seed: int = 0, **more):
    return build({"stem": STEM, "layers": BLOCKS, "head": {"part": "lm", "tied": True}, **more}, seed=seed).double()


def some(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 30, shape, generator=torch.Generator().manual_seed(seed))


def test_a_pass_can_be_cut_at_every_id() -> None:
    model = build(
        {
            "stem": STEM,
            "layers": [ATTENTION, {"tap": "t"}, {"loop": 2, "layers": [MLP]}, {"use": "A"}, {"join": "t"}, MLP],
            "shared": {"A": [MLP]},
            "final_norm": "layernorm",
        }
    )
    batch = Batch(inputs={"tokens": some(2, 5)}, lengths={"tokens": torch.tensor([5, 2])})
    whole = model(batch)
    for item in model.items():
        x, ctx = model.embed(batch)
        x, ctx = model.run(x, ctx, stop=item.id)
        x, ctx = model.run(x, ctx, start=item.id)
        assert torch.equal(model.read(x, ctx), whole)
    x, ctx = model.embed(batch)
    assert model.run(x, ctx, "b2.loop", "b2.loop")[0] is x
    with pytest.raises(Refusal, match=r"b2.loop.b0.mlp lies inside a loop, .*; a pass can be cut at b0"):
        model.run(x, ctx, stop="b2.loop.b0.mlp")
    with pytest.raises(SpecError, match=r"unknown item 'b0.atention'; did you mean 'b0.attention'"):
        model.run(x, ctx, start="b0.atention")


@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=5))
def test_alone_equals_padded_equals_packed(lengths: list[int]) -> None:
    model = decoder()
    rows = [some(length, seed=index).tolist() for index, length in enumerate(lengths)]
    tokens, sizes = pad(rows)
    flat, offsets = pack(rows)
    assert sizes.tolist() == lengths and offsets.tolist()[-1] == flat.shape[1]
    with torch.no_grad():
        padded = model(Batch(inputs={"tokens": tokens}, lengths={"tokens": sizes}))
        packed = model(Batch(inputs={"tokens": flat}, offsets={"tokens": offsets}))
        for index, row in enumerate(rows):
            alone = model(torch.tensor([row], dtype=torch.long))[0]
            torch.testing.assert_close(padded[index, : len(row)], alone, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(packed[0, offsets[index] : offsets[index + 1]], alone, rtol=1e-10, atol=1e-10)


@given(cut=cuts(3, 16))
def test_a_model_streams_in_ragged_pieces(cut: tuple[list[int], list[list[int]]]) -> None:
    windowed = {**ATTENTION, "window": 4, "kv_heads": 1}
    model = decoder(
        stem={**STEM, "positions": {"kind": "learned", "max": 16}},
        layers=[ATTENTION, MLP, {"loop": 2, "layers": [windowed, {"use": "A"}]}],
        shared={"A": [{"part": "attention", "heads": 2, "causal": True, "distance": {"kind": "alibi"}}]},
    )
    lengths, calls = cut
    tokens = some(3, 16)
    state, done, found = State(3), [0, 0, 0], [[], [], []]
    with torch.no_grad():
        whole = model(tokens)
        for new in calls:
            width = max(new) + 2
            call = torch.zeros(3, width, dtype=torch.long)
            for row, (past, more) in enumerate(zip(done, new)):
                call[row, :more] = tokens[row, past : past + more]
            y = model(Batch(inputs={"tokens": call}, lengths={"tokens": torch.tensor(new)}), state=state)
            for row in range(3):
                found[row].append(y[row, : new[row]])
                done[row] += new[row]
            assert state.seen.tolist() == done
    for row, total in enumerate(lengths):
        if total:
            torch.testing.assert_close(torch.cat(found[row]), whole[row, :total], rtol=1e-9, atol=1e-9)
    if calls:
        assert set(state.values) == set(model.state_slots())


def test_learned_positions_end_where_the_table_does() -> None:
    model = decoder(stem={**STEM, "positions": {"kind": "learned", "max": 6, "offset": 2}})
    assert model.limit == 6
    model(some(1, 6))
    with pytest.raises(DataError, match=r"a sequence of 7 tokens exceeds the 6 positions of this model"):
        model(some(1, 7))
    state = State(2)
    batch = Batch(inputs={"tokens": some(2, 5)}, lengths={"tokens": torch.tensor([5, 0])})
    model(batch, state=state)
    # The padding of a row near its end reaches past the table, and no real token does.
    model(Batch(inputs={"tokens": some(2, 5)}, lengths={"tokens": torch.tensor([1, 5])}), state=state)
    with pytest.raises(DataError, match=r"exceeds the 6 positions"):
        model(some(2, 1), state=state)


def test_a_stream_goes_on_with_fewer_rows() -> None:
    """Taken from a longer stream, a short row still finds its distances in the table."""
    relative = {"part": "attention", "heads": 2, "causal": True, "distance": {"kind": "relative"}}
    model = decoder(
        layers=[relative, MLP],
        conditioners={"relative-bias": {"part": "relative-bias", "heads": 2, "bidirectional": False}},
    )
    tokens = some(2, 12)
    with torch.no_grad():
        state = State(2)
        model(Batch(inputs={"tokens": tokens}, lengths={"tokens": torch.tensor([12, 2])}), state=state)
        short = state.take(torch.tensor([1]))
        y = model(tokens[1:, 2:4], state=short)
        torch.testing.assert_close(y, model(tokens[1:, :4])[:, 2:], rtol=1e-9, atol=1e-9)
        for name, value in short.values.items():  # as if kept in a place of fixed size
            short.values[name] = torch.nn.functional.pad(value, (0, 0, 0, 0, 60, 0))
        joined = short.join(state)
        y = model(tokens[:1, 4:5].expand(3, 1), state=joined)
        wanted = model(torch.cat((tokens[1:, :4], tokens[:1, 4:5]), 1))[0, -1]
        torch.testing.assert_close(y[0, 0], wanted, rtol=1e-9, atol=1e-9)


def test_named_heads() -> None:
    model = build(
        {
            "stem": STEM,
            "layers": BLOCKS,
            "final_norm": "layernorm",
            "head": {"words": {"part": "lm", "tied": True}, "topic": {"part": "sequence-classifier", "classes": 3}},
        }
    )
    x = some(2, 5)
    out = model(x)
    assert {name: tuple(value.shape) for name, value in out.items()} == {"words": (2, 5, 30), "topic": (2, 3)}
    assert torch.equal(model(x, head="topic"), out["topic"])
    assert set(model.outputs(Batch(inputs={"tokens": x}))) == {"words", "topic"}
    with pytest.raises(SpecError, match=r"unknown head 'topi'; did you mean 'topic'"):
        model(x, head="topi")
    with pytest.raises(SpecError, match=r"this model has heads words, topic: name one"):
        model.head()
    assert model.head("topic").kind == "sequence"


def test_composed_stems() -> None:
    stems = {"a": {"part": "token-embedding", "vocab": 30}, "b": {"part": "linear", "features": 3}}
    inputs = {"a.tokens": some(2, 4), "b.values": torch.randn(2, 4, 3)}
    for how, length in (("sum", 4), ("interleave", 8), ("concat", 8)):
        model = build({"stem": {"part": "composed", "width": 16, "stems": stems, "how": how}, "layers": BLOCKS})
        x = model.embed(Batch(inputs=inputs))[0]
        a, b = (
            stem(values, Context())[0]
            for stem, values in zip(
                model.stem.stems.values(), ({"tokens": inputs["a.tokens"]}, {"values": inputs["b.values"]})
            )
        )
        wanted = {"sum": a + b, "concat": torch.cat((a, b), 1), "interleave": torch.stack((a, b), 2).flatten(1, 2)}
        torch.testing.assert_close(x, wanted[how])
        assert model(Batch(inputs=inputs)).shape == (2, length, 16)
        assert model(Batch(inputs={"tokens": inputs["a.tokens"], "values": inputs["b.values"]})).shape[1] == length
    model = build({"stem": {"part": "composed", "width": 16, "stems": stems, "how": "interleave"}, "layers": BLOCKS})
    whole, state = model(Batch(inputs=inputs)), State(2)
    pieces = [
        model(Batch(inputs={name: value[:, a:b] for name, value in inputs.items()}), state=state)
        for a, b in ((0, 1), (1, 4))
    ]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    assert state.seen.tolist() == [8, 8]
    with pytest.raises(SpecError, match=r"stem 'values' cannot be used"):
        build({"stem": {"part": "composed", "width": 16, "stems": {"values": stems["b"]}}, "layers": []})


def test_lengths_of_a_composed_stem_are_found_by_either_name() -> None:
    stems = {"a": {"part": "token-embedding", "vocab": 30}, "b": {"part": "linear", "features": 3}}
    model = build(
        {"stem": {"part": "composed", "width": 16, "stems": stems}, "layers": BLOCKS, "head": {"part": "mean-pool"}}
    )
    inputs = {"tokens": some(2, 4), "values": torch.randn(2, 4, 3)}
    lengths = torch.tensor([4, 2])
    one = model(Batch(inputs=inputs, lengths={"tokens": lengths}))
    two = model(Batch(inputs=inputs, lengths={"a.tokens": lengths}))
    assert torch.equal(one, two)
    cut = {name: value[1:, :2] for name, value in inputs.items()}
    torch.testing.assert_close(model(Batch(inputs=cut))[0], one[1])


def test_conditions_reach_modulated_layers() -> None:
    model = build(
        {
            "stem": {"part": "linear", "features": 3, "width": 16},
            "conditioners": {"c": {"part": "label", "classes": 5, "condition_width": 6}},
            "layers": [{**MLP, "combine": {"part": "modulated", "source": "c", "condition_width": 6}}],
        }
    )
    values = torch.randn(2, 4, 3)
    batch = Batch(inputs={"values": values}, condition={"label": torch.tensor([1, 4])})
    torch.testing.assert_close(model(batch), model.embed(batch)[0])  # starts as the identity
    for parameter in model.parameters():
        parameter.data.normal_()
    y = model(batch)
    other = model(batch.replace(condition={"label": torch.tensor([1, 2])}))
    torch.testing.assert_close(y[0], other[0])
    assert not torch.allclose(y[1], other[1])
    flat = Batch(
        inputs={"values": values.reshape(1, 8, 3)},
        offsets={"values": torch.tensor([0, 4, 8])},
        condition=batch.condition,
    )
    torch.testing.assert_close(model(flat)[0], y.flatten(0, 1))
    with pytest.raises(SpecError, match=r"conditioner 'c' reads condition 'label', which this call does not carry"):
        model(values)


def test_notes_record_only_what_was_asked() -> None:
    model = decoder()
    x = some(2, 5)
    notes = Notes(want={("b0.attention", "probs"), ("b1.mlp", "hidden"), ("b1.attention", "output")})
    y = model(x, notes=notes)
    assert set(notes.got) == notes.want
    torch.testing.assert_close(y, model(x))
    start, ctx = model.embed(x)
    item = model.item("b0.attention")
    seen = item.norm(start)
    part = item.part
    q, k = (slot(seen).unflatten(-1, (-1, 8)) for slot in (part.q, part.k))
    from formwright.parts.positions import rotary_angles, rotate

    cos, sin = rotary_angles(ctx.positions, 8, {}, torch.float64)
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    scores = torch.einsum("blhd,bshd->bhls", q, k) * 8**-0.5
    later = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(notes.got["b0.attention", "probs"], scores.masked_fill(later, -torch.inf).softmax(-1))
    inside, ctx = model.run(start, ctx, stop="b1.attention")
    third = model.item("b1.attention")
    torch.testing.assert_close(notes.got["b1.attention", "output"], third.part(third.norm(inside), ctx))
    last, _ = model.run(inside, ctx, "b1.attention", "b1.mlp")
    mlp = model.item("b1.mlp")
    torch.testing.assert_close(notes.got["b1.mlp", "hidden"], torch.nn.functional.gelu(mlp.part.up(mlp.norm(last))))
    silent = Notes(want=set(notes.want))
    model(x, notes=silent, recompute=True)
    assert not silent.got


def test_probabilities_padded_packed_and_streamed() -> None:
    model = decoder()
    rows = [some(4).tolist(), some(2, seed=1).tolist()]
    want = {("b0.attention", "probs")}

    def probs(batch: Batch, **how) -> torch.Tensor:
        notes = Notes(want=set(want))
        model(batch, notes=notes, **how)
        return notes.got["b0.attention", "probs"]

    tokens, lengths = pad(rows)
    padded = probs(Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}))
    flat, offsets = pack(rows)
    packed = probs(Batch(inputs={"tokens": flat}, offsets={"tokens": offsets}))
    torch.testing.assert_close(packed[0, :, :4, :4], padded[0])
    torch.testing.assert_close(packed[0, :, 4:, 4:], padded[1, :, :2, :2])
    assert not packed[0, :, :4, 4:].any() and not packed[0, :, 4:, :4].any()
    state = State(1)
    probs(Batch(inputs={"tokens": tokens[:1, :3]}), state=state)
    later = probs(Batch(inputs={"tokens": tokens[:1, 3:]}), state=state)
    torch.testing.assert_close(later[0, :, 0], padded[0, :, 3])


def test_dropout_is_keyed_by_the_seed() -> None:
    model = decoder(
        layers=[{**ATTENTION, "dropout": 0.5}, {**MLP, "dropout": 0.5}, {**MLP, "dropout": 0.5}],
        stem={**STEM, "dropout": 0.2},
    )
    x = some(2, 6)
    quiet = model(x)
    assert torch.equal(model(x, seed=1), quiet), "no dropout in eval"
    model.train()
    before = torch.get_rng_state()
    one, again, other = model(x, seed=1), model(x, seed=1), model(x, seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, again)
    assert not torch.allclose(one, other)
    assert torch.equal(model(x, seed=1, recompute=True), one)
    with pytest.raises(SpecError, match=r"draws noise, so this call needs a seed: pass seed=0"):
        model(x)
    # Two layers of equal shape drop different entries.
    ctx = Context(seed=0)
    like = torch.zeros(1)
    first, second = (ctx.at(path).noise((50,), like, name="dropout") for path in ("b1.mlp", "b2.mlp"))
    assert not torch.equal(first, second)
    assert torch.equal(ctx.at("b1").at("mlp").noise((50,), like, name="dropout"), first)


def test_dropout_keeps_the_mean() -> None:
    from formwright.parts.base import dropout

    x = torch.ones(20_000)
    y = dropout(x, 0.25, Context(seed=3), True, "d")
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 4 / 3])
    assert abs(float(y.mean()) - 1) < 0.02
    assert dropout(x, 0.25, Context(), False, "d") is x


def test_leaves_carry_gradient_through_a_recomputed_span() -> None:
    state = State(2)
    state.put("p.hidden", torch.randn(2, 3, dtype=torch.float64))
    ctx = Context(
        memory={"m": Memory(torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([3, 1]))},
        condition={"c": torch.randn(2, 5, dtype=torch.float64)},
        streams={"s": torch.randn(2, 6, dtype=torch.float64)},
        state=state,
    )
    leaves = ctx.leaves()
    assert len(leaves) == 4
    again = ctx.with_leaves(leaves)
    assert all(a is b for a, b in zip(again.leaves(), leaves))
    assert again.memory["m"].lengths is ctx.memory["m"].lengths
    changed = ctx.replace(recompute=True).with_leaves([2 * leaf for leaf in leaves])
    torch.testing.assert_close(changed.condition["c"], 2 * ctx.condition["c"])
    torch.testing.assert_close(changed.at("p").slot("hidden", torch.zeros(1)), 2 * leaves[3])
    assert state.get("p.hidden") is leaves[3], "a recomputing span moves no stream"

    cross = {"part": "attention", "heads": 2, "memory": "m", "memory_width": 4}
    model = build(
        {"stem": {"part": "linear", "features": 2, "width": 8}, "layers": [cross, {"tap": "t"}, {"join": "t"}]}
    )
    model.double()
    values = torch.randn(2, 3, 2, dtype=torch.float64)
    memory = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    x, ctx = model.embed(values, memory={"m": Memory(memory)})
    wanted = torch.autograd.grad(model.run(x, ctx)[0].square().sum(), memory)[0]

    class Span(torch.autograd.Function):
        @staticmethod
        def forward(inner, x, *leaves):
            inner.save_for_backward(x, *leaves)
            return model.run(x, ctx.with_leaves(list(leaves)))[0]

        @staticmethod
        def backward(inner, grad):
            saved = [t.detach().requires_grad_() for t in inner.saved_tensors]
            with torch.enable_grad():
                y = model.run(saved[0], ctx.replace(recompute=True).with_leaves(saved[1:]))[0]
            return torch.autograd.grad(y, saved, grad)

    y = Span.apply(x.detach().requires_grad_(), *ctx.leaves())
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), memory)[0], wanted)


class Neighbour(Part):
    """Adds the token before, by position; takes no packed layout."""

    traits = Traits(causal=True, packed=False)

    def __init__(self, width: int) -> None:
        super().__init__()

    def forward(self, x, ctx):
        assert ctx.offsets is None
        marked = ctx.marks["m"][..., None] if "m" in ctx.marks else 0.0
        return torch.nn.functional.pad(x, (0, 0, 1, 0))[:, :-1] + ctx.place(x)[..., None] + marked


def test_a_part_without_the_packed_layout_is_unpacked_around() -> None:
    from formwright.models.items import Residual
    from formwright.parts.combines.combines import Add

    model = build({"stem": STEM, "layers": [MLP]})
    item = Residual(Neighbour(16), "pre", None, None, Add(16))
    x = torch.randn(1, 7, 16)
    marks = torch.arange(7.0)[None]
    offsets = torch.tensor([0, 3, 3, 7])
    positions = torch.tensor([[5, 6, 7, 0, 1, 2, 3]])
    ctx = Context(offsets=offsets, marks={"m": marks}, positions=positions)
    y, after = item(x, ctx)
    assert after is ctx
    for start, stop in ((0, 3), (3, 7)):
        inner = Context(marks={"m": marks[:, start:stop]}, positions=positions[:, start:stop])
        torch.testing.assert_close(y[:, start:stop], item(x[:, start:stop], inner)[0])
    assert model.width == 16


def test_building_is_deterministic_and_keyed_by_name() -> None:
    one, two, other = decoder(seed=5), decoder(seed=5), decoder(seed=6)
    longer = decoder(seed=5, layers=[*BLOCKS, ATTENTION, MLP])
    mine, theirs = one.state_dict(), two.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not torch.equal(mine["stem.tokens.weight"], other.state_dict()["stem.tokens.weight"])
    assert all(torch.equal(value, longer.state_dict()[name]) for name, value in mine.items())
    assert not torch.equal(mine["b0.mlp.part.up.weight"], mine["b1.mlp.part.up.weight"])
    before = torch.get_rng_state()
    decoder()
    assert torch.equal(torch.get_rng_state(), before)


def test_building_on_meta_takes_no_memory() -> None:
    from conformance.counting import Counter

    spec = {"stem": {**STEM, "vocab": 10**9}, "layers": BLOCKS, "head": {"part": "lm", "tied": True, "bias": True}}
    with Counter() as counted:
        model = build(spec, device="meta")
    assert not counted.real
    assert all(p.is_meta for p in model.parameters()) and not list(model.buffers())
    assert not model.training
    assert model(torch.empty(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 10**9)


def test_inputs_by_any_face() -> None:
    model = decoder()
    x = some(2, 3)
    assert torch.equal(model(x), model({"tokens": x}))
    assert torch.equal(model(x), model(Batch(inputs={"tokens": x})))
    with pytest.raises(SpecError, match=r"a model reads a Batch or a tensor"):
        model([1, 2])
    with pytest.raises(DataError, match=r"this model reads 'tokens'; the batch holds values"):
        model({"values": torch.zeros(1, 2)})


@given(rows=st.lists(st.lists(st.integers(0, 29), max_size=6), max_size=5))
def test_pad_and_pack_lose_nothing(rows: list[list[int]]) -> None:
    from formwright.models.text import to_packed

    tokens, lengths = pad(rows, value=7)
    flat, offsets = pack(rows)
    assert [tokens[i, : lengths[i]].tolist() for i in range(len(rows))] == rows
    assert [flat[0, offsets[i] : offsets[i + 1]].tolist() for i in range(len(rows))] == rows
    assert all((tokens[i, lengths[i] :] == 7).all() for i in range(len(rows)))
    if rows:
        made = to_packed(Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}))
        assert torch.equal(made.inputs["tokens"], flat) and torch.equal(made.offsets["tokens"], offsets)
    moved = Batch(inputs={"tokens": tokens}, lengths={"tokens": lengths}).to("cpu")
    assert torch.equal(moved.inputs["tokens"], tokens)
