"""How many images are left as the radius grows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_STEPS = 400
_FARTHEST = 1e9  # where an infinite radius is drawn


@dataclass(frozen=True)
class Curve:
    """A falling step function: from each radius to the next it has the fraction of the next.

    Between the steps that are kept it is drawn too low rather than too high.

    Attributes:
        radius: ascending, from zero.
        fraction: of all images, as many.
    """

    radius: tuple[float, ...]
    fraction: tuple[float, ...]

    @staticmethod
    def of(radii: Tensor, count: int) -> Curve:
        """Of the fraction of ``count`` images whose radius is larger than so much.

        Args:
            radii: of those that count at radius zero.
            count: of all images.
        """
        ordered = radii.to(torch.float64).cpu().clamp(max=_FARTHEST).sort().values
        kept = torch.linspace(0, len(ordered) - 1, min(_STEPS, len(ordered))).round().long()
        left = (len(ordered) - kept).to(torch.float64) / count
        start = len(ordered) / count
        return Curve((0.0, *ordered[kept].tolist()), (start, *left.tolist()))

    def at(self, radius: float) -> float:
        """The fraction at a radius, or a little less."""
        for place, fraction in zip(self.radius, self.fraction, strict=True):
            if radius < place or (radius == place == 0.0):
                return fraction
        return 0.0

    def to_json(self) -> dict[str, list[float]]:
        """Return it as JSON takes it."""
        return {"radius": list(self.radius), "fraction": list(self.fraction)}

    @staticmethod
    def from_json(content: Any) -> Curve:
        """Return what `to_json` wrote.

        Raises:
            ValueError: something else.
        """
        try:
            assert isinstance(content, Mapping)
            radius, fraction = (tuple(map(float, content[key])) for key in ("radius", "fraction"))
            assert len(radius) == len(fraction) > 0
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise ValueError("it has no curve of radii") from error
        return Curve(radius, fraction)
