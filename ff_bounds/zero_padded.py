r"""The norm of a convolution with zero padding on a given input.

On inputs of finite size the Jacobian is a submatrix of the operator on the infinite lattice, whose
norm ``sigma*`` it approaches as the size grows: on maps of 8 x 8 places it is typically one or two
per cent smaller, layer after layer.

Its Gram matrix is block-banded: with ``T_a`` the (dense) matrix of the taps in row ``a`` of the
kernel, from one row of the input to one row of the output, the block of output rows ``p`` and
``p'`` is the sum of ``T_a T_a'^T`` over the pairs of taps that meet at a row of the input. So a few
products of such matrices give all blocks, and a block Cholesky of ``t I - G`` that goes from row to
row proves that ``||J||^2 <= t`` (`ff_bounds.positive`).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from ff_bounds.lanczos import top_eigenpair
from ff_bounds.matrix import attach_gradient, check_finite_real
from ff_bounds.padding import padding_amounts
from ff_bounds.positive import cholesky, factorisation_slack
from ff_bounds.rounding import (
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    gamma,
    round_up,
    scale_by_power_of_two,
    undo_scaling,
)
from ff_bounds.unfoldings import Size, per_axis, spatial_axes

MAX_WORK = 2e12
"""Most floating-point operations of a factorisation: about a minute on a core."""

MAX_ENTRIES = 2.5e8
"""Most entries of the blocks of a Gram matrix: two gigabytes."""

_STEPS = 96  # of the Lanczos process
_TOLERANCE = 1e-5
_WIDER = (1.0, 10.0, 100.0, 1000.0)  # times that, where the process has not come near enough


class TooLarge(ValueError):  # noqa: N818 - the name says what it is about
    """A factorisation that would take too long."""


def zero_padded_bound(
    weight: Tensor,
    *,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    input_size: Size,
) -> Tensor:
    r"""Proven upper bound of the norm of a zero-padded convolution on inputs of a given size.

    Claim: ``||J|| <= zero_padded_bound(weight, ...)`` for the Jacobian ``J`` of
    ``torch.nn.functional.conv1d`` or ``conv2d`` on inputs of ``input_size``, rounding included. It
    is at most about ``1e-5`` relative too large where the Lanczos process finds the norm that well
    (more beyond some ten thousand entries of an image, whose roundings add up), and at most
    ``1e-2`` otherwise, or infinite where nothing was proven.

    The Lanczos process suggests a value, which the factorisation proves for the computed ``G``; an
    entry of that is off by at most ``gamma_k`` times the same sum of absolute products, so ``G`` is
    off by ``gamma_k || |J| ||^2`` in norm at most, with ``k`` terms, and ``|| |J| ||`` is below the
    sum over the taps of their Frobenius norms.

    Args:
        weight: ``(c_out, c_in // groups, *taps)`` with one or two axes of taps.
        stride: step of the output grid, per axis.
        padding: amount per axis, or ``"same"`` or ``"valid"``.
        dilation: spacing of the taps, per axis.
        groups: number of channel groups.
        input_size: length of each axis of the unpadded input.

    Returns:
        A float64 scalar on the weight's device, differentiable with respect to ``weight``: the
        gradient is that of the gain of the vector that was found, scaled to the bound.

    Raises:
        ValueError: arguments that the layer would refuse, three axes, NaN or infinite weights, or
            (`TooLarge`) a factorisation of more than `MAX_WORK` operations.

    References:
        S. M. Rump, Verification of positive definiteness, BIT 46 (2006).

    Example:
        >>> difference = torch.tensor([[[1.0, -1.0]]])
        >>> bound = zero_padded_bound(difference, input_size=2)  # one place of the output
        >>> 2.0**0.5 <= bound.item() <= 2.0**0.5 * (1 + 1e-4)  # on the lattice it is 2
        True
    """
    axes = spatial_axes(weight, allowed=(1, 2))
    check_finite_real(weight, "weight")
    if groups < 1 or len(weight) % groups:
        raise ValueError(f"expected groups that divide {len(weight)} outputs, got {groups}")
    steps, gaps = (
        per_axis(value, name, 1, axes)
        for value, name in ((stride, "stride"), (dilation, "dilation"))
    )
    sizes = per_axis(input_size, "input_size", 1, axes)
    amounts = padding_amounts(padding, tuple(weight.shape[2:]), steps, gaps)
    exact = weight.detach().to(device="cpu", dtype=torch.float64)
    if axes == 1:  # along the rows, of which a block needs few
        exact, steps, gaps = exact[..., None], (*steps, 1), (*gaps, 1)
        sizes, amounts = (*sizes, 1), (*amounts, (0, 0))
    shape = exact.shape
    layer = _Layer(exact, steps, amounts, gaps, sizes)
    # Taps that meet nothing within the input do not matter, not even for the scale.
    meeting = torch.zeros(shape[2:], dtype=torch.bool)
    rows, columns = (sorted({tap for _, _, tap in layer.meets(axis)}) for axis in (0, 1))
    meeting[torch.tensor(rows, dtype=torch.int64)[:, None], columns] = True
    exact = torch.where(meeting, exact, 0.0)
    largest = exact.abs().amax()
    if not bool(largest > 0):
        return (weight.to(torch.float64) * 0.0).sum()  # whose sum might overflow
    exponent = torch.frexp(largest).exponent
    scaled = scale_by_power_of_two(exact, -exponent)
    found = [_square_and_gradient(replace(layer, weight=part)) for part in scaled.chunk(groups)]
    group = max(range(groups), key=lambda g: float(found[g][0]))
    root = round_up(found[group][0].sqrt(), 1)
    bound = undo_scaling(root, exponent).to(weight.device)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return bound
    gradient = torch.zeros_like(exact)
    outputs = len(exact) // groups
    gradient[group * outputs : (group + 1) * outputs] = found[group][1]
    # As of a norm: homogeneous, so that <gradient, weight> is the bound.
    gain = (gradient * scaled).sum()
    gradient = gradient * torch.where((gain > 0) & root.isfinite(), root / gain, 1.0)
    gradient = gradient.reshape(weight.shape).to(weight.device)
    return attach_gradient(weight.to(torch.float64), bound, gradient)


@dataclass(frozen=True)
class _Layer:
    """One group of a convolution with two axes.

    Attributes:
        weight: ``(c_out, c_in, h, w)``, float64.
        stride, padding, dilation: per axis; padding as ``(before, after)``.
        inputs: height and width of the input.
    """

    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    inputs: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.outputs) < 1:
            raise ValueError(f"expected an input that the kernel fits in, got {self.inputs}")

    @property
    def outputs(self) -> tuple[int, ...]:
        """Height and width of the output."""
        return tuple(
            (size + sum(pads) - gap * (taps - 1) - 1) // step + 1
            for size, pads, gap, taps, step in zip(
                self.inputs,
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                self.stride,
                strict=True,
            )
        )

    @property
    def by_outputs(self) -> bool:
        """Whether the output has no more entries than the input."""
        places = [size[0] * size[1] for size in (self.outputs, self.inputs)]
        return places[0] * self.weight.shape[0] <= places[1] * self.weight.shape[1]

    def meets(self, axis: int) -> list[tuple[int, int, int]]:
        """All ``(output, input, tap)`` along an axis that meet within the input."""
        before = self.padding[axis][0]
        step, gap = self.stride[axis], self.dilation[axis]
        triples = itertools.product(range(self.outputs[axis]), range(self.weight.shape[2 + axis]))
        places = ((out, step * out + gap * tap - before, tap) for out, tap in triples)
        return [triple for triple in places if 0 <= triple[1] < self.inputs[axis]]

    def row_matrices(self) -> Tensor:
        """``T_a (h, outputs, inputs)``, by which row ``a`` of the kernel takes rows to rows.

        Transposed where the input is the smaller side.
        """
        c_out, c_in, height, _ = self.weight.shape
        out, inn = self.outputs[1], self.inputs[1]
        matrices = self.weight.new_zeros(height, out, c_out, inn, c_in)
        for place, source, tap in self.meets(1):
            matrices[:, place, :, source, :] = self.weight[:, :, :, tap].permute(2, 0, 1)
        dense = matrices.reshape(height, out * c_out, inn * c_in)
        return dense if self.by_outputs else dense.mT

    def push(self, images: Tensor) -> Tensor:
        """Apply the layer to ``(N, c_in, *inputs)``."""
        (top, bottom), (left, right) = self.padding
        padded = F.pad(images, (left, right, top, bottom))
        return F.conv2d(padded, self.weight, None, self.stride, 0, self.dilation)

    def pull(self, images: Tensor) -> Tensor:
        """Apply the adjoint to ``(N, c_out, *outputs)``."""
        (top, bottom), (left, right) = self.padding
        height, width = self.inputs
        shape = (len(images), self.weight.shape[1], height + top + bottom, width + left + right)
        padded: Tensor = conv2d_input(shape, self.weight, images, self.stride, 0, self.dilation)
        return padded[:, :, top : top + height, left : left + width]


def _square_and_gradient(layer: _Layer) -> tuple[Tensor, Tensor]:
    """Bound of the squared norm of a layer with entries up to one, and the norm's gradient."""
    blocks = _gram(layer)
    side = layer.outputs if layer.by_outputs else layer.inputs
    channels = layer.weight.shape[0 if layer.by_outputs else 1]
    count = side[0] * side[1] * channels
    terms = layer.weight[0].numel() if layer.by_outputs else layer.weight[:, 0].numel()
    sizes = layer.weight.flatten(2).permute(2, 0, 1).flatten(1)
    total = round_up(torch.linalg.vector_norm(sizes, dim=1).sum() + 2.0**-500, sizes.numel() + 4)
    error = gamma(terms + layer.weight.shape[2] + 4) * total.square() * 1.001 + count * 2.0**-1000

    left, right, estimate = _vectors(layer)
    square = torch.full((), torch.inf, dtype=torch.float64)
    for wider in _WIDER:
        wished = estimate * (1.0 + 2.0 * _TOLERANCE * wider) + SMALLEST_NORMAL
        slack = factorisation_slack(count, 2.0 * count * wished) + 8.0 * UNIT_ROUNDOFF * wished
        if bool(slack > wished):
            break  # then the trace is not what was paid for
        shift = round_up(wished + slack, 4)
        if _proves(blocks, shift, slack):
            square = round_up(shift + error, 4)
            break
    gradient = conv2d_weight(
        F.pad(right, [p for pads in reversed(layer.padding) for p in pads]),
        list(layer.weight.shape),
        left,
        layer.stride,
        0,
        layer.dilation,
    )
    return square, gradient


def _vectors(layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    """Nearly singular vectors as images ``(1, channels, *size)``, and the square of their gain."""
    shape = (1, layer.weight.shape[1], *layer.inputs)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator, dtype=torch.float64).flatten()

    def gram(vector: Tensor) -> Tensor:
        return layer.pull(layer.push(vector.reshape(shape))).flatten()

    with torch.no_grad():
        vector, value = top_eigenpair(gram, start, _STEPS, _TOLERANCE)
        right = vector.reshape(shape)
        left = layer.push(right)
        left = left / left.norm().clamp_min(SMALLEST_NORMAL)
    return left, right, value.clamp_min(0.0)


def _gram(layer: _Layer) -> tuple[list[Tensor], list[Tensor]]:
    """The Gram matrix of the smaller side as block tridiagonal: diagonal, and right beside it."""
    meets = layer.meets(0)
    rows = (layer.outputs if layer.by_outputs else layer.inputs)[0]
    pairs: dict[int, list[tuple[int, int]]] = {}  # by what is summed over
    for out, source, tap in meets:
        row, summed = (out, source) if layer.by_outputs else (source, out)
        pairs.setdefault(summed, []).append((row, tap))
    reach = max((abs(r - s) for met in pairs.values() for r, _ in met for s, _ in met), default=0)
    height = max(1, reach)  # rows of a block, so that only neighbours meet
    width = layer.weight.shape[0] * layer.outputs[1]
    if not layer.by_outputs:
        width = layer.weight.shape[1] * layer.inputs[1]
    starts = list(range(0, rows, height))
    work = 3.0 * len(starts) * (height * width) ** 3
    entries = 2.0 * len(starts) * (height * width) ** 2
    if work > MAX_WORK or entries > MAX_ENTRIES:
        raise TooLarge(
            f"proving this norm takes {work:.0e} operations on {entries:.0e} numbers, more than "
            f"{MAX_WORK:.0e} or {MAX_ENTRIES:.0e}"
        )
    matrices = layer.row_matrices()
    products: dict[tuple[int, int], Tensor] = {}

    def product(first: int, second: int) -> Tensor:
        if (first, second) not in products:
            products[first, second] = matrices[first] @ matrices[second].mT
        return products[first, second]

    lengths = [min(height, rows - start) * width for start in starts]
    diagonal = [matrices.new_zeros(n, n) for n in lengths]
    beside = [matrices.new_zeros(m, n) for m, n in itertools.pairwise(lengths)]
    for met in pairs.values():
        for (row, tap), (other, second) in itertools.product(met, met):
            block, column = row // height, other // height
            if block > column:
                continue  # by symmetry
            target = diagonal[block] if block == column else beside[block]
            i, j = (row % height) * width, (other % height) * width
            target[i : i + width, j : j + width] += product(tap, second)
    return diagonal, beside


def _proves(blocks: tuple[list[Tensor], list[Tensor]], shift: Tensor, slack: Tensor) -> bool:
    """Whether ``shift I - G >= 0`` by Cholesky of that less ``slack I``, block after block."""
    diagonal, beside = blocks
    pending: Tensor | None = None
    for index, block in enumerate(diagonal):
        matrix = -block
        matrix.diagonal().add_(shift).sub_(slack)
        if pending is not None:
            matrix -= pending
        factor, info = cholesky(matrix[None])
        if bool(info.any()) or not bool(factor[0].diagonal().isfinite().all()):
            return False
        if index < len(beside):
            panel = torch.linalg.solve_triangular(factor[0].tril(), -beside[index], upper=False)
            pending = panel.mT @ panel
    return True
