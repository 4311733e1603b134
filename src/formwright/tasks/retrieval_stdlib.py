"""``retrieval/stdlib``: find the function of Python's standard library that a docstring summary describes.

The query is the summary, the document the function's source without its docstring; both are real, on every machine,
and no model was tuned on exactly this form. Same-named methods make it hard: BM25 gets about two thirds of what a
small encoder gets. Split by module, so that sibling methods never stand on both sides. Cost: 5 s of parsing per
process.
"""

from __future__ import annotations

from typing import Literal

from formwright.registry import register
from formwright.tasks import _stdlib
from formwright.tasks._retrieval import Pair, RetrievalTask

#: calibrate, select, test: on Python 3.11 each of them can hold a pool of 1,500 documents.
SHARES = (0.36, 0.27, 0.37)


@register("task", "retrieval/stdlib", summary="find the standard-library function that a docstring summary describes")
class StdlibRetrieval(RetrievalTask):
    """Docstring summary to source over the running Python's standard library; see the module's docstring.

    pool: documents per pool; 1,500 by default, 500 for a quicker look. Python versions differ in their library, so the
    fingerprint does too.
    """

    def __init__(
        self, pool: int = 1500, seed: int = 0, rows: int = 32, similarity: Literal["cosine", "dot"] = "cosine"
    ) -> None:
        pairs = [Pair(summary, source, module) for module, summary, source in _stdlib.functions()]
        super().__init__(
            "retrieval/stdlib",
            pairs,
            shares=SHARES,
            seed=seed,
            pool=pool,
            similarity=similarity,
            rows=rows,
            notes=[f"standard library of Python {_stdlib.version()}"],
        )
        judged = {text for split in ("select", "test") for text in self.parts[split].documents}
        self._left_out = {pair.unit for pair in pairs if pair.document in judged}
        self._judged = judged

    def texts(self, split: str) -> list[str]:
        """As everywhere; for *calibrate* also the functions without a summary, of modules that are not judged."""
        found = super().texts(split)
        if split != "calibrate":
            return found
        return found + [text for text in _stdlib.unlabelled(self._left_out) if text not in self._judged]
