"""The training penalty that follows the supremum: from below, and up to a grid of frequencies."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import (
    PowerIterationPenalty,
    SupremumPenalty,
    spectral_norm,
    supremum_bound,
    supremum_bracket,
    unit_stride_kernel,
)

SHAPES = [
    (1, 4, 3, 3, 3),
    (2, 3, 2, 1, 5),
    (1, 3, 2, 4),
    (2, 2, 3, 2, 2, 2),
    (4, 1, 1, 3, 3),
    (1, 5, 7, 1),
    (1, 1, 1, 1, 1),
]


def random_kernel(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def grid_norm(kernel: Tensor) -> float:
    """Largest norm of the symbol on the grid, by one SVD after the other."""
    taps = kernel.shape[3:]
    places = list(itertools.product(*(range(count) for count in taps)))
    flat = kernel.detach().to(torch.complex128).flatten(3)
    largest = 0.0
    for turns in itertools.product(*(range(max(1, 8 * (count - 1))) for count in taps)):
        angles = [
            sum(f * t / (8 * (n - 1)) for f, t, n in zip(turns, place, taps, strict=True) if n > 1)
            for place in places
        ]
        phases = torch.tensor(angles, dtype=torch.float64) * 2.0 * math.pi
        symbol = (flat * torch.polar(torch.ones_like(phases), phases)).sum(dim=3)
        largest = max(largest, torch.linalg.matrix_norm(symbol, ord=2).max().item())
    return largest


def close(value: float, rel: float) -> object:
    """Relative only: small norms are to be met as closely as others."""
    return pytest.approx(value, rel=rel, abs=0.0)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 0.02),
        (torch.float16, 0.005),
    ],
)
def test_never_above_the_norm(shape: tuple[int, ...], dtype: torch.dtype, rounding: float) -> None:
    for seed in range(3):
        kernel = random_kernel(shape, seed).to(dtype)
        norm = supremum_bracket(kernel).upper.item()
        penalty = SupremumPenalty([shape], seed=seed)
        for _ in range(8):
            estimate = penalty([kernel])
            assert estimate.dtype == dtype
            assert 0.0 < estimate.item() <= norm * (1 + rounding)


taps = st.integers(1, 3)


@settings(max_examples=60)
@given(
    shape=st.tuples(taps, taps, taps, st.lists(taps, min_size=1, max_size=3)),
    seed=st.integers(0, 10_000),
    iterations=st.integers(1, 3),
)
def test_never_above_the_norm_of_any_shape(
    shape: tuple[int, int, int, list[int]], seed: int, iterations: int
) -> None:
    groups, c_out, c_in, sizes = shape
    kernel = random_kernel((groups, c_out, c_in, *sizes), seed)
    penalty = SupremumPenalty([tuple(kernel.shape)], seed=seed)
    norm = supremum_bracket(kernel).upper.item()
    for _ in range(3):
        assert 0.0 < penalty([kernel], iterations=iterations).item() <= norm * (1 + 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_converges_to_the_best_frequency_of_the_grid(shape: tuple[int, ...]) -> None:
    kernel = random_kernel(shape, 1)
    norm = grid_norm(kernel)
    penalty = SupremumPenalty([shape])
    assert penalty([kernel], iterations=300).item() == close(norm, 1e-8)
    # One step a call gets there as well: the vectors are kept between calls.
    slowly = SupremumPenalty([shape])
    for _ in range(100):
        estimate = slowly([kernel])
    assert estimate.item() == close(norm, 1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (1, 3, 2, 4), (1, 2, 2, 3, 3), (1, 2, 2, 2, 2, 2)])
def test_misses_at_most_a_known_part_of_the_norm(shape: tuple[int, ...], seed: int) -> None:
    kernel = random_kernel(shape, seed)
    estimate = SupremumPenalty([shape], seed=seed)([kernel], iterations=200).item()
    norm = supremum_bracket(kernel).lower.item()
    assert estimate >= norm * math.cos(math.pi / 8) ** (len(shape) - 3)


@pytest.mark.parametrize("shape", SHAPES)
def test_misses_nothing_of_a_peak_at_frequency_zero(shape: tuple[int, ...]) -> None:
    kernel = random_kernel(shape, 2).abs()
    norm = max(spectral_norm(matrix).item() for matrix in kernel.flatten(3).sum(dim=3))
    estimate = SupremumPenalty([shape])([kernel], iterations=300).item()
    assert estimate == close(norm, 1e-8)
    assert estimate == close(supremum_bracket(kernel).upper.item(), 2e-3)


def test_agrees_with_the_bound_of_the_layer() -> None:
    weight = random_kernel((4, 2, 3, 3), 3)
    kernel = unit_stride_kernel(weight, stride=2, dilation=2, groups=2)
    estimate = SupremumPenalty([tuple(kernel.shape)])([kernel], iterations=200).item()
    bound = supremum_bound(kernel).item()
    assert 0.92**2 * bound <= estimate <= bound


@pytest.mark.parametrize("seed", range(10))
def test_the_start_is_not_orthogonal_to_the_answer(seed: int) -> None:
    # The norm is 2, in the direction (1, -1): a start from (1, 1) stays at 0 for ever.
    kernel = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64).reshape(1, 2, 2, 1)
    estimate = SupremumPenalty([(1, 2, 2, 1)], seed=seed)([kernel], iterations=2)
    assert estimate.item() == close(2.0, 1e-12)


def test_follows_weights_that_drift() -> None:
    shape = (1, 6, 6, 3, 3)
    kernel, drift = random_kernel(shape, 3), random_kernel(shape, 4)
    penalty = SupremumPenalty([shape])
    penalty([kernel], iterations=50)
    for step in range(60):
        kernel = kernel + 0.02 * drift
        estimate = penalty([kernel]).item()
        if step % 10 == 9:
            bracket = supremum_bracket(kernel)
            assert 0.9 * bracket.lower.item() <= estimate <= bracket.upper.item()


def test_equal_shapes_are_batched_without_touching_each_other() -> None:
    shapes = [(1, 3, 4, 3, 3), (1, 5, 2, 1), (1, 3, 4, 3, 3), (2, 3, 4, 3, 3), (1, 3, 4, 3, 3)]
    kernels = [random_kernel(shape, seed) * 10.0**seed for seed, shape in enumerate(shapes)]
    together = SupremumPenalty(shapes)(kernels, iterations=300)
    assert together.shape == (5,)
    for estimate, kernel, shape in zip(together, kernels, shapes, strict=True):
        alone = SupremumPenalty([shape], seed=9)([kernel], iterations=300)
        assert estimate.item() == close(alone.item(), 1e-8)


def test_no_kernels() -> None:
    assert SupremumPenalty([])([]).shape == (0,)


def slope(penalty: SupremumPenalty, kernel: Tensor, iterations: int) -> tuple[float, Tensor]:
    kernel = kernel.clone().requires_grad_()
    estimate = penalty([kernel], iterations=iterations)
    (gradient,) = torch.autograd.grad(estimate.sum(), kernel)
    return estimate.item(), gradient


@pytest.mark.parametrize("shape", [(1, 4, 3, 3, 3), (2, 3, 2, 4), (1, 2, 2, 2, 2, 2), (1, 4, 6, 1)])
def test_gradient_is_that_of_the_norm(shape: tuple[int, ...]) -> None:
    kernel = random_kernel(shape, 5)
    _, gradient = slope(SupremumPenalty([shape]), kernel, 300)
    for seed in range(3):
        direction = 1e-5 * random_kernel(shape, 100 + seed)
        difference = grid_norm(kernel + direction) - grid_norm(kernel - direction)
        found = 2.0 * (gradient * direction).sum().item()
        assert found == pytest.approx(difference, rel=1e-6, abs=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("iterations", [1, 5])
def test_gradient_times_weight_is_the_estimate(shape: tuple[int, ...], iterations: int) -> None:
    """Unit vectors at one frequency of one group, even before they have converged."""
    kernel = random_kernel(shape, 6)
    estimate, gradient = slope(SupremumPenalty([shape]), kernel, iterations)
    assert (gradient * kernel).sum().item() == close(estimate, 1e-10)
    used = gradient.flatten(1).norm(dim=1) > 0
    assert int(used.sum()) == 1
    # |Re(conj(u) v^T phase)| over all taps: at most one for each of them.
    assert gradient.norm().item() <= math.sqrt(math.prod(shape[3:])) * (1 + 1e-5)


def test_zero_kernels_have_zero_gradients_and_recover() -> None:
    shape = (1, 4, 3, 3, 3)
    penalty = SupremumPenalty([shape, shape])
    zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    other = random_kernel(shape, 7)
    for _ in range(3):
        estimates = penalty([zero, other])
    assert estimates[0].item() == 0.0
    assert estimates[1].item() > 0.0
    (gradient,) = torch.autograd.grad(estimates.sum(), zero)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    revived = penalty([other, other], iterations=300)
    torch.testing.assert_close(
        revived, torch.full((2,), grid_norm(other), dtype=torch.float64), rtol=1e-8, atol=0.0
    )


def test_a_group_of_zeros_does_not_disturb_the_others() -> None:
    kernel = random_kernel((3, 2, 2, 3), 8)
    kernel[1] = 0.0
    penalty = SupremumPenalty([(3, 2, 2, 3)])
    assert penalty([kernel], iterations=200).item() == close(grid_norm(kernel), 1e-8)
    kernel[1] = 5.0 * random_kernel((2, 2, 3), 9)
    assert penalty([kernel], iterations=200).item() == close(grid_norm(kernel), 1e-8)


def test_a_kernel_that_maps_the_kept_vector_to_zero_recovers() -> None:
    # Pruning one channel and reviving another: the vector of the first is a null vector then.
    first, second = (
        torch.diag(torch.tensor(entries, dtype=torch.float64)).reshape(1, 2, 2, 1)
        for entries in ([1.0, 0.0], [0.0, 1.0])
    )
    penalty = SupremumPenalty([(1, 2, 2, 1)])
    for _ in range(3):
        penalty([first])
    penalty([second])
    assert penalty([second], iterations=20).item() == close(1.0, 1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_a_frequency_with_gain_zero_recovers(seed: int) -> None:
    penalty = SupremumPenalty([(1, 1, 1, 3, 3)], seed=seed)
    rows = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64)
    edge = torch.outer(torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64), rows)
    for _ in range(3):
        penalty([edge.reshape(1, 1, 1, 3, 3)])
    estimate = penalty([edge.abs().reshape(1, 1, 1, 3, 3)], iterations=5)
    assert estimate.item() == close(8.0, 1e-6)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, scale) for scale in (1e-36, 1e-30, 1e-22, 1e20, 1e30)]
    + [(torch.float64, scale) for scale in (1e-300, 1e-200, 1e200, 1e300)],
)
def test_scales_whose_squares_leave_the_range(dtype: torch.dtype, scale: float) -> None:
    shape = (1, 4, 3, 3, 3)
    kernel = (random_kernel(shape, 8) * scale).to(dtype)
    estimate = SupremumPenalty([shape])([kernel], iterations=200)
    norm = grid_norm(kernel.double() / scale)
    assert estimate.item() / scale == close(norm, 1e-4)
    assert norm > 1.0


def test_kernels_of_very_different_scales() -> None:
    shape = (1, 3, 3, 3)
    kernels = [random_kernel(shape, 10) * scale for scale in (1e-30, 1.0, 1e30)]
    for estimate, kernel in zip(
        SupremumPenalty([shape] * 3)([k.float() for k in kernels], iterations=200),
        kernels,
        strict=True,
    ):
        assert estimate.item() == close(supremum_bracket(kernel).upper.item(), 0.09)


def test_a_nan_does_not_stay() -> None:
    shape = (1, 4, 3, 3, 3)
    kernel = random_kernel(shape, 9)
    penalty = SupremumPenalty([shape])
    assert math.isnan(penalty([kernel * math.nan]).item())  # seen, not hidden
    assert penalty([kernel], iterations=300).item() == close(grid_norm(kernel), 1e-8)


def test_calls_before_backward_do_not_disturb_each_other() -> None:
    # The vectors are refreshed in place; the graphs of earlier calls must not hold them.
    kernel = random_kernel((1, 4, 3, 3, 3), 10).float().requires_grad_()
    penalty = SupremumPenalty([(1, 4, 3, 3, 3)])
    (penalty([kernel]) + penalty([kernel])).sum().backward()
    assert kernel.grad is not None
    assert bool(torch.isfinite(kernel.grad).all())


def test_several_kernels_have_their_own_gradients() -> None:
    shapes = [(1, 3, 2, 3), (1, 4, 4, 1), (1, 3, 2, 3)]
    kernels = [random_kernel(shape, seed).requires_grad_() for seed, shape in enumerate(shapes)]
    estimates = SupremumPenalty(shapes)(kernels, iterations=50)
    gradients = torch.autograd.grad(estimates @ torch.tensor([1.0, 10.0, 100.0]).double(), kernels)
    products = [(g * k).sum().item() for g, k in zip(gradients, kernels, strict=True)]
    expected = [f * e for f, e in zip((1.0, 10.0, 100.0), estimates.tolist(), strict=True)]
    assert products == pytest.approx(expected, rel=1e-9, abs=0.0)


def test_state_dict_round_trip() -> None:
    shapes = [(1, 4, 3, 3, 3), (1, 5, 7, 1)]
    kernels = [random_kernel(shape, seed) for seed, shape in enumerate(shapes)]
    trained = SupremumPenalty(shapes, seed=1)
    trained(kernels, iterations=7)
    resumed = SupremumPenalty(shapes, seed=2)
    assert not torch.equal(resumed(kernels), trained(kernels))
    resumed.load_state_dict(trained.state_dict())
    assert torch.equal(resumed(kernels), trained(kernels))
    assert not list(trained.parameters())  # nothing here is to be learnt


def test_the_seed_decides_the_start() -> None:
    kernel = random_kernel((1, 4, 3, 3, 3), 11)
    first, again, other = (
        SupremumPenalty([(1, 4, 3, 3, 3)], seed=seed)([kernel]).item() for seed in (0, 0, 1)
    )
    assert first == again != other


def test_below_the_other_penalty() -> None:
    """The four bounds are at least the norm, so what follows them ends higher."""
    kernel = random_kernel((1, 4, 3, 3, 3), 12)
    sharp = SupremumPenalty([(1, 4, 3, 3, 3)])([kernel], iterations=200).item()
    assert sharp < PowerIterationPenalty([(1, 4, 3, 3, 3)])([kernel], iterations=200).item()


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 4, 3, 3, 3)],
        [(1, 4, 3, 3, 3), (1, 4, 3, 3, 3)],
        [(1, 2, 2, 1), (1, 4, 3, 3, 3)],
        [],
    ],
)
def test_other_kernels_than_declared_are_refused(shapes: list[tuple[int, ...]]) -> None:
    penalty = SupremumPenalty([(1, 4, 3, 3, 3), (1, 2, 2, 1)])
    with pytest.raises(ValueError, match="expected kernels of the shapes"):
        penalty([torch.ones(shape) for shape in shapes])


@pytest.mark.parametrize("iterations", [0, -1])
def test_no_iteration_is_refused(iterations: int) -> None:
    penalty = SupremumPenalty([(1, 2, 2, 1)])
    with pytest.raises(ValueError, match="expected at least one iteration"):
        penalty([torch.ones(1, 2, 2, 1)], iterations=iterations)
