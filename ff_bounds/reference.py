"""Dense, slow and independent: what the bounds are checked against, for small sizes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ff_bounds.padding import padding_amounts
from ff_bounds.unfoldings import Size2d, pair


def conv2d_matrix(
    weight: Tensor,
    input_size: tuple[int, int],
    *,
    stride: Size2d = 1,
    padding: Size2d | str = 0,
    dilation: Size2d = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Tensor:
    """Jacobian of a convolution layer, column by column, from ``conv2d`` itself.

    Args:
        weight: ``(c_out, c_in // groups, h, w)``.
        input_size: ``(height, width)`` of the unpadded input.
        stride: step of the output grid, per axis.
        padding: amount per axis, or ``"same"`` or ``"valid"``.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.
        padding_mode: as in ``torch.nn.Conv2d``.

    Returns:
        ``(c_out * out_height * out_width, c_in * height * width)`` float64.

    Example:
        >>> conv2d_matrix(torch.ones(1, 1, 1, 2), (1, 3)).tolist()
        [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    """
    weight = weight.detach().to(torch.float64)
    strides, dilations = pair(stride, "stride", 1), pair(dilation, "dilation", 1)
    (top, bottom), (left, right) = padding_amounts(
        padding, (weight.shape[2], weight.shape[3]), strides, dilations
    )
    c_in = weight.shape[1] * groups
    count = c_in * input_size[0] * input_size[1]
    basis = torch.eye(count, dtype=torch.float64, device=weight.device)
    mode = "constant" if padding_mode == "zeros" else padding_mode
    padded = F.pad(basis.reshape(count, c_in, *input_size), (left, right, top, bottom), mode=mode)
    columns = F.conv2d(padded, weight, stride=strides, dilation=dilations, groups=groups)
    return columns.reshape(count, -1).T


def spectral_norm(matrix: Tensor) -> Tensor:
    """Largest singular value by LAPACK's SVD in float64: accurate, not a proven bound."""
    norm: Tensor = torch.linalg.matrix_norm(matrix.detach().to(torch.float64), ord=2)
    return norm
