"""Exports: a model as a file of another kind, by the name of the format.

Each format is one file under ``exports/`` that registers a function ``(model, path, **options) -> Path``. An export
loses what its format cannot say, so it refuses first what it cannot carry.
"""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

from formwright import registry
from formwright.kit.errors import SpecError, all_of, nearest


def export(model: Any, path: str | os.PathLike[str], format: str, **options: Any) -> Path:
    """Write ``model`` to ``path`` in ``format`` (``huggingface``, ``onnx``, a plug-in's); returns the path.

    Raises SpecError for an unknown format or option, Refusal where the format cannot say this model, DataError where
    it cannot be written. Nothing is left behind then.
    """
    writer = registry.resolve("export", format)
    known = [name for name in inspect.signature(writer).parameters if name not in ("model", "path")]
    all_of(
        SpecError,
        [
            f"export {format}: unknown option {key!r}{nearest(key, known)} (options: {', '.join(known) or 'none'})"
            for key in options
            if key not in known
        ],
    )
    return writer(model, Path(path), **options)
