"""Weights computed from others: what they claim, their gradients, their precision."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from models import AlmostOrthogonal, IdentityPlus, Orthonormal, UnitRows, parametrized
from models.parametrizations import almost_orthogonal_scale

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def norm(matrix: Tensor) -> float:
    return torch.linalg.matrix_norm(matrix.detach().double(), ord=2).item()


def dense(weight: Tensor, size: int) -> Tensor:
    """Matrix of a convolution with zero padding that keeps every product."""
    if weight.ndim == 2:
        return weight.double()
    axes = weight.ndim - 2
    count = weight.shape[1] * size**axes
    basis = torch.eye(count, dtype=torch.float64).reshape(count, weight.shape[1], *[size] * axes)
    padding = [n - 1 for n in weight.shape[2:]]
    return CONVOLUTIONS[axes](basis, weight.double(), padding=padding).flatten(1).T


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "identity plus": lambda: IdentityPlus(0.3),
    "orthonormal": Orthonormal,
    "almost orthogonal": AlmostOrthogonal,
    "unit rows": UnitRows,
}


def test_parametrized_returns_the_layer_and_keeps_the_original() -> None:
    layer = nn.Linear(3, 2)
    before = layer.weight.detach().clone()
    assert parametrized(layer, UnitRows()) is layer
    assert torch.equal(layer.parametrizations.weight.original, before)  # type: ignore[union-attr]
    assert parametrize.is_parametrized(layer, "weight")
    assert {name for name, _ in layer.named_parameters()} == {
        "bias",
        "parametrizations.weight.original",
    }


@pytest.mark.parametrize("name", MAKERS)
def test_gradients(name: str) -> None:
    weight = normal(3, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(MAKERS[name](), weight)
    if name != "almost orthogonal":  # whose absolute values have kinks: only first derivatives
        assert torch.autograd.gradgradcheck(MAKERS[name](), weight)


@pytest.mark.parametrize("name", ["identity plus", "almost orthogonal", "unit rows"])
@pytest.mark.parametrize("taps", [(3,), (1, 3), (1, 1, 3)])
def test_gradients_of_kernels(name: str, taps: tuple[int, ...]) -> None:
    assert torch.autograd.gradcheck(MAKERS[name](), normal(2, 2, *taps).requires_grad_())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_leaves_weights_in_their_own_precision(name: str, dtype: torch.dtype) -> None:
    weight = normal(8, 8, seed=2).to(dtype)
    plain = MAKERS[name]()(weight)
    with torch.autocast("cpu", torch.bfloat16):
        cast = MAKERS[name]()(weight)
        assert torch.is_autocast_enabled("cpu")  # nothing else changes
    assert cast.dtype == dtype
    assert torch.equal(cast, plain)


@pytest.mark.parametrize("name", MAKERS)
def test_autocast_leaves_a_layers_weight_in_its_own_precision(name: str) -> None:
    torch.manual_seed(0)
    layer = parametrized(nn.Linear(6, 6), MAKERS[name]())
    plain = layer.weight
    with torch.autocast("cpu", torch.bfloat16), parametrize.cached():
        assert layer(torch.rand(2, 6)).dtype == torch.bfloat16
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, plain)


@pytest.mark.parametrize("name", MAKERS)
def test_weights_can_be_laid_out_without_memory(name: str) -> None:
    with torch.device("meta"):
        layer = parametrized(nn.Linear(4, 4), MAKERS[name]())
    assert layer.weight.device.type == "meta"
    assert layer.weight.shape == (4, 4)


# --- the identity plus a kernel ---------------------------------------------------------------


@pytest.mark.parametrize("taps", [(), (3,), (3, 5), (1, 3, 1)])
@pytest.mark.parametrize("scale", [0.0, 0.25, -2.0])
def test_identity_plus_is_a_residual_branch(taps: tuple[int, ...], scale: float) -> None:
    weight = normal(3, 3, *taps)
    whole = IdentityPlus(scale)(weight)
    assert whole.shape == weight.shape
    x = normal(2, 3, *[6] * len(taps), seed=1)
    if taps:
        padding = [n // 2 for n in taps]
        applied, branch = (CONVOLUTIONS[len(taps)](x, w, padding=padding) for w in (whole, weight))
    else:
        applied, branch = x @ whole.T, x @ weight.T
    torch.testing.assert_close(applied, x + scale * branch, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("shape", [(3, 2, 3, 3), (2, 3), (2, 2, 2), (2, 2, 3, 4), (3, 3, 1, 2, 1)])
def test_identity_plus_needs_an_identity(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected a kernel \(c, c, odd, ...\), got"):
        IdentityPlus(1.0)(torch.zeros(shape))


# --- orthonormal rows or columns --------------------------------------------------------------


@given(
    rows=st.integers(1, 8),
    columns=st.integers(1, 8),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e3, 1e30]),
    single=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_the_shorter_side_is_orthonormal(
    rows: int, columns: int, scale: float, single: bool, seed: int
) -> None:
    weight = normal(rows, columns, seed=seed)
    ratio = torch.linalg.cond(weight).item()
    result = Orthonormal()(scale * (weight.float() if single else weight))
    short = result if rows <= columns else result.T
    defect = norm(short @ short.T - torch.eye(len(short), dtype=short.dtype))
    # Cholesky loses the square of the condition number, and some by the jitter.
    eps = torch.finfo(result.dtype).eps
    assert defect <= 100.0 * len(short) * ratio**2 * eps
    assert norm(result) <= 1.0 + 100.0 * len(short) * ratio**2 * eps


def test_orthonormal_rows_are_those_of_gram_and_schmidt() -> None:
    weight = normal(4, 6, seed=3)
    rows: list[Tensor] = []
    for row in weight:
        rest = row - sum(((row @ r) * r for r in rows), torch.zeros(6, dtype=torch.float64))
        rows.append(rest / rest.norm())
    torch.testing.assert_close(Orthonormal()(weight), torch.stack(rows), rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("columns", [12, 40])  # orthogonalised twice, and once
def test_rows_that_depend_on_others_come_out_short(columns: int) -> None:
    weight = normal(8, columns, seed=6).float()
    weight[5], weight[6] = weight[2], weight[0] + weight[1]
    weight.requires_grad_()
    lengths = Orthonormal()(weight).norm(dim=1)
    assert lengths[[5, 6]].max() < 0.1
    assert lengths[[0, 1, 2, 3, 4, 7]].min() > 0.99
    (gradient,) = torch.autograd.grad(lengths.sum(), weight)
    assert gradient.abs().max() < 1e5  # not that of a direction made of rounding


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
def test_an_orthonormal_matrix_stays(shape: tuple[int, int]) -> None:
    once = Orthonormal()(normal(*shape, seed=4))
    torch.testing.assert_close(Orthonormal()(once), once, rtol=0.0, atol=1e-13)


def test_a_kernel_of_one_tap_is_a_matrix() -> None:
    weight = normal(3, 5, 1, 1, seed=5)
    assert torch.equal(Orthonormal()(weight).flatten(1), Orthonormal()(weight.flatten(1)))
    assert Orthonormal()(weight).shape == (3, 5, 1, 1)
    with pytest.raises(ValueError, match="a matrix or kernel of one tap, got"):
        Orthonormal()(torch.rand(3, 5, 3, 1))


def test_dependent_rows_make_no_nan_and_no_norm_above_one() -> None:
    row = normal(1, 6, seed=6)
    for weight in (torch.cat((row, row, -row)), torch.cat((row, 1e-9 * normal(1, 6, seed=7)))):
        for kind in (torch.float64, torch.float32):
            result = Orthonormal()(weight.to(kind))
            assert bool(result.isfinite().all())
            assert norm(result) <= 1.0 + 1e-3


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (2, 2)])
def test_a_matrix_of_zeros_stays_with_a_finite_gradient(shape: tuple[int, int]) -> None:
    zero = torch.zeros(shape, requires_grad=True)
    result = Orthonormal()(zero)
    assert not result.any()
    (gradient,) = torch.autograd.grad(result.sum(), zero)
    assert bool(gradient.isfinite().all())


# --- almost orthogonal layers -----------------------------------------------------------------


small = st.integers(1, 3)


@given(
    channels=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    taps=st.lists(small, max_size=3),
    positive=st.booleans(),
    scale=st.sampled_from([1e-30, 1e-22, 1e-3, 1.0, 1e3, 1e20, 1e30]),
    single=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_almost_orthogonal_layers_are_contractions(
    channels: tuple[int, int],
    taps: list[int],
    positive: bool,
    scale: float,
    single: bool,
    seed: int,
) -> None:
    weight = scale * normal(*channels, *taps, seed=seed)
    weight = weight.abs() if positive else weight  # then the theorem is nearly tight
    result = AlmostOrthogonal()(weight.float() if single else weight)
    assert norm(dense(result, 3)) <= 1.0 + 1e-6
    # Not by making it small: each channel of a positive kernel is heard somewhere.
    if positive:
        assert norm(result.flatten(2).sum(dim=2) if taps else result) >= 1.0 - 1e-6


@pytest.mark.parametrize("taps", [(), (3,), (2, 3), (2, 1, 2)])
def test_almost_orthogonal_scale_by_hand(taps: tuple[int, ...]) -> None:
    """``t_i = sum_j sum_s |(W * W^T)_{ij, s}|``, product by product."""
    weight = normal(3, 2, *taps, seed=8)
    places = list(itertools.product(*(range(n) for n in taps)))
    kernel: dict[tuple[int, ...], Tensor] = {}
    for here, there in itertools.product(places, places):
        shift = tuple(a - b for a, b in zip(here, there, strict=True))
        product = weight[(..., *here)].T @ weight[(..., *there)]
        kernel[shift] = kernel.get(shift, torch.zeros(2, 2, dtype=torch.float64)) + product
    sums = torch.stack([matrix.abs() for matrix in kernel.values()]).sum(dim=(0, 2))
    torch.testing.assert_close(almost_orthogonal_scale(weight), sums.rsqrt(), rtol=1e-12, atol=0.0)


def test_orthogonal_columns_are_only_normalised() -> None:
    weight = torch.tensor([[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    expected = torch.tensor([[0.6, 0.0], [0.8, 0.0], [0.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(AlmostOrthogonal()(weight), expected, rtol=0.0, atol=1e-15)


def test_a_channel_without_weights_stays_zero() -> None:
    weight = normal(3, 2, 3, 3, seed=9)
    weight[:, 1] = 0.0
    weight.requires_grad_()
    result = AlmostOrthogonal()(weight)
    assert not result[:, 1].any()
    assert result[:, 0].any()
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    assert bool(gradient.isfinite().all())
    zero = torch.zeros(3, 2, requires_grad=True)
    (gradient,) = torch.autograd.grad(AlmostOrthogonal()(zero).sum(), zero)
    assert bool(gradient.isfinite().all())


# --- rows of length one -----------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (4, 3, 2), (4, 3, 3, 3)])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_rows_of_length_one(shape: tuple[int, ...], scale: float) -> None:
    weight = scale * normal(*shape, seed=10)
    single = UnitRows()(weight.float()).flatten(1).norm(dim=1)
    torch.testing.assert_close(single, torch.ones(4), rtol=0.0, atol=1e-6)
    result = UnitRows()(weight)
    lengths = result.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(4, dtype=torch.float64), rtol=0.0, atol=1e-14)
    inner = (result * weight).flatten(1).sum(dim=1)  # the direction is kept
    torch.testing.assert_close(inner, weight.flatten(1).norm(dim=1), rtol=1e-12, atol=0.0)
    again = UnitRows()(result)
    torch.testing.assert_close(again, result, rtol=0.0, atol=1e-15)


def test_a_zero_row_stays_zero_with_a_finite_gradient() -> None:
    weight = torch.zeros(2, 3, requires_grad=True)
    with torch.no_grad():
        weight[0] = torch.tensor([3.0, 0.0, 4.0])
    result = UnitRows()(weight)
    torch.testing.assert_close(
        result, torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 0.0]]), rtol=0.0, atol=1e-7
    )
    (gradient,) = torch.autograd.grad(result.sum(), weight)
    assert bool(gradient.isfinite().all())


def test_differences_of_unit_rows() -> None:
    rows = UnitRows()(normal(5, 3, seed=11))
    assert torch.cdist(rows, rows).max().item() <= 2.0 * (1 + 1e-15)
    assert math.isclose(rows.norm().item(), math.sqrt(5), rel_tol=1e-14)
