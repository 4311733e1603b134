"""Llama: a causal decoder with rotary positions, RMS norms, a gated MLP and grouped keys (Touvron et al., 2023,
2302.13971; grouped keys and scaled rotary angles since Llama 2 and 3). Mistral and Qwen2 are this with a window or
biases, in files of their own."""

from __future__ import annotations

from typing import Any, ClassVar

from formwright.hub.families._family import (
    Config,
    Data,
    Facts,
    Family,
    HeadForm,
    Maybe,
    language,
    lean,
    sequence_head,
    states,
    token_head,
    wrong,
)
from formwright.hub.families._table import table
from formwright.kit.errors import DataError, Refusal
from formwright.registry import Paper, register

#: What each rotary scaling may say besides its kind, as published.
SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", "short_factor", "long_factor", "attention_factor"),
}


def rotary_of(c: Config, head: int) -> Data:
    """The rotary options of a configuration, in its present spelling (``rope_parameters``) or its former one
    (``rope_theta`` and ``rope_scaling``)."""
    said: Data = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    kind = said.get("rope_type", said.get("type", "default"))
    if kind != "default" and kind not in SCALINGS:
        raise DataError(f"rotary scaling {kind!r} is not known here (known: default, {', '.join(SCALINGS)})")
    said.setdefault("rope_theta", c.get("rope_theta", 10_000.0))
    said.setdefault("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    width = _checked(said, kind, head)
    made: Data = {"theta": float(said["rope_theta"])}
    if width != head:
        made["width"] = width
    if kind == "default":
        return made
    scaling: Data = {"kind": kind, **{k: said[k] for k in SCALINGS[kind] if said.get(k) is not None}}
    longest = c.max_position_embeddings
    original = c.get("original_max_position_embeddings") or said.get("original_max_position_embeddings") or longest
    if kind == "dynamic":
        scaling["original"] = longest
    elif kind != "linear":
        scaling["original"] = original
    if kind in ("yarn", "longrope"):
        scaling.setdefault("factor", longest / original)
    return {**made, "scaling": scaling}


def _checked(said: Data, kind: str, head: int) -> int:
    """How many entries of a head are turned; a DataError lists what is wrong with the rotary settings."""
    problems = wrong("rope_theta", said["rope_theta"], float)
    problems += wrong("partial_rotary_factor", said["partial_rotary_factor"], float)
    if said.get("original_max_position_embeddings") is not None:
        problems += wrong("original_max_position_embeddings", said["original_max_position_embeddings"], int, 2)
    for key in SCALINGS.get(kind, ()):
        value = said.get(key)
        if value is None:
            continue
        if key in ("short_factor", "long_factor"):
            listed = isinstance(value, list) and len(value) == head // 2
            if not listed or any(wrong(key, entry, float) for entry in value):
                problems.append(f"{key} must list {head // 2} numbers, not {value!r}")
        else:
            problems += wrong(key, value, bool if key == "truncate" else float)
    if not problems and not 0 < said["partial_rotary_factor"] <= 1:
        problems.append(f"partial_rotary_factor must lie between 0 and 1, not {said['partial_rotary_factor']}")
    if problems:
        raise DataError("\n".join(problems))
    return int(head * said["partial_rotary_factor"])


def rope_of(rotary: Data, head: int) -> Data:
    """The published ``rope_parameters`` of our rotary options."""
    scaling = dict(rotary.get("scaling") or {})
    made: Data = {"rope_theta": float(rotary.get("theta", 10_000.0)), "rope_type": scaling.pop("kind", "default")}
    original = scaling.pop("original", None)
    if original is not None and made["rope_type"] != "dynamic":
        made["original_max_position_embeddings"] = original
    if rotary.get("width"):
        made["partial_rotary_factor"] = rotary["width"] / head
    return {**made, **scaling}


def _tokens(c: Config) -> Data:
    return token_head(c, dropout=float(c.get("classifier_dropout", c.get("hidden_dropout", 0.1))))


def decoder_heads(stem: str) -> dict[str, HeadForm]:
    """The published classes of a Llama-like family whose names begin with ``stem``."""
    return {
        f"{stem}Model": HeadForm(states),
        f"{stem}ForCausalLM": HeadForm(
            language, table(("heads.out.out.weight", "lm_head.weight")), {"lm_head.weight": "{p}embed_tokens.weight"}
        ),
        f"{stem}ForSequenceClassification": HeadForm(
            lambda c: sequence_head(c, pool="last", bias=False), table(("heads.out.out.weight", "score.weight"))
        ),
        f"{stem}ForTokenClassification": HeadForm(_tokens, table(("heads.out.out.*", "score.*"))),
    }


SMALL = {
    "vocab_size": 90,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "num_labels": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


@register("family", "llama", paper=Paper("Touvron et al.", 2023, "2302.13971"))
class Llama(Family):
    """Llama, with its language, sequence (last token) and token heads."""

    name = "llama"
    title = "Llama"
    base = "LlamaModel"
    prefix = "model."
    defaults: ClassVar[Data] = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": Maybe(int),
        "head_dim": Maybe(int),
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "classifier_dropout": Maybe(float),
        "hidden_dropout": Maybe(float),
        "rope_theta": Maybe(float),
        "rope_parameters": Maybe(dict),
        "rope_scaling": Maybe(dict),
        "partial_rotary_factor": Maybe(float),
        "original_max_position_embeddings": Maybe(int),
    }
    rows = table(
        ("stem.tokens.weight", "embed_tokens.weight"),
        ("b{i}.attention.norm.weight", "layers.{i}.input_layernorm.weight"),
        ("b{i}.attention.part.q.*", "layers.{i}.self_attn.q_proj.*"),
        ("b{i}.attention.part.k.*", "layers.{i}.self_attn.k_proj.*"),
        ("b{i}.attention.part.v.*", "layers.{i}.self_attn.v_proj.*"),
        ("b{i}.attention.part.o.*", "layers.{i}.self_attn.o_proj.*"),
        ("b{i}.gated-mlp.norm.weight", "layers.{i}.post_attention_layernorm.weight"),
        ("b{i}.gated-mlp.part.gate.*", "layers.{i}.mlp.gate_proj.*"),
        ("b{i}.gated-mlp.part.up.*", "layers.{i}.mlp.up_proj.*"),
        ("b{i}.gated-mlp.part.down.*", "layers.{i}.mlp.down_proj.*"),
        ("final_norm.weight", "norm.weight"),
    )
    heads = decoder_heads("Llama")
    #: Angles, which old files store as tensors.
    ignored = (r".*rotary_emb\.inv_freq",)

    def biases(self, c: Config) -> Data:
        """The attention's options about biases."""
        return {"bias": c.attention_bias}

    def windows(self, c: Config) -> list[int | None]:
        """How far back each layer sees."""
        return [None] * c.num_hidden_layers

    def body(self, c: Config) -> Data:
        head = c.get("head_dim", c.hidden_size // c.num_attention_heads)
        norm = {"part": "rmsnorm", "eps": c.rms_norm_eps}
        mlp: Data = {"part": "gated-mlp", "hidden": c.intermediate_size, "activation": c.hidden_act}
        if c.get("mlp_bias"):
            mlp["bias"] = True

        def block(window: int | None) -> list[Data]:
            node: dict[str, Any] = {
                "part": "attention",
                "heads": c.num_attention_heads,
                "kv_heads": c.get("num_key_value_heads", c.num_attention_heads),
                "head_width": head,
                "causal": True,
                "window": window,
                "rotary": rotary_of(c, head),
                **self.biases(c),
            }
            return [lean(node), mlp]

        windows = self.windows(c)
        if len(set(windows)) <= 1:
            layers = [{"repeat": c.num_hidden_layers, "layers": block(windows[0] if windows else None)}]
        else:
            layers = [{"repeat": 1, "layers": block(window)} for window in windows]
        return {
            "stem": {"part": "token-embedding", "vocab": c.vocab_size, "width": c.hidden_size},
            "defaults": {"norm": norm, "order": "pre"},
            "layers": layers,
            "final_norm": norm,
        }

    def config_of(self, facts: Facts) -> Data:
        attention = facts.attention
        if attention.rotary is None or not hasattr(facts.mlp, "gate"):
            raise Refusal(f"{self.title} has rotary positions and a gated MLP")
        scaling = attention.rotary.get("scaling") or {}
        longest = scaling["original"] if scaling.get("kind") == "dynamic" else facts.model.max_length
        told: Data = {
            "model_type": self.name,
            "vocab_size": facts.stem.tokens.rows,
            "hidden_size": facts.width,
            "num_hidden_layers": facts.layers,
            "num_attention_heads": attention.heads,
            "num_key_value_heads": attention.kv_heads,
            "head_dim": attention.head_width,
            "intermediate_size": facts.hidden,
            "hidden_act": facts.act("silu"),
            "rms_norm_eps": facts.eps,
            "tie_word_embeddings": facts.tied,
            "attention_bias": attention.q.dense_bias() is not None,
            "mlp_bias": facts.mlp.up.dense_bias() is not None,
            "rope_parameters": rope_of(attention.rotary, attention.head_width),
            # A former spelling in a configuration that was read must not speak against the present one.
            "rope_scaling": None,
        }
        if longest is not None:
            told["max_position_embeddings"] = longest
        return told

    def published(self, given: Data) -> Data:
        made = dict(given)
        if made.get("rope_scaling", 0) is None and made.get("rope_parameters"):
            del made["rope_scaling"]
        return made

    def examples(self) -> list[tuple[str, Data]]:
        biased = {**SMALL, "attention_bias": True, "mlp_bias": True, "head_dim": 12, "num_key_value_heads": 1}
        return [
            *((name, SMALL) for name in self.heads),
            ("LlamaForCausalLM", {**biased, "tie_word_embeddings": True}),
            ("LlamaForSequenceClassification", {**SMALL, "num_labels": 1}),
        ]
