"""``mlm/stdlib``: hidden tokens of the running Python's standard library, guessed from both sides.

The texts and splits of ``lm/stdlib``. Cost: 0.5 s of reading and splitting per process.
"""

from __future__ import annotations

from formwright.registry import register
from formwright.tasks import _stdlib
from formwright.tasks._mlm import MaskedTask


@register("task", "mlm/stdlib", summary="hidden tokens of held-out standard-library source and documentation")
class StdlibMasked(MaskedTask):
    """Bits per masked token over the standard library.

    length: tokens a window. rows: windows a batch. limit: bytes of select and of test that are scored at most. rate:
    share of tokens hidden. unit: ``token``, ``word`` or ``span``. mask: id of the mask token, where the tokenizer does
    not say.
    """

    def __init__(
        self,
        length: int = 256,
        rows: int = 8,
        limit: int = 400_000,
        seed: int = 0,
        rate: float = 0.15,
        unit: str = "token",
        mask: int | None = None,
    ) -> None:
        super().__init__(
            "mlm/stdlib",
            [*_stdlib.modules(), *_stdlib.topics()],
            length=length,
            rows=rows,
            limit=limit,
            seed=seed,
            rate=rate,
            unit=unit,
            mask=mask,
            notes=[f"standard library of Python {_stdlib.version()}"],
        )
