"""DistilBERT: BERT without token types and pooler, half as deep (Sanh et al., 2019, 1910.01108)."""

from __future__ import annotations

from formwright.hub.families._family import (
    Config,
    Data,
    Facts,
    Family,
    HeadForm,
    layernorm,
    lean,
    sequence_head,
    states,
    token_head,
)
from formwright.hub.families._table import table
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register

#: Not in its configuration: every norm of the published model has it.
EPS = 1e-12


def _masked(c: Config) -> Data:
    own = {"tied": True} if c.tie_word_embeddings else {"vocab": c.vocab_size}
    return {"part": "lm", **own, "bias": True, "transform": {"activation": c.activation, "norm": layernorm(EPS)}}


def _sequence(c: Config) -> Data:
    return sequence_head(c, pool="first", transform={"activation": "relu"}, dropout=c.seq_classif_dropout)


@register("family", "distilbert", paper=Paper("Sanh et al.", 2019, "1910.01108"))
class DistilBert(Family):
    """DistilBERT, with its masked-language, sequence and token heads."""

    name = "distilbert"
    title = "DistilBERT"
    base = "DistilBertModel"
    prefix = "distilbert."
    spellings = {
        "hidden_size": "dim",
        "num_attention_heads": "n_heads",
        "num_hidden_layers": "n_layers",
        "intermediate_size": "hidden_dim",
    }
    defaults = {
        "vocab_size": 30522,
        "dim": 768,
        "n_layers": 6,
        "n_heads": 12,
        "hidden_dim": 3072,
        "activation": "gelu",
        "dropout": 0.1,
        "seq_classif_dropout": 0.2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    rows = table(
        ("stem.tokens.weight", "embeddings.word_embeddings.weight"),
        ("stem.positions.table.weight", "embeddings.position_embeddings.weight"),
        ("stem.norm.*", "embeddings.LayerNorm.*"),
        ("b{i}.attention.part.q.*", "transformer.layer.{i}.attention.q_lin.*"),
        ("b{i}.attention.part.k.*", "transformer.layer.{i}.attention.k_lin.*"),
        ("b{i}.attention.part.v.*", "transformer.layer.{i}.attention.v_lin.*"),
        ("b{i}.attention.part.o.*", "transformer.layer.{i}.attention.out_lin.*"),
        ("b{i}.attention.norm.*", "transformer.layer.{i}.sa_layer_norm.*"),
        ("b{i}.mlp.part.up.*", "transformer.layer.{i}.ffn.lin1.*"),
        ("b{i}.mlp.part.down.*", "transformer.layer.{i}.ffn.lin2.*"),
        ("b{i}.mlp.norm.*", "transformer.layer.{i}.output_layer_norm.*"),
    )
    heads = {
        "DistilBertModel": HeadForm(states),
        "DistilBertForMaskedLM": HeadForm(
            _masked,
            table(
                ("heads.out.transform.dense.*", "vocab_transform.*"),
                ("heads.out.transform.norm.*", "vocab_layer_norm.*"),
                ("heads.out.bias", "vocab_projector.bias"),
                ("heads.out.out.*", "vocab_projector.*"),
            ),
            {"vocab_projector.weight": "{p}embeddings.word_embeddings.weight"},
        ),
        "DistilBertForSequenceClassification": HeadForm(
            _sequence,
            table(("heads.out.transform.dense.*", "pre_classifier.*"), ("heads.out.out.*", "classifier.*")),
        ),
        "DistilBertForTokenClassification": HeadForm(
            lambda c: token_head(c, dropout=c.dropout), table(("heads.out.out.*", "classifier.*"))
        ),
    }

    def check(self, c: Config) -> list[str]:
        if c.given.get("pruned_heads"):
            return ["pruned_heads is not empty; a checkpoint with heads of its own number per layer is not read"]
        return []

    def body(self, c: Config) -> Data:
        mlp = {"part": "mlp", "hidden": c.hidden_dim, "activation": c.activation, "dropout": c.dropout}
        return {
            "stem": lean(
                {
                    "part": "token-embedding",
                    "vocab": c.vocab_size,
                    "width": c.dim,
                    "positions": {"kind": "learned", "max": c.max_position_embeddings},
                    "norm": layernorm(EPS),
                    "dropout": c.dropout,
                }
            ),
            "defaults": {"norm": layernorm(EPS), "order": "post"},
            "layers": [{"repeat": c.n_layers, "layers": [{"part": "attention", "heads": c.n_heads}, lean(mlp)]}],
        }

    def config_of(self, facts: Facts) -> Data:
        if facts.order != "post":
            raise Refusal("DistilBERT normalises after each sublayer, this model before")
        return {
            "model_type": self.name,
            "vocab_size": facts.stem.tokens.rows,
            "dim": facts.width,
            "n_layers": facts.layers,
            "n_heads": facts.attention.heads,
            "hidden_dim": facts.hidden,
            "activation": facts.act("gelu"),
            "dropout": facts.mlp.rate,
            "max_position_embeddings": facts.positions.table.rows,
            "tie_word_embeddings": facts.tied,
        }

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 40,
            "num_labels": 3,
        }
        return [(name, small) for name in self.heads]
