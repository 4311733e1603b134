"""Directories of Hugging Face in and out: one weight table per family, used in both directions.

``read`` turns ``config.json`` into a spec by the family's own words, lays the model out without memory, and gives it
the file's tensors; every tensor of the file must be accounted for. ``write`` is its inverse, and refuses with the
reason when the model's present layout cannot be said in the family's terms (:func:`can_say`). What was read beside the
model, its configuration, small files and weights without a use here, is kept as ``model.source`` and written back.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from formwright import registry
from formwright.hub import tensors as files_of_tensors
from formwright.hub.families._compare import differences, kind_of
from formwright.hub.families._family import Data, Facts, Family, assign
from formwright.hub.families._files import FLOATS, Store, read_json, small_files, write_json
from formwright.hub.families._sentence import pooling_of, read_sentences, sentence_files
from formwright.hub.families._table import Row, bind
from formwright.kit.errors import DataError, FormwrightError, Refusal, nearest, unknown
from formwright.kit.files import DirectoryWriter
from formwright.models.build import build
from formwright.models.tokenizer import Tokenizer
from formwright.spec import ModelSpec, SystemSpec

#: Small files beside a model that say nothing about its weights, kept and written back as they are.
BESIDE = ("generation_config.json", "preprocessor_config.json", "processor_config.json")
#: Problems told by name before the rest is only counted.
SHOWN = 60
#: A tokenizer without a limit writes a huge number.
ENDLESS = 1_000_000
#: More differences than any comparison that was made.
FAR = 1_000_000


def read(directory: str | os.PathLike[str], *, dtype: torch.dtype | Literal["stored"] | None = None) -> Any:
    """The model (or system, for an encoder with a decoder) of a Hugging Face directory.

    Args:
        dtype: None reads half precision as float32 and the rest as stored; "stored" changes nothing; else the dtype.

    Raises:
        DataError: anything missing, unknown, cut off or of another shape; all such tensors are listed at once.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise DataError(f"{directory} is not a directory")
    name = directory.resolve().name
    sentences = read_sentences(directory)
    directory = directory if sentences is None else directory / sentences.folder
    given = read_json(directory / "config.json")
    family = family_of(given, directory / "config.json")
    store = Store(directory)
    try:
        architecture = family.architecture(given)
        if sentences is not None and sentences.head["part"] != "states":
            architecture = family.base  # the modules say what is done with the states; a head would go unused
        loading = _Loading(family, store, given, architecture)
        spec = loading.spec if sentences is None else _pooled(loading.spec, sentences)
        model = build(spec, device="meta")
    except DataError as error:
        if store.directory.as_posix() in str(error):
            raise
        raise DataError(_placed(directory / "config.json", error)) from None
    except FormwrightError as error:
        raise DataError(_placed(directory / "config.json", error)) from None
    loading.fill(model, dtype)
    model.name = name
    model.tokenizer = Tokenizer.load(directory)
    model.max_length = _limit(model, loading.given, sentences)
    if sentences is not None and sentences.prompts:
        model.prompts = sentences.prompts
    if sentences is not None and sentences.lower and model.tokenizer is not None:
        _lower(model.tokenizer)
    model.source = {
        "family": family.name,
        "architecture": architecture,
        "config": loading.given,
        "prefix": loading.prefix,
        "extras": loading.extras,
        "files": small_files(directory, BESIDE),
        "sentences": {} if sentences is None else sentences.files,
    }
    return model.eval()


def family_of(given: Mapping[str, Any], where: Path | str = "config.json") -> Family:
    """The family of a configuration by its ``model_type``; DataError with the nearest known one otherwise."""
    kind = given.get("model_type")
    if not isinstance(kind, str):
        raise DataError(f"{where} has no model_type; known families: {', '.join(registry.names('family'))}")
    if kind not in registry.names("family"):
        raise DataError(f"{where}: " + unknown("model_type", kind, registry.names("family")))
    return registry.resolve("family", kind)()


def _placed(path: Path, error: FormwrightError) -> str:
    return "\n".join(f"{path}: {line}" for line in str(error).split("\n"))


