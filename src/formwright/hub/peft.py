"""Adapters of the ``peft`` package: its directories in and out, for the methods that both know.

``adapter_config.json`` names the method, ``adapter_model.safetensors`` holds tensors under the published names of the
linears, which the family's weight table translates. Where a published linear is several here (GPT-2's query, key and
value), factors are joined on the way out, block by block, and cut on the way in, which copies A. Known are LoRA (with
rsLoRA's scaling, and LoRA-FA), DoRA, AdaLoRA as the LoRA that it ends as, (IA)^3, VeRA and the tuning of norms; heads that
were trained beside them go as ``modules_to_save``. The package itself is not needed. Cost: the adapter's own bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright.hub.families._files import read_json, write_json
from formwright.hub.families._table import Row, bind
from formwright.kit.errors import DataError, Refusal, SpecError, all_of, unknown
from formwright.kit.files import DirectoryWriter
from formwright.parts.linears.adapted import Change
from formwright.parts.make import bad_name
from formwright.surgery.adapt._changes import held
from formwright.surgery.adapt._training import remember
from formwright.surgery.adapt.switch import numbers, wrapped
from formwright.surgery.base import Plan, apply, copy, layout_fingerprint, surgery

CONFIG, VALUES = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
#: What a published class is for, by how its name ends.
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


def is_ours(path: Path) -> bool:
    """Whether a directory is one of ``peft``."""
    return (path / CONFIG).is_file()


# ---------------------------------------------------------------------- names


@dataclass(frozen=True)
class Place:
    """A published linear: its module, the slots that it is here, one below the other, and whether it is stored
    transposed."""

    module: str
    addresses: tuple[str, ...]
    turned: bool


@dataclass
class Names:
    """How a model's linears and parameters are published."""

    architecture: str
    prefix: str
    rows: list[Row]
    places: list[Place] = field(default_factory=list)

    @classmethod
    def of(cls, model: Any) -> Names:
        """Raises Refusal where no published family describes the model below its adapters."""
        from formwright.hub import huggingface
        from formwright.hub.exports._dense import as_dense

        bare = copy(model, share=True)
        for address, slot in wrapped(bare).items():
            bare.set_slot(address, slot.base)
        bare = as_dense(bare)
        saying = huggingface._say(bare)
        source = getattr(model, "source", None) or {}
        same = source.get("architecture") == saying.architecture
        prefix = source["prefix"] if same else saying.family.prefix_of(saying.architecture)
        known = {name: parameter for name, parameter in bare.named_parameters()}
        rows = bind(saying.family.all_rows(saying.config, saying.architecture), prefix, known)
        names = cls(saying.architecture, prefix, rows)
        owners = {id(slot.weight): address for address, slot in bare.slots().items()}
        for row in rows:
            addresses = tuple(owners.get(id(known[name]), "") for name in row.ours)
            if row.theirs[0].endswith(".weight") and len(row.theirs) == 1 and all(addresses):
                names.places.append(Place(row.theirs[0].removesuffix(".weight"), addresses, _turns(row)))
        return names

    def neutral(self, module: str) -> str:
        """A published name without the body's prefix, which depends on the class that an adapter was made for."""
        return module.removeprefix(self.prefix) if self.prefix else module

    def place(self, module: str) -> Place | None:
        """The linear of that name, with or without the body's prefix."""
        found = [p for p in self.places if p.module == module or self.neutral(p.module) == self.neutral(module)]
        return found[0] if found else next((p for p in self.places if module.endswith(f".{p.module}")), None)


def _turns(row: Row) -> bool:
    probe = row.change.to_theirs([torch.empty(2, 3, device="meta") for _ in row.ours])[0]
    return probe.shape[0] == 3


def _plain(name: str) -> str:
    return name.replace(".base.", ".")


# ---------------------------------------------------------------------- out


