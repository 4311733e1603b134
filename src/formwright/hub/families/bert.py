"""BERT: a bidirectional encoder with learned positions and token types, post-norm (Devlin et al., 2018, 1810.04805)."""

from __future__ import annotations

from formwright.hub.families._family import (
    Config,
    Data,
    Facts,
    Family,
    HeadForm,
    Maybe,
    layernorm,
    lean,
    sequence_head,
    states,
    token_head,
)
from formwright.hub.families._table import table
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register

ENCODER = table(
    ("stem.tokens.weight", "embeddings.word_embeddings.weight"),
    ("stem.positions.table.weight", "embeddings.position_embeddings.weight"),
    ("stem.types.weight", "embeddings.token_type_embeddings.weight"),
    ("stem.norm.*", "embeddings.LayerNorm.*"),
    ("b{i}.attention.part.q.*", "encoder.layer.{i}.attention.self.query.*"),
    ("b{i}.attention.part.k.*", "encoder.layer.{i}.attention.self.key.*"),
    ("b{i}.attention.part.v.*", "encoder.layer.{i}.attention.self.value.*"),
    ("b{i}.attention.part.o.*", "encoder.layer.{i}.attention.output.dense.*"),
    ("b{i}.attention.norm.*", "encoder.layer.{i}.attention.output.LayerNorm.*"),
    ("b{i}.mlp.part.up.*", "encoder.layer.{i}.intermediate.dense.*"),
    ("b{i}.mlp.part.down.*", "encoder.layer.{i}.output.dense.*"),
    ("b{i}.mlp.norm.*", "encoder.layer.{i}.output.LayerNorm.*"),
)


class Encoder(Family):
    """What BERT, RoBERTa and ELECTRA share: the configuration's keys, the encoder, and the checks."""

    defaults = {
        "vocab_size": 30522,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "classifier_dropout": Maybe(float),
        "max_position_embeddings": 512,
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "is_decoder": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
        "position_embedding_type": "absolute",
    }
    rows = ENCODER
    renamed = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    #: Rows of the position table that are never used, as RoBERTa counts from behind its padding id.
    skipped_positions = False

    def check(self, c: Config) -> list[str]:
        problems = []
        if c.position_embedding_type != "absolute":
            problems.append(f"position_embedding_type {c.position_embedding_type!r} is not supported, only 'absolute'")
        if c.add_cross_attention:
            problems.append("add_cross_attention is not supported for an encoder")
        if c.given.get("pruned_heads"):
            problems.append(
                "pruned_heads is not empty; a checkpoint with heads of its own number per layer is not read"
            )
        return problems

    def offset(self, c: Config) -> int:
        return c.pad_token_id + 1 if self.skipped_positions else 0

    def body(self, c: Config) -> Data:
        offset = self.offset(c)
        positions = {"kind": "learned", "max": c.max_position_embeddings - offset}
        if offset:
            positions["offset"] = offset
        attention = lean({"part": "attention", "heads": c.num_attention_heads, "dropout": c.hidden_dropout_prob})
        if c.is_decoder:
            attention["causal"] = True
        mlp = {"part": "mlp", "hidden": c.intermediate_size, "activation": c.hidden_act}
        return {
            "stem": lean(
                {
                    "part": "token-embedding",
                    "vocab": c.vocab_size,
                    "width": c.hidden_size,
                    "positions": positions,
                    "types": c.type_vocab_size,
                    "norm": layernorm(c.layer_norm_eps),
                    "dropout": c.hidden_dropout_prob,
                }
            ),
            "defaults": {"norm": layernorm(c.layer_norm_eps), "order": "post"},
            "layers": [
                {
                    "repeat": c.num_hidden_layers,
                    "layers": [attention, lean({**mlp, "dropout": c.hidden_dropout_prob})],
                }
            ],
        }

    def config_of(self, facts: Facts) -> Data:
        if facts.order != "post":
            raise Refusal(f"{self.title} normalises after each sublayer, this model before")
        if facts.stem.types is None:
            raise Refusal(f"{self.title} has token types, this model none")
        pad = facts.positions.offset - 1 if self.skipped_positions else 0
        if pad < 0:
            raise Refusal(f"{self.title} counts positions from behind its padding id")
        return {
            "model_type": self.name,
            "vocab_size": facts.stem.tokens.rows,
            "hidden_size": facts.width,
            "num_hidden_layers": facts.layers,
            "num_attention_heads": facts.attention.heads,
            "intermediate_size": facts.hidden,
            "hidden_act": facts.act("gelu"),
            "hidden_dropout_prob": facts.mlp.rate,
            "max_position_embeddings": facts.positions.table.rows,
            "type_vocab_size": facts.stem.types.rows,
            "layer_norm_eps": facts.eps,
            "is_decoder": facts.attention.rule.causal,
            **({"pad_token_id": pad} if self.skipped_positions else {}),
            "tie_word_embeddings": facts.tied,
        }


def classifier_dropout(c: Config) -> float:
    """The rate before the last linear: its own setting, else the body's."""
    return float(c.get("classifier_dropout", c.hidden_dropout_prob))


def _masked(c: Config) -> Data:
    transform = {"activation": c.hidden_act, "norm": layernorm(c.layer_norm_eps)}
    own = {"tied": True} if c.tie_word_embeddings else {"vocab": c.vocab_size}
    return {"part": "lm", **own, "bias": True, "transform": transform}


def _sequence(c: Config) -> Data:
    return sequence_head(c, pool="first", transform={"activation": "tanh"}, dropout=classifier_dropout(c))


MASKED = HeadForm(
    _masked,
    table(
        ("heads.out.transform.dense.*", "cls.predictions.transform.dense.*"),
        ("heads.out.transform.norm.*", "cls.predictions.transform.LayerNorm.*"),
        ("heads.out.bias", "cls.predictions.bias"),
        ("heads.out.out.*", "cls.predictions.decoder.*"),
    ),
    {
        "cls.predictions.decoder.weight": "{p}embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)


@register("family", "bert", paper=Paper("Devlin et al.", 2018, "1810.04805"))
class Bert(Encoder):
    """BERT, with its masked-language, sequence and token heads."""

    name = "bert"
    title = "BERT"
    base = "BertModel"
    prefix = "bert."
    heads = {
        "BertModel": HeadForm(states),
        "BertForMaskedLM": MASKED,
        "BertLMHeadModel": MASKED,
        "BertForSequenceClassification": HeadForm(
            _sequence,
            table(
                ("heads.out.transform.dense.*", "{p}pooler.dense.*"),
                ("heads.out.out.*", "classifier.*"),
            ),
        ),
        "BertForTokenClassification": HeadForm(
            lambda c: token_head(c, dropout=classifier_dropout(c)), table(("heads.out.out.*", "classifier.*"))
        ),
        "BertForPreTraining": MASKED,
    }
    kept = ("cls.seq_relationship.*",)

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
        }
        return [
            ("BertModel", small),
            ("BertForMaskedLM", small),
            ("BertForMaskedLM", {**small, "tie_word_embeddings": False, "hidden_act": "relu"}),
            ("BertLMHeadModel", {**small, "is_decoder": True}),
            ("BertForSequenceClassification", {**small, "num_labels": 3}),
            ("BertForSequenceClassification", {**small, "num_labels": 1}),
            ("BertForTokenClassification", {**small, "num_labels": 5, "classifier_dropout": 0.3}),
        ]
