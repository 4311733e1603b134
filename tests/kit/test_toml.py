"""TOML of plain data is equal after writing and reading."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formwright.kit import toml
from formwright.kit.errors import DataError, SpecError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
SCALARS = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=8
)


@given(st.dictionaries(TEXT, VALUES, max_size=5))
def test_round_trip(data):
    again = toml.plain(data)
    assert again == data
    assert toml.dumps(again) == toml.dumps(data)  # 1 and 1.0 and True are equal and not the same


def test_what_is_left_out_and_refused(tmp_path):
    assert toml.plain({"a": None, "b": {"c": None, "d": 1}, "e": [{"f": None}]}) == {"b": {"d": 1}, "e": [{}]}
    with pytest.raises(SpecError, match="no form for"):
        toml.dumps({"a": [None]})
    file = tmp_path / "x.toml"
    with pytest.raises(DataError, match=r"x\.toml cannot be read"):
        toml.read(file)
    file.write_text("a = \n")
    with pytest.raises(DataError, match=r"x\.toml is not TOML: .*line 1"):
        toml.read(file)
    file.write_bytes(b"a = '\xff'")
    with pytest.raises(DataError, match="is not UTF-8"):
        toml.read(file)
    assert [toml.value(text) for text in ("1e-3", "cosine", "[1, 2]", "true", '"7"')] == [
        1e-3, "cosine", [1, 2], True, "7",
    ]  # fmt: skip
