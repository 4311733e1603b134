"""Linear attention is a matrix of feature products, row by row divided by its sum."""

from __future__ import annotations

import pytest
import torch

from conformance.samples import WIDTH, draw
from formwright import build
from formwright.engine.state import State
from formwright.kit.errors import DataError, SpecError
from formwright.parts.context import Context, Visible
from formwright.parts.make import make_part
from mixing import mixing_matrix, one_head, projections


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("feature", ["elu", "relu", "squared-relu"])
def test_is_its_matrix(causal: bool, feature: str) -> None:
    part = one_head("linear-attention", causal=causal, feature=feature, eps=1e-6)
    x, found = mixing_matrix(part, 20)
    phi = {
        "elu": lambda t: torch.where(t > 0, t + 1, t.exp()),
        "relu": lambda t: t.clamp(min=0),
        "squared-relu": lambda t: t.clamp(min=0) ** 2,
    }[feature]
    q, k = (phi(t) for t in projections(part, x, "q", "k"))
    wanted = q @ k.T
    wanted = wanted.tril() if causal else wanted
    wanted = wanted / (wanted.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_state_stays_in_single_precision_and_does_not_grow() -> None:
    part = make_part({"part": "linear-attention", "heads": 2, "causal": True}, WIDTH)
    part.requires_grad_(False).bfloat16()
    for parameter in part.parameters():
        parameter.normal_(std=0.1)
    state, sizes = State(2), []
    for length in (3, 200, 1):
        part(draw(2, length, WIDTH, dtype=torch.bfloat16), Context(state=state, path="here"))
        state.advance(None, length)
        sizes.append(state.bytes())
    value = state.values["here.sums"]
    assert value.dtype == torch.float32 == part.slots()["sums"].dtype
    assert sizes == [2 * 2 * 16 * 17 * 4] * 3


@pytest.mark.parametrize("name", ["linear-attention", "performer"])
def test_rules_are_kept_or_refused(name: str) -> None:
    part = one_head(name, causal=True)
    x = draw(1, 5, WIDTH)
    assert torch.equal(part(x, Context(visible=Visible(causal=True))), part(x, Context()))
    with pytest.raises(SpecError, match=f"{name} cannot keep the rule 'window'"):
        part(x, Context(visible=Visible(window=3)))
    with pytest.raises(SpecError, match=f"{name} reads later tokens"):
        one_head(name)(x, Context(visible=Visible(causal=True)))
    with pytest.raises(SpecError, match="lengths instead of offsets"):
        part(x, Context(offsets=torch.tensor([0, 5]), state=State(1), path="here"))


def test_wrong_options() -> None:
    with pytest.raises(SpecError, match="heads=5 does not divide width 32"):
        make_part({"part": "linear-attention", "heads": 5}, WIDTH)
    with pytest.raises(SpecError, match="feature='cosine'"):
        make_part({"part": "linear-attention", "heads": 4, "feature": "cosine"}, WIDTH)


@pytest.mark.parametrize(
    "options",
    [
        {"part": "linformer", "length": 6, "rank": 2},
        {"part": "synthesizer", "length": 6, "kinds": ["random"]},
        {"part": "synthesizer", "length": 6, "kinds": ["dense"], "causal": True},
        {"part": "sinkhorn", "block": 2, "blocks": 3},
    ],
    ids=lambda options: options["part"],
)
def test_tables_of_fixed_length(options: dict) -> None:
    """What passes the table is an error that says so; padding may pass it."""
    name = options["part"]
    part = build(
        {"stem": {"part": "linear", "features": 3, "width": WIDTH}, "layers": [{"heads": 2, **options}]}, seed=0
    )
    part = next(part.parts())[1].double()
    x = draw(2, 9, WIDTH)
    lengths = torch.tensor([6, 2])
    padded = part(x, Context(lengths=lengths))
    torch.testing.assert_close(padded[0, :6], part(x[:1, :6], Context())[0])
    remedy = "blocks=5" if name == "sinkhorn" else "length=9"
    with pytest.raises(DataError, match=f"9 tokens pass the 6 of this {name}'s table; .*{remedy}"):
        part(x, Context())
    if part.traits.streams:
        state = State(2)
        part(x[:, :5], Context(state=state, path="here"))
        state.advance(None, 5)
        with pytest.raises(DataError, match="8 tokens pass the 6"):
            part(x[:, 5:8], Context(state=state, path="here"))
