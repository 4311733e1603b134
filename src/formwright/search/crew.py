"""The crew: who works out what a search asks for, this process or the workers of a Ray cluster.

    for found in crew.run(Bench.losses, [(items, precision), ...]):     in the order of the calls

In this process a call is carried out when its result is asked for, and nothing is done ahead. On a cluster every call
is a task of Ray with as many processors as this process has threads. Workers share no disk with it: the model travels
as the files that it is saved as, put into Ray's store once, plug-ins as their source, the task by Ray's own pickling;
a worker that has unpacked them keeps them for its next call. A call whose worker dies is tried twice more and then
:class:`Lost`, which costs one candidate and never the search. Nothing here is a time that is compared with another:
the latency of another machine would say nothing about this one.
"""

from __future__ import annotations

import functools
import importlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from formwright import registry
from formwright.kit.errors import DataError, FormwrightError, SpecError, all_of
from formwright.models.model import Model
from formwright.search.bench import Bench

#: Seconds for an address to answer, for a cluster behind it to be one, and for each of its machines to answer.
REACH, MEET, READY = 10.0, 60.0, 120.0
#: How often a call is tried again whose worker died.
RETRIES = 2
#: Connects and leaves, in a process of its own: at a port that is not Ray's, Ray goes on trying for a quarter of an
#: hour and cannot be stopped from within.
PROBE = """
import ray, sys
try:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="error")
    ray.shutdown()
except Exception as error:
    print(error)
    sys.exit(1)
"""


@dataclass(frozen=True)
class Lost:
    """Stands in the place of a result that will not come; ``why`` is a sentence."""

    why: str


class Crew:
    """This process. ``size`` calls are carried out at the same time; ``away``: elsewhere."""

    size, away = 1, False

    def take(self, bench: Bench) -> None:
        """What calls are about from now on."""
        self.bench = bench

    def run(self, function: Callable[..., Any], calls: Sequence[tuple], seconds: float | None = None) -> Iterator[Any]:
        """``function(bench, *call)`` for each call, in order. Arguments and results are plain data and models.

        seconds: how long others are waited for; what they do not bring is :class:`Lost`.
        """
        for call in calls:
            yield function(self.bench, *call)

    def ahead(self, function: Callable[..., Any], calls: Sequence[tuple], seconds: float | None = None) -> list[Any]:
        """What others found by :meth:`run` before it is needed. Without others, None for each: work it out then."""
        return [None] * len(calls)

    def words(self) -> str:
        """A line that says who works where it is not this process; empty otherwise."""
        return ""

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *reason: Any) -> None:
        pass


def hire(address: str | None) -> Crew:
    """The crew at a Ray address: ``local`` (one that is started here), ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``;
    None is this process. A program that is connected to a Ray already goes on with that one.

    Raises: SpecError, DataError where there is no Ray, no cluster, or one with other versions.
    """
    return Crew() if address is None else Cluster(address)


