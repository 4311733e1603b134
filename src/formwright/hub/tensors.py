"""Tensors of a model in safetensors files: written once each, read back strictly.

A tensor's name is its ``state_dict`` name, which begins with its item's id; one that several modules share is stored
under the first of its names. Reading compares all names, shapes and kinds with the model (laid out on meta) before it
takes a single value, so that a file that does not fit is told in one error. Values are read through a memory map, one
tensor at a time, and copied out of it: the map is not aligned as PyTorch's own memory is, on which the last bits of a
product may depend, and a mapped file could change under a running model. Cost: one copy of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formwright.kit.errors import DataError, all_of, nearest
from formwright.kit.files import publish

#: Bytes above which tensors go to several files.
SHARD = 5_000_000_000

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def named(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that is part of the model's values (parameters and kept buffers), each under its first name."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            raise DataError(f"{name} is a {type(tensor).__name__}; a file of tensors cannot hold it")
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite. The sum tells in one cheap pass, unless it overflows."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    tensor = tensor.detach()
    if tensor.element_size() == 1:
        tensor = tensor.float()
    total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
    return bool(torch.isfinite(total)) or bool(torch.isfinite(tensor).all())


def shards(tensors: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """The tensors in order, cut into files of at most ``size`` bytes (one tensor may exceed it)."""
    files: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        if files[-1] and filled + tensor.nbytes > size:
            files.append({})
            filled = 0
        files[-1][name] = tensor
        filled += tensor.nbytes
    return files


def write(
    tensors: Mapping[str, Tensor],
    directory: Path,
    stem: str = "model",
    size: int = SHARD,
    trace: Callable[[str], None] = lambda step: None,
) -> list[str]:
    """Write ``stem.safetensors``, or ``stem-00001-of-0000N.safetensors`` and ``stem.safetensors.index.json`` above
    ``size`` bytes; returns the names of the files. Equal tensors give equal bytes."""
    from safetensors.torch import save_file

    files = shards(tensors, size)
    names = [f"{stem}.safetensors"]
    if len(files) > 1:
        names = [f"{stem}-{index:05d}-of-{len(files):05d}.safetensors" for index in range(1, len(files) + 1)]
    for name, held in zip(names, files):
        trace(f"write {name}")
        save_file(_apart(held), directory / name, metadata={"format": "pt"})
        publish(directory / name)
    if len(files) > 1:
        where = {key: name for name, held in zip(names, files) for key in held}
        index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": where}
        names.append(f"{stem}.safetensors.index.json")
        trace(f"write {names[-1]}")
        (directory / names[-1]).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return names


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two in one storage (the format stores each by itself)."""
    held: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in held:
            plain = plain.clone()
        held.add(plain.untyped_storage().data_ptr())
        found[name] = plain
    return found


def read(
    paths: Iterable[Path], wanted: Mapping[str, Tensor], device: torch.device | str = "cpu", check_finite: bool = True
) -> dict[str, Tensor]:
    """The values of ``wanted`` (tensors on meta, by name) from the files.

    Names, shapes and dtypes must fit exactly, except that a float may be stored in another float type and stays in
    it. A DataError lists everything missing, unexpected or different, and with ``check_finite`` every NaN tensor.
    """
    from safetensors import SafetensorError, safe_open

    opened: list[tuple[Path, Any]] = []
    for path in paths:
        try:
            opened.append((path, safe_open(path, framework="pt", device="cpu")))
        except FileNotFoundError:
            raise DataError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} is damaged: {error}") from None
    place = str(opened[0][0] if len(opened) == 1 else opened[0][0].parent)
    where = {name: handle for _, handle in opened for name in handle.keys()}  # noqa: SIM118 - not a mapping
    slices = {name: handle.get_slice(name) for name, handle in where.items()}
    stored = {name: (tuple(s.get_shape()), _DTYPES.get(s.get_dtype(), s.get_dtype())) for name, s in slices.items()}
    all_of(DataError, misfits(stored, wanted, place))
    values: dict[str, Tensor] = {}
    sick = []
    for name in wanted:
        value = where[name].get_tensor(name).to(device, copy=True)
        if check_finite and not finite(value):
            sick.append(name)
        values[name] = value
    if sick:
        raise DataError(f"{place} holds NaN or infinite values in {listing(sick)}")
    return values


def listing(names: list[str], most: int = 8) -> str:
    """The first names, and how many more."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def misfits(stored: Mapping[str, tuple[tuple[int, ...], Any]], wanted: Mapping[str, Tensor], place: str) -> list[str]:
    """A sentence for every tensor missing from ``stored`` (name -> shape, dtype or its name), unexpected or other."""
    missing = [name for name in wanted if name not in stored]
    spare = [name for name in stored if name not in wanted]
    problems = [f"{place}: tensor {name} is missing{nearest(name, spare)}" for name in missing]
    problems += [f"{place}: tensor {name} is not part of this model" for name in spare]
    for name, like in wanted.items():
        if name not in stored:
            continue
        shape, dtype = stored[name]
        if shape != tuple(like.shape):
            problems.append(f"{place}: tensor {name} has shape {shape}; this model needs {tuple(like.shape)}")
        float_for_float = isinstance(dtype, torch.dtype) and dtype.is_floating_point and like.dtype.is_floating_point
        if dtype != like.dtype and not float_for_float:
            found, needed = (str(kind).removeprefix("torch.") for kind in (dtype, like.dtype))
            problems.append(f"{place}: tensor {name} is {found}; this model needs {needed}")
    return problems


def put(module: nn.Module, values: Mapping[str, Tensor], trains: Callable[[str, Tensor], bool] | None = None) -> None:
    """Put ``values`` in the places of the tensors of the same names, wherever they are used.

    ``trains(name, value)`` says which parameters require gradient; without it they are as they were.
    """
    fresh: dict[int, Tensor] = {}
    for name, old in named(module).items():
        if name not in values:
            continue
        value = values[name]
        if isinstance(old, nn.Parameter):
            asks = old.requires_grad if trains is None else trains(name, value)
            value = nn.Parameter(value, requires_grad=asks and value.is_floating_point())
        fresh[id(old)] = value
    for held in module.modules():
        for table in (held._parameters, held._buffers):
            for key, tensor in table.items():
                if tensor is not None and id(tensor) in fresh:
                    table[key] = fresh[id(tensor)]  # type: ignore[assignment]


def unfilled(module: nn.Module) -> list[str]:
    """Names of tensors still on meta: a buffer that is not saved cannot be filled at load."""
    every = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, tensor in every if tensor.device.type == "meta"]