def write(model: Any, path: Path, *, adapter: str | None = None, overwrite: bool = False) -> Path:
    """Write the adapter of that name (or the only one) as a directory that ``peft`` loads onto the same model.

    Raises Refusal for a method that ``peft`` does not have in this form, or a model of no published family.
    """
    from formwright.hub.adapters import adapters

    known = adapters(model)
    if adapter is None and len(known) != 1:
        held_ = ", ".join(known) or "none"
        raise SpecError(f"export peft: say which adapter with adapter=NAME; this model holds {held_}")
    name = next(iter(known)) if adapter is None else adapter
    if name not in known:
        raise SpecError(f"export peft: {unknown('adapter', name, known)}")
    plan = known[name]
    if plan.surgery not in WRITERS:
        raise Refusal(
            f"peft has no {plan.surgery} in this form, only {', '.join(WRITERS)}; merge the adapter and export the model"
        )
    names = Names.of(model)
    config, values = WRITERS[plan.surgery](model, plan, names)
    trained, modules = _trained_beside(model, plan, names)
    task = next((task for ending, task in TASKS.items() if names.architecture.endswith(ending)), None)
    common = {
        "base_model_name_or_path": getattr(model, "name", "") or None,
        "inference_mode": True,
        "modules_to_save": modules or None,
        # For these tasks peft would look for a trained head.
        "task_type": task if modules or task == "CAUSAL_LM" else None,
    }
    stored = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in {**values, **trained}.items()}
    with DirectoryWriter(path, ours=is_ours, overwrite=overwrite) as folder:
        from safetensors.torch import save_file

        save_file(stored, folder / VALUES, metadata={"format": "pt"})
        write_json(folder / CONFIG, {**config, **common})
    return path


def _trained_beside(model: Any, plan: Plan, names: Names) -> tuple[dict[str, Tensor], list[str]]:
    """Published name -> value of what was trained besides, such as a head, and the modules they belong to."""
    import fnmatch

    wanted = plan.decisions.get("train", ())
    held_ = dict(model.named_parameters())
    mine = {_plain(n) for n in held_ if any(fnmatch.fnmatchcase(n, p) for p in wanted)}
    if not mine:
        return {}, []
    by_name = {_plain(name): parameter for name, parameter in held_.items()}
    found = {}
    for row in names.rows:
        if mine & set(row.ours):
            found.update(zip(row.theirs, row.change.to_theirs([by_name[name] for name in row.ours])))
            mine -= set(row.ours)
    all_of(Refusal, [f"{name} was trained with the adapter, and has no published name" for name in sorted(mine)])
    modules = sorted({name.rpartition(".")[0] for name in found})
    return {f"{ROOT}{name}": value for name, value in found.items()}, modules


def _occupied(model: Any, plan: Plan, names: Names) -> list[tuple[Place, list[Change | None]]]:
    """Every published linear that the adapter changes, with the change of each of its slots."""
    changes = held(model, plan)
    found = [(place, [changes.pop(address, None) for address in place.addresses]) for place in names.places]
    all_of(Refusal, [f"{address} has no published name as a linear" for address in changes])
    return [(place, own) for place, own in found if any(change is not None for change in own)]


def _sizes(model: Any, place: Place) -> list[int]:
    return [model.slot(address).out_features for address in place.addresses]


def _write_lora(model: Any, plan: Plan, names: Names) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    found = _occupied(model, plan, names)
    for place, changes in found:
        a, b, scaling = _joined(changes, _sizes(model, place))
        values[f"{ROOT}{place.module}.lora_A.weight"] = a
        values[f"{ROOT}{place.module}.lora_B.weight"] = b
        sizes[place.module] = (len(a), scaling * len(a))
        if plan.surgery == "dora":
            lengths = [getattr(change, "m", None) for change in changes]
            if any(one is None for one in lengths):
                raise Refusal(
                    f"{place.module} is {', '.join(place.addresses)} here; peft scales all its rows, so a DoRA must "
                    "be in all of them"
                )
            values[f"{ROOT}{place.module}.lora_magnitude_vector"] = torch.cat(lengths)  # type: ignore[arg-type]
    rank, alpha = Counter(sizes.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {module: own for module, (own, _) in sizes.items() if own != rank},
        "alpha_pattern": {module: own for module, (_, own) in sizes.items() if own != alpha},
        "use_dora": plan.surgery == "dora",
        "use_rslora": False,
        "lora_dropout": plan.decisions["dropout"],
        "bias": "none",
        "target_modules": list(sizes),
        "fan_in_fan_out": any(place.turned for place, _ in found),
    }, values


