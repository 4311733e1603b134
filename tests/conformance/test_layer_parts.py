"""Every registered mixer, channel mixer and combinator keeps what its traits promise. A new part needs no edit here."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conformance.counting import Counter
from conformance.samples import (
    LAYER_KINDS,
    LENGTHS,
    WIDTH,
    Case,
    cuts,
    draw,
    each,
    furnished,
    packed,
    padded,
    row_of,
    rows,
)
from formwright import build
from formwright.engine.state import State
from formwright.kit.errors import DataError, SpecError
from formwright.models.items import repacked
from formwright.parts.base import Part, Shape, linears
from formwright.parts.context import Context, Notes, Visible
from formwright.spec import ModelSpec

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def run_packed(part: Part, x: Tensor, ctx: Context) -> Tensor:
    return part(x, ctx) if part.traits.packed else repacked(part, x, ctx)


@each("shape", *LAYER_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_shape_and_dtype(case: Case, dtype: torch.dtype) -> None:
    part, exact = case.build(dtype), case.build(torch.float64)
    x = draw(3, 9, WIDTH)
    y = part(x.to(dtype), furnished(part, x.to(dtype)))
    assert y.shape == x.shape
    assert y.dtype == dtype
    wanted = exact(x, furnished(exact, x))
    error = (y.double() - wanted).norm() / wanted.norm()
    assert error < {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]


@each("spec", *LAYER_KINDS)
def test_spec_round_trip_and_files(case: Case) -> None:
    spec = ModelSpec(stem={"part": "linear", "features": 3, "width": WIDTH}, layers=[case.node()])
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    model, other = build(spec, seed=3), build(again, seed=3)
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(bool(torch.isfinite(value).all()) for value in mine.values()), "reset leaves a tensor unfilled"
    fresh = build(spec, seed=4)
    fresh.load_state_dict({name: value.clone() for name, value in mine.items()}, strict=True)
    x = draw(2, 5, WIDTH, dtype=torch.float32)
    part, loaded = next(model.parts())[1], next(fresh.parts())[1]
    assert torch.equal(part(x, furnished(part, x)), loaded(x, furnished(loaded, x)))


@each("cost", *LAYER_KINDS)
def test_stated_cost_is_counted_cost(case: Case) -> None:
    part = case.build(torch.float32)
    for batch, length in ((2, 6), (3, 1), (1, 700)):
        x = draw(batch, length, WIDTH, dtype=torch.float32)
        ctx = furnished(part, x)
        with torch.no_grad(), Counter() as counted:
            part(x, ctx)
        memory = max((m.x.shape[1] for m in ctx.memory.values()), default=0)
        stated = part.cost(Shape.full(batch, length, memory=memory))
        assert stated.parameters == sum(p.numel() for p in part.parameters())
        assert stated.macs == counted.macs


@each("stream-cost", *LAYER_KINDS, only=lambda part: part.traits.streams)
def test_stated_cost_of_a_later_call(case: Case) -> None:
    """Multiply-accumulates of a call behind a past, and the state's bytes after it."""
    part = case.build(torch.float32)
    x = draw(2, 17, WIDTH, dtype=torch.float32)
    state = State(2)
    ctx = furnished(part, x, state=state, path="here")
    memory = max((m.x.shape[1] for m in ctx.memory.values()), default=0)
    with torch.no_grad():
        for past, length in ((0, 12), (12, 3), (15, 2)):
            with Counter() as counted:
                part(x[:, past : past + length], ctx)
            state.advance(None, length)
            stated = part.cost(Shape.full(2, length, past=past, memory=memory))
            assert stated.macs == counted.macs
            assert stated.state_bytes == state.bytes()


@each("repeatable", *LAYER_KINDS)
def test_repeatable_under_a_seed(case: Case) -> None:
    """Training included: two runs draw the same, and the caller's generator is untouched."""
    part = case.build().train()
    x = draw(2, 6, WIDTH)
    ctx = furnished(part, x)
    before = torch.get_rng_state()
    first, second = part(x, ctx), part(x, ctx)
    assert torch.equal(torch.get_rng_state(), before)
    if not part.traits.statistics:
        assert torch.equal(first, second)


