"""How much padding can raise the norm of a convolution."""

from __future__ import annotations

import math

from torch import Tensor

from ff_bounds.rounding import product_bound
from ff_bounds.unfoldings import Size, per_axis

PADDING_MODES = ("zeros", "circular", "reflect", "replicate")

Amounts = tuple[tuple[int, int], ...]
"""Padding ``(before, after)`` of each axis."""


def padding_amounts(
    padding: Size | str,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Amounts:
    """Resolve a layer's ``padding`` (numbers, ``"same"`` or ``"valid"``) to amounts per side."""
    if padding == "valid":
        return ((0, 0),) * len(kernel_size)
    if padding == "same":
        if any(step != 1 for step in stride):
            raise ValueError(f"expected stride 1 with padding='same', got {stride}")
        total = [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]
        return tuple((t // 2, t - t // 2) for t in total)
    if isinstance(padding, str):
        raise ValueError(f"expected padding as integers, 'same' or 'valid', got {padding!r}")
    return tuple((p, p) for p in per_axis(padding, "padding", 0, len(kernel_size)))


def duplication(mode: str, before: int, after: int, size: int | None) -> int:
    """Largest number of times that padding one axis repeats an input entry.

    The padding matrix ``P`` has a single 1 in each row, so ``P^T P`` is the diagonal matrix of
    these counts and ``||P||^2`` is their maximum.

    Args:
        mode: ``"reflect"`` or ``"replicate"``.
        before: entries put in front.
        after: entries put behind.
        size: length of the axis; ``None`` for the worst case over all lengths that the mode
            admits.

    Raises:
        ValueError: a reflection that is not shorter than the axis.
    """
    if mode == "replicate":
        if size is None or size == 1:
            return 1 + before + after
        return 1 + max(before, after)
    if size is None:  # an entry is repeated at most once from either side
        return 1 + (before > 0) + (after > 0)
    if max(before, after) >= size:
        raise ValueError(
            f"expected reflect padding below the input size {size}, got {(before, after)}"
        )
    counts = [1] * size
    for distance in range(1, before + 1):
        counts[distance] += 1
    for distance in range(1, after + 1):
        counts[size - 1 - distance] += 1
    return max(counts)


def wrapped_rows(
    before: int, after: int, reach: int, stride: int, size: int | None
) -> tuple[int, int]:
    """How a convolution with circular padding along one axis sits in a circulant one.

    With unit stride the rows of the Jacobian are rows of the circulant operator on ``size``
    points, each taken at most ``ceil(outputs / size)`` times; that operator's norm is at most
    ``sigma*``. A strided layer is a strided *circulant* operator, whose norm the polyphase kernel
    bounds, only where the stride divides the size and no row comes twice; elsewhere outputs at
    the seam are closer together than the stride, and the stride has to be ignored.

    Args:
        before: entries wrapped in front.
        after: entries wrapped behind.
        reach: ``dilation * (taps - 1)``.
        stride: step of the output grid.
        size: length of the axis; ``None`` for the worst case over all lengths.

    Returns:
        ``(stride to bound with, largest number of times that a row is taken)``.

    Raises:
        ValueError: more padding than the axis is long.
    """
    if before == after == 0:  # nothing wraps: a convolution without padding
        return stride, 1
    surplus = before + after - reach  # outputs at unit stride, less the length of the axis
    if size is None:
        shortest = max(before, after, 1)
        repeats = 1 + math.ceil(surplus / shortest) if surplus > 0 else 1
        return 1, repeats
    if max(before, after) > size:
        raise ValueError(
            f"expected circular padding up to the input size {size}, got {(before, after)}"
        )
    outputs = (size + surplus - 1) // stride + 1
    if size % stride == 0 and outputs * stride <= size:
        return stride, 1
    return 1, max(1, math.ceil((size + surplus) / size))


def padding_effect(
    kernel_size: tuple[int, ...],
    *,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    padding_mode: str,
    input_size: Size | None,
) -> tuple[tuple[int, ...], int]:
    """What padding does to the norm of a convolution layer, with any number of spatial axes.

    Claim: the layer's Jacobian has norm at most ``sqrt(repeats) sigma*``, with ``sigma*`` the norm,
    on the infinite lattice, of the convolution with the returned stride.

    Padding acts on each axis by itself. The padding matrix is the Kronecker product of those of
    the axes, and a place of the output is one place per axis, so the repeats multiply.

    Args:
        kernel_size: taps per axis.
        stride: step of the output grid, per axis.
        padding: amount per axis, or ``"same"`` or ``"valid"``.
        dilation: spacing of the taps, per axis.
        padding_mode: as in ``torch.nn.Conv2d``.
        input_size: length of each axis, or ``None`` for the worst case over all sizes.

    Returns:
        ``(stride, repeats)``.

    Raises:
        ValueError: arguments that the layer would refuse.
    """
    if padding_mode not in PADDING_MODES:
        raise ValueError(
            f"expected padding_mode to be one of {', '.join(PADDING_MODES)}, got {padding_mode!r}"
        )
    axes = len(kernel_size)
    strides = per_axis(stride, "stride", 1, axes)
    dilations = per_axis(dilation, "dilation", 1, axes)
    sizes: tuple[int | None, ...] = (None,) * axes
    if input_size is not None:
        sizes = per_axis(input_size, "input_size", 1, axes)
    amounts = padding_amounts(padding, kernel_size, strides, dilations)
    reach = [d * (k - 1) for d, k in zip(dilations, kernel_size, strict=True)]
    for extent, size, (before, after) in zip(reach, sizes, amounts, strict=True):
        if size is not None and before + size + after <= extent:
            raise ValueError(
                f"expected an input that the kernel fits in, got {before} + {size} + {after} "
                f"entries for a kernel that reaches over {extent + 1}"
            )
    if padding_mode == "zeros":
        return strides, 1

    kept = list(strides)
    repeats = 1
    for axis, (before, after) in enumerate(amounts):
        if padding_mode == "circular":
            kept[axis], times = wrapped_rows(before, after, reach[axis], strides[axis], sizes[axis])
        else:
            times = duplication(padding_mode, before, after, sizes[axis])
        repeats *= times
    return tuple(kept), repeats


def padded_bound(bound: Tensor, repeats: int) -> Tensor:
    """Proven bound ``sqrt(repeats) * bound``, differentiable; see `padding_effect`."""
    if repeats == 1:
        return bound
    gain = math.nextafter(math.sqrt(repeats), math.inf)
    return product_bound(bound, bound.new_full((), gain))
