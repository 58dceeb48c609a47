"""Steps of a network on batches of rows and of intervals; see `certify.local`."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.cones import Cone
from certify.linear_maps import TINY, LinearMap, norms
from certify.signal import Affine, Concatenation, Flatten, Signal, Slopes, Sum
from ff_bounds.rounding import UNIT_ROUNDOFF, gamma, round_up

ONE_ROUNDING = 4.0 * UNIT_ROUNDOFF
"""Pays for one, and for those of what it is multiplied by."""

Interval = tuple[Tensor, Tensor]
"""Centre and spread, ``(batch, k, *shape)``."""


def rows_before(
    at: Signal, layer: LinearMap | None, rows: Tensor, through: bool
) -> list[Tensor] | None:
    """Rows ``(batch, k, *shape)`` at the parents of a step, or ``None`` where they stop.

    Args:
        at: the signal that they were applied to.
        layer: the map of an affine step.
        rows: ``(batch, k, *shape)``.
        through: whether convolutions are followed too.
    """
    step = at.step
    if isinstance(step, Affine):
        return None if layer is None or (len(at.shape) > 2 and not through) else [layer.pull(rows)]
    if isinstance(step, Flatten):
        return [rows.reshape(*rows.shape[:2], *at.parents[0].shape[1:])]
    if isinstance(step, Sum):
        return [rows] * len(at.parents)
    if isinstance(step, Concatenation) and step.channels:
        return list(rows.split([parent.shape[1] for parent in at.parents], dim=2))
    return None


def interval_behind(
    at: Signal, layer: LinearMap | None, cone: Cone | None, parents: list[Interval]
) -> Interval | None:
    """Where a step takes intervals, or ``None`` if that is not known.

    Args:
        at: the signal behind the step.
        layer: the map of an affine step.
        cone: of an activation: slopes are anywhere in it.
        parents: intervals of the parents.
    """
    step, (centre, spread) = at.step, parents[0]
    if isinstance(step, Slopes) and cone is not None:
        middle = cone.centre[:, None]
        fresh = middle * centre
        off = middle.abs() * spread + cone.spread[:, None] * (centre.abs() + spread)
        return fresh, round_up(off + ONE_ROUNDING * fresh.abs(), 6) + TINY
    if isinstance(step, Affine) and layer is not None:
        off = layer.push(spread + gamma(layer.terms + 4) * centre.abs(), absolute=True)
        off = round_up(off, layer.terms + 6) + TINY
        if bool(layer.error > 0):
            axes = centre.ndim - 2
            size = layer.error * (norms(centre, axes) + norms(spread, axes))
            off = round_up(off + size.reshape(*size.shape, *[1] * (len(at.shape) - 1)), 4)
        return layer.push(centre), off
    if isinstance(step, Flatten):
        return centre.flatten(2), spread.flatten(2)
    if isinstance(step, Sum):
        fresh = torch.stack([c for c, _ in parents]).sum(dim=0)
        moved = [s + ONE_ROUNDING * len(parents) * c.abs() for c, s in parents]
        return fresh, round_up(torch.stack(moved).sum(dim=0), len(parents) + 3)
    if isinstance(step, Concatenation) and step.channels:
        return torch.cat([c for c, _ in parents], 2), torch.cat([s for _, s in parents], 2)
    return None
