"""Directories of sentence-transformers: a Transformer, a pooling, perhaps a normalisation (Reimers and Gurevych, 2019).

``modules.json`` lists the modules; what it says becomes a pooling head, and a pooling head becomes it again.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from formwright.hub.families._files import read_json, small_files
from formwright.kit.errors import DataError, Refusal

#: Their pooling -> our head.
POOLINGS = {"mean": "mean-pool", "cls": "first-pool", "max": "max-pool", "lasttoken": "last-pool"}
#: How configurations before version 6 spelled a pooling.
OLD = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "lasttoken",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
}
SETTINGS = ("sentence_bert_config.json", "config_sentence_transformers.json", "modules.json")


@dataclass
class Sentences:
    """What the modules of a directory say: the head, the length limit, prompts, and the files as they are."""

    head: dict[str, Any]
    #: Where the Transformer lies, usually the directory itself.
    folder: str = ""
    max_length: int | None = None
    lower: bool = False
    prompts: dict[str, str] = field(default_factory=dict)
    width: int | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def read_sentences(directory: Path) -> Sentences | None:
    """The sentence-transformers side of a directory, or None where it has none."""
    path = directory / "modules.json"
    if not path.is_file():
        return None
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        listed = [(str(m["type"]).rsplit(".", 1)[-1], str(m["path"])) for m in modules]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path} must list modules with 'type' and 'path'") from None
    kinds = [kind for kind, _ in listed]
    if not kinds or kinds[0] != "Transformer":
        raise DataError(f"{path} must begin with a Transformer, not {', '.join(kinds[:1]) or 'nothing'}")
    for _, folder in listed:
        if folder and Path(folder).name != folder:  # a path that leads elsewhere would also be written to
            raise DataError(f"{path}: {folder!r} is not the name of a folder beside it")
    allowed = (["Transformer"], ["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    if kinds not in allowed:
        strange = next((k for k in kinds if k not in ("Transformer", "Pooling", "Normalize")), None)
        raise DataError(
            f"{path} has a {strange} module, which no pooling head can say; "
            "a Transformer, then a Pooling, then a Normalize can be read"
            if strange
            else f"{path} lists {', '.join(kinds)}; a Transformer, then a Pooling, then a Normalize can be read"
        )
    found = Sentences({"part": "states"}, folder=listed[0][1])
    names = [*SETTINGS]
    if len(listed) > 1:
        folder = listed[1][1]
        names.append(f"{folder}/config.json")
        options = read_json(directory / folder / "config.json")
        how = _pooling(options, directory / folder / "config.json")
        found.head = {"part": POOLINGS[how]}
        width = options.get("embedding_dimension", options.get("word_embedding_dimension"))
        found.width = width if isinstance(width, int) else None
    if len(listed) > 2:
        found.head["normalize"] = True
        names.append(f"{listed[2][1]}/config.json")
    settings = _optional(directory / found.folder / "sentence_bert_config.json")
    limit = settings.get("max_seq_length")
    found.max_length = limit if isinstance(limit, int) and limit > 0 else None
    found.lower = settings.get("do_lower_case") is True
    texts = _optional(directory / "config_sentence_transformers.json")
    prompts = texts.get("prompts")
    found.prompts = {str(k): str(v) for k, v in prompts.items()} if isinstance(prompts, dict) else {}
    first = found.prompts.get(str(texts.get("default_prompt_name")))
    if first:
        warnings.warn(
            f"{directory.name} was trained with {first!r} before every text; encode puts nothing there, so write it "
            "(model.prompts holds the prompts)",
            stacklevel=3,
        )
    found.files = small_files(directory, names) if not found.folder else {}
    return found


def _optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _pooling(options: dict[str, Any], path: Path) -> str:
    mode = options.get("pooling_mode")
    modes = [mode] if isinstance(mode, str) else list(mode) if isinstance(mode, list) else []
    modes = modes or [how for key, how in OLD.items() if options.get(key)] or ["mean"]
    if len(modes) > 1:
        raise DataError(
            f"{path} joins the poolings {', '.join(map(str, modes))}; one of {', '.join(POOLINGS)} can be read"
        )
    if modes[0] not in POOLINGS:
        raise DataError(f"{path}: pooling {modes[0]!r} is not known here (known: {', '.join(POOLINGS)})")
    return modes[0]


def pooling_of(head: Any) -> str | None:
    """Their name of a pooling head, or None for any other head."""
    name = getattr(type(head), "registered", ("", ""))[1]
    return next((theirs for theirs, ours in POOLINGS.items() if ours == name), None)


def sentence_files(model: Any, head: Any, kept: dict[str, bytes]) -> dict[str, bytes]:
    """The files that say a pooling head; those of the directory it was read from where they still say it."""
    how = pooling_of(head)
    if how is None:
        raise Refusal("the head is no pooling")
    if kept and _says(kept, how, head.normalize, model.max_length):
        return dict(kept)
    kinds = [
        ("", "sentence_transformers.models.Transformer"),
        ("1_Pooling", "sentence_transformers.models.Pooling"),
    ]
    if head.normalize:
        kinds.append(("2_Normalize", "sentence_transformers.models.Normalize"))
    modules = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(kinds)]
    pooling = {"word_embedding_dimension": model.width, **{key: name == how for key, name in OLD.items()}}
    settings: dict[str, Any] = {"do_lower_case": False}
    if model.max_length is not None:
        settings["max_seq_length"] = model.max_length
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": settings,
        "config_sentence_transformers.json": {"prompts": dict(model.prompts), "default_prompt_name": None},
    }
    return {name: (json.dumps(data, indent=2) + "\n").encode() for name, data in files.items()}


def _says(kept: dict[str, bytes], how: str, normalize: bool, limit: int | None) -> bool:
    """Whether kept files still describe the head and the limit."""
    modules = [str(m["type"]).rsplit(".", 1)[-1] for m in json.loads(kept["modules.json"])]
    if modules != ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]:
        return False
    name = next((key for key in kept if key.endswith("/config.json") and "ool" in key), None)
    if name is None or _pooling(json.loads(kept[name]), Path(name)) != how:
        return False
    stated = json.loads(kept.get("sentence_bert_config.json", b"{}")).get("max_seq_length")
    return stated is None or stated == limit
