"""What a run leaves on disk, each file or directory there wholly or not at all::

    RUN/  recipe.toml · events.jsonl · results.jsonl · tokenizer/ · lock · best (the name of a step)
          run.png · tensorboard/ · steps/000120/
              models.safetensors · optimizers.safetensors · extra.safetensors · state.json

Tensors are safetensors, everything else JSON or TOML; nothing is pickled, so a checkpoint never runs code. A directory
counts as a checkpoint if it holds ``state.json``, which is removed first when an old one goes. Runs of format 1 had a
recipe.json; they are read and go on as they are. Cost: one write of all tensors and their fsync.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from formwright.kit.errors import DataError
from formwright.kit.files import publish, replacing, write_atomic
from formwright.kit.journal import read_jsonl
from formwright.training import configs
from formwright.training.recipe import Recipe

FORMAT = 2
TENSOR = "$tensor"


class RunDirectory:
    """The files of one run; see the module."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.old_recipe = self.path / "recipe.json"
        self.events = self.path / "events.jsonl"
        self.results = self.path / "results.jsonl"

    @property
    def begun(self) -> bool:
        return self.recipe.is_file() or self.old_recipe.is_file()

    def checkpoints(self) -> list[int]:
        """Steps that have a whole checkpoint, ascending."""
        found = []
        for state in self.path.glob("steps/*/state.json"):
            with contextlib.suppress(ValueError):
                found.append(int(state.parent.name))
        return sorted(found)

    def at(self, step: int) -> Path:
        return self.path / "steps" / f"{step:06d}"

    @property
    def best(self) -> int | None:
        """The step whose score was best so far, where a score was taken."""
        try:
            return int((self.path / "best").read_text(encoding="utf-8").strip().rpartition("/")[2])
        except (FileNotFoundError, ValueError):
            return None

    def write_recipe(self, recipe: Mapping[str, Any], run: Mapping[str, Any], tokenizer: Any = None) -> None:
        """Begin: the recipe's settings, and in ``run`` the data and all else that should be known of the start."""
        self.path.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None and getattr(tokenizer, "files", None):
            with replacing(self.path / "tokenizer", overwrite=True) as folder:
                for name, content in tokenizer.files.items():
                    (folder / name).write_bytes(content)
        write_atomic(self.recipe, configs.write(recipe, {"format": FORMAT, **run}))

    def read_recipe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """(recipe, run) as given to :meth:`write_recipe`, settings of later versions at their defaults."""
        if self.recipe.is_file():
            recipe, run = configs.parse(self.recipe.read_text(encoding="utf-8"), str(self.recipe))
            known = FORMAT
        else:
            try:
                run = json.loads(self.old_recipe.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{self.old_recipe} is not JSON: {error}") from None
            recipe, known = Recipe.from_dict(run.pop("recipe")).to_dict(), 1
        if run.get("format") != known:
            raise DataError(f"{self.path} has format {run.get('format')!r}; this version reads 1 to {FORMAT}")
        return recipe, run

    def save(
        self,
        step: int,
        models: Mapping[str, Tensor],
        optimizers: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        keep: int,
        best: bool = False,
    ) -> None:
        """Write the checkpoint of ``step``; then forget all but the last ``keep`` and the best one."""
        extra: dict[str, Tensor] = {}
        plain = split_tensors(dict(state), extra)
        tensors = {"models": models, "optimizers": optimizers, "extra": extra}
        need = sum(t.numel() * t.element_size() for group in tensors.values() for t in group.values())
        before = self.checkpoints()
        try:
            with replacing(self.at(step), overwrite=True, need=need) as folder:
                for name, group in tensors.items():
                    save_file({key: _own(value) for key, value in group.items()}, folder / f"{name}.safetensors")
                    publish(folder / f"{name}.safetensors")
                record = {"format": FORMAT, "step": step, **plain}
                (folder / "state.json").write_text(json.dumps(record, ensure_ascii=False), encoding="utf-8")
        except (DataError, OSError, SafetensorError) as error:
            kept = f"{self.at(before[-1])} is kept" if before else "there is none from before"
            raise DataError(
                f"the checkpoint of step {step} cannot be written ({error}); {kept}. Make room and resume"
            ) from error
        if best:
            write_atomic(self.path / "best", f"steps/{step:06d}\n")
        known = self.checkpoints()
        for old in known[: max(0, len(known) - keep)]:
            if old not in (self.best, step):
                (self.at(old) / "state.json").unlink(missing_ok=True)
                shutil.rmtree(self.at(old), ignore_errors=True)

    def load(self, step: int, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
        """(models, optimizers, state) as given to :meth:`save`; DataError for a damaged checkpoint."""
        folder = self.at(step)
        try:
            models, optimizers, extra = (
                load_file(folder / f"{name}.safetensors", device=str(device))
                for name in ("models", "optimizers", "extra")
            )
            plain = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        except (OSError, SafetensorError, ValueError) as error:
            raise DataError(
                f"checkpoint {folder} cannot be read: {error}; remove it to resume from the one before"
            ) from None
        return models, optimizers, join_tensors(plain, extra)

    def rewind(self, step: int) -> None:
        """Cut from the journals what was written after ``step``: a resumed run writes it again."""
        for path in (self.events, self.results):
            if path.exists():
                kept = [line for line in read_jsonl(path) if line.get("step", 0) <= step]
                write_atomic(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))


def tensors_of(module: torch.nn.Module) -> dict[str, Tensor]:
    """Name -> parameter or buffer, one name for a tensor that stands in several places."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, value in module.state_dict(keep_vars=True).items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            found[name] = value
    return found


def fill(
    module: torch.nn.Module,
    values: Mapping[str, Tensor],
    where: str,
    like: Callable[[Tensor, Tensor], Tensor] = lambda value, own: value,
) -> None:
    """Copy ``values`` into a module in place; DataError listing every name or shape that differs, before copying.

    ``like`` lays a value out as the tensor that it is copied into.
    """
    own = tensors_of(module)
    problems = [f"{where} lacks {name}" for name in own if name not in values]
    problems += [f"{where} has {name}, which this model does not" for name in values if name not in own]
    problems += [
        f"{name} is {tuple(own[name].shape)}, in {where} {tuple(value.shape)}"
        for name, value in values.items()
        if name in own and own[name].shape != value.shape
    ]
    if problems:
        rest = f"\n… and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise DataError("\n".join(problems[:8]) + rest + "\nresume with the model that the run was started with")
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(like(value, own[name]))


def split_tensors(value: Any, found: dict[str, Tensor], path: str = "") -> Any:
    """Plain JSON with every tensor replaced by its name in ``found``."""
    if isinstance(value, Tensor):
        found[path] = value
        return {TENSOR: path}
    if isinstance(value, Mapping):
        return {
            str(key): split_tensors(inner, found, f"{path}.{key}" if path else str(key)) for key, inner in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [split_tensors(inner, found, f"{path}.{index}") for index, inner in enumerate(value)]
    return value


def join_tensors(value: Any, found: Mapping[str, Tensor]) -> Any:
    """The opposite of :func:`split_tensors`."""
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return found[value[TENSOR]]
        return {key: join_tensors(inner, found) for key, inner in value.items()}
    if isinstance(value, list):
        return [join_tensors(inner, found) for inner in value]
    return value


def mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Plain data with every tensor changed."""
    found: dict[str, Tensor] = {}
    plain = split_tensors(value, found)
    return join_tensors(plain, {name: change(tensor) for name, tensor in found.items()})


def _own(value: Tensor) -> Tensor:
    """A contiguous CPU tensor with a storage of its own, as safetensors wants."""
    value = value.detach().cpu().contiguous()
    return value.clone() if value.untyped_storage().nbytes() != value.numel() * value.element_size() else value
