"""Hugging Face directories: what ``transformers`` and ``sentence-transformers`` load. Cost: the size of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formwright.hub.exports._dense import as_dense
from formwright.kit.errors import Refusal
from formwright.registry import register


@register("export", "huggingface", summary="a directory that transformers loads")
def huggingface(model: Any, path: Path, *, dequantize: bool = False, overwrite: bool = False) -> Path:
    """Write ``config.json``, ``model.safetensors``, the tokenizer, and the pooling where the model has one.

    dequantize: int8, low-rank and adapted slots as plain floats. overwrite: replace a directory that is not empty.
    Raises Refusal, with the reason, for a layout that no published family describes (dropped layers, for one).
    """
    from formwright.hub import huggingface as files

    said = as_dense(model) if dequantize else model
    reason = files.can_say(said)
    if reason is not None:
        hint = "; --dequantize says changed slots as plain floats" if not dequantize and _mends(model) else ""
        raise Refusal(f"this model cannot be said as a Hugging Face directory: {reason}{hint}")
    files.write(said, path, overwrite=overwrite)
    return path


def _mends(model: Any) -> bool:
    """Whether plain floats alone would do."""
    from formwright.hub import huggingface as files

    try:
        return files.can_say(as_dense(model)) is None
    except Refusal:
        return False
