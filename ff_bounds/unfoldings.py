"""A convolution's kernel as the matrices that its norm is bounded by."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

Size = int | tuple[int, ...]
"""A hyperparameter of a layer: one number for all spatial axes, or a tuple with one for each."""

_COUNTS = {1: "one integer", 2: "one or two integers", 3: "one or three integers"}


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
    return Unfoldings(
        R=unfolding(kernel, (True, False)),
        S=unfolding(kernel, (False, True)),
        T=unfolding(kernel, (False, False)),
        U=unfolding(kernel, (True, True)),
    )


def unfolding(kernel: Tensor, in_rows: tuple[bool, ...]) -> Tensor:
    r"""Matrix of a kernel with ``d`` spatial axes, some of which go to its rows.

    Claim: ``sup_w ||K(w)|| <= sqrt(t1 ... td) ||A||`` for each of the ``2**d`` unfoldings ``A``,
    where ``K(w) = sum_a kernel[:, :, a] exp(-i <w, a>)`` sums over the ``t1 x ... x td`` taps.

    Proof: the phase of a tap is a product with one factor for each axis. Let ``p`` be the vector of
    the products over the axes in the rows, for all places ``r`` on these axes, and ``q`` that of
    the axes in the columns. Entry ``(o, i)`` of the symbol is then the sum of
    ``p_r A[(o, r), (i, c)] q_c`` over ``r`` and ``c``, that is

        ``K(w) = (I kron p)^T A (I kron q)``.

    The entries of ``p`` and ``q`` have modulus one, so the outer factors have norms ``||p||`` and
    ``||q||``, the square roots of the numbers of places; together ``sqrt(t1 ... td)``. Nothing is
    asked of ``d``.

    Args:
        kernel: ``(..., c_out, c_in, t1, ..., td)``.
        in_rows: for each spatial axis whether it goes to the rows, so ``d = len(in_rows)``.

    Returns:
        ``(..., m, n)``: rows ``(o, r)``, columns ``(i, c)``, the axes in their order in the kernel.

    References:
        S. Singla, S. Feizi, Fantastic Four, ICLR 2021, theorem 1, for two axes.

    Example:
        >>> import torch
        >>> tuple(unfolding(torch.zeros(2, 3, 5, 7, 11), (True, False, True)).shape)
        (110, 21)
    """
    batch = kernel.ndim - 2 - len(in_rows)
    rows = [batch, *(batch + 2 + axis for axis, kept in enumerate(in_rows) if kept)]
    columns = [batch + 1, *(batch + 2 + axis for axis, kept in enumerate(in_rows) if not kept)]
    tensor = kernel.permute(*range(batch), *rows, *columns)
    return tensor.flatten(batch + len(rows)).flatten(batch, batch + len(rows) - 1)


def per_axis(value: Size, name: str, minimum: int, axes: int) -> tuple[int, ...]:
    """Return ``value`` as a tuple with one integer per axis, each at least ``minimum``."""
    numbers = (value,) * axes if isinstance(value, int) else value
    if (
        not isinstance(numbers, (tuple, list))
        or len(numbers) != axes
        or not all(isinstance(n, int) and n >= minimum for n in numbers)
    ):
        raise ValueError(f"expected {name} as {_COUNTS[axes]} >= {minimum}, got {value!r}")
    return tuple(numbers)


def spatial_axes(weight: Tensor, allowed: tuple[int, ...] = (1, 2, 3)) -> int:
    """Return the number of spatial axes of a convolution's weight, if it is an ``allowed`` one."""
    axes = weight.ndim - 2
    if axes not in allowed or weight.numel() == 0:
        raise ValueError(
            "expected a non-empty weight with two axes of channels and "
            f"{' or '.join(map(str, allowed))} of taps, got {tuple(weight.shape)}"
        )
    return axes


def unit_stride_kernel(
    weight: Tensor, *, stride: Size = 1, dilation: Size = 1, groups: int = 1
) -> Tensor:
    r"""Kernels of unit stride and dilation whose largest norm is that of the given convolution.

    On the infinite lattice a strided convolution is an unstrided one of the *polyphase* kernel,
    whose input channels have one phase per axis, ``(i, p, q)`` for two axes, and taps
    ``weight[:, i, s1*a + p, s2*b + q]``: the phases of the input are orthogonal, so stacking them
    preserves every norm.

    Dilation ``d`` needs no zeros between the taps. Output ``n`` of an axis with stride ``s`` reads
    inputs ``s n + d a``, all multiples of ``g = gcd(s, d)``, so both may be divided by ``g``. With
    coprime ``s`` and ``d``, write a tap as ``a = s b + r``: it reads phase ``d r mod s`` at
    ``n + d b + floor(d r / s)``. The block of that phase in the symbol is a phase factor times
    the block of ``r`` without dilation, at ``d`` times the frequency, and ``r -> d r mod s``
    permutes the phases. So the supremum over the frequencies is that without dilation.

    Groups act on separate channels, so the norm of the whole is the *maximum* over them.

    Args:
        weight: ``(c_out, c_in // groups, *taps)`` with one to three axes of taps, as in
            ``torch.nn.functional.conv1d``, ``conv2d`` and ``conv3d``.
        stride: step of the output grid, per axis.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.

    Returns:
        ``(groups, c_out // groups, s1*...*sd * c_in // groups, ceil(t1/s1), ..., ceil(td/sd))``
        with the strides divided by their greatest common divisors with the dilations: ``weight``'s
        entries rearranged, and filled up with zeros.

    Raises:
        ValueError: shapes or hyperparameters that the layer would refuse.

    Example:
        >>> import torch
        >>> tuple(unit_stride_kernel(torch.zeros(4, 3, 5, 5), stride=2).shape)
        (1, 4, 12, 3, 3)
    """
    axes = spatial_axes(weight)
    if groups < 1 or weight.shape[0] % groups:
        raise ValueError(f"expected groups to divide c_out={weight.shape[0]}, got {groups}")
    strides = per_axis(stride, "stride", 1, axes)
    dilations = per_axis(dilation, "dilation", 1, axes)

    kernel = weight.reshape(groups, -1, *weight.shape[1:])
    for axis, (step, spacing) in enumerate(zip(strides, dilations, strict=True)):
        step //= math.gcd(step, spacing)
        if step > 1:
            kernel = _split_phases(kernel, 3 + axis, step)
    return kernel


def _split_phases(kernel: Tensor, axis: int, step: int) -> Tensor:
    """Move the ``step`` phases of a spatial ``axis`` (3, 4 or 5) into the input channels."""
    size = math.ceil(kernel.shape[axis] / step)
    missing = size * step - kernel.shape[axis]
    padded = F.pad(kernel, (0, 0) * (kernel.ndim - 1 - axis) + (0, missing))
    phases = padded.reshape(*kernel.shape[:axis], size, step, *kernel.shape[axis + 1 :])
    return phases.movedim(axis + 1, 3).flatten(2, 3)
