"""The convolutional stem of feature frames: four convolutions over three frames, and a fifth as a position term.

    x = norm(relu(conv_i(x))) for i = 1 .. 4,   then x + place(x)

Liu, Datta, Li and Beerel, 2024 (LMUFormer, 2402.04882); spiking, neurons fire before every convolution but the first.
Each convolution is centred, so a frame waits for ``lookahead`` = 5 later ones: a stream gives every frame five frames
late, remembers two frames a convolution, and gives the last five when the mark ``end`` says that a row is over. A
convolution is a linear of three neighbouring frames, so that it is a slot. Cost: 3 W (F + 4 W) multiply-accumulates a
frame.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from formwright.kit.errors import DataError
from formwright.parts.base import Cost, Shape, Slot
from formwright.parts.context import Context
from formwright.parts.linears.dense import Dense
from formwright.parts.norms.batch import BatchNorm
from formwright.parts.spikes import LIF
from formwright.parts.stems.tokens import Stem
from formwright.parts.streaming import by_rows, remembered, slot_bytes
from formwright.registry import Paper, register

#: Convolutions before the position term.
CONVS = 4


class Whole:
    """Whole rows: the neighbours of a frame, zeros outside the row."""

    def __init__(self, ctx: Context) -> None:
        self.ctx = ctx

    def clear(self, x: Tensor) -> Tensor:
        return self.ctx.clear(x)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, L, C) three times: the frame before each, itself, the frame after."""
        x = self.clear(x)
        before, after = F.pad(x, (0, 0, 1, 0))[:, :-1], F.pad(x, (0, 0, 0, 1))[:, 1:]
        return before, x, after


