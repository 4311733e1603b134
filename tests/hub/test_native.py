"""Our own directories: what is saved loads equal, strictly, from whole files, whatever happened to the writer."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import formwright as fw
from formwright import registry
from formwright.hub import native, tensors
from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.models.batch import Batch, pad
from formwright.models.model import Entry
from formwright.models.tokenizer import Tokenizer
from formwright.surgery.base import Surgery

ENCODER: dict[str, Any] = {
    "stem": {
        "part": "token-embedding",
        "vocab": 40,
        "width": 16,
        "positions": {"kind": "learned", "max": 32},
        "types": 2,
        "norm": {"part": "layernorm"},
    },
    "defaults": {"norm": {"part": "layernorm"}, "order": "post"},
    "layers": [{"repeat": 2, "layers": [{"part": "attention", "heads": 2}, {"part": "mlp", "hidden": 24}]}],
    "head": {"part": "mean-pool", "normalize": True},
}
DECODER: dict[str, Any] = {
    "stem": {"part": "token-embedding", "vocab": 40, "width": 16},
    "defaults": {"norm": {"part": "rmsnorm"}},
    "layers": [
        {
            "repeat": 2,
            "layers": [
                {"part": "attention", "heads": 2, "kv_heads": 1, "causal": True, "rotary": {}},
                {"part": "gated-mlp", "hidden": 24},
            ],
        }
    ],
    "final_norm": "rmsnorm",
    "head": {"part": "lm", "tied": True, "bias": True},
}
CLASSIFIER = {**ENCODER, "head": {"part": "sequence-classifier", "classes": 2, "labels": ["spam", "ham"]}}


def varied(spec: Any, seed: int = 0) -> Any:
    """A model whose zeros and ones are drawn too, so that no tensor could be forgotten unseen."""
    model = fw.build(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def batch(model: Any, rows: list[list[int]] | None = None) -> Batch:
    tokens, lengths = pad(rows or [[1, 2, 3, 4, 5], [6, 7], [8]])
    return Batch(inputs={model.stem.field(): tokens}, lengths={model.stem.field(): lengths})


def outputs(model: Any, given: Batch | None = None) -> Any:
    with torch.no_grad():
        return model(given if given is not None else batch(model))


def same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return set(one) == set(other) and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other)


def content(directory: Path) -> dict[str, bytes]:
    return {f.relative_to(directory).as_posix(): f.read_bytes() for f in directory.rglob("*") if f.is_file()}


def edit(directory: Path, **changes: Any) -> None:
    path = directory / native.RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    fw.save(varied(ENCODER), tmp_path / "model")
    return tmp_path / "model"


# ---------------------------------------------------------------------- equal again


@pytest.mark.parametrize("spec", [ENCODER, DECODER, CLASSIFIER])
def test_loads_bit_equal(tmp_path: Path, spec: dict) -> None:
    model = varied(spec)
    fw.save(model, tmp_path / "m")
    again = fw.load(tmp_path / "m")
    assert same(outputs(model), outputs(again))
    assert again.spec == model.spec and again.layout() == model.layout() and not again.training
    assert again.labels == model.labels and again.name == "m"
    assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]


NORMS = st.sampled_from([{"part": "layernorm"}, {"part": "rmsnorm"}])
LAYERS = st.one_of(
    st.builds(
        lambda heads, causal, rotary: {
            "part": "attention",
            "heads": heads,
            "causal": causal,
            **({"rotary": {}} if rotary else {}),
        },
        st.sampled_from([1, 2, 4]),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(lambda n: {"part": "mlp", "hidden": n}, st.integers(1, 9)),
    st.builds(
        lambda n, order: {"part": "gated-mlp", "hidden": n, "order": order},
        st.integers(1, 9),
        st.sampled_from(["pre", "post", "sandwich"]),
    ),
    st.just({"use": "A"}),
    st.just({"bare": {"part": "layernorm"}}),
    st.just({"part": "mlp", "hidden": 4, "combine": {"part": "add", "scale": 0.1, "learned": True}}),
    st.just({"part": "mlp", "hidden": 4, "combine": "gated", "id": "mine"}),
)
LISTS = st.lists(
    st.one_of(
        LAYERS,
        st.builds(
            lambda inner, n: {"repeat": n, "layers": inner}, st.lists(LAYERS, min_size=1, max_size=2), st.integers(0, 2)
        ),
        st.builds(
            lambda inner, n: {"loop": n, "layers": inner}, st.lists(LAYERS, min_size=1, max_size=2), st.integers(1, 2)
        ),
    ),
    max_size=3,
)
HEADS = st.sampled_from(
    [
        {"part": "mean-pool"},
        {"part": "states"},
        {"part": "lm", "tied": True, "bias": True, "transform": {"activation": "gelu", "norm": "layernorm"}},
        {"part": "lm", "vocab": 13},
        {"words": {"part": "lm", "tied": True}, "topic": {"part": "sequence-classifier", "classes": 3}},
    ]
)
SPECS = st.fixed_dictionaries(
    {
        "stem": st.sampled_from(
            [
                {"part": "token-embedding", "vocab": 40, "width": 8},
                {"part": "token-embedding", "vocab": 40, "width": 8, "positions": {"kind": "sinusoidal"}},
                {"part": "token-embedding", "vocab": 40, "width": 8, "types": 2, "norm": "layernorm"},
            ]
        ),
        "defaults": st.fixed_dictionaries({"norm": NORMS, "order": st.sampled_from(["pre", "post", "sandwich"])}),
        "layers": LISTS,
        "shared": st.just({"A": [{"part": "mlp", "hidden": 3}, {"part": "attention", "heads": 2}]}),
        "final_norm": st.sampled_from([None, "rmsnorm"]),
        "head": HEADS,
    }
)


@settings(max_examples=25)
@given(spec=SPECS)
def test_any_spec_loads_bit_equal(tmp_path: Path, spec: dict) -> None:
    model = varied(spec)
    fw.save(model, tmp_path / "m")
    assert same(outputs(model), outputs(fw.load(tmp_path / "m")))


def test_systems_load_bit_equal_and_keep_what_is_shared(tmp_path: Path) -> None:
    tower = {**DECODER, "head": {"part": "states"}, "layers": [{"part": "attention", "heads": 2}]}
    reader = {
        **DECODER,
        "stem": {"use": "encoder.stem", "width": 16},
        "layers": [
            {"part": "attention", "heads": 2, "causal": True},
            {"part": "attention", "heads": 2, "memory": "encoder"},
        ],
        "memory": ["encoder"],
    }
    model = varied({"towers": {"encoder": tower, "again": "encoder", "decoder": reader}})
    fw.save(model, tmp_path / "m")
    again = fw.load(tmp_path / "m")
    tokens, lengths = pad([[1, 2, 3], [4, 5]])
    both = Batch(
        inputs={"encoder.tokens": tokens, "decoder.tokens": tokens},
        lengths={"encoder.tokens": lengths, "decoder.tokens": lengths},
    )
    assert same(outputs(model, both), outputs(again, both))
    stems = [again.tower(name).stem.tokens.weight for name in ("encoder", "decoder")]
    assert stems[0] is stems[1] and again.tower("again") is again.tower("encoder")
    assert again.tower("decoder").heads["out"].table is again.tower("decoder").stem.tokens
    assert sum("stem.tokens" in name for name in load_file(tmp_path / "m/model.safetensors")) == 1


SURGERIES = [
    (name, index, kind)
    for name in registry.names("surgery")
    for index in range(len(registry.resolve("surgery", name).examples))
    for kind in ("encoder", "decoder")
]


@pytest.mark.parametrize(("name", "index", "kind"), SURGERIES)
def test_after_every_surgery_it_loads_bit_equal(tmp_path: Path, name: str, index: int, kind: str) -> None:
    model = varied({"encoder": ENCODER, "decoder": DECODER}[kind])
    rows = [[1, 2, 3, 4, 5, 6], [7, 8, 9], [10]]
    by = registry.resolve("surgery", name)
    try:
        if by.after:
            before = registry.resolve("surgery", by.after)
            fw.apply(model, by.after, rows, **before.examples[0])
        fw.apply(model, name, rows, **by.examples[index])
    except Refusal:
        return  # that this model cannot have it is the surgery's own test
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.rand_like(parameter) * 0.1)
    fw.save(model, tmp_path / "m")
    again = fw.load(tmp_path / "m")
    assert same(outputs(model), outputs(again))
    assert again.layout() == model.layout()
    assert {n: p.requires_grad for n, p in again.named_parameters()} == {
        n: p.requires_grad for n, p in model.named_parameters()
    }
    assert {n: (t.dtype, t.shape) for n, t in again.state_dict().items()} == {
        n: (t.dtype, t.shape) for n, t in model.state_dict().items()
    }


def test_saving_twice_gives_identical_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        fw.save(varied(ENCODER), tmp_path / name, task="retrieval/stdlib", scores={"mrr@10/50": 0.5})
    fw.save(fw.load(tmp_path / "a"), tmp_path / "c", task="retrieval/stdlib", scores={"mrr@10/50": 0.5})
    a, b, c = (content(tmp_path / name) for name in "abc")
    assert a == b
    assert {**a, native.RECORD: b""} == {**c, native.RECORD: b""}


def test_half_precision_frozen_parameters_and_devices_are_kept(tmp_path: Path) -> None:
    model = varied(ENCODER).to(torch.bfloat16)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("attention" in name)
    fw.save(model, tmp_path / "m")
    again = fw.load(tmp_path / "m")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad == ("attention" in name) for name, p in again.named_parameters())
    assert {p.dtype for p in fw.load(tmp_path / "m", dtype="float32").parameters()} == {torch.float32}
    with pytest.raises(SpecError, match="no float type"):
        fw.load(tmp_path / "m", dtype="int8")


def test_text_settings_labels_and_provenance_are_kept(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    def words(*names: str, **settings: Any) -> Tokenizer:
        backend = Backend(WordLevel({name: index for index, name in enumerate(names)}, unk_token=names[0]))
        backend.pre_tokenizer = Whitespace()
        return Tokenizer(backend, settings=settings)

    model = varied(CLASSIFIER)
    model.tokenizer, model.max_length = words("[U]", "a", "b", pad_token="b"), 7
    model.prompts = {"query": "query: "}
    model.head().labels = ["no", "yes"]
    model.source = {"config": {"x": [1, None]}, "files": {"a.txt": b"text", "b": b"\xff"}, "w": torch.arange(3.0)}
    model.history.append(Entry("event", "trained", {"loss": 0.25, "steps": 3}))
    fw.save(model, tmp_path / "m")
    again = fw.load(tmp_path / "m")
    assert again.predict(["a b", "b"]) == model.predict(["a b", "b"])
    assert again.tokenizer.settings == {"pad_token": "b"} and again.tokenizer.pad_id == 2
    assert again.tokenizer.files == model.tokenizer.files and again.max_length == 7
    assert again.prompts == {"query": "query: "} and again.labels == ["no", "yes"]
    assert again.history == model.history
    assert torch.equal(again.source.pop("w"), model.source.pop("w")) and again.source == model.source

    system = fw.build({"towers": {"a": ENCODER, "b": ENCODER, "c": ENCODER}})
    system.tower("a").tokenizer = system.tower("b").tokenizer = model.tokenizer
    system.tower("c").tokenizer = words("x", "y")
    system.tower("b").max_length = 3
    fw.save(system, tmp_path / "s")
    system = fw.load(tmp_path / "s")
    assert system.tower("a").tokenizer is system.tower("b").tokenizer
    assert system.tower("c").tokenizer.encode(["y y x"]) == [[1, 1, 0]]
    assert system.tower("b").max_length == 3 and system.tokenizer is None


def test_records_beside_the_model(saved: Path) -> None:
    fw.save(varied(ENCODER), saved, task="t", metric="m", scores={"m": 0.5, "fingerprint": "ab"}, command="slim")
    assert native.manifest(saved)["scores"] == {"m": 0.5, "fingerprint": "ab"}
    with pytest.raises(SpecError, match="unknown record of a saved model 'metrik'; did you mean 'metric'"):
        fw.save(varied(ENCODER), saved, metrik="m")
    with pytest.raises(SpecError, match="JSON cannot say"):
        fw.save(varied(ENCODER), saved, scores={"m": {1, 2}})
    with pytest.raises(SpecError, match="JSON cannot say"):
        fw.save(varied(ENCODER), saved, scores={"m": float("nan")})


def test_shards(tmp_path: Path) -> None:
    model = varied(ENCODER)
    native.write(model, tmp_path / "m", shard_size=4_000)
    names = sorted(f.name for f in (tmp_path / "m").glob("*.safetensors"))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    index = json.loads((tmp_path / "m/model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {name for name, _ in model.named_parameters()}
    assert same(outputs(model), outputs(fw.load(tmp_path / "m")))
    (tmp_path / "m" / names[1]).unlink()
    with pytest.raises(DataError, match=rf"{names[1]} is missing"):
        fw.load(tmp_path / "m")


# ---------------------------------------------------------------------- refusing to save


def test_nan_weights_are_not_saved_and_the_earlier_model_stays(saved: Path) -> None:
    before = content(saved)
    for value in (float("nan"), float("inf")):
        model = varied(ENCODER)
        with torch.no_grad():
            model.slot("b1.attention:q").weight[1, 2] = value
        with pytest.raises(DataError, match=r"NaN or infinite values in b1\.attention\.part\.q\.weight: not saved"):
            fw.save(model, saved)
    assert content(saved) == before


def test_files_are_as_public_as_their_directory(saved: Path) -> None:
    if os.name == "posix":
        assert {f.stat().st_mode & 0o777 for f in saved.iterdir()} == {saved.stat().st_mode & 0o666}


def test_large_finite_values_are_not_taken_for_infinite() -> None:
    assert tensors.finite(torch.full((4,), 3e38)) and tensors.finite(torch.full((9,), 6e4, dtype=torch.float16))
    assert not tensors.finite(torch.tensor([3e38, 3e38, float("-inf")]))
    assert tensors.finite(torch.zeros(0)) and tensors.finite(torch.tensor([1]))


def test_a_model_changed_outside_surgeries_is_not_saved(tmp_path: Path) -> None:
    model = varied(ENCODER)
    model.residuals()[0].drop()
    with pytest.raises(DataError, match=r"not what its spec and history say: tensor .* is missing"):
        fw.save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    with pytest.raises(DataError, match="laid out on meta"):
        fw.save(fw.build(ENCODER, device="meta"), tmp_path / "m")


def test_only_our_directories_are_replaced_and_what_is_not_the_model_stays(tmp_path: Path, saved: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("years of work")
    with pytest.raises(DataError, match="not empty and was not written by formwright"):
        fw.save(varied(ENCODER), tmp_path / "thesis")
    fw.save(varied(ENCODER), tmp_path / "thesis", overwrite=True)
    assert not (tmp_path / "thesis/chapter.tex").exists()
    native.write(varied(ENCODER), saved, shard_size=4_000)
    (saved / "evidence").mkdir()
    (saved / "evidence/report.html").write_text("<p>")
    (saved / "README.md").write_text("mine")
    model = varied(ENCODER, seed=1)
    fw.save(model, saved)
    assert set(content(saved)) == {"formwright.json", "model.safetensors", "evidence/report.html", "README.md"}
    assert same(outputs(fw.load(saved)), outputs(model))


def test_killed_at_every_step(tmp_path: Path) -> None:
    """One process per step, forked from this one just before it writes, ends itself there without any clean-up."""
    from formwright.kit.files import recover

    old, new = varied(ENCODER, seed=0), varied(ENCODER, seed=1)
    expected = [outputs(old), outputs(new)]
    steps: list[str] = []
    fw.save(old, tmp_path / "probe")
    native.write(new, tmp_path / "probe", trace=steps.append)
    assert len(steps) > 10 and "write model.safetensors" in steps and f"write {native.RECORD}" in steps
    found = []
    for turn in range(len(steps)):
        target = tmp_path / f"m{turn}"
        fw.save(old, target)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn of forking where threads are
            child = os.fork()
        if child == 0:
            seen: list[str] = []

            def trace(step: str, seen: list[str] = seen, turn: int = turn) -> None:
                seen.append(step)
                if len(seen) == turn + 1:
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                native.write(new, target, trace=trace)
            finally:
                os._exit(9)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        recover(target)
        assert [p.name for p in tmp_path.iterdir() if p.name.startswith(f"{target.name}.")] == []
        got = outputs(fw.load(target, verify=True))
        found.append([same(got, wanted) for wanted in expected].index(True))
    assert found == sorted(found) and found[0] == 0 and found[-1] == 1


def test_a_full_disk_leaves_the_earlier_model(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = content(saved)

    def full(*args: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(DataError, match="the disk is full"):
        fw.save(varied(ENCODER, seed=1), saved)
    monkeypatch.undo()
    usage = shutil.disk_usage(saved)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    with pytest.raises(DataError, match=r"the disk is full .* 100 bytes free"):
        fw.save(varied(ENCODER, seed=1), saved)
    monkeypatch.undo()
    assert content(saved) == before and os.listdir(saved.parent) == ["model"]


# ---------------------------------------------------------------------- refusing to load


def test_all_tensors_that_do_not_fit_are_told_at_once(saved: Path) -> None:
    file = saved / "model.safetensors"
    held = load_file(file)
    held["b0.attention.part.qq.weight"] = held.pop("b0.attention.part.q.weight")
    held["b1.mlp.part.up.weight"] = held["b1.mlp.part.up.weight"][:5].clone()
    held["b0.attention.norm.bias"] = held["b0.attention.norm.bias"].to(torch.int8)
    save_file(held, file)
    edit(saved, files={"model.safetensors": {"bytes": file.stat().st_size}})
    with pytest.raises(DataError) as caught:
        fw.load(saved)
    told = str(caught.value).split("\n")
    assert len(told) == 4 and all(str(file) in line for line in told)
    assert "tensor b0.attention.part.q.weight is missing; did you mean 'b0.attention.part.qq.weight'?" in told[0]
    assert "tensor b0.attention.part.qq.weight is not part of this model" in told[1]
    assert any("has shape (5, 16); this model needs (24, 16)" in line for line in told)
    assert any("b0.attention.norm.bias is int8; this model needs float32" in line for line in told)


def test_truncated_changed_and_damaged_files(saved: Path) -> None:
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    with pytest.raises(DataError, match=r"model\.safetensors is truncated: [\d,]+ bytes, [\d,]+ were written"):
        fw.load(saved)
    file.write_bytes(whole + b"x")
    with pytest.raises(DataError, match="is changed"):
        fw.load(saved)
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    fw.load(saved)
    with pytest.raises(DataError, match="was changed after it was written"):
        fw.load(saved, verify=True)
    file.write_bytes(b"\xff" * len(whole))
    with pytest.raises(DataError, match="is damaged"):
        fw.load(saved)
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        fw.load(saved)


def test_nan_in_a_file(saved: Path) -> None:
    held = load_file(saved / "model.safetensors")
    held["b1.mlp.part.up.weight"][0, 0] = float("nan")
    save_file(held, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"NaN or infinite values in b1\.mlp\.part\.up\.weight"):
        fw.load(saved)
    assert native.read(saved, check_finite=False).slot("b1.mlp:up").weight.isnan().any()


def test_records_that_cannot_be_used(saved: Path, tmp_path: Path) -> None:
    path = saved / native.RECORD
    good = path.read_text()
    cases: list[tuple[Any, str]] = [
        ("{", "formwright.json is damaged"),
        ("[]", "states no format version"),
        ({"format": 3}, r"written by a newer Formwright \(format 3\); this one reads up to 1: upgrade"),
        ({"history": {}}, "'history' must be a list, not a dict"),
        ({"files": {"../../etc/passwd": {"bytes": 1}}}, "lies outside the directory"),
        ({"files": {}}, r"lists no model\.safetensors"),
        ({"system": {}}, "must hold a spec or a system"),
        ({"history": [{"kind": "surgery"}]}, "cannot be read: KeyError: 'name'"),
        (
            {"history": [{"kind": "surgery", "name": "no-such", "data": {"surgery": "no-such", "version": 1}}]},
            "no-such",
        ),
        ({"labels": {"heads.other": []}}, "labels of a head 'heads.other' that the model lacks"),
    ]
    for case, sentence in cases:
        path.write_text(case if isinstance(case, str) else json.dumps({**json.loads(good), **case}))
        with pytest.raises(DataError, match=sentence):
            fw.load(saved)
    spec = json.loads(good)["spec"]
    spec["layers"][0]["layers"][0]["part"] = "attentoin"
    path.write_text(json.dumps({**json.loads(good), "spec": spec, "formwright": "9.9"}))
    with pytest.raises(
        DataError, match=r"unknown part 'attentoin'; did you mean 'attention'.*written by Formwright 9\.9"
    ):
        fw.load(saved)
    (tmp_path / "empty").mkdir()
    for place, sentence in (("empty", "an empty directory"), ("none", "no such directory")):
        with pytest.raises(DataError, match=sentence):
            fw.load(tmp_path / place)
    with pytest.raises(DataError, match=r"is a file; a model is a directory: give .*model"):
        fw.load(path)


def test_a_newer_surgery_is_refused(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Later(Surgery):
        version = 1

    monkeypatch.setitem(registry._plugins, ("surgery", "later"), Later)
    entry = {"kind": "surgery", "name": "later", "data": {"surgery": "later", "version": 2}}
    edit(saved, history=[entry])
    with pytest.raises(DataError, match="made by later version 2; this library knows 1: upgrade"):
        fw.load(saved)


PLUGIN = """
import torch
from formwright.parts.base import Part
from formwright.parts.linears.dense import Dense
from formwright.registry import register

