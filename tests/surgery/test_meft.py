"""MEFT: inputs come back to the last bit, gradients are autograd's, and what is kept does not grow with depth."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import formwright as fw
from formwright import surgery
from formwright.engine.state import State
from formwright.hub.adapters import load_adapter, save_adapter
from formwright.kit.errors import FormwrightError, Refusal, SpecError
from formwright.measure.memory import measured, predict
from formwright.models.build import build
from formwright.models.reversible import Call, Reversible, bits, reach
from formwright.models.text import packed
from formwright.parts.base import Part, Shape, Traits
from formwright.parts.context import Context, Notes
from formwright.surgery.samples import classifier, decoder, encoder, equal, said, state, tokens

KINDS = (1, 2, 3)


def deep(layers: int, order: str = "post", causal: bool = False, width: int = 16, dropout: float = 0.0) -> Any:
    attention = {"part": "attention", "heads": 2, "causal": causal, "rotary": {}, "dropout": dropout}
    spec = {
        "stem": {"part": "token-embedding", "vocab": 40, "width": width, "norm": "layernorm"},
        "defaults": {"norm": "layernorm", "order": order},
        "layers": [{"repeat": layers, "layers": [attention, {"part": "mlp", "hidden": 2 * width, "dropout": dropout}]}],
        "head": {"part": "states"},
    }
    return build(spec, seed=layers)


def shaken(model: Any, **options: Any) -> Any:
    """The model made reversible, with adapters that do something."""
    fw.apply(model, "meft", **{"reduction": 4, **options})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def run(model: Any) -> Reversible:
    return next(item for item in model.items() if isinstance(item, Reversible))


def gradients(model: Any, batch: Any, **context: Any) -> dict[str, Tensor]:
    """The output, and the gradient of everything that trains."""
    model.zero_grad()
    out = model(batch, seed=0, **context)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    (out * weights).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {"out": out.detach(), **found}


def compare(model: Any, batch: Any, **context: Any) -> None:
    """Recomputed against what autograd makes of the same function."""
    found = gradients(model, batch, **context)
    wanted = gradients(model, batch, knobs={"reversible": False}, **context)
    assert set(found) == set(wanted) and len(wanted) > 4
    for name, value in wanted.items():
        assert float((found[name] - value).norm()) <= 1e-6 * float(value.norm()), name


# ---------------------------------------------------------------------- exact


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("kind, layers", [(1, 14), (2, 14), (3, 7)])
def test_every_input_comes_back_to_the_last_bit(
    kind: int, layers: int, order: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As deep as the bits of a float64 reach without an anchor."""
    model = shaken(deep(layers, order), kind=kind)
    assert (
        run(model).anchors is None
        and 0.125 in (run(model).lam, run(model).beta)
        and layers == reach(kind, run(model).lam, run(model).beta)
    )
    seen: list[Tensor] = []
    alone = Call.alone

    def watched(self: Call, side: Any, x: Tensor, leaves: Any) -> Any:
        seen.append(x.detach().clone())
        return alone(self, side, x, leaves)

    monkeypatch.setattr(Call, "alone", watched)
    model(tokens(2, 9)).sum().backward()
    there, back = seen[: 2 * layers], seen[2 * layers :]
    assert len(there) == len(back) and all(torch.equal(a, b) for a, b in zip(there, reversed(back)))
    assert all(x.dtype == torch.float64 for x in seen)


def test_scales_that_need_no_anchor_are_as_small_as_they_can_be() -> None:
    def scales(layers: int, **options: Any) -> tuple[float, float, int | None]:
        decided = surgery.plan(deep(layers, width=8), "meft", reduction=4, **options).decisions
        return decided["lam"], decided["beta"], decided["anchors"]

    assert scales(6) == (2.0**-6, 1.0, None) and scales(6, kind=2) == (1.0, 2.0**-6, None)
    assert scales(10) == (2.0**-4, 1.0, None) and scales(12) == (2.0**-3, 1.0, None)
    assert scales(24) == (2.0**-3, 1.0, 14) and scales(24, anchors=6) == (2.0**-3, 1.0, 6)
    assert scales(4, kind=3) == (2.0**-5, 2.0**-5, None) and scales(4, kind=3, lam=0.5) == (0.5, 2.0**-5, None)
    assert scales(2, exact=False, lam=0.3) == (0.3, 1.0, None)


