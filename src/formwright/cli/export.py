"""``formwright export``: a model as a file of another kind."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from formwright.cli.common import Model, Plugin, load, say
from formwright.registry import register


@register("verb", "export", summary="a model or an adapter as a file of another kind")
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", help="the directory or file to write")],
    format: Annotated[str, typer.Option("--to", "--format", help="huggingface, onnx or peft")] = "huggingface",
    adapter: Annotated[
        list[str] | None,
        typer.Option("--adapter", help="a directory with an adapter to load first, or for peft the name of one held"),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="say int8 and low-rank slots as plain floats")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what is there")] = False,
    plugin: Plugin = None,
) -> None:
    """A model as a Hugging Face directory or an ONNX file, an adapter as a directory of peft, or why it cannot be."""
    from formwright import registry
    from formwright.hub import export as write

    registry.find("export", format)
    options: dict[str, Any] = {name: True for name, on in (("dequantize", dequantize), ("overwrite", overwrite)) if on}
    directories = [one for one in adapter or () if format != "peft" or Path(one).is_dir()]
    held = [one for one in adapter or () if one not in directories]
    if held:
        options["adapter"] = held[-1]
    write(load(model, plugin, directories), out, format, **options)
    say(f"  wrote {out}")
