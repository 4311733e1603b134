"""Adapters saved alone: the plan that makes room for them, their tensors, and the sha256 of the weights below.

An adapter is a surgery that says what it trains: what it added (LoRA and its kin) or a few of the model's own
parameters (BitFit). ``adapter.json`` holds its plan and later events, ``adapter.safetensors`` its values; it loads onto
a model with the very weights that it was trained on and onto no other. A few megabytes stand for a whole fine-tuned
model. A directory of the ``peft`` package is read as well (:mod:`formwright.hub.peft`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright import __version__
from formwright.hub import peft, tensors
from formwright.hub.records import FORMAT, check_files, read_record, write_record
from formwright.kit.errors import DataError, FormwrightError, Refusal, all_of, unknown
from formwright.kit.files import recover, replacing
from formwright.models.model import Entry
from formwright.surgery.adapt._training import plain_name, remember
from formwright.surgery.adapt.switch import numbers
from formwright.surgery.base import Plan, apply, layout_fingerprint, surgery, undo

RECORD, VALUES = "adapter.json", "adapter.safetensors"


def adapters(model: Any) -> dict[str, Plan]:
    """The adapters of a model by name, with their plans, oldest first."""
    found = {}
    for entry in model.history:
        if entry.kind == "surgery":
            plan = Plan.from_dict(entry.data)
            if surgery(plan.surgery).promises(plan).trains_only is not None:
                found[str(plan.decisions.get("name", plan.surgery))] = plan
    return found


def _matching(held: dict[str, Tensor], plan: Plan) -> dict[str, Tensor]:
    """The tensors of an adapter: what it may train, and what it added and keeps fixed."""
    patterns = [plain_name(pattern) for pattern in surgery(plan.surgery).promises(plan).trains_only or ()]
    if "number" in plan.decisions:
        patterns.append(f"*.adapters.{plan.decisions['name']}.*")
    return {name: t for name, t in held.items() if any(fnmatch.fnmatchcase(plain_name(name), p) for p in patterns)}


def base_sha256(model: Any, *beside: Plan) -> str:
    """A sha256 of the model's values without its adapters and without what the plans ``beside`` would train.

    It does not depend on which adapters the model holds: what they wrap is counted under its own name.
    """
    held = tensors.named(model)
    trained = {name for plan in (*adapters(model).values(), *beside) for name in _matching(held, plan)}
    plain = {plain_name(name): tensor for name, tensor in held.items() if name not in trained}
    digest = hashlib.sha256()
    for name in sorted(plain):
        tensor = plain[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_adapter(model: Any, name: str, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """Write the adapter ``name`` of ``model`` alone to ``directory`` (``MODEL/adapters/NAME`` is its place beside the
    model) in one step; returns the path.

    Raises Refusal where the model was changed after the adapter was added, DataError for an unknown name, NaN
    values, or a directory that is another's.
    """
    known = adapters(model)
    if name not in known:
        raise DataError(unknown("adapter", name, known) if known else f"this model holds no adapter, so no {name!r}")
    plan = known[name]
    place = next(i for i, e in enumerate(model.history) if e.kind == "surgery" and Plan.from_dict(e.data) == plan)
    later = [e.name for e in model.history[place + 1 :] if e.kind == "surgery"]
    foreign = [n for n in later if n not in {p.surgery for p in known.values()}]
    if foreign:
        raise Refusal(
            f"adapter {name!r} cannot be saved alone: the model below it was changed afterwards "
            f"({', '.join(foreign)}); save the whole model"
        )
    values = _matching(tensors.named(model), plan)
    sick = [key for key, tensor in values.items() if not tensors.finite(tensor)]
    all_of(DataError, [f"NaN or infinite values in {tensors.listing(sick)}: adapter not saved"] if sick else [])
    path = Path(directory)
    record: dict[str, Any] = {
        "format": FORMAT,
        "formwright": __version__,
        "name": name,
        "plan": plan.to_dict(),
        "events": [e.to_dict() for e in model.history[place + 1 :] if e.kind != "surgery"],
        "base_sha256": base_sha256(model),
    }
    with replacing(path, ours=lambda p: (p / RECORD).is_file(), overwrite=overwrite) as made:
        files = tensors.write({plain_name(key): value for key, value in values.items()}, made, "adapter")
        write_record(made / RECORD, record, files)
    return path


def load_adapter(model: Any, directory: str | os.PathLike[str], *, verify: bool = False) -> Any:
    """Add the adapter saved in ``directory`` to ``model``, in place; returns the model. A directory of the ``peft``
    package will do; it says nothing of the weights that it was trained on.

    Raises DataError where its files cannot be used or the model's weights are not those it was trained on, SpecError
    where the model already has an adapter of that name. The model is then as it was.
    """
    path = Path(directory)
    recover(path)
    if peft.is_ours(path):
        return peft.read(model, path)
    record = read_record(path / RECORD, {"plan": dict, "events": list, "base_sha256": str, "name": str})
    check_files(path, record["files"], verify)
    plan = Plan.from_dict(record["plan"])
    if base_sha256(model, plan) != record["base_sha256"]:
        raise DataError(
            f"{path}: adapter {record['name']!r} was trained on other weights than those of "
            f"{model.name or 'this model'}; load it onto the model it was made from"
        )
    here = {"number": 1 + max(numbers(model).values(), default=-1), "before": remember(model)}
    local = {key: value for key, value in here.items() if key in plan.decisions}
    plan = replace(plan, decisions={**plan.decisions, **local}, fingerprint=layout_fingerprint(model))
    apply(model, plan, keep_undo=True)
    try:
        wanted = _matching(tensors.named(model), plan)
        values = tensors.read(
            [path / name for name in record["files"] if name.endswith(".safetensors")],
            {plain_name(key): like for key, like in wanted.items()},
            model.device,
        )
    except FormwrightError:
        undo(model)
        raise
    tensors.put(model, {key: values[plain_name(key)] for key in wanted})
    model.history += [Entry(e["kind"], e["name"], e.get("data", {})) for e in record["events"]]
    return model
