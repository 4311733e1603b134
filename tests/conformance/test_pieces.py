"""Norms, combines, stems, heads, conditioners, reshapes and linears: every registered one keeps its contract."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.counting import Counter
from conformance.samples import WIDTH, Case, draw, each, furnished, keyed, packed, padded, row_of, rows
from formwright import Refusal, build
from formwright.engine.state import State
from formwright.parts.base import LinearLike, Shape
from formwright.parts.context import Context
from formwright.parts.linears.dense import Table
from formwright.spec import ModelSpec

KINDS = ("norm", "combine", "stem", "head", "conditioner", "reshape")
SIZES = (6, 1, 0, 4, 3, 6)


def tied(module: nn.Module) -> nn.Module:
    """A head that reads the stem's table is given one, filled like any other."""
    if getattr(module, "tied", False):
        table = Table(20, WIDTH)
        table.weight.data = draw(20, WIDTH, dtype=next(module.parameters()).dtype)
        module.tie(table)  # type: ignore[operator]
        for parameter in module.parameters():
            parameter.data = draw(*parameter.shape, dtype=table.weight.dtype)
    return module


def ready(case: Case, dtype: torch.dtype = torch.float64) -> Any:
    return tied(case.build(dtype))


def spec_with(case: Case) -> ModelSpec:
    """A model in which the case stands where its kind belongs."""
    stem = {"part": "token-embedding", "vocab": 20, "width": WIDTH}
    layer: dict[str, Any] = {"part": "mlp", "hidden": 8}
    node = case.node()
    if case.kind == "stem":
        return ModelSpec(stem={**node, "width": WIDTH}, layers=[layer])
    if case.kind == "head":
        return ModelSpec(stem=stem, layers=[layer], head=node)
    if case.kind == "conditioner":
        return ModelSpec(stem=stem, layers=[layer], conditioners={"c": node})
    if case.kind == "reshape":
        return ModelSpec(stem=stem, layers=[{"reshape": node}])
    return ModelSpec(stem=stem, layers=[{**layer, case.kind: node}])


@each("spec", *KINDS)
def test_spec_round_trip_and_files(case: Case) -> None:
    spec = spec_with(case)
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    mine, theirs = build(spec, seed=3).state_dict(), build(again, seed=3).state_dict()
    assert list(mine) == list(theirs)
    for name, value in mine.items():
        assert torch.equal(value, theirs[name])
        assert torch.isfinite(value).all(), f"reset leaves {name} unfilled"
    build(spec, seed=4).load_state_dict(mine, strict=True)


@each("meta", *KINDS)
def test_laid_out_without_memory(case: Case) -> None:
    with torch.device("meta"), Counter() as counted:
        made = case.construct()
    assert not counted.real
    assert all(parameter.is_meta for parameter in made.parameters())
    assert {name for name, _ in made.named_buffers()} <= set(made.state_dict()), "loading would leave a buffer empty"


def apply(case: Case, module: Any, x: Tensor, ctx: Context) -> Tensor:
    """The case run on a stream ``x``, whatever its kind."""
    if case.kind == "norm":
        return module(x)
    if case.kind == "combine":
        return module(x, module.before(x, ctx) * 0.5 + 1.0, ctx)
    if case.kind == "reshape":
        return module(x, ctx)[0]
    return module(x, ctx)


class Applied(nn.Module):
    """The case as a module, for calls with other parameters."""

    def __init__(self, case: Case, held: nn.Module) -> None:
        super().__init__()
        self.case, self.held = case, held

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        return apply(self.case, self.held, x, ctx)


def condition_of(module: Any, ctx: Context, rows: int) -> Context:
    """Conditions that a conditioner reads: a class for each row."""
    source = getattr(module, "source", None)
    if source is None or source in ctx.condition:
        return ctx
    return ctx.replace(condition={**ctx.condition, source: torch.arange(rows) % 5})


@each("dtype", "norm", "combine", "reshape", "head")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtype(case: Case, dtype: torch.dtype) -> None:
    module, exact = ready(case, dtype), ready(case)
    x = draw(4, 6, WIDTH)
    y = apply(case, module, x.to(dtype), furnished(module, x.to(dtype)))
    wanted = apply(case, exact, x, furnished(exact, x))
    assert y.dtype == dtype
    assert y.shape == wanted.shape
    assert (y.double() - wanted).norm() <= {torch.float32: 1e-4, torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype] * (
        1 + wanted.norm()
    )


