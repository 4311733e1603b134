"""Models in and out: our own directories, Hugging Face checkpoints, and exports to other formats."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from formwright.hub import native
from formwright.hub.adapters import load_adapter, save_adapter
from formwright.hub.export import export
from formwright.hub.locate import is_model, locate
from formwright.kit.errors import SpecError

__all__ = ["export", "load", "load_adapter", "locate", "save", "save_adapter"]


def load(
    name_or_path: str | os.PathLike[str],
    *,
    download: bool = False,
    plugin: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    verify: bool = False,
) -> Any:
    """The model of a directory, one that comes with Formwright (``small-causal``, ``small-masked``), an installed
    package that carries weights, or a cached hub id; in eval mode.

    download: fetch a hub id that is not cached. plugin: files with parts or surgeries that it needs. dtype: cast
    floats, e.g. ``"bfloat16"``. verify: compare the sha256 of every file of a Formwright directory.

    Raises DataError where nothing is found or the files cannot be used; Refusal where a checkpoint's family or
    setting has no equivalent here.
    """
    to = _dtype(dtype)
    directory = locate(name_or_path, download)
    if native.is_ours(directory):
        model = native.read(directory, plugin, verify=verify)
    else:
        from formwright.hub import huggingface

        model = huggingface.read(directory, dtype=to)
    given = os.fspath(name_or_path)
    model.name = Path(given).expanduser().resolve().name if is_model(Path(given).expanduser()) else given
    return model.to(device=device, dtype=to)


def save(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    beside: Callable[[Path], None] | None = None,
    store: str | torch.dtype | None = None,
    **extra: Any,
) -> Path:
    """Write a model (or system) as a directory that :func:`load` reads again, in one step; returns its path.

    An earlier Formwright directory is replaced (what is not part of the model, such as ``evidence/``, stays); any
    other directory that is not empty only with ``overwrite``. ``extra``: plain data kept beside the model: task,
    metric, scores, command, notes. ``beside`` writes further files into the directory in the making.
    ``store``: the float type on disk, such as ``"float16"``; loaded, the model computes as before. See
    :func:`formwright.hub.native.write` for the errors.
    """
    return native.write(model, directory, overwrite=overwrite, extra=extra, beside=beside, store=_dtype(store))


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise SpecError(f"dtype {dtype!r} is no float type (float32, float16, bfloat16, float64)")
        return found
    return dtype