class Delayed:
    """A call of a stream: every look at neighbours comes one frame later than what it looks at.

    Frame j of a call stands for place ``seen + j - depth``; places before the first frame, and behind the last of a row
    that has ended, are zeros. ``ctx.lengths`` counts the frames that a row brings and, ended, those it still owes.
    """

    def __init__(self, ctx: Context, rows: int, length: int, device: torch.device) -> None:
        mark = ctx.marks.get("end")
        ended = torch.zeros(rows, dtype=torch.bool, device=device) if mark is None else mark.reshape(rows, -1).any(1)
        brought = torch.full((rows,), length, device=device) if ctx.lengths is None else ctx.lengths
        self.seen = ctx.slot("frames", lambda: torch.zeros(rows, dtype=torch.long, device=device))
        self.total, self.depth = self.seen + brought, 0
        self.ended, self.spare = ended, 0 if mark is None else CONVS + 1
        self.ctx = ctx.replace(lengths=brought + ended * (CONVS + 1))
        ctx.keep("frames", self.total)

    def clear(self, x: Tensor) -> Tensor:
        place = self.seen[:, None] + torch.arange(x.shape[1], device=x.device) - self.depth
        return x.masked_fill(((place < 0) | (place >= self.total[:, None]))[..., None], 0.0)

    def neighbours(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        name = f"frames.{self.depth}"
        joined = torch.cat((self.ctx.slot(name, lambda: x.new_zeros(len(x), 2, x.shape[2])), self.clear(x)), 1)
        last = self.ctx.lengths[:, None] + torch.arange(2, device=x.device)  # type: ignore[index]
        self.ctx.keep(name, joined[torch.arange(len(x), device=x.device)[:, None], last])
        self.depth += 1
        return joined[:, :-2], joined[:, 1:-1], joined[:, 2:]

    def placed(self, x: Tensor, ctx: Context) -> tuple[Tensor, Context]:
        """The frames that are ready, from the left, and the context of the layers behind."""
        steps = torch.arange(x.shape[1], device=x.device)
        index = (steps + (self.depth - self.seen).clamp(min=0)[:, None]).clamp(max=max(0, x.shape[1] - 1))
        before = (self.seen - self.depth).clamp(min=0)
        after = torch.where(self.ended, self.total, (self.total - self.depth).clamp(min=0))
        x = x.gather(1, index[..., None].expand_as(x))
        return x, ctx.replace(lengths=after - before, positions=before[:, None] + steps)


@register(
    "stem",
    "conv-frames",
    paper=Paper("Liu, Datta, Li and Beerel", 2024, "2402.04882"),
    summary="feature frames through five convolutions",
)
class ConvFrames(Stem):
    """Reads ``values`` (B, L, features) float; slots ``convs.0`` (W, 3 features) .. ``convs.3`` and ``place`` (W, 3 W).

    Args: ``spiking``: None; "pre" fires before every convolution but the first and gives currents; "post" fires behind
        each and gives spikes. ``tau``: leak of the neurons.

    In a stream a row's mark ``end`` (B, any), True in the call that ends it, brings its last frames.
    """

    lookahead = CONVS + 1
    examples = ({"features": 5}, {"features": 3, "spiking": "pre"}, {"features": 3, "spiking": "post"})

    def __init__(
        self, width: int, *, features: int, spiking: Literal["pre", "post"] | None = None, tau: float = 2.0
    ) -> None:
        super().__init__()
        self.width, self.spiking = width, spiking
        self.convs = nn.ModuleList(Dense(3 * (width if i else features), width, False, "conv") for i in range(CONVS))
        self.place = Dense(3 * width, width, False, "conv")
        count = CONVS + (spiking == "post")
        self.norms = nn.ModuleList(BatchNorm(width) for _ in range(count))
        self.lifs = nn.ModuleList(LIF(f"fired.{i}", tau=tau) for i in range(count if spiking else 0))

    @property
    def features(self) -> int:
        return self.convs[0].in_features // 3  # type: ignore[operator, return-value]

    def field(self) -> str:
        return "values"

    def sample(self, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        return {"values": torch.randn(batch, length, self.features, generator=generator)}

    def forward(self, inputs: dict[str, Tensor], ctx: Context) -> tuple[Tensor, Context]:
        if "values" not in inputs:
            raise DataError(f"this model reads 'values'; the batch holds {', '.join(sorted(inputs)) or 'nothing'}")
        values, inner = inputs["values"], ctx.at("stem")
        if values.dim() != 3 or values.shape[-1] != self.features:
            raise DataError(
                f"values have shape {tuple(values.shape)}; this model reads (rows, frames, {self.features})"
            )
        if ctx.state is None:
            plain = inner.replace(offsets=None, borders=None)
            return by_rows(values, ctx, lambda x, lengths: self._run(x, Whole(plain.replace(lengths=lengths)))), ctx
        late = Delayed(inner, len(values), values.shape[1], values.device)
        return late.placed(self._run(F.pad(values, (0, 0, 0, late.spare)), late), ctx)

    def _run(self, x: Tensor, frames: Whole | Delayed) -> Tensor:
        for index in range(CONVS):
            x = self.convs[index](torch.cat(frames.neighbours(x), -1), frames.ctx)
            if self.spiking == "pre" and index == CONVS - 1:
                break
            x = self._fire(x, index, frames) if self.spiking else self.norms[index](F.relu(x), frames.ctx)
        if self.spiking != "pre":
            near = frames.neighbours(x)
            placed = self.place(torch.cat(near, -1), frames.ctx)
            return near[1] + (placed if self.spiking is None else self._fire(placed, CONVS, frames))
        # Both the current and what it fires wait for the next frame.
        near = frames.neighbours(torch.cat((self._fire(x, CONVS - 1, frames), x), -1))
        fired = [both[..., : self.width] for both in near]
        return near[1][..., self.width :] + self.place(torch.cat(fired, -1), frames.ctx)

    def _fire(self, x: Tensor, index: int, frames: Whole | Delayed) -> Tensor:
        # A current of zero leaves a neuron at rest, so places before the first frame change nothing.
        return self.lifs[index](frames.clear(self.norms[index](x, frames.ctx)), frames.ctx)

    def slots(self) -> dict[str, Slot]:
        """What a stream remembers for each row."""
        like = self.place.dense_weight()
        widths = [self.features, *[self.width] * (CONVS - 1), self.width * (2 if self.spiking == "pre" else 1)]
        held = {f"frames.{depth}": remembered(2, size, like=like) for depth, size in enumerate(widths)}
        fired = {layer.slot: remembered(self.width, like=like) for layer in self.lifs}  # type: ignore[misc]
        return {"frames": Slot("fixed", (), torch.long), **held, **fired}  # type: ignore[dict-item]

    def cost(self, shape: Shape) -> Cost:
        return super().cost(shape) + Cost(state_bytes=slot_bytes(self.slots(), len(shape.lengths), self))
