"""Gram iteration on a grid of frequencies, against dense grids and dense Jacobians."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ff_bounds.frequency_grid as grid_module
from ff_bounds import (
    conv2d_matrix,
    gram_iteration_circular_bound,
    gram_iteration_supremum_bound,
    spectral_norm,
)

KINDS = ("normal", "rank one", "delta", "alternating", "one entry", "zero")


def make_kernel(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Kernels ``(groups, c_out, c_in, *taps)`` whose symbols are flat, peaked or in between."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    taps = shape[3:]
    kept = torch.zeros(shape, dtype=torch.float64)
    if kind == "rank one":
        first = normal[(slice(None), *[slice(1)] * 2)]
        return normal[(..., *[slice(1)] * len(taps))] * first
    if kind == "delta":  # the flattest symbol
        kept[(..., *(t // 2 for t in taps))] = 1.0
    elif kind == "alternating":  # its peak lies in a corner of the torus
        for place in itertools.product(*map(range, taps)):
            kept[(..., *place)] = (-1.0) ** sum(place)
        return normal[(..., *[slice(1)] * len(taps))] * kept
    elif kind == "one entry":
        kept.view(-1)[seed % kept.numel()] = 1.0
    elif kind == "normal":
        return normal
    return normal * kept


def grid_norm(kernel: Tensor, sizes: tuple[int, ...]) -> float:
    """Largest norm of the symbol on a grid, from its definition: at most ``sigma*``."""
    taps = kernel.shape[3:]
    wrapped = torch.zeros(*kernel.shape[:3], *sizes, dtype=torch.float64)
    for place in itertools.product(*map(range, taps)):
        target = tuple(p % n for p, n in zip(place, sizes, strict=True))
        wrapped[(..., *target)] += kernel[(..., *place)]
    symbol = torch.fft.fftn(wrapped, dim=tuple(range(3, kernel.ndim)))
    matrices = symbol.movedim((1, 2), (-2, -1)).reshape(-1, *kernel.shape[1:3])
    return float(torch.linalg.matrix_norm(matrices, ord=2).max())


def off_grid(taps: tuple[int, ...], sizes: tuple[int, ...]) -> float:
    """Most that ``sigma*`` exceeds the norm on a grid by."""
    pairs = zip(taps, sizes, strict=True)
    return math.prod(1.0 / math.cos((t - 1) / 2 * math.pi / n) for t, n in pairs)


def rank_gap(shape: tuple[int, ...], iterations: int) -> float:
    """Most that Gram iteration exceeds the norm by: the guarantee, and 1e-9 for rounding."""
    return min(shape[1:3]) ** (0.5 ** (iterations + 1)) * (1 + 1e-9)


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    dimension = draw(st.integers(1, 3))
    largest = {1: 9, 2: 5, 3: 3}[dimension]
    taps = draw(st.lists(st.integers(1, largest), min_size=dimension, max_size=dimension))
    return draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4)), *taps


@given(
    shape=shapes(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    extra=st.one_of(st.none(), st.integers(0, 12)),
    iterations=st.integers(1, 10),
)
def test_supremum_bound_against_a_dense_grid(
    shape: tuple[int, ...], kind: str, seed: int, extra: int | None, iterations: int
) -> None:
    kernel = make_kernel(kind, shape, seed)
    taps = shape[3:]
    grid = None if extra is None else tuple(t + extra for t in taps)
    bound = gram_iteration_supremum_bound(kernel, grid=grid, iterations=iterations).item()
    dense = tuple({1: 256, 2: 32, 3: 12}[len(taps)] for _ in taps)
    on_grid = grid_norm(kernel, dense)
    assert on_grid <= bound
    sizes = grid or tuple(max(1, 16 * (t - 1)) for t in taps)
    guarantee = on_grid * off_grid(taps, dense) * off_grid(taps, sizes)
    assert bound <= guarantee * rank_gap(shape, iterations)


@given(
    shape=shapes(),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 10**6),
    sizes=st.tuples(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8)),
)
def test_circular_bound_against_the_discrete_fourier_transform(
    shape: tuple[int, ...], kind: str, seed: int, sizes: tuple[int, int, int]
) -> None:
    kernel = make_kernel(kind, shape, seed)  # its taps may exceed the input
    size = sizes[: len(shape) - 3]
    exact = grid_norm(kernel, size)
    bound = gram_iteration_circular_bound(kernel, size).item()
    largest = kernel.abs().sum().item()  # where all cancels, rounding is relative to the entries
    assert exact - 1e-14 * largest * (exact < 1e-12 * largest) <= bound
    assert bound <= exact * rank_gap(shape, 8) + 1e-11 * largest


@given(seed=st.integers(0, 10**6), size=st.tuples(st.integers(2, 7), st.integers(2, 7)))
def test_circular_bound_covers_the_dense_jacobian(seed: int, size: tuple[int, int]) -> None:
    weight = make_kernel("normal", (1, 2, 3, 3, 3), seed)[0]
    jacobian = conv2d_matrix(weight, size, padding=1, padding_mode="circular")
    exact = spectral_norm(jacobian)
    bound = gram_iteration_circular_bound(weight[None], size, iterations=12)
    assert exact <= bound <= exact * rank_gap((1, 2, 3), 12)


@given(seed=st.integers(0, 10**6), size=st.tuples(st.integers(1, 7), st.integers(1, 7)))
def test_supremum_bound_covers_zero_padding(seed: int, size: tuple[int, int]) -> None:
    weight = make_kernel("normal", (1, 2, 3, 3, 2), seed)[0]
    exact = spectral_norm(conv2d_matrix(weight, size, padding=1))
    assert exact <= gram_iteration_supremum_bound(weight[None])


@pytest.mark.parametrize("grid", [5, 6, 16, 64, 1000])
def test_known_suprema(grid: int) -> None:
    # Positive taps peak at zero, which is on every grid: the sum, times the factor.
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]).reshape(1, 1, 1, 5)
    factor = 1 / math.cos(2 * math.pi / grid)
    bound = gram_iteration_supremum_bound(kernel, grid=grid).item()
    assert 16 * factor * (1 - 1e-15) <= bound <= 16 * factor * (1 + 1e-11)
    # Alternating ones at pi, which is on even grids only: 16 is covered all the same.
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    assert gram_iteration_supremum_bound(kernel * signs, grid=grid).item() >= 16


def test_the_circular_bound_is_that_of_the_size_only() -> None:
    kernel = torch.tensor([1.0, -2.0, 1.0]).reshape(1, 1, 1, 3)
    bounds = [gram_iteration_circular_bound(kernel, n).item() for n in (1, 2, 3, 4)]
    assert bounds == pytest.approx([0.0, 4.0, 3.0, 4.0], abs=1e-12)
    assert all(bound >= exact for bound, exact in zip(bounds, [0, 4, 3, 4], strict=True))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = make_kernel("normal", (3, 4, 5, 3, 3), 0).requires_grad_()
    whole = gram_iteration_supremum_bound(kernel)
    (gradient,) = torch.autograd.grad(whole, kernel)
    monkeypatch.setattr(grid_module, "_CHUNK_BYTES", 64 * 3 * 4 * 5 * 7)
    parts = gram_iteration_supremum_bound(kernel)
    (other,) = torch.autograd.grad(parts, kernel)
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=0.0)
    torch.testing.assert_close(other, gradient)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("shape", [(2, 3, 4, 3, 3), (1, 5, 2, 4)])
def test_scales(scale: float, shape: tuple[int, ...]) -> None:
    kernel = make_kernel("normal", shape, 0)
    for bound in (
        gram_iteration_supremum_bound,
        lambda k: gram_iteration_circular_bound(k, 5),
    ):
        plain, scaled = bound(kernel), bound(kernel * scale)
        assert scaled.item() == pytest.approx(plain.item() * scale, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stored_weights_of_any_dtype(dtype: torch.dtype) -> None:
    kernel = make_kernel("normal", (1, 4, 4, 3, 3), 0).to(dtype).requires_grad_()
    bound = gram_iteration_supremum_bound(kernel)
    assert bound.item() >= grid_norm(kernel.detach().double(), (32, 32))
    bound.backward()
    assert kernel.grad is not None
    assert kernel.grad.dtype == dtype


def test_a_group_of_another_size_is_not_disturbed() -> None:
    kernel = make_kernel("normal", (3, 4, 4, 3, 3), 0)
    kernel[0] *= 1e-200
    kernel[1] = 0.0
    alone = gram_iteration_supremum_bound(kernel[2:])
    assert gram_iteration_supremum_bound(kernel).item() == pytest.approx(alone.item(), rel=1e-12)


def test_zero_kernel() -> None:
    kernel = torch.zeros(2, 3, 3, 3, 3, requires_grad=True)
    for bound in (gram_iteration_supremum_bound(kernel), gram_iteration_circular_bound(kernel, 4)):
        (gradient,) = torch.autograd.grad(bound, kernel)
        assert bound == 0.0
        assert not gradient.any()  # zero, not NaN


@pytest.mark.parametrize("shape", [(2, 3, 2, 3, 2), (1, 2, 4, 3), (1, 2, 2, 2, 2, 2)])
def test_gradient_is_the_derivative(shape: tuple[int, ...]) -> None:
    kernel = make_kernel("normal", shape, 1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda k: gram_iteration_supremum_bound(k, grid=5, iterations=5), (kernel,)
    )
    assert torch.autograd.gradcheck(lambda k: gram_iteration_circular_bound(k, 3), (kernel,))


@given(shape=shapes(), kind=st.sampled_from(KINDS), seed=st.integers(0, 10**6))
def test_gradient_obeys_eulers_identity(shape: tuple[int, ...], kind: str, seed: int) -> None:
    kernel = make_kernel(kind, shape, seed).requires_grad_()
    bound = gram_iteration_supremum_bound(kernel, grid=9)
    (gradient,) = torch.autograd.grad(bound, kernel)
    assert (gradient * kernel).sum().item() == pytest.approx(bound.item(), rel=1e-12)


@pytest.mark.parametrize(
    "kernel",
    [
        torch.full((1, 2, 2, 3, 3), math.nan),
        torch.full((1, 2, 2, 3), math.inf),
        torch.ones(1, 2, 2, 3, dtype=torch.int64),
        torch.ones(1, 2, 2, 3, dtype=torch.complex64),
        torch.ones(1, 2, 2),
        torch.ones(1, 2, 2, 3, 3, 3, 3),
        torch.ones(1, 0, 2, 3),
    ],
)
def test_refused_kernels(kernel: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^expected .*, got"):
        gram_iteration_supremum_bound(kernel)
    with pytest.raises(ValueError, match=r"^expected .*, got"):
        gram_iteration_circular_bound(kernel, 8)


@pytest.mark.parametrize("grid", [2, 0, (3, 2), (3,), (3, 3, 3), (3.5, 4)])
def test_refused_grids(grid: int | tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^expected .*grid.*, got"):
        gram_iteration_supremum_bound(torch.ones(1, 1, 1, 3, 3), grid=grid)


def test_other_refusals() -> None:
    kernel = torch.ones(1, 1, 1, 3, 3)
    for size in (0, (4,), (4, -1)):
        with pytest.raises(ValueError, match=r"^expected input_size .*, got"):
            gram_iteration_circular_bound(kernel, size)
    with pytest.raises(ValueError, match="expected at least one iteration, got 0"):
        gram_iteration_supremum_bound(kernel, iterations=0)
