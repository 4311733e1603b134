"""Qwen2: Llama with biases on query, key and value, and a window in its later layers where asked (Yang et al., 2024,
2407.10671)."""

from __future__ import annotations

from formwright.hub.families._family import Config, Data, Facts, Maybe
from formwright.hub.families.llama import SMALL, Llama, decoder_heads
from formwright.registry import Paper, register

SLIDING, FULL = "sliding_attention", "full_attention"


@register("family", "qwen2", paper=Paper("Yang et al.", 2024, "2407.10671"))
class Qwen2(Llama):
    """Qwen2, with its language, sequence (last token) and token heads."""

    name = "qwen2"
    title = "Qwen2"
    base = "Qwen2Model"
    defaults = {
        **{key: value for key, value in Llama.defaults.items() if not key.endswith("_bias")},
        "vocab_size": 151936,
        "intermediate_size": 22016,
        "num_key_value_heads": Maybe(int, 32),
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "sliding_window": Maybe(int, 4096),
        "max_window_layers": 28,
        "layer_types": Maybe(list),
    }
    heads = decoder_heads("Qwen2")

    def check(self, c: Config) -> list[str]:
        kinds = c.layer_types
        if kinds is None:
            return []
        if not isinstance(kinds, list) or len(kinds) != c.num_hidden_layers:
            return [f"layer_types must name the kind of each of the {c.num_hidden_layers} layers"]
        strange = sorted({str(kind) for kind in kinds} - {SLIDING, FULL})
        return [f"layer type {kind!r} is neither {SLIDING} nor {FULL}" for kind in strange]

    def biases(self, c: Config) -> Data:
        return {"bias": True, "out_bias": False}

    def windows(self, c: Config) -> list[int | None]:
        window = c.sliding_window if c.use_sliding_window else None
        if c.layer_types is not None:
            return [window if kind == SLIDING else None for kind in c.layer_types]
        return [window if index >= c.max_window_layers else None for index in range(c.num_hidden_layers)]

    def config_of(self, facts: Facts) -> Data:
        told = super().config_of(facts)
        del told["attention_bias"], told["mlp_bias"]
        windows = [part.rule.window for _, part in facts.model.parts() if hasattr(part, "rule")]
        widest = next((window for window in windows if window is not None), None)
        return {
            **told,
            "use_sliding_window": widest is not None,
            "sliding_window": widest,
            "layer_types": [FULL if window is None else SLIDING for window in windows],
        }

    def examples(self) -> list[tuple[str, Data]]:
        window = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
        return [
            *((name, SMALL) for name in self.heads),
            ("Qwen2ForCausalLM", {**SMALL, **window, "tie_word_embeddings": True}),
        ]
