r"""The symbol of a convolution at many frequencies, and proofs about its norm there.

The symbol of a kernel with taps ``K_a`` is ``K(w) = sum_a K_a exp(-i <a, w>)``. What is evaluated
is its smaller Gram matrix, itself a trigonometric polynomial with real coefficients,

    ``G(w) = K(w) K(w)^H = sum_s G_s exp(-i <s, w>)``, ``G_s = sum_a K_{a+s} K_a^T = G_{-s}^T``,

so that a frequency costs a linear combination of a few matrices instead of a matrix product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from ff_bounds.positive import factorisation_slack, proves_positive
from ff_bounds.rounding import UNIT_ROUNDOFF, gamma, scale_by_power_of_two

CHUNK_BYTES = 2**27
"""Complex matrices held at once take so much memory."""

LEADING = 49
"""How many eigenpairs of the mean of ``K K^H`` are estimated."""

_BLOCKED = 256  # rows from which half of a symmetric product pays off
_SUBSPACE_ITERATIONS = 2
_FEW_ROWS = 64
_SMALL = 600  # entries of a matrix: below, it costs less to gather coefficients than to loop


class Symbol:
    """``K(w) = sum_a K_a exp(-i <a, w>)`` of a batch of kernels, with a bound of its rounding.

    Args:
        kernels: ``(problems, m, n, *taps)`` float64 and finite.
        origin: the exponent of the first tap, per axis (zero unless told).

    Attributes:
        by_tap: the kernels as ``(problems, prod(taps), m, n)``.
        sizes: ``(problems,)`` bound of ``||K(w)||`` for every ``w``: ``sum_a ||K_a||_F``.
        error: ``(problems,)`` bound of ``||computed K(w) - K(w)||_F`` for every frequency with
            ``|w_j| <= 2 pi``.

    The error bound: each entry is a sum of ``prod(taps)`` products with a cosine or sine that is
    off by the rounding of its angle, at most ``2 (d + 1) u |<a, w>|``, and of the library function
    (4u is generous); all relative to ``sum_a |K_a|``. A factor 4 covers the two parts and the rest.
    """

    def __init__(self, kernels: Tensor, origin: Sequence[int] | None = None) -> None:
        self.kernels = kernels
        self.rows, self.columns = kernels.shape[1:3]
        self.taps = tuple(kernels.shape[3:])
        count, dimension = math.prod(self.taps), len(self.taps)
        origin = [0] * dimension if origin is None else list(origin)
        lines = (range(o, o + t) for o, t in zip(origin, self.taps, strict=True))
        places = torch.tensor(list(itertools.product(*lines)), dtype=torch.float64)
        self.places = places.reshape(count, dimension).to(kernels.device)
        flat = kernels.flatten(3) if dimension else kernels[..., None]
        self.by_tap = flat.permute(0, 3, 1, 2).contiguous()
        self._flat = self.by_tap.flatten(2)  # (problems, taps, m n)
        self.sizes = torch.linalg.vector_norm(self._flat, dim=2).sum(dim=1)
        self.sizes = self.sizes * (1.0 + gamma(self.rows * self.columns + count + 2))
        reach = 2 * math.pi * float(self.places.abs().amax(dim=0).sum()) if dimension else 0.0
        relative = gamma(count + 4) + 2 * (dimension + 1) * UNIT_ROUNDOFF * reach
        self.error = 4 * (relative + 8 * UNIT_ROUNDOFF) * self.sizes + 1e-290

    @cached_property
    def mean(self) -> Tensor:
        """``T T^T`` ``(problems, m, m)``: the mean of ``K K^H`` over all frequencies.

        ``T`` is the unfolding ``(m, n prod(taps))``.
        """
        flat = self.kernels.flatten(2)
        if self.rows < _BLOCKED:
            return flat @ flat.mT
        first, second = flat.chunk(2, dim=1)  # the mirror image of a block need not be computed
        corner = first @ second.mT
        upper = torch.cat([first @ first.mT, corner], dim=2)
        lower = torch.cat([corner.mT, second @ second.mT], dim=2)
        return torch.cat([upper, lower], dim=1)

    @cached_property
    def leading(self) -> tuple[Tensor, Tensor]:
        """Estimated leading eigenpairs of `mean`, at most `LEADING`: values, and vectors.

        Returns:
            ``(problems, k)`` in descending order, ``(problems, m, k)`` nearly orthonormal.
        """
        count = min(LEADING, self.rows if self.rows < _FEW_ROWS else self.rows // 4 + 1)
        generator = torch.Generator().manual_seed(0)
        size = torch.linalg.matrix_norm(self.mean).clamp_min(1e-30)[:, None, None]
        mean = (self.mean / size).to(torch.float32)  # which is enough for estimates
        basis = torch.randn(self.rows, count, generator=generator).to(mean.device)
        basis = basis.expand(len(mean), -1, -1)
        for _ in range(_SUBSPACE_ITERATIONS if count < self.rows else 1):
            basis = torch.linalg.qr(mean @ (mean @ basis)).Q
        values, vectors = torch.linalg.eigh(basis.mT @ (mean @ basis))
        values, vectors = values * size[..., 0], basis @ vectors
        return values.flip(-1), vectors.flip(-1).to(torch.float64)

    def __call__(self, problem: Tensor, frequency: Tensor) -> Tensor:
        """Evaluate ``K`` of kernel ``problem[c]`` at ``frequency[c]``.

        Args:
            problem: ``(cells,)`` int64, in ascending order.
            frequency: ``(cells, d)``, entries in ``[-2 pi, 2 pi]``.

        Returns:
            ``(cells, m, n)`` complex128.
        """
        angle = frequency @ self.places.mT
        real = combine(self._flat, problem, angle.cos())
        imaginary = combine(self._flat, problem, -angle.sin())
        return torch.complex(real, imaginary).reshape(-1, self.rows, self.columns)

    def rows_at(self, problem: Tensor, left: Tensor) -> Tensor:
        """The taps ``(cells, taps, n)`` of ``left^H K``, for ``left`` ``(cells, m)``."""
        basis = self.by_tap
        parts = torch.stack([left.real, -left.imag], dim=1)  # (cells, 2, m)
        if len(basis) > 1 and self._flat.shape[2] < _SMALL:
            rows = parts[:, None] @ basis[problem]  # (cells, taps, 2, n)
        else:
            pieces = zip(*_by_problem(problem, parts), strict=True)
            products = [part.flatten(0, 1) @ basis[index] for index, part in pieces]
            rows = torch.cat([p.unflatten(1, (-1, 2)).movedim(0, 1) for p in products])
        return torch.complex(rows[:, :, 0].contiguous(), rows[:, :, 1].contiguous())


def _by_problem(problem: Tensor, values: Tensor) -> tuple[list[int], list[Tensor]]:
    """Split ``values`` of cells in ascending order of ``problem``: the problems and their parts."""
    indices, counts = torch.unique_consecutive(problem, return_counts=True)
    return indices.tolist(), list(values.split(counts.tolist()))


def combine(basis: Tensor, problem: Tensor, weight: Tensor) -> Tensor:
    """``sum_s weight[c, s] basis[problem[c], s]`` for ``basis`` ``(problems, terms, size)``."""
    if len(basis) == 1:
        return weight @ basis[0]
    if basis.shape[2] < _SMALL:
        return (weight[:, None] @ basis[problem])[:, 0]
    pieces = zip(*_by_problem(problem, weight), strict=True)
    return torch.cat([piece @ basis[index] for index, piece in pieces])


class GramPolynomial:
    """``G(w) = K(w) K(w)^H`` of a batch of kernels, with a bound of its rounding errors.

    Args:
        symbol: kernels ``(problems, m, n, *taps)`` with entries of size about one (see
            `normalized_kernels`), ``m <= n``.

    Attributes:
        error: ``(problems,)`` bound of ``||computed G(w) - G(w)||`` for every frequency with
            ``|w_j| <= 2 pi``.

    The error bound: an entry of ``G(w)`` is a sum of ``N = n prod(taps)`` products, times a cosine
    or sine, summed over at most ``H + 1`` shifts. Each cosine is off by the rounding of its angle,
    at most ``2 (d + 1) u |<s, w>|``, and of the library function (4u is generous). All is relative
    to ``sum_ab |K_a||K_b|^T``, whose Frobenius norm is at most ``(sum_a ||K_a||_F)^2 <=
    prod(taps) ||K||_F^2``. A factor 4 covers the real and imaginary parts and what is left.
    """

    def __init__(self, symbol: Symbol) -> None:
        kernels, columns = symbol.kernels, symbol.columns
        self.taps = symbol.taps
        self.rows = symbol.rows
        dimension, count = len(self.taps), math.prod(self.taps)
        shifts = _half_space(self.taps)
        self._shifts = torch.tensor(shifts, dtype=torch.float64, device=kernels.device)
        self._shifts = self._shifts.reshape(len(shifts), dimension)

        even, odd = [symbol.mean], []
        for shift in shifts[1:]:
            ahead, behind = kernels, kernels
            for axis, (s, t) in enumerate(zip(shift, self.taps, strict=True), start=3):
                ahead = ahead.narrow(axis, max(s, 0), t - abs(s))
                behind = behind.narrow(axis, max(-s, 0), t - abs(s))
            product = ahead.flatten(2) @ behind.flatten(2).mT
            even.append(product + product.mT)
            odd.append(product - product.mT)
        # Real and imaginary parts side by side: a frequency is one row of a matrix product.
        size = self.rows * self.rows
        self._basis = symbol.mean.new_zeros(len(kernels), len(even) + len(odd), size, 2)
        self._basis[:, : len(even), :, 0] = torch.stack(even, dim=1).flatten(2)
        if odd:
            self._basis[:, len(even) :, :, 1] = torch.stack(odd, dim=1).flatten(2)
        self._basis = self._basis.flatten(2)  # (problems, 2 H + 1, 2 m m)
        norm = torch.linalg.vector_norm
        shifted = [(e.flatten(1), o.flatten(1)) for e, o in zip(even[1:], odd, strict=True)]
        parts = [torch.hypot(norm(e, dim=1), norm(o, dim=1)) for e, o in shifted]  # 2 ||G_s||_F
        variation = torch.stack(parts).sum(dim=0) if parts else torch.zeros_like(symbol.sizes)

        reach = 2 * math.pi * sum(t - 1 for t in self.taps)
        relative = gamma(columns * count + len(even) + 4)
        relative += 2 * (dimension + 1) * UNIT_ROUNDOFF * reach + 8 * UNIT_ROUNDOFF
        squares = kernels.square().flatten(1).sum(dim=1)
        self.error = 4 * relative * count * squares + 1e-290
        self._variation = variation * (1.0 + 1e-9) + 2.0 * self.error

    @property
    def chunk(self) -> int:
        """How many matrices to ask for at once."""
        return max(1, CHUNK_BYTES // (16 * self.rows * self.rows))

    def variation(self, problem: Tensor, angle: Tensor) -> Tensor:
        """Bound of ``||G(w) - G(c)||`` where ``sum_j (taps_j - 1) / 2 |w_j - c_j| <= angle``.

        A pair of shifts ``s, -s`` changes by ``2 ||G_s|| |exp(-i <s, w - c>) - 1|`` at most, and
        ``|<s, w - c>| <= 2 angle``. Small for nearly orthogonal convolutions, whose ``G`` is nearly
        constant; elsewhere of no use.
        """
        return self._variation[problem] * (2.0 * angle * (1.0 + 1e-14)).clamp_max(2.0)

    def __call__(self, problem: Tensor, frequency: Tensor) -> Tensor:
        """Evaluate ``G`` of kernel ``problem[c]`` at ``frequency[c]``.

        Args:
            problem: ``(cells,)`` int64, in ascending order.
            frequency: ``(cells, d)``, entries in ``[-2 pi, 2 pi]``.

        Returns:
            ``(cells, m, m)`` complex128.
        """
        angle = frequency @ self._shifts.mT  # (cells, H + 1), the first one zero
        weight = torch.cat([angle.cos(), -angle[:, 1:].sin()], dim=1)
        parts = combine(self._basis, problem, weight).reshape(-1, self.rows, self.rows, 2)
        return torch.view_as_complex(parts)

    def proves(self, problem: Tensor, gram: Tensor, limit: Tensor) -> Tensor:
        """Whether it is proven that ``||G(w)|| <= limit``; see `proves_positive`.

        Args:
            problem: ``(cells,)`` int64.
            gram: ``(cells, m, m)``, as returned by a call; overwritten.
            limit: ``(cells,)`` float64, positive.

        Returns:
            ``(cells,)`` bool; false says nothing.
        """
        slack = factorisation_slack(self.rows, (self.rows + 1) * limit) + 2.0 * self.error[problem]
        shifted = gram.neg_()
        shifted.diagonal(dim1=-2, dim2=-1).add_(limit[:, None])
        return proves_positive(shifted, slack) & (limit > slack)


def _half_space(taps: Sequence[int]) -> list[tuple[int, ...]]:
    """Shifts between taps, one of each pair ``s, -s``, zero first."""
    shifts = itertools.product(*(range(1 - t, t) for t in taps))
    return sorted(s for s in shifts if s >= (0,) * len(taps))


def normalized_kernels(kernels: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """Scale kernels to entries of size one by a power of two that their owner has in common.

    Args:
        kernels: ``(problems, m, n, *taps)``, any real dtype.
        owner: ``(problems,)`` int64, the layer that each kernel belongs to.

    Returns:
        Float64 kernels with ``m <= n``, and the exponents ``(owners,)`` to scale back with.
    """
    kernels = kernels.to(torch.float64)
    least, most = torch.aminmax(kernels.flatten(1), dim=1)
    largest = torch.maximum(-least, most)
    owners = int(owner.max()) + 1
    largest = largest.new_zeros(owners).scatter_reduce(0, owner, largest, "amax")
    exponent = torch.frexp(largest).exponent
    if kernels.shape[1] > kernels.shape[2]:
        kernels = kernels.transpose(1, 2)
    shape = [-1] + [1] * (kernels.ndim - 1)
    return scale_by_power_of_two(kernels, -exponent[owner].reshape(shape)), exponent
