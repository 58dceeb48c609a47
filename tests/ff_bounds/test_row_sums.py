"""Bounds from sums of absolute entries, against frequencies, dense matrices and fractions."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import conv_matrix, spectral_norm, supremum_bracket
from ff_bounds.row_sums import near_isometry_bound, scaled_square_bound


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def ones(count: int) -> Tensor:
    return torch.ones(count, dtype=torch.float64)


def kernel_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    weight = normal(generator, *shape)
    if kind == "positive":  # where row sums are nearly the norm
        return weight.abs()
    if kind == "sparse":
        return weight * (normal(generator, *shape) > 0.5)
    if kind == "whole":  # entries whose products cancel exactly
        return (2.0 * weight).round()
    return weight


def scaled_symbol_norm(weight: Tensor, divisors: Tensor, frequency: Tensor) -> float:
    """``||diag(t)^{-1/2} V(f)||`` at one frequency."""
    grids = torch.meshgrid(*(torch.arange(n) for n in weight.shape[2:]), indexing="ij")
    phase = sum(f * g for f, g in zip(frequency, grids, strict=True))
    assert isinstance(phase, Tensor)
    turned = torch.polar(torch.ones_like(phase), 2.0 * math.pi * phase)
    symbol = (weight * turned).flatten(2).sum(dim=2)
    return torch.linalg.matrix_norm(symbol / divisors.sqrt()[:, None], ord=2).item()


def row_sums(weight: Tensor, scale: Tensor) -> Tensor:
    """``sum_j sum_s |G_{ij, s}| q_j / q_i``, tap by tap."""
    rows, _, *taps = weight.shape
    places = list(itertools.product(*(range(n) for n in taps)))
    kernel: dict[tuple[int, ...], Tensor] = {}
    for here, there in itertools.product(places, places):
        shift = tuple(a - b for a, b in zip(here, there, strict=True))
        product = weight[(..., *here)] @ weight[(..., *there)].T
        kernel[shift] = kernel.get(shift, torch.zeros(rows, rows, dtype=torch.float64)) + product
    sums = torch.stack([matrix.abs() for matrix in kernel.values()]).sum(dim=0)
    return (sums @ scale) / scale


small = st.integers(1, 3)
kinds = st.sampled_from(["normal", "positive", "sparse", "whole"])


@given(
    channels=st.tuples(small, small),
    taps=st.lists(small, min_size=1, max_size=3),
    kind=kinds,
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    single=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_at_least_the_norm_of_the_scaled_convolution(
    channels: tuple[int, int],
    taps: list[int],
    kind: str,
    spread: float,
    single: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = kernel_of(kind, (*channels, *taps), generator)
    divisors, scale = ((spread * normal(generator, channels[0])).exp() for _ in range(2))
    if single:
        weight, divisors, scale = (x.float() for x in (weight, divisors, scale))
    found = scaled_square_bound(weight, divisors, scale)
    assert found.dtype == torch.float64
    bound = found.item()
    weight, divisors, scale = (x.double() for x in (weight, divisors, scale))

    frequencies = torch.cat(
        [
            torch.rand(20, len(taps), generator=generator, dtype=torch.float64),
            torch.tensor(
                list(itertools.product((0.0, 0.5), repeat=len(taps))), dtype=torch.float64
            ),
        ]
    )
    for frequency in frequencies:
        assert scaled_symbol_norm(weight, divisors, frequency) ** 2 <= bound
    for padding in (0, 1):
        dense = conv_matrix(weight, 3, padding=padding)
        factors = divisors.rsqrt().repeat_interleave(len(dense) // len(weight))
        assert spectral_norm(factors[:, None] * dense).item() ** 2 <= bound

    # What is proven is what is written, but for rounding: infinity would not do.
    assert bound <= (row_sums(weight, scale) / divisors).max().item() * (1 + 1e-11) + 1e-250
    if spread == 0.0:
        shifts = math.prod(2 * n - 1 for n in taps)
        upper = supremum_bracket(weight[None]).upper.item()
        assert bound <= channels[0] * shifts * upper**2 * (1 + 1e-11) + 1e-250


@given(
    entries=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    rows=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=4),
    divisor=st.floats(1e-3, 1e3),
)
def test_tight_for_positive_kernels_of_rank_one(
    entries: list[float], rows: list[float], divisor: float
) -> None:
    """``V = a b^T``, at frequency zero, with ``q = a``: ``|a|^2 (sum b)^2``, in fractions."""
    a, b = (torch.tensor(x, dtype=torch.float64) for x in (rows, entries))
    weight = (a[:, None] * b).reshape(len(a), 1, len(b))
    bound = scaled_square_bound(weight, divisor * ones(len(a)), a).item()
    sums = [sum(map(Fraction, row)) for row in weight[:, 0].tolist()]  # of what is stored
    exact = sum(s * s for s in sums) / Fraction(divisor)
    assert exact <= Fraction(bound)
    assert Fraction(bound) <= exact * Fraction(1 + 1e-12)


@given(
    entries=st.lists(st.floats(1e-20, 1e20), min_size=1, max_size=4),
    turn=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_tight_for_diagonal_matrices(entries: list[float], turn: bool, seed: int) -> None:
    diagonal = torch.tensor(entries, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    divisors, scale = (normal(generator, len(entries)).exp() for _ in range(2))
    weight = torch.diag(diagonal)
    if turn:  # one tap of several
        weight = torch.stack([torch.zeros_like(weight), weight, torch.zeros_like(weight)], dim=2)
    bound = Fraction(scaled_square_bound(weight, divisors, scale).item())
    exact = max(
        Fraction(d) ** 2 / Fraction(t) for d, t in zip(entries, divisors.tolist(), strict=True)
    )
    assert exact <= bound <= exact * Fraction(1 + 1e-12)


@given(
    channels=st.tuples(small, small),
    taps=st.lists(small, min_size=1, max_size=2),
    seed=st.integers(0, 10_000),
)
def test_one_where_the_divisors_are_the_row_sums(
    channels: tuple[int, int], taps: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = normal(generator, *channels, *taps)
    scale = (2.0 * normal(generator, channels[0])).exp()
    sums = row_sums(weight, scale)
    # This test's own sums are off by a few roundings.
    assert 1.0 - 1e-13 <= scaled_square_bound(weight, sums, scale).item() <= 1.0 + 1e-11


@pytest.mark.parametrize("scale", [1e-140, 1e-30, 1e30, 1e140])
def test_scales(scale: float) -> None:
    weight = normal(torch.Generator().manual_seed(0), 3, 2, 3, 3)
    unit = scaled_square_bound(weight, ones(3), ones(3)).item()
    found = scaled_square_bound(weight * scale, ones(3), ones(3)).item()
    assert found / scale**2 == pytest.approx(unit, rel=1e-12, abs=0.0)


def test_products_that_underflow_still_count() -> None:
    """The square of 1e-170 is no number, but it is not zero either."""
    weight = torch.full((1, 1, 1), 1e-170, dtype=torch.float64)
    bound = scaled_square_bound(weight, 1e-40 * ones(1), ones(1)).item()
    assert Fraction(bound) >= Fraction(1e-170) ** 2 / Fraction(1e-40)
    assert bound < 1e-200


def test_a_zero_kernel() -> None:
    zero = torch.zeros(2, 3, 3, 3)
    assert 0.0 <= scaled_square_bound(zero, torch.ones(2), torch.ones(2)).item() < 1e-300


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.inf, -math.inf, math.nan], ids=str)
@pytest.mark.parametrize("where", ["divisors", "scale", "weight"])
def test_what_is_not_positive_and_finite_has_no_bound(wrong: float, where: str) -> None:
    weight = normal(torch.Generator().manual_seed(1), 3, 2, 3)
    arguments = {"weight": weight, "divisors": ones(3), "scale": ones(3)}
    arguments[where].view(-1)[1] = wrong
    bound = scaled_square_bound(**arguments).item()
    assert math.isfinite(bound) == (where == "weight" and math.isfinite(wrong))
    assert bound == math.inf or bound > 0.0


def test_what_overflows_has_no_bound() -> None:
    weight = 1e170 * normal(torch.Generator().manual_seed(1), 3, 2, 3)
    assert scaled_square_bound(weight, ones(3), ones(3)).item() == math.inf
    tiny = torch.full((3,), 1e-250, dtype=torch.float64)
    assert scaled_square_bound(weight / 1e170, tiny, ones(3)).item() == math.inf


def test_without_gradient() -> None:
    weight = torch.rand(2, 2, 3, requires_grad=True)
    assert not scaled_square_bound(weight, torch.ones(2), torch.ones(2)).requires_grad
    assert not near_isometry_bound(torch.rand(2, 2, requires_grad=True)).requires_grad


# --- matrices near isometries -----------------------------------------------------------------


def matrix_of(kind: str, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    real, imaginary = (normal(generator, rows, columns) for _ in range(2))
    matrix = torch.complex(real, imaginary) if kind.startswith("complex") else real
    if kind.endswith("orthogonal") or kind == "nearly":
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        matrix = left @ right
    return matrix + 1e-5 * real if kind == "nearly" else matrix


KINDS = ("normal", "orthogonal", "nearly", "complex normal", "complex orthogonal")


@given(
    kind=st.sampled_from(KINDS),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1.0 + 1e-9, 1e3, 1e30]),
    single=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_at_least_the_norm_of_any_matrix(
    kind: str, size: tuple[int, int], scale: float, single: bool, seed: int
) -> None:
    rows, columns = size
    matrix = matrix_of(kind, rows, columns, seed) * scale
    if single:
        matrix = matrix.to(torch.complex64 if matrix.is_complex() else torch.float32)
    found = near_isometry_bound(matrix)
    assert found.dtype == torch.float64
    matrix = matrix.to(torch.complex128 if matrix.is_complex() else torch.float64)
    norm = torch.linalg.matrix_norm(matrix, ord=2).item()
    assert norm <= found.item()
    # |M^H M - I| is at most the root of so many times its largest eigenvalue.
    assert found.item() ** 2 <= 1.0 + math.sqrt(columns) * max(1.0, norm**2) * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["orthogonal", "complex orthogonal"])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (40, 40), (9, 3)])
def test_tight_for_isometries(kind: str, size: tuple[int, int]) -> None:
    matrices = torch.stack([matrix_of(kind, *size, seed) for seed in range(5)])
    bounds = near_isometry_bound(matrices)
    assert bounds.shape == (5,)
    assert bool((torch.linalg.matrix_norm(matrices, ord=2) <= bounds).all())
    assert bool((bounds <= 1.0 + 2e-12).all())


def test_as_far_above_one_as_the_matrix_is_off() -> None:
    matrix = matrix_of("nearly", 6, 6, 0)
    excess = torch.linalg.matrix_norm(matrix, ord=2).item() - 1.0
    assert 1e-6 < excess <= near_isometry_bound(matrix).item() - 1.0 <= 10.0 * excess


@given(angle=st.floats(-4.0, 4.0), scale=st.sampled_from([1.0, 1.5, 1e-8, 1e8]))
def test_rotations_in_fractions(angle: float, scale: float) -> None:
    """What is stored is a rotation times the root of ``a^2 + b^2``, which is not quite one."""
    a, b = scale * math.cos(angle), scale * math.sin(angle)
    square = Fraction(a) ** 2 + Fraction(b) ** 2
    real = torch.tensor([[a, b], [-b, a]], dtype=torch.float64)
    phase = torch.tensor([[complex(a, b)]], dtype=torch.complex128)
    for matrix in (real, phase):
        assert square <= Fraction(near_isometry_bound(matrix).item()) ** 2


@pytest.mark.parametrize("columns", [1000, 2500])
def test_wide_matrices_in_fractions(columns: int) -> None:
    matrix = torch.full((1, columns), 1e4, dtype=torch.float64)
    bound = near_isometry_bound(matrix).item()
    assert columns * Fraction(1e4) ** 2 <= Fraction(bound) ** 2


@pytest.mark.parametrize("wrong", [math.inf, -math.inf, math.nan], ids=str)
def test_entries_that_are_not_finite(wrong: float) -> None:
    matrices = torch.stack([torch.eye(3), torch.eye(3)])
    matrices[1, 0, 2] = wrong
    for tensors in (matrices, matrices.to(torch.complex64)):
        bounds = near_isometry_bound(tensors)
        assert not bool(bounds[1].isfinite())
        assert 1.0 <= bounds[0].item() <= 1.0 + 1e-12
