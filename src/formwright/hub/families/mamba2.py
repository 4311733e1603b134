"""Mamba-2: a state-space dual in every layer, one RMS norm before each, no attention and no MLP (Dao and Gu, 2024,
2405.21060). The published class normalises all channels of a layer at once, however many groups share B and C."""

from __future__ import annotations

from formwright.hub.families._family import Config, Data, Facts, Family, HeadForm, states, wrong
from formwright.hub.families._table import table
from formwright.hub.families.mamba import DEPTHWISE
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register

#: How published configurations write infinity, which JSON cannot say.
UNBOUNDED = {"__float__": "Infinity"}


def _language(c: Config) -> Data:
    return {"part": "lm", "tied": True} if c.tie_word_embeddings else {"part": "lm", "vocab": c.vocab_size}


@register("family", "mamba2", paper=Paper("Dao and Gu", 2024, "2405.21060"))
class Mamba2(Family):
    """Mamba-2, with its language head."""

    name = "mamba2"
    title = "Mamba-2"
    base = "Mamba2Model"
    prefix = "backbone."
    defaults = {
        "vocab_size": 32768,
        "hidden_size": 4096,
        "state_size": 128,
        "num_hidden_layers": 64,
        "num_heads": 128,
        "head_dim": 64,
        "n_groups": 8,
        "layer_norm_epsilon": 1e-5,
        "expand": 2,
        "conv_kernel": 4,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "time_step_limit": [0.0, UNBOUNDED],
        "tie_word_embeddings": False,
    }
    rows = table(
        ("stem.tokens.weight", "embeddings.weight"),
        ("b{i}.mamba2.norm.weight", "layers.{i}.norm.weight"),
        ("b{i}.mamba2.part.in_proj.*", "layers.{i}.mixer.in_proj.*"),
        ("b{i}.mamba2.part.conv.weight", "layers.{i}.mixer.conv1d.weight", DEPTHWISE),
        ("b{i}.mamba2.part.conv.bias", "layers.{i}.mixer.conv1d.bias"),
        ("b{i}.mamba2.part.dt_bias", "layers.{i}.mixer.dt_bias"),
        ("b{i}.mamba2.part.A_log", "layers.{i}.mixer.A_log"),
        ("b{i}.mamba2.part.D", "layers.{i}.mixer.D"),
        ("b{i}.mamba2.part.norm.weight", "layers.{i}.mixer.norm.weight"),
        ("b{i}.mamba2.part.out_proj.*", "layers.{i}.mixer.out_proj.*"),
        ("final_norm.weight", "norm_f.weight"),
    )
    heads = {
        "Mamba2Model": HeadForm(states),
        "Mamba2ForCausalLM": HeadForm(
            _language, table(("heads.out.out.weight", "lm_head.weight")), {"lm_head.weight": "{p}embeddings.weight"}
        ),
    }
    renamed = {"embedding.weight": "embeddings.weight"}

    def check(self, c: Config) -> list[str]:
        found = [] if c.hidden_act == "silu" else [f"hidden_act {c.hidden_act!r} is not supported; Mamba-2's is silu"]
        if c.hidden_size * c.expand != c.num_heads * c.head_dim:
            found.append(
                f"hidden_size {c.hidden_size} times expand {c.expand} must be num_heads {c.num_heads} times head_dim "
                f"{c.head_dim}"
            )
        limits = c.time_step_limit
        said = [limit for limit in limits if limit not in (UNBOUNDED, float("inf"))]
        if len(limits) != 2 or any(wrong("time_step_limit", limit, float) for limit in said):
            found.append(f"time_step_limit must be a least and a greatest step, not {limits!r}")
        return found

    def body(self, c: Config) -> Data:
        norm = {"part": "rmsnorm", "eps": c.layer_norm_epsilon}
        least, most = (limit if isinstance(limit, (int, float)) else float("inf") for limit in c.time_step_limit)
        mixer = {
            "part": "mamba2",
            "state": c.state_size,
            "head_width": c.head_dim,
            "expand": c.expand,
            "groups": c.n_groups,
            "kernel": c.conv_kernel,
            "conv_bias": c.use_conv_bias,
            "bias": c.use_bias,
            "step_range": [least or None, None if most == float("inf") else most],
            "norm_groups": 1,
            "eps": c.layer_norm_epsilon,
        }
        return {
            "stem": {"part": "token-embedding", "vocab": c.vocab_size, "width": c.hidden_size},
            "defaults": {"norm": norm, "order": "pre"},
            "layers": [{"repeat": c.num_hidden_layers, "layers": [mixer]}],
            "final_norm": norm,
        }

    def config_of(self, facts: Facts) -> Data:
        mixer = facts.part("mamba2")
        if mixer.norm.groups != 1 or facts.order != "pre":
            raise Refusal("Mamba-2 configurations normalise all channels of a layer at once, and before each layer")
        return {
            "model_type": self.name,
            "vocab_size": facts.stem.tokens.rows,
            "hidden_size": facts.width,
            "state_size": mixer.state,
            "num_hidden_layers": facts.layers,
            "num_heads": mixer.heads,
            "head_dim": mixer.inner // mixer.heads,
            "n_groups": mixer.groups,
            "layer_norm_epsilon": facts.eps,
            "expand": mixer.inner // facts.width,
            "conv_kernel": mixer.conv.weight.shape[1],
            "use_bias": mixer.in_proj.dense_bias() is not None,
            "use_conv_bias": mixer.conv.bias is not None,
            "time_step_limit": [mixer.least or 0.0, UNBOUNDED if mixer.most is None else mixer.most],
            "tie_word_embeddings": facts.tied,
        }

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
        }
        other = {"use_bias": True, "use_conv_bias": False, "conv_kernel": 3, "time_step_limit": [0.01, 1.0]}
        return [
            *((name, small) for name in self.heads),
            ("Mamba2ForCausalLM", {**small, **other, "n_groups": 8, "tie_word_embeddings": True}),
        ]
