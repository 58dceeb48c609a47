"""A convolution's kernel as the matrices that its norm is bounded by."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

Size2d = int | tuple[int, int]
"""A hyperparameter of a 2-D layer: one number for both axes, or ``(vertical, horizontal)``."""


class Unfoldings(NamedTuple):
    """The four matrices of Singla & Feizi (2021) of kernels ``(..., c_out, c_in, h, w)``.

    Attributes:
        R: ``(..., c_out*h, c_in*w)``, rows ``(o, a)``, columns ``(i, b)``.
        S: ``(..., c_out*w, c_in*h)``, rows ``(o, b)``, columns ``(i, a)``.
        T: ``(..., c_out, c_in*h*w)``, rows ``o``, columns ``(i, a, b)``.
        U: ``(..., c_out*h*w, c_in)``, rows ``(o, a, b)``, columns ``i``.
    """

    R: Tensor
    S: Tensor
    T: Tensor
    U: Tensor


def unfoldings(kernel: Tensor) -> Unfoldings:
    """Return the four unfoldings of kernels ``(..., c_out, c_in, h, w)``.

    References:
        S. Singla, S. Feizi, Fantastic Four: Differentiable Bounds on Singular Values of
        Convolution Layers, ICLR 2021, theorem 1.

    Example:
        >>> import torch
        >>> [tuple(m.shape) for m in unfoldings(torch.zeros(2, 3, 5, 7))]
        [(10, 21), (14, 15), (2, 105), (70, 3)]
    """
    *batch, c_out, c_in, height, width = kernel.shape
    return Unfoldings(
        R=kernel.transpose(-3, -2).reshape(*batch, c_out * height, c_in * width),
        S=kernel.movedim(-1, -3).reshape(*batch, c_out * width, c_in * height),
        T=kernel.reshape(*batch, c_out, c_in * height * width),
        U=kernel.movedim(-3, -1).reshape(*batch, c_out * height * width, c_in),
    )


def pair(value: Size2d, name: str, minimum: int) -> tuple[int, int]:
    """Return ``value`` as ``(vertical, horizontal)``; both at least ``minimum``."""
    numbers = (value, value) if isinstance(value, int) else tuple(value)
    if len(numbers) != 2 or not all(isinstance(n, int) and n >= minimum for n in numbers):
        raise ValueError(f"expected {name} as one or two integers >= {minimum}, got {value!r}")
    return numbers[0], numbers[1]


def unit_stride_kernel(
    weight: Tensor, *, stride: Size2d = 1, dilation: Size2d = 1, groups: int = 1
) -> Tensor:
    r"""Kernels of unit stride and dilation whose largest norm is that of the given convolution.

    On the infinite lattice a strided convolution is an unstrided one of the *polyphase* kernel,
    whose input channels are ``(i, p, q)`` with taps ``weight[:, i, s1*a + p, s2*b + q]``: the
    phases of the input are orthogonal, so stacking them preserves every norm.

    Dilation ``d`` needs no zeros between the taps. Output ``n`` of an axis with stride ``s`` reads
    inputs ``s n + d a``, all multiples of ``g = gcd(s, d)``, so both may be divided by ``g``. With
    coprime ``s`` and ``d``, write a tap as ``a = s b + r``: it reads phase ``d r mod s`` at
    ``n + d b + floor(d r / s)``. The block of that phase in the symbol is a phase factor times
    the block of ``r`` without dilation, at ``d`` times the frequency, and ``r -> d r mod s``
    permutes the phases. So the supremum over the frequencies is that without dilation.

    Groups act on separate channels, so the norm of the whole is the *maximum* over them.

    Args:
        weight: ``(c_out, c_in // groups, h, w)``, as in ``torch.nn.functional.conv2d``.
        stride: step of the output grid, per axis.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.

    Returns:
        ``(groups, c_out // groups, s1*s2*c_in // groups, ceil(h/s1), ceil(w/s2))`` with ``s1`` and
        ``s2`` divided by the greatest common divisor with the dilation: ``weight``'s entries
        rearranged, and filled up with zeros.

    Raises:
        ValueError: shapes or hyperparameters that ``conv2d`` would refuse.
    """
    if weight.ndim != 4 or weight.numel() == 0:
        raise ValueError(
            f"expected a non-empty weight (c_out, c_in // groups, h, w), got {tuple(weight.shape)}"
        )
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"expected groups to divide c_out={weight.shape[0]}, got {groups}")
    strides = pair(stride, "stride", 1)
    dilations = pair(dilation, "dilation", 1)

    kernel = weight.reshape(groups, -1, *weight.shape[1:])
    for axis, (step, spacing) in enumerate(zip(strides, dilations, strict=True)):
        step //= math.gcd(step, spacing)
        if step > 1:
            kernel = _split_phases(kernel, 3 + axis, step)
    return kernel


def _split_phases(kernel: Tensor, axis: int, step: int) -> Tensor:
    """Move the ``step`` phases of a spatial ``axis`` (3 or 4) into the input channels."""
    size = math.ceil(kernel.shape[axis] / step)
    missing = size * step - kernel.shape[axis]
    padded = F.pad(kernel, (0, 0, 0, missing) if axis == 3 else (0, missing))
    phases = padded.reshape(*kernel.shape[:axis], size, step, *kernel.shape[axis + 1 :])
    return phases.movedim(axis + 1, 3).flatten(2, 3)
