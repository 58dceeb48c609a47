"""Proven upper bound of the spectral norm of a matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ff_bounds.lanczos import top_eigenpair
from ff_bounds.rounding import (
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    gamma,
    round_up,
    scale_by_power_of_two,
    undo_scaling,
)

_LARGE = 256  # from this size of the Gram matrix on Lanczos is faster than eigh (2 CPU threads)
_LANCZOS_STEPS = 64  # and one for every 8 rows; more would take as long as eigh
_LANCZOS_TOLERANCE = 1e-10


def spectral_norm_bound(matrix: Tensor) -> Tensor:
    r"""Proven upper bound of the spectral norm of each matrix of a batch.

    Claim: ``||A|| <= spectral_norm_bound(A)`` for the stored entries of ``A``, rounding included.

    The largest eigenvalue of the smaller Gram matrix is only *suggested*, by the Lanczos process or
    an eigendecomposition; a factorisation proves it. With ``G`` the computed Gram matrix
    (``A A^T``, say), ``t`` slightly above its largest computed eigenvalue, ``M = fl(t I - G)`` and
    ``L`` *any* lower triangular matrix,

        ``t - ||A||^2 >= lambda_min(M) - e >= -||M - L L^T||_F - e``,

    because ``L L^T`` is positive semidefinite; ``e`` is the rounding of ``G`` and of ``M``. The
    Cholesky factor makes the residual tiny, but nothing is assumed about how it was computed: a
    bad factor gives a looser bound, never a wrong one. Every rounding is paid for:
    ``k = max(m, n)`` terms in ``G``, at most ``min(m, n) + 3`` in the residual. Where Lanczos
    suggested too little for the factorisation to succeed, eigh suggests anew. The result
    exceeds the norm by less than ``1e-8`` relative for ``m n <= 10**7`` and norms above ``1e-307``,
    as long as the factorisation then succeeds (else the next one is 64 times looser).

    Covers every finite matrix of float16, bfloat16, float32 or float64 (entries are scaled by a
    power of two first), zero and rank-deficient ones too. Differentiable: the gradient is
    ``u v^T`` (top singular vectors; a subgradient where the top singular value is not simple; zero
    for a zero matrix), scaled so that ``<gradient, A>`` equals the bound.

    Args:
        matrix: ``(..., m, n)`` real tensor.

    Returns:
        ``(...)`` float64 tensor on the matrix' device.

    Raises:
        ValueError: not a matrix of real floating-point numbers, no entries, or NaN or infinite
            entries.

    References:
        S. M. Rump, Verification of positive definiteness, BIT 46 (2006), for the idea.
        N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2002, section 3.5, for the
        error of a matrix product, ``|fl(AB) - AB| <= gamma_k |A||B|`` in any order of summation.

    Example:
        >>> bound = spectral_norm_bound(torch.tensor([[3.0, 0.0], [0.0, -4.0]]))
        >>> 4.0 <= bound.item() < 4.0 + 1e-9
        True
    """
    check_finite_real(matrix, "matrix")
    if matrix.ndim < 2 or matrix.numel() == 0:
        raise ValueError(
            f"expected a non-empty (..., m, n) matrix, got shape {tuple(matrix.shape)}"
        )
    wide = matrix.to(torch.float64)
    with torch.no_grad():
        bound, gradient = _bound_and_gradient(wide.detach())
    if torch.is_grad_enabled() and matrix.requires_grad:
        return attach_gradient(wide, bound, gradient)
    return bound


def attach_gradient(tensor: Tensor, bound: Tensor, gradient: Tensor) -> Tensor:
    """Return ``bound`` as a function of ``tensor`` with the given gradient.

    Args:
        tensor: ``(..., m, n)``, or any shape if ``bound`` is a scalar.
        bound: ``(...)``.
        gradient: of the shape of ``tensor``.
    """
    attached: Tensor = _AttachGradient.apply(tensor, bound, gradient)
    return attached


def check_finite_real(tensor: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` is real floating-point without NaN and infinity."""
    if not tensor.is_floating_point():
        raise ValueError(f"expected {name} of a real floating-point dtype, got {tensor.dtype}")
    if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
        raise ValueError(f"expected finite {name}, got NaN or infinite entries")


