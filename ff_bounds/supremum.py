"""The norm of a convolution on the infinite lattice, bracketed to any tolerance."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ff_bounds.branch_and_bound import branch_and_bound
from ff_bounds.matrix import attach_gradient, check_finite_real
from ff_bounds.rounding import SMALLEST_NORMAL, scale_by_power_of_two
from ff_bounds.symbol import GramPolynomial, normalized_kernels

MAX_MATRICES = 20_000
"""A search that would visit more matrices (and 8 first covers) settles for a larger gap."""


class NormBracket(NamedTuple):
    """Proven bracket of the norm of a convolution on the infinite lattice.

    Attributes:
        lower: float64 scalar, proven to be at most the norm.
        upper: float64 scalar, proven to be at least the norm.
        frequency: ``(d,)`` float64, where the symbol of the unit-stride kernel reaches ``lower``;
            one entry per axis.
        group: index of the group that reaches it.
        matrices: how many matrices were visited.
    """

    lower: Tensor
    upper: Tensor
    frequency: Tensor
    group: int
    matrices: int


def supremum_bracket(kernel: Tensor, tol: float = 1e-3) -> NormBracket:
    """Bracket ``sigma*`` of a unit-stride kernel, the largest over its groups.

    Claim: ``lower <= sigma* <= upper`` for the stored entries, rounding included. Also
    ``upper <= (1 + tol) lower``, except for norms that overflow or are below about 1e-300, and
    for symbols so flat that a further split would take the search beyond `MAX_MATRICES`; then
    the tolerance is doubled until the cells at hand close.

    Args:
        kernel: ``(groups, c_out, c_in, *taps)`` as from `unit_stride_kernel`; one to three axes.
        tol: relative gap, in ``[1e-6, 1]``.

    Raises:
        ValueError: NaN or infinite entries, or a tolerance outside its range.

    Example:
        >>> found = supremum_bracket(torch.tensor([1.0, -2.0, 1.0]).reshape(1, 1, 1, 3))
        >>> bool(4 / 1.001 <= found.lower <= 4 <= found.upper)  # 2 + 2, at frequency pi
        True
    """
    return _bracket_and_vector(kernel.detach(), tol)[0]


def supremum_bound(kernel: Tensor, tol: float = 1e-3) -> Tensor:
    """Upper end of `supremum_bracket`, differentiable.

    The gradient is that of ``||K(w)||`` at the frequency and group where the lower bound is
    attained (a subgradient if several attain the supremum, to within the tolerance), scaled so
    that ``<gradient, kernel>`` equals the bound; zero for a zero kernel.
    """
    bracket, left = _bracket_and_vector(kernel.detach(), tol)
    if not (torch.is_grad_enabled() and kernel.requires_grad):
        return bracket.upper
    chosen = kernel.detach()[bracket.group].to(torch.float64)
    wide = chosen.shape[0] <= chosen.shape[1]
    chosen = chosen if wide else chosen.transpose(0, 1)
    taps = chosen.shape[2:]
    grids = torch.meshgrid(*(torch.arange(t) for t in taps), indexing="ij")
    places = torch.stack(grids, dim=-1).reshape(-1, len(taps)).to(bracket.frequency)
    phase = torch.exp(-1j * (places @ bracket.frequency))
    symbol = (chosen.flatten(2) * phase).sum(dim=2)
    right = symbol.mH @ left  # norm times the other singular vector
    square = right.abs().square().sum()
    scale = torch.where(square > 0, bracket.upper / square, 0.0)
    direction = (left.conj()[:, None, None] * right[None, :, None] * phase).real
    direction = scale * direction.reshape(chosen.shape)
    gradient = torch.zeros(kernel.shape, dtype=torch.float64, device=kernel.device)
    gradient[bracket.group] = direction if wide else direction.transpose(0, 1)
    return attach_gradient(kernel.to(torch.float64), bracket.upper, gradient)


def _bracket_and_vector(kernel: Tensor, tol: float) -> tuple[NormBracket, Tensor]:
    """Bracket, and the singular vector on the smaller side at its peak."""
    check_finite_real(kernel, "weight")
    if not 1e-6 <= tol <= 1.0:
        raise ValueError(f"expected tol between 1e-6 and 1, got {tol}")
    trimmed = _without_zero_borders(kernel)
    axes = [axis for axis, taps in enumerate(trimmed.shape[3:]) if taps > 1]
    squeezed = trimmed.reshape(*kernel.shape[:3], *(trimmed.shape[3 + axis] for axis in axes))
    owner = torch.zeros(len(kernel), dtype=torch.int64, device=kernel.device)
    normalized, exponent = normalized_kernels(squeezed, owner)
    found = branch_and_bound(GramPolynomial(normalized), owner, tol, MAX_MATRICES)
    lower = scale_by_power_of_two(found.lower, exponent)[0]
    upper = scale_by_power_of_two(found.upper, exponent)[0]
    tiny = 2.0 * SMALLEST_NORMAL  # what scaling back may have lost to underflow
    lower = torch.where(lower > tiny, lower, 0.0).clamp_max(torch.finfo(torch.float64).max)
    upper = torch.where(upper > tiny, upper, upper + tiny)
    upper = torch.where((normalized == 0).all(), 0.0, upper)
    frequency = torch.zeros(kernel.ndim - 3, dtype=torch.float64, device=kernel.device)
    frequency[axes] = found.frequency[0]
    bracket = NormBracket(lower, upper, frequency, int(found.problem[0]), found.matrices)
    return bracket, found.left[0]


def _without_zero_borders(kernel: Tensor) -> Tensor:
    """Drop outer taps that are zero in all groups: a shift, which changes no norm."""
    for axis in range(3, kernel.ndim):
        used = torch.nonzero(kernel.movedim(axis, 0).flatten(1).any(dim=1))[:, 0]
        if len(used):
            first, last = int(used[0]), int(used[-1])
            kernel = kernel.narrow(axis, first, last - first + 1)
    return kernel
