"""Mamba: a causal recurrence in every layer, one RMS norm before each, no attention and no MLP (Gu and Dao, 2023,
2312.00752). Files of the first release call the token table ``embedding``."""

from __future__ import annotations

from formwright.hub.families._family import Config, Data, Facts, Family, HeadForm, Maybe, states
from formwright.hub.families._table import Change, table
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register

#: A kernel of one input channel, (channels, 1, taps) on their side.
DEPTHWISE = Change(lambda ts: [t[:, 0] for t in ts], lambda ts: [t[:, None] for t in ts])


def _language(c: Config) -> Data:
    return {"part": "lm", "tied": True} if c.tie_word_embeddings else {"part": "lm", "vocab": c.vocab_size}


@register("family", "mamba", paper=Paper("Gu and Dao", 2023, "2312.00752"))
class Mamba(Family):
    """Mamba, with its language head."""

    name = "mamba"
    title = "Mamba"
    base = "MambaModel"
    prefix = "backbone."
    spellings = {"d_model": "hidden_size", "n_layer": "num_hidden_layers"}
    defaults = {
        "vocab_size": 50280,
        "hidden_size": 768,
        "state_size": 16,
        "num_hidden_layers": 32,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "time_step_rank": Maybe(int),
        "tie_word_embeddings": True,
    }
    rows = table(
        ("stem.tokens.weight", "embeddings.weight"),
        ("b{i}.mamba.norm.weight", "layers.{i}.norm.weight"),
        ("b{i}.mamba.part.in_proj.*", "layers.{i}.mixer.in_proj.*"),
        ("b{i}.mamba.part.conv.weight", "layers.{i}.mixer.conv1d.weight", DEPTHWISE),
        ("b{i}.mamba.part.conv.bias", "layers.{i}.mixer.conv1d.bias"),
        ("b{i}.mamba.part.x_proj.weight", "layers.{i}.mixer.x_proj.weight"),
        ("b{i}.mamba.part.dt_proj.weight", "layers.{i}.mixer.dt_proj.weight"),
        ("b{i}.mamba.part.dt_bias", "layers.{i}.mixer.dt_proj.bias"),
        ("b{i}.mamba.part.A_log", "layers.{i}.mixer.A_log"),
        ("b{i}.mamba.part.D", "layers.{i}.mixer.D"),
        ("b{i}.mamba.part.out_proj.*", "layers.{i}.mixer.out_proj.*"),
        ("final_norm.weight", "norm_f.weight"),
    )
    heads = {
        "MambaModel": HeadForm(states),
        "MambaForCausalLM": HeadForm(
            _language, table(("heads.out.out.weight", "lm_head.weight")), {"lm_head.weight": "{p}embeddings.weight"}
        ),
    }
    renamed = {"embedding.weight": "embeddings.weight"}

    def check(self, c: Config) -> list[str]:
        return [] if c.hidden_act == "silu" else [f"hidden_act {c.hidden_act!r} is not supported; Mamba's is silu"]

    def body(self, c: Config) -> Data:
        norm = {"part": "rmsnorm", "eps": c.layer_norm_epsilon}
        mixer: Data = {"part": "mamba", "state": c.state_size, "expand": c.expand, "conv": c.conv_kernel}
        if c.get("time_step_rank"):
            mixer["rank"] = c.time_step_rank
        mixer |= {"bias": c.use_bias, "conv_bias": c.use_conv_bias}
        return {
            "stem": {"part": "token-embedding", "vocab": c.vocab_size, "width": c.hidden_size},
            "defaults": {"norm": norm, "order": "pre"},
            "layers": [{"repeat": c.num_hidden_layers, "layers": [mixer]}],
            "final_norm": norm,
        }

    def config_of(self, facts: Facts) -> Data:
        mixer = facts.part("mamba")
        if mixer.x_proj is None or mixer.dt_proj is None or facts.order != "pre":
            raise Refusal("Mamba's step, B and C depend on the token, and it normalises before each layer")
        inner, state = mixer.A_log.shape
        return {
            "model_type": self.name,
            "vocab_size": facts.stem.tokens.rows,
            "hidden_size": facts.width,
            "state_size": state,
            "num_hidden_layers": facts.layers,
            "layer_norm_epsilon": facts.eps,
            "expand": inner // facts.width,
            "intermediate_size": inner,
            "conv_kernel": mixer.conv.weight.shape[1],
            "use_bias": mixer.in_proj.dense_bias() is not None,
            "use_conv_bias": mixer.conv.bias is not None,
            "time_step_rank": mixer.dt_proj.in_features,
            "tie_word_embeddings": facts.tied,
        }

    def examples(self) -> list[tuple[str, Data]]:
        small = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
        other = {"expand": 1, "use_bias": True, "use_conv_bias": False, "time_step_rank": 3, "conv_kernel": 3}
        return [
            *((name, small) for name in self.heads),
            ("MambaForCausalLM", {**small, **other, "tie_word_embeddings": False}),
        ]
