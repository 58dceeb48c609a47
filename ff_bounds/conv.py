"""Proven upper bounds of the norms of convolution layers with one, two or three spatial axes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ff_bounds.circular import circular_bound, circular_kernel
from ff_bounds.fantastic_four import unfoldings_bound
from ff_bounds.frequency_grid import gram_iteration_supremum_bound
from ff_bounds.padding import padded_bound, padding_effect
from ff_bounds.supremum import supremum_bound, supremum_bracket_and_bound
from ff_bounds.tensor_norm import tensor_norm_bound
from ff_bounds.unfoldings import Size, per_axis, spatial_axes, unit_stride_kernel
from ff_bounds.zero_padded import TooLarge, zero_padded_bound

METHODS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "fantastic_four": lambda kernel, tol: unfoldings_bound(kernel),
    "tensor_norm": lambda kernel, tol: tensor_norm_bound(kernel),
    "gram_iteration": lambda kernel, tol: gram_iteration_supremum_bound(kernel),
    "supremum": supremum_bound,
    "best": lambda kernel, tol: _best_bound(kernel, tol),
}
"""Bounds of the norm on the infinite lattice, from a unit-stride kernel and a tolerance."""


def conv1d_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    input_size: Size | None = None,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    """`conv_bound` of a layer with one spatial axis: ``weight`` is ``(c_out, c_in // groups, t)``.

    Example:
        >>> difference = torch.tensor([[[1.0, -1.0]]])
        >>> round(conv1d_bound(difference, padding=1).item(), 6)
        2.0
    """
    spatial_axes(weight, allowed=(1,))
    return conv_bound(
        weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        input_size=input_size,
        method=method,
        tol=tol,
    )


def conv2d_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    input_size: Size | None = None,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    """`conv_bound` of a layer with two axes: ``weight`` is ``(c_out, c_in // groups, h, w)``.

    Example:
        >>> blur = torch.full((1, 1, 3, 3), 1 / 9)
        >>> round(conv2d_bound(blur, padding=1).item(), 6)
        1.0
    """
    spatial_axes(weight, allowed=(2,))
    return conv_bound(
        weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        input_size=input_size,
        method=method,
        tol=tol,
    )


def conv3d_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    input_size: Size | None = None,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    """`conv_bound` of a layer with three axes: ``weight`` is ``(c_out, c_in // groups, t, h, w)``.

    Example:
        >>> blur = torch.full((1, 1, 2, 2, 2), 1 / 8)
        >>> round(conv3d_bound(blur, stride=2).item(), 6)  # a mean of 8: 1 / sqrt(8)
        0.353553
    """
    spatial_axes(weight, allowed=(3,))
    return conv_bound(
        weight,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=padding_mode,
        input_size=input_size,
        method=method,
        tol=tol,
    )


def conv_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    input_size: Size | None = None,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    r"""Proven upper bound of the spectral norm of a convolution layer's Jacobian.

    Claim: ``||J|| <= conv_bound(weight, ...)`` for the stored weights, rounding included, where
    ``J`` is the Jacobian of ``torch.nn.functional.conv1d``, ``conv2d`` or ``conv3d`` (after
    `padding_mode`'s padding) with respect to its input. The number of spatial axes is that of the
    weight.

    Let ``sigma*`` be the norm of the convolution on the infinite lattice, which ``method`` bounds.

    * ``zeros``: ``J`` is a submatrix of the infinite operator, so ``||J|| <= sigma*``.
    * ``circular``: the rows of ``J`` are rows of a circulant operator, whose norm is the largest
      ``||K(w)||`` over a grid of frequencies, at most ``sigma*``. Rows that padding beyond
      ``dilation * (taps - 1)`` repeats cost ``sqrt(repeats)``. A stride is used only where it
      divides the input size (see `ff_bounds.padding.wrapped_rows`).
    * ``reflect`` and ``replicate``: ``J`` is a convolution without padding after the padding
      matrix, whose squared norm is the largest number of times that an entry is repeated.

    Args:
        weight: ``(c_out, c_in // groups, *taps)`` with one to three axes of taps.
        stride: step of the output grid, per axis.
        padding: amount per axis, or ``"same"`` or ``"valid"``.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.
        padding_mode: ``"zeros"``, ``"circular"``, ``"reflect"`` or ``"replicate"``, as in
            ``torch.nn.Conv2d``.
        input_size: length of each axis of the unpadded input, ``(height, width)`` for two. Matters
            only for the last three modes and for some methods; ``None`` gives a bound for every
            size.
        method: how ``sigma*`` is bounded, see `lattice_bound`; or, for a known input size,
            ``"circular"`` with circular padding: the norm on the grid of that input, to 1e-6
            (`circular_bracket`), and ``"zero_padded"`` with zeros: the norm on that input
            (`zero_padded_bound`). ``"best"`` takes these where they apply.
        tol: relative gap of ``"supremum"`` and ``"best"``.

    Returns:
        A float64 scalar on the weight's device, differentiable with respect to ``weight``.

    Raises:
        ValueError: arguments that the layer would refuse, or NaN or infinite weights.

    References:
        S. Singla, S. Feizi, Fantastic Four, ICLR 2021 (``sigma*`` by the four unfoldings).
        H. Sedghi, V. Gupta, P. M. Long, The Singular Values of Convolutional Layers, ICLR 2019
        (circular padding).

    Example:
        >>> shift = torch.tensor([[[0.0, 0.0, 1.0]]])
        >>> round(conv_bound(shift, padding=1, method="supremum").item(), 2)
        1.0
        >>> repeated = conv_bound(shift, padding=1, padding_mode="replicate", method="supremum")
        >>> round(repeated.item(), 2)  # an input of one entry is seen three times
        1.73
    """
    spatial_axes(weight)
    strides, repeats = padding_effect(
        tuple(weight.shape[2:]),
        stride=stride,
        padding=padding,
        dilation=dilation,
        padding_mode=padding_mode,
        input_size=input_size,
    )
    pads_zeros = padding_mode == "zeros" and input_size is not None
    on_input = partial(
        zero_padded_bound,
        weight,
        stride=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        input_size=input_size or 1,
    )
    wraps = padding_mode == "circular" and method in ("circular", "best")
    if wraps and input_size is not None:
        kernel, grid = circular_kernel(
            weight, input_size, stride=strides, dilation=dilation, groups=groups
        )
        bound = circular_bound(kernel, grid)
        sizes = per_axis(input_size, "input_size", 1, weight.ndim - 2)
        if method == "best" and any(n % step for n, step in zip(sizes, strides, strict=True)):
            lattice = lattice_bound(  # the grid of such a layer knows nothing of its stride
                weight, stride=strides, dilation=dilation, groups=groups, method=method, tol=tol
            )
            bound = torch.minimum(bound, lattice)
    elif method == "circular":
        raise ValueError("method='circular' needs padding_mode='circular' and an input_size")
    elif method == "zero_padded":
        if not pads_zeros:
            raise ValueError("method='zero_padded' needs padding_mode='zeros' and an input_size")
        bound = on_input()
    else:
        bound = lattice_bound(
            weight, stride=strides, dilation=dilation, groups=groups, method=method, tol=tol
        )
        if method == "best" and pads_zeros and weight.ndim < 5:
            with contextlib.suppress(TooLarge):
                bound = torch.minimum(bound, on_input())
    return padded_bound(bound, repeats)


def lattice_bound(
    weight: Tensor, *, stride: Size, dilation: Size, groups: int, method: str, tol: float
) -> Tensor:
    """Proven upper bound of ``sigma*``, the norm of a convolution on the infinite lattice.

    Each ``method`` gives a proven bound, rounding included, and a gradient. With ``T = t1 ... td``
    taps and ``m`` the smaller number of channels:

    * ``"fantastic_four"``: the smallest of ``2**d`` matrices, see `fantastic_four_bound`; at most
      ``sqrt(T)`` too large.
    * ``"tensor_norm"``: see `tensor_norm_bound`; rarely above the former, at most
      ``1.001 sqrt(T)`` too large where its own search ends.
    * ``"gram_iteration"``: see `gram_iteration_supremum_bound`; a grid of frequencies and 8
      squarings: at most ``1.005**d m**(1 / 512)`` too large.
    * ``"supremum"``: branch and bound, see `supremum_bracket`; at most ``1 + tol`` too large, and
      the quickest of the last three.
    * ``"best"``: ``"supremum"``, and where a flat symbol made that settle for a larger gap, the
      smallest of it, ``"fantastic_four"`` and ``"tensor_norm"``.

    The other arguments are those of `conv_bound`.
    """
    if method not in METHODS:
        known = ", ".join([*METHODS, "circular", "zero_padded"])
        raise ValueError(f"expected method to be one of {known}, got {method!r}")
    kernel = unit_stride_kernel(weight, stride=stride, dilation=dilation, groups=groups)
    return METHODS[method](kernel, tol)


def _best_bound(kernel: Tensor, tol: float) -> Tensor:
    bracket, bound = supremum_bracket_and_bound(kernel, tol)
    if bracket.upper <= (1.0 + 2.0 * tol) * bracket.lower:
        return bound
    others = (bound, unfoldings_bound(kernel), tensor_norm_bound(kernel))
    return torch.stack(others).amin()
