r"""Branch and bound over the frequency torus: ``sigma* = sup_w ||K(w)||``, proven to a tolerance.

**Cell bound.** Let ``w*`` attain ``sigma*`` and let ``r_j = (taps_j - 1) / 2``. If ``w*`` lies in a
cell around ``c`` in which ``sum_j r_j |w_j - c_j| <= t < pi / 2``, then
``sigma* <= ||K(c)|| / cos t``.

Proof: with singular vectors ``x, y`` of ``K(w*)`` and the taps centred (a phase factor, which
changes no norm), ``f(s) = Re(x^H K(w* + s d) y)`` is a real function of exponential type
``tau = sum_j r_j |d_j|`` with ``|f| <= sigma* = f(0)``. Then ``f(s) >= sigma* cos(tau s)`` for
``|tau s| <= pi``, and ``||K(c)|| >= f`` there.

So cells that cover the torus (half of it, as ``K(-w)`` is the conjugate of ``K(w)``) prove
``sigma* <= U`` as soon as ``||K(c)|| <= U cos t`` is proven at each centre. ``U`` is ``1 + tol``
times the best lower bound found so far, and a cell whose centre fails is split. What is proven at a
centre stays so when ``U`` grows.

References:
    R. J. Duffin, A. C. Schaeffer, Some properties of functions of exponential type, Bulletin of
    the AMS 44 (1938), for the inequality (trigonometric polynomials: M. Riesz, 1914).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ff_bounds.cells import first_cells
from ff_bounds.rounding import gamma
from ff_bounds.symbol import GramPolynomial

_FIRST_ANGLE = 0.6  # about the angle t of the first cells
_ASCENTS = 8  # alternating maximisations from the start
_COVERS = 8  # times the first cells: a search may always visit so many
_CLIMBS = 3  # promising centres of each level to climb from
_LATER_ASCENTS = 3  # alternating maximisations from each
_SCREENING_STEPS = 3  # of the Lanczos process at a centre
_CLIMBING_STEPS = 8  # of the Lanczos process in an ascent
_SLACK = 1e-9  # part of the tolerance kept for rounding the bracket outwards
_NEGLIGIBLE = 1e-200  # a squared norm that counts as zero beside entries of size one


@dataclass(frozen=True)
class Supremum:
    """Brackets of ``sigma*`` of several layers, and where they come from.

    Attributes:
        lower: ``(layers,)`` proven lower bounds.
        upper: ``(layers,)`` proven upper bounds.
        frequency: ``(layers, d)`` where the lower bound is attained.
        problem: ``(layers,)`` index of the kernel (group) that attains it.
        left: ``(layers, m)`` complex unit vectors with ``||K(frequency)^H left|| = lower``, nearly.
        matrices: how many matrices were visited, for all layers together.
    """

    lower: Tensor
    upper: Tensor
    frequency: Tensor
    problem: Tensor
    left: Tensor
    matrices: int


def branch_and_bound(
    gram: GramPolynomial, owner: Tensor, tolerance: float, max_matrices: int
) -> Supremum:
    """Bracket the largest ``||K(w)||`` of each layer over its kernels and all frequencies.

    Args:
        gram: the kernels.
        owner: ``(problems,)`` ascending, the layer of each kernel.
        tolerance: relative gap to reach, at least 1e-6.
        max_matrices: a split that would take the search beyond so many (and beyond a few times
            the first cover) is not made; the tolerance is doubled instead, until the cells at
            hand close. The bracket then tells the gap that was reached.
    """
    search = _Search(gram, owner, tolerance)
    problems = torch.arange(len(owner), device=owner.device)
    search.ascend(problems, _start(gram), _ASCENTS)

    centres, offsets, angle = first_cells(gram.taps, _FIRST_ANGLE, owner.device)
    problem = problems.repeat_interleave(len(centres))
    centre = centres.repeat(len(owner), 1)
    max_matrices = max(max_matrices, _COVERS * len(problem))
    while True:
        closed = search.close(problem, centre, angle)
        problem, centre = problem[~closed], centre[~closed]
        if not len(problem):
            break
        search.climb()
        if search.matrices + len(problem) * len(offsets) > max_matrices:
            search.tolerance *= 2.0  # and try the same cells again
            continue
        problem = problem.repeat_interleave(len(offsets))
        centre = (centre[:, None] + offsets).flatten(0, 1)
        offsets, angle = offsets / 2, angle / 2
    return search.result()


class _Search:
    """The state of a branch and bound: the best lower bound of each layer."""

    def __init__(self, gram: GramPolynomial, owner: Tensor, tolerance: float) -> None:
        self.gram = gram
        self.owner = owner
        self.tolerance = tolerance
        self.matrices = 0
        self._candidates: list[tuple[Tensor, Tensor, Tensor]] = []
        layers = int(owner.max()) + 1
        device = owner.device
        self._square = torch.zeros(layers, dtype=torch.float64, device=device)
        self._problem = torch.zeros(layers, dtype=torch.int64, device=device)
        self._frequency = torch.zeros(layers, len(gram.taps), dtype=torch.float64, device=device)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(gram.rows, 2, generator=generator, dtype=torch.float64)
        self._noise = 0.1 * _unit(torch.view_as_complex(noise).to(device))
        self._left = torch.zeros(layers, gram.rows, dtype=torch.complex128, device=device)

    def target(self) -> Tensor:
        """``U**2`` of each layer: what is to be proven."""
        factor = ((1.0 + self.tolerance) * (1.0 - _SLACK)) ** 2
        return (self._square * factor).clamp_min(_NEGLIGIBLE)

    def close(self, problem: Tensor, frequency: Tensor, angle: float) -> Tensor:
        """Try to close cells of one size: ``(cells,)`` bool.

        Centres that beat a limit raise the lower bound of their layer, and with it the limits of
        the cells that failed, which are then tried again.
        """
        # The centres, built from pi by a few sums, are off by less than 1e-14 along each axis.
        radius = sum((taps - 1) / 2 for taps in self.gram.taps)
        shrink = math.cos(angle * (1.0 + 1e-12) + 1e-14 * radius) ** 2 * (1.0 - 1e-14)
        closed = torch.zeros(len(problem), dtype=torch.bool, device=problem.device)
        pending = torch.arange(len(problem), device=problem.device)
        self._candidates = []
        while len(pending):
            before = self._square.clone()
            for part in pending.split(self.gram.chunk):
                closed[part] = self._try(problem[part], frequency[part], shrink)
            pending = pending[~closed[pending]]
            if not bool((self._square > before * (1.0 + 1e-6)).any()):
                break  # the same limits would fail again
        return closed

    def climb(self) -> None:
        """Ascend from the most promising centre of each layer that the last `close` failed at."""
        problem, vector, estimate = (
            torch.cat(part) for part in zip(*self._candidates, strict=True)
        )
        chosen = []
        for _ in range(_CLIMBS):
            best, found = self._best_of_layers(problem, estimate)
            chosen.append(best[found])
            estimate[best[found]] = -math.inf
        places = torch.cat(chosen).unique()
        places = places[problem[places].argsort()]
        self.ascend(problem[places], vector[places], _LATER_ASCENTS)

    def _best_of_layers(self, problem: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """For each layer the place of its largest value, and whether it has one."""
        layer = self.owner[problem]
        largest = torch.full_like(self._square, -math.inf).scatter_reduce(0, layer, value, "amax")
        place = torch.arange(len(problem), device=problem.device)
        place = torch.where(value == largest[layer], place, -1)
        best = torch.full_like(self._problem, -1).scatter_reduce(0, layer, place, "amax")
        return best.clamp_min(0), best >= 0

    def _try(self, problem: Tensor, frequency: Tensor, shrink: float) -> Tensor:
        """Try to prove ``||G|| <= shrink U**2`` for a chunk of centres."""
        self.matrices += len(problem)
        layer = self.owner[problem]
        gram = self.gram(problem, frequency)
        limit = self.target()[layer] * shrink
        # Where a Rayleigh quotient already exceeds the limit no proof can succeed.
        vector = _unit(self._left[layer] + self._noise)
        vector, estimate = _top_eigenpair(gram, vector, _SCREENING_STEPS)
        hopeless = estimate > limit
        if bool(hopeless.any()):
            self._offer(problem[hopeless], frequency[hopeless], vector[hopeless])
        proven = torch.zeros_like(hopeless)
        proven[~hopeless] = self.gram.proves(problem[~hopeless], gram[~hopeless], limit[~hopeless])

        failed = torch.nonzero(~proven)[:, 0]
        few = min(len(failed), 2 * _CLIMBS * len(self._square))
        failed = failed[estimate[failed].topk(few).indices]
        self._candidates.append((problem[failed], vector[failed], estimate[failed]))

        # Limits above the lower bound fail only where that is too low: find a better one.
        stuck = ~proven & (limit > self._square[layer] * (1.0 + _SLACK))
        for one in {int(layer[i]): int(i) for i in torch.nonzero(stuck)[:, 0]}.values():
            chosen = slice(one, one + 1)
            _, vectors = torch.linalg.eigh(self.gram(problem[chosen], frequency[chosen]))
            self._offer(problem[chosen], frequency[chosen], vectors[..., -1])
        return proven

    def ascend(self, problem: Tensor, left: Tensor, steps: int) -> None:
        """Climb from vectors ``(cells, m)``: best frequency for the vector, and back again."""
        for _ in range(steps):
            frequency = _best_frequency(self.gram, problem, left)
            gram = self.gram(problem, frequency)
            left, _ = _top_eigenpair(gram, left, _CLIMBING_STEPS)
        self._offer(problem, frequency, left)

    def _offer(self, problem: Tensor, frequency: Tensor, left: Tensor) -> None:
        """Raise lower bounds by Rayleigh quotients ``left^H G(frequency) left``, rounded down."""
        gram = self.gram(problem, frequency)
        image = (gram @ left[..., None])[..., 0]
        square = (left.conj() * image).sum(dim=1).real / left.abs().square().sum(dim=1)
        # Rounding of the quotient: |x|^T |G| |x| <= ||G||_F for a unit vector. NaN: a zero vector.
        rounding = 2.0 * gamma(4 * (self.gram.rows + 8)) * torch.linalg.matrix_norm(gram)
        square = square - rounding - 2.0 * self.gram.error[problem]
        square = square.nan_to_num(nan=-math.inf)
        best, found = self._best_of_layers(problem, square)
        raised = found & (square[best] > self._square)
        self._square = torch.where(raised, square[best], self._square)
        self._problem = torch.where(raised, problem[best], self._problem)
        self._frequency = torch.where(raised[:, None], frequency[best], self._frequency)
        self._left = torch.where(raised[:, None], left[best], self._left)

    def result(self) -> Supremum:
        """Bracket, rounded outwards."""
        lower = self._square.sqrt() * (1.0 - 1e-15)
        upper = self.target().sqrt() * (1.0 + 1e-15)
        return Supremum(lower, upper, self._frequency, self._problem, self._left, self.matrices)


def _start(gram: GramPolynomial) -> Tensor:
    """Return vectors ``(problems, m)`` to climb from, favoured by the mean over all frequencies."""
    generator = torch.Generator().manual_seed(0)
    problems, device = len(gram.kernels), gram.kernels.device
    noise = torch.randn(problems, gram.rows, 1, generator=generator, dtype=torch.float64)
    vector = noise.to(device)
    flat = gram.kernels.flatten(2)
    for _ in range(3):
        vector = flat @ (flat.mT @ vector)
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return vector[..., 0].to(torch.complex128)


def _best_frequency(gram: GramPolynomial, problem: Tensor, left: Tensor) -> Tensor:
    """Return frequencies ``(cells, d)`` that nearly maximise ``||left^H K(w)||``."""
    taps = gram.taps
    dimension = len(taps)
    if dimension == 0:
        return torch.zeros(len(problem), 0, dtype=torch.float64, device=problem.device)
    rows = left.conj()[:, None]
    flat = gram.kernels[problem].flatten(2).to(rows.dtype)
    image = (rows @ flat).reshape(len(problem), -1, *taps)  # (cells, n, *taps)
    size = 4 * max(taps)
    axes = tuple(range(2, 2 + dimension))
    power = torch.fft.fftn(image, s=(size,) * dimension, dim=axes).abs().square().sum(dim=1)
    peak = power.flatten(1).argmax(dim=1)
    digits = [(peak // size**k) % size for k in reversed(range(dimension))]
    frequency = torch.stack(digits, dim=1).to(torch.float64) * (2 * math.pi / size)

    grid = torch.cartesian_prod(*(torch.arange(t, dtype=torch.float64) for t in taps))
    places = grid.reshape(-1, dimension).to(frequency)
    image = image.flatten(2)
    for width in (math.pi / size, 0.3 * math.pi / size, 0.1 * math.pi / size):
        values = []
        for axis, step in itertools.product(range(dimension), (-width, 0.0, width)):
            moved = frequency.clone()
            moved[:, axis] += step
            phase = torch.exp(-1j * (moved @ places.mT))[..., None]
            values.append((image @ phase)[..., 0].abs().square().sum(dim=1))
        for axis in range(dimension):  # the vertex of a parabola, at most one width away
            low, middle, high = values[3 * axis : 3 * axis + 3]
            bend = (2 * middle - low - high).clamp_min(1e-300)
            frequency[:, axis] += width * (0.5 * (high - low) / bend).clamp(-1.0, 1.0)
    return frequency.remainder(2 * math.pi)


def _top_eigenpair(gram: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Estimate the largest eigenvalue and its vector by some steps of the Lanczos process.

    Args:
        gram: ``(cells, m, m)`` positive semidefinite.
        start: ``(cells, m)`` unit vectors.
        steps: dimension of the Krylov space.

    Returns:
        Unit vectors ``(cells, m)`` and their Rayleigh quotients ``(cells,)``.
    """
    basis = [start[..., None]]
    images = [gram @ basis[0]]
    for _ in range(min(steps, gram.shape[-1]) - 1):
        space = torch.cat(basis, dim=-1)
        fresh = images[-1]
        for _ in range(2):  # twice is enough to be orthogonal
            fresh = fresh - space @ (space.mH @ fresh)
        size = fresh.norm(dim=-2, keepdim=True)
        exhausted = size <= 1e-12 * images[-1].norm(dim=-2, keepdim=True)  # only rounding is left
        fresh = torch.where(exhausted, 0.0, fresh / size.clamp_min(1e-300))
        basis.append(fresh)
        images.append(gram @ fresh)
    space, image = torch.cat(basis, dim=-1), torch.cat(images, dim=-1)
    values, vectors = torch.linalg.eigh(space.mH @ image)
    return _unit((space @ vectors[..., -1:])[..., 0]), values[..., -1]


def _unit(vector: Tensor) -> Tensor:
    unit: Tensor = vector / vector.norm(dim=-1, keepdim=True).clamp_min(1e-300)
    return unit