def _factors(change: Any) -> tuple[Tensor, Tensor, float]:
    """A, B and scaling of one change; of AdaLoRA the triplets that are alive, at least one."""
    if not hasattr(change, "E"):
        return change.A, change.B, change.scaling
    alive = change.E.detach().nonzero()[:, 0]
    alive = alive if len(alive) else torch.zeros(1, dtype=torch.long, device=change.E.device)
    return change.E[alive, None] * change.A[alive], change.B[:, alive], change.scaling


def _joined(changes: list[Change | None], sizes: list[int]) -> tuple[Tensor, Tensor, float]:
    """Factors of slots that are published one below the other: one A where all share it, blocks otherwise."""
    given = [None if change is None else _factors(change) for change in changes]
    there = [one for one in given if one is not None]
    a, b, scaling = there[0]
    if len(there) == len(sizes) and all(s == scaling and torch.equal(x, a) for x, _, s in there):
        return a, torch.cat([b for _, b, _ in there]), scaling
    whole = b.new_zeros(sum(sizes), sum(len(x) for x, _, _ in there))
    row = column = 0
    for size, one in zip(sizes, given):
        if one is not None:
            whole[row : row + size, column : column + len(one[0])] = one[1].detach() * (one[2] / scaling)
            column += len(one[0])
        row += size
    return torch.cat([x for x, _, _ in there]), whole, scaling


def _write_ia3(model: Any, plan: Plan, names: Names) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values: dict[str, Tensor] = {}
    inputs = []
    found = _occupied(model, plan, names)
    for place, changes in found:
        own: list[Any] = [change for change in changes if change is not None]
        if {change.side for change in own} == {"out"}:
            ones = [torch.ones(size) for size in _sizes(model, place)]
            factors = [one if change is None else change.l for one, change in zip(ones, changes)]  # type: ignore[union-attr]
            values[f"{ROOT}{place.module}.ia3_l"] = torch.cat(factors)[:, None]
            continue
        if len(own) != len(changes) or not all(torch.equal(change.l, own[0].l) for change in own):
            raise Refusal(f"{', '.join(place.addresses)} are one linear in peft, with one input to multiply")
        values[f"{ROOT}{place.module}.ia3_l"] = own[0].l[None]
        inputs.append(place.module)
    return {
        "peft_type": "IA3",
        "target_modules": [place.module for place, _ in found],
        "feedforward_modules": inputs,
        "fan_in_fan_out": any(place.turned for place, _ in found),
        "init_ia3_weights": True,
    }, values


def _write_vera(model: Any, plan: Plan, names: Names) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values: dict[str, Tensor] = {}
    found = _occupied(model, plan, names)
    all_of(
        Refusal,
        [f"{place.module} is several linears here, which share rows of B" for place, own in found if len(own) > 1],
    )
    changes: list[Any] = [own[0] for _, own in found]
    for (place, _), change in zip(found, changes):
        values[f"{ROOT}{place.module}.vera_lambda_d"] = change.d
        values[f"{ROOT}{place.module}.vera_lambda_b"] = change.b
    values["base_model.vera_A"], values["base_model.vera_B"] = changes[0].shared.A, changes[0].shared.B
    return {
        "peft_type": "VERA",
        "r": plan.decisions["rank"],
        "vera_dropout": plan.decisions["dropout"],
        "target_modules": [place.module for place, _ in found],
        "save_projection": True,
        "fan_in_fan_out": any(place.turned for place, _ in found),
        "bias": "none",
        "d_initial": 0.1,
        "projection_prng_key": 0,
    }, values


def _write_norms(model: Any, plan: Plan, names: Names) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values = dict(model.named_parameters())
    tuned = {name.rpartition(".")[0] for name in plan.decisions["tuned"]}
    found: dict[str, Tensor] = {}
    for row in names.rows:
        if row.ours[0].rpartition(".")[0] in tuned:
            module, _, last = row.theirs[0].rpartition(".")
            found[f"{ROOT}{module}.ln_tuning_layers.{last}"] = values[row.ours[0]]
    modules = sorted({key.removeprefix(ROOT).partition(".ln_tuning_layers")[0] for key in found})
    return {"peft_type": "LN_TUNING", "target_modules": modules}, found


