"""Input normalisation as a layer, so that radii are in the units of the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Normalize(nn.Module):
    """Subtract ``mean`` and divide by ``std``, channel by channel.

    Being a layer of the network, it is part of what is certified: a radius is then a distance
    between images with pixels in [0, 1], not between normalised ones.

    Args:
        mean: one number per channel.
        std: one positive number per channel.

    Raises:
        ValueError: different lengths, or a ``std`` that is not positive and finite.

    Example:
        >>> Normalize([0.5], [0.25])(torch.ones(1, 1, 1, 1)).item()
        2.0
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not all(0 < s < float("inf") for s in std):
            raise ValueError(
                "expected one mean and one positive std per channel, "
                f"got mean={list(mean)}, std={list(std)}"
            )
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise images ``(N, C, H, W)``."""
        return (x - self.mean) / self.std
