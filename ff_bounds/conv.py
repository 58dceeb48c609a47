"""Proven upper bound of the norm of a 2-D convolution layer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ff_bounds.fantastic_four import fantastic_four_bound
from ff_bounds.padding import padding_effect
from ff_bounds.rounding import product_bound
from ff_bounds.supremum import supremum_bound
from ff_bounds.unfoldings import Size2d, unit_stride_kernel

METHODS = ("fantastic_four", "supremum")
"""How `conv2d_bound` can bound the norm on the infinite lattice."""


def conv2d_bound(
    weight: Tensor,
    *,
    stride: Size2d = 1,
    padding: Size2d | str = 0,
    dilation: Size2d = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    input_size: tuple[int, int] | None = None,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    r"""Proven upper bound of the spectral norm of a convolution layer's Jacobian.

    Claim: ``||J|| <= conv2d_bound(weight, ...)`` for the stored weights, rounding included, where
    ``J`` is the Jacobian of ``torch.nn.functional.conv2d`` (after `padding_mode`'s padding) with
    respect to its input.

    Let ``sigma*`` be the norm of the convolution on the infinite lattice, which ``method`` bounds.

    * ``zeros``: ``J`` is a submatrix of the infinite operator, so ``||J|| <= sigma*``.
    * ``circular``: the rows of ``J`` are rows of a circulant operator, whose norm is the largest
      ``||K(w)||`` over a grid of frequencies, at most ``sigma*``. Rows that padding beyond
      ``dilation * (taps - 1)`` repeats cost ``sqrt(repeats)``. A stride is used only where it
      divides the input size (see `ff_bounds.padding.wrapped_rows`).
    * ``reflect`` and ``replicate``: ``J`` is a convolution without padding after the padding
      matrix, whose squared norm is the largest number of times that an entry is repeated.

    Args:
        weight: ``(c_out, c_in // groups, h, w)``.
        stride: step of the output grid, per axis.
        padding: amount per axis, or ``"same"`` or ``"valid"``.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``, as in
            ``torch.nn.Conv2d``.
        input_size: ``(height, width)`` of the unpadded input. Matters only for the last three
            modes; ``None`` gives a bound for every size.
        method: how ``sigma*`` is bounded: ``"fantastic_four"`` (four matrices; at most
            ``sqrt(h w)`` too large) or ``"supremum"`` (branch and bound over the frequencies; at
            most ``1 + tol`` too large, see `supremum_bracket`).
        tol: relative gap of ``"supremum"``.

    Returns:
        A float64 scalar on the weight's device, differentiable with respect to ``weight``.

    Raises:
        ValueError: arguments that the layer would refuse, or NaN or infinite weights.

    References:
        S. Singla, S. Feizi, Fantastic Four, ICLR 2021 (``sigma*`` by the four unfoldings).
        H. Sedghi, V. Gupta, P. M. Long, The Singular Values of Convolutional Layers, ICLR 2019
        (circular padding).

    Example:
        >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
        >>> round(conv2d_bound(blur, padding=1).item(), 6)
        1.0
    """
    if method not in METHODS:
        raise ValueError(f"expected method to be one of {', '.join(METHODS)}, got {method!r}")
    if weight.ndim != 4:
        raise ValueError(
            f"expected a weight (c_out, c_in // groups, h, w), got {tuple(weight.shape)}"
        )
    strides, repeats = padding_effect(
        (weight.shape[2], weight.shape[3]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
        input_size=input_size,
    )
    if method == "supremum":
        kernel = unit_stride_kernel(weight, stride=strides, dilation=dilation, groups=groups)
        bound = supremum_bound(kernel, tol)
    else:
        bound = fantastic_four_bound(weight, stride=strides, dilation=dilation, groups=groups)
    if repeats == 1:
        return bound
    gain = math.nextafter(math.sqrt(repeats), math.inf)
    return product_bound(bound, torch.tensor(gain, dtype=bound.dtype, device=bound.device))
