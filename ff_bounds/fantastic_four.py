"""The bounds of Singla & Feizi (ICLR 2021) for one to three axes, proven in floating point."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ff_bounds.matrix import check_finite_real, spectral_norm_bound
from ff_bounds.rounding import product_bound
from ff_bounds.unfoldings import Size, spatial_axes, unfolding, unit_stride_kernel


class FourBounds(NamedTuple):
    """Four proven upper bounds of one convolution's norm, named after their unfolding."""

    R: Tensor
    S: Tensor
    T: Tensor
    U: Tensor


def fantastic_four_bounds(
    weight: Tensor, *, stride: Size = 1, dilation: Size = 1, groups: int = 1
) -> FourBounds:
    r"""Bound the norm of a 2-D convolution by each of the four unfoldings of its kernel.

    Claim: every field is an upper bound of ``sigma* = sup_w ||K(w)||``, the norm of the
    convolution on the infinite lattice, hence of its Jacobian for any input size and any amount
    of zero padding. Each is ``sqrt(h w)`` times the norm of the unfolding.

    Proof: the symbol is ``K(w) = sum_ab K[:, :, a, b] exp(-i(w1 a + w2 b)) = T (p kron I)`` with
    ``p`` the stack of the ``h w`` unit phases, of norm ``sqrt(h w)``; the same from the left gives
    ``U``; the phases of ``a`` on the left and of ``b`` on the right, of norms ``sqrt(h)`` and
    ``sqrt(w)``, give ``R``, and the other way round ``S``.

    Covers strides through the polyphase kernel (``h`` and ``w`` are then its size),
    dilation, groups (the maximum over them) and kernels that are not square. The norm of each
    unfolding is `spectral_norm_bound`, so rounding is included.

    Args:
        weight: ``(c_out, c_in // groups, h, w)``, conventions of ``torch.nn.functional.conv2d``.
        stride: step of the output grid, per axis.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.

    Returns:
        Four float64 scalars, differentiable with respect to ``weight``.

    Raises:
        ValueError: arguments that ``conv2d`` would refuse, or NaN or infinite weights.

    References:
        S. Singla, S. Feizi, Fantastic Four, ICLR 2021, theorem 1.

    Example:
        >>> four = fantastic_four_bounds(torch.ones(1, 1, 3, 3))
        >>> [round(bound.item(), 6) for bound in four]
        [9.0, 9.0, 9.0, 9.0]
    """
    spatial_axes(weight, allowed=(2,))
    kernel = unit_stride_kernel(weight, stride=stride, dilation=dilation, groups=groups)
    bounds = {rows: norms.amax() for rows, norms in _bounds_per_group(kernel).items()}
    a, b = (size > 1 for size in kernel.shape[3:])
    return FourBounds(
        R=bounds[a, False], S=bounds[False, b], T=bounds[False, False], U=bounds[a, b]
    )


def fantastic_four_bound(
    weight: Tensor, *, stride: Size = 1, dilation: Size = 1, groups: int = 1
) -> Tensor:
    """Smallest bound by an unfolding (for each group, then the largest over the groups).

    Claim: an upper bound of ``sigma*``, the norm of the convolution on the infinite lattice, and at
    most ``sqrt(t1 ... td)`` times it up to rounding, for unit-stride kernels of ``t1 x ... x td``
    taps. Kernels have four unfoldings with two axes, two with one axis and eight with three.

    Proof: see `ff_bounds.unfoldings.unfolding` for the bound. Its excess is that of the unfolding
    ``T`` with no axis in the rows, at most: ``T T^T`` is the mean of ``K(w) K(w)^H`` over the
    torus, so that ``||T|| <= sigma*``.

    Args:
        weight: ``(c_out, c_in // groups, *taps)`` with one to three axes of taps.
        stride: step of the output grid, per axis.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.

    Returns:
        A float64 scalar, differentiable with respect to ``weight`` (a subgradient at ties).

    Raises:
        ValueError: arguments that the layer would refuse, or NaN or infinite weights.

    References:
        S. Singla, S. Feizi, Fantastic Four, ICLR 2021, theorem 1, for two axes.

    Example:
        >>> delta = torch.zeros(1, 1, 3, 3)
        >>> delta[0, 0, 1, 1] = 1.0  # the identity, whose norm is 1
        >>> round(fantastic_four_bound(delta).item(), 6)
        3.0
    """
    return unfoldings_bound(
        unit_stride_kernel(weight, stride=stride, dilation=dilation, groups=groups)
    )


def unfoldings_bound(kernel: Tensor) -> Tensor:
    """`fantastic_four_bound` of a unit-stride kernel ``(groups, c_out, c_in, *taps)``."""
    return torch.stack(list(_bounds_per_group(kernel).values())).amin(dim=0).amax()


def _bounds_per_group(kernel: Tensor) -> dict[tuple[bool, ...], Tensor]:
    """Float64 ``(groups,)`` for each unfolding, by which of the axes are in its rows.

    An axis with a single tap makes no difference, and is left in the columns.
    """
    check_finite_real(kernel, "weight")
    taps = kernel.shape[3:]
    root = math.nextafter(math.sqrt(math.prod(taps)), math.inf)
    factor = torch.tensor(root, dtype=torch.float64, device=kernel.device)
    bounds: dict[tuple[bool, ...], Tensor] = {}
    for in_rows in itertools.product(*((False, True) if size > 1 else (False,) for size in taps)):
        norms = spectral_norm_bound(unfolding(kernel, in_rows))
        bounds[in_rows] = norms if math.prod(taps) == 1 else product_bound(factor, norms)
    return bounds
