"""Atomic files and directories: killed at every step, on a full disk, by several writers at once."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from formwright.kit import files
from formwright.kit import journal as journals
from formwright.kit.errors import DataError

OLD = {"formwright.json": "old", "model.safetensors": "o" * 5000, "evidence/report.html": "<old>"}
NEW = {"formwright.json": "new", "model.safetensors": "n" * 7000, "evidence/plan ü 計画.json": "{}"}

# A child that replaces DIR and kills itself at the k-th step; prints the steps when k is out of reach
CHILD = """
import os, signal, sys
from pathlib import Path
from formwright.kit import files
from formwright.kit import journal as journals
target, k, exchange, new = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "exchange", eval(sys.argv[4])
if not exchange:
    files._exchange = lambda one, other: False
steps = []
def trace(step):
    steps.append(step)
    if len(steps) == k:
        os.kill(os.getpid(), signal.SIGKILL)
with files.replacing(target, ours=lambda p: (p / "formwright.json").exists(), trace=trace) as temporary:
    for name, text in new.items():
        trace("write " + name)
        (temporary / name).parent.mkdir(exist_ok=True)
        (temporary / name).write_text(text, encoding="utf-8")
print(len(steps), "|".join(steps).encode("ascii", "replace").decode())
"""


def ours(path: Path) -> bool:
    return (path / "formwright.json").exists()


def fill(path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text(text, encoding="utf-8")


def content(path: Path) -> dict[str, str]:
    return {f.relative_to(path).as_posix(): f.read_text("utf-8") for f in path.rglob("*") if f.is_file()}


def child(target: Path, k: int, mode: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", CHILD, str(target), str(k), mode, repr(NEW)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("mode", ["exchange", "fallback"])
@pytest.mark.parametrize("before", [True, False])
def test_killed_at_every_step(tmp_path: Path, mode: str, before: bool) -> None:
    probe = tmp_path / "probe"
    if before:
        fill(probe, OLD)
    finished = child(probe, 10**6, mode)
    assert finished.returncode == 0, finished.stderr
    steps = int(finished.stdout.split()[0])
    assert steps > 12 and content(probe) == NEW
    outcomes = []
    for k in range(1, steps + 1):
        target = tmp_path / f"модель {k}"
        if before:
            fill(target, OLD)
        assert child(target, k, mode).returncode == -signal.SIGKILL
        files.recover(target)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(target.name + ".")] == []
        found = content(target) if target.exists() else None
        assert found in ([OLD, NEW] if before else [None, NEW]), f"step {k}"
        outcomes.append(found == NEW)
    assert outcomes == sorted(outcomes) and outcomes[-1] and not outcomes[0]


def test_the_exchange_is_one_call_here(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("renameat2 is a Linux call")
    fill(tmp_path / "a", OLD)
    fill(tmp_path / "b", NEW)
    if not files._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    assert content(tmp_path / "a") == NEW and content(tmp_path / "b") == OLD
    assert files._exchange(tmp_path / "a", tmp_path / "missing") is False


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_exception_leaves_the_earlier_artifact(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "model"
    fill(target, OLD)
    with pytest.raises(type(error)), files.replacing(target, ours=ours) as temporary:
        (temporary / "half").write_text("x")
        raise error
    assert content(target) == OLD and os.listdir(tmp_path) == ["model"]


def test_made_parents_go_again_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "a" / "b" / "c"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []
    with files.replacing(tmp_path / "a" / "b" / "c") as temporary:
        (temporary / "x").write_text("1")
    assert content(tmp_path) == {"a/b/c/x": "1"}


def test_what_is_not_ours_is_refused(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis"
    fill(thesis, {"chapter.tex": "years of work"})
    for predicate in (None, ours):
        with pytest.raises(DataError, match="not empty and was not written by formwright"):
            files.replacing(thesis, ours=predicate).__enter__()
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(DataError, match="it is a file, a directory is wanted"):
        files.replacing(file, overwrite=True).__enter__()
    with pytest.raises(DataError, match="cannot write"):
        files.replacing(file / "below", ours=ours).__enter__()
    assert content(tmp_path) == {"thesis/chapter.tex": "years of work", "file": "text"}
    assert sorted(os.listdir(tmp_path)) == ["file", "thesis"]
    with files.replacing(thesis, ours=ours, overwrite=True) as temporary:
        fill(temporary, NEW)
    assert content(thesis) == NEW
    (tmp_path / "empty").mkdir()
    with files.replacing(tmp_path / "empty", ours=ours) as temporary:
        fill(temporary, NEW)
    assert content(tmp_path / "empty") == NEW


def test_a_link_keeps_pointing(tmp_path: Path) -> None:
    fill(tmp_path / "v1", OLD)
    (tmp_path / "current").symlink_to("v1")
    with files.replacing(tmp_path / "current", ours=ours) as temporary:
        fill(temporary, NEW)
    assert (tmp_path / "current").is_symlink() and content(tmp_path / "v1") == NEW
    (tmp_path / "note").symlink_to("real note")
    files.write_atomic(tmp_path / "note", "x")
    assert (tmp_path / "note").is_symlink() and (tmp_path / "real note").read_text() == "x"


def full(*_: object, **__: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["write", "fsync", "open", "replace"])
def test_full_disk_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    target = tmp_path / "pareto ü.json"
    files.write_atomic(target, "old")
    with monkeypatch.context() as patch, pytest.raises(DataError, match=r"disk is full \(1,000 bytes needed, .* free"):
        patch.setattr(files.os, call, full)
        files.write_atomic(target, b"x" * 1000)
    assert target.read_text() == "old" and os.listdir(tmp_path) == [target.name]


@pytest.mark.parametrize("wrapped", [False, True])
def test_full_disk_inside_a_directory(tmp_path: Path, wrapped: bool) -> None:
    target = tmp_path / "model"
    fill(target, OLD)
    with pytest.raises(DataError) as caught, files.replacing(target, ours=ours) as temporary:
        (temporary / "model.safetensors").write_bytes(b"x" * 4321)
        if wrapped:
            raise RuntimeError("Error while serializing: IoError(No space left on device (os error 28))")
        full()
    assert "more than 4,321 bytes needed" in str(caught.value) and str(target) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert content(target) == OLD and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("call", ["fsync", "rename", "mkdir"])
def test_full_disk_while_committing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    target = tmp_path / "deep" / "model"
    with monkeypatch.context() as patch, pytest.raises(DataError, match="disk is full"):
        patch.setattr(files.os, call, full)
        with files.replacing(target, ours=ours) as temporary:
            fill(temporary, NEW)
    assert os.listdir(tmp_path) == []


def test_the_needed_bytes_are_asked_for_first(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1,000,000,000,000,000 bytes needed, [\d,]+ bytes free"):
        files.replacing(tmp_path / "x", need=10**15).__enter__()
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path):
    mount = tmp_path / "small"
    mount.mkdir()
    made = hasattr(os, "geteuid") and os.geteuid() == 0
    if made:
        with contextlib.suppress(FileNotFoundError):
            command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)]
            made = subprocess.run(command, capture_output=True).returncode == 0
    if not made or not os.path.ismount(mount):
        pytest.skip("mounting a small disk needs root")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    target = small_disk / "model"
    with files.replacing(target, ours=ours) as temporary:
        fill(temporary, OLD)
    with pytest.raises(DataError, match="disk is full"), files.replacing(target, ours=ours) as temporary:
        (temporary / "weights").write_bytes(b"w" * 400_000)
    assert content(target) == OLD and os.listdir(small_disk) == ["model"]
    with pytest.raises(DataError, match="400,000 bytes needed"):
        files.write_atomic(small_disk / "file", b"w" * 400_000)
    assert os.listdir(small_disk) == ["model"]
    journal = small_disk / "journal.jsonl"
    journals.append_jsonl(journal, {"n": 0})
    with pytest.raises(DataError, match="disk is full"):
        journals.append_jsonl(journal, {"n": "x" * 400_000})
    assert journal.read_text() == '{"n": 0}\n'


WRITER = """
import sys
from formwright.kit import files
from formwright.kit import journal as journals
target, me, exchange = sys.argv[1], sys.argv[2], sys.argv[3] == "True"
if not exchange:
    files._exchange = lambda one, other: False
