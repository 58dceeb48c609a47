"""Proofs of ``||K(w)||**2 <= limit`` at many frequencies, the cheap ones first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ff_bounds.deflation import Deflation
from ff_bounds.peak import Peak, best_frequency
from ff_bounds.symbol import GramPolynomial, Symbol

_ASCENTS = 3  # alternating maximisations from a promising centre
_CLIMBS = (3, 32)  # promising centres of a layer to climb from in each round, at least and most
_FAILURES_PER_CLIMB = 12  # where many cells stay open, a better lower bound saves more
_IDLE_CLIMBS = 2  # in vain, before a climb needs a better reason than a failed proof
_SCREENING_STEPS = 3  # of power iteration at a centre
_COPIED = 0.2  # share of hopeless centres from which it costs less to copy the others
_GAIN = 1e-6  # a rise of the squared lower bound that is worth another try
_MARGIN = 1e-9  # below the target: whether a smaller cell could be closed at this centre


class NormTests:
    """Close cells by proofs at their centres; what fails gives vectors to climb from.

    Args:
        symbol: the kernels.
        peak: their lower bounds, which rise as better frequencies are met.
        deflations: tests that cost less, see `ff_bounds.directions.deflations`; the next is made
            when the one before is not good enough.

    Attributes:
        matrices: ``(layers,)`` int64, how many frequencies were tried.
    """

    def __init__(
        self, symbol: Symbol, peak: Peak, deflations: Sequence[Callable[[], Deflation]]
    ) -> None:
        self._ways = list(deflations)
        self._deflation = self._ways.pop(0)() if self._ways else None
        self.matrices = torch.zeros_like(peak.problem)
        self._symbol = symbol
        self._peak = peak
        self._gram: GramPolynomial | None = None
        self._known = peak.square
        self._idle = 0
        self._failures = 0
        self._candidates: list[tuple[Tensor, Tensor, Tensor]] = []
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(symbol.rows, 2, generator=generator, dtype=torch.float64)
        noise = 0.1 * noise / noise.norm()
        self._noise = torch.view_as_complex(noise).to(symbol.kernels.device)

    def close(
        self,
        problem: Tensor,
        frequency: Tensor,
        target: Callable[[], Tensor],
        limit: Callable[[Tensor, Tensor], Tensor],
        angle: Tensor,
    ) -> Tensor:
        """Try to prove ``||K(w)||**2 <= limit`` at each centre.

        Centres that beat a limit raise the lower bound of their layer, and with it the limits of
        the cells that failed, which are then tried again.

        Args:
            problem: ``(cells,)`` int64, ascending.
            frequency: ``(cells, d)``, the centres.
            target: ``(layers,)`` squared norms to be proven, which follow the lower bounds.
            limit: from cells and their target to what must be proven at the centre for that to
                hold in the cell; increasing, and at most the target.
            angle: ``(cells,)`` the cells' sizes, as `GramPolynomial.variation` takes them.

        Returns:
            ``(cells,)`` bool.
        """
        layer = self._peak.owner[problem]
        closed = torch.zeros(len(problem), dtype=torch.bool, device=problem.device)
        pending = torch.arange(len(problem), device=problem.device)
        self.matrices += torch.bincount(layer, minlength=len(self.matrices))
        while len(pending):
            hard, gained = pending, False
            while len(hard) and self._deflation is not None and not gained:
                hopeless = []
                for part in hard.split(self._deflation.chunk):
                    ceiling = target()[layer[part]]
                    closed[part], failed = self._try_deflated(
                        self._deflation,
                        problem[part],
                        frequency[part],
                        ceiling,
                        limit(part, ceiling),
                    )
                    hopeless.append(part[failed])
                hard = torch.cat(hopeless)
                gained = self._climb()
                if not self._ways:
                    break
                if len(hard) and not gained:
                    self._deflation = self._ways.pop(0)()
            if gained:
                pending = pending[~closed[pending]]
                continue
            if len(hard):
                for part in hard.split(self.gram.chunk):
                    ceiling = target()[layer[part]]
                    steady = ceiling - self.gram.variation(problem[part], angle[part])
                    wanted = torch.maximum(limit(part, ceiling), steady * (1.0 - 1e-15))
                    closed[part] = self._try(problem[part], frequency[part], wanted)
            pending = pending[~closed[pending]]
            if not self._climb():
                break  # the same limits would fail again
        return closed

    @property
    def gram(self) -> GramPolynomial:
        """The whole Gram matrix, made when it is first needed."""
        if self._gram is None:
            self._gram = GramPolynomial(self._symbol)
        return self._gram

    def _try_deflated(
        self,
        deflation: Deflation,
        problem: Tensor,
        frequency: Tensor,
        ceiling: Tensor,
        limit: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Which centres are proven, and at which of the others not even ``ceiling`` can be."""
        values = deflation.evaluate(problem, frequency)
        _, proven = deflation.certificate(problem, values, limit)
        failed = torch.nonzero(~proven)[:, 0]
        values = values[failed]
        ceiling = ceiling[failed] * (1.0 - _MARGIN)
        matrix, can_be = deflation.certificate(problem[failed], values, ceiling)
        hopeless = torch.zeros_like(proven)
        hopeless[failed[~can_be]] = True
        works = ~can_be & deflation.works[problem[failed]]
        if bool(works.any()):
            failed = failed[works]
            lowest, vectors = torch.linalg.eigh(matrix[works])
            left = deflation.lift(problem[failed], frequency[failed], vectors[..., 0])
            self._peak.offer(problem[failed], frequency[failed], left)
            self._add_candidates(problem[failed], left, -lowest[..., 0])
        return proven, hopeless

    def _try(self, problem: Tensor, frequency: Tensor, limit: Tensor) -> Tensor:
        """Try to prove ``||G|| <= limit`` at centres, by the whole Gram matrix."""
        peak = self._peak
        layer = peak.owner[problem]
        gram = self.gram(problem, frequency)
        # Where a Rayleigh quotient already exceeds the limit no proof can succeed.
        vector = peak.left[layer] + self._noise
        for _ in range(_SCREENING_STEPS):
            image = (gram @ vector[..., None])[..., 0]
            length = torch.linalg.vector_norm(image, dim=1, keepdim=True)
            vector, last = image / length.clamp_min(1e-300), vector
        square = last.abs().square().sum(dim=1).clamp_min(1e-300)
        estimate = (last.conj() * image).sum(dim=1).real / square
        hopeless = estimate > limit
        if bool(hopeless.any()):
            peak.offer(problem[hopeless], frequency[hopeless], vector[hopeless])
        if int(hopeless.sum()) > _COPIED * len(hopeless):
            proven = torch.zeros_like(hopeless)
            rest = ~hopeless
            proven[rest] = self.gram.proves(problem[rest], gram[rest], limit[rest])
        else:
            proven = self.gram.proves(problem, gram, limit)
        failed = torch.nonzero(~proven)[:, 0]
        self._add_candidates(problem[failed], vector[failed], estimate[failed])

        # Limits above the lower bound fail only where that is too low: find a better one.
        stuck = ~proven & (limit > peak.square[layer] * (1.0 + _MARGIN))
        for one in {int(layer[i]): int(i) for i in torch.nonzero(stuck)[:, 0]}.values():
            chosen = slice(one, one + 1)
            _, vectors = torch.linalg.eigh(self.gram(problem[chosen], frequency[chosen]))
            peak.offer(problem[chosen], frequency[chosen], vectors[..., -1])
        return proven

    def _add_candidates(self, problem: Tensor, left: Tensor, estimate: Tensor) -> None:
        """Keep the most promising centres to climb from."""
        self._failures += len(problem)
        few = min(len(problem), 2 * _CLIMBS[1] * len(self._peak.square))
        best = estimate.topk(few).indices
        self._candidates.append((problem[best], left[best], estimate[best]))

    def _climb(self) -> bool:
        """Ascend from the most promising centres; whether lower bounds rose since the last time."""
        peak = self._peak
        candidates, self._candidates = self._candidates, []
        climbs = self._failures // (_FAILURES_PER_CLIMB * len(peak.square))
        fewest = _CLIMBS[0] if self._deflation is None else 1  # whose vectors are nearly the best
        climbs = min(max(climbs, fewest), _CLIMBS[1])
        self._failures = 0
        if candidates and (self._idle < _IDLE_CLIMBS or climbs > fewest):
            problem, left, estimate = (torch.cat(part) for part in zip(*candidates, strict=True))
            chosen = []
            for _ in range(climbs if len(problem) else 0):
                best, found = peak.best_of_layers(problem, estimate)
                chosen.append(best[found])
                estimate[best[found]] = -math.inf
            if chosen:
                places = torch.cat(chosen).unique()
                places = places[problem[places].argsort()]
                problem, left = problem[places], left[places]
            if len(problem):
                frequency = peak.admissible(best_frequency(self._symbol, problem, left))
                new = ~peak.is_known(problem, frequency)
                if bool(new.any()):
                    peak.ascend(problem[new], left[new], _ASCENTS, frequency[new])
        gained = bool((peak.square > self._known * (1.0 + _GAIN)).any())
        self._known = peak.square
        self._idle = 0 if gained else self._idle + bool(candidates)
        return gained
