"""What attacks leave of a data set's certificates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.certified_model import CertifiedModel
from certify.data import pixels


@dataclass(frozen=True)
class Attacked:
    """What attacks found.

    Attributes:
        distance: ``(N,)`` at which another class was seen, or infinity.
        withstood: for each budget, ``(N,)`` whether no attack within it succeeded.
        broken: images whose prediction was changed within their certified radius. Any is a defect
            of the certificate.
    """

    distance: Tensor
    withstood: Mapping[float, Tensor]
    broken: int

    def solved(self, radius: Tensor) -> float:
        """Fraction of images whose radius is within 0.1 % of an attack's distance."""
        return (radius >= (1.0 - 1e-3) * self.distance).double().mean().item()

    def median_gap(self, radius: Tensor) -> float:
        """Median of ``1 - radius / distance``, zero where both are infinite."""
        return (1.0 - radius / self.distance).nan_to_num(nan=0.0).median().item()


def attack_all(
    certified: CertifiedModel, images: Tensor, radius: Tensor, epsilons: Sequence[float], size: int
) -> Attacked:
    """Attack every image at its radius and at each budget."""
    distances, hits = [], []
    withstood: dict[float, list[Tensor]] = {epsilon: [] for epsilon in epsilons}
    for batch, own in zip(images.split(size), radius.split(size), strict=True):
        x, own = pixels(batch), own.to(certified.margin_lipschitz().device)
        distance = certified.attack(x)
        for epsilon in epsilons:
            # Where either certificate or attack has decided already nothing is tried.
            still = (own <= epsilon) & (distance > epsilon)
            hit = certified.broken(x, torch.where(still, epsilon, 0.0))
            distance = torch.where(hit, distance.clamp_max(epsilon), distance)
            withstood[epsilon].append((distance > epsilon) | (epsilon == 0))
        inside = torch.where(torch.isfinite(own), own, 0.0)
        hits.append(certified.broken(x, inside) | (distance < own))
        distances.append(distance)
    return Attacked(
        torch.cat(distances).cpu(),
        {epsilon: torch.cat(parts).cpu() for epsilon, parts in withstood.items()},
        int(torch.cat(hits).sum()),
    )
