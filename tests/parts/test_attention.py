"""Attention under every rule of visibility: the fast path equals the recorded probabilities times the values."""

from __future__ import annotations

import pytest
import torch

from conformance.samples import draw, packed, padded, rows
from formwright.engine.state import State
from formwright.kit.errors import SpecError
from formwright.parts.base import initialise
from formwright.parts.context import Context, Notes, Visible
from formwright.parts.make import make_part

SEGMENTS = torch.tensor([[0] * 4 + [1] * 8, [0] * 12, [0] * 12, [0] * 6 + [1] * 6, [2] * 12])
RULES = {
    "everyone": Visible(),
    "causal": Visible(causal=True),
    "window": Visible(window=3),
    "causal window": Visible(causal=True, window=3),
    "prefix": Visible(causal=True, prefix=4),
    "prefix of each row": Visible(causal=True, prefix=torch.tensor([4, 0, 1, 2, 12])),
    "context": Visible(context=3),
    "segments": Visible(segments=SEGMENTS),
    "causal segments": Visible(segments=SEGMENTS, causal=True),
    "prefix and window": Visible(causal=True, prefix=2, window=3),
}
OPTIONS = {
    "plain": {"heads": 4},
    "grouped": {"heads": 4, "kv_heads": 2, "window": 5},
    "alibi": {"heads": 4, "distance": {"kind": "alibi"}},
    "rotary": {"heads": 4, "rotary": {}, "causal": True},
}


def part_of(options: dict):
    part = make_part({"part": "attention", **options}, 32)
    initialise(part, 0)
    return part.double()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_rules_of_a_call(options: dict, rule: Visible) -> None:
    part = part_of(options)
    x, lengths = padded(rows())
    notes = Notes(want={("here", "probs")})
    ctx = Context(lengths=lengths, visible=rule, notes=notes, path="here")
    y = part(x, ctx)
    probs = notes.got["here", "probs"]
    v = part.v(x).unflatten(-1, (-1, part.head_width)).repeat_interleave(part.heads // part.kv_heads, 2)
    wanted = part.o(torch.einsum("bhls,bshd->blhd", probs, v).flatten(2))
    valid = ctx.valid(x)
    torch.testing.assert_close(y[valid], wanted[valid], rtol=1e-10, atol=1e-10)
    # The probabilities are zero exactly where the rules say so.
    places = torch.arange(12)[None].expand(5, -1)
    keys = torch.where(valid, places, -1)
    seen = (part.rule & rule).mask(places, keys, rule.segments, rule.segments)
    assert torch.equal((probs > 0).all(1)[valid], seen[valid])


@pytest.mark.parametrize("name", ["causal", "window", "prefix", "context"])
def test_rules_hold_inside_every_document(name: str) -> None:
    part, parts = part_of({"heads": 2}), rows()
    x, lengths = padded(parts)
    flat, offsets = packed(parts)
    one = part(x, Context(lengths=lengths, visible=RULES[name]))
    two = part(flat, Context(offsets=offsets, visible=RULES[name]))
    torch.testing.assert_close(one[Context(lengths=lengths).valid(x)], two[0], rtol=1e-10, atol=1e-10)


def test_what_cannot_be_honoured_is_refused() -> None:
    part = part_of({"heads": 2, "causal": True})
    x = draw(1, 5, 32)
    for rule in (Visible(segments=torch.zeros(1, 5)), Visible(prefix=torch.tensor([1]))):
        with pytest.raises(SpecError, match=r"need the padded layout"):
            part(x, Context(offsets=torch.tensor([0, 5]), visible=rule))
    state = State(1)
    ctx = Context(state=state, visible=Visible(segments=torch.zeros(1, 5)), path="p")
    part(x, ctx)
    state.advance(None, 5)
    with pytest.raises(SpecError, match=r"rules of segments need whole sequences"):
        part(x, ctx)
    with pytest.raises(SpecError, match=r"give lengths instead of offsets"):
        part(x, Context(state=State(1), offsets=torch.tensor([0, 5])))
    with pytest.raises(SpecError, match=r"a span that streams cannot be recomputed"):
        part(x, Context(state=State(1), recompute=True, path="p"))
    cross = part_of({"heads": 2, "memory": "m"})
    with pytest.raises(SpecError, match=r"reads memory 'm', which this call does not carry"):
        cross(x, Context())
    relative = part_of({"heads": 2, "distance": {"kind": "relative"}})
    with pytest.raises(SpecError, match=r"reads condition 'relative-bias', which no conditioner of this model fills"):
        relative(x, Context())


def test_a_long_window_is_computed_near_the_diagonal_only() -> None:
    """Also with rotary positions, which the stem hands down."""
    from conformance.counting import Counter

    part = part_of({"heads": 2, "causal": True, "window": 16, "rotary": {}}).float()
    x = draw(1, 3000, 32, dtype=torch.float32)
    ctx = Context(positions=torch.arange(3000)[None])
    with torch.no_grad(), Counter() as counted:
        y = part(x, ctx)
    assert counted.peak < 3000 * 3000 / 4
    alone = part(x[:, 2000 - 15 :], ctx.replace(positions=ctx.positions[:, 2000 - 15 :]))
    torch.testing.assert_close(y[:, 2000:], alone[:, 15:], rtol=1e-4, atol=1e-5)
