"""MEFT: make a pretrained model reversible, so that adapting it keeps no activations of its layers.

Liao, Tan and Monz, 2023 (2306.00477). All layers become one reversible run of two streams
(:mod:`formwright.models.reversible`) with a bottleneck adapter on either side; all else is frozen. Scales near 0 of the
stale stream make the start nearly the pretrained function: nearly, for lam = 0 could not be reversed. How far off it
begins is measured where evidence is given. Cost: two adapters a layer, 2 (2 W m + m + W) parameters with m = W /
reduction, and one more forward pass a step; kept are 16 bytes for each number of the stream, whatever the depth, and
the same again at each anchor.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, Literal

import torch

from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.models.items import Item, Residual, describe
from formwright.models.reversible import READOUTS, Reversible, bits, reach
from formwright.parts.adapters.bottleneck import Bottleneck
from formwright.parts.base import initialise
from formwright.parts.beside import EVERY, Adapters
from formwright.registry import Paper, register
from formwright.surgery.adapt._training import put_back, remember, train_only
from formwright.surgery.base import Displaced, Plan, Promises, Surgery, apply, check_options, copy, on
from formwright.surgery.evidence import batches, evaluating

OPTIONS = ("kind", "lam", "beta", "reduction", "readout", "exact", "anchors", "skip", "dropout", "train", "seed")
Side = Literal["behind", "beside"]
#: What its adapters are called in the sublayers that they stand beside.
NAME = "meft"
#: kind -> which of lam and beta scale the stale stream down; the other is 1.
SMALL = {1: ("lam",), 2: ("beta",), 3: ("lam", "beta")}
#: The published 0.1 as a power of two, and the smallest scale that is taken unasked.
USUAL, LEAST = 2.0**-3, 2.0**-6
#: Predicted relative error of the lowest recovered input from which a rounding run is warned of.
ERROR = 1e-3


@register(
    "surgery", "meft", paper=Paper("Liao, Tan and Monz", 2023, "2306.00477"), summary="reversible layers with adapters"
)
class Meft(Surgery):
    """Options:

    kind: 1 (a layer and a bare adapter, default), 2 (the same the other way round) or 3 (mixer and channel sublayers).
    lam, beta: scales of the streams, above 0 and at most 1. The smaller the stale stream's, the nearer the start; the
    default is the smallest from 1/64 to 1/8 that needs no anchor, or else 1/8 (lam for kind 1, beta for 2, both for 3).
    reduction: width of the model over that of the adapters, default 32.
    readout: "fresh" (default), "paper" (a tenth of the stale stream added) or "mean" (of both streams).
    exact: keep float64 streams that are gone back without error (default); scales must then be powers of two.
    anchors: layers between streams kept whole; default as many as can be gone back exactly, none without ``exact``.
    skip: lowest layers left as they are, frozen, default 0. dropout: in the adapters. train: patterns of parameters
    that train besides, such as "heads.*". seed: of the adapters, whose second matrix starts at zero.
    """

    family = "adapt"
    tunes = True
    examples = ({"reduction": 8}, {"kind": 2, "reduction": 8, "anchors": 1}, {"kind": 3, "reduction": 16, "skip": 1})

    def plan(self, model: Any, evidence: Any = None, **options: Any) -> Plan:
        check_options("meft", options, OPTIONS)
        decisions = {**_numbers(options), "before": remember(model), "train": _patterns(model, options.get("train"))}
        layers = _layers(model)[decisions["skip"] :]
        if not layers:
            raise SpecError(f"meft: skip={decisions['skip']} leaves no layer of {len(_layers(model))}")
        width = layers[0][0].width
        if width < decisions["reduction"]:
            raise SpecError(f"meft: reduction={decisions['reduction']} leaves nothing of a width of {width}")
        decisions |= {
            **_scales(decisions, len(layers)),
            "hidden": width // decisions.pop("reduction"),
            "activation": getattr(layers[0][-1].part, "activation_name", "gelu"),
            "layers": [[item.id for item in layer] for layer in layers],
        }
        decisions["anchors"] = _anchors(decisions, options.get("anchors"), len(layers))
        made = self.made(model, dict(options), decisions)
        self.check(model, made)
        if evidence is not None:
            decisions["start"] = start(model, made, evidence)
        return made

    def promises(self, plan: Plan) -> Promises:
        # No promise of the function: the stale stream stays in it, in the share that lam and beta give it.
        own = (f"{_home(plan)}.bare.*", f"*.adapters.{NAME}.*")
        return Promises(undo=True, trains_only=(*own, *plan.decisions["train"]))

    def check(self, model: Any, plan: Plan) -> None:
        known = {item.id: item for item in model.walk()}
        listed = [id for layer in plan.decisions["layers"] for id in layer]
        missing = [f"meft: {unknown('item', id, known)}" for id in listed if id not in known]
        all_of(SpecError, missing or [f"meft: {id} is listed twice" for id in set(listed) if listed.count(id) > 1])
        held = [known[id] for id in listed]
        taken = [item.id for item in held if item.inside or NAME in (getattr(item, "adapters", None) or {})]
        if taken:
            raise Refusal(f"meft: {', '.join(taken)} already runs inside something else; undo that first")

    def reshape(self, model: Any, plan: Plan) -> Displaced:
        decided = plan.decisions
        layers = [tuple(model.item(id) for id in layer) for layer in decided["layers"]]
        first: Any = layers[0][0]
        made = self._made(decided, first, len(layers))
        model.insert(made, first)
        made.take(layers)
        for layer in layers:
            sides: list[tuple[Any, Side]] = [(layer[-1], "beside")]
            sides += [(layer[0], "behind")] if decided["kind"] == 3 else []
            for item, side in sides:
                item.adapters = item.adapters if item.adapters is not None else Adapters()
                item.adapters[NAME] = on(_adapter(decided, item, side), item)
        made.train(model.training)
        train_only(model, self.promises(plan).trains_only or ())
        return {}

    @staticmethod
    def _made(decided: dict[str, Any], first: Item, layers: int) -> Reversible:
        made = Reversible(
            decided["kind"],
            decided["lam"],
            decided["beta"],
            readout=decided["readout"],
            exact=decided["exact"],
            anchors=decided["anchors"],
            bare=[_adapter(decided, first) for _ in range(0 if decided["kind"] == 3 else layers)],
        )
        made.local, made.block = _name(first.id), first.block
        made.id, made.width, made.out_width = made.local, first.width, first.width
        return on(made, first)  # type: ignore[return-value]

    def fill(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        made, seed = model.item(_home(plan)), plan.decisions["seed"]
        initialise(made, seed, made.id)
        for item in made.held():
            if NAME in (item.adapters or {}):
                initialise(item.adapters[NAME], seed, f"{item.id}.{NAME}")

    def restore(self, model: Any, plan: Plan, displaced: Displaced) -> None:
        made = model.item(_home(plan))
        for item in made.held():
            if NAME in (item.adapters or {}):
                del item.adapters[NAME]
                item.adapters = item.adapters if len(item.adapters) else None
        made.release()
        model.remove(made)
        put_back(model, plan.decisions["before"])

    def words(self, plan: Plan) -> str:
        decided = plan.decisions
        layers, off = decided["layers"], decided.get("start")
        begins = "" if off is None else f"; it begins {off:.0%} away from the model it was"
        anchors = f", kept whole every {decided['anchors']} layers" if decided["anchors"] else ""
        return (
            f"Made {len(layers)} layers from {layers[0][0]} on reversible (kind {decided['kind']}{anchors}), with "
            f"adapters of width {decided['hidden']}; only they train{begins}."
        )

    def short(self, plan: Plan) -> str:
        return f"reversible, kind {plan.decisions['kind']}"


def start(model: Any, plan: Plan, evidence: Any) -> float:
    """How far off the planned model begins: |x' - x| / |x| of the stream before the heads, over valid tokens."""
    made = apply(copy(model, share=True), plan)
    apart = whole = 0.0
    with evaluating(model), evaluating(made):
        for batch in batches(model, evidence, what="meft"):
            before, after = _states(model, batch), _states(made, batch)
            apart += float((after - before).square().sum())
            whole += float(before.square().sum())
    return round((apart / max(whole, 1e-30)) ** 0.5, 6)