def _pooled(spec: Any, sentences: Any) -> Any:
    if sentences.head["part"] == "states":
        return spec
    if isinstance(spec, SystemSpec):
        raise DataError("a pooling over an encoder with a decoder is not read; save its encoder alone")
    if sentences.width is not None and sentences.width != spec.width:
        raise DataError(f"its pooling is over vectors of {sentences.width}, the model's have {spec.width}")
    return ModelSpec.from_dict({**spec.to_dict(), "head": sentences.head})


def _limit(model: Any, given: Data, sentences: Any) -> int | None:
    """The longest text: what sentence-transformers, the tokenizer and the configuration say, the shortest of them."""
    said = [] if sentences is None else [sentences.max_length]
    if model.tokenizer is not None:
        stated = model.tokenizer.settings.get("model_max_length")
        said.append(stated if isinstance(stated, int) and 0 < stated < ENDLESS else None)
    stem = getattr(model, "stem", None)
    if stem is not None and stem.limit is not None:
        said.append(stem.limit)
    elif isinstance(given.get("max_position_embeddings"), int):
        said.append(given["max_position_embeddings"])
    known = [length for length in said if length is not None]
    return min(known) if known else None


def _lower(tokenizer: Tokenizer) -> None:
    """Texts in small letters first, as the directory's settings ask."""
    from tokenizers import normalizers

    steps = [normalizers.Lowercase()]
    if tokenizer.backend.normalizer is not None:
        steps.append(tokenizer.backend.normalizer)
    tokenizer.backend.normalizer = normalizers.Sequence(steps)


