"""Formwright's own directories: spec + history + tensors, so that a changed model explains itself and loads again.

``formwright.json`` (written last) states the format's version, the spec or system, the history of surgeries and
events, labels, text settings, and every other file with its size and sha256. ``model.safetensors`` (or shards and an
index) holds the tensors under the names the model gives them; the tokenizer's files lie beside it as they came. Loading
lays the spec out on the meta device, replays the surgeries' ``reshape``, and takes the tensors strictly. Saving checks
first that this will work, writes beside the place, and exchanges in one step. There is no ``config.json``: these tensor
names are ours, and a directory for other libraries is an export.

Cost of loading: laying out the modules, and one copy of the weights. Nothing is hashed unless asked for.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from formwright import __version__, registry
from formwright.hub import tensors, texts
from formwright.hub.provenance import read_source, write_source
from formwright.hub.records import FORMAT, check_files, read_record, to_json, write_record
from formwright.kit.errors import DataError, FormwrightError, SpecError, all_of, unknown
from formwright.kit.files import recover, replacing
from formwright.models.build import build
from formwright.models.model import Entry
from formwright.spec import ModelSpec, SystemSpec
from formwright.surgery.base import replay

RECORD = "formwright.json"
#: Before a reader gives up on a directory that keeps being replaced: so many tries, and so many seconds.
TRIES, PATIENCE = 20, 10.0
#: What may be stored beside the model: what it was made for and how well it does.
EXTRA = ("task", "metric", "scores", "command", "notes")


def is_ours(directory: Path) -> bool:
    """Whether a directory is one of ours, however damaged."""
    return (directory / RECORD).is_file()


# ---------------------------------------------------------------------- writing


def write(
    model: Any,
    directory: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    extra: Mapping[str, Any] | None = None,
    shard_size: int = tensors.SHARD,
    beside: Callable[[Path], None] | None = None,
    store: torch.dtype | None = None,
    trace: Callable[[str], None] | None = None,
) -> Path:
    """Write ``model`` (a Model or System) as a directory in one step; returns its path.

    Files in an earlier directory of ours that are not part of the model (``evidence/``, ``adapters/``, a read-me) stay.
    ``extra``: plain data under task, metric, scores, command, notes. ``beside`` is given the directory in the making,
    to write a report or a card into it that belongs to the same step. ``store``: a smaller float type that numbers lie
    in on disk; a loaded model computes in the type this one computes in. ``trace`` is told every step.

    Raises DataError for NaN weights, a model changed outside surgeries, a full disk, or a directory that is not ours
    and not empty (unless ``overwrite``); SpecError for data that JSON cannot say. Nothing is changed then.
    """
    path = Path(directory)
    step = trace or (lambda _: None)
    held = tensors.named(model)
    record = _record(model, held, extra or {})
    _check(model, held)
    if store is not None:
        record["floats"] = _float_of(held)
        held = _stored(held, store)
    with replacing(
        path, ours=is_ours, overwrite=overwrite, need=sum(t.nbytes for t in held.values()), trace=trace
    ) as made:
        names = tensors.write(held, made, size=shard_size, trace=step)
        for name, content in texts.tokenizer_files(model).items():
            step(f"write {name}")
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_bytes(content)
            names.append(name)
        names += write_source(getattr(model, "source", None), made)
        step("keep other files")
        _keep(path, made)
        if beside is not None:
            beside(made)
        step(f"write {RECORD}")
        write_record(made / RECORD, record, names)
    return path


def _check(model: Any, held: Mapping[str, Tensor]) -> None:
    """That the values can be saved, and that what is saved will load."""
    empty = [name for name, tensor in held.items() if tensor.device.type == "meta"]
    if empty:
        raise DataError(f"this model was laid out on meta and holds no values in {tensors.listing(empty)}")
    sick = [name for name, tensor in held.items() if not tensors.finite(tensor)]
    if sick:
        raise DataError(
            f"NaN or infinite values in {tensors.listing(sick)}: not saved; go back to an earlier state of the model"
        )
    stated = tensors.named(_lay_out(model.spec, model.history))
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in held.items()}
    problems = tensors.misfits(shapes, stated, "not saved, because the model is not what its spec and history say")
    all_of(DataError, problems)


def _float_of(held: Mapping[str, Tensor]) -> str:
    """The one float type of a model's tensors; SpecError where there are several, which one type on disk would mix."""
    kinds = sorted({str(t.dtype).removeprefix("torch.") for t in held.values() if t.is_floating_point()})
    if len(kinds) > 1:
        raise SpecError(f"store needs a model of one float type; this one has {', '.join(kinds)}")
    return kinds[0] if kinds else "float32"


