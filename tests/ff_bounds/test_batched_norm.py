"""One-sided against the SVD and exact cases; a second inequality, so that infinity fails."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds.batched_norm import batched_norm_bound
from ff_bounds.positive import factorisation_slack, proves_positive


def svd(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix.double(), ord=2)


@given(
    batch=st.integers(1, 5),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    rank=st.integers(1, 12),
    scale=st.sampled_from([1.0, 1e30, 1e-30, 1e-150, 1e150]),
    seed=st.integers(0, 10_000),
)
def test_never_below_the_norm(
    batch: int, rows: int, columns: int, rank: int, scale: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(batch, rows, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(batch, rank, columns, generator=generator, dtype=torch.float64)
    matrix = scale * (left @ right)
    bound, exact = batched_norm_bound(matrix), svd(matrix)
    assert (bound >= exact * (1 - 1e-14)).all()  # what the SVD itself rounds
    assert (bound <= exact * 1.02).all()


@pytest.mark.parametrize("scale", [1.0, 2.0**100, 2.0**-100, 2.0**-1060])
def test_never_below_an_exact_rational_norm(scale: float) -> None:
    """``3^2 + 4^2 = 5^2``; diagonals; rank one with entries of few bits."""
    cases = [
        (torch.tensor([[3.0, 4.0], [0.0, 0.0]]), 5.0),
        (torch.tensor([[3.0, 0.0], [4.0, 0.0]]), 5.0),
        (torch.diag(torch.tensor([1.0, -7.0])), 7.0),
        (torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), 2.0),
        (torch.ones(2, 2), 2.0),
    ]
    bounds = batched_norm_bound(torch.stack([case.double() * scale for case, _ in cases]))
    for bound, (_, exact) in zip(bounds.tolist(), cases, strict=True):
        assert exact * scale <= bound <= exact * scale * 1.011 + 2.0**-1020


@pytest.mark.parametrize("size", [(130, 200), (200, 130), (256, 256)])
def test_large_ones_are_factorised_by_blocks(size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(3, *size, generator=generator, dtype=torch.float64)
    bound, exact = batched_norm_bound(matrix), svd(matrix)
    assert (bound >= exact).all()
    assert (bound <= 1.1 * exact).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_blocks_prove_what_holds_and_nothing_else(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(4, 150, 170, generator=generator, dtype=dtype)
    gram = root @ root.mH
    lowest = torch.linalg.eigvalsh(gram)[:, 0]
    identity = torch.eye(150, dtype=dtype)
    slack = factorisation_slack(150, gram.diagonal(dim1=1, dim2=2).real.sum(dim=1)) * 2
    for by, expected in ((0.99, True), (1.01, False)):
        shifted = gram - (by * lowest)[:, None, None] * identity
        assert proves_positive(shifted, slack).tolist() == [expected] * 4
    gram[1, 140, 3] = math.nan
    assert proves_positive(gram, slack).tolist() == [True, False, True, True]


def test_zeros_and_shapes() -> None:
    assert batched_norm_bound(torch.zeros(2, 3, 4)).tolist() == [0.0, 0.0]
    mixed = torch.stack([torch.zeros(3, 3), torch.eye(3)])
    assert batched_norm_bound(mixed)[0] == 0.0
    assert batched_norm_bound(torch.eye(3)).shape == ()
    assert batched_norm_bound(torch.eye(3).expand(2, 5, 3, 3)).shape == (2, 5)
    assert not batched_norm_bound(torch.eye(3, requires_grad=True)).requires_grad
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert 1.0 <= batched_norm_bound(torch.eye(4, dtype=dtype)) < 1.02


def test_refusals() -> None:
    for bad in (torch.tensor([[math.nan]]), torch.tensor([[math.inf]])):
        with pytest.raises(ValueError, match="finite"):
            batched_norm_bound(bad)
    with pytest.raises(ValueError, match="real floating"):
        batched_norm_bound(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="non-empty"):
        batched_norm_bound(torch.ones(2, 0))
    with pytest.raises(ValueError, match="tolerance"):
        batched_norm_bound(torch.ones(2, 2), 0.0)
