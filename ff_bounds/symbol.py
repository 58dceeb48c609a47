r"""The symbol of a convolution at many frequencies, and proofs about its norm there.

The symbol of a kernel with taps ``K_a`` is ``K(w) = sum_a K_a exp(-i <a, w>)``. What is evaluated
is its smaller Gram matrix, itself a trigonometric polynomial with real coefficients,

    ``G(w) = K(w) K(w)^H = sum_s G_s exp(-i <s, w>)``, ``G_s = sum_a K_{a+s} K_a^T = G_{-s}^T``,

so that a frequency costs a linear combination of a few matrices instead of a matrix product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ff_bounds.rounding import UNIT_ROUNDOFF, gamma, scale_by_power_of_two

_CHUNK_BYTES = 2**27  # complex matrices held at once


class GramPolynomial:
    """``G(w) = K(w) K(w)^H`` of a batch of kernels, with a bound of its rounding errors.

    Args:
        kernels: ``(problems, m, n, *taps)`` float64 and finite, with entries of size about one (see
            `normalized_kernels`), ``m <= n``.

    Attributes:
        error: ``(problems,)`` bound of ``||computed G(w) - G(w)||`` for every frequency with
            ``|w_j| <= 2 pi``.

    The error bound: an entry of ``G(w)`` is a sum of ``N = n prod(taps)`` products, times a cosine
    or sine, summed over at most ``H + 1`` shifts. Each cosine is off by the rounding of its angle,
    at most ``2 (d + 1) u |<s, w>|``, and of the library function (4u is generous). All is relative
    to ``sum_ab |K_a||K_b|^T``, whose Frobenius norm is at most ``(sum_a ||K_a||_F)^2 <=
    prod(taps) ||K||_F^2``. A factor 4 covers the real and imaginary parts and what is left.
    """

    def __init__(self, kernels: Tensor) -> None:
        _, rows, columns = kernels.shape[:3]
        self.taps = tuple(kernels.shape[3:])
        self.rows = rows
        self.kernels = kernels
        dimension, count = len(self.taps), math.prod(self.taps)
        shifts = _half_space(self.taps)
        self._shifts = torch.tensor(shifts, dtype=torch.float64, device=kernels.device)
        self._shifts = self._shifts.reshape(len(shifts), dimension)

        even, odd = [], []
        for shift in shifts:
            ahead, behind = kernels, kernels
            for axis, (s, t) in enumerate(zip(shift, self.taps, strict=True), start=3):
                ahead = ahead.narrow(axis, max(s, 0), t - abs(s))
                behind = behind.narrow(axis, max(-s, 0), t - abs(s))
            product = ahead.flatten(2) @ behind.flatten(2).mT
            if any(shift):
                even.append(product + product.mT)
                odd.append(product - product.mT)
            else:
                even.append(product)
        self._even = torch.stack(even, dim=1).flatten(2)  # (problems, H + 1, m * m)
        self._odd = torch.stack(odd, dim=1).flatten(2) if odd else None

        reach = 2 * math.pi * sum(t - 1 for t in self.taps)
        relative = gamma(columns * count + len(even) + 4)
        relative += 2 * (dimension + 1) * UNIT_ROUNDOFF * reach + 8 * UNIT_ROUNDOFF
        squares = kernels.square().flatten(1).sum(dim=1)
        self.error = 4 * relative * count * squares + 1e-290

    @property
    def chunk(self) -> int:
        """How many matrices to ask for at once."""
        return max(1, _CHUNK_BYTES // (16 * self.rows * self.rows))

    def __call__(self, problem: Tensor, frequency: Tensor) -> Tensor:
        """Evaluate ``G`` of kernel ``problem[c]`` at ``frequency[c]``.

        Args:
            problem: ``(cells,)`` int64, in ascending order.
            frequency: ``(cells, d)``, entries in ``[-2 pi, 2 pi]``.

        Returns:
            ``(cells, m, m)`` complex128.
        """
        angle = frequency @ self._shifts.mT  # (cells, H + 1), the first one zero
        parts: list[Tensor] = []
        for basis, weight in ((self._even, angle.cos()), (self._odd, -angle[:, 1:].sin())):
            if basis is None:
                parts.append(torch.zeros_like(parts[0]))
            elif self.rows < 24:  # small matrices: gather the coefficients
                parts.append((weight[:, None] @ basis[problem])[:, 0])
            else:
                counts = torch.bincount(problem, minlength=len(basis)).tolist()
                pieces = zip(weight.split(counts), basis, strict=True)
                parts.append(torch.cat([piece @ matrix for piece, matrix in pieces]))
        return torch.complex(parts[0], parts[1]).reshape(-1, self.rows, self.rows)

    def proves(self, problem: Tensor, gram: Tensor, limit: Tensor) -> Tensor:
        r"""Whether it is proven that ``||G(w)|| <= limit``, for computed ``gram``.

        If floating-point Cholesky of a Hermitian ``M`` of size ``m`` runs to completion, then
        ``lambda_min(M) >= -4(m + 4) u tr(M)`` (Demmel; Rump 2006, complex and generous); so
        success for ``M = t I - G``, with ``t`` that much and `error` below ``limit``, is the proof.
        It is assumed that the library's Cholesky is a Cholesky, with triangular systems solved by
        substitution; off the CPU, where that is not known, the factor's residual
        ``||M - L L^H||_F`` is checked instead (its own rounding is below a quarter of the slack).

        Args:
            problem: ``(cells,)`` int64.
            gram: ``(cells, m, m)``, as returned by a call; overwritten.
            limit: ``(cells,)`` float64, positive.

        Returns:
            ``(cells,)`` bool; false says nothing.

        References:
            S. M. Rump, Verification of positive definiteness, BIT 46 (2006), theorem 2.3.
        """
        rows = self.rows
        slack = 32.0 * (rows + 4) * (rows + 1) * UNIT_ROUNDOFF * limit + 2.0 * self.error[problem]
        shift = limit - slack
        if rows == 1:
            within: Tensor = gram[:, 0, 0].real <= shift
            return within
        shifted = gram.neg_()
        shifted.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
        factor, info = torch.linalg.cholesky_ex(shifted)
        if gram.device.type == "cpu":
            completed: Tensor = (info == 0) & (shift > 0)
            return completed
        factor = factor.tril()
        residual = torch.linalg.matrix_norm(shifted - factor @ factor.mH)
        small: Tensor = (residual <= 0.25 * slack) & (shift > 0)
        return small


def _half_space(taps: Sequence[int]) -> list[tuple[int, ...]]:
    """Shifts between taps, one of each pair ``s, -s``, zero first."""
    shifts = itertools.product(*(range(1 - t, t) for t in taps))
    return sorted(s for s in shifts if s >= (0,) * len(taps))


def normalized_kernels(kernels: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Scale kernels to entries of size one by a power of two that their owner has in common.

    Args:
        kernels: ``(problems, m, n, *taps)``, any real dtype.
        owner: ``(problems,)`` int64, the layer that each kernel belongs to.

    Returns:
        Float64 kernels with ``m <= n``, and the exponents ``(owners,)`` to scale back with.
    """
    kernels = kernels.to(torch.float64)
    largest = kernels.abs().flatten(1).amax(dim=1)
    owners = int(owner.max()) + 1
    largest = largest.new_zeros(owners).scatter_reduce(0, owner, largest, "amax")
    exponent = torch.frexp(largest).exponent
    if kernels.shape[1] > kernels.shape[2]:
        kernels = kernels.transpose(1, 2)
    shape = [-1] + [1] * (kernels.ndim - 1)
    return scale_by_power_of_two(kernels, -exponent[owner].reshape(shape)), exponent