@each("cost", "norm", "combine", "reshape", "head", "conditioner", "stem")
def test_stated_cost_is_counted_cost(case: Case) -> None:
    module = ready(case, torch.float32)
    for batch, length in ((2, 6), (4, 3)):
        shape = Shape.full(batch, length)
        x = draw(batch, length, WIDTH, dtype=torch.float32)
        ctx = condition_of(module, furnished(module, x), batch)
        with torch.no_grad(), Counter() as counted:
            if case.kind == "stem":
                module(module.sample(batch, length, keyed()), Context())
            elif case.kind == "conditioner":
                module(x, ctx, "c")
            else:
                apply(case, module, x, ctx)
        stated = module.cost(shape)
        assert stated.macs == counted.macs
        assert stated.parameters == sum(p.numel() for p in module.parameters())


@each("rows", "norm", "combine", "head", "reshape")
@pytest.mark.parametrize("garbage", [0.0, 1e30, float("nan")])
def test_alone_equals_padded_equals_packed(case: Case, garbage: float) -> None:
    module = ready(case)
    parts = rows(SIZES)
    x, lengths = padded(parts, garbage)
    flat, offsets = packed(parts)
    ctx = furnished(module, x)
    batched = apply(case, module, x, ctx.replace(lengths=lengths))
    if case.kind == "reshape":
        y, after = module(flat, ctx.replace(offsets=offsets))
        sizes = module(x, ctx.replace(lengths=lengths))[1].lengths
        assert torch.equal(sizes, after.offsets.diff())
        together = y
        offsets = after.offsets
    else:
        together = apply(case, module, flat, ctx.replace(offsets=offsets))
        sizes = lengths
    pairs = getattr(module, "kind", "") == "pair"
    whole_rows = case.kind == "head" and module.kind not in ("tokens", "states")
    if whole_rows:
        torch.testing.assert_close(batched, together, rtol=1e-10, atol=1e-10)
    for index, row in enumerate(parts):
        if pairs:
            continue
        alone = apply(case, module, row[None], row_of(ctx, index, len(parts)))[0]
        mine = batched[index] if whole_rows else batched[index, : sizes[index]]
        torch.testing.assert_close(mine, alone, rtol=1e-10, atol=1e-10)
        if not whole_rows:
            piece = together[0, offsets[index] : offsets[index + 1]]
            torch.testing.assert_close(piece, alone, rtol=1e-10, atol=1e-10)


@each("empty", "norm", "combine", "head", "reshape")
def test_empty_batches(case: Case) -> None:
    module = ready(case)
    for batch, length in ((0, 4), (4, 0), (0, 0)):
        x = draw(batch, length, WIDTH)
        y = apply(case, module, x, furnished(module, x))
        assert torch.isfinite(y).all()
        assert y.shape[0] == (batch // 2 if getattr(module, "kind", "") == "pair" else batch)
    x = draw(1, 0, WIDTH)
    offsets = torch.zeros(5, dtype=torch.long)
    apply(case, module, x, furnished(module, draw(4, 0, WIDTH)).replace(offsets=offsets))


@each("gradcheck", "norm", "combine", "head", "reshape")
def test_gradient_is_exact_and_complete(case: Case) -> None:
    module = ready(case)
    x, lengths = padded(rows((4, 2, 1, 5)))
    ctx = furnished(module, x)
    conditions = [leaf for leaf in ctx.leaves() if leaf is not None and leaf.is_floating_point()]
    names = [name for name, _ in module.named_parameters()]
    inputs = [t.detach().clone().requires_grad_() for t in (x, *conditions, *module.parameters())]

    def call(x: Tensor, *rest: Tensor) -> Tensor:
        inner = ctx.with_leaves(list(rest[: len(conditions)])).replace(lengths=lengths)
        values = {f"held.{name}": value for name, value in zip(names, rest[len(conditions) :])}
        return torch.func.functional_call(Applied(case, module), values, (x, inner))

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)
    x = draw(4, 5, WIDTH).requires_grad_()
    apply(case, module, x, ctx.replace(lengths=torch.tensor([5, 5, 2, 1]))).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} gets no gradient"


@each("stem", "stem")
def test_stems_place_and_cut(case: Case) -> None:
    """Same values padded or alone, the length that the cost foresees, and a field that exists."""
    stem = ready(case, torch.float32)
    inputs = stem.sample(3, 5, keyed(1))
    assert stem.field() in inputs
    x, _ = stem(inputs, Context())
    assert x.shape == (3, stem.shape_after(Shape.full(3, 5)).lengths[0], WIDTH)
    one, _ = stem({name: value[1:2] for name, value in inputs.items()}, Context())
    torch.testing.assert_close(one, x[1:2])
    if stem.limit is not None:
        assert stem.limit >= 5
    with pytest.raises(Exception, match=r"reads"):
        stem({"nothing": torch.zeros(1, 1)}, Context())


