"""`spectral_norm_bound` against references that do not round, and against the SVD."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import ff_bounds.matrix as matrix_module
from ff_bounds import spectral_norm, spectral_norm_bound

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def exceeds_norm(value: float, matrix: Tensor) -> bool:
    """Whether ``value > ||A||``, decided without any rounding.

    True exactly if ``value**2 I - A A^T`` is positive definite, that is, if all pivots of its
    elimination are positive. Every float is a rational number, so fractions do this exactly.
    """
    rows = [[Fraction(entry) for entry in row] for row in matrix.to(torch.float64).tolist()]
    square = Fraction(value) ** 2
    left = [
        [
            square * (i == j) - sum(a * b for a, b in zip(x, y, strict=True))
            for j, y in enumerate(rows)
        ]
        for i, x in enumerate(rows)
    ]
    size = len(left)
    for k in range(size):
        if left[k][k] <= 0:
            return False
        for i in range(k + 1, size):
            ratio = left[i][k] / left[k][k]
            left[i] = [a - ratio * b for a, b in zip(left[i], left[k], strict=True)]
    return True


def random_matrix(shape: tuple[int, ...], style: str, seed: int) -> Tensor:
    """Float64 matrices of kinds that numerical methods find easy, or hard."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(shape, generator=generator, dtype=torch.float64)
    if style == "integers":
        return (3 * normal).round()
    if style == "rank one":
        return normal[..., :, :1] * normal[..., :1, :]
    if style == "one entry":
        return (
            torch.zeros_like(normal)
            .flatten()
            .index_fill(0, torch.tensor(seed % normal.numel()), 1.0)
            .reshape(shape)
        )
    if style == "ones":
        return torch.ones_like(normal)
    if style == "graded":  # columns from 1 to 1e-30: most of the matrix is below rounding
        return normal * torch.logspace(0, -30, shape[-1], dtype=torch.float64)
    if style == "near tie":  # all singular values within 1e-9 of each other
        return torch.eye(*shape[-2:], dtype=torch.float64) + 1e-9 * normal
    return normal


STYLES = ("normal", "integers", "rank one", "one entry", "ones", "graded", "near tie")


@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
)
def test_bound_exceeds_the_norm_in_rational_arithmetic(
    shape: tuple[int, int], style: str, seed: int, dtype: torch.dtype
) -> None:
    stored = random_matrix(shape, style, seed).to(dtype)
    bound = spectral_norm_bound(stored).item()
    if bool((stored == 0).all()):
        assert bound == 0.0
        return
    assert exceeds_norm(bound, stored)
    assert not exceeds_norm(bound * (1 - 1e-8), stored)  # so that inf fails


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("style", ["normal", "rank one", "one entry"])
def test_scales_near_the_ends_of_the_range(scale: float, style: str) -> None:
    stored = random_matrix((3, 4), style, 7) * scale
    bound = spectral_norm_bound(stored).item()
    assert exceeds_norm(bound, stored)
    # At 1e-300 a careless allowance for underflow costs more than 1e-8.
    assert not exceeds_norm(bound * (1 - 1e-12), stored)


@pytest.mark.parametrize("entry", [5e-324, 1e-310, 2.2250738585072014e-308, 4e-308])
def test_subnormal_entries_are_not_lost(entry: float) -> None:
    bound = spectral_norm_bound(torch.full((2, 3), entry, dtype=torch.float64)).item()
    assert bound > math.sqrt(6) * entry
    assert bound <= math.sqrt(6) * entry * (1 + 1e-8) + 2.3e-308  # one smallest normal number


def test_overflow_is_an_infinite_bound_not_a_wrong_one() -> None:
    largest = torch.finfo(torch.float64).max
    assert spectral_norm_bound(torch.full((2, 2), largest, dtype=torch.float64)).item() == math.inf
    assert spectral_norm_bound(torch.tensor([[1e308]], dtype=torch.float64)).item() < 1.000001e308


