"""Attacks: what no certificate may contradict. Nothing is proven by them."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certify.minimum_norm import (
    Seen,
    Target,
    ddn,
    deepfool,
    nearest_classes,
    nearest_of_pairs,
    on_sphere,
)
from certify.signal import checked_domain


@dataclass(frozen=True)
class Effort:
    """How hard to try.

    Attributes:
        steps: forward-backward passes for each start, and for each class where one is chosen.
        restarts: random starts of projected gradient descent, beside the one from the input.
        foolbox: also run foolbox's attacks; see `certify.foolbox_attacks`.
    """

    steps: int = 20
    restarts: int = 1
    foolbox: bool = False


class Adversary:
    """Looks for points near inputs at which a network predicts another class.

    Gradients are those of a copy in float32, if the network can be computed in that; a point counts
    if it is of another class, or a tie, in float64.

    Args:
        model: a network with parameters in float64, in evaluation mode.
        input_shape: of one input.
        domain: smallest and largest entry that a point may have, or ``None`` for any.
        effort: how hard to try.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        input_shape: Sequence[int],
        *,
        domain: Sequence[float] | None = None,
        effort: Effort | None = None,
    ) -> None:
        self.device = next((tensor.device for tensor in _tensors(model)), torch.device("cpu"))
        rough = _in_float32(model, input_shape, self.device)
        self.target = Target.of(model, rough, checked_domain(domain))
        self.effort = effort or Effort()
        self._model = model

    def with_effort(self, effort: Effort) -> Adversary:
        """The same, trying harder or less."""
        other = copy.copy(self)
        other.effort = effort
        return other

    def nearest_by(self, x: Tensor) -> dict[str, Seen]:
        """The nearest points ``(N, ...)`` of other classes that each attack finds."""
        x = x.to(self.device, torch.float64)
        logits = self.target.values(x)
        found = {
            "deepfool": deepfool(self.target, x, logits, steps=self.effort.steps),
            "ddn": ddn(self.target, x, logits, steps=3 * self.effort.steps),
        }
        if self.effort.foolbox:
            from certify.foolbox_attacks import by_foolbox

            found |= by_foolbox(self.target, self._model, x, logits.argmax(dim=1))
        return found

    def nearest(self, x: Tensor) -> Seen:
        """The nearest points of other classes that any attack finds."""
        x = x.to(self.device, torch.float64)
        found = Seen.none(x)
        for one in self.nearest_by(x).values():
            found = found.or_nearer(one)
        return found

    def within(self, x: Tensor, radius: Tensor) -> Seen:
        """Points of other classes within radii ``(N,)``; nothing is tried at zero and infinity."""
        x, radius = x.to(self.device, torch.float64), radius.to(self.device, torch.float64)
        logits = self.target.values(x)
        effort = self.effort
        return pgd(self.target, x, logits, radius, steps=effort.steps, restarts=effort.restarts)


def pgd(
    target: Target,
    x: Tensor,
    logits: Tensor,
    radius: Tensor,
    *,
    steps: int = 20,
    restarts: int = 1,
) -> Seen:
    """Projected gradient descent within a radius of each input.

    For the nearest other classes, steps on the margin from the input and from random points of the
    sphere, each projected onto it; the length of a step falls from twice the radius.

    Args:
        target: the network.
        x: ``(N, ...)`` float64.
        logits: ``(N, C)`` there.
        radius: ``(N,)``; where it is zero or infinite nothing is tried.
        steps: forward-backward passes for each class and start.
        restarts: random starts.

    References:
        A. Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    own = logits.argmax(dim=1)
    tried = (radius > 0) & torch.isfinite(radius)
    sample, other = nearest_classes(target, x, own, logits.shape[1])
    found = Seen.none(x)
    generator = torch.Generator().manual_seed(0)
    for start in range(restarts + 1):
        left = (tried & torch.isinf(found.distance))[sample]
        for part in torch.nonzero(left).flatten().split(target.batch):
            if not len(part):
                continue
            rows = sample[part]
            centre, size = x[rows].flatten(1), radius[rows][:, None]
            delta = torch.zeros_like(centre)
            if start:
                noise = torch.randn(centre.shape, generator=generator, dtype=centre.dtype)
                delta = target.inside(centre + on_sphere(noise.to(centre), size)) - centre
            classes = own[rows], other[part]
            least, best = torch.full_like(size[:, 0], torch.inf), delta
            for step in range(steps + 1):
                points = (centre + delta).reshape(-1, *x.shape[1:])
                value, gradient = target.margins(points, *classes)
                lower = value < least
                least = torch.where(lower, value, least)
                best = torch.where(lower[:, None], delta, best)
                length = 2.0 * size * (1.0 - step / (steps + 1))
                moved = delta - on_sphere(gradient.flatten(1), length)
                delta = target.inside(centre + on_sphere(moved, size)) - centre
            points = (centre + best).reshape(-1, *x.shape[1:])
            distance = (points - x[rows]).flatten(1).norm(dim=1)
            hit = (distance <= size[:, 0]) & target.sees(points, own[rows])
            seen = Seen(torch.where(hit, distance, torch.inf), points)
            found = found.or_nearer(nearest_of_pairs(x, seen, rows))
    return found


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _in_float32(
    model: nn.Module, input_shape: Sequence[int], device: torch.device
) -> nn.Module | None:
    """A copy in float32, unless the network cannot be computed in that."""
    try:
        rough = copy.deepcopy(model).to(torch.float32)
        with torch.no_grad():
            rough(torch.zeros(1, *input_shape, device=device))
    except Exception:  # constants in float64, say, or what the float64 pass will tell
        return None
    return rough
