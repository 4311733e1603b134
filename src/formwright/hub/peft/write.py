"""An adapter as a directory that ``peft`` loads: one function a method gives its configuration and its tensors."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright.hub.families._files import write_json
from formwright.hub.peft.names import CONFIG, ROOT, VALUES, Names, Place, is_ours
from formwright.hub.peft.names import sizes as sizes_of
from formwright.kit.errors import Refusal, SpecError, all_of, unknown
from formwright.kit.files import DirectoryWriter
from formwright.parts.linears.adapted import Change
from formwright.surgery.adapt._changes import held
from formwright.surgery.adapt._training import plain_name
from formwright.surgery.base import Plan

#: What a published class is for, by how its name ends.
TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
}


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
            f"peft has no {plan.surgery} in this form, only {', '.join(WRITERS)}; merge the adapter and export the "
            "model"
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
    wanted = plan.decisions.get("train", ())
    held_ = dict(model.named_parameters())
    mine = {plain_name(n) for n in held_ if any(fnmatch.fnmatchcase(n, p) for p in wanted)}
    if not mine:
        return {}, []
    by_name = {plain_name(name): parameter for name, parameter in held_.items()}
    found: dict[str, Tensor] = {}
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


def _write_lora(model: Any, plan: Plan, names: Names) -> tuple[dict[str, Any], dict[str, Tensor]]:
    values: dict[str, Tensor] = {}
    sizes: dict[str, tuple[int, float]] = {}
    found = _occupied(model, plan, names)
    for place, changes in found:
        a, b, scaling = _joined(changes, sizes_of(model, place))
        values[f"{ROOT}{place.module}.lora_A.weight"] = a
        values[f"{ROOT}{place.module}.lora_B.weight"] = b
        sizes[place.module] = (len(a), scaling * len(a))
        if plan.surgery == "dora":
            lengths: list[Any] = [getattr(change, "m", None) for change in changes]
            if any(one is None for one in lengths):
                raise Refusal(
                    f"{place.module} is {', '.join(place.addresses)} here; peft scales all its rows, so a DoRA must "
                    "be in all of them"
                )
            values[f"{ROOT}{place.module}.lora_magnitude_vector"] = torch.cat(lengths)
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
            ones = [torch.ones(size) for size in sizes_of(model, place)]
            factors: list[Any] = [one if change is None else change.l for one, change in zip(ones, changes)]
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
    values = {plain_name(name): parameter for name, parameter in model.named_parameters()}
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
