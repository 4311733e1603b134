"""A layer of leaky integrate-and-fire neurons along the sequence, one for each channel; the loop is ``ops/lif``.

Cost: elementwise; state: a voltage a channel. What it fired can be asked for as the note ``NAME.spikes``.
"""

from __future__ import annotations

from torch import Tensor, nn

from formwright.ops.lif import check, lif
from formwright.parts.context import Context
from formwright.parts.streaming import by_rows


class LIF(nn.Module):
    """Currents (B, L, W) -> spikes of 0 and 1 (B, L, W). ``name`` tells the layers of one part apart: a stream
    remembers each one's voltages as ``NAME.voltage``; without a state every row begins at 0."""

    def __init__(self, name: str, threshold: float = 1.0, tau: float = 2.0) -> None:
        super().__init__()
        check(tau, threshold)
        self.name, self.threshold, self.tau = name, threshold, tau

    @property
    def slot(self) -> str:
        """The name of its voltages in a state."""
        return f"{self.name}.voltage"

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        def run(rows: Tensor, lengths: Tensor | None) -> Tensor:
            start = ctx.slot(self.slot, lambda: rows.new_zeros(len(rows), rows.shape[2]))
            spikes, last = lif(rows, start, lengths, tau=self.tau, threshold=self.threshold)
            ctx.keep(self.slot, last)
            return spikes

        spikes = by_rows(x, ctx, run)
        ctx.note(f"{self.name}.spikes", spikes)
        return spikes

    def extra_repr(self) -> str:
        return f"{self.name}, threshold={self.threshold}, tau={self.tau}"
