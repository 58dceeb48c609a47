"""Scaled matrices and convolutions against exact rational arithmetic and dense matrices."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from certify.operators import Convolution, Matrix, scaled
from ff_bounds import conv2d_matrix, spectral_norm

METHOD = "fantastic_four"


def exact(matrix: Tensor) -> list[list[Fraction]]:
    return [[Fraction(entry) for entry in row] for row in matrix.tolist()]


def gain_squared(rows: list[list[Fraction]], vector: Tensor) -> Fraction:
    """``|A v|^2 / |v|^2`` without rounding: never above the squared norm of ``A``."""
    v = [Fraction(entry) for entry in vector.tolist()]
    image = [sum((a * b for a, b in zip(row, v, strict=True)), Fraction()) for row in rows]
    return sum((i * i for i in image), Fraction()) / sum((b * b for b in v), Fraction())


def distance_squared(first: list[Fraction], second: list[Fraction]) -> Fraction:
    return sum(((a - b) ** 2 for a, b in zip(first, second, strict=True)), Fraction())


def assert_differences_are_bounded(operator: Matrix, rows: list[list[Fraction]]) -> None:
    found = operator.row_difference_bound()
    size = max(abs(entry) for row in rows for entry in row)
    # Tight too: what is lost to cancellation and underflow is small against the largest entry.
    slack = size / 10**10 + Fraction(1, 10**290) if size else Fraction(1, 10**149)
    for i, first in enumerate(rows):
        for j, second in enumerate(rows):
            truth = distance_squared(first, second)
            bound = Fraction(found[i, j].item())
            assert bound**2 >= truth
            assert max(bound - slack, Fraction()) ** 2 <= truth * (1 + Fraction(1, 10**10))
    assert not found.diagonal().any()


shapes = st.tuples(st.integers(1, 4), st.integers(1, 5))
exponents = st.integers(-300, 300)


@given(shape=shapes, exponent=exponents, wide=st.booleans(), seed=st.integers(0, 1000))
def test_row_differences(shape: tuple[int, int], exponent: int, wide: bool, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=torch.float64)
    if wide:  # entries of very different sizes: some underflow when squared
        weight = weight * 10.0 ** torch.randint(-250, 1, shape)
    if seed % 3 == 0:
        weight[-1] = weight[0]  # equal rows
    weight = weight * 10.0 ** (exponent // 2)
    assert_differences_are_bounded(Matrix(weight), exact(weight))


def test_row_differences_of_float32_are_those_of_the_stored_numbers() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 7)
    assert_differences_are_bounded(Matrix(weight), exact(weight))


@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-310, 1e-200, 1.0, 1e150])
def test_row_differences_at_the_ends_of_the_range(value: float) -> None:
    weight = torch.tensor([[value, 0.0], [0.0, value], [-value, value]], dtype=torch.float64)
    assert_differences_are_bounded(Matrix(weight), exact(weight))


def test_row_differences_have_finite_gradients_where_rows_coincide() -> None:
    weight = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    Matrix(weight).row_difference_bound().sum().backward()
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())


@given(
    shape=shapes,
    scales=st.lists(st.fractions(-50, 50, max_denominator=97), min_size=5, max_size=5),
    seed=st.integers(0, 1000),
)
def test_scaled_matrix(shape: tuple[int, int], scales: list[Fraction], seed: int) -> None:
    """Factors that are not floating-point numbers: the bound holds for the exact product."""
    torch.manual_seed(seed)
    weight = torch.randn(shape).double()
    factors = torch.tensor([float(scale) for scale in scales[: shape[0]]], dtype=torch.float64)
    operator = scaled(Matrix(weight), factors, None, 1)
    rows = [
        [scale * entry for entry in row] for scale, row in zip(scales, exact(weight), strict=False)
    ]
    assert_differences_are_bounded(operator, rows)
    bound = operator.bound(METHOD)
    top = torch.linalg.svd(operator.effective_weight()).Vh[0]
    assert Fraction(bound.item()) ** 2 >= gain_squared(rows, top)
    norm = spectral_norm(operator.effective_weight())
    assert bound.item() <= norm.item() * (1 + 1e-7) + 1e-170


def test_scaling_pays_for_its_roundings() -> None:
    """Factors off by their declared roundings, in the worst direction, stay bounded."""
    weight = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    for roundings in (1, 5):
        computed = torch.tensor([1.0], dtype=torch.float64)
        operator = scaled(Matrix(weight), computed, None, roundings)
        true_norm = Fraction(5) / (1 - Fraction(1, 2**53)) ** roundings
        assert Fraction(operator.bound(METHOD).item()) >= true_norm
        zero = scaled(Matrix(torch.cat([weight, 0 * weight])), computed.repeat(2), None, roundings)
        assert Fraction(zero.row_difference_bound()[0, 1].item()) >= true_norm


def test_equal_rows_may_differ_by_the_rounding_of_their_scales() -> None:
    unit = 2.0**-53
    for roundings in (1, 5):
        ones = torch.ones(2, 1, dtype=torch.float64)
        operator = scaled(Matrix(ones), ones[:, 0], None, roundings)
        assert operator.row_difference_bound()[0, 1].item() >= 2 * roundings * unit


def test_small_rows_beside_large_ones() -> None:
    """Differences whose squares underflow once the largest entry is scaled to one."""
    weight = torch.tensor([[1.0, 0.0], [1e-200, 1e-200], [0.0, 0.0]], dtype=torch.float64)
    found = Matrix(weight).row_difference_bound()[1, 2].item()
    assert found >= 2.0**0.5 * 1e-200


def test_scales_that_underflow_are_not_zero() -> None:
    """A factor of 2**-1023, computed as 0, times 1e100: beside rows that are smaller still."""
    weight = torch.tensor([[1e100], [0.0], [1e-250]], dtype=torch.float64)
    scale = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    operator = scaled(Matrix(weight), scale, None, 5)
    truth = Fraction(1e100) / 2**1023
    assert Fraction(operator.row_difference_bound()[0, 1].item()) >= truth
    assert Fraction(operator.bound(METHOD).item()) >= truth


def test_products_that_underflow_are_not_zero() -> None:
    """1e-200 times 1e-150: the map is tiny, not constant, and a large layer may follow."""
    weight = torch.tensor([[1e-200], [0.0]], dtype=torch.float64)
    tiny = torch.tensor([1e-150, 1.0], dtype=torch.float64)
    true_norm = Fraction(weight[0, 0].item()) * Fraction(tiny[0].item())
    matrix = scaled(Matrix(weight), tiny, None, 5)
    assert not matrix.effective_weight().any()
    assert Fraction(matrix.bound(METHOD).item()) >= true_norm
    assert Fraction(matrix.row_difference_bound()[0, 1].item()) >= true_norm
    conv = scaled(convolution(weight[:, :, None, None]), tiny, None, 5)
    assert Fraction(conv.bound(METHOD).item()) >= true_norm


def convolution(
    weight: Tensor,
    *,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int] | str = (0, 0),
    padding_mode: str = "zeros",
    groups: int = 1,
) -> Convolution:
    return Convolution(
        weight,
        stride=stride,
        padding=padding,
        dilation=(1, 1),
        groups=groups,
        padding_mode=padding_mode,
        input_size=(5, 6),
    )


@given(
    c_out=st.integers(1, 3),
    c_in=st.integers(1, 2),
    groups=st.integers(1, 2),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    seed=st.integers(0, 1000),
)
def test_scaled_convolution(
    c_out: int,
    c_in: int,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    mode: str,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(c_out * groups, c_in, *kernel)
    factors = torch.randn(c_out * groups, dtype=torch.float64) * 3
    operator = scaled(
        convolution(weight, stride=stride, padding=(1, 1), padding_mode=mode, groups=groups),
        factors,
        None,
        5,
    )
    # Scaling the outputs of the dense Jacobian, not the weight.
    dense = conv2d_matrix(
        weight, (5, 6), stride=stride, padding=(1, 1), groups=groups, padding_mode=mode
    )
    positions = dense.shape[0] // factors.numel()
    norm = spectral_norm(factors.repeat_interleave(positions)[:, None] * dense).item()
    bound = operator.bound(METHOD).item()
    assert norm <= bound * (1 + 1e-13)  # the noise of the SVD
    assert bound <= 12.0 * norm
    # What training estimates is the same bound: by its kernel and its gain.
    kernels = operator.kernel()
    assert kernels.dtype == weight.dtype
    assert kernels.ndim == 5
    norms = [convolution(kernel.double()).bound(METHOD).item() for kernel in kernels]
    assert max(norms) * operator.gain() == pytest.approx(bound, rel=1e-5)
