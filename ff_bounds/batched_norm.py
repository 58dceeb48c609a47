"""Proven upper bounds of the spectral norms of many matrices, a little loose and cheap."""

from __future__ import annotations

import torch
from torch import Tensor

from ff_bounds.lanczos import top_eigenpair
from ff_bounds.matrix import check_finite_real
from ff_bounds.positive import factorisation_slack, proves_positive
from ff_bounds.rounding import (
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    gamma,
    round_up,
    scale_by_power_of_two,
    undo_scaling,
)

_STEPS = 16  # of the Lanczos process
_WIDER = (1.0, 8.0, 64.0)  # times the tolerance, where the process has not come near enough


def batched_norm_bound(matrix: Tensor, tolerance: float = 0.01) -> Tensor:
    r"""Proven upper bound of the spectral norm of each matrix of a batch.

    Claim: ``||A|| <= batched_norm_bound(A)`` for the stored entries, rounding included. A few steps
    of the Lanczos process suggest a value, one Cholesky factorisation of ``t I - G`` proves that it
    is large enough (`ff_bounds.positive`), where ``G`` is the computed Gram matrix on the smaller
    side and ``t`` leaves room for its rounding, ``gamma_k ||A||_F^2`` with ``k`` terms. Where the
    proof fails a larger value is tried. What is never proven in this way gets the smaller of
    ``||A||_F`` and ``||G||_F^(1/2)``.

    Usually at most ``tolerance`` too large (the Lanczos value itself is up to about as much too
    small); see `spectral_norm_bound` for a bound that is tight to rounding and has a gradient, at
    several times the cost.

    Args:
        matrix: ``(..., m, n)`` real, of any floating-point dtype.
        tolerance: relative, positive.

    Returns:
        ``(...)`` float64 tensor on the matrix' device, without gradient.

    Raises:
        ValueError: not a matrix of real floating-point numbers, no rows or columns, NaN or infinite
            entries, or a tolerance that is not positive.

    References:
        S. M. Rump, Verification of positive definiteness, BIT 46 (2006).

    Example:
        >>> bound = batched_norm_bound(torch.tensor([[[3.0, 0.0], [0.0, -4.0]]]))
        >>> 4.0 <= bound.item() <= 4.05
        True
    """
    check_finite_real(matrix, "matrix")
    if matrix.ndim < 2 or 0 in matrix.shape[-2:]:
        raise ValueError(
            f"expected a non-empty (..., m, n) matrix, got shape {tuple(matrix.shape)}"
        )
    if not tolerance > 0:
        raise ValueError(f"expected a positive tolerance, got {tolerance}")
    with torch.no_grad():
        wide = matrix.detach().to(torch.float64).flatten(0, -3) if matrix.ndim > 2 else matrix[None]
        wide = wide.to(torch.float64)
        if wide.shape[-2] > wide.shape[-1]:
            wide = wide.mT
        largest = wide.abs().amax(dim=(-2, -1))
        exponent = torch.frexp(largest).exponent
        scaled = scale_by_power_of_two(wide, -exponent[:, None, None])
        root = round_up(_bound_of_square(scaled, tolerance).sqrt(), 1)
        bound = torch.where(largest > 0, undo_scaling(root, exponent), 0.0)
        return bound.reshape(matrix.shape[:-2])


def _bound_of_square(matrix: Tensor, tolerance: float) -> Tensor:
    """Bounds ``(cells,)`` of ``||A||^2`` for ``A (cells, m, n)``, ``m <= n``, of size one."""
    rows, columns = matrix.shape[-2:]
    gram = matrix @ matrix.mT
    frobenius = round_up(matrix.square().sum(dim=(-2, -1)), rows * columns + 1)
    error = round_up(gamma(columns + 1) * frobenius + rows * columns * SMALLEST_NORMAL, 4)
    schatten = torch.linalg.matrix_norm(gram) + rows * 2.0**-500
    best = torch.fmin(frobenius, round_up(schatten + error, rows * rows + 3))

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(rows, generator=generator, dtype=gram.dtype).to(gram.device)
    _, estimate = top_eigenpair(gram, start.expand(gram.shape[:-1]), _STEPS)
    opened = torch.arange(len(gram), device=gram.device)
    for wider in _WIDER:
        # The allowance is beyond the wish, so that a matrix of rank one is proven as well.
        wished = estimate[opened].clamp_min(0.0) * (1.0 + 2.0 * tolerance * wider)
        allowed = factorisation_slack(rows, 2.0 * rows * wished) + 2.0 * error[opened]
        shift = wished + 2.0 * allowed + SMALLEST_NORMAL
        slack = allowed + 8.0 * UNIT_ROUNDOFF * shift
        difference = -gram[opened]
        difference.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
        proven = proves_positive(difference, slack)
        where = opened[proven]
        best[where] = torch.minimum(best[where], shift[proven])
        opened = opened[~proven]
        if not len(opened):
            break
    return best