@each("stem-stream", "stem")
def test_stems_stream(case: Case) -> None:
    """Tokens of a later call stand where one pass puts them."""
    stem = ready(case, torch.float32)
    inputs = stem.sample(2, 6, keyed(1))
    if any(value.shape[1:2] != (6,) for value in inputs.values()) or getattr(stem, "how", "") == "concat":
        return
    whole, _ = stem(inputs, Context())
    each_token = whole.shape[1] // 6
    state, made = State(2), []
    for start, stop in ((0, 2), (2, 3), (3, 6)):
        cut = {name: value[:, start:stop] for name, value in inputs.items()}
        x, _ = stem(cut, Context(state=state))
        state.advance(None, x.shape[1])
        made.append(x)
    assert state.seen.tolist() == [6 * each_token] * 2
    torch.testing.assert_close(torch.cat(made, 1), whole)


@each("conditioner", "conditioner")
def test_conditioners_only_add_under_their_name(case: Case) -> None:
    module = ready(case)
    x = draw(3, 5, WIDTH)
    ctx = condition_of(module, furnished(module, x), 3)
    after = module(x, ctx, "mine")
    assert set(after.condition) == {*ctx.condition, "mine"}
    assert torch.isfinite(after.condition["mine"]).all()
    assert after.replace(condition=ctx.condition).path == ctx.path
    after.condition["mine"].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def weight_of(slot: LinearLike) -> Tensor | None:
    """The slot said densely; None where it refuses, which some kinds must."""
    try:
        return slot.dense_weight().detach()
    except Refusal:
        return None


def near(value: Tensor, wanted: Tensor, tolerance: float = 0.02) -> bool:
    """Equal up to what rounding to 8 bits costs."""
    return bool((value - wanted).norm() <= tolerance * (1e-6 + wanted.norm()))


@each("linear", "linear")
def test_linears_agree_with_their_dense_weight(case: Case) -> None:
    slot = case.build(torch.float32)
    x = draw(3, 5, slot.in_features, dtype=torch.float32)
    y, weight = slot(x), weight_of(slot)
    assert y.shape == (3, 5, slot.out_features)
    if weight is not None:
        assert near(y, torch.nn.functional.linear(x, weight, slot.dense_bias()))
    assert slot(x[:0]).shape == (0, 5, slot.out_features)
    assert slot(x[0, 0]).shape == (slot.out_features,)
    torch.testing.assert_close(slot(x[1:2]), y[1:2], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(type(slot).project([slot, slot], x, None)[1], y)


@each("linear-take", "linear")
def test_linears_give_rows_and_columns(case: Case) -> None:
    slot = case.build(torch.float32)
    out, inn = torch.tensor([3, 0, 0, 7]), torch.tensor([5, 1, 1, 9, 30])
    x = draw(3, 5, slot.in_features, dtype=torch.float32)
    before, weight = slot(x), weight_of(slot)
    for rows_, columns in ((out, None), (None, inn), (out, inn)):
        taken = slot.take(rows_, columns)
        assert taken.role == slot.role
        assert taken.out_features == (slot.out_features if rows_ is None else len(out))
        assert taken.in_features == (slot.in_features if columns is None else len(inn))
        if weight is not None:
            wanted = weight if rows_ is None else weight[rows_]
            wanted = wanted if columns is None else wanted[:, columns]
            torch.testing.assert_close(taken.dense_weight().detach(), wanted, rtol=1e-6, atol=1e-6)
    assert near(slot.take(out)(x), before[..., out])
    every = torch.arange(slot.in_features).flip(0)
    assert near(slot.take(None, every)(x.flip(-1)), before)
    torch.testing.assert_close(slot(x), before)  # the slot itself is as it was
    with torch.device("meta"):
        laid = case.construct()
    taken = laid.take(out.to("meta"), inn.to("meta"))
    assert (taken.out_features, taken.in_features) == (4, 5)


@each("linear-scale", "linear")
def test_linears_scale_their_input_side(case: Case) -> None:
    slot = case.build(torch.float32)
    x = draw(3, 5, slot.in_features, dtype=torch.float32)
    wanted = slot(0.5 * x)
    slot.scale_in(0.5)
    assert near(slot(x), wanted)


@each("linear-cost", "linear")
def test_linears_state_their_cost(case: Case) -> None:
    slot = case.build(torch.float32)
    x = draw(3, 5, slot.in_features, dtype=torch.float32)
    with torch.no_grad(), Counter() as counted:
        slot(x)
    assert slot.cost(Shape.full(3, 5)).macs == counted.macs
    assert slot.cost(Shape.full(3, 5)).parameters == sum(p.numel() for p in slot.parameters())
