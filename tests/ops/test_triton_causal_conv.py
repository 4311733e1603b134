"""The short causal convolution's GPU kernels, run by Triton's interpreter on the CPU, against the definition."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import compiled, interpreted, needs_triton

SCRIPT = """
import torch
from kernels import agree
from formwright.ops.causal_conv import _general, causal_conv_reference
from formwright.ops.causal_conv import triton as form
from formwright.ops.causal_conv.native import Tensors

form.TILE, form.BLOCK = 8, 4  # the interpreter is slow, and borders of tiles and blocks are what is tried
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=generator)

lengths = torch.tensor([10, 0, 2])
x = draw(3, 10, 6)[..., 1:]  # a slice of something wider
x[1] = x[2, 2:] = torch.nan  # padding is not read
given = Tensors(x, draw(5, 4), draw(5), draw(3, 3, 5))
padded = lambda x, *others: causal_conv_reference(x.nan_to_num(), *others, lengths, True)
agree(form, padded, given, lengths, None, True)

offsets = torch.tensor([0, 7, 7, 9])
packed = Tensors(draw(1, 9, 3).bfloat16(), draw(3, 3), None, draw(3, 2, 3).bfloat16())
general = lambda *tensors: _general(Tensors(*tensors), None, offsets, False)
agree(form, general, packed, None, offsets, False)
"""


@needs_triton
def test_kernels_equal_the_definition() -> None:
    interpreted(SCRIPT)


@needs_triton
def test_kernels_compile_where_nothing_optional_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from formwright.ops.causal_conv import triton as form

    sizes = {"SILU": True, "TAPS": 3, "TILE": 8, "BLOCK": 8}
    compiled(form.forward_kernel, "bias_at", **sizes)
    compiled(form.backward_kernel, "bias_at d_final_at", **sizes)