def _stored(held: Mapping[str, Tensor], store: torch.dtype) -> dict[str, Tensor]:
    """The tensors as they lie on disk; DataError for values that ``store`` cannot say."""
    found = {name: t.detach().to(store) if t.is_floating_point() else t for name, t in held.items()}
    wide = [name for name, tensor in found.items() if not tensors.finite(tensor)]
    if wide:
        raise DataError(f"values of {tensors.listing(wide)} are beyond {str(store).removeprefix('torch.')}: not saved")
    return found


def _record(model: Any, held: Mapping[str, Tensor], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Everything but ``files``, as plain data in a fixed order."""
    all_of(SpecError, [unknown("record of a saved model", key, EXTRA) for key in extra if key not in EXTRA])
    floats = [name for name, t in held.items() if isinstance(t, nn.Parameter) and t.is_floating_point()]
    trained = [name for name in floats if held[name].requires_grad]
    record: dict[str, Any] = {
        "format": FORMAT,
        "formwright": __version__,
        "name": model.name,
        "system" if isinstance(model.spec, SystemSpec) else "spec": model.spec.to_dict(),
        "history": [entry.to_dict() for entry in model.history],
        "trains": "all" if trained == floats else trained,
        "labels": texts.labels(model),
        "texts": texts.text_settings(model),
        "plugins": _plugins(model),
    }
    record.update(extra)
    to_json(record)
    return record


def _plugins(model: Any) -> list[dict[str, Any]]:
    """The files outside the package whose parts or surgeries the model needs, and under which names."""
    needs: dict[str, set[str]] = {}
    used = {type(module) for module in model.modules()}
    for entry in model.history:
        if entry.kind == "surgery":
            used.add(registry.resolve("surgery", entry.name))
    for kind in used:
        name = getattr(kind, "registered", None)
        foreign = name is not None and tuple(name) not in registry.entries()
        if foreign or kind.__module__.startswith("formwright_plugin_"):
            file = getattr(sys.modules.get(kind.__module__), "__file__", None)
            names = needs.setdefault(Path(file).name if file else kind.__module__, set())
            if foreign and name is not None:
                names.add(":".join(name))
    return [{"file": file, "names": sorted(needs[file])} for file in sorted(needs)]


def _keep(old: Path, made: Path) -> None:
    """Carry over what lies in an earlier directory of ours and is not part of the model."""
    if not is_ours(old):
        return
    try:
        parts = {PurePosixPath(name).parts[0] for name in manifest(old)["files"]}
    except FormwrightError:  # damaged: what belonged to it is not known
        parts = {entry.name for entry in old.iterdir()} - {"evidence", "adapters"}
    for entry in sorted(old.iterdir()):
        if entry.name in parts or entry.name == RECORD or (made / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, made / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, made / entry.name, follow_symlinks=False)


# ---------------------------------------------------------------------- reading


def manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """``formwright.json`` as plain data, checked for form and version; DataError otherwise."""
    path = Path(directory) / RECORD
    words, objects = ("name", "floats"), ("labels", "texts", "spec", "system")
    optional = {"plugins": list, **dict.fromkeys(words, str), **dict.fromkeys(objects, dict)}
    record = read_record(path, {"history": list}, optional)
    if ("spec" in record) == ("system" in record):
        raise DataError(f"{path} must hold a spec or a system")
    return record


def read(
    directory: str | os.PathLike[str],
    plugin: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    *,
    device: str | torch.device = "cpu",
    verify: bool = False,
    check_finite: bool = True,
) -> Any:
    """The Model or System saved in ``directory``, in eval mode.

    plugin: files with parts or surgeries that the model needs; a checkpoint never imports code by itself. verify:
    compare every sha256 too (sizes always are). check_finite: refuse NaN weights, about 10 ms per 100 MB.

    Raises DataError, with all problems at once, for missing, truncated or changed files, a newer format or surgery,
    missing plug-ins, and tensors that do not fit the model.
    """
    path = Path(directory)
    recover(path)
    plugins = [plugin] if isinstance(plugin, (str, os.PathLike)) else list(plugin or ())
    for file in plugins:
        registry.load_plugin(os.fspath(file))
    tries, until = 0, time.monotonic() + PATIENCE
    while tries < TRIES or time.monotonic() < until:
        tries += 1
        with _watched(path) as unchanged:
            try:
                model = _read(path, plugins, device, verify, check_finite)
            except FormwrightError:
                if unchanged():
                    raise
            else:
                if unchanged():
                    return model
    raise DataError(f"{path} keeps being replaced while it is read; try again")


@contextlib.contextmanager
def _watched(path: Path) -> Iterator[Callable[[], bool]]:
    """A function that says whether ``path`` still is the same directory: a writer replaces it whole, so what was read
    in between is of one piece. Held open, so that its number is not given to another meanwhile."""
    try:
        handle: int | None = os.open(path, os.O_RDONLY)
    except OSError:
        handle = None
    try:
        before = None if handle is None else os.fstat(handle)

        def unchanged() -> bool:
            try:
                return before is None or os.path.samestat(before, os.stat(path))
            except OSError:
                return False

        yield unchanged
    finally:
        if handle is not None:
            os.close(handle)


def _read(path: Path, plugins: Sequence[Any], device: Any, verify: bool, check_finite: bool) -> Any:
    record = manifest(path)
    _check_plugins(path, record)
    check_files(path, record["files"], verify)
    try:
        spec = SystemSpec.from_dict(record["system"]) if "system" in record else ModelSpec.from_dict(record["spec"])
        history = [Entry(entry["kind"], entry["name"], entry.get("data", {})) for entry in record["history"]]
        with registry.only_plugins(plugins):
            model = _lay_out(spec, history)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path / RECORD} cannot be read: {type(error).__name__}: {error}") from None
    except FormwrightError as error:
        written = f" (it was written by Formwright {record.get('formwright')}, this is {__version__})"
        newer = written if record.get("formwright") != __version__ else ""
        raise DataError("\n".join(f"{path}: {line}{newer}" for line in str(error).split("\n"))) from None
    files = [path / name for name in record["files"] if name.startswith("model") and name.endswith(".safetensors")]
    if not files:
        raise DataError(f"{path / RECORD} lists no model.safetensors")
    values = tensors.read(files, tensors.named(model), device, check_finite)
    if "floats" in record:
        used = getattr(torch, record["floats"])
        values = {name: value.to(used) if value.is_floating_point() else value for name, value in values.items()}
    trains = record.get("trains", "all")
    chosen = None if trains == "all" else set(trains)
    tensors.put(model, values, lambda name, _: chosen is None or name in chosen)
    left = tensors.unfilled(model)
    if left:
        raise DataError(f"{path}: {tensors.listing(left)} are not saved with a model and were left empty")
    model.name = record.get("name", "")
    source = read_source(path) if "source.json" in record["files"] else None
    if source is not None:
        model.source = source
    texts.restore(model, record, path)
    return model.eval()


def _lay_out(spec: ModelSpec | SystemSpec, history: Sequence[Entry]) -> Any:
    """The model on meta, with its surgeries replayed and its events remembered."""
    model = build(spec, seed=None, device="meta")
    for entry in history:
        if entry.kind == "surgery":
            replay(model, entry)
        else:
            model.history.append(entry)
    return model


def _check_plugins(path: Path, record: Mapping[str, Any]) -> None:
    problems = []
    for need in record.get("plugins", ()):
        absent = []
        for name in need.get("names", ()):
            kind, _, rest = name.partition(":")
            if rest not in registry.names(kind):
                absent.append(f"{kind} {rest!r}")
        if absent:
            file = need.get("file", "FILE")
            problems.append(
                f"{path} needs plug-in {file} ({', '.join(absent)}): "
                f"load with --plugin {file} (in Python plugin={file!r})"
            )
    all_of(DataError, problems)
