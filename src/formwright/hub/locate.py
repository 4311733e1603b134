"""Where a model's files are: a directory, one of ours, an installed package with weights, or a cached hub id.

Packages are found by their installation records and searched as files; none of their code runs. The hub's cache is
read by its file layout (``models--ORG--NAME/refs`` and ``snapshots``), without the library. Nothing is downloaded
unless asked for.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from formwright.kit.errors import DataError, nearest
from formwright.kit.files import recover

#: A file that makes a directory a model: ours, or Hugging Face's.
RECORDS = ("formwright.json", "config.json")
#: The package's own name, which is no model's.
OURS = "formwright"
#: The models that come with the package, a directory each.
SHIPPED = Path(__file__).parent / "shipped"
#: What a download brings: data only, no code and no pickles.
DATA_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


def locate(name_or_path: str | os.PathLike[str], download: bool = False) -> Path:
    """The directory that holds the model ``name_or_path``.

    A path to a directory; else the name of a model that comes with Formwright, of an installed distribution or package
    with weights (``-`` and ``_`` are one); else the id of a model in the hub's cache; else, with ``download``, from the
    network. DataError otherwise, with everything that was tried and the nearest known name.
    """
    name = os.fspath(name_or_path)
    path = Path(name).expanduser()
    recover(path)
    if path.is_file():
        raise DataError(f"{path} is a file; a model is a directory" + _owner(path))
    if is_model(path):
        return path
    tried = [f"{path}: {_what_it_is(path)}"]
    plain = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not name.startswith(".")
    if plain and is_model(SHIPPED / name):
        return SHIPPED / name
    if plain and "/" not in name:
        found, said = _in_package(name)
        if found is not None:
            return found
        tried.append(f"installed packages: {said}")
    if plain:
        found, said = _in_cache(name)
        if found is not None:
            return found
        tried.append(f"hub cache: {said}")
        if download:
            return _download(name)
        if "/" in name and not path.is_dir():
            tried.append("network: not asked (allow it with --download, in Python download=True)")
    known = known_names()
    hint = nearest(name, known) or (f"; known here: {', '.join(known[:12])}" if known else "")
    raise DataError(f"no model {name!r}{hint}\n" + "\n".join(f"  {line}" for line in tried))


def is_model(path: Path) -> bool:
    """Whether a directory has one of the files that describe a model."""
    return any((path / record).is_file() for record in RECORDS)


def _owner(file: Path) -> str:
    return f": give {file.parent}" if is_model(file.parent) else ""


def _what_it_is(path: Path) -> str:
    if not path.is_dir():
        return "no such directory"
    inside = sorted(entry.name for entry in path.iterdir())
    if not inside:
        return "an empty directory"
    models = [name for name in inside if is_model(path / name)]
    if models:
        return f"holds no model itself, but {', '.join(models[:6])} in it do{'es' if len(models) == 1 else ''}"
    return f"holds neither {' nor '.join(RECORDS)} (but {', '.join(inside[:6])}{' …' if len(inside) > 6 else ''})"


# ---------------------------------------------------------------------- packages


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _weights(files: Iterable[Path]) -> list[Path]:
    """The directories among ``files`` that hold a model with its weights, the shallowest only."""
    by_folder: dict[Path, set[str]] = {}
    for file in files:
        by_folder.setdefault(file.parent, set()).add(file.name)
    found = [
        folder
        for folder, names in by_folder.items()
        if names & set(RECORDS) and any(name.endswith(".safetensors") for name in names)
    ]
    least = min((len(folder.parts) for folder in found), default=0)
    return sorted(folder for folder in found if len(folder.parts) == least)


def _distribution_files(distribution: importlib.metadata.Distribution) -> list[Path]:
    listed = [file for file in distribution.files or () if file.name in RECORDS or file.name.endswith(".safetensors")]
    return [Path(str(distribution.locate_file(file))) for file in listed]


def _package_files(name: str) -> Iterator[Path]:
    """Files below an importable package, which is found but not imported."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        spec = None
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        for folder, _, names in os.walk(root):
            yield from (Path(folder, file) for file in names)


def _in_package(name: str) -> tuple[Path | None, str]:
    module = name.replace("-", "_").replace(".", "_")
    try:
        distribution = importlib.metadata.distribution(name)
        found = _weights(_distribution_files(distribution))
        what = f"{distribution.metadata['Name']} {distribution.version}"
    except importlib.metadata.PackageNotFoundError:
        found, what = [], f"package {module}" if any(True for _ in _package_files(module)) else ""
    if not found and module.isidentifier():
        found = _weights(_package_files(module))
    found = [folder for folder in found if any(folder.glob("*.safetensors"))]
    if len(found) > 1:
        raise DataError(f"{what} carries several models; give the path of one: {', '.join(map(str, found))}")
    if found:
        return found[0], ""
    return None, f"{what} carries no weights (config.json and *.safetensors)" if what else f"none is called {name}"


# ---------------------------------------------------------------------- the hub's cache


def cache_folder() -> Path:
    """Where the hub's library keeps what it downloaded."""
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(variable):
            return Path(os.environ[variable]).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base).expanduser() if base else Path.home() / ".cache") / "huggingface" / "hub"


def _in_cache(name: str) -> tuple[Path | None, str]:
    kept = cache_folder() / f"models--{name.replace('/', '--')}"
    snapshots = kept / "snapshots"
    if not snapshots.is_dir():
        return None, f"{cache_folder()} holds no {name}"
    main = kept / "refs" / "main"
    if main.is_file():
        folder = snapshots / main.read_text(encoding="utf-8").strip()
    else:  # kept by commit only: the one written last
        folder = max(snapshots.iterdir(), key=lambda entry: entry.stat().st_mtime, default=snapshots / "none")
    if not is_model(folder) or not any(file.is_file() for file in folder.glob("*.safetensors")):
        return None, f"{name} is incomplete there (it needs config.json and *.safetensors): {folder}"
    return folder, ""


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise DataError(
            f"downloading {name} needs huggingface_hub: pip install huggingface_hub (or give a directory)"
        ) from None
    try:
        found = Path(snapshot_download(name, allow_patterns=list(DATA_FILES)))
    except Exception as error:  # its many kinds of network and access errors
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise DataError(f"cannot download {name}: {reason}") from None
    if not is_model(found):
        raise DataError(f"{name} was downloaded to {found}, but {_what_it_is(found)}")
    return found


def known_names() -> list[str]:
    """Models that can be named without a path: installed packages with weights and cached ids."""
    found = {folder.name for folder in SHIPPED.glob("*") if is_model(folder)}
    for distribution in importlib.metadata.distributions():
        listing = distribution.read_text(
            "RECORD"
        )  # searched as text first, since most packages list thousands of files
        if (listing is None or ".safetensors" in listing) and _weights(_distribution_files(distribution)):
            found.add(distribution.metadata["Name"])
    with_cache = cache_folder()
    if with_cache.is_dir():
        for entry in with_cache.glob("models--*"):
            found.add(entry.name.removeprefix("models--").replace("--", "/"))
    return sorted(name for name in found - {OURS} if name)
