"""The selective scan's GPU kernels, run by Triton's interpreter on the CPU, against the definition."""

from __future__ import annotations

from pathlib import Path

import pytest

from kernels import compiled, interpreted, needs_triton

SCRIPT = """
import torch
from kernels import agree
from formwright.ops.selective_scan import _as, _general, selective_scan_reference
from formwright.ops.selective_scan import triton as form
from formwright.ops.selective_scan.native import Tensors

form.CHUNK, form.BLOCK = 4, 4  # the interpreter is slow, and borders of chunks and blocks are what is tried
generator = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randn(shape, generator=generator)


def drawn(rows, length, channels, states, documents):
    A = -2 * draw(channels, states).abs()
    token, memory = (rows, length, channels), (rows, length, states)
    wide = draw(rows, length, 2 * states + 1)  # B and C are slices of it
    return Tensors(draw(*token), 3 * draw(*token), A, wide[..., 1 : states + 1], wide[..., -states:], draw(channels),
                   draw(*token), draw(documents, channels, states))


lengths = torch.tensor([9, 0, 2])
x, *others = drawn(3, 9, 5, 3, 3)
x[1] = x[2, 2:] = torch.nan  # padding is not read
given = Tensors(x, *others)


def padded(*tensors):
    x, *others = tensors
    return selective_scan_reference(x.nan_to_num(), *others, lengths, True)


agree(form, padded, given, lengths, None, True)

offsets = torch.tensor([0, 5, 5, 6])
packed = drawn(1, 6, 3, 2, 3)._replace(D=None, z=None)
packed = packed._replace(x=packed.x.bfloat16(), B=packed.B.bfloat16(), delta=packed.delta.abs())
general = lambda *tensors: _general(_as(torch.float64, Tensors(*tensors)), None, offsets, False)
agree(form, general, packed, None, offsets, False)

# Small and large steps keep their digits.
steps = torch.tensor([-90.0, -15.0, -5.0, 0.0, 5.0, 15.0, 90.0])
one = Tensors(*(torch.ones(shape) for shape in ((1, 1, 7), (1, 1, 7), (7, 1), (1, 1, 1), (1, 1, 1))), None, None,
              torch.zeros(1, 7, 1))
one = one._replace(delta=steps[None, None], A=torch.zeros(7, 1))
y, _, kept = form.forward(one, form.rows(one.x, None, None), True, keep=False)
torch.testing.assert_close(y[0, 0].double(), torch.nn.functional.softplus(steps.double(), threshold=1e3), rtol=1e-6,
                           atol=0.0)
assert kept is None
"""


@needs_triton
def test_kernels_equal_the_definition() -> None:
    interpreted(SCRIPT)


@needs_triton
def test_kernels_compile_where_nothing_optional_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from formwright.ops.selective_scan import triton as form

    sizes = {"SOFTPLUS": True, "CHUNK": 8, "BLOCK": 8, "STATES": 2}
    compiled(form.forward_kernel, "D_at z_at kept_at", **sizes)
    compiled(form.backward_kernel, "D_at z_at d_final_at d_D_at d_z_at", **sizes)