def test_bits_of_scales() -> None:
    assert [bits(value) for value in (1.0, 0.5, 0.125, 0.1, 2.0, 0.75)] == [0, 1, 3, None, None, None]
    assert reach(1, 1.0, 1.0) is None and reach(1, 2.0**-6, 1.0) == 6 and reach(3, 2.0**-22, 1.0) == 0


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_autograd(kind: int, order: str) -> None:
    compare(shaken(deep(5, order), kind=kind), tokens(2, 9))
    compare(shaken(deep(5, order, causal=True), kind=kind, anchors=2, readout="mean", skip=1), tokens(2, 9))
    compare(shaken(deep(3, order), kind=kind, exact=False, lam=0.3, beta=0.7).double(), tokens(2, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_anchors_reach_any_depth(kind: int) -> None:
    model = shaken(deep(24, width=8), kind=kind)
    made = run(model)
    assert made.anchors == (7 if kind == 3 else 14)
    assert [i for i in range(24) if made.anchored(i)] == ([6, 12, 18] if kind == 3 else [12])
    compare(model, tokens(2, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(kind: int) -> None:
    model = shaken(deep(4), kind=kind)
    lengths = torch.tensor([9, 1, 4])
    ids = tokens(3, 9)
    padded = fw.Batch(inputs={"tokens": ids}, lengths={"tokens": lengths})
    rows = [row[:n].tolist() for row, n in zip(ids, lengths.tolist())]
    compare(model, padded)
    compare(model, packed(model, rows))
    whole, flat = (gradients(model, batch)["out"] for batch in (padded, packed(model, rows)))
    cut = torch.cat([row[:n] for row, n in zip(whole, lengths.tolist())])
    torch.testing.assert_close(flat[0], cut, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_again_and_nobody_elses_randomness_moves(kind: int) -> None:
    model = shaken(deep(3, dropout=0.2), kind=kind, dropout=0.3).train()
    before = torch.get_rng_state()
    compare(model, tokens(2, 9))
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(model(tokens(), seed=1), model(tokens(), seed=2))


def test_everything_may_train() -> None:
    model = shaken(deep(3), train="*")
    assert all(parameter.requires_grad for parameter in model.parameters())
    compare(model, tokens(2, 9))


def test_low_precision_is_recomputed_in_low_precision() -> None:
    model = shaken(deep(3))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(tokens(2, 9))
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(tokens(2, 9), knobs={"reversible": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(out.float().sum(), trained, allow_unused=True)
    wanted = torch.autograd.grad(plain.float().sum(), trained, allow_unused=True)
    for a, b in zip(found, wanted):
        assert (a is None or not a.any()) if b is None else float((a - b).norm()) <= 1e-6 * float(b.norm())


def test_a_table_that_all_layers_read_gets_its_gradient() -> None:
    """What reaches the layers through the context alone."""
    attention = {"part": "attention", "heads": 2, "distance": {"kind": "relative"}}
    spec = {
        "stem": {"part": "token-embedding", "vocab": 40, "width": 16},
        "conditioners": {"relative-bias": {"part": "relative-bias", "heads": 2}},
        "layers": [{"repeat": 3, "layers": [attention, {"part": "mlp", "hidden": 24}]}],
        "head": {"part": "states"},
    }
    model = shaken(build(spec, seed=0), train="conditioners.*")
    compare(model, tokens(2, 9))
    assert any(name.startswith("conditioners.") for name in gradients(model, tokens(2, 9)))


class Weighed(Part):
    """A part that declares a loss of its own."""

    def __init__(self, inner: Part) -> None:
        super().__init__()
        self.inner, self.traits = inner, inner.traits

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        y = self.inner(x, ctx)
        ctx.loss(y.square().mean())
        return y


def test_losses_declared_inside_count() -> None:
    model = shaken(deep(3))
    model.item("b1.mlp").part = Weighed(model.item("b1.mlp").part)
    found = []
    for knob in (True, False):
        notes = Notes()
        model.zero_grad()
        out = model(tokens(2, 9), notes=notes, knobs={"reversible": knob})
        (out.mean() + 3.0 * sum(notes.losses)).backward()
        assert len(notes.losses) == 1
        grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        found.append({"loss": notes.losses[0].detach().double(), **grads})
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_notes_from_inside_carry_gradients() -> None:
    model = shaken(deep(3))
    notes = Notes(want={("b1.attention", "output")})
    model(tokens(2, 9), notes=notes)
    notes.got["b1.attention", "output"].sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in model.item("b0.mlp").adapters.parameters())


# ---------------------------------------------------------------------- the function


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("made", [encoder, decoder])
def test_with_no_stale_stream_it_is_the_pretrained_function(made: Any, kind: int) -> None:
    """lam (and beta) at 0 cannot be gone back and is refused as an option; what is left of them is the whole gap."""
    before = said(made())["out"]
    gaps = []
    for scale in (2.0**-3, 2.0**-6):
        scales = {"lam": scale} if kind == 1 else {"beta": scale} if kind == 2 else {"lam": scale, "beta": scale}
        plan = surgery.plan(made(), "meft", tokens(), kind=kind, reduction=8, **scales)
        gaps.append(plan.decisions["start"])
    assert 0.0 < gaps[1] < 0.3 * gaps[0]
    model = fw.apply(made(), plan)
    run(model).lam, run(model).beta = 0.0 if kind != 2 else 1.0, 0.0 if kind != 1 else 1.0
    run(model).exact = False
    assert float((said(model)["out"] - before).norm() / before.norm()) <= 1e-6
    assert surgery.surgery("meft").promises(plan).preserves_function is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_equals_one_pass(kind: int) -> None:
    model = shaken(decoder(), kind=kind)
    assert model.streams and model.state_slots() == decoder().state_slots()
    ids = tokens(2, 12)
    with torch.no_grad():
        whole, stream = model(ids), State(2)
        parts = [model(piece, state=stream) for piece in ids.split([5, 1, 0, 6], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)
    out = model(ids[:, :3], state=State(2))
    assert torch.autograd.grad(out.sum(), run(model).layers[0][1].adapters["meft"].up.weight)[0].any()  # type: ignore[union-attr]


def test_counts() -> None:
    """Two adapters a layer: 2 (2 W m + m + W) each."""
    for kind in KINDS:
        model = fw.apply(deep(5), "meft", kind=kind, reduction=4)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert trainable == 5 * 2 * (2 * 16 * 4 + 4 + 16)
        before = deep(5).cost(Shape.full(2, 7))
        after = model.cost(Shape.full(2, 7))
        assert after.parameters - before.parameters == trainable
        assert after.macs - before.macs == 5 * 2 * 2 * 16 * 4 * 14


def test_it_goes_with_adapters_that_are_there(tmp_path: Path) -> None:
    model = fw.apply(encoder(), "lora", rank=2)
    shaken(model, train="*.adapters.*")
    compare(model, tokens(2, 9))
    again = fw.load(fw.save(model, tmp_path / "model"))
    assert equal(said(model), said(again)) and run(again).layers
    fw.undo(again)
    assert not any(isinstance(item, Reversible) for item in again.items())


def test_adapters_travel_alone(tmp_path: Path) -> None:
    model = shaken(decoder())
    save_adapter(model, "meft", tmp_path / "adapter")
    other = load_adapter(decoder(), tmp_path / "adapter")
    assert equal(said(model), said(other))
    fw.undo(other)
    assert equal(state(other), state(decoder())) and equal(said(other), said(decoder()))


def test_items_keep_their_names_and_places() -> None:
    before, model = deep(3), shaken(deep(3), skip=1)
    assert [item.id for item in model.items()] == ["b0.attention", "b0.mlp", "b1.reversible"]
    assert set(before.state_dict()) <= set(model.state_dict())
    assert list(before.slots()) == list(model.slots())
    with pytest.raises(Refusal, match="inside a loop, a shared list or a reversible run"):
        model.run(*model.embed(tokens()), start="b2.mlp")


# ---------------------------------------------------------------------- memory


def test_saved_bytes_do_not_grow_with_depth() -> None:
    """16 bytes for each number of the stream, and as much at each anchor."""
    sizes = {}
    for layers in (2, 12, 24):
        model = fw.apply(deep(layers), "meft", reduction=4)
        found = measured(model, 4, 8, loss="states")
        assert found.saved == predict(model, 4, 8, loss="states").saved
        sizes[layers] = found.saved
    one = 16 * 4 * 8 * 16
    assert sizes == {2: one, 12: one, 24: 2 * one}
    beside = fw.apply(deep(24), "lora", rank=2)
    assert sizes[24] <= 0.2 * predict(beside, 4, 8, loss="states").saved


# ---------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "options, words",
    [
        ({"kind": 4}, "must be 1, 2 or 3"),
        ({"beta": 0}, "beta=0 must be above 0 and at most 1: a stream scaled by 0 cannot be gone back"),
        ({"lam": -0.5}, "lam=-0.5 must be above 0"),
        ({"lam": 1.5}, "at most 1"),
        ({"lam": float("nan")}, "above 0"),
        ({"lam": 0.1}, "no power of two.*give 0.125, or exact=False"),
        ({"lam": 2.0**-22, "kind": 3}, "use up all bits"),
        ({"anchors": 0}, "whole number of layers"),
        ({"reduction": 64}, "leaves nothing of a width of 32"),
        ({"reduction": 0}, "at least 1"),
        ({"skip": 3}, "leaves no layer of 3"),
        ({"readout": "means"}, "did you mean 'mean'"),
        ({"dropout": 1.0}, "below 1"),
        ({"exact": 1}, "True or False"),
        ({"train": "haeds.*"}, "unknown parameter"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    model = encoder()
    before = state(model)
    with pytest.raises(SpecError, match=words):
        fw.apply(model, "meft", **options)
    assert equal(before, state(model)) and not model.history


def made_of(*layers: dict[str, Any]) -> Any:
    stem = {"part": "token-embedding", "vocab": 40, "width": 16}
    return build({"stem": stem, "layers": list(layers), "head": {"part": "states"}}, seed=0)


ATTENTION, MLP = {"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 24}


@pytest.mark.parametrize(
    "layers, words",
    [
        ((ATTENTION, ATTENTION, MLP), "b1.attention is a mixer where a channel is expected"),
        ((MLP, ATTENTION), "b0.mlp is a channel where a mixer is expected"),
        ((ATTENTION, MLP, {"part": "mamba"}), "b2.mamba is followed by no channel mixer"),
        ((ATTENTION, {"tap": "t"}, MLP, {"join": "t"}), "b1.tap is a tap"),
        (({"loop": 2, "layers": [ATTENTION, MLP]},), "no layers of a mixer and a channel mixer at its top level"),
        ((), "no layers"),
    ],
)
def test_models_of_other_layers(layers: tuple[dict[str, Any], ...], words: str) -> None:
    with pytest.raises(Refusal, match=words):
        surgery.plan(made_of(*layers), "meft")


def test_running_statistics_are_refused() -> None:
    model = made_of(ATTENTION, MLP)
    model.item("b1.mlp").part.traits = Traits(statistics=True)
    with pytest.raises(Refusal, match="running statistics"):
        surgery.plan(model, "meft")


def test_dropped_sublayers_and_second_runs_are_refused() -> None:
    model = encoder()
    model.item("b1.mlp").drop()
    with pytest.raises(Refusal, match=r"b1\.mlp was dropped"):
        surgery.plan(model, "meft")
    with pytest.raises(Refusal, match="already has a reversible run"):
        surgery.plan(shaken(encoder()), "meft")
    with pytest.raises(Refusal, match="pairs of a mixer and a channel mixer"):
        surgery.plan(classifier(), "meft")


def test_a_run_that_rounds_says_so() -> None:
    with pytest.warns(UserWarning, match="multiplies rounding errors to about"):
        surgery.plan(encoder(), "meft", exact=False, lam=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        surgery.plan(encoder(), "meft", exact=False, lam=0.9)
        surgery.plan(encoder(), "meft", exact=False, lam=0.01, anchors=2)


def test_edited_plans_are_checked() -> None:
    model = encoder()
    plan = surgery.plan(model, "meft", reduction=8)
    plan.decisions["layers"][0] = ["b0.atention", "b0.mlp"]
    with pytest.raises(FormwrightError, match=r"did you mean 'b0\.attention'"):
        fw.apply(model, plan)


def test_second_derivatives_and_changed_weights_are_errors() -> None:
    model = shaken(deep(2))
    trained = [p for p in model.parameters() if p.requires_grad]
    with pytest.raises(Refusal, match="first derivatives only"):
        torch.autograd.grad(model(tokens()).sum(), trained, create_graph=True, allow_unused=True)
    out = model(tokens()).sum()
    with torch.no_grad():
        nn.init.ones_(trained[0])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
    with pytest.raises(SpecError, match="knob reversible is True or False"):
        model(tokens(), knobs={"reversible": 1})