@given(
    left=st.lists(st.integers(-50, 50), min_size=1, max_size=40),
    right=st.lists(st.integers(-50, 50), min_size=1, max_size=40),
    dtype=st.sampled_from((torch.float32, torch.float64)),
    exponent=st.integers(-100, 100),
)
def test_rank_one_matrices_of_integers(
    left: list[int], right: list[int], dtype: torch.dtype, exponent: int
) -> None:
    # ||x y^T||^2 = |x|^2 |y|^2 is an integer. Gram iteration in float32 fell below it in 150 of
    # 300 such matrices.
    scale = 2.0**exponent
    outer = torch.outer(torch.tensor(left, dtype=dtype), torch.tensor(right, dtype=dtype)) * scale
    squared = sum(x * x for x in left) * sum(y * y for y in right)
    bound = Fraction(spectral_norm_bound(outer).item()) / Fraction(scale)
    assert bound**2 >= squared
    assert bound**2 <= squared * (1 + Fraction(1, 10**8))


@given(
    shape=st.tuples(st.integers(1, 25), st.integers(1, 25)),
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
)
def test_bound_against_the_svd(
    shape: tuple[int, int], style: str, seed: int, dtype: torch.dtype
) -> None:
    # The SVD rounds too, by a unit or two in the last place; the bound exceeds the norm by at
    # least ten units, so the comparison needs no tolerance.
    stored = random_matrix(shape, style, seed).to(dtype)
    exact = spectral_norm(stored)
    assert exact <= spectral_norm_bound(stored) <= exact * (1 + 1e-8)