def _bound_and_gradient(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Bound ``(...)`` and gradient ``(..., m, n)`` of float64 matrices."""
    if matrix.shape[-2] > matrix.shape[-1]:
        bound, gradient = _bound_and_gradient(matrix.mT.contiguous())
        return bound, gradient.mT
    largest = matrix.abs().amax(dim=(-2, -1))
    exponent = torch.frexp(largest).exponent
    scaled = scale_by_power_of_two(matrix, -exponent[..., None, None])

    proven_square, left = _bound_of_square(scaled, scaled @ scaled.mT)
    proven = round_up(proven_square.sqrt(), 1)

    right = (left.unsqueeze(-2) @ scaled).squeeze(-2)
    estimate = torch.linalg.vector_norm(right, dim=-1)
    ratio = torch.where(estimate > 0, proven / estimate.square(), torch.zeros_like(proven))
    gradient = (ratio[..., None] * left)[..., :, None] * right[..., None, :]

    unscaled = undo_scaling(proven, exponent)
    return torch.where(largest > 0, unscaled, torch.zeros_like(proven)), gradient


def _bound_of_square(matrix: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """Proven bound of ``||A||^2`` for matrices with entries of size about 1, and singular vectors.

    Returns:
        ``(...)`` bounds, and ``(..., m)`` unit vectors with ``||A^T left||`` close to the norm.
    """
    rows, columns = matrix.shape[-2:]
    frobenius = round_up(matrix.square().sum(dim=(-2, -1)), rows * columns + 1)
    gram_error = gamma(columns + 1) * frobenius + rows * columns * SMALLEST_NORMAL

    best = frobenius  # ||A||^2 <= ||A||_F^2 holds without any factorisation
    identity = torch.eye(rows, dtype=gram.dtype, device=gram.device)
    slack = 8.0 * (rows + 4) * UNIT_ROUNDOFF * frobenius
    estimate, left = _largest_eigenpair(gram)
    for attempt in range(3):
        shift = estimate + slack
        shifted = shift[..., None, None] * identity - gram
        factor, _info = torch.linalg.cholesky_ex(shifted)
        factor = factor.tril()
        residual_norm = torch.linalg.matrix_norm(shifted - factor @ factor.mT)
        shifted_norm = torch.linalg.matrix_norm(shifted)
        factor_norm = torch.linalg.matrix_norm(factor).square()
        error = (
            residual_norm
            + gamma(rows + 3) * (shifted_norm + factor_norm)
            + rows * rows * SMALLEST_NORMAL
        )
        # Twice the error covers the rounding of the error terms themselves (and more).
        proven = round_up(shift + 2.0 * error + 2.0 * gram_error, 4)
        best = torch.fmin(best, proven)
        failed = ~(residual_norm <= slack)  # or NaN
        if not bool(failed.any()):
            break
        if attempt == 0:
            estimate[failed], left[failed] = _by_decomposition(gram[failed])
        else:
            slack = slack * 64.0
    return best, left


def _largest_eigenpair(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Estimates of the largest eigenvalue ``(...)``, rather too large, and its vector ``(..., m)``.

    The value of the Lanczos process is too small by about its tolerance at most, unless the start
    is nearly orthogonal to the vector, or there are too few steps to tell eigenvalues apart.
    """
    if gram.shape[-1] < _LARGE:
        return _by_decomposition(gram)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(gram.shape[-1], generator=generator, dtype=gram.dtype).to(gram.device)
    start = start.expand(gram.shape[:-1])
    steps = _LANCZOS_STEPS + gram.shape[-1] // 8
    left, value = top_eigenpair(gram, start, steps, _LANCZOS_TOLERANCE)
    return value * (1.0 + 2.0 * _LANCZOS_TOLERANCE), left


def _by_decomposition(gram: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    return values[..., -1].clamp_min(0.0), vectors[..., :, -1]


class _AttachGradient(torch.autograd.Function):
    """Return ``bound``; backpropagate ``gradient`` to ``matrix``."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, bound: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return bound.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[..., None, None] * gradient, None, None
