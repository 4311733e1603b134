"""Every registered change of a linear, around every kind: nothing at the start, folding, rows, cutting, cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import formwright as fw
from conformance.counting import Counter
from formwright import registry
from formwright.kit.errors import FormwrightError, Refusal
from formwright.parts.base import Shape, initialise
from formwright.parts.context import Context
from formwright.parts.linears.adapted import Adapted, Change
from formwright.surgery.adapt.switch import choose, numbers, use
from formwright.surgery.base import surgery
from formwright.surgery.samples import encoder, equal, said, state, tokens

IN, OUT = 32, 24
CASES = [(name, i) for name in registry.names("change") for i in range(len(registry.resolve("change", name).examples))]
#: Kinds of base that can be stated densely without rounding, and one that cannot.
BASES: dict[str, dict[str, Any]] = {"dense": {}, "low-rank": {"rank": 6}, "int8": {}}
each = pytest.mark.parametrize("name, example", CASES, ids=lambda value: str(value))


def made(name: str, example: int, base: str = "dense", dtype: torch.dtype = torch.float32, seed: int = 0) -> Adapted:
    """A linear of that kind with one change, filled."""
    held = registry.resolve("linear", base)(IN, OUT, True, "q", **BASES[base])
    kind = registry.resolve("change", name)
    slot = Adapted(base=held)
    slot.add("mine", kind(IN, OUT, **kind.examples[example]))
    slot.to(dtype)  # before the start, which takes the lengths of rows as they then are
    initialise(slot, seed)
    return slot.eval()


def shaken(slot: Any, size: float = 0.1, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for change in slot.held().values():
            for parameter in change.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return slot


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(
    case=st.sampled_from(CASES),
    base=st.sampled_from(sorted(BASES)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    shape=st.sampled_from([(3, 5), (0, 4), (1,), ()]),
    seed=st.integers(0, 3),
)
@settings(max_examples=60)
def test_starts_as_nothing_and_folds(
    case: tuple[str, int], base: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int
) -> None:
    slot, x = made(*case, base, dtype, seed), drawn(*shape, IN, dtype=dtype, seed=seed)
    with torch.no_grad():
        if slot.only().identity:
            assert torch.equal(slot(x), slot.base(x))
        shaken(slot, seed=seed)
        y = slot(x)
        assert y.dtype == slot.base(x).dtype and y.shape == (*shape, OUT) and bool(torch.isfinite(y).all())
        if base != "int8" and dtype != torch.bfloat16:
            weight, bias = slot.folded()
            merged = F.linear(x, weight, bias)
            assert float((merged - y).abs().max() if y.numel() else 0) <= (1e-5 if dtype == torch.float32 else 1e-12)


@each
@pytest.mark.parametrize("base", sorted(BASES))
def test_rows_of_a_batch_are_what_each_is_alone(name: str, example: int, base: str) -> None:
    """With LoRA beside it, and rows of none; the packed layout too."""
    slot = made(name, example, base)
    lora = registry.resolve("change", "lora")(IN, OUT, rank=2, number=1)
    slot.add("other", lora)
    initialise(lora, 3)
    shaken(slot)
    x, picked = drawn(4, 6, IN), torch.tensor([1, -1, 0, 1])
    with torch.no_grad():
        mixed = slot(x, Context(adapters=picked))
        flat = x.reshape(1, -1, IN)
        packed = slot(flat, Context(adapters=picked, offsets=torch.arange(0, 30, 6)))
        for row, number in enumerate(picked.tolist()):
            slot.active = number
            torch.testing.assert_close(mixed[row], slot(x[row]), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(packed[0, 6 * row : 6 * row + 6], slot(x[row]), rtol=1e-5, atol=1e-5)


@each
def test_gradients_are_exact(name: str, example: int) -> None:
    slot = shaken(made(name, example, "dense", torch.float64))
    change: Change = slot.only()
    # DoRA takes the lengths of rows as fixed, so its A and B are compared at fixed lengths.
    if name == "dora":
        fixed = change.lengths(slot.base.weight)  # type: ignore[operator]
        change.lengths = lambda weight: fixed  # type: ignore[assignment, method-assign]
    names = [key for key, parameter in change.named_parameters() if parameter.requires_grad]
    inputs = [drawn(2, 3, IN, dtype=torch.float64), *[dict(change.named_parameters())[key] for key in names]]
    inputs = [t.detach().clone().requires_grad_() for t in inputs]

    def call(x: Tensor, *values: Tensor) -> Tensor:
        held = {f"adapters.mine.{key}": value for key, value in zip(names, values)}
        return torch.func.functional_call(slot, held, (x,))

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True, atol=1e-6, rtol=1e-4)


@each
def test_cutting_scaling_and_cost(name: str, example: int) -> None:
    slot, x = shaken(made(name, example)), drawn(3, 5, IN)
    with torch.no_grad():
        weight, before = slot.dense_weight().clone(), slot(x)
        out, inn = torch.tensor([3, 0, 0, 7]), torch.tensor([5, 1, 1, 9, 30])
        try:
            for rows, columns in ((out, None), (None, inn), (out, inn)):
                taken = slot.take(rows, columns)
                wanted = weight if rows is None else weight[rows]
                wanted = wanted if columns is None else wanted[:, columns]
                torch.testing.assert_close(taken.dense_weight(), wanted, rtol=1e-5, atol=1e-5)
                assert taken.only().key == slot.only().key
        except Refusal as refusal:
            assert "merge the adapter first" in str(refusal)
        with Counter() as counted:
            slot(x)
        assert slot.cost(Shape.full(3, 5)).macs == counted.macs
        assert slot.cost(Shape.full(3, 5)).parameters == sum(p.numel() for p in slot.parameters())
        wanted = slot(0.5 * x)
        slot.scale_in(0.5)
        if name != "ia3":  # what its inputs are multiplied by stays; the base is scaled
            torch.testing.assert_close(slot(x), wanted, rtol=1e-4, atol=1e-5)
        assert before.shape == wanted.shape


@pytest.mark.parametrize("name", registry.names("change"))
@pytest.mark.parametrize("below", [None, "llm-int8", "low-rank"])
def test_only_what_is_added_moves_and_is_taken_back(name: str, below: str | None) -> None:
    """20 steps on each kind of base; frozen tensors stay bit for bit, undo gives the model back bit for bit."""
    original = encoder()
    if below is not None:
        options = {"outliers": "none"} if below == "llm-int8" else {"rank": 4, "solver": "svd", "where": ["q", "down"]}
        fw.apply(original, below, **options)
    before, answers = state(original), said(original)
    model = fw.apply(original, name, **{**surgery(name).examples[0], "name": "mine"}).train()
    start = state(model)
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)
    for step in range(20):
        model(tokens(seed=step), seed=step).square().sum(-1).sub(
            model(tokens(seed=step), seed=step)[:, 0]
        ).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {key for key, value in state(model).items() if not torch.equal(value, start[key])}
    assert moved and {key.replace(".shared.", ".") for key in moved} <= {k.replace(".shared.", ".") for k in trained}
    fw.undo(model.eval())
    assert equal(before, state(model)) and equal(answers, said(model))


@pytest.mark.parametrize("name", registry.names("change"))
def test_unmerging_gives_the_very_bits_back(name: str) -> None:
    model = encoder()
    fw.apply(model, name, **{**surgery(name).examples[0], "name": "mine"})
    for slot in model.slots().values():
        if isinstance(slot, Adapted):
            shaken(slot)
    before, answers = state(model), said(model)
    fw.apply(model, "merge", keep_undo=True)
    assert float((said(model)["out"] - answers["out"]).abs().max()) <= 1e-5
    fw.undo(model)
    assert equal(before, state(model)) and equal(answers, said(model))


def test_adapters_of_several_methods_in_one_model() -> None:
    model = encoder()
    methods = ("lora", "ia3", "dora", "vera")
    for name in methods:
        fw.apply(model, name, **{**surgery(name).examples[0], "name": name})
    for slot in model.slots().values():
        if isinstance(slot, Adapted):
            shaken(slot, 0.3)
    assert numbers(model) == {name: index for index, name in enumerate(methods)}
    assert model.layout()[0]["slots"]["v"] == "lora+ia3+dora+vera(dense)"
    names = [*methods, None]
    x = tokens(5, 7)
    with torch.no_grad():
        mixed = model(x, adapters=choose(model, names))
        alone = torch.cat([use(model, name)(x[i : i + 1]) for i, name in enumerate(names)])
    torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-5)
    assert len({tuple(row.tolist()) for row in mixed}) == 5


def test_where_a_method_goes() -> None:
    model = encoder()
    roles = {a: a.rpartition(":")[2] for a in model.slots()}

    def chosen(*where: str) -> set[str]:
        return set(fw.plan(model, "ia3", where=list(where)).decisions["slots"])

    assert chosen("query") == chosen("q") == {a for a, role in roles.items() if role == "q"}
    assert chosen("key", "value", "output") == chosen("k", "v", "o")
    assert chosen("b1.*", "b0.mlp:up") == {a for a in roles if a.startswith("b1.")} | {"b0.mlp:up"}
    assert chosen("all") == {a for a in roles if a.startswith("b")}
    with pytest.raises(FormwrightError, match=r"'qeury' matches no slot; did you mean 'query'"):
        chosen("qeury")


def test_another_adapter_is_another_number_and_no_other_graph() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    slot = Adapted(IN, OUT, method="lora", rank=2, names=("one", "two"))
    slot.add("three", registry.resolve("change", "ia3")(IN, OUT, number=2))
    initialise(slot, 0)
    shaken(slot)

    def run(x: Tensor, adapters: Tensor) -> Tensor:
        return slot(x, Context(adapters=adapters))

    compiled, x = torch.compile(run, backend=backend), drawn(3, 4, IN)
    with torch.no_grad():
        for numbers_ in ([0, 0, 0], [1, 1, 1], [2, -1, 0]):
            torch.testing.assert_close(compiled(x, torch.tensor(numbers_)), run(x, torch.tensor(numbers_)))
        slot.held()["one"].A.mul_(2.0)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(compiled(x, torch.tensor([0, 0, 1])), run(x, torch.tensor([0, 0, 1])))
    assert len(graphs) == 1
