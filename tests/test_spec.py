"""Specs: plain data, equal after the round trip, and every complaint with its place and the nearest known name."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from formwright.kit.errors import SpecError
from formwright.spec import ModelSpec, SystemSpec, spec_from

STEM = {"part": "token-embedding", "vocab": 10, "width": 8}

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
objects = st.dictionaries(st.text(max_size=5), plain, max_size=3)


@given(
    layers=st.lists(objects, max_size=3),
    head=objects,
    conditioners=objects,
    shared=objects,
    final_norm=st.none() | objects,
    memory=st.lists(st.text(max_size=4), max_size=2),
)
def test_round_trip(**parts) -> None:
    spec = ModelSpec(stem=STEM, **parts)
    again = ModelSpec.from_json(spec.to_json())
    assert again == spec
    assert again.to_dict() == spec.to_dict() == json.loads(spec.to_json())
    assert spec_from(spec.to_json()) == spec_from(spec.to_dict()) == spec_from(spec) == spec


def test_a_spec_is_a_copy_and_plain() -> None:
    layers = [{"part": "mlp", "hidden": 4, "sizes": (1, 2)}]
    spec = ModelSpec(stem=STEM, layers=layers)
    layers[0]["hidden"] = 5
    assert spec.layers == [{"part": "mlp", "hidden": 4, "sizes": [1, 2]}]
    spec.to_dict()["layers"].clear()
    assert len(spec.layers) == 1
    with pytest.raises(SpecError, match=r"layers\[0\].x is a set; a spec holds plain data only"):
        ModelSpec(stem=STEM, layers=[{"x": {1}}])
    with pytest.raises(SpecError, match=r"layers\[0\].x is nan, which JSON cannot say"):
        ModelSpec(stem=STEM, layers=[{"x": float("nan")}])


def test_every_problem_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        ModelSpec(stem="tokens", layers={}, head="lm", defaults={"nrom": 1}, memory="encoder")
    said = str(caught.value)
    for sentence in (
        "stem must be {'part': NAME",
        "layers must be a list",
        "head must be an object, not 'lm'",
        "memory must be a list of names",
        "unknown key 'nrom'; did you mean 'norm'?",
    ):
        assert sentence in said
    with pytest.raises(SpecError) as caught:
        ModelSpec.from_dict({"stm": 1, "layer": []})
    assert "did you mean 'stem'" in str(caught.value)
    assert "did you mean 'layers'" in str(caught.value)
    assert "a model spec needs 'stem'" in str(caught.value)


@pytest.mark.parametrize("width", [None, 0, -1, "8", 8.0, True])
def test_width_is_a_positive_whole_number(width) -> None:
    with pytest.raises(SpecError, match=r"stem: width must be a positive whole number"):
        _ = ModelSpec(stem={"part": "linear", "width": width}, layers=[]).width


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"towers": 3}', '{"towers": {}}', '{"towers": {"a": 5}}', "null"])
def test_what_is_no_spec(text: str) -> None:
    with pytest.raises(SpecError):
        spec_from(text)
    with pytest.raises(SpecError):
        spec_from([1])


def test_systems() -> None:
    tower = {"stem": STEM, "layers": []}
    reader = {**tower, "memory": ["a"]}
    spec = SystemSpec({"a": tower, "b": "a", "c": reader})
    assert spec.output == "c"
    assert SystemSpec.from_json(spec.to_json()) == spec
    assert spec_from(spec.to_json()) == spec
    with pytest.raises(SpecError) as caught:
        SystemSpec({"a": reader, "b": "aa"}, output="x")
    said = str(caught.value)
    assert "tower 'a' reads memory 'a', which is no tower before it" in said
    assert "tower 'b': unknown tower 'aa'" in said
    assert "output: unknown tower 'x'" in said
    with pytest.raises(SpecError, match=r"unknown key of a system spec 'outputs'; did you mean 'output'"):
        SystemSpec.from_dict({"towers": {"a": tower}, "outputs": "a"})
    with pytest.raises(SpecError) as caught:
        SystemSpec({"a": {"stem": STEM, "layer": []}, "b": {"layers": []}})
    assert "tower 'a': unknown key of a model spec 'layer'" in str(caught.value)
    assert "tower 'b': a model spec needs 'stem'" in str(caught.value)
