"""Dense, slow and independent: what the bounds are checked against, for small sizes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ff_bounds.padding import padding_amounts
from ff_bounds.unfoldings import Size, per_axis

_CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv_matrix(
    weight: Tensor,
    input_size: Size,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Jacobian of a convolution layer, column by column, from torch's convolution itself.

    Args:
        weight: ``(c_out, c_in // groups, *taps)`` with one to three axes of taps.
        input_size: length of each axis of the unpadded input.
        stride: step of the output grid, per axis.
        padding: amount per axis, or ``"same"`` or ``"valid"``.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.
        padding_mode: as in ``torch.nn.Conv2d``.

    Returns:
        ``(c_out * outputs, c_in * inputs)`` float64, for the numbers of places of the output and
        of the input.

    Example:
        >>> conv_matrix(torch.ones(1, 1, 2), 3, padding=1).tolist()
        [[1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]
    """
    weight = weight.detach().to(torch.float64)
    axes = weight.ndim - 2
    strides, dilations = (
        per_axis(stride, "stride", 1, axes),
        per_axis(dilation, "dilation", 1, axes),
    )
    amounts = padding_amounts(padding, tuple(weight.shape[2:]), strides, dilations)
    sides = [amount for pair in reversed(amounts) for amount in pair]  # last axis first, as in pad
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = F.pad(_basis(weight, weight.shape[1] * groups, input_size), sides, mode=mode)
    columns = _CONVOLUTIONS[axes](padded, weight, stride=strides, dilation=dilations, groups=groups)
    return columns.flatten(1).T


conv2d_matrix = conv_matrix
"""`conv_matrix`, under the name that goes with `conv2d_bound`."""


def conv_transpose_matrix(
    weight: Tensor,
    input_size: Size,
    *,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
) -> Tensor:
    """Jacobian of a transposed convolution layer, column by column, from torch's own.

    Args:
        weight: ``(c_in, c_out // groups, *taps)`` with one to three axes of taps.
        input_size: length of each axis of the input.
        stride: spacing of the inputs in the output, per axis.
        padding: places dropped at both ends of the output, per axis.
        output_padding: places added behind the output, per axis.
        groups: number of channel groups.
        dilation: spacing of the taps, per axis.

    Returns:
        ``(c_out * outputs, c_in * inputs)`` float64.

    Example:
        >>> conv_transpose_matrix(torch.tensor([[[1.0, 2.0]]]), 2).tolist()
        [[1.0, 0.0], [2.0, 1.0], [0.0, 2.0]]
    """
    weight = weight.detach().to(torch.float64)
    columns = _TRANSPOSED[weight.ndim - 2](
        _basis(weight, weight.shape[0], input_size),
        weight,
        stride=stride,
        padding=padding,
        output_padding=output_padding,
        groups=groups,
        dilation=dilation,
    )
    return columns.flatten(1).T


def _basis(weight: Tensor, channels: int, input_size: Size) -> Tensor:
    """Return all unit vectors ``(channels * places, channels, *input_size)``."""
    sizes = per_axis(input_size, "input_size", 1, weight.ndim - 2)
    count = channels * math.prod(sizes)
    identity = torch.eye(count, dtype=weight.dtype, device=weight.device)
    return identity.reshape(count, channels, *sizes)


def spectral_norm(matrix: Tensor) -> Tensor:
    """Largest singular value by LAPACK's SVD in float64: accurate, not a proven bound."""
    norm: Tensor = torch.linalg.matrix_norm(matrix.detach().to(torch.float64), ord=2)
    return norm
