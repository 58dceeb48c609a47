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

from dataclasses import dataclass

import torch
from torch import Tensor

from ff_bounds.cells import first_cells
from ff_bounds.directions import deflations
from ff_bounds.norm_tests import NormTests
from ff_bounds.peak import Peak
from ff_bounds.symbol import Symbol

_ASCENTS = 8  # alternating maximisations from the start
_FIRST_ANGLE = 0.6  # about the angle t of the first cells
_FIRST_ANGLE_DEFLATED = 0.3  # where a centre costs little
_COVERS = 8  # times the first cells: a search may always visit so many
_COARSE = 0.1  # tolerance where a bound need not be sharp
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
        matrices: ``(layers,)`` int64, how many centres were visited.
    """

    lower: Tensor
    upper: Tensor
    frequency: Tensor
    problem: Tensor
    left: Tensor
    matrices: Tensor


def branch_and_bound(
    kernels: Tensor, owner: Tensor, tolerance: float, max_matrices: int, *, deflates: bool = True
) -> Supremum:
    """Bracket the largest ``||K(w)||`` of each layer over its kernels and all frequencies.

    Args:
        kernels: ``(problems, m, n, *taps)`` as from `normalized_kernels`.
        owner: ``(problems,)`` ascending, the layer of each kernel.
        tolerance: relative gap to reach, at least 1e-6.
        max_matrices: a split that would take the search for a layer beyond so many (and beyond a
            few times the first cover) is not made; the layer's tolerance is doubled instead, until
            the cells at hand close. The bracket then tells the gap that was reached.
        deflates: whether to try the cheaper test of `ff_bounds.deflation` first.
    """
    symbol = Symbol(kernels)
    peak = Peak(symbol, owner)
    peak.search(_ASCENTS)
    ways = deflations(symbol, peak, _coarse_bound) if deflates else []
    tests = NormTests(symbol, peak, ways)
    tolerances = torch.full_like(peak.square, tolerance)

    def target() -> Tensor:
        """``U**2`` of each layer: what is to be proven."""
        return (peak.square * ((1.0 + tolerances) * (1.0 - _SLACK)).square()).clamp_min(_NEGLIGIBLE)

    first = _FIRST_ANGLE_DEFLATED if ways else _FIRST_ANGLE
    centres, offsets, angle = first_cells(symbol.taps, first, owner.device)
    # ``||K(w)|| <= sum_a ||K_a||_F``, which may be enough for groups that are small beside others.
    large = torch.nonzero(~(symbol.sizes < target().sqrt()[owner] * (1.0 - 1e-15)))[:, 0]
    problem = large.repeat_interleave(len(centres))
    cells = _Cells(problem, centres.repeat(len(large), 1), torch.zeros_like(problem))
    visits = torch.bincount(owner[problem], minlength=len(tolerances))
    largest = (_COVERS * visits).clamp_min(max_matrices)
    # The centres, built from pi by a few sums, are off by less than 1e-14 along each axis.
    blur = 1e-14 * sum((taps - 1) / 2 for taps in symbol.taps)
    crude = torch.zeros_like(peak.square).scatter_reduce(0, owner, symbol.sizes, "amax")
    while len(cells.problem):
        half_width = angle * (1.0 + 1e-12) * 0.5**cells.level + blur
        shrink = half_width.cos().square() * (1.0 - 1e-14)

        def limit(part: Tensor, square: Tensor, shrink: Tensor = shrink) -> Tensor:
            return shrink[part] * square

        closed = tests.close(cells.problem, cells.centre, target, limit, half_width)
        trivial = ~(target().sqrt() * (1.0 - 1e-15) < crude)
        cells = cells.chosen(~(closed | trivial[owner[cells.problem]]))
        layer = owner[cells.problem]
        visits = tests.matrices + len(offsets) * torch.bincount(layer, minlength=len(tolerances))
        stays = visits > largest  # with a larger tolerance, the same cells are tried again
        tolerances = torch.where(stays, 2.0 * tolerances, tolerances)
        cells = cells.split(offsets, ~stays[layer])

    lower = peak.square.sqrt() * (1.0 - 1e-15)
    upper = torch.fmin(target().sqrt() * (1.0 + 1e-15), crude)
    return Supremum(lower, upper, peak.frequency, peak.problem, peak.left, tests.matrices)


def _coarse_bound(kernels: Tensor) -> Tensor:
    """Bounds ``(problems,)`` of ``sigma*`` to within `_COARSE`."""
    owner = torch.arange(len(kernels), device=kernels.device)
    return branch_and_bound(kernels, owner, _COARSE, 1, deflates=False).upper


@dataclass(frozen=True)
class _Cells:
    """Cells by their problem (in ascending order), centre and how often they were split."""

    problem: Tensor
    centre: Tensor
    level: Tensor

    def chosen(self, mask: Tensor) -> _Cells:
        return _Cells(self.problem[mask], self.centre[mask], self.level[mask])

    def split(self, offsets: Tensor, mask: Tensor) -> _Cells:
        """Split the cells of ``mask``; the others stay as they are."""
        whole, old, parts = self.chosen(~mask), self.chosen(mask), len(offsets)
        moved = old.centre[:, None] + offsets * (0.5**old.level)[:, None, None]
        problem = torch.cat([whole.problem, old.problem.repeat_interleave(parts)])
        order = problem.argsort(stable=True)
        centre = torch.cat([whole.centre, moved.flatten(0, 1)])
        level = torch.cat([whole.level, old.level.repeat_interleave(parts) + 1])
        return _Cells(problem[order], centre[order], level[order])
