r"""The norm of a convolution with circular padding on a given input, by pruning its spectrum.

On inputs of size ``n`` the Fourier basis makes a circular convolution block-diagonal, with the
blocks ``K(2 pi j / n)`` (Sedghi, Gupta & Long 2019). Their largest norm is at most ``sigma*``, and
below it where the grid misses the peak. Few of the blocks need to be looked at:

**Pruning.** Let ``M >= sup_w ||K(w)||`` and let ``||K(c)|| <= M cos(a + t)`` with ``0 <= a`` and
``a + t <= pi``. Then ``||K(w)|| <= M cos a`` wherever ``sum_j r_j |w_j - c_j| <= t``, with
``r_j = (taps_j - 1) / 2``.

Proof: suppose ``||K(w)|| > M cos a``, with singular vectors ``x, y``, and let
``f(s) = Re(x^H K(w + s d) y)`` with the taps centred and ``w + s d`` going to ``c``: real, of
exponential type ``tau = sum_j r_j |d_j|``, ``|f| <= M``, ``f(0) = M cos b`` with ``b < a``. Duffin
and Schaeffer show ``f'**2 + tau**2 f**2 <= tau**2 M**2``, so the angle ``arccos(f / M)`` grows by
``tau`` at most per unit of ``s``: ``f(s) >= M cos(b + tau |s|)`` as long as ``b + tau |s| <= pi``,
and ``||K(c)|| >= f > M cos(a + t)``.

References:
    H. Sedghi, V. Gupta, P. M. Long, The Singular Values of Convolutional Layers, ICLR 2019.
    R. J. Duffin, A. C. Schaeffer, Some properties of functions of exponential type, Bulletin of
    the AMS 44 (1938).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ff_bounds.branch_and_bound import branch_and_bound
from ff_bounds.matrix import attach_gradient
from ff_bounds.norm_tests import NormTests
from ff_bounds.peak import Peak
from ff_bounds.supremum import (
    MAX_MATRICES,
    NormBracket,
    prepare,
    scaled_back,
    symbol_norm_gradient,
)
from ff_bounds.symbol import Symbol
from ff_bounds.unfoldings import Size, per_axis, unit_stride_kernel

_COARSE = 1e-3  # gap of the supremum that prunes
_FIRST_ANGLE = 0.6  # about the angle t of the first blocks
_ASCENTS = 3


def circular_bracket(
    kernel: Tensor, input_size: int | Sequence[int], tol: float = 1e-6
) -> NormBracket:
    """Bracket the norm of a unit-stride convolution with circular padding on a given input.

    Claim: ``lower <= max_j ||K(2 pi j / n)|| <= upper <= (1 + tol) lower``, the largest over the
    groups, rounding included. ``upper`` is larger where the search would visit more than
    `MAX_MATRICES`, and where rounding shows: by about ``1e-13 (sigma* / norm)**2`` relative, which
    matters if the norm on the grid is small beside ``sigma*``, up to ``1e-5 sigma*`` if it is zero.
    Taps may exceed the input: they wrap around, as the phases do.

    Args:
        kernel: ``(groups, c_out, c_in, *taps)`` as from `unit_stride_kernel`; one to three axes.
        input_size: ``n``, the same for every axis or one number for each. For a strided layer,
            the size divided by the stride.
        tol: relative gap, in ``[1e-8, 1]``.

    Raises:
        ValueError: NaN or infinite entries, a size below one, or a tolerance outside its range.

    Example:
        >>> kernel = torch.tensor([1.0, -2.0, 1.0]).reshape(1, 1, 1, 3)
        >>> round(circular_bracket(kernel, 3).upper.item(), 5)  # the peak, pi, is not on the grid
        3.0
    """
    return _search(kernel.detach(), input_size, tol)[0]


def circular_bound(kernel: Tensor, input_size: int | Sequence[int], tol: float = 1e-6) -> Tensor:
    """Upper end of `circular_bracket`, differentiable as `supremum_bound` is."""
    bracket, left = _search(kernel.detach(), input_size, tol)
    if not (torch.is_grad_enabled() and kernel.requires_grad):
        return bracket.upper
    gradient = symbol_norm_gradient(
        kernel.detach(), bracket.group, bracket.frequency, left, bracket.upper
    )
    return attach_gradient(kernel.to(torch.float64), bracket.upper, gradient)


def circular_kernel(
    weight: Tensor, input_size: Size, *, stride: Size, dilation: Size, groups: int
) -> tuple[Tensor, list[int]]:
    """The kernel and grid whose norm (`circular_bracket`) bounds a circularly padded layer's.

    Without a stride, dilation ``d`` evaluates the symbol at ``d`` times the frequencies of the
    grid, which are those of a grid of ``n / gcd(n, d)`` points. With a stride that divides ``n``
    the layer is circulant on ``n / stride`` points, with the polyphase kernel, zeros between the
    taps written out. With another stride its rows are some of those without it.

    Args:
        weight: ``(c_out, c_in // groups, *taps)``.
        input_size: ``n`` per axis.
        stride: per axis, as returned by `padding_effect`.
        dilation: per axis.
        groups: number of channel groups.

    Returns:
        ``(groups, c_out // groups, channels, *taps)``, and the points per axis.

    Example:
        >>> kernel, grid = circular_kernel(torch.ones(1, 2, 3), 8, stride=2, dilation=1, groups=1)
        >>> tuple(kernel.shape), grid  # the two phases of two channels, on 4 points
        ((1, 1, 4, 2), [4])
    """
    axes = weight.ndim - 2
    sizes = per_axis(input_size, "input_size", 1, axes)
    strides = list(per_axis(stride, "stride", 1, axes))
    spacings = per_axis(dilation, "dilation", 1, axes)
    grid = []
    for axis, (size, step, spacing) in enumerate(zip(sizes, strides, spacings, strict=True)):
        if step == 1 or size % step:
            strides[axis] = 1
            grid.append(size // math.gcd(size, spacing))
            continue
        grid.append(size // step)
        taps = weight.shape[2 + axis]
        if taps > 1 and spacing > 1:
            places = torch.arange(taps, device=weight.device) * spacing
            shape = list(weight.shape)
            shape[2 + axis] = (taps - 1) * spacing + 1
            weight = weight.new_zeros(shape).index_copy(2 + axis, places, weight)
    return unit_stride_kernel(weight, stride=tuple(strides), groups=groups), grid


def _search(
    kernel: Tensor, input_size: int | Sequence[int], tol: float
) -> tuple[NormBracket, Tensor]:
    """Bracket, and the singular vector on the smaller side at its peak."""
    axes = kernel.ndim - 3
    sizes = [input_size] * axes if isinstance(input_size, int) else list(input_size)
    if len(sizes) != axes or not all(isinstance(n, int) and n >= 1 for n in sizes):
        raise ValueError(f"expected input_size as one or {axes} positive integers, got {sizes}")
    if not 1e-8 <= tol <= 1.0:
        raise ValueError(f"expected tol between 1e-8 and 1, got {tol}")
    prepared = prepare([kernel])
    grid = [sizes[axis] for axis in prepared.axes[0]]
    normalized, owner = prepared.kernels, prepared.owner
    supremum = branch_and_bound(normalized, owner, _COARSE, MAX_MATRICES)
    most = supremum.upper

    symbol = Symbol(normalized)
    peak = _GridPeak(symbol, owner, grid)
    peak.ascend(supremum.problem, supremum.left, _ASCENTS)
    peak.offer(supremum.problem, supremum.frequency, supremum.left)
    tests = NormTests(symbol, peak, [])
    tolerance, floor = tol, 1e-13  # the floor: a norm next to zero beside the supremum

    def target() -> Tensor:
        square = peak.square * (1.0 + 0.999 * tolerance) ** 2 + floor * most.square()
        return square.clamp_min(1e-200)

    blocks = _first_blocks(grid, symbol.taps)
    problem = torch.arange(len(owner), device=owner.device).repeat_interleave(len(blocks))
    low = torch.tensor([[a for a, _ in block] for block in blocks]).reshape(len(blocks), len(grid))
    high = torch.tensor([[b for _, b in block] for block in blocks]).reshape(low.shape)
    low = low.to(owner.device).repeat(len(owner), 1)
    high = high.to(owner.device).repeat(len(owner), 1)
    steps = 2.0 * math.pi / torch.tensor(grid, dtype=torch.float64, device=owner.device)
    radii = torch.tensor([(t - 1) / 2 for t in symbol.taps], dtype=torch.float64).to(steps)
    while len(problem):
        # Rounding of the frequencies: below 1e-14 along each axis.
        centre = (low + high - 1).to(torch.float64) / 2 * steps
        extent = (high - low - 1).to(torch.float64) / 2 * steps
        angle = (extent * radii).sum(dim=1) * (1.0 + 1e-12) + 1e-14 * radii.sum()

        roof = most[owner[problem]]

        def limit(
            part: Tensor, square: Tensor, angle: Tensor = angle, roof: Tensor = roof
        ) -> Tensor:
            bound = roof[part]
            rotated = (square.sqrt() / bound * (1.0 - 1e-15)).clamp_max(1.0).acos() + angle[part]
            cosine = rotated.clamp_max(math.pi / 2).cos() - 1e-15
            return (bound * cosine.clamp_min(0.0)).square() * (1.0 - 1e-14)

        before = peak.square
        closed = tests.close(problem, centre, target, limit, angle)
        # Nothing is left to prove where the target is no less than the supremum.
        trivial = (target().sqrt() * (1.0 - 1e-15) >= most)[owner[problem]]
        problem, low, high = (tensor[~(closed | trivial)] for tensor in (problem, low, high))
        single = ((high - low) == 1).all(dim=1)
        stuck = bool(single.any()) and not bool((peak.square > before).any())
        if stuck or int(tests.matrices.sum()) > MAX_MATRICES:
            tolerance, floor = 2.0 * tolerance, 4.0 * floor  # what is left is rounding, or too much
        if len(problem) and not bool(single.all()):
            problem, low, high = _split(problem, low, high)
    lower = peak.square.sqrt() * (1.0 - 1e-15)
    upper = torch.minimum(target().sqrt() * (1.0 + 1e-15), most)
    lower, upper = scaled_back(prepared, lower, upper)
    frequency = lower.new_zeros(axes)
    frequency[prepared.axes[0]] = peak.frequency[0]
    matrices = int(supremum.matrices[0] + tests.matrices[0])
    bracket = NormBracket(lower[0], upper[0], frequency, int(peak.problem[0]), matrices)
    return bracket, peak.left[0]


class _GridPeak(Peak):
    """Lower bounds at the frequencies of a grid only."""

    def __init__(self, symbol: Symbol, owner: Tensor, grid: list[int]) -> None:
        super().__init__(symbol, owner)
        self._grid = torch.tensor(grid, dtype=torch.float64, device=owner.device)

    def admissible(self, frequency: Tensor) -> Tensor:
        turns = (frequency * (self._grid / (2.0 * math.pi))).round().remainder(self._grid)
        return turns * (2.0 * math.pi) / self._grid


def _first_blocks(grid: list[int], taps: tuple[int, ...]) -> list[list[tuple[int, int]]]:
    """Blocks of indices ``[low, high)`` per axis that cover half of the grid.

    The other half has the conjugate matrices. A block's angle is `_FIRST_ANGLE` or a little more.
    """
    lines = []
    for axis, (size, count) in enumerate(zip(grid, taps, strict=True)):
        used = size // 2 + 1 if axis == 0 else size
        width = 2.0 * _FIRST_ANGLE / len(grid) / ((count - 1) / 2) * size / (2.0 * math.pi)
        step = max(1, round(width))
        lines.append([(a, min(a + step, used)) for a in range(0, used, step)])
    return [list(block) for block in itertools.product(*lines)]


def _split(problem: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Halve blocks along every axis that has more than one index; single ones stay."""
    for axis in range(low.shape[1]):
        several = high[:, axis] - low[:, axis] > 1
        middle = (low[:, axis] + high[:, axis]) // 2
        first, second = high.clone(), low[several].clone()
        first[:, axis] = torch.where(several, middle, high[:, axis])
        second[:, axis] = middle[several]
        problem = torch.cat([problem, problem[several]])
        low, high = torch.cat([low, second]), torch.cat([first, high[several]])
    order = problem.argsort(stable=True)
    return problem[order], low[order], high[order]