def hadamard(order: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(order):
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@pytest.mark.parametrize(
    ("matrix", "norm"),
    [
        (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 2),  # power iteration from (1, 1) says 0
        (hadamard(6), 8),  # all 64 singular values are equal
        (torch.eye(50), 1),
        (torch.eye(50).flip(0) * 3, 3),
        (torch.diag(torch.arange(-20.0, 5.0)), 20),
        (torch.full((4, 4), 0.5), 2),
        (torch.full((1, 250_000), 2.0), 1000),
        (torch.full((250_000, 1), 2.0), 1000),
        (torch.full((4, 40_000), 1.0), 400),
        (torch.tensor([[0.0, 0.0], [-7.0, 0.0]]), 7),
    ],
)
def test_known_norms(matrix: Tensor, norm: int) -> None:
    assert norm <= spectral_norm_bound(matrix).item() <= norm * (1 + 1e-8)


def test_golden_ratio() -> None:
    # The norm is irrational, (1 + sqrt(5)) / 2: above it, and only there, b^2 - b - 1 > 0.
    bound = Fraction(spectral_norm_bound(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).item())
    assert bound**2 - bound - 1 > 0
    below = bound * (1 - Fraction(1, 10**8))
    assert below**2 - below - 1 < 0


@pytest.mark.parametrize("rank", [1, 3, 100])
def test_low_rank_is_as_tight_as_full_rank(rank: int) -> None:
    # t I - G is nearly singular then, which is where the factorisation could fail.
    generator = torch.Generator().manual_seed(rank)
    left, right = torch.randint(-9, 10, (2, 300, rank), generator=generator, dtype=torch.float64)
    exact = spectral_norm(left @ right.T)
    assert exact <= spectral_norm_bound(left @ right.T) <= exact * (1 + 1e-8)


def large_matrix(kind: str) -> Tensor:
    """Matrices that are left to the Lanczos process, and the spectra that it finds hard."""
    generator = torch.Generator().manual_seed(5)
    left, right = torch.randn(2, 300, 300, generator=generator, dtype=torch.float64)
    if kind in STYLES:
        return random_matrix((270, 300), kind, 3)
    left, right = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
    values = torch.linspace(0.0, 1.0, 300, dtype=torch.float64)
    if kind == "flat":
        values[:] = 1.0
    elif kind.startswith("gap"):  # the two largest, relative to the others
        values[-2:] = torch.tensor([1.0, 1.0 + float(kind[3:])])
    elif kind == "tie":
        values[-40:] = 1.0
    elif kind == "edge":  # ever closer towards the largest
        values = 1.0 - values.flip(0) ** 6
    return left * values @ right.mT


LARGE = (*STYLES, "flat", "tie", "edge", "uniform", "gap1e-3", "gap1e-6", "gap1e-9", "gap1e-12")


@pytest.mark.parametrize("kind", LARGE)
def test_large_matrices(kind: str) -> None:
    stored = large_matrix(kind)
    assert min(stored.shape) >= matrix_module._LARGE
    exact = spectral_norm(stored)
    assert exact <= spectral_norm_bound(stored) <= exact * (1 + 1e-8)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_scales_of_large_matrices(scale: float) -> None:
    stored = large_matrix("normal")
    exact = spectral_norm(stored) * scale  # off by one unit in the last place at most
    assert exact <= spectral_norm_bound(stored * scale) <= exact * (1 + 1e-8)


def test_large_matrices_in_a_batch_do_not_disturb_each_other() -> None:
    members = torch.stack([large_matrix(kind)[:270, :270] for kind in LARGE])
    members[0] = 0.0
    members[1] *= 1e-300
    bounds = spectral_norm_bound(members.reshape(3, -1, 270, 270)).flatten()
    exact = torch.stack([spectral_norm(member) for member in members])
    assert bounds[0] == 0.0
    assert (exact <= bounds).all()
    assert (bounds <= exact * (1 + 1e-8)).all()


def test_large_gradient_is_that_of_the_svd() -> None:
    matrix = large_matrix("normal").requires_grad_()
    bound = spectral_norm_bound(matrix)
    (gradient,) = torch.autograd.grad(bound, matrix)
    left, _, right = torch.linalg.svd(matrix.detach())
    torch.testing.assert_close(gradient, torch.outer(left[:, 0], right[0]), rtol=0.0, atol=1e-8)
    assert (gradient * matrix).sum().item() == pytest.approx(bound.item(), rel=1e-12)


@pytest.mark.parametrize("steps", [-30, -20])  # beside the 33 for 270 rows
def test_too_few_steps_are_made_up_for(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_module, "_LANCZOS_STEPS", steps)
    stored = torch.stack([large_matrix("normal"), large_matrix("rank one")])
    exact = torch.stack([spectral_norm(member) for member in stored])
    bounds = spectral_norm_bound(stored)
    assert (exact <= bounds).all()
    assert (bounds <= exact * (1 + 1e-8)).all()


@pytest.mark.parametrize("guess", [0.0, -1.0, 0.999999, 3.0, math.inf, math.nan])
def test_a_wrong_lanczos_process_costs_tightness_only(
    guess: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = matrix_module.top_eigenpair

    def wrong(gram: Tensor, *arguments: object) -> tuple[Tensor, Tensor]:
        vector, value = honest(gram, *arguments)  # type: ignore[arg-type]
        return vector, guess * value

    monkeypatch.setattr(matrix_module, "top_eigenpair", wrong)
    stored = large_matrix("normal")
    exact = spectral_norm(stored)
    bound = spectral_norm_bound(stored)
    assert exact <= bound <= exact * (2 if guess == 3.0 else 1 + 1e-8)


@pytest.mark.parametrize("guess", [0.0, 0.5, 0.999999, 1.0, 3.0])
def test_a_wrong_eigenvalue_costs_tightness_only(
    guess: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = matrix_module._largest_eigenpair

    def wrong(gram: Tensor) -> tuple[Tensor, Tensor]:
        value, vector = honest(gram)
        return guess * value, vector

    monkeypatch.setattr(matrix_module, "_largest_eigenpair", wrong)
    for seed in range(20):
        stored = random_matrix((4, 5), "normal", seed)
        bound = spectral_norm_bound(stored).item()
        assert exceeds_norm(bound, stored)
        # ||A||_F bounds the norm without any factorisation, so nothing worse is ever returned.
        assert bound <= torch.linalg.matrix_norm(stored).item() * (1 + 1e-12)


@pytest.mark.parametrize("fault", [0.0, 0.9, 1.1, -1.0, math.nan, math.inf])
def test_a_wrong_cholesky_factor_costs_tightness_only(
    fault: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = torch.linalg.cholesky_ex

    def wrong(matrix: Tensor) -> tuple[Tensor, Tensor]:
        factor, info = honest(matrix)
        return factor * fault, info

    monkeypatch.setattr(torch.linalg, "cholesky_ex", wrong)
    for seed in range(20):
        stored = random_matrix((4, 5), "normal", seed)
        bound = spectral_norm_bound(stored).item()
        assert exceeds_norm(bound, stored)
        assert bound <= torch.linalg.matrix_norm(stored).item() * (1 + 1e-12)


def test_zero_is_zero() -> None:
    zero = torch.zeros(3, 4, requires_grad=True)
    bound = spectral_norm_bound(zero)
    assert bound.item() == 0.0
    bound.backward()
    assert zero.grad is not None
    assert torch.equal(zero.grad, torch.zeros(3, 4))  # not NaN


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (1, 5), (1, 1)])
def test_a_batch_is_its_members(shape: tuple[int, int]) -> None:
    # Members of very different size, a zero one among them: none may disturb another.
    members = torch.stack([random_matrix(shape, "normal", seed) for seed in range(6)])
    members[1] = 0.0
    members[2] *= 1e-300
    members[3] *= 1e300
    members[4] = random_matrix(shape, "one entry", 3)
    batch = members.reshape(2, 3, *shape).requires_grad_()
    bounds = spectral_norm_bound(batch)
    assert bounds.shape == (2, 3)
    assert bounds.dtype == torch.float64
    singly = torch.stack([spectral_norm_bound(member) for member in members])
    torch.testing.assert_close(bounds.detach().flatten(), singly, rtol=1e-12, atol=0.0)
    for bound, member in zip(bounds.detach().flatten().tolist(), members, strict=True):
        assert exceeds_norm(bound, member) or bool((member == 0).all())

    (gradient,) = torch.autograd.grad(bounds.sum(), batch)
    # A zero matrix has no singular vectors; every other gradient is u v^T, of length one.
    lengths = torch.linalg.matrix_norm(gradient).flatten()
    expected = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(lengths, expected)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (1, 1), (2, 3, 4)])
