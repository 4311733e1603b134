"""Several named towers and who reads whom: two-tower retrieval, encoder-decoder, teacher and student.

A tower that is another's name is that tower (one set of tensors). A tower with a memory cross-attends the last states
(after the final norm) of the towers it names, which run before it. Inputs are addressed ``tower.field``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, FormwrightError, SpecError, all_of, unknown
from formwright.models.batch import Batch
from formwright.models.items import Item, unpacked
from formwright.models.model import Entry, Model
from formwright.parts.base import Cost, LinearLike, Shape, TableLike, cost_sum
from formwright.parts.context import Context, Memory
from formwright.parts.make import bad_name
from formwright.spec import ModelSpec, SystemSpec


class System(nn.Module):
    """``towers[name]`` is a :class:`Model`; ``forward`` answers with the output tower's head."""

    def __init__(self, spec: SystemSpec) -> None:
        super().__init__()
        self.spec = spec
        self.history: list[Entry] = []
        self.name = ""
        self.tokenizer: Any = None
        self.max_length: int | None = None
        self.aliases = {name: tower for name, tower in spec.towers.items() if isinstance(tower, str)}
        self.towers = nn.ModuleDict()
        problems = []
        for name, tower in spec.towers.items():
            if complaint := bad_name(name, self.towers):
                problems.append(f"tower {complaint}")
            elif isinstance(tower, ModelSpec):
                try:
                    self.towers[name] = Model(tower, self._borrowed(tower))
                except FormwrightError as error:
                    problems += [f"tower {name!r}: {line}" for line in str(error).split("\n")]
        all_of(SpecError, problems)

    def _borrowed(self, tower: ModelSpec) -> nn.Module | None:
        """{"use": "encoder.stem"}: a stem shared with a tower before."""
        use = tower.stem.get("use")
        if use is None:
            return None
        owner, _, what = use.partition(".")
        if what != "stem" or owner not in self.towers:
            raise SpecError(f"stem: {{'use': {use!r}}} must name an earlier tower's stem, such as 'encoder.stem'")
        return self.towers[owner].stem  # type: ignore[return-value]

    def tower(self, name: str) -> Model:
        while name in self.aliases:
            name = self.aliases[name]
        if name not in self.towers:
            raise SpecError(unknown("tower", name, [*self.towers, *self.aliases]))
        return self.towers[name]  # type: ignore[return-value]

    def walk(self) -> Iterator[Item]:
        for tower in self.towers.values():
            yield from tower.walk()  # type: ignore[operator]

    def slots(self) -> dict[str, LinearLike]:
        """Every linear by its address, ``tower/item:role``."""
        return {f"{name}/{a}": s for name in self.towers for a, s in self.tower(name).slots().items()}

    def tables(self) -> dict[str, TableLike]:
        return {f"{name}/{a}": t for name in self.towers for a, t in self.tower(name).tables().items()}

    def slot(self, address: str) -> LinearLike:
        name, _, rest = address.partition("/")
        return self.tower(name).slot(rest)

    def set_slot(self, address: str, module: nn.Module) -> nn.Module:
        name, _, rest = address.partition("/")
        return self.tower(name).set_slot(rest, module)

    def layout(self) -> list[dict[str, Any]]:
        return [{"tower": name, **line} for name in self.towers for line in self.tower(name).layout()]

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def inputs_of(self, batch: Batch, name: str) -> Batch:
        """The part of a batch that belongs to one tower: fields ``name.field``, without the name."""

        def own(fields: Any) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): value for key, value in fields.items() if key.startswith(f"{name}.")}

        return batch.replace(inputs=own(batch.inputs), lengths=own(batch.lengths), offsets=own(batch.offsets))

    def states(self, name: str, batch: Batch, memory: dict[str, Memory] | None = None, **context: Any):
        """A tower's last states and context, before its head."""
        own = self.inputs_of(batch, name)
        if not own.inputs:
            raise DataError(f"tower {name!r} got no input; name its fields {name}.tokens or the like")
        tower = self.tower(name)
        x, ctx = tower.embed(own, memory=memory or {}, **_known_knobs(tower, context))
        return tower.run(x, ctx)

    def remember(self, batch: Batch, name: str, **context: Any) -> dict[str, Memory]:
        """What the towers that ``name`` reads have to say, as memories."""
        found = {}
        for source in self.tower(name).spec.memory:
            # Each tower has a path of its own, so that notes and noise of two towers never meet.
            inner = self.remember(batch, source, **context)
            x, ctx = self.states(source, batch, inner, **{**context, "path": source})
            final = self.tower(source).final_norm
            x = x if final is None else final(x)
            if ctx.offsets is not None:
                found[source] = Memory(unpacked(x, ctx.offsets), ctx.offsets.diff())
            else:
                found[source] = Memory(x, ctx.lengths)
        return found

    def forward(
        self,
        batch: Batch,
        *,
        tower: str | None = None,
        head: str | None = None,
        state: Any = None,
        memory: Any = None,
        **context: Any,
    ):
        """The answer of ``tower`` (default the spec's output). With ``state`` only that tower streams; pass the
        ``memory`` from :meth:`remember` to spare running the towers it reads again."""
        name = tower or self.spec.output
        known = {knob for held in self.towers.values() for knob in held.knobs()}  # type: ignore[operator]
        all_of(SpecError, [unknown("knob", knob, known) for knob in context.get("knobs") or () if knob not in known])
        memory = self.remember(batch, name, **context) if memory is None else memory
        own = self.inputs_of(batch, name)
        context = _known_knobs(self.tower(name), context)
        return self.tower(name)(own, head=head, memory=memory, state=state, **context)

    def cost(self, shape: Shape) -> Cost:
        """All towers at one shape; what towers share is counted once."""
        total = cost_sum([self.tower(name).cost(shape) for name in self.towers])
        twice = sum(sum(p.numel() for p in tower.parameters()) for tower in self.towers.values())
        return total + Cost(sum(p.numel() for p in self.parameters()) - twice)

    def embed(self, batch: Batch, **context: Any) -> tuple[Tensor, Context]:
        """The output tower's stem, with the memories it reads in the context."""
        name = self.spec.output
        memory = self.remember(batch, name, **{key: value for key, value in context.items() if key != "state"})
        context = _known_knobs(self.tower(name), context)
        return self.tower(name).embed(self.inputs_of(batch, name), memory=memory, **context)


def _known_knobs(tower: Model, context: dict[str, Any]) -> dict[str, Any]:
    """The context with those knobs that a tower understands: one tower's choice is no error in another."""
    if not context.get("knobs"):
        return context
    known = tower.knobs()
    return {**context, "knobs": {knob: value for knob, value in context["knobs"].items() if knob in known}}