def _states(model: Any, batch: Any) -> torch.Tensor:
    x, ctx = model.run(*model.embed(batch, seed=0))
    x = x if model.final_norm is None else model.final_norm(x)
    return x[ctx.valid(x)].double()


def _home(plan: Plan) -> str:
    """The id of the reversible run."""
    return _name(plan.decisions["layers"][0][0])


def _name(first: str) -> str:
    return f"{first.partition('.')[0]}.reversible"


def _adapter(decided: dict[str, Any], item: Item, side: Side = "beside") -> Bottleneck:
    """An adapter of every row, for nobody may leave out a part of what is gone back over."""
    told = {name: decided[name] for name in ("hidden", "activation", "dropout")}
    dtype = next((p.dtype for p in item.parameters() if p.is_floating_point()), torch.get_default_dtype())
    with torch.device("meta"):
        made = Bottleneck(item.width, side=side, **told)
    made.number = EVERY
    return made.to(dtype)


# ---------------------------------------------------------------------- what may be said, and of which models


def _numbers(options: dict[str, Any]) -> dict[str, Any]:
    """The options that are numbers or names, checked."""
    kind = options.get("kind", 1)
    if isinstance(kind, bool) or kind not in SMALL:
        raise SpecError(f"meft: kind={kind!r} must be 1, 2 or 3")
    found: dict[str, Any] = {"kind": kind, "exact": options.get("exact", True)}
    problems = [] if isinstance(found["exact"], bool) else [f"meft: exact={found['exact']!r} must be True or False"]
    for name in ("lam", "beta"):
        found[name] = options.get(name)
        problems += [] if found[name] is None else _wrong_scale(name, found[name], found["exact"] is True)
    for name, usual, least in (("reduction", 32, 1), ("skip", 0, 0)):
        found[name] = options.get(name, usual)
        if isinstance(found[name], bool) or not isinstance(found[name], int) or found[name] < least:
            problems.append(f"meft: {name}={found[name]!r} must be a whole number of at least {least}")
    found["readout"], found["seed"] = options.get("readout", "fresh"), options.get("seed", 0)
    if found["readout"] not in READOUTS:
        problems.append(f"meft: {unknown('readout', str(found['readout']), READOUTS)}")
    rate = found["dropout"] = options.get("dropout", 0.0)
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0.0 <= rate < 1.0:
        problems.append(f"meft: dropout={rate!r} must be at least 0 and below 1")
    all_of(SpecError, problems)
    return found


