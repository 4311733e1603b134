"""LMUFormer's pieces: what they compute, their streams with ragged rows, spikes that are equal in both modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.nn import functional as F

from conformance.samples import cuts, draw
from formwright.engine.state import State
from formwright.kit.errors import DataError, SpecError
from formwright.models.build import build
from formwright.models.recipes import recipe
from formwright.ops.legendre_memory import legendre_memory_reference
from formwright.parts.base import initialise
from formwright.parts.context import Context, Notes
from formwright.parts.make import make_part
from formwright.parts.norms.batch import BatchNorm

FEATURES, WIDTH = 5, 16
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("lmuformer", {}),
    "spiking pre": ("spiking-lmuformer", {"form": "pre"}),
    "spiking post": ("spiking-lmuformer", {"form": "post"}),
}


def model(form: str = "plain", dtype: torch.dtype = torch.float64, **sizes: Any) -> Any:
    """A small LMUFormer whose running averages are those of random rows, as after training."""
    name, options = FORMS[form]
    made = build(recipe(name, features=FEATURES, width=WIDTH, classes=3, theta=20, **{**options, **sizes})).to(dtype)
    for norm in made.modules():
        if isinstance(norm, BatchNorm):
            norm.weight.data.fill_(2.5)  # so that neurons are lively
    made.train()
    with torch.no_grad():
        for seed in range(20):
            made(3 * draw(8, 24, FEATURES, dtype=dtype, seed=seed))
    return made.eval()


def part(node: dict[str, Any], width: int = 8, dtype: torch.dtype = torch.float64) -> Any:
    made = make_part(node, width)
    initialise(made, 0)
    return made.to(dtype).eval()


def frames(made: Any, values: Tensor, state: State | None = None, **context: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(frames before the head, how many of each row are real, logits); a state moves on."""
    x, ctx = made.run(*made.embed(values, state=state, **context))
    logits = made.read(x, ctx)
    lengths = torch.full((len(x),), x.shape[1]) if ctx.lengths is None else ctx.lengths
    if state is not None:
        state.advance(lengths, x.shape[1])
    return x, lengths, logits


