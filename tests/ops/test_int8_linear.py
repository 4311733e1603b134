"""The 8-bit linear map against its definition: exact integers on every route, the error bound, defined odd cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from formwright.kit.errors import SpecError
from formwright.ops import int8_linear as op
from formwright.ops.int8_linear.products import Product, onednn_levels, route
from formwright.ops.int8_linear.reference import input_range, product_reference, quantize_input_reference

CPU = torch.device("cpu")
ROUTES = ["float"] + (["onednn"] if onednn_levels() else [])
SIZES = st.integers(1, 70)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(rows: int, columns: int, most: int, seed: int) -> torch.Tensor:
    """Extreme values only: all at the end, mixed signs, or random."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(-most, most + 1, (rows, columns), generator=generator)
    extreme = torch.where(torch.rand(rows, columns, generator=generator) < 0.5, most, -most)
    kind = torch.arange(rows)[:, None] % 3
    return torch.where(kind == 0, most, torch.where(kind == 1, extreme, q))


def made(weight: torch.Tensor, scheme: str = "vector", outliers: list[int] | None = None) -> op.Packed:
    """Packed, with ``outliers`` as fixed ones."""
    columns = torch.tensor(outliers or [], dtype=torch.long)
    q, scale, zero = op.quantize_weight(weight, op.SCHEMES[scheme])
    gains = None
    if outliers is not None:
        q[:, columns], some = op.quantize_columns(weight[:, columns], scale)
        gains = torch.zeros(weight.shape[1]).index_copy(0, columns, some)
    return op.Packed(q, scale, zero, gains)


@pytest.mark.parametrize("name", ROUTES)
@given(rows=SIZES, columns=st.integers(1, 150), out=SIZES, seed=st.integers(0, 99))
def test_integers_are_exact_on_every_route(name: str, rows: int, columns: int, out: int, seed: int) -> None:
    product = Product(integers(out, columns, 127, seed + 1).to(torch.int8), by=name)
    q_x = integers(rows, columns, product.levels, seed)
    y = product((q_x + product.offset).to(product.dtype), torch.ones(out))
    torch.testing.assert_close(y, product_reference(q_x, product.weight).float(), rtol=0, atol=0)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("shape", [(1, 3072, 16), (1, 64, 1), (33, 4096, 17), (300, 1536, 40)])
def test_sums_that_would_clip_are_exact(name: str, shape: tuple[int, int, int]) -> None:
    """Every product at its greatest, over more columns than float32 could add."""
    rows, columns, out = shape
    product = Product(torch.full((out, columns), -127, dtype=torch.int8), by=name)
    q_x = torch.full((rows, columns), product.levels)
    y = product((q_x + product.offset).to(product.dtype), torch.ones(out))
    assert torch.equal(y, torch.full((rows, out), -127 * product.levels * columns, dtype=torch.int64).float())


def test_full_range_would_clip_where_fewer_levels_are_used() -> None:
    """The probe that chooses the levels sees what it is for."""
    if onednn_levels() != 64:
        assert route(CPU) in (("onednn", 127), ("float", 127))
        return
    from formwright.ops.int8_linear.products import _tried

    assert not _tried(127, 40, 192, 48)
    assert _tried(64, 1, 7, 3) and _tried(64, 300, 1000, 50)


def test_signed_and_shifted_products_are_the_same_integers() -> None:
    """s8 x s8 = u8 x s8 - offset x sums of the weight's rows, for both offsets."""
    q_w = integers(9, 31, 127, 0)
    for levels, offset in ((127, 128), (64, 64)):
        q_x = integers(5, 31, levels, 1)
        assert int((q_x + offset).min()) >= 0 and int((q_x + offset).max()) <= 255
        shifted = product_reference(q_x + offset, q_w) - offset * q_w.sum(1)
        assert torch.equal(shifted, product_reference(q_x, q_w))


