"""What attacks leave of a data set's certificates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.certified_model import CertifiedModel
from certify.data import pixels


class BrokenCertificate(RuntimeError):  # noqa: N818 - the name says what happened
    """An attack changed a prediction within its certified radius: a defect of this project.

    Attributes:
        content: the image's index, the image and the point that it was moved to as float64
            tensors, the radius, and the prediction.
    """

    def __init__(self, index: int, image: Tensor, point: Tensor, radius: float, label: int) -> None:
        distance = (point - image).norm().item()
        super().__init__(
            f"image {index} is predicted as another class at distance {distance:.9g}, within its "
            f"certified radius {radius:.9g}: please report this"
        )
        self.content = {
            "index": index,
            "image": image.cpu(),
            "point": point.cpu(),
            "radius": radius,
            "prediction": label,
        }


@dataclass(frozen=True)
class Attacked:
    """What attacks found.

    Attributes:
        distance: ``(N,)`` at which another class was seen, or infinity.
        withstood: for each budget, ``(N,)`` whether no attack within it succeeded.
    """

    distance: Tensor
    withstood: Mapping[float, Tensor]

    def solved(self, radius: Tensor) -> float:
        """Fraction of images whose radius is within 0.1 % of an attack's distance."""
        return (radius >= (1.0 - 1e-3) * self.distance).double().mean().item()

    def median_gap(self, radius: Tensor) -> float:
        """Median of ``1 - radius / distance``, zero where both are infinite."""
        return (1.0 - radius / self.distance).nan_to_num(nan=0.0).median().item()


def attack_all(
    certified: CertifiedModel, images: Tensor, radius: Tensor, epsilons: Sequence[float], size: int
) -> Attacked:
    """Attack every image at its radius and at each budget.

    Raises:
        BrokenCertificate: an attack succeeded within a radius.
    """
    distances: list[Tensor] = []
    withstood: dict[float, list[Tensor]] = {epsilon: [] for epsilon in epsilons}
    done = 0
    for batch, own in zip(images.split(size), radius.split(size), strict=True):
        x, own = pixels(batch), own.to(certified.margin_lipschitz().device)
        distance, nearest = certified.nearest_seen(x)
        for epsilon in epsilons:
            # Where either certificate or attack has decided already nothing is tried.
            still = (own <= epsilon) & (distance > epsilon)
            hit = certified.broken(x, torch.where(still, epsilon, 0.0))
            distance = torch.where(hit, distance.clamp_max(epsilon), distance)
            withstood[epsilon].append((distance > epsilon) | (epsilon == 0))
        inside = torch.where(torch.isfinite(own), own, 0.0)
        hit, points = certified.seen_within(x, inside)
        points = torch.where(hit.reshape(-1, *[1] * (x.ndim - 1)), points, nearest)
        for place in torch.nonzero(hit | (distance < own)).flatten().tolist():
            label = int(certified.logits(x[place : place + 1]).argmax())
            image = x[place].to(points)
            raise BrokenCertificate(done + place, image, points[place], own[place].item(), label)
        distances.append(distance)
        done += len(batch)
    return Attacked(
        torch.cat(distances).cpu(),
        {epsilon: torch.cat(parts).cpu() for epsilon, parts in withstood.items()},
    )
