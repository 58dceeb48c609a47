"""The largest eigenvalue of positive semidefinite matrices by the Lanczos process: an estimate."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BETWEEN_CHECKS = 8  # steps


def top_eigenpair(
    matrix: Tensor | Callable[[Tensor], Tensor],
    start: Tensor,
    steps: int,
    tolerance: float | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Estimate the largest eigenvalue of positive semidefinite matrices, and its vector.

    **Not a bound**, though from below up to rounding: the value is the Rayleigh quotient of the
    vector, the largest over the Krylov space ``span(v, G v, ..., G^(steps - 1) v)``.

    Each vector of the orthonormal basis ``V`` is made orthogonal to all before it, twice, so that
    ``V^H G V`` is tridiagonal to rounding and no eigenvalue comes up a second time. Where the
    space is exhausted before the steps are, ``V`` goes on with zeros (which add nothing but zero
    eigenvalues) or with what rounding left, if that is orthogonal to the rest.
    For the estimates ``q`` and ``w``, ``||G w - q w||`` is the next off-diagonal entry times the
    last entry of the tridiagonal matrix' eigenvector, and some eigenvalue is that close to ``q``.

    A start that is orthogonal to the sought vector never finds it: choose one with no structure.

    Args:
        matrix: ``(..., n, n)`` Hermitian and positive semidefinite, or the function that maps
            vectors ``(..., n)`` to their images.
        start: ``(..., n)`` of the same real or complex dtype, of any length; zero gives zero.
        steps: dimension of the Krylov space (at most ``n`` is used).
        tolerance: stop once ``||G w - q w|| <= tolerance * q`` in the whole batch; looked at every
            few steps. ``None``: all steps are made, without waiting for the device.

    Returns:
        Unit vectors ``(..., n)`` and real Rayleigh quotients ``(...)``.

    References:
        B. N. Parlett, The Symmetric Eigenvalue Problem, 1980, sections 6.9 and 13.

    Example:
        >>> matrix = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> vector, value = top_eigenpair(matrix, torch.tensor([1.0, 0.5]), steps=2)
        >>> round(value.item(), 6)
        2.0
    """
    size = start.shape[-1]
    steps = min(steps, size)
    vector = _unit(start)
    basis = vector.new_zeros(*start.shape[:-1], steps, size)  # rows, so that a prefix is compact
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for step in range(steps):
        basis[..., step, :] = vector
        space = basis[..., : step + 1, :]
        image = matrix(vector) if callable(matrix) else (matrix @ vector[..., None])[..., 0]
        rough, overlap = _without(image, space)
        diagonal.append(overlap[..., -1].real)
        fresh, _ = _without(rough, space)
        # What the second time shrinks is rounding, from within the space: Parlett's criterion.
        length = torch.linalg.vector_norm(fresh, dim=-1)
        length = torch.where(length > 0.5 * torch.linalg.vector_norm(rough, dim=-1), length, 0.0)
        last = step + 1 == steps
        if last or (tolerance is not None and (step + 1) % _BETWEEN_CHECKS == 0):
            values, vectors = torch.linalg.eigh(_tridiagonal(diagonal, beside))
            value, weights = values[..., -1], vectors[..., -1]
            residual = length * weights[..., -1].abs()
            if last or bool((residual <= (tolerance or 0.0) * value).all()):
                break
        beside.append(length)
        vector = torch.where(length > 0, 1.0 / length, 0.0)[..., None] * fresh
    combined = (weights.to(basis.dtype)[..., None, :] @ space)[..., 0, :]
    return _unit(combined), value


def _without(vector: Tensor, space: Tensor) -> tuple[Tensor, Tensor]:
    """Remove from vectors ``(..., n)`` their parts along orthonormal rows ``(..., k, n)``."""
    overlap = space.conj() @ vector[..., None]
    return vector - (overlap.mT @ space)[..., 0, :], overlap[..., 0]


def _tridiagonal(diagonal: list[Tensor], beside: list[Tensor]) -> Tensor:
    """Symmetric matrices ``(..., k, k)``, of which only the lower triangle is filled in."""
    matrix = torch.diag_embed(torch.stack(diagonal, dim=-1))
    if beside:
        matrix = matrix + torch.diag_embed(torch.stack(beside, dim=-1), offset=-1)
    return matrix


def _unit(vector: Tensor) -> Tensor:
    length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
    unit: Tensor = vector / torch.where(length > 0, length, 1.0)
    return unit
