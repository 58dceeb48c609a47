"""The norm of a convolution on the infinite lattice, bracketed to any tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ff_bounds.branch_and_bound import branch_and_bound
from ff_bounds.matrix import attach_gradient, check_finite_real
from ff_bounds.rounding import SMALLEST_NORMAL, scale_by_power_of_two
from ff_bounds.symbol import normalized_kernels

_ALONE = 96  # rows from which a CPU gains nothing by batching

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
    return supremum_brackets([kernel], tol)[0]


def supremum_brackets(kernels: Sequence[Tensor], tol: float = 1e-3) -> list[NormBracket]:
    """`supremum_bracket` of each kernel; those of equal shape are searched together.

    Args:
        kernels: each ``(groups, c_out, c_in, *taps)``, on one device.
        tol: relative gap.
    """
    return [found.bracket for found in _search(kernels, tol)]


def supremum_bound(kernel: Tensor, tol: float = 1e-3) -> Tensor:
    """Upper end of `supremum_bracket`, differentiable.

    The gradient is that of ``||K(w)||`` at the frequency and group where the lower bound is
    attained (a subgradient if several attain the supremum, to within the tolerance), scaled so
    that ``<gradient, kernel>`` equals the bound; zero for a zero kernel.
    """
    return supremum_bounds([kernel], tol)[0]


def supremum_bounds(kernels: Sequence[Tensor], tol: float = 1e-3) -> list[Tensor]:
    """`supremum_bound` of each kernel; those of equal shape are searched together.

    Example:
        >>> kernels = [torch.ones(1, 1, 4, 3, 3), torch.ones(4, 1, 1, 5)]
        >>> [round(bound.item()) for bound in supremum_bounds(kernels)]
        [18, 5]
    """
    found = _search(kernels, tol)
    return [_differentiable(k, f.bracket, f.left) for k, f in zip(kernels, found, strict=True)]


def supremum_bracket_and_bound(kernel: Tensor, tol: float = 1e-3) -> tuple[NormBracket, Tensor]:
    """`supremum_bracket` and `supremum_bound` by one search."""
    (found,) = _search([kernel], tol)
    return found.bracket, _differentiable(kernel, found.bracket, found.left)


def _differentiable(kernel: Tensor, bracket: NormBracket, left: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and kernel.requires_grad):
        return bracket.upper
    gradient = symbol_norm_gradient(
        kernel.detach(), bracket.group, bracket.frequency, left, bracket.upper
    )
    return attach_gradient(kernel.to(torch.float64), bracket.upper, gradient)


def symbol_norm_gradient(
    kernel: Tensor, group: int, frequency: Tensor, left: Tensor, value: Tensor
) -> Tensor:
    """Gradient of ``||K(w)||`` with the singular vector ``left``, scaled to ``value``.

    Args:
        kernel: ``(groups, c_out, c_in, *taps)``.
        group: the kernel meant.
        frequency: ``(d,)``, the ``w`` meant.
        left: complex, on the smaller side of the kernel.
        value: ``<gradient, kernel>`` afterwards; an infinite one has no gradient, and gives zero.

    Returns:
        Of the shape of ``kernel``, float64.
    """
    chosen = kernel[group].to(torch.float64)
    exponent = torch.frexp(chosen.abs().amax()).exponent
    chosen = scale_by_power_of_two(chosen, -exponent)  # squares of its entries are taken
    value = scale_by_power_of_two(value.nan_to_num(posinf=0.0), -exponent)
    wide = chosen.shape[0] <= chosen.shape[1]
    chosen = chosen if wide else chosen.transpose(0, 1)
    taps = chosen.shape[2:]
    grids = torch.meshgrid(*(torch.arange(t) for t in taps), indexing="ij")
    places = torch.stack(grids, dim=-1).reshape(-1, len(taps)).to(frequency)
    phase = torch.exp(-1j * (places @ frequency))
    symbol = (chosen.flatten(2) * phase).sum(dim=2)
    right = symbol.mH @ left  # norm times the other singular vector
    square = right.abs().square().sum()
    scale = torch.where(square > 0, value / square, 0.0)
    direction = (left.conj()[:, None, None] * right[None, :, None] * phase).real
    direction = scale * direction.reshape(chosen.shape)
    gradient = torch.zeros(kernel.shape, dtype=torch.float64, device=kernel.device)
    gradient[group] = direction if wide else direction.transpose(0, 1)
    return gradient


class Prepared(NamedTuple):
    """Kernels of one shape, ready for a search.

    Attributes:
        kernels: ``(problems, m, n, *taps)``, see `normalized_kernels`; no axis with a single tap.
        owner: ``(problems,)``, which of the kernels each belongs to.
        exponent: ``(layers,)``, to scale back with.
        axes: for each kernel, which of its axes are left.
    """

    kernels: Tensor
    owner: Tensor
    exponent: Tensor
    axes: list[list[int]]


def prepare(kernels: Sequence[Tensor]) -> Prepared:
    """Normalise kernels ``(groups, c_out, c_in, *taps)`` that are alike up to outer zeros."""
    return _together([_without_trivial_axes(kernel) for kernel in kernels])


def _together(members: Sequence[tuple[Tensor, list[int]]]) -> Prepared:
    groups, device = len(members[0][0]), members[0][0].device
    owner = torch.arange(len(members), device=device).repeat_interleave(groups)
    wide = [kernel.to(torch.float64) for kernel, _ in members]
    stacked = wide[0] if len(wide) == 1 else torch.cat(wide)
    normalized, exponent = normalized_kernels(stacked, owner)
    return Prepared(normalized, owner, exponent, [axes for _, axes in members])


def scaled_back(prepared: Prepared, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Brackets ``(layers,)`` of the kernels as they were, from those of the normalised ones."""
    lower = scale_by_power_of_two(lower, prepared.exponent)
    upper = scale_by_power_of_two(upper, prepared.exponent)
    tiny = 2.0 * SMALLEST_NORMAL  # what scaling back may have lost to underflow
    lower = torch.where(lower > tiny, lower, 0.0).clamp_max(torch.finfo(torch.float64).max)
    upper = torch.where(upper > tiny, upper, upper + tiny)
    zero = (prepared.kernels == 0).reshape(len(lower), -1).all(dim=1)
    return lower, torch.where(zero, 0.0, upper)