def streamed(made: Any, values: Tensor, lengths: list[int], calls: list[list[int]]) -> tuple[list[Tensor], Tensor]:
    """Every row's frames, and the logits of the last call, from calls of ragged rows with garbage in the padding."""
    rows, state = len(lengths), State(len(lengths))
    done, found = [0] * rows, [[] for _ in range(rows)]  # type: ignore[var-annotated]
    logits = None
    for number, new in enumerate(calls):
        call = torch.full((rows, max(new) + 1, values.shape[2]), float("nan"), dtype=values.dtype)
        for row in range(rows):
            call[row, : new[row]] = values[row, done[row] : done[row] + new[row]]
        end = torch.full((rows, 1), number == len(calls) - 1)
        x, count, logits = frames(made, call, state, lengths=torch.tensor(new), marks={"end": end})
        for row in range(rows):
            found[row].append(x[row, : count[row]])
            done[row] += new[row]
            waiting = 0 if number == len(calls) - 1 else min(5, done[row])
            assert sum(len(piece) for piece in found[row]) == done[row] - waiting
    assert logits is not None
    return [torch.cat(row) for row in found], logits


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=5)
@given(cut=cuts(3, 18))
def test_any_stream_gives_one_pass(form: str, cut: tuple[list[int], list[list[int]]]) -> None:
    lengths, calls = cut
    made, values = model(form), 3 * draw(3, 18, FEATURES, seed=9)
    with torch.no_grad():
        wanted, _, logits = frames(made, values, lengths=torch.tensor(lengths))
        found, last = streamed(made, values, lengths, calls)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(found[row], wanted[row, :length], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(last, logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_alone_padded_and_packed_are_equal_even_while_training(form: str) -> None:
    sizes = (7, 0, 1, 12)
    rows = [3 * draw(size, FEATURES, seed=size) for size in sizes]
    padded = torch.full((len(sizes), 14, FEATURES), float("nan"), dtype=torch.float64)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    lengths, offsets = torch.tensor(sizes), torch.tensor([0, *sizes]).cumsum(0)
    flat = torch.cat(rows)[None]
    made = model(form)
    with torch.no_grad():
        batched, packed = made(padded, lengths=lengths), made(flat, offsets=offsets)
        alone = torch.cat([made(row[None]) for row in rows])
    torch.testing.assert_close(batched, alone, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(packed, alone, rtol=1e-9, atol=1e-9)
    first, second = (model(form).train() for _ in range(2))
    torch.testing.assert_close(first(padded, lengths=lengths), second(flat, offsets=offsets), rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(first.buffers(), second.buffers()):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ("spiking pre", "spiking post"))
def test_spikes_are_spikes_and_equal_in_both_modes(form: str) -> None:
    made = model(form, torch.float32)
    values = 3 * draw(2, 40, FEATURES, dtype=torch.float32)
    notes = Notes(want={(path, f"{name}.spikes") for path, name in places(made)})
    with torch.no_grad():
        frames(made, values, notes=notes)
        state, pieces = State(2), {key: [] for key in notes.got}  # type: ignore[var-annotated]
        for step in range(41):
            own = Notes(want=notes.want)
            end = torch.full((2, 1), step == 40)
            _, count, _ = frames(made, values[:, step : step + 1], state, notes=own, marks={"end": end})
            for key, spikes in own.got.items():
                pieces[key].append(spikes[:, : count[0]])
    assert len(notes.got) == len(list(places(made)))
    rates = []
    for key, spikes in notes.got.items():
        assert bool(((spikes == 0) | (spikes == 1)).all())
        rates.append(float(spikes.mean()))
        if key[0] != "stem":  # whose spikes come late; what leaves it is compared in the test above
            assert torch.equal(torch.cat(pieces[key], 1), spikes), key
    assert all(0.0 < rate < 0.5 for rate in rates), rates


def places(made: Any) -> Any:
    """(path, name) of every layer of neurons."""
    from formwright.parts.spikes import LIF

    for module, path in ((made.stem, "stem"), (made.heads, "head"), *((p, id) for id, p in made.parts())):
        yield from ((path, layer.name) for layer in module.modules() if isinstance(layer, LIF))


def test_the_mixer_is_its_formula() -> None:
    made = part({"part": "lmu", "theta": 6, "memory": 5, "hidden": 7, "batch_norm": False})
    x = draw(2, 9, 8)
    u = F.relu(made.cell.input(x))[..., 0]
    memory, _ = legendre_memory_reference(u, 5, 6.0)
    hidden = F.relu(torch.cat((memory, x), -1) @ made.cell.hidden.weight.T + made.cell.hidden.bias)
    torch.testing.assert_close(made(x, Context()), made.out(hidden))


def test_long_rows_are_transformed_and_stream_on() -> None:
    """700 frames are transformed at once; a stream of 1, 65 and 634 gives the same."""
    made, x = part({"part": "lmu", "theta": 100}), draw(2, 700, 8)
    state, pieces = State(2), []
    with torch.no_grad():
        wanted = made(x, Context())
        for start, stop in ((0, 1), (1, 66), (66, 700)):
            pieces.append(made(x[:, start:stop], Context(state=state)))
            state.advance(None, stop - start)
    torch.testing.assert_close(torch.cat(pieces, 1), wanted, rtol=1e-10, atol=1e-10)


def test_batch_norm_is_the_definition_over_real_tokens() -> None:
    norm, theirs = BatchNorm(6), torch.nn.BatchNorm1d(6)
    initialise(norm, 0)
    x, lengths = draw(3, 5, 6, dtype=torch.float32), torch.tensor([5, 0, 2])
    ctx = Context(lengths=lengths)
    real = x[ctx.valid(x)]
    torch.testing.assert_close(norm(x, ctx)[ctx.valid(x)], theirs(real))
    torch.testing.assert_close(norm.mean, theirs.running_mean)
    torch.testing.assert_close(norm.variance, theirs.running_var)
    before = norm.mean.clone()
    norm(x, ctx.replace(recompute=True))
    assert torch.equal(norm.mean, before), "a recomputed span moves the averages twice"
    nothing = torch.zeros(3, dtype=torch.long)
    assert torch.equal(norm(x, Context(lengths=nothing)), x) and torch.equal(norm.mean, before)
    norm.eval(), theirs.eval()
    torch.testing.assert_close(norm(x, Context()), theirs(x.flatten(0, 1)).view_as(x))


def test_running_classifier_answers_at_any_time() -> None:
    made = model()
    values, state, said = draw(2, 12, FEATURES), State(2), []
    with torch.no_grad():
        x, _, wanted = frames(made, values)
        for step in range(12):
            said.append(frames(made, values[:, step : step + 1], state)[2])
        for step in (5, 8, 11):  # five frames late
            torch.testing.assert_close(said[step], made.heads["out"].out(x[:, : step - 4].mean(1)))
        end = torch.ones(2, 1, dtype=torch.bool)
        torch.testing.assert_close(frames(made, values[:, :0], state, marks={"end": end})[2], wanted)


@pytest.mark.parametrize("name", ("spiking-lmu", "spiking-mlp"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_spiking_parts_keep_dtype(name: str, dtype: torch.dtype) -> None:
    made = part({"part": name, **({"hidden": 8} if name.endswith("mlp") else {})}, dtype=dtype)
    exact = part({"part": name, **({"hidden": 8} if name.endswith("mlp") else {})})
    x, state = 3 * draw(2, 9, 8), State(2)
    y = made(x.to(dtype), Context(state=state, path="here"))
    assert y.dtype == dtype and y.shape == x.shape
    for key, slot in made.slots().items():
        assert state.values[f"here.{key}"].dtype == torch.float32 == (slot.dtype or torch.float32)
    if dtype == torch.float32:
        torch.testing.assert_close(y.double(), exact(x, Context()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("node", "said"),
    (
        ({"part": "lmu", "theta": 0}, "theta=0.* above 0"),
        ({"part": "lmu", "memory": 0}, "order=0 .* at least 1"),
        ({"part": "lmu", "activation": "rellu"}, "did you mean 'relu'"),
        ({"part": "spiking-lmu", "tau": 0.5}, "tau=0.5 must be .* at least 1"),
        ({"part": "spiking-lmu", "threshold": 0}, "threshold=0.* above 0"),
        ({"part": "spiking-mlp", "hidden": 4, "form": "mid"}, "form='mid'"),
    ),
)
def test_wrong_options_are_said(node: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        make_part(node, 8)


def test_wrong_input_is_said() -> None:
    made = model()
    with pytest.raises(DataError, match=r"values have shape \(2, 4, 3\); this model reads \(rows, frames, 5\)"):
        made(draw(2, 4, 3))
    made.train()
    with pytest.raises(DataError, match=r"one token has no variance"):
        made(draw(1, 1, FEATURES))
    with pytest.raises(SpecError, match=r"call model.eval\(\) before streaming"):
        made(draw(1, 4, FEATURES), state=State(1))
    pixels = build(recipe("lmu-psmnist", width=6, memory=5, theta=9))
    with pytest.raises(DataError, match=r"reads \(rows, steps, 1\)"):
        pixels(torch.zeros(2, 4, 2))


def test_every_parameter_learns_through_spikes() -> None:
    for form in FORMS:
        made = model(form).train()
        made(3 * draw(4, 12, FEATURES)).square().sum().backward()
        for name, parameter in made.named_parameters():
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
