"""What the families of Mamba share: a stack of one mixer with an RMS norm before each layer, no attention and no MLP.

A family adds its defaults, what else its mixer's weight table holds, ``mixer`` and ``told``. Files of the first release
call the token table ``embedding``.
"""

from __future__ import annotations

from typing import Any

from formwright.hub.families._family import Config, Data, Facts, Family, HeadForm, language, states
from formwright.hub.families._table import Change, Row, table
from formwright.kit.errors import Refusal

#: A kernel of one input channel, (channels, 1, taps) on their side.
DEPTHWISE = Change(lambda ts: [t[:, 0] for t in ts], lambda ts: [t[:, None] for t in ts])

#: Settings of every configuration, and what they mean where they are missing.
DEFAULTS: Data = {
    "layer_norm_epsilon": 1e-5,
    "expand": 2,
    "conv_kernel": 4,
    "use_bias": False,
    "use_conv_bias": True,
    "hidden_act": "silu",
}


def stack_rows(mixer: str, *more: tuple[str, str]) -> tuple[Row, ...]:
    """The weight table of a stack of ``mixer``; ``more``: (ours, theirs) inside the mixer, besides what all have."""
    ours, theirs = f"b{{i}}.{mixer}.part.", "layers.{i}.mixer."
    same = [(name, name) for name in ("in_proj.*", "out_proj.*", "A_log", "D")]
    return table(
        ("stem.tokens.weight", "embeddings.weight"),
        (f"b{{i}}.{mixer}.norm.weight", "layers.{i}.norm.weight"),
        (f"{ours}conv.weight", f"{theirs}conv1d.weight", DEPTHWISE),
        (f"{ours}conv.bias", f"{theirs}conv1d.bias"),
        *((ours + mine, theirs + published) for mine, published in (*same, *more)),
        ("final_norm.weight", "norm_f.weight"),
    )


def stack_heads(stem: str) -> dict[str, HeadForm]:
    """The published classes, whose names begin with ``stem``."""
    return {
        f"{stem}Model": HeadForm(states),
        f"{stem}ForCausalLM": HeadForm(
            language, table(("heads.out.out.weight", "lm_head.weight")), {"lm_head.weight": "{p}embeddings.weight"}
        ),
    }


class Stack(Family):
    """See the module."""

    prefix = "backbone."
    renamed = {"embedding.weight": "embeddings.weight"}

    def mixer(self, c: Config) -> Data:
        """The mixer of every layer, as in a spec."""
        raise NotImplementedError

    def told(self, mixer: Any) -> Data:
        """What a configuration says of a mixer besides what all say; Refusal where it cannot."""
        raise NotImplementedError

    def check(self, c: Config) -> list[str]:
        said = f"hidden_act {c.hidden_act!r} is not supported; {self.title}'s is silu"
        return [] if c.hidden_act == "silu" else [said]

    def body(self, c: Config) -> Data:
        norm = {"part": "rmsnorm", "eps": c.layer_norm_epsilon}
        return {
            "stem": {"part": "token-embedding", "vocab": c.vocab_size, "width": c.hidden_size},
            "defaults": {"norm": norm, "order": "pre"},
            "layers": [{"repeat": c.num_hidden_layers, "layers": [self.mixer(c)]}],
            "final_norm": norm,
        }

    def config_of(self, facts: Facts) -> Data:
        mixer = facts.part(self.name)
        if facts.order != "pre":
            raise Refusal(f"{self.title} normalises before each layer")
        return {
            "model_type": self.name,
            "vocab_size": facts.stem.tokens.rows,
            "hidden_size": facts.width,
            "num_hidden_layers": facts.layers,
            "layer_norm_epsilon": facts.eps,
            "conv_kernel": mixer.conv.weight.shape[1],
            "use_bias": mixer.in_proj.dense_bias() is not None,
            "use_conv_bias": mixer.conv.bias is not None,
            "tie_word_embeddings": facts.tied,
            "expand": mixer.out_proj.in_features // facts.width,
            **self.told(mixer),
        }
