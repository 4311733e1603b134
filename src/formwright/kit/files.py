"""Atomic files and directories: what is on disk is wholly the old artifact or wholly the new one, never a mixture.

A file is written beside its place, synced, and put there by one ``os.replace``. A directory is written beside
(``DIR.tmp-PID``), every file and directory in it is synced, and the two names are exchanged in *one* call where the
system has it (Linux ``renameat2``); elsewhere the old one steps aside as ``DIR.old-PID`` first, and :func:`recover`
puts it back if the machine stopped between the two renames. So ``DIR.old-*`` is always a whole artifact, and
``DIR.tmp-*`` never is one: before anything is deleted it is renamed to ``.tmp-``.

Who is alive is asked of the kernel: a writer holds an advisory lock on what it writes, which ends with its process
however that ends. A process id alone would not do, because containers that share a volume share small ids. Where a
file system has no locks the process id in the name decides.

Cost: one fsync per file and directory; a few hundred microseconds each on a local disk, milliseconds on a busy one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from formwright.kit.errors import DataError

try:
    import fcntl
except ImportError:  # Windows: process ids decide who is alive
    fcntl = None  # type: ignore[assignment]

PathLike = str | os.PathLike[str]
_FULL = (errno.ENOSPC, errno.EDQUOT)
_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_AT_FDCWD = -100
_turn = itertools.count(1)


def fsync_directory(path: PathLike) -> None:
    """Make the names in a directory durable. Does nothing where directories cannot be opened (Windows)."""
    if os.name != "posix":
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sha256(path: PathLike) -> str:
    """Hex digest of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fsync_tree(root: Path, trace: Callable[[str], None]) -> None:
    """Sync every regular file below ``root``, then every directory, children before parents."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in sorted(names):
            file = Path(folder, name)
            if file.is_symlink() or not file.is_file():
                continue
            trace(f"sync {file.relative_to(root).as_posix()}")
            with open(file, "rb+" if os.name == "nt" else "rb") as opened:  # Windows flushes only what may be written
                os.fsync(opened.fileno())
        trace(f"sync {Path(folder).relative_to(root).as_posix()}/")
        fsync_directory(folder)


def _bytes_below(path: Path) -> int:
    sizes = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                sizes += Path(folder, name).lstat().st_size
    return sizes


def _is_full(error: BaseException | None) -> bool:
    # Writers in other languages (safetensors, torch.save) wrap the system's error in one of their own
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return isinstance(error, Exception) and "no space left on device" in str(error).lower()


def _full(path: Path, needed: int, more: bool) -> DataError:
    folder = path.parent
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    amount = f"more than {needed:,}" if more else f"{needed:,}"
    return DataError(
        f"cannot write {path}: the disk is full ({amount} bytes needed, {free:,} bytes free); "
        "nothing was changed, free some space or choose another place"
    )


def _cannot(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot write {path}: {error.strerror or error}")


def _claim(fd: int) -> bool | None:
    """Take the advisory lock: True taken, False another holds it, None where there are no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _alive(pid: int) -> bool:
    """Whether a process of this machine has that id. Without POSIX signals nobody can be proved dead."""
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _remove_abandoned(path: Path) -> bool:
    """Remove a temporary file or directory that nobody writes any more; False when somebody does."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:  # gone meanwhile, or a system that cannot open directories: leave it
        return False
    try:
        claimed = _claim(fd)
        if claimed is None:
            claimed = not _alive(int(re.findall(r"\.tmp-(\d+)", path.name)[-1]))
        if claimed and not os.path.samestat(os.fstat(fd), os.stat(path)):
            return False
        if claimed:  # still locked, so that a writer that has only just made it sees that it lost it
            _remove(path)
        return claimed
    except FileNotFoundError:
        return True
    finally:
        os.close(fd)


def _beside(path: Path, kind: str) -> list[Path]:
    """The ``NAME.tmp-PID`` or ``NAME.old-PID`` neighbours (a second one of a process is ``…-PID-2``)."""
    pattern = re.compile(re.escape(path.name) + rf"\.{kind}-\d+(-\d+)?")
    try:
        return sorted(entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _names(path: Path, kind: str) -> Iterator[Path]:
    """New names beside ``path``. A process never uses one twice: whoever cleans up could mean the former bearer."""
    while True:
        n = next(_turn)
        yield path.with_name(f"{path.name}.{kind}-{os.getpid()}" + (f"-{n}" if n > 1 else ""))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _discard(old: Path, path: Path) -> None:
    """Delete a stepped-aside artifact. Renamed first, so that a half-deleted one is never taken for a whole one."""
    for temporary in _names(path, "tmp"):
        if not os.path.lexists(temporary):
            with contextlib.suppress(OSError):
                os.rename(old, temporary)
                _remove(temporary)
            return


def recover(path: PathLike) -> None:
    """Finish what a writer that died left undone at ``path`` (a file or a directory); loading calls this first.

    A missing ``path`` with a ``.old-*`` beside it gets that back; other ``.old-*`` and every ``.tmp-*`` that nobody
    writes any more are removed. Live writers are left alone. Safe to call at any time, and by several at once.
    """
    target = Path(os.path.realpath(path))
    busy = set()
    for temporary in _beside(target, "tmp"):
        if not _remove_abandoned(temporary):
            busy.add(temporary.name.rpartition(".tmp-")[2])
    for old in _beside(target, "old"):
        if old.name.rpartition(".old-")[2] in busy:
            continue  # its writer is between the two renames and will go on
        if os.path.lexists(target):
            _discard(old, target)
        else:
            with contextlib.suppress(OSError):
                os.rename(old, target)
                fsync_directory(target.parent)


def write_atomic(path: PathLike, data: bytes | str) -> None:
    """Write a whole file in one step (text as UTF-8); after it returns the bytes are on disk.

    Raises :class:`DataError` for a full disk, a directory in the place, or a parent that cannot be written; the
    earlier file is then untouched and nothing is left beside it.
    """
    target = Path(os.path.realpath(path))
    content = data.encode("utf-8") if isinstance(data, str) else bytes(data)
    if target.is_dir():
        raise DataError(f"cannot write {target}: it is a directory, a file is wanted; choose another name")
    temporary: Path | None = None
    try:
        temporary, fd = _open_beside(target, directory=False)
        assert fd is not None
        with open(fd, "wb", buffering=0) as file:
            _write_all(file.fileno(), content)
            os.fsync(file.fileno())
            if os.name == "posix":  # renamed while locked, so that nobody takes it for abandoned
                os.replace(temporary, target)
        if os.name != "posix":  # an open file cannot be renamed there
            os.replace(temporary, target)
        fsync_directory(target.parent)
    except BaseException as error:
        if temporary is not None:
            _remove(temporary)
        if _is_full(error):
            raise _full(target, len(content), False) from error
        if isinstance(error, OSError):
            raise _cannot(target, error) from error
        raise


def _open_beside(target: Path, directory: bool) -> tuple[Path, int | None]:
    """Make a temporary file or directory and lock it; the next name if somebody took it for abandoned in between."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    for temporary in _names(target, "tmp"):
        try:
            if directory:
                os.mkdir(temporary)
                if os.name != "posix":  # directories cannot be opened there
                    return temporary, None
                fd = os.open(temporary, os.O_RDONLY)
            else:
                fd = os.open(temporary, flags, 0o666)
        except FileExistsError:
            continue
        except FileNotFoundError:
            if target.parent.is_dir():
                continue
            raise
        with contextlib.suppress(FileNotFoundError):
            if _claim(fd) is not False and os.path.samestat(os.fstat(fd), os.stat(temporary)):
                return temporary, fd
        os.close(fd)
    raise AssertionError("names do not end")


