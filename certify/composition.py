r"""Affine maps that follow each other, or stand beside each other, as one.

Everything here is about the infinite lattice: a convolution layer with zero padding is a lattice
operator ``C`` between an extension by zeros and a restriction to the output's grid. Of two layers,

    ``R2 C2 P C1 E1``  with  ``P = E2 R1``,

the projection onto the places where the first has outputs. ``P`` can be left out, so that the
layers are restrictions of ``C2 C1``, where the second has no padding (it reads nothing outside), or
the first is pointwise (it has nothing outside). Elsewhere ``P`` is a diagonal of zeros and ones,
and joins the diagonal of the slopes between the layers: see `masks`.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import grad

from certify.operators import (
    Convolution,
    Matrix,
    Operator,
    Scale,
    Weighted,
    may_scale,
    scaled,
    sum_of_tap_norms,
)
from ff_bounds.padding import padding_amounts
from ff_bounds.rounding import gamma, product_bound, round_up, sum_bound

MAX_ENTRIES = 2**23
"""Composed weights that would be larger are not formed."""


def merge(after: Operator, before: Operator, axes: int) -> Operator | None:
    """``after before`` where that costs nothing: one only scales channels, or both are matrices.

    Args:
        after: the later operator.
        before: the earlier one.
        axes: number of axes of the tensor between them, the batch included. A matrix acts on the
            last axis, which is the channels' only if there are two.

    Returns:
        ``None`` where the two are not one map of these forms.
    """
    if isinstance(after, Scale):
        if isinstance(before, Scale):
            return (
                None
                if not _sane(after, before)
                else Scale(after.factors * before.factors, after.roundings + before.roundings + 1)
            )
        return _scale_outputs(before, after.factors, after.roundings, axes)
    if isinstance(before, Scale):
        return _scale_inputs(after, before.factors, before.roundings, axes)
    if isinstance(after, Matrix) and isinstance(before, Matrix):
        rows, columns = after.weight.shape[0], before.weight.shape[1]
        if rows * columns <= after.weight.numel() + before.weight.numel():
            return compose(after, before)
    return None


def balanced(operator: Operator, outputs: Tensor | None, inputs: Tensor | None) -> Operator:
    """``diag(1 / outputs) operator diag(inputs)`` for positive factors of the channels."""
    reciprocal = None if outputs is None else outputs.reciprocal()
    if isinstance(operator, Scale):
        return operator  # diagonal maps commute; both factors are the same
    adjoint = isinstance(operator, Convolution) and operator.adjoint
    rows, columns = (inputs, reciprocal) if adjoint else (reciprocal, inputs)
    return scaled(operator, rows, columns, 2)


def _sane(*scales: Scale) -> bool:
    sizes = [scale.factors.detach().abs() for scale in scales]
    return all(bool(((size > 2.0**-100) & (size < 2.0**100)).all()) for size in sizes)


def _scale_outputs(
    operator: Weighted, factors: Tensor, roundings: int, axes: int
) -> Operator | None:
    if not may_scale(operator, factors) or (isinstance(operator, Matrix) and axes != 2):
        return None
    outputs = operator.outputs if isinstance(operator, Convolution) else operator.weight.shape[0]
    factors = factors.expand(outputs)
    if isinstance(operator, Convolution) and operator.adjoint:
        return scaled(operator, None, factors, roundings)
    return scaled(operator, factors, None, roundings)


def _scale_inputs(
    operator: Weighted, factors: Tensor, roundings: int, axes: int
) -> Operator | None:
    if not may_scale(operator, factors) or (isinstance(operator, Matrix) and axes != 2):
        return None
    inputs = operator.inputs if isinstance(operator, Convolution) else operator.weight.shape[1]
    factors = factors.expand(inputs)
    if isinstance(operator, Convolution) and operator.adjoint:
        return scaled(operator, factors, None, roundings)
    return scaled(operator, None, factors, roundings)


def masks(after: Weighted, before: Weighted) -> bool:
    """Whether a projection onto the places between two convolutions matters."""
    if not isinstance(after, Convolution) or not isinstance(before, Convolution):
        return False
    pointwise = (
        all(taps == 1 for taps in before.weight.shape[2:])
        and set(before.stride) == {1}
        and not any(map(any, _amounts(before)))
    )
    return _reads_outside(after) and not pointwise


def _reads_outside(operator: Convolution) -> bool:
    if operator.input_size is None:
        return operator.padded
    return any(map(any, _amounts(operator)))


def compose(after: Weighted, before: Weighted) -> Weighted | None:
    r"""``after before`` as one operator, with the projection between them left out; or ``None``.

    With ``y[n] = sum_t W[t] x[s n + d t - p]``, the composition has stride ``s1 s2``, offset
    ``s1 p2 + p1`` and taps at ``s1 d2 u + d1 t``. Its weight is computed in float64: an entry is a
    sum of at most ``n`` products, hence off by ``gamma_{n+1}`` times the same sum of absolute
    values, and the norm of that error is at most ``gamma_{n+1} sum_u ||W2_u||_F sum_t ||W1_t||_F``.
    """
    if isinstance(after, Matrix) and isinstance(before, Convolution):
        return _compose_flattened(after, before)
    if isinstance(after, Matrix) and isinstance(before, Matrix):
        first, second = before.effective_weight(), after.effective_weight()
        if first.shape[0] != second.shape[1] or second.shape[0] * first.shape[1] > MAX_ENTRIES:
            return None
        product = second.to(torch.float64) @ first.to(torch.float64)
        if not bool(product.detach().isfinite().all()):
            return None
        terms = first.shape[0] + 4
        return Matrix(product, error=_product_error(after, before, terms))
    if not isinstance(after, Convolution) or not isinstance(before, Convolution):
        return None
    if not (_is_lattice(after) and _is_lattice(before)) or after.inputs != before.outputs:
        return None
    return _compose_convolutions(after, before)


def _compose_flattened(after: Matrix, before: Convolution) -> Matrix | None:
    """A matrix on all outputs of a convolution: its rows go through the adjoint, as they are.

    The result is a matrix on all entries of the input, exact for its size. A matrix that acts on
    the last axis only has fewer columns than the convolution has outputs, unless that is all.
    """
    sizes, amounts = before.input_size, _amounts(before)
    if sizes is None or not _is_lattice(before) or any(a != b for a, b in amounts):
        return None
    rows = after.effective_weight().to(torch.float64)
    outputs = [
        (n + 2 * pad - dilation * (taps - 1) - 1) // step + 1
        for n, (pad, _), dilation, taps, step in zip(
            sizes, amounts, before.dilation, before.weight.shape[2:], before.stride, strict=True
        )
    ]
    entries = before.inputs * math.prod(sizes)
    if rows.shape[1] != before.outputs * math.prod(outputs) or len(rows) * entries > MAX_ENTRIES:
        return None
    adjoint: Any = (grad.conv1d_input, grad.conv2d_input, grad.conv3d_input)[len(sizes) - 1]
    product: Tensor = adjoint(
        (len(rows), before.inputs, *sizes),
        before.effective_weight().to(torch.float64),
        rows.reshape(len(rows), before.outputs, *outputs),
        before.stride,
        tuple(pad for pad, _ in amounts),
        before.dilation,
        before.groups,
    ).flatten(1)
    if not bool(product.detach().isfinite().all()):
        return None
    terms = before.outputs * math.prod(before.weight.shape[2:]) + 4
    return Matrix(product, error=_product_error(after, before, terms))


def _compose_convolutions(after: Convolution, before: Convolution) -> Convolution | None:
    axes = after.weight.ndim - 2
    if before.weight.ndim - 2 != axes:
        return None
    stride = tuple(a * b for a, b in zip(after.stride, before.stride, strict=True))
    offsets, sizes = [], []
    for axis in range(axes):
        offsets.append(before.stride[axis] * _amounts(after)[axis][0] + _amounts(before)[axis][0])
        sizes.append(
            before.stride[axis] * after.dilation[axis] * (after.weight.shape[2 + axis] - 1)
            + before.dilation[axis] * (before.weight.shape[2 + axis] - 1)
            + 1
        )
    groups = after.groups if after.groups == before.groups else 1
    shape = (after.outputs, before.inputs // groups, *sizes)
    if math.prod(shape) > MAX_ENTRIES:
        return None
    second = _grouped(after, groups).to(torch.float64)
    first = _grouped(before, groups).to(torch.float64)
    weight = second.new_zeros(groups, after.outputs // groups, before.inputs // groups, *sizes)
    for u in _places(second.shape[3:]):
        corner = [before.stride[a] * after.dilation[a] * u[a] for a in range(axes)]
        block = torch.einsum("gom,gmi...->goi...", second[(slice(None),) * 3 + u], first)
        window = tuple(
            slice(c, c + before.dilation[a] * (first.shape[3 + a] - 1) + 1, before.dilation[a])
            for a, c in enumerate(corner)
        )
        weight[(slice(None),) * 3 + window] += block
    if not bool(weight.detach().isfinite().all()):
        return None
    terms = second.shape[2] * math.prod(second.shape[3:]) + 4
    return Convolution(
        weight.flatten(0, 1),
        stride=stride,
        padding=tuple(offsets),
        dilation=(1,) * axes,
        groups=groups,
        padded=_reads_outside(after) or _reads_outside(before),
        error=_product_error(after, before, terms),
    )


def add(first: Weighted, second: Weighted, factor: float) -> Weighted | None:
    """``first + factor * second`` as one operator on the lattice, or ``None``.

    Each entry of the sum carries two roundings, and the factor a few of its own.
    """
    if isinstance(first, Matrix) and isinstance(second, Matrix):
        one, other = first.effective_weight().double(), second.effective_weight().double()
        if one.shape != other.shape:
            return None
        total = one + factor * other
        if not bool(total.detach().isfinite().all()):
            return None
    elif isinstance(first, Convolution) and isinstance(second, Convolution):
        if not (_is_lattice(first) and _is_lattice(second)) or first.stride != second.stride:
            return None
        if (first.outputs, first.inputs) != (second.outputs, second.inputs):
            return None
        groups = first.groups if first.groups == second.groups else 1
        pair = [_dense_taps(o, groups) for o in (first, second)]
        axes = len(first.stride)
        before = [[a for a, _ in _amounts(o)] for o in (first, second)]
        offsets = [max(a, b) for a, b in zip(*before, strict=True)]
        sizes = [
            max(offsets[a] - before[k][a] + pair[k].shape[3 + a] for k in (0, 1))
            for a in range(axes)
        ]
        shape = (*pair[0].shape[:3], *sizes)
        if math.prod(shape) > MAX_ENTRIES:
            return None
        total = pair[0].new_zeros(shape)
        for kernel, starts, by in zip(pair, before, (1.0, factor), strict=True):
            window = tuple(
                slice(offsets[a] - starts[a], offsets[a] - starts[a] + kernel.shape[3 + a])
                for a in range(axes)
            )
            total[(slice(None),) * 3 + window] += by * kernel
        if not bool(total.detach().isfinite().all()):
            return None
        result = Convolution(
            total.flatten(0, 1),
            stride=first.stride,
            padding=tuple(offsets),
            dilation=(1,) * axes,
            groups=groups,
        )
        return replace(result, error=_sum_error(first, second, factor))
    else:
        return None
    return Matrix(total, error=_sum_error(first, second, factor))


def identity(like: Weighted, channels: int, device: torch.device) -> Weighted:
    """The identity in the form of another operator."""
    if isinstance(like, Matrix):
        return Matrix(torch.eye(channels, dtype=torch.float64, device=device))
    axes = len(like.stride)
    eye = torch.eye(channels, dtype=torch.float64, device=device)
    return Convolution(
        eye.reshape(channels, channels, *[1] * axes),
        stride=(1,) * axes,
        padding=(0,) * axes,
        dilation=(1,) * axes,
    )


def _is_lattice(operator: Convolution) -> bool:
    return operator.padding_mode == "zeros" and not operator.adjoint


def _amounts(operator: Convolution) -> tuple[tuple[int, int], ...]:
    size = tuple(operator.weight.shape[2:])
    return padding_amounts(operator.padding, size, operator.stride, operator.dilation)


def _grouped(operator: Convolution, groups: int) -> Tensor:
    """Weight ``(groups, c_out // groups, c_in // groups, *taps)``; zeros between finer groups."""
    weight = operator.effective_weight()
    spatial = weight.shape[2:]
    own = weight.reshape(operator.groups, -1, *weight.shape[1:])
    if operator.groups == groups:
        return own
    outputs, inputs = own.shape[1], own.shape[2]
    dense = own.new_zeros(operator.groups, outputs, operator.groups, inputs, *spatial)
    index = torch.arange(operator.groups, device=own.device)
    dense[index, :, index] = own
    return dense.reshape(1, operator.groups * outputs, operator.groups * inputs, *spatial)


def _dense_taps(operator: Convolution, groups: int) -> Tensor:
    """As `_grouped` in float64, with dilation written out as zeros between the taps."""
    kernel = _grouped(operator, groups).to(torch.float64)
    sizes = [d * (k - 1) + 1 for d, k in zip(operator.dilation, kernel.shape[3:], strict=True)]
    spread = kernel.new_zeros(*kernel.shape[:3], *sizes)
    steps = tuple(slice(None, None, d) for d in operator.dilation)
    spread[(slice(None),) * 3 + steps] = kernel
    return spread


def _places(sizes: torch.Size) -> list[tuple[int, ...]]:
    return [
        tuple(p)
        for p in torch.cartesian_prod(*map(torch.arange, sizes)).reshape(-1, len(sizes)).tolist()
    ]


def _size(operator: Weighted) -> Tensor:
    """``sum_t ||W_t||_F``, at least the norm on the lattice, of absolute values too."""
    return sum_of_tap_norms(operator.effective_weight())


def _product_error(after: Weighted, before: Weighted, terms: int) -> Tensor:
    """Rounding of a product of weights, and what each of them is off by, times the other."""
    sizes = [_size(after), _size(before)]
    errors = [after.norm_error(), before.norm_error()]
    rounding = product_bound(product_bound(*sizes), sizes[0].new_full((), 2.0 * gamma(terms)))
    tiny = (1.0 + sizes[0]) * (1.0 + sizes[1]) * 2.0**-900  # what underflows in the products
    total = sum_bound(rounding, tiny)
    total = sum_bound(total, product_bound(errors[0], sum_bound(sizes[1], errors[1])))
    return sum_bound(total, product_bound(sizes[0], errors[1]))


def _sum_error(first: Weighted, second: Weighted, factor: float) -> Tensor:
    by = abs(factor)
    sizes = sum_bound(_size(first), _size(second) * by)
    errors = sum_bound(first.norm_error(), round_up(second.norm_error() * by, 1))
    return sum_bound(errors, round_up(sizes * gamma(8), 3) + 2.0**-900)
