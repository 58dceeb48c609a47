"""Attacks that look for the nearest point of another class. Nothing is proven by them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certify.dual import Iteration, Margins, margins_of

_RAY = (1.0, 1.001, 1.02, 1.2, 2.0)
"""Where is looked on the ray through the last point."""

_HALVINGS = 8

_CLASSES = 4
"""How many other classes of each input are attacked: the nearest by the linear model there."""

_GAMMA = 0.05
"""By what part DDN changes the distance in each step."""

_LAST_STEP = 0.01
"""Length of the last step of DDN, over that of the first."""


@dataclass(frozen=True)
class Target:
    """A network under attack.

    Attributes:
        values: from points ``(M, ...)`` to logits ``(M, C)``, by which a point is seen to be of
            another class.
        margins: differences of two logits and their gradients, to search by; they may be rough.
        least: the same for the smallest difference to any other class.
        domain: smallest and largest entry of a point, or ``None`` for any.
        batch: points in one pass at most.
    """

    values: Callable[[Tensor], Tensor]
    margins: Margins
    least: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    domain: tuple[float, float] | None = None
    batch: int = 1024

    @staticmethod
    def of(
        exact: nn.Module,
        rough: nn.Module | None = None,
        domain: tuple[float, float] | None = None,
    ) -> Target:
        """Attack a network in float64, with gradients of its copy in float32 if there is one."""
        searched = (exact, torch.float64) if rough is None else (rough, torch.float32)

        def values(points: Tensor) -> Tensor:
            with torch.no_grad():
                logits: Tensor = exact(points.clone())  # may be changed in place
            return logits

        return Target(values, margins_of(*searched), least_margin_of(*searched), domain)

    def inside(self, points: Tensor) -> Tensor:
        """The nearest points of the domain."""
        return points if self.domain is None else points.clamp(*self.domain)

    def sees(self, points: Tensor, own: Tensor) -> Tensor:
        """Whether each point ``(M, ...)`` is of another class than ``own``, or between classes."""
        parts = zip(points.split(self.batch), own.split(self.batch), strict=True)
        return torch.cat([lead(self.values(part), one) <= 0 for part, one in parts])


@dataclass(frozen=True)
class Seen:
    """Points of other classes.

    Attributes:
        distance: ``(N,)`` float64, from the inputs, infinite where none was seen.
        points: ``(N, ...)``, the inputs where none was seen.
    """

    distance: Tensor
    points: Tensor

    @staticmethod
    def none(x: Tensor) -> Seen:
        """Nothing seen near ``x (N, ...)``."""
        return Seen(torch.full_like(x.flatten(1)[:, 0], torch.inf), x)

    @staticmethod
    def joined(parts: Sequence[Seen]) -> Seen:
        """What was seen near the inputs of several batches."""
        return Seen(
            torch.cat([part.distance for part in parts]), torch.cat([part.points for part in parts])
        )

    def or_nearer(self, other: Seen) -> Seen:
        """The nearer of two points for each input."""
        nearer = other.distance < self.distance
        shaped = nearer.reshape(-1, *[1] * (self.points.ndim - 1))
        return Seen(
            torch.where(nearer, other.distance, self.distance),
            torch.where(shaped, other.points, self.points),
        )


def deepfool(target: Target, x: Tensor, logits: Tensor, *, steps: int = 20) -> Seen:
    """Step to where the linear models of the margins to the nearest classes vanish.

    The steps of `certify.dual.dual_bounds` without their limit; then the ray through the last point
    is searched for the nearest place of another class.

    Args:
        target: the network.
        x: ``(N, ...)`` float64.
        logits: ``(N, C)`` at ``x``.
        steps: forward-backward passes for each class.

    References:
        S.-M. Moosavi-Dezfooli, A. Fawzi, P. Frossard, DeepFool, CVPR 2016.
    """
    classes = logits.shape[1]
    own = logits.argmax(dim=1)
    sample, other = nearest_classes(target, x, own, classes)
    state = Iteration.start(x, sample, own[sample], other, logits.new_zeros(classes, classes))
    start = x[sample].flatten(1)
    nearest = start.clone()
    for _ in range(steps):
        before = state.upper.clone()
        state.step(target.margins, target.batch)
        nearer = (state.upper < before)[:, None]
        nearest = torch.where(nearer, state.before, nearest)  # where the step was evaluated
    centres, classes_of = x[sample], own[sample]
    stepped = at_ends(target, centres, nearest.reshape_as(centres), classes_of)
    on_ray = on_rays(target, centres, state.u.reshape_as(centres), classes_of)
    return nearest_of_pairs(x, on_ray.or_nearer(stepped), sample)


def ddn(target: Target, x: Tensor, logits: Tensor, *, steps: int = 50) -> Seen:
    """Decoupled direction and norm: steps along the gradient, at a distance that adapts.

    The distance shrinks where the last point was of another class and grows where it was not. The
    margin to the best other class is descended; the first distance is that of its linear model.

    Args:
        target: as for `deepfool`, and so are the next two.
        x: inputs.
        logits: there.
        steps: forward-backward passes for each input.

    References:
        J. Rony et al., Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial
        Attacks and Defenses, CVPR 2019.
    """
    found = []
    own = logits.argmax(dim=1)
    for part in torch.arange(len(x), device=x.device).split(target.batch):
        centre, label = x[part].flatten(1), own[part]
        delta, best = torch.zeros_like(centre), torch.zeros_like(centre)
        smallest = torch.full_like(centre[:, :1], torch.inf)
        distance, first = smallest, smallest
        for step in range(steps + 1):
            value, gradient = target.least((centre + delta).reshape_as(x[part]), label)
            slope = gradient.flatten(1)
            if step == 0:
                first = value[:, None] / slope.norm(dim=1, keepdim=True)
                first = distance = first.nan_to_num(nan=0.0, posinf=0.0).clamp_min(0.0)
            length = delta.norm(dim=1, keepdim=True)
            hit = (value <= 0)[:, None]
            better = hit & (length < smallest)
            smallest, best = torch.where(better, length, smallest), torch.where(better, delta, best)
            if step:
                distance = distance * torch.where(hit, 1.0 - _GAMMA, 1.0 + _GAMMA)
            rate = _LAST_STEP + (1.0 - _LAST_STEP) * (1.0 + math.cos(math.pi * step / steps)) / 2.0
            moved = delta - on_sphere(slope, rate * first)
            moved = torch.where(torch.isfinite(moved).all(dim=1, keepdim=True), moved, delta)
            delta = target.inside(centre + on_sphere(moved, distance)) - centre
        ends = (centre + torch.where(torch.isfinite(smallest), best, delta)).reshape_as(x[part])
        found.append(on_rays(target, x[part], ends, label))
    return Seen.joined(found)


def least_margin_of(
    model: nn.Module, dtype: torch.dtype = torch.float64
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Smallest difference to another class's logit, and its gradient; computed in ``dtype``."""

    def least(x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            x, own = x.detach().clone().requires_grad_(), own.clone()
            entering = x.clone() if x.dtype == dtype else x.to(dtype)  # may be changed in place
            logits: Tensor = model(entering).to(x.dtype)
            found = lead(logits, own)
            (gradient,) = torch.autograd.grad(found.sum(), x)
        return found.detach(), gradient

    return least


def lead(logits: Tensor, own: Tensor) -> Tensor:
    """By how much each row's own class is ahead of all others."""
    best = logits.scatter(1, own[:, None], -torch.inf).amax(dim=1)
    return logits.gather(1, own[:, None])[:, 0] - best


def nearest_classes(target: Target, x: Tensor, own: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Pairs ``(M,)`` of a sample and one of the classes that are nearest by its linear models."""
    distance = torch.full((len(x), classes), torch.inf, dtype=x.dtype, device=x.device)
    others = torch.arange(classes, device=x.device) != own[:, None]
    sample, other = torch.nonzero(others, as_tuple=True)
    for part in torch.arange(len(sample), device=x.device).split(target.batch):
        s, t = sample[part], other[part]
        value, gradient = target.margins(x[s], own[s], t)
        linear = value / gradient.flatten(1).norm(dim=1)
        farthest = torch.finfo(linear.dtype).max  # yet nearer than the own class
        distance[s, t] = linear.nan_to_num(nan=farthest, posinf=farthest)
    count = min(_CLASSES, classes - 1)
    near = distance.topk(count, dim=1, largest=False).indices
    rows = torch.arange(len(x), device=x.device)[:, None].expand_as(near)
    return rows.flatten(), near.flatten()


def on_sphere(vectors: Tensor, radius: Tensor) -> Tensor:
    """Vectors ``(M, n)`` of a length below ``(M, 1)`` by more than what rounding could hide."""
    length: Tensor = vectors.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return vectors / length * (radius * (1.0 - 1e-9))


def at_ends(target: Target, x: Tensor, ends: Tensor, own: Tensor) -> Seen:
    """Points ``(M, ...)`` near ``x``, as far as they are in the domain and of another class."""
    sound = torch.isfinite(ends).flatten(1).all(dim=1)
    points = target.inside(torch.where(_shaped(sound, ends), ends, x))
    distance = (points - x).flatten(1).norm(dim=1)
    return Seen(torch.where(target.sees(points, own) & sound, distance, torch.inf), points)


def on_rays(target: Target, x: Tensor, ends: Tensor, own: Tensor) -> Seen:
    """The nearest point seen on the rays from ``x (M, ...)`` through ``ends``."""
    way = ends - x
    sound = torch.isfinite(way).flatten(1).all(dim=1)
    way = torch.where(_shaped(sound, way), way, 0.0)
    far = torch.full((len(x),), torch.inf, dtype=x.dtype, device=x.device)
    for factor in _RAY:
        seen = target.sees(target.inside(x + factor * way), own) & sound
        far = torch.where(seen, far.clamp_max(factor), far)
    near = torch.zeros_like(far)
    for _ in range(_HALVINGS):
        middle = torch.where(torch.isfinite(far), (near + far) / 2.0, 0.0)
        seen = target.sees(target.inside(x + _shaped(middle, way) * way), own)
        seen &= torch.isfinite(far)
        far, near = torch.where(seen, middle, far), torch.where(seen, near, middle)
    found = torch.isfinite(far)
    points = target.inside(x + _shaped(torch.where(found, far, 0.0), way) * way)
    distance = (points - x).flatten(1).norm(dim=1)
    return Seen(torch.where(found, distance, torch.inf), points)


def nearest_of_pairs(x: Tensor, of_pairs: Seen, sample: Tensor) -> Seen:
    """The nearest of several points ``(M,)`` for each sample."""
    found = Seen.none(x)
    least = found.distance.scatter_reduce(0, sample, of_pairs.distance, "amin")
    nearest = torch.nonzero(of_pairs.distance == least[sample]).flatten()
    place = torch.full_like(found.distance, -1, dtype=torch.long)
    place[sample[nearest]] = nearest
    distance = torch.where(place >= 0, of_pairs.distance[place], torch.inf)
    return found.or_nearer(Seen(distance, of_pairs.points[place]))


def _shaped(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))
