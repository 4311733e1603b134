"""Adapters of the ``peft`` package: its directories in and out, for the methods that both know.

``adapter_config.json`` names the method, ``adapter_model.safetensors`` holds tensors under the published names of the
linears, which the family's weight table translates. Where a published linear is several here (GPT-2's query, key and
value), factors are joined on the way out, block by block, and cut on the way in, which copies A. Known are LoRA (with
rsLoRA's scaling, and LoRA-FA), DoRA, AdaLoRA as the LoRA that it ends as, (IA)^3, VeRA and the tuning of norms; heads
that were trained beside them go as ``modules_to_save``. The package itself is not needed. Cost: the adapter's own
bytes.
"""

from formwright.hub.peft.names import is_ours
from formwright.hub.peft.read import read
from formwright.hub.peft.write import write

__all__ = ["is_ours", "read", "write"]
