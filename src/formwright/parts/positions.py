"""Where a token stands: rotary angles with their scalings, sinusoids, ALiBi slopes and T5's distance buckets.

Everything here is a function of positions, computed when needed; no table is stored in a model. Rotary embedding: Su
et al., 2021 (2104.09864); linear and NTK scaling as in position interpolation (2306.15595); ``llama3`` as in Llama
3.1; ``yarn``: Peng et al., 2023 (2309.00071); ``longrope``: Ding et al., 2024 (2402.13753). ALiBi: Press et al., 2021
(2108.12409). Buckets: Raffel et al., 2019 (1910.10683).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from formwright.kit.errors import SpecError, unknown

ROTARY_KEYS = {"theta", "width", "interleaved", "scaling"}
SCALINGS = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original"},
    "yarn": {"factor", "original"},
    "longrope": {"short_factor", "long_factor", "original"},
}


def check_rotary(options: Mapping[str, Any], head: int | None = None) -> None:
    """SpecError for an unknown key, a scaling that lacks an argument, or a width that a ``head`` of so many entries
    has not."""
    for key in options:
        if key not in ROTARY_KEYS:
            raise SpecError(unknown("rotary option", key, ROTARY_KEYS))
    scaling = options.get("scaling") or {"kind": "default"}
    kind = scaling.get("kind", "default")
    if kind not in SCALINGS:
        raise SpecError(unknown("rotary scaling", kind, SCALINGS))
    missing = SCALINGS[kind] - set(scaling)
    if missing:
        raise SpecError(f"rotary scaling {kind!r} needs {', '.join(sorted(missing))}")
    if head is not None:
        turned = options.get("width") or head
        if turned > head or turned % 2:
            raise SpecError(f"rotary turns pairs of a head's {head} entries, so its width cannot be {turned}")


def rotary_frequencies(width: int, options: Mapping[str, Any], length: int) -> tuple[Tensor, float]:
    """(width/2,) float32 angular frequencies and the factor on cosines and sines, for a call reaching ``length``."""
    theta = float(options.get("theta", 10_000.0))
    scaling = options.get("scaling") or {}
    kind = scaling.get("kind", "default")
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    base = 1.0 / theta**exponents
    if kind == "default":
        return base, 1.0
    if kind == "linear":
        return base / scaling["factor"], 1.0
    if kind == "dynamic":
        factor, original = scaling["factor"], scaling["original"]
        reach = max(length, original)
        stretched = theta * ((factor * reach / original) - (factor - 1)) ** (width / (width - 2))
        return 1.0 / stretched**exponents, 1.0
    if kind == "llama3":
        return _llama3(base, scaling), 1.0
    if kind == "yarn":
        return _yarn(base, theta, width, scaling)
    original = scaling["original"]
    chosen = scaling["long_factor"] if length > original else scaling["short_factor"]
    factor = scaling.get("factor", 1.0)
    attention = scaling.get("attention_factor")
    if attention is None:
        attention = 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))
    return 1.0 / (torch.tensor(chosen, dtype=torch.float32) * theta**exponents), float(attention)


def _llama3(base: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * math.pi / base
    slow = torch.where(wavelength > scaling["original"] / low, base / factor, base)
    smooth = (scaling["original"] / wavelength - low) / (high - low)
    between = (1 - smooth) * slow / factor + smooth * slow
    middle = (wavelength >= scaling["original"] / high) & (wavelength <= scaling["original"] / low)
    return torch.where(middle, between, slow)


def _yarn(base: Tensor, theta: float, width: int, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    factor, original = scaling["factor"], scaling["original"]

    def magnitude(by: float, of: float = 1.0) -> float:
        return 1.0 if by <= 1 else 0.1 * of * math.log(by) + 1.0

    attention = scaling.get("attention_factor")
    if attention is None:
        mscale, all_dims = scaling.get("mscale"), scaling.get("mscale_all_dim")
        attention = (
            magnitude(factor, mscale) / magnitude(factor, all_dims) if mscale and all_dims else magnitude(factor)
        )

    def dimension(rotations: float) -> float:
        return (width * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low, high = dimension(scaling.get("beta_fast") or 32), dimension(scaling.get("beta_slow") or 1)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = ((torch.arange(width // 2, dtype=torch.float32) - low) / ((high - low) or 0.001)).clamp(0, 1)
    return (base / factor) * ramp + base * (1 - ramp), float(attention)


_angles: dict[tuple, tuple[weakref.ref, Tensor, Tensor]] = {}


def rotary_angles(
    positions: Tensor, width: int, options: Mapping[str, Any], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, L, 1, width/2). All layers of a forward share one computation: the last is kept."""
    key = (width, repr(sorted(options.items())), dtype, positions.device, torch.is_inference_mode_enabled())
    kept = _angles.get(key)
    if kept is not None and kept[0]() is positions:
        return kept[1], kept[2]
    reach = 0
    if (options.get("scaling") or {}).get("kind") in ("dynamic", "longrope"):
        reach = int(positions.max()) + 1 if positions.numel() else 0
    frequencies, factor = rotary_frequencies(width, options, reach)
    precise = torch.float64 if dtype == torch.float64 else torch.float32
    angles = positions[..., None].to(precise) * frequencies.to(positions.device, precise)
    cos, sin = ((f(angles) * factor).to(dtype)[:, :, None] for f in (torch.cos, torch.sin))
    _angles[key] = (weakref.ref(positions), cos, sin)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Turn the first ``2 * cos.shape[-1]`` entries of x (B, L, H, D); halves are pairs unless ``interleaved``."""
    width = 2 * cos.shape[-1]
    turned, rest = (x, None) if width == x.shape[-1] else (x[..., :width], x[..., width:])
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return out if rest is None else torch.cat((out, rest), -1)


def sinusoids(positions: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """(B, L) -> (B, L, width): sin of position / 10000^(2i/width) in even places, cos in odd ones (1706.03762)."""
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float64) * (-math.log(10_000.0) / width))
    angles = positions[..., None].double() * rate.to(positions.device)
    out = torch.stack((angles.sin(), angles.cos()), -1).flatten(-2)[..., :width]
    return out.to(dtype)


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) slopes: 2^(-8i/n) for the nearest power of two, then every other one of the next finer series."""
    whole = 2 ** math.floor(math.log2(heads))
    slopes = [2 ** (-8 * (i + 1) / whole) for i in range(whole)]
    slopes += [2 ** (-4 * (2 * i + 1) / whole) for i in range(heads - whole)]
    return torch.tensor(slopes)


def distance_buckets(distance: Tensor, bidirectional: bool, buckets: int, longest: int) -> Tensor:
    """T5's bucket of each distance (key position - query position): half exact, half logarithmic up to ``longest``."""
    out = torch.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        out = (distance > 0).long() * buckets
        distance = distance.abs()
    else:
        distance = (-distance).clamp(min=0)
    exact = buckets // 2
    far = exact + (
        torch.log(distance.float().clamp(min=1) / exact) / math.log(longest / exact) * (buckets - exact)
    ).long().clamp(max=buckets - exact - 1)
    return out + torch.where(distance < exact, distance, far)