class _Loading:
    """One directory's tensors on their way into a model: the prefix, the spec, what is left over."""

    def __init__(self, family: Family, store: Store, given: Data, architecture: str) -> None:
        self.family, self.store, self.architecture = family, store, architecture
        #: today's name -> the name in the file
        self.names = {family.canonical(name): name for name in store if not family.is_ignored(name)}
        self.prefix = family.prefix_in(self.names)
        self.given = dict(given)
        self.extras: dict[str, Tensor] = {}
        repeats = family.repeats_of(architecture, self.prefix)
        if any(self._differ(a, b) for a, b in repeats.items()):
            self.given = family.untied(self.given)
        layers = family.config(self.given).layers
        if layers > len(self.names):  # said before a layout of millions of layers is tried
            raise DataError(f"it says {layers} layers, and the file holds {len(self.names)} tensors in all")
        self.spec = family.spec_of(self.given, architecture)
        self.repeats = repeats

    def _differ(self, one: str, other: str) -> bool:
        if one not in self.names or other not in self.names:
            return False
        a, b = (self.store.read(self.names[name]) for name in (one, other))
        return a.shape != b.shape or not torch.equal(a, b)

    def fill(self, model: Any, dtype: Any) -> None:
        """Give ``model`` its tensors; one DataError lists every tensor that is missing, unknown or misshapen."""
        known = dict(model.named_parameters())
        rows = bind(self.family.all_rows(self.given, self.architecture), self.prefix, known)
        uncovered = set(known) - {name for row in rows for name in row.ours}
        if uncovered:
            raise DataError(f"the {self.family.name} table has no row for {', '.join(sorted(uncovered))}")
        used = {name for row in rows for name in row.theirs}
        for pair in self.repeats.items():  # a file may hold only one copy of a shared tensor, whichever it is
            for wanted, copy in (pair, pair[::-1]):
                if wanted in used and wanted not in self.names and copy in self.names:
                    self.names[wanted] = self.names[copy]
        unmet = {name for name in used if name not in self.names}
        spare = {
            name
            for name in self.names
            if name not in used and name not in self.repeats and not self.family.is_kept(name, self.prefix)
        }
        problems = self._absent(unmet, spare) + self._misshapen(rows, known, unmet)
        if problems:
            shown = problems[:SHOWN] + ([f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else [])
            raise DataError(
                f"{self.store.directory}: the weights are not those of the {self.architecture} that config.json "
                "describes:\n" + "\n".join(shown)
            )
        tensors: dict[str, Tensor] = {}
        for row in rows:
            given = [self._weight(name, dtype) for name in row.theirs]
            tensors.update(zip(row.ours, row.change.to_ours(given)))
        assign(model, tensors)
        for name, stored in self.names.items():
            if name not in used and name not in self.repeats:
                self.extras[self.family.neutral(name, self.prefix)] = self.store.read(stored)

    def _weight(self, name: str, dtype: Any) -> Tensor:
        tensor = self.store.read(self.names[name])
        if tensor.dtype not in FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise DataError(
                f"{self.store.where[self.names[name]]}: tensor {name} is stored as {kind}; "
                "read the original checkpoint and quantise it here"
            )
        if dtype == "stored":
            return tensor
        if dtype is not None:
            return tensor.to(dtype)
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor

    def _absent(self, unmet: set[str], spare: set[str]) -> list[str]:
        few = len(unmet) * len(spare) < 2_000  # the nearest name among thousands would take minutes to find
        near = {name: nearest(name, spare).replace("did you mean", "the file has") if few else "" for name in unmet}
        found = [f"missing: {name}{near[name]}" for name in sorted(unmet)]
        return found + [
            f"unexpected: {name}{nearest(name, unmet).replace('did you mean', 'wanted is') if few else ''}".replace(
                "?", ""
            )
            for name in sorted(spare)
        ]

    def _misshapen(self, rows: list[Row], known: dict[str, Tensor], unmet: set[str]) -> list[str]:
        found = []
        for row in rows:
            wanted = row.change.to_theirs([known[name] for name in row.ours])
            for name, tensor in zip(row.theirs, wanted):
                if name in unmet:
                    continue
                shape = self.store.shape(self.names[name])
                if shape != tuple(tensor.shape):
                    found.append(f"wrong shape: {name} is {list(shape)}, config.json says {list(tensor.shape)}")
        return found


# ---------------------------------------------------------------------------------------------------------- writing


@dataclass
class _Saying:
    """How a model is said: the family, its class, the configuration, and the laid-out model that proves it."""

    family: Family
    architecture: str
    config: Data
    pooled: bool


def can_say(model: Any) -> str | None:
    """Why the model's present layout cannot be written as a Hugging Face directory; None when it can."""
    try:
        _say(model)
    except Refusal as refusal:
        return str(refusal)
    return None


def _say(model: Any) -> _Saying:
    source = getattr(model, "source", None)
    heads = getattr(model, "heads", None)
    if heads is not None and len(heads) != 1:
        raise Refusal(f"it has heads {', '.join(heads)}; a published class has one")
    names = [source["family"]] if source else registry.names("family")
    if source and source["family"] not in registry.names("family"):
        raise Refusal(f"it was read by the family {source['family']!r}, which is not known here")
    reasons: list[tuple[int, str]] = []
    for name in names:
        family = registry.resolve("family", name)()
        for config in _configs(family, model, source, reasons):
            for architecture in _architectures(family, model, source):
                answer = _try(family, architecture, config, model)
                if isinstance(answer, _Saying):
                    return answer
                reasons.append(answer)
    nearest_miss = min(reasons, key=lambda reason: reason[0], default=(0, "it is a system of towers"))[1]
    if source:
        raise Refusal(nearest_miss)
    raise Refusal(f"no family of published models describes it; nearest: {nearest_miss}")


def _configs(family: Family, model: Any, source: Any, reasons: list[tuple[int, str]]) -> list[Data]:
    """Configurations to try: the one that was read, and that with what the model now is."""
    found = [dict(source["config"])] if source else []
    if not hasattr(model, "stem"):
        return found  # a system is written only in the words it was read in
    try:
        told = family.config_of(Facts(model))
        found.append({**(source["config"] if source else {}), **told})
    except Refusal as refusal:
        reasons.append((FAR, f"{family.title}: {refusal}"))
    except AttributeError:
        reasons.append((FAR, f"{family.title} has another stem or other parts"))
    return found


def _architectures(family: Family, model: Any, source: Any) -> list[str]:
    """The published classes to try: the one it was read as, then those of the family."""
    heads = getattr(model, "heads", None)
    if heads is not None and pooling_of(next(iter(heads.values()))) is not None:
        return [family.base]
    first = [source["architecture"]] if source else []
    return [*first, *(name for name in family.heads if name not in first)]


def _try(family: Family, architecture: str, config: Data, model: Any) -> _Saying | tuple[int, str]:
    """How the model is said, or how far it is from what the configuration describes, and why."""
    config = {**config, **_label_keys(model)}
    try:
        spec: Any = family.spec_of(config, architecture)
        head = next(iter(model.heads.values())) if hasattr(model, "heads") else None
        how = pooling_of(head)
        if head is not None and isinstance(spec, ModelSpec):
            if how is not None:
                node = {"part": kind_of(head), "normalize": head.normalize}
                spec = ModelSpec.from_dict({**spec.to_dict(), "head": node})
            if spec.head["part"] != kind_of(head):  # seen before the rest is laid out for nothing
                return FAR - 1, f"its head is {kind_of(head)}, {architecture} has {spec.head['part']}"
        reference = build(spec, device="meta")
    except FormwrightError as error:
        return FAR - 2, str(error).replace("\n", "; ")
    wrong = differences(model, reference, family.title)
    if wrong:
        return len(wrong), "; ".join(wrong[:5]) + (" ..." if len(wrong) > 5 else "")
    return _Saying(family, architecture, config, how is not None)


def _label_keys(model: Any) -> Data:
    """The labels of a classifier as a configuration names them, and its kind where one output leaves it open."""
    for head in getattr(model, "heads", {}).values():
        transformed_tokens = head.kind == "tokens" and getattr(head, "transform", None) is not None
        if not hasattr(head, "labels") or transformed_tokens:  # ELECTRA's discriminator says no labels
            continue
        names = head.labels or [f"LABEL_{index}" for index in range(head.out.out_features)]
        found: Data = {
            "id2label": {str(index): name for index, name in enumerate(names)},
            "label2id": {name: index for index, name in enumerate(names)},
        }
        if head.registered[1] == "regression" and len(names) > 1:
            found["problem_type"] = "regression"
        elif head.registered[1] == "sequence-classifier" and len(names) == 1:
            found["problem_type"] = "single_label_classification"
        return found
    return {}


def write(model: Any, directory: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write ``config.json``, ``model.safetensors``, the tokenizer, and sentence-transformers' files for a pooling.

    The directory appears whole or not at all. A directory that exists and is not empty is refused unless ``overwrite``.

    Raises:
        Refusal: the model cannot be said in a published family's terms, with the reason.
    """
    _say(model)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    with DirectoryWriter(directory, overwrite=overwrite, need=size) as folder:
        write_into(model, folder)


def write_into(model: Any, folder: Path) -> None:
    """The files of :func:`write` into a directory that exists, for a caller that makes it appear in one step."""
    saying = _say(model)
    source = getattr(model, "source", None) or {}
    same = source.get("architecture") == saying.architecture
    prefix = source["prefix"] if same else saying.family.prefix_of(saying.architecture)
    tensors = weights(model, saying, prefix)
    for name, tensor in source.get("extras", {}).items():
        tensors.setdefault(name.replace("{p}", prefix), tensor)
    config = saying.family.published(saying.config)
    config["architectures"] = [saying.architecture]
    floating = {str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}
    for key in ("dtype", "torch_dtype"):
        if key in config and len(floating) == 1:
            config[key] = next(iter(floating))
    write_json(folder / "config.json", config)
    files_of_tensors.write(tensors, folder)
    files = dict(source.get("files", {}))
    if model.tokenizer is not None:
        files.update(model.tokenizer.files)
    if saying.pooled:
        files.update(sentence_files(model, next(iter(model.heads.values())), source.get("sentences", {})))
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def weights(model: Any, saying: _Saying, prefix: str) -> dict[str, Tensor]:
    """The model's tensors under their published names."""
    known = {name: parameter.detach() for name, parameter in model.named_parameters()}
    found: dict[str, Tensor] = {}
    for row in bind(saying.family.all_rows(saying.config, saying.architecture), prefix, known):
        found.update(zip(row.theirs, row.change.to_theirs([known[name] for name in row.ours])))
    return found
