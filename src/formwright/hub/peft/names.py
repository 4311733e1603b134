"""What ``peft`` calls the linears and parameters of a model: their published names, by the family's weight table."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from formwright.hub.families._table import Row, bind
from formwright.surgery.adapt.switch import wrapped
from formwright.surgery.base import copy

CONFIG, VALUES = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."


def is_ours(path: Path) -> bool:
    """Whether a directory is one of ``peft``."""
    return (path / CONFIG).is_file()


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
        known = dict(bare.named_parameters())
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


def sizes(model: Any, place: Place) -> list[int]:
    """Rows of each slot of a published linear."""
    return [model.slot(address).out_features for address in place.addresses]