def test_all_routes_give_one_result() -> None:
    weight, x = drawn(24, 50), drawn(7, 50, seed=1)
    q, scale, _ = op.quantize_weight(weight)
    levels = route(CPU)[1]
    results = []
    for name in ROUTES:
        packed = op.Packed(q, scale, product=Product(q, by=name, levels=levels))
        results.append(op.int8_linear(x, [packed], [None])[0])
    for y in results:
        assert torch.equal(y, results[0])


@pytest.mark.parametrize("levels", [127, 64])
@given(rows=SIZES, columns=SIZES, seed=st.integers(0, 99))
def test_inputs_become_the_integers_of_the_definition(levels: int, rows: int, columns: int, seed: int) -> None:
    x = drawn(rows, columns, seed=seed) * 10.0 ** (seed % 7 - 3)
    x[0] = torch.arange(columns) + 0.5  # ties
    product = Product(torch.zeros(1, columns, dtype=torch.int8), by="float", levels=levels)
    for scheme in op.SCHEMES.values():
        prepared = op.prepare(x, product, scheme)
        q, step, zero = quantize_input_reference(x, scheme, levels)
        assert torch.equal(prepared.q.long() - product.offset, q)
        assert torch.equal(prepared.step, step)
        assert (zero is None) == (prepared.zero is None)
        assert zero is None or torch.equal(zero, prepared.zero)
        assert int(q.abs().max()) <= levels


