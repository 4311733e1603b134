"""RoBERTa: BERT's encoder with positions counted from behind the padding id and a head of its own (Liu et al., 2019,
1907.11692). XLM-RoBERTa is the same model with another vocabulary (Conneau et al., 2019, 1911.02116)."""

from __future__ import annotations

from formwright.hub.families._family import Config, Data, HeadForm, layernorm, sequence_head, states, token_head
from formwright.hub.families._table import table
from formwright.hub.families.bert import Encoder, classifier_dropout
from formwright.registry import Paper, register


def _masked(c: Config) -> Data:
    transform = {"activation": "gelu", "norm": layernorm(c.layer_norm_eps)}
    own = {"tied": True} if c.tie_word_embeddings else {"vocab": c.vocab_size}
    return {"part": "lm", **own, "bias": True, "transform": transform}


def _sequence(c: Config) -> Data:
    return sequence_head(c, pool="first", transform={"activation": "tanh"}, dropout=classifier_dropout(c))


def _tokens(c: Config) -> Data:
    return token_head(c, dropout=classifier_dropout(c))


MASKED = HeadForm(
    _masked,
    table(
        ("heads.out.transform.dense.*", "lm_head.dense.*"),
        ("heads.out.transform.norm.*", "lm_head.layer_norm.*"),
        ("heads.out.bias", "lm_head.bias"),
        ("heads.out.out.*", "lm_head.decoder.*"),
    ),
    {"lm_head.decoder.weight": "{p}embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"},
)
SEQUENCE = HeadForm(
    _sequence,
    table(("heads.out.transform.dense.*", "classifier.dense.*"), ("heads.out.out.*", "classifier.out_proj.*")),
)
TOKENS = HeadForm(_tokens, table(("heads.out.out.*", "classifier.*")))


@register("family", "roberta", paper=Paper("Liu et al.", 2019, "1907.11692"))
class Roberta(Encoder):
    """RoBERTa, with its masked-language, sequence and token heads."""

    name = "roberta"
    title = "RoBERTa"
    base = "RobertaModel"
    prefix = "roberta."
    defaults = {**Encoder.defaults, "vocab_size": 50265, "pad_token_id": 1}
    skipped_positions = True
    kept = ("{p}pooler.dense.*",)
    heads = {
        "RobertaModel": HeadForm(states),
        "RobertaForMaskedLM": MASKED,
        "RobertaForCausalLM": MASKED,
        "RobertaForSequenceClassification": SEQUENCE,
        "RobertaForTokenClassification": TOKENS,
    }

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
            "type_vocab_size": 1,
            "layer_norm_eps": 1e-5,
        }
        heads = [name for name in self.heads if not name.endswith("CausalLM")]
        return [(name, {**small, "num_labels": 3}) for name in heads]


@register("family", "xlm-roberta", paper=Paper("Conneau et al.", 2019, "1911.02116"))
class XLMRoberta(Roberta):
    """XLM-RoBERTa, with its masked-language, sequence and token heads."""

    name = "xlm-roberta"
    title = "XLM-RoBERTa"
    base = "XLMRobertaModel"
    heads = {f"XLM{name}": form for name, form in Roberta.heads.items()}
