r"""How far an activation's values can follow its inputs, from a given point on.

Let ``g(d) = f(z + d) - f(z)`` for ``|d| <= reach``. Its quotients ``g(d) / d`` are means of slopes
between ``z`` and ``z + d``, which for a function of straight pieces are extreme where ``z + d`` is
a break, an end of the interval, or next to ``z``: elsewhere the mean moves monotonically towards
the slope of one piece. With the quotients' extremes on either side of ``z`` there are pairs of a
centre ``m`` and a spread ``s`` such that

    from below     ``g(d) >= m d - s |d|``,
    from above     ``g(d) <= m d + s |d|``,
    from both      ``|g(d) - m d| <= s |d|``.

For ReLU the first has no spread: it lies above its tangents. A bound that only has to hold in one
direction, of a margin that must not fall, chooses by the sign of what it multiplies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from certify.signal import Slopes
from ff_bounds.rounding import UNIT_ROUNDOFF, round_up


@dataclass(frozen=True)
class Cone:
    """Centre and spread of each entry, ``(batch, *shape)``, spreads not negative."""

    centre: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Cones:
    """The cones of an activation around given points; see the module's text."""

    below: Cone
    above: Cone
    both: Cone


def cones(slopes: Slopes, point: Tensor | None, reach: Tensor) -> Cones:
    """Bound an activation around points.

    Args:
        slopes: the activation.
        point: its arguments, ``(batch, *shape)``; ``None`` if they are not known.
        reach: how far the arguments move at most, not negative, same shape.

    Returns:
        Proven cones: the roundings are in the spreads. NaN or infinity in the arguments gives NaN.
    """
    if point is None or not slopes.breaks:
        low, high = torch.full_like(reach, slopes.low), torch.full_like(reach, slopes.high)
        # Each quotient has a few roundings behind it; here there is none but that of a centre.
        cone = _between(low, high, torch.full_like(reach, 4.0 * _error(slopes)))
        exact = Cone(low, torch.zeros_like(low))
        cone = exact if slopes.low == slopes.high else cone
        return Cones(cone, cone, cone)
    breaks = [b - point for b in slopes.breaks]
    right = _quotients(slopes.slopes, breaks, reach)
    left = _quotients(slopes.slopes[::-1], [-b for b in breaks[::-1]], reach)
    error = torch.full_like(reach, 16.0 * len(slopes.slopes) * _error(slopes))
    # A break's distance carries one rounding.
    decided = torch.stack([b.abs() * (1.0 - 2.0**-50) >= reach for b in breaks]).all(dim=0)
    slope = right[2]
    found = [
        _between(right[0], left[1], error),  # largest quotients on the left, smallest on the right
        _between(left[0], right[1], error),
        _between(torch.minimum(left[0], right[0]), torch.maximum(left[1], right[1]), error),
    ]
    return Cones(
        *(
            Cone(torch.where(decided, slope, c.centre), torch.where(decided, 0.0, c.spread))
            for c in found
        )
    )


def _error(slopes: Slopes) -> float:
    return UNIT_ROUNDOFF * max(abs(slopes.low), abs(slopes.high))


def _between(low: Tensor, high: Tensor, error: Tensor) -> Cone:
    """The cone of quotients between ``low`` and ``high``; without spread if these are swapped."""
    return Cone(0.5 * (low + high), round_up((0.5 * (high - low)).clamp_min(0.0) + error, 2))


def _quotients(
    slopes: tuple[float, ...], breaks: list[Tensor], reach: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Smallest and largest mean slope over ``[0, d]`` for ``0 < d <= reach``, and that next to 0.

    Args:
        slopes: of the pieces, from left to right.
        breaks: between them, as distances from the point.
        reach: largest ``d``.
    """
    first = torch.full_like(reach, slopes[0])
    for slope, start in zip(slopes[1:], breaks, strict=True):
        first = torch.where(start <= 0, slope, first)
    smallest, largest = first, first
    for end in [reach, *breaks]:
        inside = (end > 0) & (end <= reach)
        length = torch.where(inside, end, 1.0)
        mean = torch.zeros_like(reach)
        for index, slope in enumerate(slopes):
            upper = length if index == len(breaks) else torch.minimum(breaks[index], length)
            lower = breaks[index - 1].clamp_min(0.0) if index else torch.zeros_like(length)
            mean = mean + slope * ((upper - lower).clamp_min(0.0) / length)
        mean = torch.where(inside, mean, first)
        smallest, largest = torch.minimum(smallest, mean), torch.maximum(largest, mean)
    sound = torch.isfinite(torch.stack(breaks)).all(dim=0) & torch.isfinite(reach)
    nan = torch.full_like(reach, torch.nan)
    return (
        torch.where(sound, smallest, nan),
        torch.where(sound, largest, nan),
        torch.where(sound, first, nan),
    )
