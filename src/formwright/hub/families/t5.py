"""T5: an encoder and a decoder that share a token table, with learned distances and RMS norms (Raffel et al., 2019,
1910.10683). Version 1.1 has a gated MLP and a last linear of its own; mT5 is version 1.1 in many languages (Xue et
al., 2020, 2010.11934)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from formwright.hub.families._family import Config, Data, Facts, Family, HeadForm, Maybe, lean, states
from formwright.hub.families._table import Row, table
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register
from formwright.spec import ModelSpec, SystemSpec

TABLE = "relative-bias"
#: In our configurations only: the last linear of the file differs from the token table, whatever the class says.
APART = "lm_head_apart"
ENCODER_ONLY = "T5EncoderModel", "MT5EncoderModel"


def _tower(ours: str, theirs: str, mlp: int) -> tuple[Row, ...]:
    """Rows of one tower, whose MLP is sublayer ``mlp`` of a published block."""
    block = f"{theirs}.block.{{i}}.layer"
    rows = [(f"{ours}.b{{i}}.attention.norm.weight", f"{block}.0.layer_norm.weight")]
    rows += [(f"{ours}.b{{i}}.attention.part.{s}.weight", f"{block}.0.SelfAttention.{s}.weight") for s in "qkvo"]
    rows += [(f"{ours}.b{{i}}.cross.norm.weight", f"{block}.1.layer_norm.weight")]
    rows += [(f"{ours}.b{{i}}.cross.part.{s}.weight", f"{block}.1.EncDecAttention.{s}.weight") for s in "qkvo"]
    for kind, names in (
        ("mlp", {"up": "wi", "down": "wo"}),
        ("gated-mlp", {"gate": "wi_0", "up": "wi_1", "down": "wo"}),
    ):
        rows += [(f"{ours}.b{{i}}.{kind}.norm.weight", f"{block}.{mlp}.layer_norm.weight")]
        dense = f"{block}.{mlp}.DenseReluDense"
        rows += [(f"{ours}.b{{i}}.{kind}.part.{s}.weight", f"{dense}.{name}.weight") for s, name in names.items()]
    first = f"{theirs}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    rows += [
        (f"{ours}.conditioners.{TABLE}.table.weight", first),
        (f"{ours}.final_norm.weight", f"{theirs}.final_layer_norm.weight"),
    ]
    return table(*rows)


def _language(c: Config) -> Data:
    scale = c.d_model**-0.5 if c.scaled else 1.0
    own: Data = {"vocab": c.vocab_size} if c.values.get(APART) else {"tied": True}
    return {"part": "lm", **own, **({} if scale == 1.0 else {"scale": scale})}


LANGUAGE = HeadForm(
    _language,
    table(("towers.decoder.heads.out.out.weight", "lm_head.weight")),
    {"lm_head.weight": "shared.weight"},
)


@register("family", "t5", paper=Paper("Raffel et al.", 2019, "1910.10683"))
class T5(Family):
    """T5 as a system of ``encoder`` and ``decoder`` (or the encoder alone), with its language head."""

    name = "t5"
    title = "T5"
    base = "T5EncoderModel"
    spellings = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }
    defaults: ClassVar[Data] = {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_decoder_layers": Maybe(int),
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "dropout_rate": 0.1,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    }
    rows = (
        *table(("towers.encoder.stem.tokens.weight", "shared.weight")),
        *_tower("towers.encoder", "encoder", 1),
        *_tower("towers.decoder", "decoder", 2),
    )
    repeats = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
    }
    #: In the first published files, never used.
    kept = ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight",)
    heads: ClassVar[Mapping[str, HeadForm]] = {
        "T5EncoderModel": HeadForm(states),
        "T5Model": HeadForm(states),
        "T5ForConditionalGeneration": LANGUAGE,
    }

    def config(self, given: Mapping[str, Any]) -> Config:
        c = super().config(given)
        c.values["scaled"] = self.scaled(given)
        return c

    def scaled(self, given: Mapping[str, Any]) -> bool:
        """Whether states are scaled before the last product, as everywhere but in version 1.1."""
        # Present files say so; former ones imply it by a last linear of their own.
        return bool(given.get("scale_decoder_outputs", given.get("tie_word_embeddings") is not False))

    def check(self, c: Config) -> list[str]:
        kinds = c.feed_forward_proj.split("-")
        if len(kinds) > 2 or (len(kinds) == 2 and kinds[0] != "gated"):
            return [f"feed_forward_proj must be ACTIVATION or gated-ACTIVATION, not {c.feed_forward_proj!r}"]
        return []

    def spec_of(self, given: Mapping[str, Any], architecture: str | None = None) -> ModelSpec | SystemSpec:
        c = self.config(given)
        architecture = architecture or self.architecture(given)
        head = self.form(architecture).node(c)
        if architecture in ENCODER_ONLY:
            return ModelSpec.from_dict({**self._stack(c, False), "head": head})
        decoder = {**self._stack(c, True), "head": head, "memory": ["encoder"]}
        decoder["stem"] = {"use": "encoder.stem", "width": c.d_model}
        return SystemSpec.from_dict({"towers": {"encoder": self._stack(c, False), "decoder": decoder}})

    def _stack(self, c: Config, decodes: bool) -> Data:
        norm = {"part": "rmsnorm", "eps": c.layer_norm_epsilon}
        shape = {
            "part": "attention",
            "heads": c.num_heads,
            "head_width": c.d_kv,
            "bias": False,
            "scale": 1.0,
            "dropout": c.dropout_rate,
        }
        distance = {"kind": "relative", "table": TABLE}
        attention = lean({**shape, "causal": True if decodes else None, "distance": distance})
        cross = [lean({**shape, "memory": "encoder", "id": "cross"})] if decodes else []
        kinds = c.feed_forward_proj.split("-")
        # Before the activation had its own name, gated-gelu meant the tanh form.
        activation = "gelu_new" if c.feed_forward_proj == "gated-gelu" else kinds[-1]
        mlp = {
            "part": "gated-mlp" if len(kinds) == 2 else "mlp",
            "hidden": c.d_ff,
            "activation": activation,
            "bias": False,
            "dropout": c.dropout_rate,
        }
        return {
            "stem": lean(
                {"part": "token-embedding", "vocab": c.vocab_size, "width": c.d_model, "dropout": c.dropout_rate}
            ),
            "conditioners": {
                TABLE: {
                    "part": "relative-bias",
                    "heads": c.num_heads,
                    "buckets": c.relative_attention_num_buckets,
                    "longest": c.relative_attention_max_distance,
                    "bidirectional": not decodes,
                }
            },
            "defaults": {"norm": norm, "order": "pre"},
            "layers": [
                {
                    "repeat": c.get("num_decoder_layers", c.num_layers) if decodes else c.num_layers,
                    "layers": [attention, *cross, lean(mlp)],
                }
            ],
            "final_norm": norm,
        }

    def all_rows(self, given: Mapping[str, Any], architecture: str) -> tuple[Row, ...]:
        rows = super().all_rows(given, architecture)
        if architecture not in ENCODER_ONLY:
            return rows
        tower = "towers.encoder."
        return tuple(
            Row(tuple(name.removeprefix(tower) for name in row.ours), row.theirs, row.change)
            for row in rows
            if row.ours[0].startswith(tower)
        )

    def _others(self) -> list[Row]:
        return [*super()._others(), *self.rows]  # an encoder read alone keeps the decoder

    def untied(self, given: Data) -> Data:
        return {**given, APART: True}

    def published(self, given: Data) -> Data:
        return {key: value for key, value in given.items() if key != APART}

    def config_of(self, facts: Facts) -> Data:
        raise Refusal("T5 configurations are not written from a spec")

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "d_model": 32,
            "d_kv": 6,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 12,
            "decoder_start_token_id": 0,
        }
        last = list(self.heads)[-1]
        if self.name != "t5":
            return [(name, small) for name in self.heads]
        return [
            *((name, small) for name in self.heads),
            (last, {**small, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
            (last, {**small, "feed_forward_proj": "gated-silu"}),
        ]


@register("family", "mt5", paper=Paper("Xue et al.", 2020, "2010.11934"))
class MT5(T5):
    """mT5, with its language head."""

    name = "mt5"
    title = "mT5"
    base = "MT5EncoderModel"
    defaults = {**T5.defaults, "vocab_size": 250112, "d_ff": 1024, "num_layers": 8, "num_heads": 6} | {
        "feed_forward_proj": "gated-gelu"
    }
    heads = {f"M{name}": form for name, form in T5.heads.items()}

    def scaled(self, given: Mapping[str, Any]) -> bool:
        return False
