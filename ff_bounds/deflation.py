r"""Proofs of ``||K(w)|| <= sqrt(X)`` that cost a small matrix per frequency.

The large singular values of a trained kernel are few. Let ``Q`` ``(m, k)`` span about the space
where they live, for all frequencies at once, and let ``N`` be an orthonormal basis of the
complement of its range.

**Claim.** Let ``||N^H K(w)||**2 <= rho**2 < X``, ``v(w)`` any ``(k, m)`` matrix, ``C(w)`` any
``(k, k)`` matrix, ``G = K K^H`` and ``r = X v - v G``. If
``M = r v^H - (r - C Q^T)(r - C Q^T)^H / (X - rho**2)`` is positive definite, then
``||K(w)||**2 < X``.

Proof: the matrix ``[v; N^H] (X - G) [v^H, N]`` has the blocks ``r v^H``, ``r N`` and
``N^H (X - G) N >= X - rho**2``. It is positive definite if its Schur complement
``r v^H - r N (N^H (X - G) N)^-1 (r N)^H`` is, hence if ``r v^H - r N N^H r^H / (X - rho**2)`` is;
and ``r N = (r - C Q^T) N`` with ``||N|| = 1``. A positive definite ``B A B^H`` with square ``B``
makes ``B`` invertible and ``A`` positive definite. (``B = [v; N^H]`` is square if the columns of
``Q`` are independent; if not, it has more rows than columns, and ``B A B^H`` is singular.)

Here ``v = Q^T + w`` with ``w`` one step towards the vectors that make ``r N`` vanish, and both are
kernels with taps: ``v``, ``v G`` and all that is made of them are trigonometric polynomials,
computed once and evaluated at any frequency. Nothing is assumed about how well ``Q`` and ``w`` were
chosen; a bad choice proves less.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ff_bounds.positive import factorisation_slack, proves_positive
from ff_bounds.remainder import total_size
from ff_bounds.rounding import UNIT_ROUNDOFF, gamma
from ff_bounds.symbol import CHUNK_BYTES, Symbol, combine

_LEAST = 1e-100  # limit beside which the underflow of squares is nothing
_RELAXATION = 1.1  # of the step towards the invariant space: X / (X - a typical value of N^H G N)


class Deflation:
    """Tests of one layer's kernels at many frequencies, by the claim of this module.

    Args:
        symbol: kernels ``(problems, m, n, *taps)``, entries of size about one.
        basis: ``Q`` ``(problems, m, k)`` float64, nearly orthonormal.
        square: ``(problems,)`` about the largest ``||K(w)||**2``: what ``w`` is chosen for.
        remainder: ``(problems,)`` proven bound ``rho**2`` of ``||N^H K(w)||**2``; may be infinite.
        corrected: whether ``w`` is made; else it is zero.

    Attributes:
        works: ``(problems,)`` bool, where ``rho`` is small enough for anything to be proven.

    With the computed ``w``, ``d = v G - c Q^T``, ``c = v G Q``, ``C = X - c`` and ``y = X w - d``,

        ``M = X - c + y w^H - y y^H / (X - rho**2)``

    is a combination of the Hermitian polynomials ``w w^H``, ``w d^H + d w^H``, ``d d^H`` and ``c``,
    whose coefficients are ``(k, k)``.

    Rounding: ``|.|``, the sum of the Frobenius norms of a kernel's taps, bounds its norm at every
    frequency, and the composition of two kernels with ``t`` products a tap is off by
    ``gamma_t |a||b|``. So the errors of ``v K``, ``v G`` and ``d`` are followed in this order.
    What separates ``M`` from its computed value is the error of ``d``, that of the polynomials (as
    in `GramPolynomial`), and what vanishes but for rounding: ``Q^T Q - I``, ``w Q`` and ``d Q``.
    """

    def __init__(
        self,
        symbol: Symbol,
        basis: Tensor,
        square: Tensor,
        remainder: Tensor,
        *,
        corrected: bool = True,
    ) -> None:
        kernels, taps = symbol.kernels, symbol.taps
        problems, rows, columns = kernels.shape[:3]
        dimension, count, size = len(taps), math.prod(taps), basis.shape[2]
        frame = basis.mT.contiguous()  # (problems, k, m)
        self.works = remainder < square
        self._remainder = remainder
        self._basis = basis

        # Images have the layout (problems, *taps, k, m). The tap of v at exponent zero is Q^T.
        forward = symbol.by_tap.unbind(dim=1)
        backward = [tap.mT for tap in reversed(forward)]
        part = (frame @ kernels.flatten(2)).reshape(problems, size, columns, *taps)
        image = part.movedim((1, 2), (-2, -1))
        reach = [t - 1 if corrected else 0 for t in taps]  # of w, on either side
        if corrected:
            step, _ = _without(_compose(image, backward, taps), basis)
            scale = _RELAXATION / square.clamp_min(1e-200)
            step = step * scale.reshape(-1, *[1] * (dimension + 2))
        else:
            step = frame.new_zeros(problems, *[1] * dimension, size, rows)
        start = step.clone()
        start[_at(reach)] += frame
        image = _compose(start, forward, taps)
        gram = _compose(image, backward, taps)  # v G
        rest, inside = _without(gram, basis)

        sizes, frame_size = symbol.sizes, total_size(frame)
        image_error = gamma(rows * count * 3**dimension + 4) * total_size(start) * sizes
        gram_error = gamma(columns * count * 5**dimension + 4) * total_size(image) * sizes
        gram_error = gram_error + image_error * sizes
        projection = total_size(gram) + total_size(inside) * frame_size
        rest_error = gram_error + gamma(rows + size + 4) * (1.0 + frame_size**2) * projection

        self.rows = size
        self._step = Symbol(_as_kernel(step), [-r for r in reach])
        far = [1 - t - r for t, r in zip(taps, reach, strict=True)]
        self._shifts, self._even, self._odd = _polynomials(
            self._step, Symbol(_as_kernel(rest), far), Symbol(_as_kernel(inside), far)
        )

        identity = torch.eye(size, dtype=torch.float64, device=basis.device)
        skew = torch.linalg.matrix_norm(frame @ basis - identity) * (1.0 + 1e-10)
        leak = gamma(rows + 4) * frame_size
        wide = _spread(basis, dimension)
        step_size, rest_size = total_size(step), total_size(rest)
        self._skew = skew + leak * frame_size + total_size(step @ wide) + leak * step_size
        self._step_leak = total_size(step @ wide) + leak * step_size
        self._rest_leak = total_size(rest @ wide) + leak * rest_size + frame_size * rest_error
        self._step_size, self._rest_size, self._inside_size = (
            step_size,
            rest_size,
            total_size(inside),
        )
        self._rest_error = rest_error
        turns = 2 * math.pi * float(self._shifts.abs().amax(dim=0).sum())
        relative = gamma(rows + count * 4**dimension + len(self._shifts) + 16)
        relative = relative + 2 * (dimension + 2) * UNIT_ROUNDOFF * turns
        self._relative = 2 * len(self._shifts) * relative

    @property
    def chunk(self) -> int:
        """How many frequencies to ask for at once."""
        return max(1, CHUNK_BYTES // (16 * 6 * self.rows**2))

    def evaluate(self, problem: Tensor, frequency: Tensor) -> Tensor:
        """The polynomials ``w w^H``, ``w d^H + d w^H``, ``d d^H``, ``c``: ``(cells, 4, k, k)``."""
        angle = frequency @ self._shifts.mT
        real = combine(self._even, problem, angle.cos())
        imaginary = combine(self._odd, problem, -angle.sin())
        values = torch.complex(real, imaginary)
        return values.reshape(-1, 4, self.rows, self.rows)

    def certificate(self, problem: Tensor, values: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
        """The matrix ``M`` for the limit ``X``, and the proof.

        Args:
            problem: ``(cells,)`` int64.
            values: ``(cells, 4, k, k)`` as returned by `evaluate`.
            limit: ``(cells,)`` float64, ``X``.

        Returns:
            ``(cells, k, k)`` and ``(cells,)`` bool: whether ``||K(w)||**2 <= X`` is proven.
        """
        gap = limit - self._remainder[problem] * (1.0 + 1e-14)
        usable = (gap > 1e-3 * limit) & (limit > _LEAST)
        gap = torch.where(usable, gap, limit)
        factors = torch.stack(
            [limit - limit.square() / gap, limit / gap - 0.5, -1.0 / gap, -torch.ones_like(gap)],
            dim=1,
        )
        matrix = (factors[:, None].to(values.dtype) @ values.flatten(2))[:, 0]
        matrix = matrix.unflatten(1, (self.rows, self.rows))
        matrix.diagonal(dim1=-2, dim2=-1).add_(limit[:, None])
        trace = matrix.diagonal(dim1=-2, dim2=-1).real.clamp_min(0.0).sum(dim=-1)
        slack = self._slack(problem, limit, gap) + factorisation_slack(self.rows, trace)
        proven: Tensor = usable & proves_positive(matrix.clone(), slack)
        return matrix, proven

    def _slack(self, problem: Tensor, limit: Tensor, gap: Tensor) -> Tensor:
        """Bound ``(cells,)`` of all that separates ``M`` from its computed value."""
        step, rest, inside = (
            size[problem] for size in (self._step_size, self._rest_size, self._inside_size)
        )
        error = self._rest_error[problem]
        outer = limit * step + rest  # bounds |y|
        computed = limit * step.square() + step * rest + outer.square() / gap + inside + limit
        inherited = error * (step + 2.0 * outer / gap + error / gap)
        vanishing = (limit + inside) * self._skew[problem]
        vanishing = vanishing + limit * self._step_leak[problem] + self._rest_leak[problem]
        slack: Tensor = 4.0 * (8.0 * self._relative * computed + inherited + vanishing) + 1e-280
        return slack

    def lift(self, problem: Tensor, frequency: Tensor, vectors: Tensor) -> Tensor:
        """Vectors ``v^H x`` ``(cells, m)`` for ``x`` ``(cells, k)``, an eigenvector of ``M``."""
        row = vectors.conj()[:, None]
        frame = self._basis.mT.to(row.dtype)[problem] + self._step(problem, frequency)
        lifted: Tensor = (row @ frame)[:, 0].conj()
        return lifted


def _at(place: Iterable[int | slice]) -> tuple[int | slice, ...]:
    """The index of a tap, or of several, in all problems."""
    return (slice(None), *place)


def _spread(basis: Tensor, dimension: int) -> Tensor:
    """``(problems, m, k)`` with an axis for each axis of taps behind the first."""
    return basis.reshape(len(basis), *[1] * dimension, *basis.shape[1:])


def _as_kernel(image: Tensor) -> Tensor:
    return image.movedim((-2, -1), (1, 2)).contiguous()


def _without(image: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """``(image - c Q^T, c)`` with ``c = image Q`` at each tap."""
    basis = _spread(basis, image.ndim - 3)
    inside = image @ basis
    return image - inside @ basis.mT, inside


def _compose(image: Tensor, kernel: Sequence[Tensor], taps: tuple[int, ...]) -> Tensor:
    """Kernel of the product of two symbols.

    Args:
        image: ``(problems, *taps, k, m)``.
        kernel: its taps ``(problems, m, n)``.
        taps: the numbers of the kernel's taps per axis.

    Returns:
        ``(problems, *taps, k, n)``, with ``a + b - 1`` taps per axis.
    """
    dimension = image.ndim - 3
    first = image.shape[1 : 1 + dimension]
    sizes = [a + b - 1 for a, b in zip(first, taps, strict=True)]
    result = image.new_zeros(len(image), *sizes, image.shape[-2], kernel[0].shape[-1])
    rows = image.flatten(1, -2)
    for place, tap in zip(itertools.product(*map(range, taps)), kernel, strict=True):
        product = rows @ tap
        window = tuple(slice(p, p + a) for p, a in zip(place, first, strict=True))
        result[_at(window)] += product.reshape(len(image), *first, *result.shape[-2:])
    return result


def _polynomials(step: Symbol, rest: Symbol, inside: Symbol) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of ``w w^H``, ``w d^H + d w^H``, ``d d^H`` and the Hermitian part of ``c``.

    Trigonometric polynomials of degree ``g`` per axis with real coefficients are sampled at
    ``2 g + 1`` points per axis, of which half are enough, and transformed back by a matrix product.

    Returns:
        Shifts ``(H, d)`` float64, one of each pair ``s, -s``; ``(problems, H, 4 k k)`` coefficients
        of the cosines, and of minus ``i`` times the sines, of ``<s, w>``.
    """
    degrees = [(t - 1) for t in rest.taps]
    indices = itertools.product(*(range(-g, g + 1) for g in degrees))
    half = sorted(i for i in indices if i >= (0,) * len(degrees))
    shifts = torch.tensor(half, dtype=torch.float64, device=rest.kernels.device)
    steps = [2 * math.pi / (2 * g + 1) for g in degrees]
    points = shifts * torch.tensor(steps, dtype=torch.float64, device=shifts.device)
    twice = torch.full((len(half),), 2.0, dtype=torch.float64, device=shifts.device)
    twice[0] = 1.0
    angle = points @ shifts.mT  # (points, H)
    scale = twice[:, None] * twice / math.prod(2 * g + 1 for g in degrees)
    cosines, sines = angle.cos() * scale, -angle.sin() * scale
    chunk = max(1, CHUNK_BYTES // (16 * rest.rows * rest.columns))
    even = cosines.new_zeros(len(rest.kernels), len(half), 4 * rest.rows**2)
    odd = torch.zeros_like(even)
    for problem in range(len(even)):
        for part in torch.arange(len(half), device=shifts.device).split(chunk):
            chosen = torch.full_like(part, problem)
            w, d, c = (symbol(chosen, points[part]) for symbol in (step, rest, inside))
            mixed = w @ d.mH
            samples = [w @ w.mH, mixed + mixed.mH, d @ d.mH, 0.5 * (c + c.mH)]
            flat = torch.stack(samples, dim=1).flatten(1)
            even[problem] += cosines[part].mT @ flat.real
            odd[problem] += sines[part].mT @ flat.imag
    return shifts, even, odd