def _scales(decided: dict[str, Any], layers: int) -> dict[str, float]:
    """lam and beta, those that were not given at their default for so many layers."""

    def at(small: float) -> dict[str, float]:
        usual = {name: small if name in SMALL[decided["kind"]] else 1.0 for name in ("lam", "beta")}
        return {name: value if decided[name] is None else float(decided[name]) for name, value in usual.items()}

    small = LEAST if decided["exact"] else USUAL
    while small < USUAL and (reach(decided["kind"], **at(small)) or 0) < layers:
        small *= 2.0
    return at(small)


def _wrong_scale(name: str, value: Any, exact: bool) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value <= 1.0:
        return [f"meft: {name}={value!r} must be above 0 and at most 1: a stream scaled by 0 cannot be gone back"]
    if exact and bits(value) is None:
        near = 2.0 ** round(torch.tensor(value).log2().item())
        return [f"meft: {name}={value!r} is no power of two, so dividing by it rounds; give {near:g}, or exact=False"]
    return []


def _anchors(decided: dict[str, Any], given: Any, layers: int) -> int | None:
    if given is not None:
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise SpecError(f"meft: anchors={given!r} must be a whole number of layers, at least 1")
        return given if given < layers else None
    if decided["exact"]:
        most = reach(decided["kind"], decided["lam"], decided["beta"])
        if most == 0:
            raise SpecError(
                f"meft: lam={decided['lam']:g} and beta={decided['beta']:g} use up all bits of a float64 in one layer; "
                "give scales of at least 2^-21, or exact=False"
            )
        return most if most is not None and most < layers else None
    grows = 1.0 / (decided["lam"] * (decided["beta"] if decided["kind"] == 3 else 1.0))
    grows = max(grows, 1.0 / decided["beta"])
    error = torch.finfo(torch.float32).eps * grows**layers
    if error > ERROR:
        warnings.warn(
            f"meft: without exact, going back {layers} layers multiplies rounding errors to about {error:.0e}; "
            "leave exact on, or give anchors",
            stacklevel=4,
        )
    return None


def _patterns(model: Any, given: Sequence[str] | str | None) -> list[str]:
    import fnmatch

    patterns = [given] if isinstance(given, str) else list(given or ())
    names = [name for name, _ in model.named_parameters()]
    wrong = [p for p in patterns if not fnmatch.filter(names, p)]
    all_of(SpecError, [f"meft: train: {unknown('parameter', pattern, names)}" for pattern in wrong])
    return patterns


def _layers(model: Any) -> list[tuple[Residual, ...]]:
    """The layers of a model, each a mixer's sublayer and a channel's; a Refusal that names what is none."""
    if not hasattr(model, "residuals"):
        raise Refusal("meft makes one tower at a time reversible: plan for model.tower(NAME)")
    items = list(model.items())
    if any(isinstance(item, Reversible) for item in items):
        raise Refusal("meft: this model already has a reversible run; undo it first")
    places = [index for index, item in enumerate(items) if isinstance(item, Residual)]
    if not places:
        raise Refusal("meft: this model has no layers of a mixer and a channel mixer at its top level")
    run = items[places[0] : places[-1] + 1]
    problems = [_why(item, kind) for item, kind in zip(run, ("mixer", "channel") * len(run)) if _why(item, kind)]
    if not problems and len(run) % 2:
        problems = [f"{run[-1].id} is followed by no channel mixer"]
    if problems:
        raise Refusal(f"meft wants layers that are pairs of a mixer and a channel mixer: {problems[0]}")
    if len({item.width for item in run} | {item.out_width for item in run}) > 1:
        widths = sorted({item.width for item in run})
        raise Refusal(f"meft adds streams of one width, and these layers have {', '.join(map(str, widths))}")
    learning = [item.id for item in run if item.part.traits.statistics or item.part.traits.selects]  # type: ignore[union-attr]
    if learning:
        raise Refusal(f"meft runs layers twice, and {learning[0]} keeps running statistics or drops tokens")
    return [(run[index], run[index + 1]) for index in range(0, len(run), 2)]  # type: ignore[misc]


def _why(item: Item, kind: str) -> str:
    """Why ``item`` cannot stand where a sublayer of that kind is expected; empty if it can."""
    if not isinstance(item, Residual):
        return f"{item.id} is a {describe(item)}"
    if item.dropped:
        return f"{item.id} was dropped"
    found = getattr(type(item.part), "registered", ("part", ""))[0]
    return "" if found == kind else f"{item.id} is a {found} where a {kind} is expected"