def _write_all(fd: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(fd, view) :]


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one system call. False where the kernel, C library or file system cannot."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOENT):
        return False
    raise OSError(code, os.strerror(code), str(other))


class DirectoryWriter:
    """``with replacing(path) as temporary:`` write into ``temporary``; on leaving, it becomes ``path`` in one step.

    ``ours(path)`` says whether an existing directory is an artifact of this library; any other non-empty one is
    refused unless ``overwrite``. ``need`` is the size in bytes, when known, checked against the free space before any
    work. ``trace(step)`` is called before every step (tests end the process there). Whatever is raised inside, also
    Ctrl-C, the temporary directory goes and what was at ``path`` stays.
    """

    def __init__(
        self,
        path: PathLike,
        *,
        ours: Callable[[Path], bool] | None = None,
        overwrite: bool = False,
        need: int = 0,
        trace: Callable[[str], None] | None = None,
    ) -> None:
        self.path = Path(os.path.realpath(path))
        self.ours, self.overwrite, self.need = ours, overwrite, need
        self.trace: Callable[[str], None] = trace or (lambda step: None)
        self._made: list[Path] = []  # parents that did not exist
        self._fd: int | None = None

    def _check(self) -> None:
        while True:
            try:
                before = self.path.stat()
                if not stat.S_ISDIR(before.st_mode):
                    raise DataError(
                        f"cannot write {self.path}: it is a file, a directory is wanted; choose another name"
                    )
                if self.overwrite or not any(self.path.iterdir()) or (self.ours is not None and self.ours(self.path)):
                    return
                if not os.path.samestat(before, self.path.stat()):
                    continue  # another writer replaced it while it was looked at
            except FileNotFoundError:
                return
            raise DataError(
                f"cannot write {self.path}: the directory is not empty and was not written by formwright; "
                "choose another name, or allow it to be overwritten"
            )

    def __enter__(self) -> Path:
        self.trace("recover")
        recover(self.path)
        try:
            self._check()
            self.trace("parents")
            for parent in reversed([p for p in self.path.parents if not p.exists()]):
                parent.mkdir(exist_ok=True)
                self._made.append(parent)
            if self.need > shutil.disk_usage(self.path.parent).free:
                raise _full(self.path, self.need, False)
            self.trace("temporary")
            self.temporary, self._fd = _open_beside(self.path, directory=True)
        except OSError as error:
            self._clean()
            raise (_full(self.path, self.need, True) if _is_full(error) else _cannot(self.path, error)) from error
        except BaseException:
            self._clean()
            raise
        return self.temporary

    def _release(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _clean(self) -> None:
        if hasattr(self, "temporary"):
            _remove(self.temporary)
        self._release()
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        failed_inside = error is not None
        if error is None:
            try:
                self._commit()
                return
            except BaseException as failure:
                error = failure
        written = max(_bytes_below(self.temporary), self.need)
        self._clean()
        if _is_full(error):
            raise _full(self.path, written, True) from error
        if failed_inside:
            return  # what the body raised goes on as it is
        if isinstance(error, OSError):
            raise _cannot(self.path, error) from error
        raise error

    def _commit(self) -> None:
        _fsync_tree(self.temporary, self.trace)
        for _ in range(100):  # more than one turn only when other writers of the same name come between
            self._check()
            self.trace("exchange")
            if not self.path.exists():
                with contextlib.suppress(FileExistsError):
                    if self._rename_to_place():
                        break
            elif _exchange(self.temporary, self.path):
                self.trace("sync parent")
                fsync_directory(self.path.parent)
                self.trace("remove old")
                _remove(self.temporary)
                break
            elif self._step_aside():
                break
        else:
            raise OSError(errno.EBUSY, "other processes keep replacing it")
        for parent in self._made:
            fsync_directory(parent.parent)
        self._release()
        self.trace("done")

    def _rename_to_place(self) -> bool:
        """Rename into a free place; False when another writer was faster."""
        try:
            os.rename(self.temporary, self.path)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                return False
            raise
        self.trace("sync parent")
        fsync_directory(self.path.parent)
        return True

    def _step_aside(self) -> bool:
        """Two renames, for systems that cannot exchange: old aside, new in place. False when another came between."""
        old = self.temporary.with_name(self.path.name + ".old-" + self.temporary.name.rpartition(".tmp-")[2])
        try:
            os.rename(self.path, old)
        except FileNotFoundError:
            return False
        self.trace("new in place")
        try:
            placed = self._rename_to_place()
        except BaseException:
            with contextlib.suppress(OSError):
                os.rename(old, self.path)
            raise
        self.trace("remove old")
        _discard(old, self.path)
        return placed


replacing = DirectoryWriter


def publish(path: Path) -> None:
    """Make a file as public as its folder: some libraries write files that only their owner can read."""
    path.chmod(path.parent.stat().st_mode & 0o666)
