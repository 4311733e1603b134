"""OPT: a causal decoder with learned positions from row 2 on, its token table perhaps narrower than the stream, and
either pre-norm or (350M) post-norm (Zhang et al., 2022, 2205.01068)."""

from __future__ import annotations

from formwright.hub.families._family import (
    Config,
    Data,
    Facts,
    Family,
    HeadForm,
    Maybe,
    language,
    layernorm,
    lean,
    sequence_head,
)
from formwright.hub.families._table import table
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register

#: Rows of the position table before the first position.
OFFSET = 2
LAST = "{p}decoder.project_out.weight"
PROJECT = table(("heads.out.transform.dense.weight", LAST))


def _out(c: Config) -> Data:
    """The states leave in the width of the token table where it is another."""
    if _narrow(c) is None:
        return {}
    return {"transform": {"width": c.word_embed_proj_dim, "activation": "identity", "bias": False}}


def _narrow(c: Config) -> int | None:
    width = c.get("word_embed_proj_dim", c.hidden_size)
    return None if width == c.hidden_size else width


def _language(c: Config) -> Data:
    return {**language(c), **_out(c)}


@register("family", "opt", paper=Paper("Zhang et al.", 2022, "2205.01068"))
class OPT(Family):
    """OPT, with its language and sequence (last token) heads."""

    name = "opt"
    title = "OPT"
    base = "OPTModel"
    prefix = "model."
    defaults = {
        "vocab_size": 50272,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "ffn_dim": 3072,
        "max_position_embeddings": 2048,
        "do_layer_norm_before": True,
        "_remove_final_layer_norm": False,
        "word_embed_proj_dim": Maybe(int),
        "dropout": 0.1,
        "activation_function": "relu",
        "enable_bias": True,
        "layer_norm_elementwise_affine": True,
        "tie_word_embeddings": True,
    }
    rows = table(
        ("stem.tokens.weight", "decoder.embed_tokens.weight"),
        ("stem.positions.table.weight", "decoder.embed_positions.weight"),
        ("stem.project.weight", "decoder.project_in.weight"),
        ("b{i}.attention.part.q.*", "decoder.layers.{i}.self_attn.q_proj.*"),
        ("b{i}.attention.part.k.*", "decoder.layers.{i}.self_attn.k_proj.*"),
        ("b{i}.attention.part.v.*", "decoder.layers.{i}.self_attn.v_proj.*"),
        ("b{i}.attention.part.o.*", "decoder.layers.{i}.self_attn.out_proj.*"),
        ("b{i}.attention.norm.*", "decoder.layers.{i}.self_attn_layer_norm.*"),
        ("b{i}.mlp.part.up.*", "decoder.layers.{i}.fc1.*"),
        ("b{i}.mlp.part.down.*", "decoder.layers.{i}.fc2.*"),
        ("b{i}.mlp.norm.*", "decoder.layers.{i}.final_layer_norm.*"),
        ("final_norm.*", "decoder.final_layer_norm.*"),
    )
    heads = {
        "OPTModel": HeadForm(lambda c: {"part": "states", **_out(c)}, PROJECT),
        "OPTForCausalLM": HeadForm(
            _language,
            (*PROJECT, *table(("heads.out.out.weight", "lm_head.weight"))),
            {"lm_head.weight": "{p}decoder.embed_tokens.weight"},
        ),
        "OPTForSequenceClassification": HeadForm(
            lambda c: sequence_head(c, pool="last", bias=False, **_out(c)),
            (*PROJECT, *table(("heads.out.out.weight", "score.weight"))),
        ),
    }

    def check(self, c: Config) -> list[str]:
        if not c.layer_norm_elementwise_affine:
            return ["layer_norm_elementwise_affine false is not supported: every norm here has a weight"]
        return []

    def prefix_in(self, names) -> str:
        # A base model's tensors begin with decoder., which inside a class with a head follows model.
        return self.prefix if any(name.startswith("model.decoder.") for name in names) else ""

    def body(self, c: Config) -> Data:
        before = c.do_layer_norm_before
        attention = {"part": "attention", "heads": c.num_attention_heads, "causal": True, "dropout": c.dropout}
        mlp = {"part": "mlp", "hidden": c.ffn_dim, "activation": c.activation_function, "dropout": c.dropout}
        if not c.enable_bias:
            attention["bias"] = mlp["bias"] = False
        stem = {
            "part": "token-embedding",
            "vocab": c.vocab_size,
            "width": c.hidden_size,
            "positions": {"kind": "learned", "max": c.max_position_embeddings, "offset": OFFSET},
        }
        if _narrow(c) is not None:
            stem.update(embed_width=_narrow(c), project_bias=False, positions_after_project=True)
        made = {
            "stem": stem,
            "defaults": {"norm": layernorm(1e-5), "order": "pre" if before else "post"},
            "layers": [{"repeat": c.num_hidden_layers, "layers": [lean(attention), lean(mlp)]}],
        }
        if before and not c._remove_final_layer_norm:
            made["final_norm"] = layernorm(1e-5)
        return made

    def config_of(self, facts: Facts) -> Data:
        if facts.positions.offset != OFFSET:
            raise Refusal(f"OPT's positions begin at row {OFFSET} of their table")
        return {
            "model_type": self.name,
            "vocab_size": facts.stem.tokens.rows,
            "hidden_size": facts.width,
            "num_hidden_layers": facts.layers,
            "num_attention_heads": facts.attention.heads,
            "ffn_dim": facts.hidden,
            "max_position_embeddings": facts.positions.table.rows - OFFSET,
            "do_layer_norm_before": facts.order == "pre",
            "_remove_final_layer_norm": facts.order == "pre" and facts.model.final_norm is None,
            "word_embed_proj_dim": facts.stem.tokens.width,
            "dropout": facts.mlp.rate,
            "activation_function": facts.act("relu"),
            "enable_bias": facts.mlp.up.dense_bias() is not None,
            "tie_word_embeddings": facts.tied,
        }

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "max_position_embeddings": 40,
            "word_embed_proj_dim": 32,
            "num_labels": 3,
            "pad_token_id": 0,
        }
        narrow = {**small, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
        return [
            *((name, small) for name in self.heads),
            *((name, narrow) for name in self.heads),
            ("OPTForCausalLM", {**small, "tie_word_embeddings": False, "enable_bias": False}),
        ]
