"""A long text in pieces: equal to the whole, streams included, and left whole where somebody would notice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conformance.samples import Case, cases, draw, furnished
from formwright.engine.state import State
from formwright.models.batch import EMPTY
from formwright.parts import pieces
from formwright.parts.context import Context, Notes

NAMES = ("bimamba-s", "deltanet", "linear-attention", "lmu", "mamba", "mamba2", "performer", "spiking-lmu")
CASES = [case for case in cases("mixer") if case.name in NAMES]
LENGTHS = (29, 0, 1, 12, 8)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of four tokens."""
    monkeypatch.setattr(pieces, "PIECE", 4)
    monkeypatch.setattr(pieces, "LEAST", 4)


def calls(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the tokens of every call of ``module``, without a hook."""
    found: list[int] = []
    plain = module.forward

    def counted(x: Tensor, *rest: Any) -> Tensor:
        found.append(x.shape[1])
        return plain(x, *rest)

    monkeypatch.setattr(module, "forward", counted)
    return found


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_pieces_equal_the_whole(case: Case, small: None) -> None:
    part = case.build()
    x, lengths = draw(len(LENGTHS), max(LENGTHS), 32), torch.tensor(LENGTHS)
    padding = torch.arange(x.shape[1])[None] >= lengths[:, None]
    x[padding] = torch.nan
    for given in (None, lengths):
        ctx = furnished(part, x, lengths=given)
        clean = x.masked_fill(padding[..., None], 0.5) if given is None else x
        found = part(clean, ctx)
        with torch.enable_grad():  # there it stays whole
            wanted = part(clean, ctx)
        seen = ctx.valid(x)
        torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-9, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("case", [case for case in CASES if case.build().traits.streams], ids=lambda case: case.id)
def test_a_stream_goes_on_behind_pieces(case: Case, small: None) -> None:
    part = case.build()
    x, lengths = draw(len(LENGTHS), 2 * max(LENGTHS), 32), torch.tensor(LENGTHS)

    def streamed() -> tuple[list[Tensor], State]:
        state, made = State(len(x)), []
        for piece in x.split(max(LENGTHS), 1):
            ctx = furnished(part, piece, lengths=lengths, state=state)
            made.append(part(piece, ctx)[ctx.valid(piece)])
            state.advance(lengths, piece.shape[1])
        return made, state

    found, state = streamed()
    with torch.enable_grad():
        wanted, whole = streamed()
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert state.values.keys() == whole.values.keys()
    for key, value in state.values.items():
        torch.testing.assert_close(value, whole.values[key], rtol=1e-9, atol=1e-11)


def mamba() -> Any:
    return next(case for case in CASES if case.name == "mamba").build()


def test_rows_share_a_piece(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 24)
    part = mamba()
    seen = calls(part.in_proj, monkeypatch)
    with torch.no_grad():
        part(draw(2, 30, 32), Context())
        part(draw(100, 9, 32), Context())
        part(draw(0, 9, 32), Context())
    assert seen == [12, 12, 6, 4, 4, 1, 9]


@pytest.mark.parametrize("why", ["gradient", "training", "notes", "hook", "by batch", "packed"])
def test_whole_where_somebody_would_notice(why: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    part = mamba().train(why == "training")
    seen = calls(part.in_proj, monkeypatch)
    ctx = Context(path="mixer", notes=Notes() if why == "notes" else None)
    if why == "packed":
        ctx = ctx.replace(offsets=torch.tensor([0, 30]))
    if why == "hook":
        part.x_proj.register_forward_pre_hook(lambda *_: None)
    if why == "by batch":
        part.in_proj.by_token = False
    with torch.set_grad_enabled(why == "gradient"):
        part(draw(1, 30, 32), ctx)
    assert seen == [30]


def test_what_a_mark_says_goes_with_its_tokens(small: None) -> None:
    x = torch.arange(10.0)[None, :, None]
    marks = {"role": torch.arange(10)[None]}
    ctx = Context(marks=marks, positions=torch.arange(10)[None], lengths=torch.tensor([7]))
    for piece, inner in pieces.contexts(x, ctx, 4):
        wanted, start = torch.arange(10)[None, piece], piece.start
        assert torch.equal(inner.marks["role"], wanted)
        assert inner.positions is not None and torch.equal(inner.positions, wanted)
        assert inner.lengths is not None and inner.lengths.tolist() == [max(0, min(4, 7 - start))]
    assert next(iter(pieces.contexts(x, Context(), 4)))[1].marks == EMPTY


def test_a_stream_moves_only_when_all_pieces_are_through(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    part, state = mamba(), State(1)
    plain, turn = part.in_proj.forward, iter(range(9))

    def breaks(x: Tensor, *rest: Any) -> Tensor:
        if next(turn) == 1:
            raise RuntimeError("no more")
        return plain(x, *rest)

    monkeypatch.setattr(part.in_proj, "forward", breaks)
    with torch.no_grad(), pytest.raises(RuntimeError, match="no more"):
        part(draw(1, 30, 32), Context(path="mixer", state=state))
    assert state.fresh
