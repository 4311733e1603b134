"""``formwright doctor``: what this machine can do, which kernels run, which extras are missing and what that costs."""

from __future__ import annotations

import importlib.util
from typing import Any

import typer

from formwright import registry
from formwright.cli.common import Json, emit
from formwright.registry import register

#: extra -> (what it is for, modules it brings)
EXTRAS = {
    "report": ("the interactive picture in report.html", ("plotly",)),
    "data": ("--data with Parquet files and saved data sets", ("pyarrow", "datasets")),
    "onnx": ("formwright export --format onnx", ("onnx", "onnxscript")),
    "ray": ("formwright slim --ray, a search spread over a cluster", ("ray",)),
}


def diagnose() -> dict[str, Any]:
    """Everything doctor knows, as plain data."""
    import torch

    from formwright.measure.machine import machine, memory_bytes
    from formwright.ops.int8_linear import backend

    missing = {
        extra: use
        for extra, (use, modules) in EXTRAS.items()
        if any(importlib.util.find_spec(m) is None for m in modules)
    }
    _total, free = memory_bytes()
    return {
        **machine(),
        "memory_free_gb": round(free / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "int8": backend(),
        "verbs": len(registry.names("verb")),
        "missing_extras": missing,
    }


@register("verb", "doctor", summary="what this machine can do, and what is missing")
def doctor(json: Json = False) -> None:
    """What this machine can do, which kernels run, and what is missing."""
    found = diagnose()
    if json:
        emit(found)
        return
    flags = ", ".join(flag.upper().replace("_", "-") for flag in found["flags"]) or "no vector extensions known"
    lines = [
        ("cpu", f"{found['cpu']} · {found['cores']} cores · {found['threads']} threads · {flags}"),
        ("memory", f"{found['memory_gb']} GB, {found['memory_free_gb']} GB free"),
        ("gpu", found["gpu"] or "none"),
        ("int8", found["int8"]),
        ("versions", f"formwright {found['formwright']} · torch {found['torch']} · python {found['python']}"),
        ("can run", f"{found['verbs']} of {found['verbs']} verbs"),
    ]
    for extra, use in found["missing_extras"].items():
        lines.append(("missing", f'{use}: pip install "formwright[{extra}]"'))
    for name, value in lines:
        typer.echo(f"  {name:<9} {value}")
