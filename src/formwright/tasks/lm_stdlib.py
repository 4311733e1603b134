"""``lm/stdlib``: bits per byte on the source and documentation of the running Python's standard library.

Nine megabytes of code and the half megabyte of prose behind ``help()``, on every machine without a download. Split by
module. Cost: 0.5 s of reading and splitting per process.
"""

from __future__ import annotations

from formwright.registry import register
from formwright.tasks import _stdlib
from formwright.tasks._lm import LanguageTask


@register("task", "lm/stdlib", summary="bits per byte of held-out standard-library source and documentation")
class StdlibLanguage(LanguageTask):
    """Bits per byte over the standard library; options as in ``lm``."""

    def __init__(self, length: int = 256, rows: int = 8, limit: int = 400_000, seed: int = 0) -> None:
        super().__init__(
            "lm/stdlib",
            [*_stdlib.modules(), *_stdlib.topics()],
            length=length,
            rows=rows,
            limit=limit,
            seed=seed,
            notes=[f"standard library of Python {_stdlib.version()}"],
        )
