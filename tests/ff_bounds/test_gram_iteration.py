"""`gram_iteration_bound` against norms that are known exactly, and against the SVD."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import gram_iteration_bound

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex128)
KINDS = ("normal", "rank one", "one entry", "flat", "tie", "graded", "zero")


def random_matrix(shape: tuple[int, ...], kind: str, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    normal = torch.randn(shape, generator=generator, dtype=wide)
    if kind == "rank one":
        normal = normal[..., :, :1] * normal[..., :1, :]
    elif kind == "one entry":
        kept = torch.zeros(normal.numel(), dtype=torch.bool)
        kept[seed % normal.numel()] = True
        normal = normal * kept.reshape(shape)
    elif kind == "flat":  # all singular values equal: where Gram iteration is least tight
        normal = torch.linalg.qr(normal)[0] if shape[-2] >= shape[-1] else normal * 0 + 1.0
    elif kind == "tie":
        normal[..., -1, :] = normal[..., 0, :]
    elif kind == "graded":
        normal = normal * torch.logspace(0, -200, shape[-1], dtype=torch.float64)
    elif kind == "zero":
        normal = normal * 0.0
    return normal.to(dtype)


def gap(shape: tuple[int, ...], iterations: int) -> float:
    """Most that the bound exceeds the norm by: the guarantee, and 1e-9 for rounding."""
    return min(shape[-2:]) ** (0.5 ** (iterations + 1)) * (1 + 1e-9)


@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    iterations=st.integers(1, 12),
    seed=st.integers(0, 10**6),
)
def test_bound_against_the_svd(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, iterations: int, seed: int
) -> None:
    matrix = random_matrix(shape, kind, dtype, seed)
    wide = matrix.to(torch.complex128 if dtype.is_complex else torch.float64)
    exact = torch.linalg.matrix_norm(wide, ord=2)
    bound = gram_iteration_bound(matrix, iterations)
    # The SVD rounds too, but by less than the bound pays for: no tolerance is needed.
    assert exact <= bound <= exact * gap(shape, iterations)


@given(
    left=st.lists(st.integers(-50, 50), min_size=1, max_size=40),
    right=st.lists(st.integers(-50, 50), min_size=1, max_size=40),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.complex64, torch.complex128)),
    iterations=st.sampled_from((1, 5, 8, 40)),
    exponent=st.integers(-100, 100),
)
def test_rank_one_matrices_of_integers(
    left: list[int], right: list[int], dtype: torch.dtype, iterations: int, exponent: int
) -> None:
    # ||x y^T||^2 = |x|^2 |y|^2 is an integer, which the formula gives without any gap. In float32
    # it fell below in 150 of 300 such matrices.
    scale = 2.0**exponent
    outer = torch.outer(torch.tensor(left, dtype=dtype), torch.tensor(right, dtype=dtype)) * scale
    squared = sum(x * x for x in left) * sum(y * y for y in right)
    if dtype.is_complex:  # rows times i^k: Gaussian integers
        outer = outer * torch.tensor([1, 1j, -1, -1j], dtype=dtype).repeat(10)[: len(left), None]
    bound = Fraction(gram_iteration_bound(outer, iterations).item()) / Fraction(scale)
    assert bound**2 >= squared
    assert bound**2 <= squared * (1 + Fraction(1, 10**10))


@pytest.mark.parametrize("iterations", [1, 3, 8, 60])
@pytest.mark.parametrize(
    ("matrix", "norm", "rank"),
    [
        (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 2, 1),
        (torch.eye(50).flip(0) * 3, 3, 50),  # flat: the gap is all that it can be
        (torch.diag(torch.tensor([0.0, -2.0, 2.0, 0.0])), 2, 2),
        (torch.full((1, 250_000), 2.0), 1000, 1),
        (torch.full((250_000, 1), 2.0), 1000, 1),
        (torch.eye(6, dtype=torch.complex128) * (3 + 4j), 5, 6),
    ],
)
def test_known_norms(matrix: Tensor, norm: int, rank: int, iterations: int) -> None:
    bound = gram_iteration_bound(matrix, iterations).item()
    exact_formula = norm * rank ** (0.5 ** (iterations + 1))
    assert norm <= bound
    assert exact_formula * (1 - 1e-14) <= bound <= exact_formula * (1 + 1e-9)


def test_more_iterations_are_tighter() -> None:
    matrix = random_matrix((30, 40), "normal", torch.complex128, 0)
    bounds = [gram_iteration_bound(matrix, t).item() for t in range(1, 15)]
    assert bounds == sorted(bounds, reverse=True)
    exact = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert exact <= bounds[-1] <= exact * (1 + 1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1.0, 1e30, 1e300])
@pytest.mark.parametrize("kind", ["normal", "rank one", "one entry"])
def test_scales(scale: float, kind: str, dtype: torch.dtype) -> None:
    matrix = random_matrix((5, 7), kind, dtype, 4)
    exact = torch.linalg.matrix_norm(matrix, ord=2) * scale
    assert exact <= gram_iteration_bound(matrix * scale) <= exact * gap((5, 7), 8)


def test_the_ends_of_the_range() -> None:
    largest = torch.finfo(torch.float64).max
    assert gram_iteration_bound(torch.full((2, 2), largest, dtype=torch.float64)) == math.inf
    for entry in (5e-324, 1e-310, 2.2250738585072014e-308):
        matrix = torch.full((2, 3), entry, dtype=torch.float64)
        exact = math.sqrt(6) * entry
        assert exact <= gram_iteration_bound(matrix).item() <= exact + 2.3e-308


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (1, 5), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_a_batch_is_its_members(shape: tuple[int, int], dtype: torch.dtype) -> None:
    members = random_matrix((6, *shape), "normal", dtype, 0)
    scales = torch.tensor([1.0, 0.0, 1e-300, 1e300, 1.0, 1e-160], dtype=torch.float64)
    members = (members * scales[:, None, None]).requires_grad_()
    bounds = gram_iteration_bound(members.reshape(2, 3, *shape))
    assert bounds.shape == (2, 3)
    assert bounds.dtype == torch.float64
    singly = torch.stack([gram_iteration_bound(member.detach()) for member in members])
    torch.testing.assert_close(bounds.detach().flatten(), singly, rtol=1e-13, atol=0.0)
    (gradient,) = torch.autograd.grad(bounds.sum(), members)
    inner = (gradient.conj() * members.detach()).real.sum(dim=(1, 2))
    torch.testing.assert_close(inner, singly, rtol=1e-12, atol=0.0)
    assert not gradient[1].any()  # zero, not NaN


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 1), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize("iterations", [1, 4])
def test_gradient_is_the_derivative(
    shape: tuple[int, ...], dtype: torch.dtype, iterations: int
) -> None:
    matrix = random_matrix(shape, "normal", dtype, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda m: gram_iteration_bound(m, iterations), (matrix,))


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from((torch.float64, torch.complex128)),
    iterations=st.sampled_from((1, 8, 60)),
    seed=st.integers(0, 10**6),
)
def test_gradient_obeys_eulers_identity(
    shape: tuple[int, int], kind: str, dtype: torch.dtype, iterations: int, seed: int
) -> None:
    matrix = random_matrix(shape, kind, dtype, seed).requires_grad_()
    bound = gram_iteration_bound(matrix, iterations)
    (gradient,) = torch.autograd.grad(bound, matrix)
    inner = (gradient.conj() * matrix.detach()).real.sum()
    assert inner.item() == pytest.approx(bound.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_comes_back_in_the_weights_dtype(dtype: torch.dtype) -> None:
    matrix = random_matrix((5, 3), "normal", dtype, 2).requires_grad_()
    bound = gram_iteration_bound(matrix)
    bound.backward()
    assert bound.dtype == torch.float64
    assert matrix.grad is not None
    assert matrix.grad.dtype == dtype
    with torch.no_grad():
        assert not gram_iteration_bound(matrix).requires_grad


@pytest.mark.parametrize(
    "matrix",
    [
        torch.full((2, 2), math.nan),
        torch.tensor([[1.0, math.inf]]),
        torch.tensor([[1.0, complex(0.0, math.nan)]]),
        torch.tensor([[complex(math.inf, 0.0)]]),
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(3),
        torch.ones(0, 3),
        torch.ones(0, 2, 2),
    ],
)
def test_refusals(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^expected .*, got"):
        gram_iteration_bound(matrix)


def test_no_iterations_are_refused() -> None:
    with pytest.raises(ValueError, match="expected at least one iteration, got 0"):
        gram_iteration_bound(torch.eye(2), iterations=0)
