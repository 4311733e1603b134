"""Directories of the peft package: read here and written here, both sides give the same answers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import formwright as fw
from formwright.hub import export, load_adapter, save_adapter
from formwright.hub.adapters import adapters
from formwright.kit.errors import DataError, Refusal, SpecError
from formwright.parts.linears.adapted import Adapted
from hub.families_small import BERT, LLAMA, make

peft = pytest.importorskip("peft", reason="peft is not installed")
IDS = torch.randint(1, 60, (3, 9), generator=torch.Generator().manual_seed(0))
GPT2 = {"vocab_size": 90, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "bos_token_id": 1}
GPT2 |= {"eos_token_id": 1, "pad_token_id": 0}
#: Model -> class, configuration, linears for LoRA, linears for (IA)^3, those with scaled inputs, norms.
KINDS: dict[str, tuple[str, dict[str, Any], list[str], list[str], list[str], list[str]]] = {
    "bert": ("BertModel", BERT, ["query", "value"], ["key", "value", "output.dense"], ["output.dense"], ["LayerNorm"]),
    "gpt2": ("GPT2LMHeadModel", GPT2, ["c_attn", "c_fc"], ["c_attn", "mlp.c_proj"], ["mlp.c_proj"], ["ln_1", "ln_f"]),
    "llama": (
        "LlamaForCausalLM",
        LLAMA,
        ["q_proj", "v_proj"],
        ["k_proj", "v_proj", "down_proj"],
        ["down_proj"],
        ["input_layernorm", "norm"],
    ),
}
METHODS = ("lora", "rslora", "dora", "ia3", "vera", "ln")


def settings(kind: str, method: str) -> Any:
    _, _, linears, scaled, inputs, norms = KINDS[kind]
    own: dict[str, Any] = {"r": 4, "lora_alpha": 16, "target_modules": linears}
    return {
        "lora": lambda: peft.LoraConfig(**own),
        "rslora": lambda: peft.LoraConfig(
            **own, use_rslora=True, rank_pattern={linears[0]: 2}, alpha_pattern={linears[0]: 3}
        ),
        "dora": lambda: peft.LoraConfig(**own, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=scaled, feedforward_modules=inputs),
        "vera": lambda: peft.VeraConfig(r=4, target_modules=linears),
        "ln": lambda: peft.LNTuningConfig(target_modules=norms),
    }[method]()


def base(kind: str, tmp_path: Path) -> Path:
    name, options = KINDS[kind][:2]
    make(name, options).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def theirs(kind: str, where: Path) -> Any:
    import transformers

    return getattr(transformers, KINDS[kind][0]).from_pretrained(where).eval()


def ours(where: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fw.load(where)


def said(model: Any) -> Tensor:
    with torch.no_grad():
        made = model(IDS)
    if isinstance(made, Tensor):
        return made
    return made.logits if hasattr(made, "logits") else made.last_hidden_state


def quiet() -> Any:
    warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|Unsupported layer type|config file).*")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_in_and_out_again(kind: str, method: str, tmp_path: Path) -> None:
    where = base(kind, tmp_path)
    with warnings.catch_warnings():
        quiet()
        adapted = peft.get_peft_model(theirs(kind, where), settings(kind, method)).eval()
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(tmp_path / "given")
        wanted = said(adapted)
        model = ours(where)
        plain = said(model)
        if kind == "gpt2" and method == "vera":
            with pytest.raises(DataError, match="several linears here"):
                load_adapter(model, tmp_path / "given")
            assert torch.equal(said(model), plain) and not model.history
            return
        load_adapter(model, tmp_path / "given")
        torch.testing.assert_close(said(model), wanted, rtol=1e-4, atol=1e-5)
        assert float((said(model) - plain).abs().max()) > 1e-3
        export(model, tmp_path / "back", "peft")
        again = peft.PeftModel.from_pretrained(theirs(kind, where), tmp_path / "back").eval()
        torch.testing.assert_close(said(again), wanted, rtol=1e-4, atol=1e-5)
    # And by our own files.
    save_adapter(model, next(iter(adapters(model))), tmp_path / "mine")
    torch.testing.assert_close(said(load_adapter(ours(where), tmp_path / "mine")), said(model))


@pytest.mark.parametrize("method", ["lora", "dora", "adalora", "ia3"])
def test_what_was_made_here_goes_out_fused(method: str, tmp_path: Path) -> None:
    """Adapters of their own for q, k and v are blocks of one in peft."""
    where = base("gpt2", tmp_path)
    model = ours(where)
    places = ["q", "k", "v"] if method == "dora" else ["q", "v", "up"]
    options = {"target": 1} if method == "adalora" else {}
    if method == "ia3":
        options = {"inputs": ["up"]}
    else:
        options |= {"rank": 3}
    fw.apply(model, method, where=places, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        for slot in model.slots().values():
            if isinstance(slot, Adapted):
                for parameter in slot.only().parameters():
                    parameter.add_(0.2 * torch.randn_like(parameter))
                if method == "adalora":
                    slot.only().E[1] = 0.0
    with warnings.catch_warnings():
        quiet()
        export(model, tmp_path / "out", "peft")
        again = peft.PeftModel.from_pretrained(theirs("gpt2", where), tmp_path / "out").eval()
    torch.testing.assert_close(said(again), said(model), rtol=1e-4, atol=1e-5)


def test_a_trained_head_goes_with_it(tmp_path: Path) -> None:
    import transformers

    make("BertForSequenceClassification", {**BERT, "num_labels": 3}).save_pretrained(tmp_path / "base")
    model = fw.apply(ours(tmp_path / "base"), "lora", rank=2, train="heads.out.out.*")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    export(model, tmp_path / "out", "peft")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"] and config["task_type"] == "SEQ_CLS"
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(again, tmp_path / "out").eval()
    torch.testing.assert_close(said(again), said(model), rtol=1e-4, atol=1e-5)
    back = load_adapter(ours(tmp_path / "base"), tmp_path / "out")
    torch.testing.assert_close(said(back), said(model), rtol=1e-5, atol=1e-6)
    assert adapters(back)["out"].decisions["train"]


def test_the_command_line_takes_and_gives_them(tmp_path: Path) -> None:
    from formwright.cli.main import main

    where = base("bert", tmp_path)
    model = fw.apply(ours(where), "lora", rank=2, name="mine")
    fw.save(model, tmp_path / "model")
    save_adapter(model, "mine", tmp_path / "saved")

    def run(*words: object) -> int:
        with pytest.raises(SystemExit) as stop, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main([str(word) for word in words])
        return int(stop.value.code or 0)

    assert run("export", tmp_path / "model", "--to", "peft", "--adapter", "mine", "--out", tmp_path / "one") == 0
    assert run("export", where, "--to", "peft", "--adapter", tmp_path / "saved", "--out", tmp_path / "two") == 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert files[0] == files[1]
    merged = tmp_path / "dense"
    assert run("export", where, "--adapter", tmp_path / "one", "--dequantize", "--out", merged) == 0
    torch.testing.assert_close(said(ours(merged)), said(model), rtol=1e-5, atol=1e-6)
    assert run("export", where, "--to", "peft", "--out", tmp_path / "none") == 2


def test_what_peft_cannot_say_and_what_it_says_wrongly(tmp_path: Path) -> None:
    where = base("bert", tmp_path)
    model = fw.apply(ours(where), "krona", factor=4)
    with pytest.raises(Refusal, match="peft has no krona in this form"):
        export(model, tmp_path / "out", "peft")
    fw.apply(model, "lora", rank=2, name="mine")
    with pytest.raises(SpecError, match="say which adapter"):
        export(model, tmp_path / "out", "peft")
    with pytest.raises(SpecError, match="did you mean 'mine'"):
        export(model, tmp_path / "out", "peft", adapter="mien")
    export(model, tmp_path / "out", "peft", adapter="mine")
    other = ours(where)
    config = tmp_path / "out/adapter_config.json"
    kept = config.read_text()
    for change, words in (({"peft_type": "LORRA"}, "did you mean 'LORA'"), ({"peft_type": "IA3"}, "have no use here")):
        config.write_text(json.dumps({**json.loads(kept), **change}))
        with pytest.raises(DataError, match=words):
            load_adapter(other, tmp_path / "out")
    config.write_text(kept)
    (tmp_path / "out/adapter_model.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="cannot be read"):
        load_adapter(other, tmp_path / "out")
    assert not other.history