class _Found(NamedTuple):
    """A bracket, and the singular vector on the smaller side at its peak."""

    bracket: NormBracket
    left: Tensor


def _search(kernels: Sequence[Tensor], tol: float) -> list[_Found]:
    """Search for each kernel's bracket, all of one shape together."""
    if not 1e-6 <= tol <= 1.0:
        raise ValueError(f"expected tol between 1e-6 and 1, got {tol}")
    trimmed = [_without_trivial_axes(kernel.detach()) for kernel in kernels]
    batches: dict[tuple[object, ...], list[int]] = {}
    for index, (kernel, _) in enumerate(trimmed):
        alone = kernel.device.type == "cpu" and min(kernel.shape[1:3]) > _ALONE
        key = (kernel.shape, kernel.device, index if alone else None)
        batches.setdefault(key, []).append(index)
    results: dict[int, _Found] = {}
    for indices in batches.values():
        prepared = _together([trimmed[index] for index in indices])
        found = branch_and_bound(prepared.kernels, prepared.owner, tol, MAX_MATRICES)
        lower, upper = scaled_back(prepared, found.lower, found.upper)
        groups = len(prepared.owner) // len(indices)
        for place, index in enumerate(indices):
            frequency = lower.new_zeros(kernels[index].ndim - 3)
            frequency[prepared.axes[place]] = found.frequency[place]
            bracket = NormBracket(
                lower[place],
                upper[place],
                frequency,
                int(found.problem[place]) - place * groups,
                int(found.matrices[place]),
            )
            results[index] = _Found(bracket, found.left[place])
    return [results[index] for index in range(len(kernels))]


def _without_trivial_axes(kernel: Tensor) -> tuple[Tensor, list[int]]:
    """Drop outer taps that are zero in all groups (a shift), then axes with one tap.

    Returns:
        The kernel, and which of the axes are left.
    """
    check_finite_real(kernel, "weight")
    used = torch.nonzero(kernel.flatten(0, 2).any(dim=0))  # (taps that are not zero, d)
    if len(used):
        first, last = used.amin(dim=0).tolist(), used.amax(dim=0).tolist()
        for axis, (low, high) in enumerate(zip(first, last, strict=True), start=3):
            kernel = kernel.narrow(axis, low, high - low + 1)
    axes = [axis for axis, taps in enumerate(kernel.shape[3:]) if taps > 1]
    return kernel.reshape(*kernel.shape[:3], *(kernel.shape[3 + axis] for axis in axes)), axes
