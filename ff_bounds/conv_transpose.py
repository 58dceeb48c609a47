"""Proven upper bounds of the norms of transposed convolution layers."""

from __future__ import annotations

from torch import Tensor

from ff_bounds.conv import lattice_bound
from ff_bounds.unfoldings import Size, per_axis, spatial_axes


def conv_transpose1d_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    """`conv_transpose_bound` with one axis: ``weight`` is ``(c_in, c_out // groups, t)``.

    Example:
        >>> import torch
        >>> double = torch.ones(1, 1, 2)  # every entry twice
        >>> round(conv_transpose1d_bound(double, stride=2).item(), 6)
        1.414214
    """
    spatial_axes(weight, allowed=(1,))
    return conv_transpose_bound(
        weight,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=groups,
        dilation=dilation,
        method=method,
        tol=tol,
    )


def conv_transpose2d_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    """`conv_transpose_bound` with two axes: ``weight`` is ``(c_in, c_out // groups, h, w)``.

    Example:
        >>> import torch
        >>> double = torch.ones(1, 1, 2, 2)  # every pixel four times
        >>> round(conv_transpose2d_bound(double, stride=2).item(), 6)
        2.0
    """
    spatial_axes(weight, allowed=(2,))
    return conv_transpose_bound(
        weight,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=groups,
        dilation=dilation,
        method=method,
        tol=tol,
    )


def conv_transpose3d_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    """`conv_transpose_bound` with three axes: ``weight`` is ``(c_in, c_out // groups, t, h, w)``.

    Example:
        >>> import torch
        >>> double = torch.ones(1, 1, 2, 2, 2)  # every entry eight times
        >>> round(conv_transpose3d_bound(double, stride=2).item(), 6)
        2.828427
    """
    spatial_axes(weight, allowed=(3,))
    return conv_transpose_bound(
        weight,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=groups,
        dilation=dilation,
        method=method,
        tol=tol,
    )


def conv_transpose_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    method: str = "fantastic_four",
    tol: float = 1e-3,
) -> Tensor:
    r"""Proven upper bound of the spectral norm of a transposed convolution's Jacobian.

    Claim: ``||J|| <= conv_transpose_bound(weight, ...)`` for the stored weights and every input
    size, rounding included, where ``J`` is the Jacobian of ``conv_transpose1d``, ``2d`` or ``3d``
    of ``torch.nn.functional`` with respect to its input.

    Proof, with one index for all axes: with stride ``s``, dilation ``d`` and padding ``p`` the
    layer takes ``x`` to

        ``y[o, n - p] = sum of weight[i, o, a] x[i, m] over all i, m, a with s m + d a = n``

    for ``0 <= m < N`` and ``0 <= n - p < (N - 1) s - 2p + d (taps - 1) + output_padding + 1``.
    Without these two ranges, this is an operator on the infinite lattice, and ``J`` is the
    submatrix of it with the columns and the rows in these ranges. So ``padding`` only drops rows,
    ``output_padding`` only adds rows (of zeros, where no input reaches), and both leave
    ``||J||`` below the norm of the infinite operator. That operator is the adjoint of

        ``z[i, m] = sum_{o, a} weight[i, o, a] y[o, s m + d a]``,

    the convolution with stride ``s`` and dilation ``d`` whose weight is the same tensor, its first
    axis read as the output channels. Adjoints have equal norms, so ``||J||`` is at most the
    ``sigma*`` of that convolution. With groups, ``i`` sums over the channels of its own group:
    torch stores the groups of inputs one after the other on the first axis, and the second axis
    counts the outputs within a group. This is also how a convolution with as many groups stores
    its outputs and its inputs, so the tensor need not be rearranged.

    Args:
        weight: ``(c_in, c_out // groups, *taps)`` with one to three axes of taps.
        stride: spacing of the inputs in the output, per axis.
        padding: places dropped at both ends of the output, per axis.
        output_padding: places added behind the output, per axis. These two are only checked: the
            bound is that for all paddings.
        groups: number of channel groups.
        dilation: spacing of the taps, per axis.
        method: as in `conv_bound`.
        tol: relative gap of ``"supremum"``.

    Returns:
        A float64 scalar on the weight's device, differentiable with respect to ``weight``.

    Raises:
        ValueError: arguments that the layer would refuse, or NaN or infinite weights.

    References:
        V. Dumoulin, F. Visin, A guide to convolution arithmetic for deep learning, 2016, chapter 4
        (the transposed convolution as the adjoint).

    Example:
        >>> import torch
        >>> average = torch.full((1, 1, 3), 1 / 3)
        >>> round(conv_transpose_bound(average, padding=1).item(), 6)
        1.0
    """
    axes = spatial_axes(weight)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"expected groups to divide c_in={weight.shape[0]}, got {groups}")
    strides = per_axis(stride, "stride", 1, axes)
    dilations = per_axis(dilation, "dilation", 1, axes)
    per_axis(padding, "padding", 0, axes)
    added = per_axis(output_padding, "output_padding", 0, axes)
    if any(a >= max(s, d) for a, s, d in zip(added, strides, dilations, strict=True)):
        raise ValueError(
            "expected output_padding below the stride or the dilation of each axis, got "
            f"output_padding {added}, stride {strides} and dilation {dilations}"
        )
    return lattice_bound(
        weight, stride=strides, dilation=dilations, groups=groups, method=method, tol=tol
    )
