"""The training penalty: an estimate from below that follows the four bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ff_bounds import PowerIterationPenalty, fantastic_four_bound, unit_stride_kernel
from ff_bounds.matrix import spectral_norm_bound
from ff_bounds.unfoldings import unfoldings


def random_kernel(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def four_bound(kernel: Tensor) -> Tensor:
    """What the penalty estimates, proven: the smallest of the four, the largest over groups."""
    norms = torch.stack([spectral_norm_bound(matrix) for matrix in unfoldings(kernel)])
    return math.sqrt(kernel.shape[-2] * kernel.shape[-1]) * norms.amin(dim=0).amax()


SHAPES = [(1, 4, 3, 3, 3), (2, 3, 2, 1, 5), (1, 5, 7, 1, 1), (4, 1, 1, 3, 3), (1, 1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [
        (torch.float64, 1e-12),
        (torch.float32, 1e-5),
        (torch.bfloat16, 0.05),
        (torch.float16, 0.01),
    ],
)
def test_never_above_the_norm(shape: tuple[int, ...], dtype: torch.dtype, rounding: float) -> None:
    for seed in range(5):
        kernel = random_kernel(shape, seed).to(dtype)
        penalty = PowerIterationPenalty([shape], seed=seed)
        for _ in range(10):
            estimate = penalty([kernel])
            assert estimate.dtype == dtype
            assert 0.0 < estimate.item() <= four_bound(kernel).item() * (1 + rounding)


@pytest.mark.parametrize("shape", SHAPES)
def test_converges(shape: tuple[int, ...]) -> None:
    kernel = random_kernel(shape, 1)
    penalty = PowerIterationPenalty([shape])
    estimate = penalty([kernel], iterations=1000)
    assert estimate.item() == pytest.approx(four_bound(kernel).item(), rel=1e-8)
    # One step a call gets there as well: the vectors are kept between calls.
    slowly = PowerIterationPenalty([shape])
    for _ in range(1000):
        estimate = slowly([kernel])
    assert estimate.item() == pytest.approx(four_bound(kernel).item(), rel=1e-5)


def test_agrees_with_the_bound_of_the_layer() -> None:
    weight = random_kernel((4, 2, 3, 3), 2)
    kernel = unit_stride_kernel(weight, stride=2, dilation=2, groups=2)
    estimate = PowerIterationPenalty([kernel.shape])([kernel], iterations=1000)
    bound = fantastic_four_bound(weight, stride=2, dilation=2, groups=2)
    assert estimate.item() == pytest.approx(bound.item(), rel=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_the_start_is_not_orthogonal_to_the_answer(seed: int) -> None:
    # The norm is 2, in the direction (1, -1): a start from (1, 1) stays at 0 for ever.
    kernel = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).reshape(1, 2, 2, 1, 1)
    estimate = PowerIterationPenalty([(1, 2, 2, 1, 1)], seed=seed)([kernel], iterations=2)
    assert estimate.item() == pytest.approx(2.0)


def test_follows_weights_that_drift() -> None:
    shape = (1, 8, 8, 3, 3)
    kernel, drift = random_kernel(shape, 3), random_kernel(shape, 4)
    penalty = PowerIterationPenalty([shape])
    penalty([kernel], iterations=100)
    for _ in range(100):
        kernel = kernel + 0.01 * drift
        estimate = penalty([kernel]).item()
        assert 0.97 <= estimate / four_bound(kernel).item() <= 1 + 1e-6


def test_equal_shapes_are_batched_without_touching_each_other() -> None:
    shapes = [(1, 3, 4, 3, 3), (1, 5, 2, 1, 1), (1, 3, 4, 3, 3), (2, 3, 4, 3, 3), (1, 3, 4, 3, 3)]
    kernels = [random_kernel(shape, seed) * 10.0**seed for seed, shape in enumerate(shapes)]
    together = PowerIterationPenalty(shapes)(kernels, iterations=1000)
    assert together.shape == (5,)
    for estimate, kernel, shape in zip(together, kernels, shapes, strict=True):
        alone = PowerIterationPenalty([shape], seed=9)([kernel], iterations=1000)
        assert estimate.item() == pytest.approx(alone.item(), rel=1e-8)


@pytest.mark.parametrize("shape", [(1, 4, 3, 3, 3), (2, 3, 2, 2, 3), (1, 5, 7, 1, 1)])
def test_gradient_is_that_of_the_bound(shape: tuple[int, ...]) -> None:
    groups, c_out, *rest = shape
    weight = random_kernel((groups * c_out, *rest), 5).requires_grad_()
    penalty = PowerIterationPenalty([shape])
    estimate = penalty([unit_stride_kernel(weight, groups=groups)], iterations=2000)
    (found,) = torch.autograd.grad(estimate.sum(), weight)
    (expected,) = torch.autograd.grad(fantastic_four_bound(weight, groups=groups), weight)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_gradient_is_an_outer_product_after_any_number_of_steps() -> None:
    # sqrt(hw) u v^T with unit vectors, even before they have converged.
    kernel = random_kernel((1, 4, 3, 2, 3), 6).requires_grad_()
    estimate = PowerIterationPenalty([(1, 4, 3, 2, 3)])([kernel])
    (gradient,) = torch.autograd.grad(estimate.sum(), kernel)
    ranks = [torch.linalg.matrix_rank(matrix[0], rtol=1e-10) for matrix in unfoldings(gradient)]
    assert min(ranks).item() == 1
    assert torch.linalg.vector_norm(gradient).item() == pytest.approx(math.sqrt(6))
    assert (gradient * kernel).sum().item() == pytest.approx(estimate.item())


def test_zero_kernels_have_zero_gradients_and_recover() -> None:
    shape = (1, 4, 3, 3, 3)
    penalty = PowerIterationPenalty([shape, shape])
    zero = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    other = random_kernel(shape, 7)
    for _ in range(3):
        estimates = penalty([zero, other])
    assert estimates[0].item() == 0.0
    assert estimates[1].item() > 0.0
    (gradient,) = torch.autograd.grad(estimates.sum(), zero)
    assert torch.equal(gradient, torch.zeros_like(gradient))
    revived = penalty([other, other], iterations=1000)
    torch.testing.assert_close(revived, four_bound(other).expand(2), rtol=1e-8, atol=0.0)


def test_a_kernel_that_maps_the_kept_vector_to_zero_recovers() -> None:
    # Pruning one channel and reviving another: the vector of the first is a null vector then.
    first = torch.diag(torch.tensor([1.0, 0.0])).reshape(1, 2, 2, 1, 1)
    second = torch.diag(torch.tensor([0.0, 1.0])).reshape(1, 2, 2, 1, 1)
    penalty = PowerIterationPenalty([(1, 2, 2, 1, 1)])
    for _ in range(3):
        penalty([first])
    penalty([second])
    assert penalty([second], iterations=20).item() == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-36, 1e-30, 1e-22, 1e20, 1e30])
def test_scales_whose_squares_leave_float32(scale: float) -> None:
    # Squares that underflow once made the vectors longer than one, and the estimate 1e13 times
    # the norm; squares that overflow made it zero.
    shape = (1, 4, 3, 3, 3)
    kernel = (random_kernel(shape, 8) * scale).float()
    estimate = PowerIterationPenalty([shape])([kernel], iterations=200)
    assert estimate.item() == pytest.approx(four_bound(kernel).item(), rel=1e-3)


def test_a_nan_does_not_stay() -> None:
    shape = (1, 4, 3, 3, 3)
    kernel = random_kernel(shape, 9)
    penalty = PowerIterationPenalty([shape])
    assert math.isnan(penalty([kernel * math.nan]).item())  # seen, not hidden
    estimate = penalty([kernel], iterations=1000)
    assert estimate.item() == pytest.approx(four_bound(kernel).item(), rel=1e-8)


def test_calls_before_backward_do_not_disturb_each_other() -> None:
    # The vectors are refreshed in place; the graphs of earlier calls must not hold them.
    kernel = random_kernel((1, 4, 3, 3, 3), 10).float().requires_grad_()
    penalty = PowerIterationPenalty([(1, 4, 3, 3, 3)])
    (penalty([kernel]) + penalty([kernel])).sum().backward()
    assert kernel.grad is not None
    assert bool(torch.isfinite(kernel.grad).all())


def test_state_dict_round_trip() -> None:
    shapes = [(1, 4, 3, 3, 3), (1, 5, 7, 1, 1)]
    kernels = [random_kernel(shape, seed) for seed, shape in enumerate(shapes)]
    trained = PowerIterationPenalty(shapes, seed=1)
    trained(kernels, iterations=7)
    resumed = PowerIterationPenalty(shapes, seed=2)
    assert not torch.equal(resumed(kernels), trained(kernels))
    resumed.load_state_dict(trained.state_dict())
    assert torch.equal(resumed(kernels), trained(kernels))
    assert not list(trained.parameters())  # nothing here is to be learnt


def test_the_seed_decides_the_start() -> None:
    kernel = random_kernel((1, 4, 3, 3, 3), 11)
    first, again, other = (
        PowerIterationPenalty([(1, 4, 3, 3, 3)], seed=seed)([kernel]).item() for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 4, 3, 3, 3)],
        [(1, 4, 3, 3, 3), (1, 4, 3, 3, 3)],
        [(1, 2, 2, 1, 1), (1, 4, 3, 3, 3)],
        [],
    ],
)
def test_other_kernels_than_declared_are_refused(shapes: list[tuple[int, ...]]) -> None:
    penalty = PowerIterationPenalty([(1, 4, 3, 3, 3), (1, 2, 2, 1, 1)])
    with pytest.raises(ValueError, match="expected kernels of the shapes"):
        penalty([torch.ones(shape) for shape in shapes])


@pytest.mark.parametrize("iterations", [0, -1])
def test_no_iteration_is_refused(iterations: int) -> None:
    penalty = PowerIterationPenalty([(1, 2, 2, 1, 1)])
    with pytest.raises(ValueError, match="expected at least one iteration"):
        penalty([torch.ones(1, 2, 2, 1, 1)], iterations=iterations)