for _ in range(25):
    with files.replacing(target, ours=lambda p: (p / "formwright.json").exists()) as temporary:
        (temporary / "a").mkdir()
        (temporary / "formwright.json").write_text(me)
        (temporary / "a" / "b").write_text(me * 1000)
"""
APPENDER = """
import sys
from formwright.kit import files
from formwright.kit import journal as journals
for n in range(40):
    journals.append_jsonl(sys.argv[1], {"me": int(sys.argv[2]), "n": n, "pad": "p" * (n * 50)})
"""


def several(code: str, *arguments: object) -> list[subprocess.Popen[bytes]]:
    target, *others = map(str, arguments)
    return [subprocess.Popen([sys.executable, "-c", code, target, str(me), *others]) for me in range(3)]


@pytest.mark.parametrize("exchange", [True, False])
def test_several_writers_at_once(tmp_path: Path, exchange: bool) -> None:
    target = tmp_path / "model"
    fill(target, {"formwright.json": "9", "a/b": "9" * 1000})
    writers = several(WRITER, target, exchange)
    while any(writer.poll() is None for writer in writers):
        if exchange:  # the name is never missing, whoever looks
            assert target.is_dir()
        time.sleep(0.001)
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    me = (target / "formwright.json").read_text()
    assert me in "012" and (target / "a" / "b").read_text() == me * 1000
    files.recover(target)
    assert os.listdir(tmp_path) == ["model"]


def test_recover_leaves_the_living_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(tmp_path / "model.tmp-1", NEW)  # nobody holds it, whatever process 1 does
    fill(tmp_path / "model.tmp-backup", OLD)  # not a name of ours
    fill(tmp_path / "model2.tmp-1", OLD)  # another artifact's
    with files.replacing(target, ours=ours) as temporary:
        fill(temporary, NEW)
        files.recover(target)
        assert content(temporary) == NEW
    assert sorted(os.listdir(tmp_path)) == ["model", "model.tmp-backup", "model2.tmp-1"]


def test_recover_of_old_names(tmp_path: Path) -> None:
    target = tmp_path / "model"
    fill(tmp_path / "model.old-7", OLD)
    files.recover(target)
    assert content(target) == OLD
    fill(tmp_path / "model.old-8", NEW)
    files.recover(target)
    assert content(target) == OLD and os.listdir(tmp_path) == ["model"]
    files.recover(tmp_path / "nowhere" / "model")


def test_write_atomic(tmp_path: Path) -> None:
    target = tmp_path / "naïve 名前.txt"
    files.write_atomic(target, "grüße")
    assert target.read_bytes() == "grüße".encode()
    files.write_atomic(target, b"\x00\x01")
    assert target.read_bytes() == b"\x00\x01"
    (tmp_path / f"{target.name}.tmp-1").write_text("torn")
    files.recover(target)
    assert os.listdir(tmp_path) == [target.name]
    with pytest.raises(DataError, match="it is a directory, a file is wanted"):
        files.write_atomic(tmp_path, "x")
    with pytest.raises(DataError, match="No such file"):
        files.write_atomic(tmp_path / "missing" / "x", "x")
    assert files.sha256(target) == hashlib.sha256(b"\x00\x01").hexdigest()


def test_journal(tmp_path: Path) -> None:
    journal = tmp_path / "events.jsonl"
    assert journals.read_jsonl(journal) == []
    records = [{"n": 1, "name": "Ü\u2028"}, {"n": 2.5, "list": [1, None]}, {"big": "x" * 10_000}]
    for record in records:
        journals.append_jsonl(journal, record)
    assert journals.read_jsonl(journal) == records
    whole = journal.read_bytes()
    for cut in (1, 5, 4096, 9000):  # the machine stopped within the last line
        journal.write_bytes(whole[:-cut])
        kept = records if cut == 1 else records[:2]  # cut == 1: only the line end is missing
        assert journals.read_jsonl(journal) == kept
        journals.append_jsonl(journal, {"again": True})
        assert journals.read_jsonl(journal) == [*kept, {"again": True}]
    journal.write_bytes(whole + b"\x00" * 500)  # and a block of zeros after a power cut
    assert journals.read_jsonl(journal) == records
    journal.write_bytes(b'{"n": 1}\nnonsense\n{"n": 2}\n')
    with pytest.raises(DataError, match="line 2 is not a JSON object"):
        journals.read_jsonl(journal)


def test_journal_on_a_full_disk_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "events.jsonl"
    journals.append_jsonl(journal, {"n": 1})
    write = os.write

    def half(fd: int, data: memoryview) -> int:
        if len(data) < 10:
            full()
        return write(fd, data[: len(data) // 2])

    with monkeypatch.context() as patch, pytest.raises(DataError, match="disk is full"):
        patch.setattr(files.os, "write", half)
        journals.append_jsonl(journal, {"n": "x" * 100})
    assert journal.read_text() == '{"n": 1}\n'


def test_journal_of_several_writers(tmp_path: Path) -> None:
    journal = tmp_path / "events.jsonl"
    assert [writer.wait() for writer in several(APPENDER, journal)] == [0, 0, 0]
    records = journals.read_jsonl(journal)
    for me in range(3):
        assert [r["n"] for r in records if r["me"] == me] == list(range(40))


def test_lock(tmp_path: Path) -> None:
    run = tmp_path / "out.run"
    with journals.Lock(run):
        with pytest.raises(DataError, match=rf"in use by process {os.getpid()} on "):
            journals.Lock(run).acquire()
        assert (run / "lock").exists()
    assert os.listdir(run) == []
    with journals.Lock(run) as lock:
        lock.release()
        lock.release()


def test_a_killed_owner_does_not_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys, time; from formwright.kit.journal import Lock; Lock(sys.argv[1]).acquire(); "
        "print(1, flush=True); time.sleep(60)"
    )
    owner = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None and owner.stdout.readline() == "1\n"
    for locks in (True, False):  # with the kernel's locks, and by process id on a file system without
        with monkeypatch.context() as patch:
            if not locks:
                patch.setattr(journals, "_claim", lambda fd: None)
            with pytest.raises(DataError, match=f"in use by process {owner.pid} on "):
                journals.Lock(tmp_path).acquire()
    owner.kill()
    owner.wait()
    owner.stdout.close()
    left = (tmp_path / "lock").read_text()
    for locks in (True, False):
        (tmp_path / "lock").write_text(left)
        with monkeypatch.context() as patch:
            if not locks:
                patch.setattr(journals, "_claim", lambda fd: None)
            journals.Lock(tmp_path).acquire().release()
    (tmp_path / "lock").write_text("not json")
    with journals.Lock(tmp_path):
        assert f'"pid": {os.getpid()}' in (tmp_path / "lock").read_text()
