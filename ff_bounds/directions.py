"""Which directions `ff_bounds.deflation` splits off, and in what order the ways are tried."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ff_bounds.deflation import Deflation
from ff_bounds.peak import Peak
from ff_bounds.remainder import sharper_remainder, unfolding_remainder
from ff_bounds.symbol import LEADING, Symbol

_WORTHWHILE = 64  # rows from which a test of the whole matrix costs more
_DIRECTIONS = (8, 12, 16, 24, 32, LEADING - 1)  # how many are split off
_CORRECTED_DIRECTIONS = 32  # at most, where each costs more
_CHEAP_DIRECTIONS = 24  # what a sharper bound of the remainder would cost about as much as
_TOPS = 3  # vectors of peaks that are split off too
_REMAINDER_UNCORRECTED = 0.3  # of the squared norm, how much may remain without a correction
_REMAINDER = 0.8  # of the squared norm: how much may remain, by the bound from the unfolding
_REMAINDER_SHARPER = 1.4  # and where the sharper bound will be about half of that


def deflations(
    symbol: Symbol, peak: Peak, coarse_bound: Callable[[Tensor], Tensor]
) -> list[Callable[[], Deflation]]:
    """Ways to split off the directions of large singular values, the cheapest first; maybe none.

    The directions are the vectors where ascents have ended, and leading eigenvectors of the mean
    ``T T^T`` of ``G`` over all frequencies, with the unfolding ``T`` ``(m, n prod(taps))``. So many
    are taken as make what remains small enough beside the lower bound of ``||G||``: small for tests
    without a correction ``w``, which cost a tenth to prepare; smaller than the limit for tests with
    one, as bounded by ``T`` or, where that would take many, by the sharper and costlier bound.

    Args:
        symbol: the kernels.
        peak: their lower bounds.
        coarse_bound: proven bounds ``(problems,)`` of ``sigma*`` of kernels
            ``(problems, m, n, taps)`` with one axis.

    Returns:
        Functions that do the work, to be called when it is needed.
    """
    if symbol.rows < _WORTHWHILE or not symbol.taps:
        return []
    values, vectors = symbol.leading
    square = peak.square[peak.owner]
    values = values * math.prod(symbol.taps) / square[:, None]

    def size(remainder: float, most: int) -> int | None:
        """How many directions leave so little, at most; some kernels may need more."""
        large = (values > remainder).sum(dim=1)
        suitable = large[large <= most]
        return None if not len(suitable) else next(d for d in _DIRECTIONS if d >= suitable.max())

    def split_off(count: int, *, corrected: bool, sharper: bool) -> Deflation:
        tops = peak.tops(_TOPS)
        turn = tops.square().sum(dim=1, keepdim=True)  # to as real a vector as can be
        tops = tops * torch.where(turn == 0, 0.0, turn.conj() / turn.abs()).sqrt()
        parts = torch.cat([tops.real, tops.imag], dim=-1)
        parts = parts[..., parts.norm(dim=1).amax(dim=0) > 1e-3]
        columns = torch.cat([parts, vectors[..., :count]], dim=-1)
        basis: Tensor = torch.linalg.qr(columns).Q.contiguous()
        if sharper:
            remainder = sharper_remainder(symbol, basis, coarse_bound)
        else:
            remainder = unfolding_remainder(symbol, basis)
        return Deflation(symbol, basis, square, remainder, corrected=corrected)

    ways: list[Callable[[], Deflation]] = []
    count = size(_REMAINDER_UNCORRECTED, min(_DIRECTIONS[-1], symbol.rows // 4))
    if count is not None:
        plain = partial(split_off, count, corrected=False, sharper=False)
        ways += [plain, plain]  # the second time with what the failures of the first led to
    count = size(_REMAINDER, _CHEAP_DIRECTIONS)
    if count is not None:
        ways.append(partial(split_off, count, corrected=True, sharper=False))
        return ways
    count = size(_REMAINDER_SHARPER, _CORRECTED_DIRECTIONS)
    if count is not None:
        ways.append(partial(split_off, count, corrected=True, sharper=True))
    return ways
