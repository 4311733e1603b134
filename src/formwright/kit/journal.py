"""Journals and locks of a run directory: lines that are there wholly or not at all, and one process at a time.

Cost: one fsync a line.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from formwright.kit.errors import DataError
from formwright.kit.files import (
    PathLike,
    _alive,
    _cannot,
    _claim,
    _full,
    _is_full,
    _remove,
    _write_all,
    fcntl,
    fsync_directory,
)


def append_jsonl(path: PathLike, record: dict[str, Any]) -> None:
    """Append one record as one line, synced: after a crash it is there wholly or not at all.

    A torn last line of an earlier crash is cut off first. Several processes may append to one file. A full disk is a
    :class:`DataError` and leaves the file as it was.
    """
    target = Path(path)
    line = json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
    fresh = not target.exists()
    try:
        with open(target, "a+b", buffering=0) as file:
            if fcntl is not None:
                with contextlib.suppress(OSError):  # a file system without locks: one writer at a time is on the caller
                    fcntl.flock(file, fcntl.LOCK_EX)
            size = _whole_lines(file)
            file.seek(size)
            if _record(file.read()) is not None:  # only the line end is missing: written by an editor, or just torn off
                size = file.seek(0, os.SEEK_END)
                line = b"\n" + line
            file.truncate(size)
            try:
                _write_all(file.fileno(), line)
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
        if fresh:
            fsync_directory(target.parent)
    except OSError as error:
        raise (_full(target, len(line), False) if _is_full(error) else _cannot(target, error)) from error


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8", "surrogatepass"))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _whole_lines(file: Any) -> int:
    """The size of a file up to and with its last line end."""
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        start = max(0, end - 4096)
        file.seek(start)
        cut = file.read(end - start).rfind(b"\n")
        if cut >= 0:
            return start + cut + 1
        end = start
    return 0


def read_jsonl(path: PathLike) -> list[dict[str, Any]]:
    """All records of a journal; one that was never begun has none. A torn last line is left out.

    Any other line that is not a JSON object is a :class:`DataError` with its number.
    """
    try:
        *lines, last = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = []
    for number, line in enumerate([*lines, last], 1):
        record = _record(line)
        if record is not None:
            records.append(record)
        elif line.strip() and number <= len(lines):  # with its line end, so it was never torn
            raise DataError(f"{path}, line {number} is not a JSON object: repair or remove that line")
    return records


class Lock:
    """``with Lock(directory):`` one process at a time works in a run directory (made if missing).

    The file ``DIR/lock`` names the owner's process and host. The lock ends with its owner, however that ends: a file
    left by a killed process does not block. A second owner gets a :class:`DataError` that names the first.
    """

    def __init__(self, path: PathLike) -> None:
        self.directory = Path(path)
        self.file = self.directory / "lock"
        self._fd: int | None = None

    def acquire(self) -> Lock:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            while True:
                self._fd = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
                claimed, owner = _claim(self._fd), self._owner(self._fd)
                pid, host = owner.get("pid"), owner.get("host")
                if claimed is None:  # no locks here: only an owner known to be dead is displaced
                    claimed = pid is None or pid == os.getpid() or (host == socket.gethostname() and not _alive(pid))
                if not claimed:
                    self._close()
                    raise DataError(
                        f"{self.directory} is in use by process {pid or 'unknown'} on {host or 'unknown host'}; "
                        f"wait for it or stop it (if it is certainly gone, remove {self.file})"
                    )
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(self._fd), self.file.stat()):
                        break
                self._close()  # the former owner removed this file between opening and locking: take the new one
            os.ftruncate(self._fd, 0)
            _write_all(self._fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError as error:
            self._close()
            raise (_full(self.file, 100, False) if _is_full(error) else _cannot(self.file, error)) from error
        return self

    @staticmethod
    def _owner(fd: int) -> dict[str, Any]:
        try:
            owner = json.loads(os.read(fd, 4096) or b"{}")
        except ValueError:
            owner = {}
        finally:
            os.lseek(fd, 0, os.SEEK_SET)
        return owner if isinstance(owner, dict) else {}

    def _close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def release(self) -> None:
        """Give the directory back. Harmless when it is not held."""
        if self._fd is not None:
            _remove(self.file)
            self._close()

    def __enter__(self) -> Lock:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()
