r"""Proofs of norms by factorisations on a grid of frequencies, refined where it must be.

Let ``w*`` be where ``||K(w)||`` is largest, in a cell around ``c`` in which
``t = sum_j (T_j - 1) / 2 |w_j - c_j| < pi / 2`` for ``T_j`` taps along axis ``j``. Then
``||K(w*)|| <= ||K(c)|| / cos t`` (Duffin & Schaeffer 1938). So a bound ``U`` is proven if cells
cover all frequencies, half of them as ``K(-w)`` is the conjugate of ``K(w)``, and
``||K(c)|| <= U cos t`` in each; a cell where that fails is split. With ``s = U cos t`` a Cholesky
factorisation of ``s^2 I - K K^H`` proves it: where LAPACK's succeeds, no eigenvalue is below
``-gamma_{n+1}`` times the trace (Rump 2006). A matrix has one frequency.

References:
    R. J. Duffin, A. C. Schaeffer, Some properties of functions of exponential type, Bulletin of
    the AMS 44 (1938).
    S. M. Rump, Verification of positive definiteness, BIT 46 (2006).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from certify.operators import Convolution, Weighted

MOST = 40_000
"""Factorisations for one bound, beyond which nothing is proven."""

_UNIT = 2.0**-53
_CHUNK = 2**21  # entries of the matrices that are factorised together
_SMALLEST = 2.0**-900  # nothing is proven about bounds below


def lattice_norm_at_most(kernel: Tensor, bound: float, most: int = MOST) -> bool:
    """Whether it is proven that the norm on the infinite lattice is at most ``bound``.

    Args:
        kernel: ``(groups, m, n, *taps)`` float64; a matrix is ``(1, m, n)``.
        bound: what is claimed.
        most: factorisations that may be tried.
    """
    kernel = kernel.detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(kernel).all()):
        return False
    largest = kernel.abs().amax().item() if kernel.numel() else 0.0
    if largest == 0.0:
        return bound >= 0.0
    if not (_SMALLEST < bound < math.inf and largest > _SMALLEST):
        return False
    scale = 2.0 ** -math.frexp(largest)[1]  # a power of two: exact
    limit = bound * scale
    if not limit < 2.0**100:  # far above any norm of entries up to one
        return kernel.numel() < 2.0**90
    for group in kernel * scale:
        tried = _tried(group, limit, most)
        if tried is None:
            return False
        most -= tried
    return True


def _tried(kernel: Tensor, limit: float, most: int) -> int | None:
    """Prove the bound of one group; return how many factorisations it took, or ``None``."""
    if kernel.shape[0] > kernel.shape[1]:
        kernel = kernel.transpose(0, 1)
    taps = kernel.shape[2:]
    degrees = torch.tensor([(count - 1) / 2.0 for count in taps], dtype=torch.float64)
    centres, half = _first(tuple(taps))
    tried, most = 0, max(most, 4 * len(centres))
    while len(centres):
        tried += len(centres)
        if tried > most:
            return None
        # Centres are off by a few roundings of numbers up to seven.
        angle = float((degrees * half).sum()) * (1.0 + 1e-12) + 1e-13 * float(degrees.sum())
        target = limit * math.cos(angle) * (1.0 - 1e-14) if angle < 1.5 else 0.0
        centres = centres[~_below(kernel, centres, target)]
        if not bool((half > 1e-9).any()):
            return None if len(centres) else tried
        centres, half = _split(centres, half)
    return tried


def _first(taps: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Centres ``(cells, d)`` of cells that cover half of all frequencies, and half their sizes."""
    axes, half = [], []
    for axis, count in enumerate(taps):
        cells = 1 if count == 1 else 8 * (count - 1)
        length = 2.0 * math.pi if axis else math.pi  # of the first axis a half
        size = length / cells
        axes.append(torch.arange(cells, dtype=torch.float64) * size + size / 2.0)
        half.append(0.0 if count == 1 else size / 2.0)
    if not taps:
        return torch.zeros(1, 0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    centres = torch.cartesian_prod(*axes).reshape(-1, len(taps))
    return centres, torch.tensor(half, dtype=torch.float64)


def _split(centres: Tensor, half: Tensor) -> tuple[Tensor, Tensor]:
    """Halve cells along all axes that they extend along."""
    signs = [(-0.5, 0.5) if size > 0 else (0.0,) for size in half.tolist()]
    offsets = torch.tensor(list(itertools.product(*signs)), dtype=torch.float64) * half
    return (centres[:, None] + offsets).flatten(0, 1), half / 2.0


def _below(kernel: Tensor, centres: Tensor, limit: float) -> Tensor:
    """Whether the norms at frequencies are proven to be below a limit, ``(cells,)``.

    With angles up to ``2 pi (T_j - 1)`` along axis ``j`` of ``d``, which are added, a phase is off
    by ``(d + 1) 2 pi sum_j (T_j - 1)`` units, and by some more from sine and cosine. A computed
    entry of the symbol is off by that and ``gamma_k`` times ``sum_t |K_t|``; one of the Gram matrix
    by ``gamma_n`` times the norms of its rows, which add up to the trace.
    """
    rows, columns = kernel.shape[:2]
    flat = kernel.reshape(rows * columns, -1)
    size = torch.linalg.vector_norm(flat.abs().sum(dim=1)).item()
    taps = kernel.shape[2:]
    angles = (len(taps) + 1) * 2.0 * math.pi * sum(count - 1 for count in taps)
    shift = limit - 2.0 * (flat.shape[1] + angles + 80.0) * _UNIT * size
    if not 0.0 < shift < math.inf:
        return torch.zeros(len(centres), dtype=torch.bool)
    identity = torch.eye(rows, dtype=torch.complex128)
    places = _places(tuple(taps))
    found = []
    for part in centres.split(max(1, _CHUNK // max(rows * columns, len(places)))):
        phases = torch.exp(-1j * (part @ places.mT)) if places.shape[1] else part.new_ones(1, 1)
        symbols = (phases.to(torch.complex128) @ flat.mT.to(torch.complex128)).reshape(
            -1, rows, columns
        )
        gram = symbols @ symbols.mH
        trace = gram.diagonal(dim1=1, dim2=2).real.sum(dim=1)
        slack = 8.0 * (columns + rows + 8) * _UNIT * (trace + rows * shift**2)
        matrices = (shift**2 - slack)[:, None, None] * identity - gram
        factors, failed = torch.linalg.cholesky_ex(matrices)
        finite = torch.view_as_real(factors.diagonal(dim1=1, dim2=2)).isfinite().flatten(1).all(1)
        found.append((failed == 0) & finite & (slack < shift**2))
    return torch.cat(found)


def _places(taps: tuple[int, ...]) -> Tensor:
    """Places of the taps, ``(taps, d)``."""
    grids = [torch.arange(count, dtype=torch.float64) for count in taps]
    if not grids:
        return torch.zeros(1, 0, dtype=torch.float64)
    return torch.cartesian_prod(*grids).reshape(-1, len(taps))


def norm_at_most(operator: Weighted, bound: float, most: int = MOST) -> bool:
    """Whether a bound of an operator's norm is proven by the means of this module.

    A bound that a finite input makes smaller than that on the lattice is not.
    """
    error = operator.norm_error().item()
    if not isinstance(operator, Convolution):
        matrix = operator.effective_weight()[None]
        return lattice_norm_at_most(matrix, (bound - error) * (1.0 - 4.0 * _UNIT), most)
    gain = operator.gain() * (1.0 + 4.0 * _UNIT)
    claimed = (bound / gain - error) * (1.0 - 8.0 * _UNIT)
    return lattice_norm_at_most(operator.exact_kernel(), claimed, most)


def symbol_norm(kernel: Tensor, frequency: Sequence[float]) -> float:
    """Norm of one group's symbol at a frequency, by an SVD; nothing is proven by it."""
    angles = torch.tensor(frequency, dtype=torch.float64)
    phases = torch.exp(-1j * (_places(tuple(kernel.shape[2:])) @ angles))
    symbol = (kernel.detach().cpu().double().flatten(2) * phases).sum(dim=2)
    norm: float = torch.linalg.matrix_norm(symbol, ord=2).item()
    return norm
