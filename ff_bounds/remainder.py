"""Bounds of what is left of a convolution's norm once a subspace is split off.

``Q`` ``(m, k)`` spans the subspace, ``N`` is an orthonormal basis of the complement of its range,
and what is bounded is ``||N^H K(w)||**2`` for all frequencies at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ff_bounds.lanczos import top_eigenpair
from ff_bounds.positive import factorisation_slack, proves_positive
from ff_bounds.rounding import gamma
from ff_bounds.symbol import Symbol


def sharper_remainder(
    symbol: Symbol, basis: Tensor, coarse_bound: Callable[[Tensor], Tensor]
) -> Tensor:
    """Proven bounds ``(problems,)`` of ``||N^H K(w)||**2`` at every ``w``.

    As ``N^H Q = 0``, ``N^H K = N^H (K - Q A)`` for any kernel ``A``. With the phases of the first
    axis as they are, and those of the others bounded by ``sqrt(taps)`` each, that is at most the
    norm of a kernel with one axis: its columns are those of ``K - Q A`` at all taps of the others.
    """
    kernels, size = symbol.kernels, basis.shape[-1]
    flat = kernels.flatten(2)
    rest = (flat - basis @ (basis.mT @ flat)).reshape(kernels.shape)
    lost = gamma(symbol.rows + size + 4) * (1.0 + total_size(basis) ** 2) * symbol.sizes
    line = rest.movedim(3, -1).flatten(2, -2)  # (problems, m, n * other taps, taps)
    others = math.prod(symbol.taps[1:])
    norm = coarse_bound(line) * (math.sqrt(others) * (1.0 + 1e-12)) + 2.0 * lost
    square: Tensor = norm.square() * (1.0 + 1e-14)
    return square


def unfolding_remainder(symbol: Symbol, basis: Tensor) -> Tensor:
    """Proven bounds ``(problems,)`` of ``||N^H K(w)||**2`` at every ``w``; maybe infinite.

    ``K(w) = T (p kron I)`` with unit phases ``p``, so ``||N^H K||**2 <= prod(taps) ||N^H T||**2``,
    and ``N^H T T^T N = N^H (T T^T - Q A - B Q^T) N`` for any ``A`` and ``B``, as ``N^H Q = 0``.
    Cholesky proves a bound of that matrix. Rounding: of ``T T^T`` (``n prod(taps)`` terms) and of
    what is subtracted.
    """
    count = math.prod(symbol.taps)
    mean, rows, size = symbol.mean, symbol.rows, basis.shape[-1]
    first = basis.mT @ mean
    rest = mean - basis @ first
    second = rest @ basis
    rest = rest - second @ basis.mT
    rest = 0.5 * (rest + rest.mT)
    norm = torch.linalg.matrix_norm
    terms = norm(mean) + norm(basis) * (norm(first) + norm(second))
    error = gamma(symbol.columns * count + 4) * symbol.sizes.square()
    error = 2.0 * error + gamma(4 * size + 16) * terms
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(rows, generator=generator, dtype=torch.float64).to(rest)
    _, estimate = top_eigenpair(rest, start.expand(len(rest), -1), 24)
    bound = torch.full_like(estimate, math.inf)
    for factor in (1.02, 1.2):
        limit = estimate * factor + 1e-290
        slack = factorisation_slack(rows, rows * limit + norm(rest) * rows**0.5)
        shifted = (
            limit[:, None, None] * torch.eye(rows, dtype=rest.dtype, device=rest.device) - rest
        )
        proven = proves_positive(shifted, slack)
        bound = torch.where(proven & torch.isinf(bound), limit + slack + error, bound)
        if bool(proven.all()):
            break
    return bound * (count * (1.0 + 1e-12))


def total_size(image: Tensor) -> Tensor:
    """Bound ``(problems,)`` of the sum of the Frobenius norms of all ``(k, m)`` blocks."""
    size: Tensor = torch.linalg.matrix_norm(image).reshape(len(image), -1).sum(dim=1) * (
        1.0 + 1e-10
    )
    return size
