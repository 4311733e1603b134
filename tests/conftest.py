"""What every test stands on: one thread, fixed seeds, poisoned memory, a closed network, and skips that are accounted.

Freshly allocated memory reads NaN (or the largest integer), so that a value used before it is written fails loudly.
Whoever skips a test writes the reason into ``SKIPS.md``; a skip without a row there is a failure.
"""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

HERE = Path(__file__).parent
#: Helpers shared by the tests of several folders are imported as ``conformance.samples`` and the like.
sys.path.insert(0, str(HERE))

# Read by the libraries that could download, none of which is imported yet.
os.environ.update(dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1"))

settings.register_profile(
    "formwright",
    deadline=None,
    max_examples=10,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("formwright")

torch.set_num_threads(1)
# Filling happens only under the deterministic mode; warn_only keeps operations that have no such form usable.
torch.utils.deterministic.fill_uninitialized_memory = True
torch.use_deterministic_algorithms(True, warn_only=True)


class NetworkClosed(OSError):
    """A test tried to reach another machine."""


_connect = socket.socket.connect


def _local_connect(self: socket.socket, address: Any) -> None:
    host = address[0] if isinstance(address, tuple) else "unix"
    if host not in ("127.0.0.1", "::1", "localhost", "unix"):
        raise NetworkClosed(f"tests reach no network, and one asked for {host}")
    return _connect(self, address)


@pytest.fixture(autouse=True)
def closed_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "connect", _local_connect)
    monkeypatch.setattr(socket.socket, "connect_ex", _local_connect)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept to be used again lies in a folder of the tests', not in the user's."""
    monkeypatch.setenv("FORMWRIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def fixed_seeds() -> Iterator[None]:
    """Every test starts from the same generators and leaves one thread behind."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(1)


def accounted(reason: str) -> bool:
    """Whether the ledger of skips has a row with this reason."""
    rows = [line.split("|") for line in (HERE / "SKIPS.md").read_text(encoding="utf-8").splitlines() if "|" in line]
    known = [cells[1].strip() for cells in rows if len(cells) > 3]
    return any(cell and reason.removeprefix("Skipped: ").startswith(cell) for cell in known[2:])


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not accounted(reason):
            report.outcome = "failed"
            report.longrepr = f"{item.nodeid} is skipped without a row in tests/SKIPS.md: {reason}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()
    if report.outcome == "skipped":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not accounted(reason):
            report.outcome = "failed"
            report.longrepr = f"{collector.nodeid} is skipped without a row in tests/SKIPS.md: {reason}"