@register("mixer", "echoing")
class Echoing(Part):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.o = Dense(width, width, True, "o")
    def forward(self, x, ctx):
        return self.o(x, ctx)

class Plain(Echoing):
    registered = ("mixer", "attention")
"""


def forget(name: str) -> None:
    """As in a process that never imported the plug-in file of that name."""
    registry._plugins.pop(("mixer", "echoing"), None)
    for module in [m for m in sys.modules if m.startswith(f"formwright_plugin_{name}_")]:
        del sys.modules[module]


def test_a_plug_in_is_named_and_never_imported_by_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(PLUGIN)
    Path("elsewhere").mkdir()
    stem = {"part": "token-embedding", "vocab": 9, "width": 4}
    made = {}
    try:
        registry.load_plugin("mine.py")
        for name, part in (("named", "echoing"), ("path", "mine.py:Plain")):
            made[name] = varied({"stem": stem, "layers": [{"part": part}]})
            fw.save(made[name], name)
            assert same(outputs(fw.load(name)), outputs(made[name]))  # imported already, by the user
        forget("mine")
        with pytest.raises(DataError) as caught:
            fw.load("named")
        assert str(caught.value) == (
            "named needs plug-in mine.py (mixer 'echoing'): load with --plugin mine.py (in Python plugin='mine.py')"
        )
        with pytest.raises(DataError, match=r"path: layers\[0\]: needs plug-in mine\.py: load with --plugin mine\.py"):
            fw.load("path")
        assert not any(name.startswith("formwright_plugin_mine") for name in sys.modules)
        Path("mine.py").rename("elsewhere/mine.py")
        for name, model in made.items():
            assert same(outputs(fw.load(name, plugin="elsewhere/mine.py")), outputs(model))
            forget("mine")
        with pytest.raises(SpecError, match=r"plug-in file none\.py does not exist"):
            fw.load("named", plugin=["none.py"])
    finally:
        forget("mine")


def test_a_directory_replaced_while_it_is_read_is_read_whole(saved: Path) -> None:
    """Two models of one size take turns; what is loaded is always one of them, never a mixture."""
    both = [varied(ENCODER, seed=seed) for seed in (0, 1)]
    for index, model in enumerate(both):
        model.history.append(Entry("event", "version", {"is": index}))
    expected = [outputs(model) for model in both]
    stop = threading.Event()
    fw.save(both[0], saved)

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn = 1 - turn
            fw.save(both[turn], saved)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(12):
            model = fw.load(saved)
            assert same(outputs(model), expected[model.history[0].data["is"]])
    finally:
        stop.set()
        writer.join()