Writer = Callable[[Any, Plan, Names], tuple[dict[str, Any], dict[str, Tensor]]]
WRITERS: dict[str, Writer] = {
    "lora": _write_lora,
    "lora-fa": _write_lora,
    "dora": _write_lora,
    "adalora": _write_lora,
    "ia3": _write_ia3,
    "vera": _write_vera,
    "layernorm-tuning": _write_norms,
}


# ---------------------------------------------------------------------- in


def read(model: Any, path: Path) -> Any:
    """Add the adapter of a ``peft`` directory to ``model``, in place; returns the model.

    Raises DataError for a method, a setting or a tensor that has no equivalent here, before anything is changed.
    """
    config = read_json(path / CONFIG)
    kind = config.get("peft_type")
    if kind not in READERS:
        raise DataError(f"{path / CONFIG}: {unknown('peft_type', str(kind), READERS)}")
    names = Names.of(model)
    given = _Given(path, _stored(path / VALUES))
    made = READERS[kind](model, config, given, names)
    beside = _beside(model, given, names)
    given.check()
    decisions = {**made.decisions, "train": sorted(beside), "before": remember(model)}
    if made.plan != "layernorm-tuning":
        decisions |= {"name": _free_name(model, path), "number": 1 + max(numbers(model).values(), default=-1), "seed": 0}
    plan = Plan(made.plan, surgery(made.plan).version, {}, decisions, fingerprint=layout_fingerprint(model))
    apply(model, plan)
    with torch.no_grad():
        made.fill(model, plan)
        own = {_plain(name): parameter for name, parameter in model.named_parameters()}
        for name, value in beside.items():
            own[_plain(name)].copy_(value)
    return model


@dataclass
class Made:
    """What a directory says: the surgery, its decisions, and what puts the values into what it made."""

    plan: str
    decisions: dict[str, Any]
    fill: Callable[[Any, Plan], None]


class _Given:
    """The tensors of a directory, each to be taken once."""

    def __init__(self, path: Path, tensors: dict[str, Tensor]) -> None:
        self.path, self.tensors = path, tensors

    def modules(self, ending: str) -> list[str]:
        """The modules that have a tensor of that ending, in order."""
        return [key.removesuffix(ending) for key in self.tensors if key.endswith(ending)]

    def take(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise DataError(f"{self.path / VALUES}: tensor {name} is missing")
        return self.tensors.pop(name)

    def check(self) -> None:
        if self.tensors:
            rest = ", ".join(list(self.tensors)[:6])
            raise DataError(f"{self.path / VALUES}: {len(self.tensors)} tensors have no use here: {rest}")


def _stored(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file} cannot be read: {error}") from None
    return {key.removeprefix(ROOT): value for key, value in found.items()}


def _free_name(model: Any, path: Path) -> str:
    name = path.resolve().name
    return "default" if bad_name(name, torch.nn.ModuleDict()) or name in numbers(model) else name


def _beside(model: Any, given: _Given, names: Names) -> dict[str, Tensor]:
    """Our name -> value of whole modules that were trained with the adapter."""
    present = {_plain(name): name for name, _ in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for row in names.rows:
        if all(name in given.tensors for name in row.theirs):
            values = row.change.to_ours([given.take(name) for name in row.theirs])
            found.update(zip([present[name] for name in row.ours], values))
    return found


def _placed(names: Names, given: _Given, module: str) -> Place:
    place = names.place(module)
    if place is None:
        known = [one.module for one in names.places]
        raise DataError(f"{given.path / VALUES}: {unknown('linear', module, known)}")
    return place


def _read_lora(model: Any, config: Mapping[str, Any], given: _Given, names: Names) -> Made:
    kind = "dora" if config.get("use_dora") else "lora"
    values: dict[str, tuple[Tensor, ...]] = {}
    scalings: dict[str, float] = {}
    for module in given.modules(".lora_A.weight"):
        a, b = (given.take(f"{module}.lora_{letter}.weight") for letter in "AB")
        place = _placed(names, given, module)
        sizes = _sizes(model, place)
        parts = [b.split(sizes)] + ([given.take(f"{module}.lora_magnitude_vector").split(sizes)] if kind == "dora" else [])
        alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8))
        for address, own in zip(place.addresses, zip(*parts)):
            values[address] = (a, *own)
            scalings[address] = alpha / (len(a) ** 0.5 if config.get("use_rslora") else len(a))
    if not values:
        raise DataError(f"{given.path / VALUES} holds no lora_A, so nothing to add")
    common = Counter(scalings.values()).most_common(1)[0][0]
    decisions = {
        "slots": {address: len(own[0]) for address, own in values.items()},
        "scaling": common,
        "dropout": float(config.get("lora_dropout") or 0.0),
        "scalings": {address: own for address, own in scalings.items() if own != common},
    }
    return Made(kind, decisions, _filler(values, ("A", "B", "m")))