class Cluster(Crew):
    """The workers of a Ray cluster."""

    away = True

    def __init__(self, address: str) -> None:
        self.address = address
        self.waiting: list[Any] = []
        self.ray, self.ours = connect(address)
        try:
            self._count()
            self._check()
        except BaseException:
            self.close()
            raise

    def take(self, bench: Bench) -> None:
        """Send the bench; DataError where a worker cannot unpack it."""
        super().take(bench)
        try:
            task = self.ray.cloudpickle.dumps(bench.task)
        except Exception as error:
            raise DataError(
                f"--ray {self.address}: task {bench.task.name} cannot be sent to a worker: {error}"
            ) from None
        parcel = Parcel(pack(bench.original), task, bench.seed, sources())
        # In a list, Ray hands on the reference and not what it stands for: a worker fetches that once, not every call.
        self.held = [self.ray.put(parcel)]
        answers = self._everywhere(_work, self.held, self.threads, _nothing)
        lost = [f"worker on {name}: {found.why}" for found, name in answers if isinstance(found, Lost)]
        all_of(DataError, [f"--ray {self.address}: {line}" for line in lost])

    def run(self, function: Callable[..., Any], calls: Sequence[tuple], seconds: float | None = None) -> Iterator[Any]:
        task = self.ray.remote(num_cpus=self.threads, max_retries=RETRIES)(_work)
        sent: dict[int, Any] = {}
        for value in (value for call in calls for value in call if isinstance(value, Model)):
            if id(value) not in sent:
                sent[id(value)] = self.ray.put(pack(value))
        packed = [[sent.get(id(value), value) for value in call] for call in calls]
        yield from self._results([task.remote(self.held, self.threads, function, *call) for call in packed], seconds)

    def ahead(self, function: Callable[..., Any], calls: Sequence[tuple], seconds: float | None = None) -> list[Any]:
        return list(self.run(function, calls, seconds))

    def _results(
        self, asked: list[Any], seconds: float | None, expected: type[Exception] = FormwrightError
    ) -> Iterator[Any]:
        """What comes of references, in order; ``expected`` errors lose the call they belong to, others are raised."""
        errors = self.ray.exceptions
        self.waiting = asked
        until = None if seconds is None else time.monotonic() + seconds
        try:
            while self.waiting:
                found: Any
                try:
                    left = None if until is None else max(0.0, until - time.monotonic())
                    found = arrived(self.ray.get(self.waiting[0], timeout=left))
                except errors.GetTimeoutError:
                    found = Lost("its worker is not back in time")
                    self.ray.cancel(self.waiting[0])
                except errors.RayTaskError as error:
                    if not isinstance(error.cause, expected):
                        raise
                    found = Lost(one_line(error.cause))
                except errors.RayError as error:
                    found = Lost(f"its worker died ({type(error).__name__})")
                self.waiting.pop(0)
                yield found
        finally:
            self._cancel()

    def _cancel(self) -> None:
        """Call back what is not done. Not by force: Ray may fall over a task that is killed as it ends."""
        for reference in self.waiting:
            self.ray.cancel(reference)
        self.waiting = []

    def words(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"Ray {self.address}: {self.size} worker{'s' if self.size > 1 else ''} of {threads}; timing stays here"

    def close(self) -> None:
        """Leave the cluster, with nothing of ours still running on it; one that was started here is stopped."""
        self._cancel()
        if self.ours:
            self.ray.shutdown()

    def __exit__(self, *reason: Any) -> None:
        self.close()

    # ------------------------------------------------------------------ the machines

    def _count(self) -> None:
        """Workers have this process's thread budget, or what the largest machine has."""
        cores = {
            node["NodeID"]: (node["NodeManagerAddress"], int(node["Resources"].get("CPU", 0)))
            for node in self.ray.nodes()
            if node["Alive"]
        }
        self.threads = min(torch.get_num_threads(), max((count for _, count in cores.values()), default=0))
        if self.threads < 1:
            raise DataError(f"--ray {self.address}: the cluster has no processors; add a machine to it")
        self.machines = {key: name for key, (name, count) in cores.items() if count >= self.threads}
        self.size = sum(count // self.threads for _, count in cores.values())

    def _check(self) -> None:
        """DataError unless every machine has the versions of this one."""

        # Pickled by value, as a function inside another is: a machine without the package must be able to say so.
        def versions() -> str:
            import torch

            import formwright

            return f"formwright {formwright.__version__} and torch {torch.__version__}"

        mine = versions()
        told = [(found.why if isinstance(found, Lost) else found, name) for found, name in self._everywhere(versions)]
        wrong = [f"worker on {name}: {found}; it needs {mine}" for found, name in told if found != mine]
        all_of(DataError, [f"--ray {self.address}: {line}" for line in wrong])

    def _everywhere(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[Any, str]]:
        """One call on every machine that has workers -> its result, or Lost, and the machine's name."""
        on = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        task = self.ray.remote(num_cpus=self.threads, max_retries=RETRIES)(function)
        asked = [task.options(scheduling_strategy=on(node, soft=False)).remote(*arguments) for node in self.machines]
        return list(zip(self._results(asked, READY, Exception), self.machines.values()))


def connect(address: str) -> tuple[Any, bool]:
    """(the package ray, connected; whether this did it)."""
    try:
        ray = importlib.import_module("ray")
    except ImportError:
        raise DataError(f'--ray {address}: Ray is not installed: pip install "formwright[ray]"') from None
    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        options["include_dashboard"] = False
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would tell its makers of every start
    else:
        reach(address)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(address=address, **options)
    except Exception as error:
        raise DataError(f"--ray {address}: {one_line(error)}") from None
    return ray, True


def reach(address: str) -> None:
    """SpecError or DataError unless a Ray cluster answers at ``address``, in bounded time."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address != "auto":
        if not host or not port.isdigit():
            raise SpecError(f"--ray {address}: give local, auto, HOST:PORT or ray://HOST:PORT")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH).close()
        except (OSError, OverflowError, UnicodeError) as error:
            why = getattr(error, "strerror", None) or error
            raise DataError(f"--ray {address}: nothing answers there ({why}); check the address") from None
    try:
        probe = subprocess.run([sys.executable, "-c", PROBE, address], capture_output=True, text=True, timeout=MEET)
    except subprocess.TimeoutExpired:
        raise DataError(
            f"--ray {address}: what answers there is no Ray cluster, or does not let this machine in within {MEET:.0f} "
            "s; a machine that is not part of the cluster gives ray://HOST:10001"
        ) from None
    if probe.returncode:
        why = one_line(probe.stdout).rstrip(".") or "Ray cannot connect"
        raise DataError(f"--ray {address}: {why}; a cluster that asks for a token needs RAY_AUTH_MODE=token set here")


def one_line(error: Any) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------------- what travels


@dataclass(frozen=True)
class Packed:
    """A model as the files that it is saved as."""

    name: str
    files: dict[str, bytes]


@dataclass(frozen=True)
class Parcel:
    """A bench, with the plug-ins it needs as (module, file name, source)."""

    original: Packed
    task: bytes
    seed: int
    plugins: list[tuple[str, str, bytes]]


def pack(model: Any) -> Packed:
    from formwright.hub import save

    with tempfile.TemporaryDirectory(prefix="formwright-") as folder:
        place = save(model, Path(folder, "model"))
        files = {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}
    return Packed(model.name, files)


def unpack(packed: Packed, plugins: Sequence[str] = ()) -> Any:
    from formwright.hub import load

    with tempfile.TemporaryDirectory(prefix="formwright-") as folder:
        for name, content in packed.files.items():
            place = Path(folder, "model", name)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
        model = load(Path(folder, "model"), plugin=plugins)
    model.name = packed.name
    return model


def departing(value: Any) -> Any:
    """A result with its models packed; :func:`arrived` is the way back."""
    if isinstance(value, tuple):
        return tuple(map(departing, value))
    return pack(value) if isinstance(value, Model) else value


def arrived(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(arrived, value))
    return unpack(value) if isinstance(value, Packed) else value


def sources() -> list[tuple[str, str, bytes]]:
    """The plug-ins of this process: files outside the package, which no worker has."""
    modules = [module for name, module in sys.modules.items() if name.startswith("formwright_plugin_")]
    files = [(module.__name__, Path(module.__file__)) for module in modules if module.__file__]
    return [(name, file.name, file.read_bytes()) for name, file in files if file.is_file()]


# ---------------------------------------------------------------------- at a worker


def _nothing(bench: Bench) -> None:
    """Shows that a worker can unpack the bench."""


def _work(held: Sequence[Any], threads: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a task of Ray runs: ``function`` of the bench that was put into the store, models unpacked and packed."""
    torch.set_num_threads(threads)
    try:
        bench, plugins = _unpacked(held[0])
        with registry.only_plugins(plugins):
            call = [unpack(value, plugins) if isinstance(value, Packed) else value for value in arguments]
            return departing(function(bench, *call))
    except KeyboardInterrupt:
        # Called back: what was being imported or changed is half done, so this process serves no further call.
        raise SystemExit(1) from None


@functools.lru_cache(maxsize=1)
def _unpacked(reference: Any) -> tuple[Bench, list[str]]:
    """The bench, and the files of its plug-ins here; made once a process and search."""
    ray = importlib.import_module("ray")
    parcel = ray.get(reference)
    files = [_plugin(*plugin) for plugin in parcel.plugins]
    original = unpack(parcel.original, files)
    return Bench(original, ray.cloudpickle.loads(parcel.task), parcel.seed), files


def _plugin(name: str, file: str, source: bytes) -> str:
    """A plug-in loaded from its source under the name of the module that it was, which pickles refer to."""
    if name not in sys.modules:
        with tempfile.TemporaryDirectory(prefix="formwright-") as folder:
            Path(folder, file).write_bytes(source)
            sys.modules[name] = registry.load_plugin(str(Path(folder, file)))
    return str(sys.modules[name].__file__)