@each("rows", *LAYER_KINDS)
@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_alone_equals_padded_equals_packed(case: Case, dtype: torch.dtype, garbage: float) -> None:
    part, tolerance = case.build(dtype), TOLERANCE[dtype]
    parts = rows(dtype=dtype)
    x, lengths = padded(parts, garbage, spare=2)
    flat, offsets = packed(parts)
    longest = x[:, : max(LENGTHS)]
    ctx = furnished(part, longest)
    with torch.no_grad():
        batched = part(x, ctx.replace(lengths=lengths))
        together = run_packed(part, flat, ctx.replace(offsets=offsets, borders=tuple(offsets.tolist())))
        for index, row in enumerate(parts):
            alone = part(row[None], row_of(ctx, index, len(parts)))[0]
            assert torch.isfinite(alone).all()
            torch.testing.assert_close(batched[index, : len(row)], alone, rtol=tolerance, atol=tolerance)
            piece = together[0, offsets[index] : offsets[index + 1]]
            torch.testing.assert_close(piece, alone, rtol=tolerance, atol=tolerance)


@each("empty", *LAYER_KINDS)
def test_empty_batches_and_rows(case: Case) -> None:
    part = case.build()
    for batch, length in ((0, 4), (3, 0), (0, 0)):
        x = draw(batch, length, WIDTH)
        ctx = furnished(part, x)
        assert part(x, ctx).shape == x.shape
        assert part(x, ctx.replace(lengths=torch.zeros(batch, dtype=torch.long))).shape == x.shape
    x = draw(1, 0, WIDTH)
    offsets = torch.zeros(4, dtype=torch.long)
    ctx = furnished(part, draw(3, 0, WIDTH)).replace(offsets=offsets, borders=(0, 0, 0, 0))
    assert run_packed(part, x, ctx).shape == x.shape


@each("all-padding", *LAYER_KINDS)
def test_rows_of_nothing_but_padding(case: Case) -> None:
    """They teach nothing: every gradient is zero, and none is NaN."""
    part = case.build()
    x = draw(3, 4, WIDTH).requires_grad_()
    ctx = furnished(part, x.detach()).replace(lengths=torch.zeros(3, dtype=torch.long))
    y = part(x, ctx)
    assert y.shape == x.shape
    (y * ctx.valid(y)[..., None]).sum().backward()
    for tensor in (x, *part.parameters()):
        assert tensor.grad is None or not tensor.grad.any()


@each("padding", *LAYER_KINDS, only=lambda part: part.traits.gradient != "none")
def test_nan_in_the_padding_reaches_no_gradient(case: Case) -> None:
    """Parameters learn from real tokens alone: nothing times NaN is NaN, so padding must not enter their products."""
    part, (x, lengths) = case.build(), padded(rows(), float("nan"), spare=2)
    ctx = furnished(part, x.nan_to_num()).replace(lengths=lengths)
    y = part(x, ctx)
    y[ctx.valid(x)].square().sum().backward()
    for name, parameter in part.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@each("apart", *LAYER_KINDS)
def test_nan_in_one_row_stays_there(case: Case) -> None:
    """Rows of several chunks, none a multiple of one; the others are as without it, in one pass and as streams."""
    part = case.build(torch.float32)
    clean, broken = with_nan((70, 131, 33))
    (x, lengths), (bad, _) = padded(clean), padded(broken)
    ctx = furnished(part, x, path="here")
    with torch.no_grad():
        wanted, found = part(x, ctx.replace(lengths=lengths)), part(bad, ctx.replace(lengths=lengths))
        calls, state = [], State(3)
        for start, stop in ((0, 66), (66, 70)) if part.traits.streams else ():
            calls.append(part(bad[:, start:stop], ctx.replace(state=state)))
            state.advance(None, stop - start)
        for row, length in ((0, 70), (2, 33)):
            assert torch.equal(found[row, :length], wanted[row, :length])
            if calls:
                streamed = torch.cat(calls, 1)[row, :length]
                torch.testing.assert_close(streamed, wanted[row, :length], rtol=1e-4, atol=1e-4)


