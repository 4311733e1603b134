"""AdamW whose state lives on the host and whose update is shared between host and device.

Subgroups are disjoint, and AdamW (Loshchilov and Hutter, 2019, 1711.05101) knows no order among numbers, so any
schedule gives the same weights as plain AdamW. Memory on the device: two slots of 12 bytes a number of the largest
subgroup, instead of 12 (or 8, where the weights are float32) for every number of the model. Cost on the host: 12 bytes
a number, 4 more for the gradients of what is updated there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw as adamw_

from formwright.kit.errors import Refusal, SpecError
from formwright.training.offload.lanes import Mark, Threads
from formwright.training.offload.schedule import (
    STATE,
    Cells,
    Jobs,
    Place,
    Rates,
    Sizes,
    ask_gather,
    ask_step,
    best_stride,
    places,
)

#: A parameter is cut at multiples of so many numbers, which no vector register straddles.
GRAIN = 64
NAMES = ("exp_avg", "exp_avg_sq")


@dataclass
class Piece:
    """A stretch of one parameter: ``parameter.view(-1)[start:end]``, and the group whose settings it follows."""

    parameter: nn.Parameter
    group: int
    start: int
    end: int

    @property
    def numbers(self) -> int:
        return self.end - self.start

    def of(self, tensor: Tensor) -> Tensor:
        """Its stretch of the parameter, or of what is laid out like it."""
        return tensor.view(-1)[self.start : self.end]

    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return self.of(self.parameter.grad)


@dataclass
class Subgroup:
    """Pieces of about as many numbers as all other subgroups; the unit that is updated in one place."""

    pieces: list[Piece] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        return sum(piece.numbers for piece in self.pieces)


class Interleaved(torch.optim.Optimizer):
    """AdamW with its state on the host; ``state_dict`` is that of ``torch.optim.AdamW``.

    params, lr, betas, eps, weight_decay: as of AdamW. subgroup: numbers in one, at least (the last may be smaller).
    stride: every so many subgroups one is updated on the device; None: none is; "auto": whichever the rates say is
    fastest. resident: how many subgroups live on the device, the last ones. rates: measured by
    :func:`formwright.training.offload.rates.measured` where not given. lanes: where the work runs; the device of the
    parameters by default, and ``Threads(throttled=True)`` plays a device on the host. fused: the one-pass kernels.

    The weights are equal to the bit to those of ``torch.optim.AdamW(fused=...)`` on one device; a parameter that is
    cut because it is larger than a subgroup rounds its last bits otherwise in a fused kernel of several threads.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        subgroup: int = 100_000_000,
        stride: int | str | None = "auto",
        resident: int = 0,
        rates: Rates | None = None,
        lanes: Threads | None = None,
        fused: bool = True,
    ) -> None:
        if subgroup < 1:
            raise SpecError(f"subgroup={subgroup} must be at least 1")
        if not (stride is None or stride == "auto" or (isinstance(stride, int) and stride >= 1)):
            raise SpecError(
                f"stride={stride!r} must be a whole number of at least 1, 'auto', or None for the host alone"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.fused = fused
        self.device = self._checked()
        self.groups = list(_cut(self.param_groups, subgroup))
        self.masters: dict[nn.Parameter, Tensor] = {}
        self._begin()
        self.sizes = Sizes([group.numbers for group in self.groups], self._width, self._width)
        if rates is None:
            from formwright.training.offload.rates import measured

            rates = measured(self.device, self._width)
        self.rates = rates
        chosen = best_stride(self.sizes, rates, resident) if stride == "auto" else stride
        self.stride: int | None = chosen  # type: ignore[assignment]
        self.where = places(len(self.groups), self.stride, resident)
        self._check_room()
        self.lanes = Threads(self.device) if lanes is None else lanes
        self.cells = Cells(len(self.groups))
        self._slots = self._make_slots()
        self._resident: dict[tuple[int, int], list[Tensor]] = {}
        self._scale = 1.0
        self._gathered: set[int] = set()

    # ------------------------------------------------------------------ layout

    def _checked(self) -> torch.device:
        parameters = [p for group in self.param_groups for p in group["params"]]
        devices = {p.device for p in parameters}
        if len(devices) != 1:
            raise SpecError(f"parameters lie on several devices ({', '.join(map(str, devices))}); move them to one")
        kinds = {p.dtype for p in parameters}
        if len(kinds) != 1 or not parameters[0].is_floating_point():
            raise SpecError(f"parameters must be of one float type, not {', '.join(map(str, kinds))}")
        if any(not p.is_contiguous() for p in parameters):
            raise SpecError("a parameter is not contiguous; make it so before it is offloaded")
        self._width = parameters[0].element_size()
        return devices.pop()

    def _begin(self) -> None:
        """Weights, means and squares on the host, in float32."""
        for parameter in (p for group in self.param_groups for p in group["params"]):
            self.masters[parameter] = self._host(parameter.detach())
            self.state[parameter] = {
                "step": torch.tensor(0.0),
                **{name: self._host(torch.zeros_like(parameter, dtype=torch.float32)) for name in NAMES},
            }
        self._gradients = {p: self._host(torch.zeros_like(p), p.dtype) for p in self.masters}

    def _host(self, value: Tensor, kind: torch.dtype = torch.float32) -> Tensor:
        """A copy in the host's memory, page-locked where a GPU reads it."""
        made = torch.empty(value.shape, dtype=kind, pin_memory=self.device.type == "cuda")
        return made.copy_(value)

    def _check_room(self) -> None:
        if self.device.type != "cuda" or "device" not in self.where:
            return
        free, need = torch.cuda.mem_get_info(self.device)[0], 2 * STATE * max(self.sizes.numbers)
        if free < need:
            raise Refusal(
                f"two subgroups in flight need {need >> 20} MiB on {self.device}, {free >> 20} MiB are free: use a "
                f"subgroup below {free // (2 * STATE)} numbers, or stride=None to update on the host"
            )

    def _make_slots(self) -> list[list[Tensor]]:
        most = max((n for n, place in zip(self.sizes.numbers, self.where) if place == "device"), default=0)
        return [[torch.empty(most, device=self.device) for _ in range(3)] for _ in range(2 if most else 0)]

    # ------------------------------------------------------------------ what a step does, by subgroup

    def _held(self, piece: Piece) -> list[Tensor]:
        """Weight, mean and square of a piece on the host."""
        kept = self.state[piece.parameter]
        return [piece.of(self.masters[piece.parameter]), *(piece.of(kept[name]) for name in NAMES)]

    def _in_slot(self, index: int, slot: int) -> Iterator[tuple[Piece, list[Tensor]]]:
        at = 0
        for piece in self.groups[index].pieces:
            yield piece, [tensor[at : at + piece.numbers] for tensor in self._slots[slot]]
            at += piece.numbers

    def _fetch(self, index: int, slot: int) -> None:
        for piece, there in self._in_slot(index, slot):
            for mine, theirs in zip(self._held(piece), there):
                theirs.copy_(mine, non_blocking=True)

    def _flush(self, index: int, slot: int) -> None:
        for piece, there in self._in_slot(index, slot):
            for mine, theirs in zip(self._held(piece), there):
                mine.copy_(theirs, non_blocking=True)

    def _gather(self, index: int) -> None:
        for piece in self.groups[index].pieces:
            if piece.parameter.grad is not None:
                piece.of(self._gradients[piece.parameter]).copy_(piece.gradient(), non_blocking=True)

    def _raise(self, index: int) -> None:
        for piece in self.groups[index].pieces:
            if piece.parameter.grad is not None:
                piece.of(piece.parameter.data).copy_(piece.of(self.masters[piece.parameter]), non_blocking=True)

    def _update(self, index: int, place: Place, slot: int | None) -> None:
        if slot is not None:
            held = list(self._in_slot(index, slot))
        elif place == "resident":
            held = list(self._at_home(index))
        else:
            held = [(piece, self._held(piece)) for piece in self.groups[index].pieces]
        for number, group in enumerate(self.param_groups):
            mine = [(p, there) for p, there in held if p.group == number and p.parameter.grad is not None]
            if mine:
                self._adamw([piece for piece, _ in mine], [there for _, there in mine], group, place)
        if place != "host":
            for piece, (weight, *_) in held:
                piece.of(piece.parameter.data).copy_(weight)

    def _at_home(self, index: int) -> Iterator[tuple[Piece, list[Tensor]]]:
        """The device's own state of a resident subgroup, fetched the first time."""
        for number, piece in enumerate(self.groups[index].pieces):
            key = (index, number)
            if key not in self._resident:
                self._resident[key] = [tensor.to(self.device, copy=True) for tensor in self._held(piece)]
            yield piece, self._resident[key]

    def _adamw(self, held: list[Piece], there: list[list[Tensor]], group: dict[str, Any], place: Place) -> None:
        at_home = place == "host"
        gradients = [(p.of(self._gradients[p.parameter]) if at_home else p.gradient()).float() for p in held]
        if self._scale != 1.0:
            gradients = [gradient * self._scale for gradient in gradients]
        weights, means, squares = (list(column) for column in zip(*there))
        steps = [self._steps(weight.device, piece.parameter) for piece, weight in zip(held, weights)]
        adamw_(
            weights,
            gradients,
            means,
            squares,
            [],
            steps,
            foreach=False,
            fused=self.fused,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _steps(self, device: torch.device, parameter: nn.Parameter) -> Tensor:
        """The count of steps before this one: the kernel raises its own copy."""
        count = self.state[parameter]["step"] - 1
        return count.to(device) if self.fused else count

    # ------------------------------------------------------------------ the step

    @contextlib.contextmanager
    def during_backward(self) -> Iterator[None]:
        """Within, a gradient goes down to the host as soon as its subgroup's last one is there. For the last backward
        pass of a step: what is accumulated afterwards would not be seen. Then call ``step(scale=...)``."""
        missing = [len({piece.parameter for piece in group.pieces}) for group in self.groups]
        homes: dict[nn.Parameter, list[int]] = {}
        for index, group in enumerate(self.groups):
            if self.where[index] == "host":
                for parameter in {piece.parameter for piece in group.pieces}:
                    homes.setdefault(parameter, []).append(index)

        def arrived(parameter: Tensor) -> None:
            for index in homes[parameter]:  # type: ignore[index]
                missing[index] -= 1
                if not missing[index]:
                    self._ask_gather(index)

        handles = [parameter.register_post_accumulate_grad_hook(arrived) for parameter in homes]
        self._gathered.clear()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _ask_gather(self, index: int) -> None:
        self.cells.gradients[index].writer = self._now()
        self._gathered.add(index)
        ask_gather(self.lanes, self.sizes, self.rates, self.cells, index, self._jobs)

    def _now(self) -> Mark:
        """The end of what the caller has asked of the device so far."""
        mark = Mark("caller")
        mark.done.set()
        if self.device.type == "cuda":
            mark.event = torch.cuda.current_stream(self.device).record_event()
        return mark

    @property
    def _jobs(self) -> Jobs:
        return Jobs(self._fetch, self._flush, self._update, self._raise, self._gather)

    @torch.no_grad()
    def step(self, closure: Any = None, *, scale: float = 1.0) -> Any:
        """One step. scale: a factor of the gradients (of clipping, of a loss scale), applied where they are used.

        Raises SpecError for sparse gradients, before anything is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parameters = [p for group in self.param_groups for p in group["params"]]
        if any(p.grad is not None and p.grad.is_sparse for p in parameters):
            raise SpecError("a gradient is sparse; make the embedding's gradient dense (sparse=False)")
        for p in parameters:
            if p.grad is not None:
                p.grad = p.grad.contiguous()
                self.state[p]["step"] += 1
        self._scale = float(scale)
        now = self._now()
        for cell in (*self.cells.gradients, *self.cells.weights):
            cell.writer = now  # the caller made the gradients, and its passes still read the weights
        for index, place in enumerate(self.where):
            if place == "host" and index not in self._gathered:
                self._ask_gather(index)
        self._gathered.clear()
        ask_step(self.lanes, self.sizes, self.where, self.rates, self.cells, self._jobs)
        self.lanes.finish()
        return loss

    # ------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict[str, Any]:
        """That of AdamW; where the weights are not float32 with ``master`` beside, without which bits would be lost."""
        self._bring_home()
        packed = super().state_dict()
        if self._width != 4:
            masters = enumerate(self.masters.values())
            packed["state"] = {i: {**packed["state"][i], "master": master} for i, master in masters}
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes AdamW's too. The weights themselves are read from the parameters, so load the model first."""
        # The base class would turn every tensor into the weights' own precision and carry it to their device.
        super().load_state_dict({**state_dict, "state": {}})
        self._resident.clear()
        self._begin()
        for index, parameter in enumerate(self.masters):
            given = state_dict["state"].get(index, {})
            kept = {"weight": self.masters[parameter], **self.state[parameter]}
            for name, value in given.items():
                kept["weight" if name == "master" else name].copy_(torch.as_tensor(value))

    def refresh(self) -> None:
        """Take the weights anew from the parameters, after something else has changed them."""
        self._resident.clear()
        for parameter, master in self.masters.items():
            master.copy_(parameter.detach())

    def _bring_home(self) -> None:
        for (index, number), there in self._resident.items():
            for mine, theirs in zip(self._held(self.groups[index].pieces[number]), there):
                mine.copy_(theirs)

    def close(self) -> None:
        """End the lanes' threads."""
        self.lanes.close()


def _stretches(total: int, size: int) -> list[tuple[int, int]]:
    """(start, end) of the parts of ``total`` numbers: at most ``size`` each, cut at multiples of ``GRAIN``."""
    step = max(GRAIN, size // GRAIN * GRAIN)
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _cut(param_groups: list[dict[str, Any]], size: int) -> Iterator[Subgroup]:
    """Subgroups in the order of the parameters: closed as soon as they hold ``size`` numbers, larger parameters cut."""
    made = Subgroup()
    for number, group in enumerate(param_groups):
        for parameter in group["params"]:
            for start, end in _stretches(parameter.numel(), size):
                made.pieces.append(Piece(parameter, number, start, end))
                if made.numbers >= size:
                    yield made
                    made = Subgroup()
    if made.pieces:
        yield made
