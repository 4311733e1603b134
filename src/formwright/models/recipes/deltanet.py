"""DeltaNet language models (Yang et al., 2024, 2406.06484) and their hybrids with attention.

Pre-norm with RMSNorm, SwiGLU of 8/3 width rounded up to a multiple of 256, no positions: the recurrence has an order.
At 24 layers of width 1024 with a tied head 341,594,112 parameters, of width 2048 with its own 1,365,677,056. A hybrid
has attention in place of DeltaNet in some layers: over a window in every second one, or over everything in two.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from formwright.kit.errors import SpecError, all_of
from formwright.registry import Paper, register

PAPER = Paper("Yang et al.", 2024, "2406.06484")


def _model(
    vocab: int,
    width: int,
    layers: int,
    heads: int,
    hidden: int | None,
    tied: bool,
    attention: Sequence[int] = (),
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The spec; layers whose index stands in ``attention`` attend with ``options``."""
    if width < 1 or heads < 1 or width % heads:
        raise SpecError(f"deltanet recipes: heads={heads} must divide width={width}")
    wrong = [index for index in attention if not 0 <= index < layers]
    twice = sorted({index for index in attention if list(attention).count(index) > 1})
    all_of(
        SpecError,
        [f"deltanet recipes: there is no layer {index} among {layers} to attend (0 .. {layers - 1})" for index in wrong]
        + [f"deltanet recipes: layer {index} stands twice in attention={list(attention)}" for index in twice],
    )
    hidden = hidden or -(-(8 * width // 3) // 256) * 256
    delta = {"part": "deltanet", "heads": heads}
    attend = {"part": "attention", "causal": True, "bias": False, **(options or {})}
    norm = {"part": "rmsnorm", "eps": 1e-6}

    def block(mixer: dict[str, Any], times: int = 1) -> dict[str, Any]:
        return {"repeat": times, "layers": [mixer, {"part": "gated-mlp", "hidden": hidden}]}

    mixers = [attend if index in attention else delta for index in range(layers)]
    return {
        "stem": {"part": "token-embedding", "vocab": vocab, "width": width},
        "defaults": {"norm": norm, "order": "pre"},
        "layers": [block(mixer) for mixer in mixers] if attention else [block(delta, layers)],
        "final_norm": norm,
        "head": {"part": "lm", "tied": True} if tied else {"part": "lm", "vocab": vocab},
    }


@register("recipe", "deltanet-340m", paper=PAPER, summary="DeltaNet with 342 million parameters, tied head")
def deltanet_340m(
    vocab: int = 32_000,
    width: int = 1024,
    layers: int = 24,
    heads: int = 8,
    hidden: int | None = None,
    tied: bool = True,
) -> dict[str, Any]:
    """The smaller published size, or any other."""
    return _model(vocab, width, layers, heads, hidden, tied)


@register("recipe", "deltanet-1.3b", paper=PAPER, summary="DeltaNet with 1.37 billion parameters")
def deltanet_1_3b(
    vocab: int = 32_000,
    width: int = 2048,
    layers: int = 24,
    heads: int = 16,
    hidden: int | None = None,
    tied: bool = False,
) -> dict[str, Any]:
    """The larger published size, or any other."""
    return _model(vocab, width, layers, heads, hidden, tied)


@register("recipe", "deltanet-window", paper=PAPER, summary="DeltaNet, and a window of attention in every second layer")
def deltanet_window(
    vocab: int = 32_000,
    width: int = 1024,
    layers: int = 24,
    heads: int = 8,
    hidden: int | None = None,
    tied: bool = True,
    attention: Sequence[int] | None = None,
    attention_heads: int | None = None,
    kv_heads: int | None = None,
    window: int = 2048,
    theta: float = 10_000.0,
) -> dict[str, Any]:
    """Layers ``attention`` (default 1, 3, 5, ...) attend over the last ``window`` tokens, with rotary positions."""
    chosen = tuple(range(1, layers, 2)) if attention is None else tuple(attention)
    options = _attention(attention_heads or heads, kv_heads, theta) | {"window": window}
    return _model(vocab, width, layers, heads, hidden, tied, chosen, options)


@register("recipe", "deltanet-global", paper=PAPER, summary="DeltaNet, and attention over everything in two layers")
def deltanet_global(
    vocab: int = 32_000,
    width: int = 1024,
    layers: int = 24,
    heads: int = 8,
    hidden: int | None = None,
    tied: bool = True,
    attention: Sequence[int] | None = None,
    attention_heads: int | None = None,
    kv_heads: int | None = None,
    theta: float = 10_000.0,
) -> dict[str, Any]:
    """Layers ``attention`` attend over all earlier tokens: by default the second and the one before the middle, 1 and
    layers / 2 - 1, as the paper's text counts them (its picture has layers / 2)."""
    chosen = tuple(sorted({min(1, layers - 1), max(layers // 2 - 1, 0)})) if attention is None else tuple(attention)
    options = _attention(attention_heads or heads, kv_heads, theta)
    return _model(vocab, width, layers, heads, hidden, tied, chosen, options)


def _attention(heads: int, kv_heads: int | None, theta: float) -> dict[str, Any]:
    grouped = {} if kv_heads is None else {"kv_heads": kv_heads}
    return {"heads": heads, **grouped, "rotary": {"theta": theta}}
