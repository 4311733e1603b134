"""Memory of a training step: what it will be, by a run without numbers, and what it is, by counting what is saved.

A step holds weights, gradients and optimizer state of what trains, and what the forward pass saves for the backward
one. The last is seldom known by formula: it depends on which tensors want gradients, on which operations share what
they save, and on what is computed again. So the step is *run*, on tensors that have shapes and no memory, and every
tensor that autograd saves is counted, each storage once, parameters and inputs not at all. What is still held when the
forward pass ends is told by category and by item; the peak counts all that lives at a time, in the backward pass too.

Compiled kernels do not run without numbers and may save other tensors than their general form, and shapes that depend
on numbers are not known without them. There, one row and two rows are run in earnest instead: at a given length, bytes
are an amount a row and one for all. Cost: milliseconds a layer; no memory, or that of two rows.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from formwright.kit.errors import Refusal, SpecError, unknown
from formwright.models.batch import Batch
from formwright.models.items import Bare, Join, Reshape, Residual
from formwright.models.reversible import Reversible
from formwright.objectives.base import last_states
from formwright.ops import native

#: Moments of each trained number that an optimizer keeps.
MOMENTS = {"adamw": 2, "adam": 2, "momentum": 1, "sgd": 0}
#: What a tensor was saved for, by the file that saved it; the first that fits.
CATEGORIES = (
    ("models/reversible", "streams"),
    ("parts/linears", "linear inputs"),
    ("ops/int8_linear", "linear inputs"),
    ("parts/norms", "norms"),
    ("parts/channels", "activations"),
    ("parts/activations", "activations"),
    ("parts/heads", "losses"),
    ("objectives", "losses"),
    ("parts/mixers/attention", "attention"),
    ("parts/positions", "attention"),
    ("ops/attention", "attention"),
    ("ops/window_attention", "attention"),
    ("ops", "mixers"),
    ("parts/mixers", "mixers"),
    ("", "other"),
)
#: Who is named where no item runs; of several the outermost.
OWNERS = (
    ("parts/norms", "final norm"),
    ("parts/stems", "stem"),
    ("parts/heads", "head"),
    ("parts/conditioners", "conditioner"),
)
#: Files whose functions serve any category: their caller tells it.
SERVANTS = ("parts/context", "parts/base", "models/items")
PACKAGE = Path(__file__).resolve().parent.parent
#: The code in which an item's own work is done.
WORK = {kind.forward.__code__ for kind in (Residual, Bare, Reshape, Join, Reversible)}

#: (model, batch) -> a scalar to be differentiated
Scalar = Callable[[Any, Batch], Tensor]


@dataclass(frozen=True)
class Memory:
    """Bytes of one training step of ``rows`` x ``length``.

    trainable: numbers that train. saved: what the backward pass keeps of the forward pass, of which ``categories`` and
    ``items`` are the parts. peak: the most that lives at a time, weights included; kernels' own scratch is not in it,
    and only a dry run counts what the backward pass makes beside gradients. how: "dry run", "probe" (of one and two
    rows) or "measured".
    """

    rows: int
    length: int
    trainable: int
    weights: int
    gradients: int
    optimizer: int
    saved: int
    peak: int
    how: str
    categories: dict[str, int] = field(default_factory=dict)
    items: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """All that a step holds at the end of its forward pass."""
        return self.weights + self.gradients + self.optimizer + self.saved


def predict(model: Any, rows: int, length: int, *, loss: str | Scalar = "outputs", optimizer: str = "adamw") -> Memory:
    """What a training step of ``model``, as it stands (what trains is what wants a gradient), will hold.

    loss: "outputs" (of all heads), "states" (no head) or a function (model, batch) -> scalar, such as an objective's.
    A model laid out on the meta device is taken as one on the CPU, and its kernels as their general forms.
    """
    scalar = _scalar(loss)
    declined = native.declined
    found = _dry(model, rows, length, scalar, optimizer)
    hollow = model.device.type == "meta"
    if found is None and hollow:
        raise Refusal("what this model saves depends on numbers, and it is laid out without any; load it first")
    if found is not None and (hollow or native.declined == declined):
        return found
    one, two = (measured(model, count, length, loss=scalar, optimizer=optimizer) for count in (1, min(2, rows)))
    return _scaled(one, two, rows)


def measured(model: Any, rows: int, length: int, *, loss: str | Scalar = "outputs", optimizer: str = "adamw") -> Memory:
    """The same, counted in a forward pass that is carried out; its peak is that of what is saved."""
    scalar = _scalar(loss)
    batch = _batch(model, rows, length).to(model.device)
    with _training(model):
        saved = Saved(model, batch)
        with saved, torch.enable_grad():
            kept = scalar(model, batch)
        found = _memory(model, rows, length, optimizer, saved, "measured")
        del kept
    return replace(found, peak=found.total - found.saved + saved.most)


def _dry(model: Any, rows: int, length: int, scalar: Scalar, optimizer: str) -> Memory | None:
    """Forward and backward on tensors without memory; None where a number is asked for."""
    from torch._subclasses.fake_tensor import DataDependentOutputException as Number
    from torch._subclasses.fake_tensor import DynamicOutputShapeException as Shape
    from torch._subclasses.fake_tensor import FakeTensorMode

    batch = _batch(model, rows, length)
    with contextlib.suppress(Number, Shape), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model = _hollow(model)
        batch = Batch(inputs={name: mode.from_tensor(value) for name, value in batch.inputs.items()}).to(model.device)
        live = Live()
        with _training(model), live:
            saved = Saved(model, batch)
            with saved, torch.enable_grad():
                kept = scalar(model, batch)
            found = _memory(model, rows, length, optimizer, saved, "dry run")
            wanted = [p for p in model.parameters() if p.requires_grad]
            if kept.requires_grad:
                torch.autograd.grad(kept, wanted, allow_unused=True)
        return replace(found, peak=found.weights + found.optimizer + live.most)
    return None


def _hollow(model: Any) -> Any:
    """A copy of the model whose tensors are made here and now: without memory, where that is the mode."""
    aside = (getattr(model, name, None) for name in ("tokenizer", "source"))
    memo: dict[int, Any] = {id(kept): kept for kept in (*aside, *model.history) if kept is not None}
    for tensor in (*model.parameters(), *model.buffers()):
        device = "cpu" if tensor.is_meta else tensor.device
        made = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
        parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(made, requires_grad=tensor.requires_grad) if parameter else made
    return copy.deepcopy(model, memo)


def _memory(model: nn.Module, rows: int, length: int, optimizer: str, saved: Saved, how: str) -> Memory:
    if optimizer not in MOMENTS:
        raise SpecError(unknown("optimizer", optimizer, MOMENTS))
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    training = [t for t in tensors if t.requires_grad]
    gradients = sum(t.nbytes for t in training)
    categories, items = saved.shares()
    return Memory(
        rows,
        length,
        sum(t.numel() for t in training),
        sum(t.nbytes for t in tensors),
        gradients,
        MOMENTS[optimizer] * gradients,
        sum(categories.values()),
        0,
        how,
        categories,
        items,
    )


def _scaled(one: Memory, two: Memory, rows: int) -> Memory:
    """``rows`` rows from what one and two of them hold."""

    def at(first: int, second: int) -> int:
        return first + (rows - 1) * (second - first)

    def each(first: dict[str, int], second: dict[str, int]) -> dict[str, int]:
        return {name: at(first.get(name, 0), second.get(name, 0)) for name in {**first, **second}}

    return replace(
        two,
        rows=rows,
        saved=at(one.saved, two.saved),
        peak=at(one.peak, two.peak),
        how="probe",
        categories=each(one.categories, two.categories),
        items=each(one.items, two.items),
    )


def _batch(model: Any, rows: int, length: int) -> Batch:
    if rows < 1 or length < 1:
        raise SpecError(f"a batch of {rows} x {length} holds nothing; give at least one row of one token")
    return Batch(inputs=model.stem.sample(rows, length, torch.Generator().manual_seed(0)))


def _scalar(loss: str | Scalar) -> Scalar:
    if not isinstance(loss, str):
        return loss
    known: dict[str, Scalar] = {"outputs": _outputs, "states": _states}
    if loss not in known:
        raise SpecError(unknown("loss", loss, known))
    return known[loss]


def _outputs(model: Any, batch: Batch) -> Tensor:
    out = model(batch, seed=0)
    return torch.stack([made.float().sum() for made in (out.values() if isinstance(out, dict) else [out])]).sum()


def _states(model: Any, batch: Batch) -> Tensor:
    return last_states(model, batch, seed=0)[0].float().sum()


@contextlib.contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Inside, the model trains; afterwards its modes and running statistics are what they were."""
    modes = {module: module.training for module in model.modules()}
    before = {buffer: buffer.detach().clone() for buffer in model.buffers()}
    model.train()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)


