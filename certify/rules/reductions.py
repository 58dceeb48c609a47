"""Sums, means and extrema over whole axes of a sample."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from certify.rules.registry import RULES, lipschitz_rule
from certify.rules.rounding import elementwise, euclidean, exact, reductions
from certify.rules.rounding import logsumexp as logsumexp_rounding
from certify.signal import Signal, UnsupportedModel

_UP = 1.0 + 2.0**-50
"""Pays for a few roundings of a constant."""


def _reduced(x: Signal, dim: Any) -> tuple[int, bool]:
    """How many entries become one, and whether the channels stay apart."""
    axes = len(x.shape)
    listed = (dim,) if isinstance(dim, int) else tuple(dim or ())
    if not listed:
        raise UnsupportedModel("a reduction without dim mixes the samples of a batch")
    reduced = {axis % axes for axis in listed}
    if 0 in reduced:
        raise UnsupportedModel("a reduction of the batch axis mixes the samples of a batch")
    entries = math.prod(x.shape[axis] for axis in reduced)
    if entries == 0:
        raise UnsupportedModel("a reduction of an axis without entries")
    return entries, 1 not in reduced


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype not in (None, torch.float64):
        raise UnsupportedModel(f"dtype={dtype}")


@lipschitz_rule(torch.mean, "mean", rounding=reductions)
def mean(
    input: Signal,
    dim: Any = None,
    keepdim: bool = False,
    *,
    axis: Any = None,
    dtype: torch.dtype | None = None,
) -> Signal:
    """Rows of ``n`` entries ``1 / n`` on disjoint sets of entries: ``1 / sqrt(n)``."""
    _check_dtype(dtype)
    entries, channelwise = _reduced(input, axis if dim is None else dim)
    return input.scaled(1.0 / math.sqrt(entries) * _UP, channelwise=channelwise, linear=True)


@lipschitz_rule(torch.sum, "sum", rounding=reductions)
def sum_over(
    input: Signal,
    dim: Any = None,
    keepdim: bool = False,
    *,
    axis: Any = None,
    dtype: torch.dtype | None = None,
) -> Signal:
    """Rows of ``n`` ones on disjoint sets of entries: ``sqrt(n)``."""
    _check_dtype(dtype)
    entries, channelwise = _reduced(input, axis if dim is None else dim)
    return input.scaled(math.sqrt(entries) * _UP, channelwise=channelwise, linear=True)


@lipschitz_rule(torch.amax, "amax", torch.amin, "amin", rounding=exact)
def extremum(input: Signal, dim: Any = None, keepdim: bool = False, *, axis: Any = None) -> Signal:
    """``|max a - max b| <= max |a - b| <= ||a - b||`` on disjoint sets of entries."""
    _, channelwise = _reduced(input, axis if dim is None else dim)
    return input.scaled(channelwise=channelwise)


@lipschitz_rule(torch.logsumexp, torch.special.logsumexp, "logsumexp", rounding=logsumexp_rounding)
def logsumexp(input: Signal, dim: Any, keepdim: bool = False) -> Signal:
    """Its gradient, a softmax, sums up to one and is nowhere longer than one."""
    _reduced(input, dim)
    return input.scaled()


@lipschitz_rule(torch.linalg.vector_norm, torch.norm, "norm", rounding=euclidean)
def norm(
    input: Signal,
    p: Any = 2,
    dim: Any = None,
    keepdim: bool = False,
    *,
    ord: Any = 2,
    dtype: torch.dtype | None = None,
    out: None = None,
) -> Signal:
    """L2 norms of disjoint sets of entries: ``||a| - |b|| <= |a - b|``."""
    _check_dtype(dtype)
    if p not in (2, "fro") or ord != 2:
        raise UnsupportedModel(f"a norm other than L2 (order {p if ord == 2 else ord})")
    _reduced(input, dim)
    return input.scaled()


class _Extremum(NamedTuple):
    values: Signal
    indices: Signal


def _extremum_along(pairwise: Any, *operations: object) -> None:
    @lipschitz_rule(*operations, rounding=elementwise)
    def along(
        input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, other: Any = None
    ) -> Any:
        """As `extremum`; the indices jump, so that what uses them has no finite bound."""
        dim = axis if dim is None else dim
        other = dim if other is None else other
        if isinstance(other, (Signal, torch.Tensor)):
            return RULES[pairwise](input, other)
        values = extremum(input, dim)
        return _Extremum(values, input.scaled(math.inf))


_extremum_along(torch.maximum, torch.max, "max")
_extremum_along(torch.minimum, torch.min, "min")
