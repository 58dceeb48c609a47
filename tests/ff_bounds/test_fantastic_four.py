"""The four bounds: proven for the infinite lattice, and within sqrt(h w) of its norm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import (
    conv2d_matrix,
    fantastic_four_bound,
    fantastic_four_bounds,
    spectral_norm,
    unfoldings,
    unit_stride_kernel,
)


def random_kernel(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def grid_norm(kernel: Tensor, points: int) -> Tensor:
    """Largest ``||K(w)||`` over a grid of frequencies: a lower bound of ``sigma*``.

    With ``points >= max(h, w)`` it is at least ``||T||``, because ``T T^T`` is the mean of
    ``K(w) K(w)^H`` over such a grid.
    """
    symbols = torch.fft.fft2(kernel.to(torch.float64), s=(points, points))
    blocks = symbols.movedim((-2, -1), (0, 1))
    if points > 2:  # K(-w) is the conjugate of K(w): half of the grid is enough
        blocks = blocks[:, : points // 2 + 1]
    return torch.linalg.matrix_norm(blocks, ord=2).amax()


SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(
    shape=SHAPES,
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from((torch.float16, torch.float32, torch.float64)),
)
def test_every_field_is_a_bound_and_the_smallest_is_close(
    shape: tuple[int, int, int, int], seed: int, dtype: torch.dtype
) -> None:
    kernel = random_kernel(shape, seed).to(dtype)
    four = fantastic_four_bounds(kernel)
    below = grid_norm(kernel, 24)
    for bound in four:
        assert bound >= below
    smallest = fantastic_four_bound(kernel)
    assert smallest == torch.stack(list(four)).amin()
    assert smallest <= math.sqrt(shape[2] * shape[3]) * below * (1 + 1e-8)


@given(
    shape=SHAPES,
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 2),
    seed=st.integers(0, 10**6),
)
def test_every_field_bounds_the_strided_symbol(
    shape: tuple[int, int, int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    seed: int,
) -> None:
    kernel = random_kernel((groups * shape[0], *shape[1:]), seed)
    four = fantastic_four_bounds(kernel, stride=stride, dilation=dilation, groups=groups)
    phases = unit_stride_kernel(kernel, stride=stride, dilation=dilation, groups=groups)
    below = grid_norm(phases, 12)
    for bound in four:
        assert bound >= below
    smallest = fantastic_four_bound(kernel, stride=stride, dilation=dilation, groups=groups)
    assert smallest <= math.sqrt(phases.shape[-2] * phases.shape[-1]) * below * (1 + 1e-8)


@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
@pytest.mark.parametrize("dilation", [1, 2, (3, 2)])
def test_every_field_bounds_the_dense_jacobian(
    stride: int | tuple[int, int], dilation: int | tuple[int, int]
) -> None:
    # Not only the smallest of the four: each is promised by itself.
    kernel = random_kernel((4, 1, 3, 2), 5)
    matrix = conv2d_matrix(kernel, (8, 9), stride=stride, padding=4, dilation=dilation, groups=2)
    four = fantastic_four_bounds(kernel, stride=stride, dilation=dilation, groups=2)
    for bound in four:
        assert bound >= spectral_norm(matrix)


# The seven kernel shapes of ResNet-18, and the first of its last stage.
RESNET18 = [
    (64, 3, 7, 7),
    (64, 64, 3, 3),
    (128, 64, 3, 3),
    (128, 128, 3, 3),
    (256, 128, 3, 3),
    (256, 256, 3, 3),
    (512, 256, 3, 3),
    (512, 512, 3, 3),
]


@pytest.mark.parametrize("shape", RESNET18)
def test_the_kernels_of_resnet18(shape: tuple[int, int, int, int]) -> None:
    kernel = random_kernel(shape, 18) * math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
    root = math.sqrt(shape[2] * shape[3])
    four = fantastic_four_bounds(kernel.float())
    exact = [root * spectral_norm(matrix).item() for matrix in unfoldings(kernel.float())]
    for bound, value in zip(four, exact, strict=True):
        assert value <= bound.item() <= value * (1 + 1e-6)
    below = grid_norm(kernel.float(), max(shape[2:])).item()
    assert 1.0 <= min(four).item() / below <= root * (1 + 1e-8)


def test_constant_kernels_attain_the_bound() -> None:
    # K(0) is the sum of all taps, which is sqrt(h w) ||T||: no better factor exists.
    kernel = torch.ones(2, 3, 3, 5)
    exact = math.sqrt(2 * 3) * 15
    assert exact <= fantastic_four_bound(kernel).item() <= exact * (1 + 1e-12)


def test_a_single_tap_loses_the_full_factor() -> None:
    kernel = torch.zeros(2, 2, 3, 3)
    kernel[:, :, 1, 1] = torch.eye(2)
    for bound in fantastic_four_bounds(kernel):
        assert 3.0 <= bound.item() <= 3.0 * (1 + 1e-12)


def test_pointwise_kernels_lose_nothing() -> None:
    kernel = random_kernel((5, 3, 1, 1), 0)
    exact = spectral_norm(kernel[:, :, 0, 0])
    assert exact <= fantastic_four_bound(kernel) <= exact * (1 + 1e-12)


def paired(field: str) -> Tensor:
    """A kernel for which one unfolding is a permutation (norm 1) and the other three are not."""
    eye = torch.eye(4)
    if field == "R":
        return torch.einsum("ob,ia->oiab", eye, eye)
    if field == "S":
        return torch.einsum("oa,ib->oiab", eye, eye)
    one_tap_each = torch.eye(16).reshape(16, 1, 4, 4)
    return one_tap_each if field == "T" else one_tap_each.transpose(0, 1)


@pytest.mark.parametrize("field", ["R", "S", "T", "U"])
def test_each_unfolding_can_be_the_only_best_one(field: str) -> None:
    four = fantastic_four_bounds(paired(field))._asdict()
    assert 4.0 <= four.pop(field).item() <= 4.0 * (1 + 1e-12)
    assert min(four.values()).item() >= 8.0
    assert 4.0 <= fantastic_four_bound(paired(field)).item() <= 4.0 * (1 + 1e-12)


def test_groups_take_the_maximum_never_the_product() -> None:
    # An orthogonal-layer library multiplied: 0.0067 where the true norm is 0.308.
    kernel = 0.1 * random_kernel((4, 1, 3, 3), 2)
    singly = torch.stack([fantastic_four_bound(kernel[g : g + 1]) for g in range(4)])
    together = fantastic_four_bound(kernel, groups=4)
    torch.testing.assert_close(together, singly.amax(), rtol=1e-12, atol=0.0)
    assert together >= spectral_norm(conv2d_matrix(kernel, (6, 6), padding=1, groups=4))
    four = fantastic_four_bounds(kernel, groups=4)
    for name, bound in four._asdict().items():
        of_group = [getattr(fantastic_four_bounds(kernel[g : g + 1]), name) for g in range(4)]
        torch.testing.assert_close(bound, torch.stack(of_group).amax(), rtol=1e-12, atol=0.0)


def test_the_smallest_is_taken_for_each_group() -> None:
    # One group that only R serves well beside one that only S does: taking the maximum over the
    # groups first would miss both.
    both = torch.cat((paired("R"), paired("S")))
    assert min(fantastic_four_bounds(both, groups=2)).item() >= 8.0
    assert 4.0 <= fantastic_four_bound(both, groups=2).item() <= 4.0 * (1 + 1e-12)


@pytest.mark.parametrize("exponent", [-1000, -100, 100, 1000])
def test_homogeneous_over_the_whole_range(exponent: int) -> None:
    kernel = random_kernel((3, 2, 3, 2), 4)
    scaled = fantastic_four_bound(kernel * 2.0**exponent)
    assert scaled.item() == fantastic_four_bound(kernel).item() * 2.0**exponent


def test_zero_kernel_has_a_zero_bound_and_a_zero_gradient() -> None:
    kernel = torch.zeros(4, 2, 3, 3, requires_grad=True)
    bound = fantastic_four_bound(kernel, stride=2, groups=2)
    bound.backward()
    assert bound.item() == 0.0
    assert kernel.grad is not None
    assert torch.equal(kernel.grad, torch.zeros_like(kernel))


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients(groups: int, stride: int) -> None:
    kernel = random_kernel((4, 3, 3, 2), 6).requires_grad_()

    def smallest(weight: Tensor) -> Tensor:
        return fantastic_four_bound(weight, stride=stride, dilation=2, groups=groups)

    def all_four(weight: Tensor) -> tuple[Tensor, ...]:
        return tuple(fantastic_four_bounds(weight, stride=stride, dilation=2, groups=groups))

    assert torch.autograd.gradcheck(smallest, (kernel,))
    assert torch.autograd.gradcheck(all_four, (kernel,))
    bound = smallest(kernel)
    (gradient,) = torch.autograd.grad(bound, kernel)
    assert (gradient * kernel).sum().item() == pytest.approx(bound.item(), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_kernels_are_refused(bad: float) -> None:
    kernel = torch.ones(2, 2, 3, 3)
    kernel[1, 0, 2, 1] = bad
    for function in (fantastic_four_bound, fantastic_four_bounds):
        with pytest.raises(ValueError, match="expected finite weight"):
            function(kernel)