# ---------------------------------------------------------------------- counting


class Held:
    """A saved tensor, for as long as autograd holds it."""

    def __init__(self, tensor: Tensor, category: str, item: str, owner: Saved) -> None:
        self.tensor, self.category, self.item = tensor, category, item
        self.key, self.bytes = _storage(tensor), tensor.untyped_storage().nbytes()
        self.owner = owner
        owner.hold(self)

    def __del__(self) -> None:
        self.owner.let_go(self)


class Saved(torch.autograd.graph.saved_tensors_hooks):
    """Inside, counts what autograd saves; ``most``: bytes held at the worst moment so far."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__(self._pack, self._unpack)
        given = (*model.parameters(), *model.buffers(), *batch.inputs.values(), *batch.targets.values())
        self._own = {_storage(tensor) for tensor in given}
        self._held: dict[int, list[weakref.ref[Held]]] = {}
        self.now = self.most = 0

    def _pack(self, tensor: Tensor) -> Any:
        if _storage(tensor) in self._own or tensor.numel() == 0:
            return tensor
        category, item = _place(sys._getframe(1))
        return Held(tensor.detach(), category, item, self)

    @staticmethod
    def _unpack(packed: Any) -> Tensor:
        return packed.tensor if isinstance(packed, Held) else packed

    def hold(self, held: Held) -> None:
        if not self._held.setdefault(held.key, []):
            self.now += held.bytes
            self.most = max(self.most, self.now)
        self._held[held.key].append(weakref.ref(held))

    def let_go(self, held: Held) -> None:
        left = self._held[held.key] = [ref for ref in self._held[held.key] if ref() not in (None, held)]
        if not left:
            self.now -= held.bytes

    def shares(self) -> tuple[dict[str, int], dict[str, int]]:
        """Bytes held now by category and by item, largest first; a storage belongs to who saved it first."""
        categories: dict[str, int] = {}
        items: dict[str, int] = {}
        for refs in self._held.values():
            first = next((held for ref in refs if (held := ref()) is not None), None)
            if first is not None:
                categories[first.category] = categories.get(first.category, 0) + first.bytes
                items[first.item] = items.get(first.item, 0) + first.bytes
        return _sorted(categories), _sorted(items)


def _sorted(sizes: dict[str, int]) -> dict[str, int]:
    return dict(sorted(sizes.items(), key=lambda pair: -pair[1]))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _place(frame: FrameType | None) -> tuple[str, str]:
    """(category, item) of the code that runs in ``frame``; where no item runs, the kind of part that does."""
    category, item, owner = "", "", "other"
    while frame is not None and not (category and item):
        file = _inside(frame.f_code.co_filename)
        if file and not file.startswith("measure/"):
            if not category and frame.f_code.co_name == "dropout":
                category = "dropout"
            if not category and not file.startswith(SERVANTS):
                category = next(name for start, name in CATEGORIES if file.startswith(start))
            owner = next((name for start, name in OWNERS if file.startswith(start)), owner)
            if frame.f_code in WORK:
                item = frame.f_locals["self"].id
        frame = frame.f_back
    return category or "other", item or owner


_files: dict[str, str] = {}


def _inside(filename: str) -> str:
    """The path of a source file below the package; empty for others."""
    if filename not in _files:
        path = Path(filename)
        _files[filename] = str(path.relative_to(PACKAGE).with_suffix("")) if path.is_relative_to(PACKAGE) else ""
    return _files[filename]


class Live(TorchDispatchMode):
    """Inside, follows every new storage until it is gone; ``most``: bytes that lived at the worst moment."""

    def __init__(self) -> None:
        super().__init__()
        self._known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and _storage(leaf) not in self._known | given:
                self._follow(leaf.untyped_storage())
        return out

    def _follow(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