@each("packed-apart", *LAYER_KINDS)
def test_nan_in_one_document_stays_there(case: Case) -> None:
    """The same for documents packed end to end."""
    part = case.build(torch.float32)
    clean, broken = with_nan((70, 131, 33))
    (flat, offsets), (bad, _), (x, lengths) = packed(clean), packed(broken), padded(clean)
    ctx = furnished(part, x)
    layout = ctx.replace(offsets=offsets, borders=tuple(offsets.tolist()))
    with torch.no_grad():
        rowwise = part(x, ctx.replace(lengths=lengths))
        wanted, found = run_packed(part, flat, layout), run_packed(part, bad, layout)
    for row, (start, stop) in ((0, (0, 70)), (2, (201, 234))):
        assert torch.equal(found[0, start:stop], wanted[0, start:stop])
        torch.testing.assert_close(wanted[0, start:stop], rowwise[row, : stop - start], rtol=1e-4, atol=1e-4)


def with_nan(lengths: tuple[int, int, int]) -> tuple[list[Tensor], list[Tensor]]:
    """Three rows, and the same with nothing but NaN in the second."""
    clean = rows(lengths, dtype=torch.float32)
    return clean, [clean[0], torch.full_like(clean[1], float("nan")), clean[2]]


@each("half", *LAYER_KINDS)
def test_half_precision(case: Case) -> None:
    """Close on ordinary numbers; over many large tokens finite, since sums over tokens pass what float16 can hold."""
    part, exact = case.build(torch.float32).half(), case.build(torch.float64)
    x = draw(2, 40, WIDTH)
    with torch.no_grad():
        y, wanted = part(x.half(), furnished(part, x.half())), exact(x, furnished(exact, x))
        assert y.dtype == torch.float16
        assert (y.double() - wanted).norm() < 0.02 * wanted.norm()
        many = (8 * draw(1, 600, WIDTH)).half()
        wanted = exact(many.double(), furnished(exact, many.double()))
        if wanted.abs().max() < 3e4:  # what passes float16 itself has no other answer than infinity
            assert torch.isfinite(part(many, furnished(part, many))).all()


@each("beyond", *LAYER_KINDS, only=lambda part: part.traits.length != "any")
def test_beyond_the_table(case: Case) -> None:
    """A sentence that names the place, the part, what it can take, and an option with which it takes more."""
    part = case.build()
    most = part.traits.length
    x = draw(1, most + 1, WIDTH)
    ctx = furnished(part, x, path="here")
    assert part(x[:, :most], ctx).shape == (1, most, WIDTH)
    assert part(x, ctx.replace(lengths=torch.tensor([most]))).shape == x.shape
    with pytest.raises(DataError, match=rf"here: {most + 1} tokens pass the {most} of .*{case.name}") as error:
        part(x, ctx)
    remedy = re.search(r"build it with (\w+)=(\d+)$", str(error.value))
    assert remedy is not None
    longer = replace(case, options={**case.options, remedy[1]: int(remedy[2])}).build()
    assert longer(x, furnished(longer, x)).shape == x.shape


@each("gradcheck", *LAYER_KINDS, only=lambda part: part.traits.gradient == "exact")
def test_gradient_is_exact(case: Case) -> None:
    part = case.build()
    x, lengths = padded(rows((4, 0, 1, 6)))
    ctx = furnished(part, x)
    lists = [leaf for leaf in ctx.leaves() if leaf is not None and leaf.is_floating_point()]
    names = [name for name, _ in part.named_parameters()]
    inputs = [t.detach().clone().requires_grad_() for t in (x, *lists, *part.parameters())]

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        held = dict(zip(names, rest[len(lists) :]))
        inner = ctx.with_leaves(list(rest[: len(lists)])).replace(lengths=lengths)
        y = torch.func.functional_call(part, held, (x, inner))
        return y * inner.valid(x)[..., None]

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)


