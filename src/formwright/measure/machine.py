"""The machine a figure was measured on, as plain data: processor, threads, memory, versions, load."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

#: Processor features that decide which kernels run.
FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "asimd", "i8mm", "bf16")


def processor() -> tuple[str, list[str]]:
    """(name, features) of the processor, as far as the system tells."""
    name, flags = platform.processor() or platform.machine(), set()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                name = value.strip() or name
            elif key.strip() in ("flags", "Features"):
                flags.update(value.split())
    return name, [feature for feature in FEATURES if feature in flags]


def memory_bytes() -> tuple[int, int]:
    """(total, available) bytes of memory; zeros where the system does not tell."""
    info = Path("/proc/meminfo")
    if info.is_file():
        found = {}
        for line in info.read_text(encoding="ascii", errors="replace").splitlines():
            key, _, value = line.partition(":")
            found[key] = int(value.split()[0]) * 1024 if value.split() else 0
        return found.get("MemTotal", 0), found.get("MemAvailable", 0)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0
    except (ValueError, OSError, AttributeError):
        return 0, 0


def machine() -> dict[str, Any]:
    """Everything a reader needs to judge a figure."""
    import torch

    from formwright import __version__
    from formwright.measure.timing import load_average

    name, features = processor()
    return {
        "cpu": name,
        "flags": features,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_bytes()[0] / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "formwright": __version__,
        "load": round(load_average(), 2),
    }
