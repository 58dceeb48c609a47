"""Where the symbol of a convolution is largest: lower bounds of its norm, found by ascent.

A frequency and a unit vector ``left`` prove ``sigma* >= ||left^H K(w)||``, however they were found.
They are found by alternating maximisation: the best frequency for the vector, and back again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ff_bounds.lanczos import top_eigenpair
from ff_bounds.rounding import gamma
from ff_bounds.symbol import Symbol

_STEPS = 8  # of the Lanczos process at each new frequency
_DIRECT = 24  # rows up to which eigh is quicker
_STEPS_WITHOUT_TAPS = 64  # where there is only one frequency
_NEXT = 0.1  # radians within which ascents are taken to end at the same peak
_STANDSTILL = 1e-5  # relative gain of the squared norm
_COMPRESSED = 64  # rows above which a search starts from a few combinations of them
_COMBINATIONS = 24
_COMPRESSED_ASCENTS = 3  # with a few combinations
_FULL_ASCENTS = 3  # and then with all rows


class Peak:
    """The best proven lower bound of each layer: the largest over its kernels and frequencies.

    Args:
        symbol: kernels with ``m <= n``.
        owner: ``(problems,)`` ascending, the layer of each kernel.

    Attributes:
        square: ``(layers,)`` proven lower bounds of ``sigma***2``.
        problem: ``(layers,)`` the kernel that attains it.
        frequency: ``(layers, d)`` where.
        left: ``(layers, m)`` complex unit vectors with ``||left^H K(frequency)||**2 = square``.
    """

    def __init__(self, symbol: Symbol, owner: Tensor) -> None:
        self.symbol = symbol
        self.owner = owner
        layers, device = int(owner.max()) + 1, owner.device
        self.square = torch.zeros(layers, dtype=torch.float64, device=device)
        self.problem = torch.zeros(layers, dtype=torch.int64, device=device)
        self.frequency = self.square.new_zeros(layers, len(symbol.taps))
        self.left = torch.zeros(layers, symbol.rows, dtype=torch.complex128, device=device)
        self._tops: list[tuple[Tensor, Tensor]] = []
        # A layer whose every kernel is zero: any kernel of it will do.
        self.problem.scatter_(0, owner, torch.arange(len(owner), device=device))

    def search(self, steps: int) -> None:
        """Climb from vectors that the mean over all frequencies favours, one for each kernel.

        Large kernels are first compressed to a few combinations of their rows, those in which the
        mean of ``K K^H`` is largest: all of these are climbed from, and the best is taken over.
        """
        problems = torch.arange(len(self.owner), device=self.owner.device)
        if not self.symbol.taps:
            left, _ = top_eigenpair(self.symbol.mean, self._start(), _STEPS_WITHOUT_TAPS, 1e-6)
            frequency = self.frequency.new_zeros(len(problems), 0)
            self.offer(problems, frequency, left.to(torch.complex128))
            return
        basis = self.symbol.leading[1][..., :_COMBINATIONS]  # (problems, m, k)
        if self.symbol.rows <= _COMPRESSED:
            self.ascend(problems, basis[..., 0].to(torch.complex128), steps)
            return
        count = basis.shape[2]
        kernels = basis.mT @ self.symbol.kernels.flatten(2)
        small = Symbol(kernels.unflatten(2, self.symbol.kernels.shape[2:]))
        left = torch.eye(count, dtype=torch.complex128, device=basis.device)
        peak = Peak(small, problems)
        peak.ascend(
            problems.repeat_interleave(count), left.repeat(len(problems), 1), _COMPRESSED_ASCENTS
        )
        left = (basis.to(peak.left.dtype) @ peak.left[..., None])[..., 0]
        self.ascend(problems, left, _FULL_ASCENTS, peak.frequency)

    def _start(self) -> Tensor:
        """Vectors ``(problems, m)`` without structure, the same at each run."""
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(self.symbol.rows, generator=generator, dtype=torch.float64)
        return start.to(self.owner.device).expand(len(self.owner), -1)

    def admissible(self, frequency: Tensor) -> Tensor:
        """The frequencies themselves, or the nearest ones that count."""
        return frequency

    def ascend(
        self, problem: Tensor, left: Tensor, steps: int, frequency: Tensor | None = None
    ) -> None:
        """Climb from vectors ``(cells, m)``, the first time at the given frequencies, if any.

        No more than so many ``steps``, and fewer where the last has changed nothing.
        """
        reached = torch.zeros_like(problem, dtype=torch.float64)
        for step in range(steps):
            if step or frequency is None:
                frequency = self.admissible(best_frequency(self.symbol, problem, left))
            symbol = self.symbol(problem, frequency)

            left, value = _improve(left, symbol)
            if bool((value <= reached * (1.0 + _STANDSTILL)).all()):
                break
            reached = value
        if frequency is not None:
            self.offer(problem, frequency, left)
            self._tops.append((problem, left))

    def tops(self, count: int) -> Tensor:
        """Vectors ``(problems, m, count)`` where ascents last ended, zeros if they were fewer."""
        tops = self.left.new_zeros(len(self.owner), count, self.symbol.rows)
        places = [0] * len(self.owner)
        for problems, left in reversed(self._tops):
            for index, vector in zip(problems.tolist(), left, strict=True):
                if places[index] < count:
                    tops[index, places[index]] = vector
                    places[index] += 1
        return tops.mT

    def is_known(self, problem: Tensor, frequency: Tensor) -> Tensor:
        """Whether frequencies ``(cells, d)`` are next to where the lower bound was found."""
        layer = self.owner[problem]
        known, turn = self.frequency[layer], 2.0 * math.pi
        away = [
            (difference.remainder(turn) - math.pi).abs().sub(math.pi).abs().amax(dim=1)
            for difference in (frequency - known, frequency + known)
        ]
        near: Tensor = torch.minimum(*away) < _NEXT
        return near & (problem == self.problem[layer])

    def offer(self, problem: Tensor, frequency: Tensor, left: Tensor) -> None:
        """Raise lower bounds by ``||left^H K(frequency)||``, rounded down.

        The rounding of the product with ``left`` is below that of ``m`` terms, and `Symbol.error`
        covers the rest.
        """
        frequency = self.admissible(frequency)
        rows = self.symbol.rows_at(problem, left)
        phase = torch.exp(-1j * (frequency @ self.symbol.places.mT))[:, None]
        norm = torch.linalg.vector_norm((phase @ rows)[:, 0], dim=1)
        length = torch.linalg.vector_norm(left, dim=1)
        roundings = gamma(8 * (self.symbol.rows + self.symbol.columns + 8))
        error = self.symbol.error + roundings * self.symbol.sizes
        lower = (norm / length - 2.0 * error[problem]).clamp_min(0.0)
        square = (lower.square() * (1.0 - 1e-15)).nan_to_num(nan=-math.inf)  # NaN: a zero vector
        best, found = self.best_of_layers(problem, square)
        raised = found & (square[best] > self.square)
        self.square = torch.where(raised, square[best], self.square)
        self.problem = torch.where(raised, problem[best], self.problem)
        self.frequency = torch.where(raised[:, None], frequency[best], self.frequency)
        self.left = torch.where(raised[:, None], left[best], self.left)

    def best_of_layers(self, problem: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """For each layer the place of its largest value, and whether it has one."""
        layer = self.owner[problem]
        value = value.nan_to_num(nan=-math.inf)
        largest = torch.full_like(self.square, -math.inf).scatter_reduce(0, layer, value, "amax")
        place = torch.arange(len(problem), device=problem.device)
        place = torch.where(value == largest[layer], place, -1)
        best = torch.full_like(self.problem, -1).scatter_reduce(0, layer, place, "amax")
        return best.clamp_min(0), best >= 0


def _improve(left: Tensor, symbol: Tensor) -> tuple[Tensor, Tensor]:
    """Approximate top left singular vectors of ``(cells, m, n)`` matrices, and squared norms."""
    if symbol.shape[1] <= _DIRECT:
        values, vectors = torch.linalg.eigh(symbol @ symbol.mH)
        return vectors[..., -1], values[..., -1]

    def gram(vector: Tensor) -> Tensor:
        row = vector.conj()[:, None] @ symbol  # (K^H v)^H: the matrix itself is not conjugated
        image: Tensor = symbol @ row.mH
        return image[..., 0]

    return top_eigenpair(gram, left, _STEPS)


def best_frequency(symbol: Symbol, problem: Tensor, left: Tensor) -> Tensor:
    """Return frequencies ``(cells, d)`` that nearly maximise ``||left^H K(w)||``.

    Its square is the form ``p^H F p`` of the phases ``p`` of the taps: a grid, then parabolas.
    """
    dimension = len(symbol.taps)
    if dimension == 0:
        return left.real.new_zeros(len(problem), 0)
    rows = symbol.rows_at(problem, left)  # (cells, taps, n)
    form = rows.conj() @ rows.mT  # (cells, taps, taps)

    def power(frequency: Tensor) -> Tensor:
        phases = torch.exp(-1j * (frequency @ symbol.places.mT))  # (..., points, taps)
        values: Tensor = ((phases.conj() @ form) * phases).sum(dim=-1).real
        return values

    size = 4 * max(symbol.taps)
    line = torch.arange(size, dtype=torch.float64, device=left.device) * (2 * math.pi / size)
    grid = torch.cartesian_prod(*[line] * dimension).reshape(-1, dimension)
    frequency = grid[power(grid).argmax(dim=1)]

    # The vertex of a parabola through three points along each axis, at most one width away.
    steps = torch.eye(dimension, dtype=torch.float64, device=left.device)
    steps = torch.cat([torch.zeros_like(steps[:1]), steps, -steps])
    for width in (math.pi / size, 0.3 * math.pi / size, 0.1 * math.pi / size):
        values = power(frequency[:, None] + width * steps)  # (cells, 1 + 2 d)
        middle, high, low = values.split([1, dimension, dimension], dim=1)
        bend = (2 * middle - low - high).clamp_min(1e-300)
        frequency = frequency + width * (0.5 * (high - low) / bend).clamp(-1.0, 1.0)
    return frequency.remainder(2 * math.pi)
