"""Directories of the ``peft`` package: one adapter of a model, for the methods that both know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formwright.registry import register


@register("export", "peft", summary="one adapter as a directory that peft loads")
def peft(model: Any, path: Path, *, adapter: str | None = None, overwrite: bool = False) -> Path:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    adapter: which one, where the model holds several. overwrite: replace a directory that is not empty. Raises
    Refusal for a method that ``peft`` does not have, and for a model of no published family.
    """
    from formwright.hub.peft import write

    return write(model, path, adapter=adapter, overwrite=overwrite)
