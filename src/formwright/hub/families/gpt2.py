"""GPT-2: a causal decoder with learned positions, pre-norm, whose matrices are stored (in, out) and whose query, key
and value are one matrix (Radford et al., 2019)."""

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
    states,
    token_head,
)
from formwright.hub.families._table import TRANSPOSED, fused, table
from formwright.kit.errors import Refusal
from formwright.registry import Paper, register


def _tokens(c: Config) -> Data:
    return token_head(c, dropout=float(c.get("classifier_dropout", c.get("hidden_dropout", 0.1))))


@register("family", "gpt2", paper=Paper("Radford et al.", 2019))
class GPT2(Family):
    """GPT-2, with its language, sequence (last token) and token heads."""

    name = "gpt2"
    title = "GPT-2"
    base = "GPT2Model"
    prefix = "transformer."
    spellings = {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
    defaults = {
        "vocab_size": 50257,
        "n_positions": 1024,
        "n_embd": 768,
        "n_layer": 12,
        "n_head": 12,
        "n_inner": Maybe(int),
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "classifier_dropout": Maybe(float),
        "hidden_dropout": Maybe(float),
        "tie_word_embeddings": True,
    }
    rows = table(
        ("stem.tokens.weight", "wte.weight"),
        ("stem.positions.table.weight", "wpe.weight"),
        ("b{i}.attention.norm.*", "h.{i}.ln_1.*"),
        (
            ("b{i}.attention.part.q.*", "b{i}.attention.part.k.*", "b{i}.attention.part.v.*"),
            "h.{i}.attn.c_attn.*",
            fused(3, transposed=True),
        ),
        ("b{i}.attention.part.o.*", "h.{i}.attn.c_proj.*", TRANSPOSED),
        ("b{i}.mlp.norm.*", "h.{i}.ln_2.*"),
        ("b{i}.mlp.part.up.*", "h.{i}.mlp.c_fc.*", TRANSPOSED),
        ("b{i}.mlp.part.down.*", "h.{i}.mlp.c_proj.*", TRANSPOSED),
        ("final_norm.*", "ln_f.*"),
    )
    heads = {
        "GPT2Model": HeadForm(states),
        "GPT2LMHeadModel": HeadForm(
            language, table(("heads.out.out.weight", "lm_head.weight")), {"lm_head.weight": "{p}wte.weight"}
        ),
        "GPT2ForSequenceClassification": HeadForm(
            lambda c: sequence_head(c, pool="last", bias=False), table(("heads.out.out.weight", "score.weight"))
        ),
        "GPT2ForTokenClassification": HeadForm(_tokens, table(("heads.out.out.*", "classifier.*"))),
    }
    #: The causal mask, which old files store as tensors.
    ignored = (r".*\.attn\.(masked_)?bias",)

    def check(self, c: Config) -> list[str]:
        return ["add_cross_attention is not supported"] if c.add_cross_attention else []

    def body(self, c: Config) -> Data:
        hidden = c.get("n_inner", 4 * c.n_embd)
        mlp = lean({"part": "mlp", "hidden": hidden, "activation": c.activation_function, "dropout": c.resid_pdrop})

        def attention(scale: float | None) -> Data:
            node = {"part": "attention", "heads": c.n_head, "causal": True, "scale": scale, "dropout": c.resid_pdrop}
            return lean(node)

        scale = None if c.scale_attn_weights else 1.0
        layers = [{"repeat": c.n_layer, "layers": [attention(scale), mlp]}]
        if c.scale_attn_by_inverse_layer_idx:
            whole = (c.n_embd // c.n_head) ** -0.5 if scale is None else scale
            layers = [{"repeat": 1, "layers": [attention(whole / (i + 1)), mlp]} for i in range(c.n_layer)]
        return {
            "stem": lean(
                {
                    "part": "token-embedding",
                    "vocab": c.vocab_size,
                    "width": c.n_embd,
                    "positions": {"kind": "learned", "max": c.n_positions},
                    "dropout": c.embd_pdrop,
                }
            ),
            "defaults": {"norm": layernorm(c.layer_norm_epsilon), "order": "pre"},
            "layers": layers,
            "final_norm": layernorm(c.layer_norm_epsilon),
        }

    def config_of(self, facts: Facts) -> Data:
        if facts.order != "pre" or not facts.attention.rule.causal:
            raise Refusal("GPT-2 is causal and normalises before each sublayer")
        return {
            "model_type": self.name,
            "vocab_size": facts.stem.tokens.rows,
            "n_positions": facts.positions.table.rows,
            "n_embd": facts.width,
            "n_layer": facts.layers,
            "n_head": facts.attention.heads,
            "n_inner": facts.hidden,
            "activation_function": facts.act("gelu_new", "gelu"),
            "resid_pdrop": facts.mlp.rate,
            "embd_pdrop": facts.stem.rate,
            "layer_norm_epsilon": facts.eps,
            "scale_attn_weights": facts.attention.scale is None,
            "tie_word_embeddings": facts.tied,
        }

    def examples(self) -> list[tuple[str, Data]]:
        small = {
            "vocab_size": 90,
            "n_positions": 40,
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "num_labels": 3,
            "bos_token_id": 1,
            "eos_token_id": 1,
            "pad_token_id": 0,
        }
        return [
            *((name, small) for name in self.heads),
            ("GPT2LMHeadModel", {**small, "tie_word_embeddings": False, "n_inner": 40}),
            ("GPT2LMHeadModel", {**small, "scale_attn_by_inverse_layer_idx": True, "activation_function": "relu"}),
            ("GPT2Model", {**small, "scale_attn_weights": False, "reorder_and_upcast_attn": True}),
        ]
