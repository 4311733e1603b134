"""ELECTRA: BERT's encoder behind a narrower token table, trained to tell replaced tokens (Clark et al., 2020,
2003.10555). Its discriminator says one number a token, its generator is a masked language model."""

from __future__ import annotations

from formwright.hub.families._family import Config, Data, Facts, HeadForm, layernorm, sequence_head, states, token_head
from formwright.hub.families._table import table
from formwright.hub.families.bert import Encoder, classifier_dropout
from formwright.registry import Paper, register


def _masked(c: Config) -> Data:
    transform = {"width": c.embedding_size, "activation": "gelu", "norm": layernorm(c.layer_norm_eps)}
    own = {"tied": True} if c.tie_word_embeddings else {"vocab": c.vocab_size}
    return {"part": "lm", **own, "bias": True, "transform": transform}


def _discriminator(c: Config) -> Data:
    return {"part": "token-classifier", "classes": 1, "transform": {"activation": c.hidden_act}}


def _sequence(c: Config) -> Data:
    return sequence_head(c, pool="first", transform={"activation": "gelu"}, dropout=classifier_dropout(c))


@register("family", "electra", paper=Paper("Clark et al.", 2020, "2003.10555"))
class Electra(Encoder):
    """ELECTRA: discriminator, generator, sequence and token heads."""

    name = "electra"
    title = "ELECTRA"
    base = "ElectraModel"
    prefix = "electra."
    defaults = {
        **Encoder.defaults,
        "embedding_size": 128,
        "hidden_size": 256,
        "num_attention_heads": 4,
        "intermediate_size": 1024,
    }
    rows = (*Encoder.rows, *table(("stem.project.*", "embeddings_project.*")))
    heads = {
        "ElectraModel": HeadForm(states),
        "ElectraForPreTraining": HeadForm(
            _discriminator,
            table(
                ("heads.out.transform.dense.*", "discriminator_predictions.dense.*"),
                ("heads.out.out.*", "discriminator_predictions.dense_prediction.*"),
            ),
        ),
        "ElectraForMaskedLM": HeadForm(
            _masked,
            table(
                ("heads.out.transform.dense.*", "generator_predictions.dense.*"),
                ("heads.out.transform.norm.*", "generator_predictions.LayerNorm.*"),
                ("heads.out.bias", "generator_lm_head.bias"),
                ("heads.out.out.*", "generator_lm_head.*"),
            ),
            {"generator_lm_head.weight": "{p}embeddings.word_embeddings.weight"},
        ),
        "ElectraForSequenceClassification": HeadForm(
            _sequence,
            table(("heads.out.transform.dense.*", "classifier.dense.*"), ("heads.out.out.*", "classifier.out_proj.*")),
        ),
        "ElectraForTokenClassification": HeadForm(
            lambda c: token_head(c, dropout=classifier_dropout(c)), table(("heads.out.out.*", "classifier.*"))
        ),
    }

    def body(self, c: Config) -> Data:
        made = super().body(c)
        if c.embedding_size != c.hidden_size:
            made["stem"]["embed_width"] = c.embedding_size
        return made

    def config_of(self, facts: Facts) -> Data:
        return {**super().config_of(facts), "embedding_size": facts.stem.tokens.width}

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "embedding_size": 16,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 40,
            "num_labels": 3,
        }
        return [(name, small) for name in self.heads] + [("ElectraModel", {**small, "embedding_size": 32})]
