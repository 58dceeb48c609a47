"""The four bounds of Singla & Feizi (ICLR 2021), proven in floating point."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ff_bounds.matrix import check_finite_real, spectral_norm_bound
from ff_bounds.rounding import product_bound
from ff_bounds.unfoldings import Size2d, unfoldings, unit_stride_kernel


class FourBounds(NamedTuple):
    """Four proven upper bounds of one convolution's norm, named after their unfolding."""

    R: Tensor
    S: Tensor
    T: Tensor
    U: Tensor


def fantastic_four_bounds(
    weight: Tensor, *, stride: Size2d = 1, dilation: Size2d = 1, groups: int = 1
) -> FourBounds:
    r"""Bound the norm of a convolution by each of the four unfoldings of its kernel.

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
    return FourBounds(
        *(bounds.amax() for bounds in _bounds_per_group(weight, stride, dilation, groups))
    )


def fantastic_four_bound(
    weight: Tensor, *, stride: Size2d = 1, dilation: Size2d = 1, groups: int = 1
) -> Tensor:
    """Smallest of the four bounds (for each group, then the largest over the groups).

    Claim: an upper bound of ``sigma*``, and at most ``sqrt(h w) sigma*`` up to rounding, since
    ``T T^T`` is the mean of ``K(w) K(w)^H`` over the torus, so that ``||T|| <= sigma*``.
    Arguments, errors and source as in `fantastic_four_bounds`.

    Returns:
        A float64 scalar, differentiable with respect to ``weight`` (a subgradient at ties).

    Example:
        >>> delta = torch.zeros(1, 1, 3, 3)
        >>> delta[0, 0, 1, 1] = 1.0  # the identity, whose norm is 1
        >>> round(fantastic_four_bound(delta).item(), 6)
        3.0
    """
    four = _bounds_per_group(weight, stride, dilation, groups)
    return torch.stack(four).amin(dim=0).amax()


def _bounds_per_group(
    weight: Tensor, stride: Size2d, dilation: Size2d, groups: int
) -> tuple[Tensor, ...]:
    """Four float64 tensors ``(groups,)``."""
    check_finite_real(weight, "weight")
    kernel = unit_stride_kernel(weight, stride=stride, dilation=dilation, groups=groups)
    root = math.sqrt(kernel.shape[-2] * kernel.shape[-1])
    factor = torch.tensor(math.nextafter(root, math.inf), dtype=torch.float64, device=weight.device)
    if kernel.shape[-2:] == (1, 1):  # the four unfoldings are one matrix
        return (spectral_norm_bound(kernel[..., 0, 0]),) * 4
    return tuple(product_bound(factor, spectral_norm_bound(m)) for m in unfoldings(kernel))
