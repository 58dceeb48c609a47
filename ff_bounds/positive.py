"""Proof that a Hermitian matrix is positive semidefinite, by one Cholesky factorisation."""

from __future__ import annotations

import torch
from torch import Tensor

from ff_bounds.rounding import UNIT_ROUNDOFF

_BLOCK = 64
"""Rows at a time: LAPACK's threads take turns on one small matrix, torch's products do not."""


def factorisation_slack(rows: int, trace: Tensor) -> Tensor:
    """What `proves_positive` needs as ``slack`` at least, for a matrix of at most this trace."""
    return 32.0 * (rows + 4) * UNIT_ROUNDOFF * trace


def proves_positive(matrix: Tensor, slack: Tensor) -> Tensor:
    r"""Whether ``matrix >= 0`` is proven; ``False`` says nothing.

    If floating-point Cholesky of a Hermitian ``M`` of size ``m`` runs to completion, then
    ``lambda_min(M) >= -4(m + 4) u tr(M)`` (Demmel; Rump 2006, complex and generous). So success
    for ``M = matrix - slack I`` is the proof if ``slack`` is at least `factorisation_slack`, which
    leaves a factor for the rounding of the subtraction; half of what is beyond it may pay for
    errors of ``matrix`` itself. It is assumed that the library's Cholesky is a Cholesky, with
    triangular systems solved by substitution; off the CPU, where that is not known, the factor's
    residual ``||M - L L^H||_F`` is checked instead (its own rounding is below a quarter of the
    slack).

    Args:
        matrix: ``(cells, m, m)`` float64 or complex128, of which the lower triangle counts;
            overwritten.
        slack: ``(cells,)`` float64.

    Returns:
        ``(cells,)`` bool.

    References:
        S. M. Rump, Verification of positive definiteness, BIT 46 (2006), theorem 2.3.
    """
    matrix.diagonal(dim1=-2, dim2=-1).sub_(slack[:, None])
    if matrix.shape[-1] == 1:
        entry = matrix[:, 0, 0].real
        positive: Tensor = (entry >= 0) & torch.isfinite(entry)
        return positive
    factor, info = cholesky(matrix)
    if matrix.device.type == "cpu":
        pivots = factor.diagonal(dim1=-2, dim2=-1).real
        completed: Tensor = (info == 0) & torch.isfinite(pivots).all(dim=-1)
        return completed
    factor = factor.tril()
    residual = torch.linalg.matrix_norm(matrix - factor @ factor.mH)
    small: Tensor = residual <= 0.25 * slack
    return small


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The lower factor, by blocks where that is faster, and zero for those that have one.

    A Cholesky in which the sums of products are made block after block.
    """
    size = matrix.shape[-1]
    if matrix.device.type != "cpu" or size < 2 * _BLOCK:
        found: tuple[Tensor, Tensor] = torch.linalg.cholesky_ex(matrix)
        return found
    factor, failed = matrix.clone(), torch.zeros(len(matrix), dtype=torch.int32)
    for start in range(0, size, _BLOCK):
        here, below = slice(start, start + _BLOCK), slice(start + _BLOCK, size)
        corner, info = torch.linalg.cholesky_ex(factor[:, here, here])
        factor[:, here, here] = corner
        failed = failed | info
        if start + _BLOCK < size:
            panel = torch.linalg.solve_triangular(corner, factor[:, below, here].mH, upper=False).mH
            factor[:, below, here] = panel
            factor[:, below, below] -= panel @ panel.mH
    return factor, failed
