"""Published checkpoints that are spoiled, cut off, or describe what is not known: one clear sentence, never a trace."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from formwright.hub.huggingface import read
from formwright.kit.errors import DataError
from hub.families_small import BERT, LLAMA, make, save

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A good directory that a test may spoil."""
    return save(make("BertForSequenceClassification", {**BERT, "num_labels": 3}), tmp_path / "broken")


def refuse(directory: Path, *sentences: str) -> None:
    with pytest.raises(DataError) as caught:
        read(directory)
    for sentence in sentences:
        assert sentence in str(caught.value), str(caught.value)


def change(directory: Path, **keys: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config.update(keys)
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "gone"}))


def test_files_that_are_missing_or_spoiled(broken: Path, tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "is not a directory")
    weights = broken / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refuse(broken, "model.safetensors is cut off or not a safetensors file")
    weights.write_bytes(b"")
    refuse(broken, "model.safetensors is cut off or not a safetensors file")
    weights.unlink()
    refuse(broken, "has no model.safetensors")
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04never opened")
    refuse(broken, "pytorch_model.bin, a pickle file", "save_pretrained(OUT)")
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "one.safetensors"}}))
    refuse(broken, "lacks one.safetensors")
    save_file({"y": torch.zeros(1)}, broken / "one.safetensors")
    refuse(broken, "one.safetensors lacks tensors", "x")
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../one.safetensors"}}))
    refuse(broken, "which is no file name")
    (broken / "model.safetensors.index.json").write_text("{}")
    refuse(broken, "has no weight_map")
    (broken / "config.json").write_text("{not json")
    refuse(broken, "config.json is not JSON")
    (broken / "config.json").write_text("[1]")
    refuse(broken, "config.json must hold a JSON object, not a list")
    (broken / "config.json").unlink()
    refuse(broken, "config.json does not exist")


def test_tensors_that_do_not_fit_are_listed_at_once(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["bert.encoder.layer.0.attention.self.qeury.weight"] = tensors.pop(
        "bert.encoder.layer.0.attention.self.query.weight"
    )
    tensors["bert.encoder.layer.1.output.dense.bias"] = torch.zeros(7)
    del tensors["classifier.bias"]
    tensors["something.else"] = torch.zeros(2)
    save_file(tensors, broken / "model.safetensors")
    refuse(
        broken,
        "missing: bert.encoder.layer.0.attention.self.query.weight; "
        "the file has 'bert.encoder.layer.0.attention.self.qeury.weight'",
        "missing: classifier.bias",
        "unexpected: bert.encoder.layer.0.attention.self.qeury.weight",
        "unexpected: something.else",
        "wrong shape: bert.encoder.layer.1.output.dense.bias is [7], config.json says [32]",
    )


def test_numbers_that_are_none(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["classifier.weight"][1, 2] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    refuse(broken, "model.safetensors: tensor classifier.weight holds 1 values that are not finite numbers")


def test_configurations_that_are_wrong(broken: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model_type": "bart_"}, "unknown model_type 'bart_'; did you mean 'bert'"),
        ({"model_type": "gone"}, "has no model_type; known families: bert"),
        ({"model_type": "bert", "architectures": ["BertForQuestionAnswering"]}, "a head is never made up"),
        ({"architectures": ["BertModel"], "hidden_size": "32"}, "hidden_size must be a whole number"),
        ({"hidden_size": 32, "hidden_act": "gleu"}, "unknown activation 'gleu'; did you mean 'gelu'"),
        ({"hidden_act": "gelu", "num_attention_heads": 5}, "heads=5 does not divide width 32"),
        ({"num_attention_heads": 4, "position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"position_embedding_type": "absolute", "quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"quantization_config": None, "num_hidden_layers": 10**9}, "says 1000000000 layers"),
        ({"num_hidden_layers": 3}, "missing: bert.encoder.layer.2.attention.output.LayerNorm.bias"),
        ({"num_hidden_layers": 2, "layer_norm_eps": None, "vocab_size": -1}, "vocab_size must be a whole number"),
        ({"vocab_size": 90, "layer_norm_eps": "small"}, "layer_norm_eps must be a number"),
        ({"layer_norm_eps": 1e-12, "is_decoder": 1}, "is_decoder must be true or false"),
        ({"is_decoder": False, "add_cross_attention": True}, "add_cross_attention is not supported"),
    ]
    for keys, sentence in cases:
        change(broken, **keys)
        refuse(broken, "config.json", sentence)
    change(
        broken,
        add_cross_attention=False,
        architectures=["BertForSequenceClassification"],
        id2label={"a": "x", "b": "y"},
    )
    refuse(broken, "id2label must map numbers to names")


def test_a_rotary_scaling_that_is_unknown(tmp_path: Path) -> None:
    save(make("LlamaForCausalLM", {**LLAMA, "num_hidden_layers": 1}), tmp_path)
    change(tmp_path, rope_parameters={"rope_type": "spiral", "factor": 2.0})
    refuse(tmp_path, "rotary scaling 'spiral' is not known here")
    change(tmp_path, rope_parameters={"rope_type": "linear"})
    refuse(tmp_path, "rotary scaling 'linear' needs factor")


def test_weights_that_are_quantised(broken: Path) -> None:
    tensors = load_file(broken / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"].to(torch.int8)
    save_file(tensors, broken / "model.safetensors")
    refuse(broken, "tensor classifier.weight is stored as int8")


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    kinds = [
        ("BertForSequenceClassification", BERT),
        ("RobertaModel", BERT),
        ("GPT2LMHeadModel", {"vocab_size": 90, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40}),
        ("OPTForCausalLM", {**BERT, "word_embed_proj_dim": 16, "ffn_dim": 48}),
        ("LlamaForCausalLM", LLAMA),
        ("Qwen2ForCausalLM", LLAMA),
        ("T5EncoderModel", {"vocab_size": 90, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}),
        ("ViTModel", {**BERT, "image_size": 8, "patch_size": 4}),
    ]
    return [save(make(kind, options), tmp_path_factory.mktemp(kind)) for kind, options in kinds]


BESIDE = ("rope_scaling", "rope_theta", "id2label", "num_labels", "pruned_heads", "layer_types", "problem_type")
STRANGE = [None, -1, 0, 1.5, "x", "", [], {}, [1, 2], True, False, 10**12, math.nan, math.inf, {"rope_type": 5}]
STRANGE += [["a"], {"0": "a"}, {"type": "yarn", "factor": "x"}, {"type": "longrope", "short_factor": [1.0]}]


@settings(max_examples=150)
@given(data=st.data())
def test_any_value_of_any_key_is_read_or_refused(several: list[Path], data: st.DataObject) -> None:
    directory = data.draw(st.sampled_from(several))
    path = directory / "config.json"
    whole = path.read_text()
    try:
        config = json.loads(whole)
        key = data.draw(st.sampled_from(sorted(config) + list(BESIDE)))
        config[key] = data.draw(st.sampled_from(STRANGE))
        path.write_text(json.dumps(config))
        try:
            read(directory)
        except DataError as error:
            assert str(error)
    finally:
        path.write_text(whole)


@settings(max_examples=60)
@given(cut=st.floats(0, 0.999), flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=3))
def test_any_damage_to_the_weights_is_told(several: list[Path], cut: float, flips: list[tuple[float, int]]) -> None:
    path = several[0] / "model.safetensors"
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    spoiled = bytearray(whole)
    for place, value in flips:
        spoiled[int(place * header)] = value
    try:
        path.write_bytes(spoiled[: int(cut * len(spoiled))])
        with pytest.raises(DataError):
            read(several[0])
    finally:
        path.write_bytes(whole)
