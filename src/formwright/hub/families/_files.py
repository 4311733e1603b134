"""The files of a published checkpoint: its JSON, and its tensors in one safetensors file or in shards.

Pickle is never read: a pickle file runs whatever code its writer put into it. Everything that can be wrong with a file
is one sentence that names it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import DataError

INDEX = "model.safetensors.index.json"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; DataError where it is missing, unreadable or something else."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(data).__name__}")
    return data


#: What weights may be stored as; anything else is some quantisation.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Store:
    """The tensors of a directory by name, read one at a time, each mapped from its file and not copied."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.where: dict[str, Path] = {}
        self._open: dict[Path, Any] = {}
        for path, named in self._listed().items():
            keys = set(self._file(path).keys())
            lost = sorted(set(named or ()) - keys)
            if lost:
                raise DataError(f"{path} lacks tensors that {INDEX} places there: {', '.join(lost)}")
            self.where.update(dict.fromkeys(sorted(keys), path))

    def _listed(self) -> dict[Path, list[str] | None]:
        """File -> the tensors that an index places in it, or None where there is no index."""
        single = self.directory / "model.safetensors"
        if single.is_file():
            return {single: None}
        if (self.directory / INDEX).is_file():
            places = read_json(self.directory / INDEX).get("weight_map")
            if not isinstance(places, dict) or not places:
                raise DataError(f"{self.directory / INDEX} has no weight_map")
            found: dict[Path, list[str] | None] = {}
            for name, file in places.items():
                # A name with a folder in it could point anywhere; shards stand beside their index.
                if not isinstance(file, str) or Path(file).name != file:
                    raise DataError(f"{self.directory / INDEX} places {name} in {file!r}, which is no file name")
                found.setdefault(self.directory / file, []).append(name)  # type: ignore[union-attr]
            missing = sorted(path.name for path in found if not path.is_file())
            if missing:
                raise DataError(f"{self.directory} lacks {', '.join(missing)}, which {INDEX} names")
            return found
        pickles = sorted(p.name for p in self.directory.glob("pytorch_model*.bin"))
        if pickles:
            raise DataError(
                f"{self.directory} holds its weights only as {pickles[0]}, a pickle file, which is never opened here "
                "because it can run code; convert it once where you trust it: "
                "AutoModel.from_pretrained(DIR).save_pretrained(OUT) writes model.safetensors "
                "(use the class that config.json names under architectures, so that its head is kept)"
            )
        raise DataError(f"{self.directory} has no model.safetensors and no {INDEX}")

    def _file(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        if path not in self._open:
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path} is cut off or not a safetensors file: {error}") from None
        return self._open[path]

    def __iter__(self):
        return iter(self.where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file(self.where[name]).get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """The tensor; DataError where it holds a value that is not a number."""
        from safetensors import SafetensorError

        path = self.where[name]
        try:
            tensor = self._file(path).get_tensor(name)
        except SafetensorError as error:
            raise DataError(f"{path}: tensor {name} cannot be read: {error}") from None
        if tensor.dtype in FLOATS and tensor.numel():
            # The sum is finite unless an entry is not (or the sum itself overflows, which the second look tells).
            wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
            if not torch.isfinite(tensor.sum(dtype=wide)):
                wrong = int((~torch.isfinite(tensor)).sum())
                if wrong:
                    raise DataError(
                        f"{path}: tensor {name} holds {wrong} values that are not finite numbers (NaN, inf)"
                    )
        return tensor


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def small_files(directory: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The named files that exist, as bytes."""
    return {name: (directory / name).read_bytes() for name in names if (directory / name).is_file()}
