"""What attacks leave of a data set's certificates."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.attack import Adversary
from certify.data import pixels
from certify.minimum_norm import Seen
from certify.ranks import ALONE, Ranks


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
        by: ``(N,)`` distances of each attack that looks for the nearest point.
    """

    distance: Tensor
    withstood: Mapping[float, Tensor]
    by: Mapping[str, Tensor]

    @property
    def won(self) -> dict[str, int]:
        """For how many images each attack found the nearest point; the first of equal ones.

        Where projected gradient descent found one within a budget that the others had missed, the
        image is counted for it.
        """
        distances = torch.stack([*self.by.values(), self.distance])
        first = distances.argmin(dim=0)
        seen = torch.isfinite(self.distance)
        return {name: int((first[seen] == i).sum()) for i, name in enumerate([*self.by, "pgd"])}

    def solved(self, radius: Tensor) -> float:
        """Fraction of images whose radius is within 0.1 % of an attack's distance."""
        return (radius >= (1.0 - 1e-3) * self.distance).double().mean().item()

    def median_gap(self, radius: Tensor) -> float:
        """Median of ``1 - radius / distance``, zero where both are infinite."""
        return (1.0 - radius / self.distance).nan_to_num(nan=0.0).median().item()


_ANY = "any"


def attack_all(
    adversary: Adversary,
    images: Tensor,
    epsilons: Sequence[float],
    size: int,
    *,
    radius: Tensor | None = None,
    confirm: Callable[[Tensor, Tensor], Tensor] | None = None,
    index: Tensor | None = None,
    on_batch: Callable[[int], None] | None = None,
    ranks: Ranks = ALONE,
) -> Attacked:
    """Attack every image, at each budget and within its certified radius.

    Args:
        adversary: attacks the network.
        images: ``(N, ...)``.
        epsilons: budgets.
        size: images at a time.
        radius: ``(N,)`` certified; without it nothing is contradicted.
        confirm: from points and predictions near them, whether a point within a radius is of
            another class whatever rounding did; without it all of them are.
        index: ``(N,)``, places of the images in their source, to name them by.
        on_batch: called with the number of images done, after each batch.
        ranks: processes that share the batches; each returns what all found.

    Raises:
        BrokenCertificate: an attack succeeded within a radius.
    """
    radius = torch.zeros(len(images), dtype=torch.float64) if radius is None else radius
    found_by: list[dict[str, Tensor]] = []
    starts = range(0, len(images), size)
    batches = list(zip(starts, images.split(size), radius.split(size), strict=True))
    for start, batch, own in ranks.share(batches):
        x, own = pixels(batch).to(adversary.device, torch.float64), own.to(adversary.device)
        found = Seen.none(x)
        each = adversary.nearest_by(x)
        for one in each.values():
            found = found.or_nearer(one)
        for epsilon in sorted(epsilons, reverse=True):
            # Where either certificate or attack has decided already nothing is tried.
            still = (own <= epsilon) & (found.distance > epsilon)
            found = found.or_nearer(adversary.within(x, epsilon * still.to(x.dtype)))
        inside = torch.where(torch.isfinite(own) & (found.distance > own), own, 0.0)
        found = found.or_nearer(adversary.within(x, inside))
        inside = found.distance < own
        if confirm is not None and bool(inside.any()):
            sure = confirm(found.points[inside], adversary.target.values(x[inside]).argmax(dim=1))
            inside[inside.clone()] = sure
            # Where rounding may have made up what was seen the radius stands.
            found = Seen(
                torch.where(inside, found.distance, found.distance.maximum(own)), found.points
            )
        for place in torch.nonzero(inside).flatten().tolist():
            label = int(adversary.target.values(x[place : place + 1]).argmax())
            number = start + place if index is None else int(index[start + place])
            raise BrokenCertificate(number, x[place], found.points[place], own[place].item(), label)
        distances = {name: one.distance.cpu() for name, one in each.items()}
        found_by.append({**distances, _ANY: found.distance.cpu()})
        if on_batch is not None:
            on_batch(len(batch))
    found_by = ranks.joined(found_by)
    by = {name: torch.cat([one[name] for one in found_by]) for name in found_by[0]}
    distance = by.pop(_ANY)
    withstood = {epsilon: (distance > epsilon) | (epsilon == 0) for epsilon in epsilons}
    return Attacked(distance, withstood, by)