def _pattern(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The entry whose pattern is the end of a module's name, as ``peft`` looks it up."""
    import re

    found = (value for key, value in (patterns or {}).items() if re.match(rf"(.*\.)?({key})$", module))
    return next(found, default)


def _filler(values: Mapping[str, tuple[Tensor, ...]], names: tuple[str, ...]) -> Callable[[Any, Plan], None]:
    def fill(model: Any, plan: Plan) -> None:
        for address, change in held(model, plan).items():
            for name, value in zip(names, values[address]):
                getattr(change, name).copy_(value)

    return fill


def _read_ia3(model: Any, config: Mapping[str, Any], given: _Given, names: Names) -> Made:
    slots: dict[str, dict[str, str]] = {}
    values: dict[str, tuple[Tensor, ...]] = {}
    for module in given.modules(".ia3_l"):
        factor, place = given.take(f"{module}.ia3_l"), _placed(names, given, module)
        inputs = factor.shape[0] == 1
        sizes = _sizes(model, place)
        parts = [factor.flatten()] * len(sizes) if inputs else factor.flatten().split(sizes)
        for address, own in zip(place.addresses, parts):
            slots[address], values[address] = {"side": "in" if inputs else "out"}, (own,)
    return Made("ia3", {"slots": slots}, _filler(values, ("l",)))


def _read_vera(model: Any, config: Mapping[str, Any], given: _Given, names: Names) -> Made:
    slots: dict[str, list[int]] = {}
    values: dict[str, tuple[Tensor, ...]] = {}
    for module in given.modules(".vera_lambda_d"):
        place = _placed(names, given, module)
        if len(place.addresses) > 1:
            raise DataError(f"{given.path}: {module} is several linears here, which cannot share its rows of B")
        slot = model.slot(place.addresses[0])
        slots[place.addresses[0]] = [slot.in_features, slot.out_features]
        values[place.addresses[0]] = tuple(given.take(f"{module}.vera_lambda_{letter}") for letter in "db")
    shared = {letter: given.take(f"base_model.vera_{letter}") for letter in "AB"}

    def fill(model: Any, plan: Plan) -> None:
        _filler(values, ("d", "b"))(model, plan)
        first: Any = next(iter(held(model, plan).values()))
        for letter, value in shared.items():
            getattr(first.shared, letter).copy_(value)

    dropout = float(config.get("vera_dropout") or 0.0)
    return Made("vera", {"slots": slots, "rank": len(shared["A"]), "dropout": dropout}, fill)


def _read_norms(model: Any, config: Mapping[str, Any], given: _Given, names: Names) -> Made:
    values: dict[str, Tensor] = {}
    for ending in (".ln_tuning_layers.weight", ".ln_tuning_layers.bias"):
        for module in given.modules(ending):
            last = ending.rpartition(".")[2]
            theirs = [f"{names.neutral(module)}.{last}", f"{module}.{last}", f"{names.prefix}{module}.{last}"]
            row = next((row for row in names.rows if row.theirs[0] in theirs), None)
            if row is None:
                raise DataError(f"{given.path / VALUES}: this model has no norm {module}")
            values[row.ours[0]] = given.take(f"{module}{ending}")

    def fill(model: Any, plan: Plan) -> None:
        own = dict(model.named_parameters())
        for name, value in values.items():
            own[name].copy_(value)

    return Made("layernorm-tuning", {"tuned": list(values)}, fill)


Reader = Callable[[Any, Mapping[str, Any], _Given, Names], Made]
READERS: dict[str, Reader] = {"LORA": _read_lora, "IA3": _read_ia3, "VERA": _read_vera, "LN_TUNING": _read_norms}