def test_gradient_is_the_derivative(shape: tuple[int, ...]) -> None:
    matrix = random_matrix(shape, "normal", 1).requires_grad_()
    assert torch.autograd.gradcheck(spectral_norm_bound, (matrix,))


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    style=st.sampled_from(STYLES),
    seed=st.integers(0, 10**6),
)
def test_gradient_obeys_eulers_identity(shape: tuple[int, int], style: str, seed: int) -> None:
    # The norm is homogeneous, so <gradient, A> = bound, ties of singular values included.
    matrix = random_matrix(shape, style, seed).requires_grad_()
    bound = spectral_norm_bound(matrix)
    (gradient,) = torch.autograd.grad(bound, matrix)
    assert (gradient * matrix).sum().item() == pytest.approx(bound.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_comes_back_in_the_weights_dtype(dtype: torch.dtype) -> None:
    matrix = random_matrix((5, 3), "normal", 2).to(dtype).requires_grad_()
    bound = spectral_norm_bound(matrix)
    bound.backward()
    assert bound.dtype == torch.float64
    assert matrix.grad is not None
    assert matrix.grad.dtype == dtype
    identity = (matrix.grad.double() * matrix.detach().double()).sum().item()
    assert identity == pytest.approx(bound.item(), rel=2 * torch.finfo(dtype).eps)


def test_no_graph_is_kept_when_none_is_wanted() -> None:
    matrix = torch.ones(2, 2, requires_grad=True)
    with torch.no_grad():
        assert not spectral_norm_bound(matrix).requires_grad
    assert not spectral_norm_bound(matrix.detach()).requires_grad


def test_autocast_does_not_reach_the_proof() -> None:
    matrix = random_matrix((20, 30), "normal", 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bound = spectral_norm_bound(matrix)
    assert spectral_norm(matrix) <= bound <= spectral_norm(matrix) * (1 + 1e-8)


@pytest.mark.parametrize(
    "matrix",
    [
        torch.full((2, 2), math.nan),
        torch.tensor([[1.0, math.inf]]),
        torch.tensor([[1.0], [-math.inf]]),
        torch.ones(2, 2, dtype=torch.int64),
        torch.ones(2, 2, dtype=torch.bool),
        torch.ones(2, 2, dtype=torch.complex64),
        torch.ones(3),
        torch.tensor(1.0),
        torch.ones(0, 3),
        torch.ones(3, 0),
        torch.ones(0, 2, 2),
    ],
)
def test_refusals(matrix: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^expected .*, got"):
        spectral_norm_bound(matrix)