@each("gradients", *LAYER_KINDS, only=lambda part: part.traits.gradient != "none")
def test_every_parameter_gets_a_gradient(case: Case) -> None:
    part = case.build()
    x = draw(2, 8, WIDTH).requires_grad_()
    part(x, furnished(part, x.detach())).square().sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()
    for name, parameter in part.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"
        assert torch.isfinite(parameter.grad).all()


@each("causal", *LAYER_KINDS, only=lambda part: part.traits.causal and part.traits.lookahead == 0)
def test_no_output_depends_on_a_later_input(case: Case) -> None:
    part = case.build()
    x = draw(2, 11, WIDTH).requires_grad_()
    ctx = furnished(part, x.detach())
    y = part(x, ctx)
    for place in (0, 3, 9):
        (grad,) = torch.autograd.grad(y[:, place].square().sum(), x, retain_graph=True)
        assert not grad[:, place + 1 :].any()
        changed = x.detach().clone()
        changed[:, place + 1 :] = 1e3 * draw(2, 10 - place, WIDTH, seed=5)
        torch.testing.assert_close(
            part(changed, ctx)[:, : place + 1], y[:, : place + 1].detach(), rtol=1e-12, atol=1e-12
        )


RULES = {
    "causal": Visible(causal=True),
    "window": Visible(window=2),
    "prefix": Visible(causal=True, prefix=2),
    "segments": Visible(segments=torch.tensor([[0, 0, 0, 1, 1, 1]])),
    "context": Visible(context=2),
}


@each("rules", "mixer", only=lambda part: not part.reads)
@pytest.mark.parametrize("name", RULES)
def test_a_rule_of_visibility_is_kept_or_refused(case: Case, name: str) -> None:
    """Kept: a change reaches the tokens that may see it, and no others. Refused: naming the place and the part."""
    part, rule = case.build(), RULES[name]
    x = draw(1, 6, WIDTH)
    ctx = furnished(part, x, path="here").replace(visible=rule)
    try:
        y = part(x, ctx)
    except SpecError as error:
        assert str(error).startswith("here: ") and case.name in str(error)
        return
    places = torch.arange(6)[None]
    seen = rule.mask(places, places, rule.segments, rule.segments)[0]
    for place in range(6):
        changed = x.clone()
        changed[:, place] += 3.0 * draw(1, WIDTH, seed=4)
        moved = (part(changed, ctx) - y).abs().amax((0, 2)) > 1e-12
        assert not (moved & ~seen[:, place]).any()
        assert name != "prefix" or place != 1 or moved[0], "the prefix is seen by all"


@each("streams", *LAYER_KINDS, only=lambda part: part.traits.streams)
@settings(max_examples=6)
@given(cut=cuts(3, 14), spare=st.integers(0, 2))
def test_parallel_equals_streamed(case: Case, cut: tuple[list[int], list[list[int]]], spare: int) -> None:
    """Any cut of unequal rows into calls, 0 new tokens included, gives what one pass gives."""
    part, (lengths, calls) = case.build(), cut
    x, sizes = padded(rows(tuple(lengths)))
    ctx = furnished(part, x)
    wanted = part(x, ctx.replace(lengths=sizes))
    state = State(3)
    done = [0, 0, 0]
    found: list[list[Tensor]] = [[], [], []]
    with torch.no_grad():
        for new in calls:
            width = max(new) + spare
            call = torch.full((3, width, WIDTH), float("nan"), dtype=x.dtype)
            for row in range(3):
                call[row, : new[row]] = x[row, done[row] : done[row] + new[row]]
            y = part(call, ctx.replace(lengths=torch.tensor(new), state=state, path="here"))
            state.advance(torch.tensor(new), width)
            for row in range(3):
                found[row].append(y[row, : new[row]])
                done[row] += new[row]
    for row, total in enumerate(lengths):
        streamed = torch.cat(found[row]) if found[row] else x.new_zeros(0, WIDTH)
        torch.testing.assert_close(streamed, wanted[row, :total], rtol=1e-9, atol=1e-9)
    assert state.seen.tolist() == done == lengths


