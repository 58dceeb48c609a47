from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds import supremum_bracket
from ff_bounds.branch_and_bound import branch_and_bound
from ff_bounds.deflation import Deflation
from ff_bounds.remainder import sharper_remainder, unfolding_remainder
from ff_bounds.symbol import Symbol, normalized_kernels
from tests.ff_bounds.test_supremum import KINDS, grid_norm, make_kernel, off_grid


def spiked(shape: tuple[int, ...], seed: int, spikes: int = 2, size: float = 20.0) -> Tensor:
    """Noise and a few large directions, the same ones at every tap or not."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator, dtype=torch.float64)

    groups, rows, columns, *taps = shape
    left, right = normal(groups, rows, spikes), normal(groups, spikes, columns)
    factor = normal(groups, spikes, *taps)
    spike = torch.einsum("gos,gsi,gs...->goi...", left, right, factor)
    return normal(*shape) + size / math.sqrt(rows * columns) * spike


def make(
    kernel: Tensor, size: int, seed: int, good: bool, corrected: bool
) -> tuple[Symbol, Deflation]:
    owner = torch.arange(len(kernel))
    kernels, _ = normalized_kernels(kernel, owner)
    symbol = Symbol(kernels)
    rows = symbol.rows
    if good:
        _, vectors = torch.linalg.eigh(symbol.mean)
        basis = vectors[..., -size:].contiguous()
    else:
        generator = torch.Generator().manual_seed(seed)
        basis = torch.randn(len(kernel), rows, size, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(basis).Q.contiguous()
    square = branch_and_bound(kernels, owner, 0.05, 1000).lower.square()
    remainder = unfolding_remainder(symbol, basis)
    return symbol, Deflation(symbol, basis, square, remainder, corrected=corrected)


def frequencies(count: int, dimension: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * math.pi * torch.rand(count, dimension, generator=generator, dtype=torch.float64)


@given(
    st.sampled_from([*KINDS, "spiked"]),
    st.integers(0, 10**6),
    st.sampled_from([(3,), (2,), (3, 3), (2, 4), (2, 2, 2)]),
    st.integers(2, 9),
    st.integers(2, 12),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
)
def test_never_proves_less_than_the_norm(
    kind: str,
    seed: int,
    taps: tuple[int, ...],
    rows: int,
    columns: int,
    size: int,
    good: bool,
    corrected: bool,
) -> None:
    """Whatever the subspace: a limit just below the norm is never proven."""
    shape = (2, min(rows, columns), max(rows, columns), *taps)
    kernel = spiked(shape, seed) if kind == "spiked" else make_kernel(kind, shape, seed)
    symbol, deflation = make(kernel, min(size, shape[1]), seed, good, corrected)
    frequency = frequencies(12, len(taps), seed)
    problem = torch.tensor([0] * 6 + [1] * 6)
    norms = torch.linalg.matrix_norm(symbol(problem, frequency), ord=2)
    values = deflation.evaluate(problem, frequency)
    _, proven = deflation.certificate(problem, values, norms.square() * (1 - 1e-12))
    assert not proven.any()
    # Also where the limit is far above what the subspace was chosen for.
    larger = norms.square() * 4 + 1e-3
    _, proven = deflation.certificate(problem, values, larger)
    enough = 4 * deflation._remainder[problem] < larger
    if size >= shape[1]:
        assert proven[enough].all()


@given(st.integers(0, 10**6), st.sampled_from([(3, 3), (3,), (2, 3)]))
def test_proves_a_limit_just_above_the_norm(seed: int, taps: tuple[int, ...]) -> None:
    symbol, deflation = make(spiked((1, 16, 20, *taps), seed, size=300.0), 6, seed, True, True)
    frequency = frequencies(20, len(taps), seed)
    problem = torch.zeros(20, dtype=torch.int64)
    norms = torch.linalg.matrix_norm(symbol(problem, frequency), ord=2).square()
    usable = norms > 2 * deflation._remainder[problem]
    _, proven = deflation.certificate(problem, deflation.evaluate(problem, frequency), norms * 1.01)
    assert proven[usable].double().mean() > 0.7 or not usable.any()


@given(st.sampled_from(KINDS), st.integers(0, 10**6), st.sampled_from([(3,), (3, 2), (2, 2, 2)]))
def test_remainders_bound_what_the_subspace_leaves(
    kind: str, seed: int, taps: tuple[int, ...]
) -> None:
    kernel = make_kernel(kind, (2, 5, 6, *taps), seed)
    kernels, _ = normalized_kernels(kernel, torch.arange(2))
    symbol = Symbol(kernels)
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(2, 5, 2, generator=generator, dtype=torch.float64)).Q
    problem = torch.arange(2).repeat_interleave(15)
    values = symbol(problem, frequencies(30, len(taps), seed))
    frame = basis.to(values.dtype)[problem]
    rest = torch.linalg.matrix_norm(values - frame @ (frame.mH @ values), ord=2).square()

    def coarse(line: Tensor) -> Tensor:
        return branch_and_bound(line, torch.arange(len(line)), 0.1, 1000, deflates=False).upper

    plain = unfolding_remainder(symbol, basis)
    sharper = sharper_remainder(symbol, basis, coarse)
    for bound in (plain, sharper):
        assert (bound[problem] >= rest * (1 - 1e-12)).all()
        assert (
            bound <= 1.3 * math.prod(taps) * kernels.square().flatten(1).sum(dim=1) + 1e-9
        ).all()


@pytest.mark.parametrize("spikes", [1, 3, 12])
@pytest.mark.parametrize("shape", [(1, 100, 120, 3, 3), (2, 96, 96, 2, 3), (1, 130, 100, 5)])
def test_brackets_of_large_kernels(shape: tuple[int, ...], spikes: int) -> None:
    kernel = spiked(shape, seed=spikes, spikes=spikes, size=200.0)
    found = supremum_bracket(kernel)
    assert found.upper <= 1.001 * found.lower
    size = 24
    on_grid = grid_norm(kernel, size)
    assert found.upper >= on_grid
    assert found.lower <= on_grid * off_grid(shape[3:], size) * (1 + 1e-11)


def test_one_direction_shared_by_all_taps_costs_little() -> None:
    """A flat symbol, but for one left vector: no whole matrix is factorised."""
    generator = torch.Generator().manual_seed(0)
    kernel = 0.01 * torch.randn(1, 128, 128, 3, 3, generator=generator, dtype=torch.float64)
    kernel[0, :, :, 1, 1] += 1.0 / 128 * 30.0
    found = supremum_bracket(kernel)
    assert found.upper <= 1.001 * found.lower
    assert grid_norm(kernel, 8) <= found.upper
