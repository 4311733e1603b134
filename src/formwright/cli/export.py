"""``formwright export``: a model as a file of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from formwright.cli.common import Model, Plugin, load, say
from formwright.registry import register


@register("verb", "export", summary="a model as a Hugging Face directory or an ONNX file")
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="the directory or file to write")],
    format: Annotated[str, typer.Option("--format", help="huggingface or onnx")] = "huggingface",
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="say int8 and low-rank slots as plain floats")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    plugin: Plugin = None,
) -> None:
    """A model as a Hugging Face directory or an ONNX file, or a refusal with the reason."""
    from formwright import registry
    from formwright.hub import export as write

    registry.find("export", format)
    options = {name: True for name, on in (("dequantize", dequantize), ("overwrite", overwrite)) if on}
    write(load(model, plugin), out, format, **options)
    say(f"  wrote {out}")
