"""What the tests of several ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from formwright.ops import native

LEVELS = range(1 + native.LEVELS.index(native.level() or "portable"))


@pytest.fixture(params=LEVELS, ids=[native.LEVELS[i] for i in LEVELS])
def level(request: pytest.FixtureRequest) -> Iterator[str | None]:
    """One instruction set of the compiled kernels after another; where nothing is built, None and the other forms."""
    yield native.level(request.param)
    native.level(len(native.LEVELS))