@each("slots", *LAYER_KINDS, only=lambda part: part.traits.streams)
def test_state_slots_are_as_declared(case: Case) -> None:
    part = case.build(torch.float32)
    x = draw(3, 12, WIDTH, dtype=torch.float32)
    state = State(3)
    ctx = furnished(part, x, state=state, path="here")
    with torch.no_grad():
        for past, length in ((0, 7), (7, 5)):
            part(x[:, past : past + length], ctx)
            state.advance(None, length)
    declared = {f"here.{name}": slot for name, slot in part.slots().items()}
    assert set(state.values) == set(declared)
    for name, slot in declared.items():
        value = state.values[name]
        own = slot.shape
        if slot.kind == "grow":
            own = (12 // slot.every, *own)
        elif slot.kind == "window":
            assert slot.window is not None
            own = (min(12, slot.window), *own)
        elif slot.kind == "memory":
            own = (max(m.x.shape[1] for m in ctx.memory.values()), *own)
        assert tuple(value.shape) == (3, *own)
        assert value.dtype == (slot.dtype or torch.float32)
        assert (state.growing.get(name, "fixed") != "fixed") == (slot.kind in ("grow", "window"))


@each("silent", *LAYER_KINDS)
def test_recompute_is_silent(case: Case) -> None:
    """A second run for the backward pass records nothing and moves no stream."""
    part = case.build()
    x = draw(2, 5, WIDTH)
    notes = Notes(want={("here", name) for name in ("probs", "hidden", "output", "gate")})
    ctx = furnished(part, x, notes=notes, recompute=True, path="here")
    part(x, ctx)
    assert not notes.got and not notes.losses
    if part.traits.streams and not any(slot.kind in ("grow", "window") for slot in part.slots().values()):
        state = State(2)
        part(x, ctx.replace(state=state))
        assert not state.values


@each("growth", *LAYER_KINDS, only=lambda part: part.traits.length == "any")
def test_memory_grows_no_faster_than_length(case: Case) -> None:
    """No tensor of length x length is ever made; products grow as the stated cost does, and that as declared."""
    part = case.build(torch.float32)
    most = {"linear": 2.0, "n log n": 2.0 * 12 / 11, "n sqrt n": 2.0**1.5, "quadratic": 4.0}[part.traits.growth]
    peaks, macs = [], []
    for length in (2048, 4096):
        x = draw(1, length, WIDTH, dtype=torch.float32)
        ctx = furnished(part, x)
        with torch.no_grad(), Counter() as counted:
            part(x, ctx)
        memory = max((m.x.shape[1] for m in ctx.memory.values()), default=0)
        assert counted.macs == part.cost(Shape.full(1, length, memory=memory)).macs
        peaks.append(counted.peak)
        macs.append(counted.macs)
    assert peaks[1] <= 2.2 * peaks[0]
    assert macs[1] <= 1.08 * most * macs[0]


@each("meta", *LAYER_KINDS)
def test_laid_out_without_memory(case: Case) -> None:
    """A constructor under meta makes nothing real. Running statistics are saved, so that loading fills them; a buffer
    that is not saved would stay empty."""
    with torch.device("meta"), Counter() as counted:
        part = case.construct()
    assert not counted.real
    assert all(parameter.is_meta for parameter in part.parameters())
    assert part.traits.statistics or not list(part.buffers())
    assert {name for name, _ in part.named_buffers()} <= set(part.state_dict())
    x = torch.empty(2, 6, WIDTH, device="meta")
    assert part(x, furnished(part, x)).shape == x.shape


@each("paths", *LAYER_KINDS)
def test_slots_answer_to_the_interface(case: Case) -> None:
    """Every projection is a slot with a role, and the axes name slots that exist."""
    part = case.build()
    held = dict(linears(part))
    assert set(part.axes) <= set(held)
    for name, slot in held.items():
        assert slot.role
        assert tuple(slot.dense_weight().shape) == (slot.out_features, slot.in_features), name