@pytest.mark.parametrize("scheme", op.SCHEMES)
@pytest.mark.parametrize("columns", [None, [2, 5], [0]])
@given(rows=st.integers(1, 40), out=st.integers(1, 40), seed=st.integers(0, 99))
def test_layer_equals_its_definition(scheme: str, columns: list[int] | None, rows: int, out: int, seed: int) -> None:
    x, weight, bias = drawn(rows, 37, seed=seed), drawn(out, 37, seed=seed + 1), drawn(out, seed=seed + 2)
    x[:, :3] *= 30
    packed = made(weight, scheme, columns)
    y = op.int8_linear(x, [packed], [bias], scheme=op.SCHEMES[scheme])[0]
    wanted = op.int8_linear_reference(
        x,
        packed.weight,
        packed.scale,
        bias,
        scheme=scheme,
        zero=packed.zero,
        gains=packed.gains,
        levels=packed.levels,
    )
    torch.testing.assert_close(y.double(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


@given(rows=st.integers(1, 40), columns=st.integers(1, 90), seed=st.integers(0, 99))
def test_error_stays_under_its_bound(rows: int, columns: int, seed: int) -> None:
    """|y - x W^T| <= sum_k |x| s_w/2 + |W| s_x/2 + s_x s_w/4, by element."""
    x, weight = drawn(rows, columns, seed=seed).double(), drawn(11, columns, seed=seed + 1).double()
    packed = made(weight)
    y = op.int8_linear(x.float(), [packed], [None])[0].double()
    s_w, s_x = weight.abs().amax(1) / 127, x.abs().amax(1, keepdim=True) / packed.levels
    x, weight = x.float().double(), weight.float().double()
    bound = x.abs().sum(1, keepdim=True) * s_w / 2 + s_x / 2 * weight.abs().sum(1) + columns * s_x * s_w / 4
    assert bool(((y - x @ weight.T).abs() <= bound * (1 + 1e-5) + 1e-6).all())


def test_threshold_without_outliers_changes_nothing() -> None:
    x, packed = drawn(6, 40).clamp(-5.0, 5.0), made(drawn(8, 40, seed=1))
    plain = op.int8_linear(x, [packed], [None])[0]
    assert torch.equal(op.int8_linear(x, [packed], [None], threshold=6.0)[0], plain)
    assert torch.equal(op.int8_linear(x, [packed], [None], threshold=0.0)[0], plain)


def test_outliers_found_in_a_batch_are_those_of_the_definition() -> None:
    x, weight = drawn(12, 40), drawn(8, 40, seed=1)
    x[3, 7], x[5, 9] = 6.0, -40.0
    assert op.outlier_columns(x, 6.0).tolist() == [7, 9]
    found = op.int8_linear(x, [made(weight)], [None], threshold=6.0)[0]
    packed = made(weight)
    wanted = op.int8_linear_reference(
        x, packed.weight, packed.scale, outliers=torch.tensor([7, 9]), levels=packed.levels
    )
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)
    plain, exact = op.int8_linear(x, [made(weight)], [None])[0], x @ packed.dense().T
    assert (found - exact).norm() < 0.3 * (plain - exact).norm()  # what is left is the rounding of the inputs
    q, scale, _ = op.quantize_weight(weight)
    narrow = op.Packed(q, scale, product=Product(q, by="float", levels=64))
    errors = [op.int8_linear(x, [narrow], [None], threshold=t)[0] - x @ weight.T for t in (6.0, 0.0)]
    assert errors[0].norm() < 0.3 * errors[1].norm()


def test_large_inputs_are_prepared_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed = drawn(30, 16), made(drawn(8, 16, seed=1), outliers=[3])
    whole = op.int8_linear(x, [packed], [None])[0]
    monkeypatch.setattr(op, "RUN", 64)
    assert torch.equal(op.int8_linear(x, [packed], [None])[0], whole)


def test_rows_do_not_depend_on_each_other() -> None:
    x, packed = drawn(50, 96), made(drawn(33, 96, seed=1), outliers=[3])
    whole = op.int8_linear(x, [packed], [drawn(33)])[0]
    for rows in (slice(0, 1), slice(7, 9), slice(20, 50)):
        torch.testing.assert_close(op.int8_linear(x[rows], [packed], [drawn(33)])[0], whole[rows], rtol=1e-6, atol=1e-6)


def test_zero_rows_empty_batches_and_nan() -> None:
    x, bias = drawn(6, 20), drawn(5)
    x[1] = 0.0
    x[2, 3], x[3, 4], x[4] = torch.nan, torch.inf, 1e-42
    for outliers in (None, [3, 4]):
        y = op.int8_linear(x, [made(drawn(5, 20, seed=1), outliers=outliers)], [bias])[0]
        assert torch.equal(y[1], bias)
        assert torch.isnan(y[2]).all()
        assert not torch.isfinite(y[3]).any()
        assert torch.isfinite(y[[0, 1, 4, 5]]).all()
        torch.testing.assert_close(y[4], bias)
    assert op.int8_linear(x[:0], [made(drawn(5, 20))], [bias])[0].shape == (0, 5)
    assert op.int8_linear(x[None, :0], [made(drawn(5, 20))], [bias], threshold=6.0)[0].shape == (1, 0, 5)
    assert torch.equal(op.int8_linear(x[:, :0], [made(drawn(5, 0))], [bias])[0], bias.expand(6, 5))
    one = op.int8_linear(x, [made(drawn(5, 20, seed=1), "tensor")], [bias], scheme=op.SCHEMES["tensor"])[0]
    assert torch.isnan(one).all()  # one step for all rows


def test_weights_that_cannot_be_quantised() -> None:
    with pytest.raises(SpecError, match="NaN"):
        op.quantize_weight(torch.tensor([[1.0, torch.nan]]))
    with pytest.raises(SpecError, match="did you mean 'vector'"):
        op.scheme_named("vectors")
    q, scale, _ = op.quantize_weight(torch.zeros(2, 3))
    assert not q.any() and torch.isfinite(scale).all()
    q, _, _ = op.quantize_weight(-drawn(40, 40).abs())
    assert int(q.min()) == -127


@pytest.mark.parametrize("scheme", op.SCHEMES)
def test_weights_come_back_within_half_a_step(scheme: str) -> None:
    weight = drawn(20, 30) + 0.3
    q, scale, zero = op.quantize_weight(weight, op.SCHEMES[scheme])
    assert bool(((op.dequantize_weight(q, scale, zero) - weight).abs() <= 0.5001 * scale[:, None]).all())


def test_known_outlier_columns_have_steps_of_their_own() -> None:
    """Small weights that meet large inputs keep their precision; no column loses any."""
    weight = drawn(20, 30)
    weight[:, 3] /= 1000.0
    packed, plain = made(weight, outliers=[3, 7]), made(weight)
    assert packed.gains is not None and bool((packed.gains <= 1.0001).all())
    assert int(packed.weight[:, 3].abs().max()) == 127
    error, before = ((p.dense() - weight).norm(dim=0) for p in (packed, plain))
    assert float(error[3]) < 0.01 * float(weight[:, 3].norm()) < float(before[3])
    assert torch.equal(error[:3], before[:3]) and float(error[7]) <= 1.01 * float(before[7])


@pytest.mark.parametrize("outliers", [None, [1, 4]])
def test_gradient_goes_through_the_dequantised_weight(outliers: list[int] | None) -> None:
    packed = made(drawn(7, 12, seed=1), outliers=outliers)
    second = made(drawn(4, 12, seed=2), outliers=outliers)
    x, bias = drawn(2, 3, 12).requires_grad_(), drawn(7).requires_grad_()
    y, z = op.int8_linear(x, [packed, second], [bias, None])
    g, h = drawn(2, 3, 7, seed=3), drawn(2, 3, 4, seed=4)
    ((y * g).sum() + (z * h).sum()).backward()
    wanted = g @ packed.dense() + h @ second.dense()
    torch.testing.assert_close(x.grad, wanted)
    torch.testing.assert_close(bias.grad, g.sum((0, 1)))
    with torch.inference_mode():
        torch.testing.assert_close(op.int8_linear(x, [packed], [bias])[0], y, rtol=0, atol=0)


def test_half_precision_inputs_keep_their_dtype() -> None:
    x, packed = drawn(4, 32), made(drawn(6, 32, seed=1))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        y = op.int8_linear(x.to(dtype), [packed], [None])[0]
        assert y.dtype == dtype
        torch.testing.assert_close(
            y.float(), op.int8_linear(x.to(dtype).float(), [packed], [None])[0], rtol=1e-2, atol=1e-2
        )


def test_backend_says_how_products_are_made() -> None:
    line = op.backend()
    assert "exact" in line and str(route(CPU)[1]) in line
    assert "_int_mm" in op.backend("cuda") and "float32" in op.backend("mps")


def test_without_the_byte_kernels_the_result_is_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    from formwright.ops.int8_linear import products

    def missing(*_: object) -> None:
        raise AttributeError("no such operation")

    onednn_levels.cache_clear()
    try:
        monkeypatch.setattr(products, "_pack", missing)
        monkeypatch.setattr(op, "FAST", ())
        assert route(CPU) == ("float", 127) and "not faster" in op.backend()
        x, packed = drawn(5, 2100), made(drawn(6, 2100, seed=1))
        wanted = op.int8_linear_reference(x, packed.weight, packed.scale)
        torch.testing.assert_close(op.int8_linear(x, [packed], [None])[0].double(), wanted, rtol=1e-5, atol=1e-4)
    finally:
        monkeypatch.undo()
        onednn_levels.cache_clear()


def test_narrow_ranges_far_from_zero_stay_defined() -> None:
    x = 1000.0 + 1e-4 * drawn(3, 16)
    per_unit, zero = input_range(x, op.SCHEMES["zeropoint-vector"], 64)
    assert zero is not None and float(zero.abs().max()) <= 2**20 + 65 and torch.isfinite(per_unit).all()
    packed = made(drawn(4, 16, seed=1), "zeropoint-vector")
    y = op.int8_linear(x, [packed], [None], scheme=op.SCHEMES["zeropoint-vector"])[0]
    torch.testing.assert_close(y, x @ packed.dense().T, rtol=1e-3, atol=1e-2)
