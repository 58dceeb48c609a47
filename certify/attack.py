"""Attacks: what no certificate may contradict. Nothing is proven by them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from certify.dual import Iteration, Margins

Values = Callable[[Tensor], Tensor]
"""From points ``(M, ...)`` to logits ``(M, C)``."""

_RAY = (1.0, 1.001, 1.02, 1.2, 2.0)
"""Where is looked on the ray through the last point."""

_HALVINGS = 8

_CLASSES = 4
"""How many other classes of each input are attacked: the nearest by the linear model there."""


def attack_distances(
    margins: Margins,
    values: Values,
    x: Tensor,
    logits: Tensor,
    *,
    steps: int = 20,
    batch: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Distances ``(N,)`` at which a point of another class was seen, or infinity; and the points.

    Only the nearest classes are tried, by the linear models at the inputs.

    The steps of `certify.dual.dual_bounds` without their limit, each to where the linear model of
    the margin vanishes; then the ray through the last point is searched for the nearest place where
    the other class wins.

    Args:
        margins: differences of logits and their gradients, to search by; they may be rough.
        values: logits, by which a point is seen to be of another class.
        x: ``(N, ...)`` float64.
        logits: ``(N, C)`` at ``x``.
        steps: forward-backward passes for each class.
        batch: points in one pass at most.

    References:
        S.-M. Moosavi-Dezfooli, A. Fawzi, P. Frossard, DeepFool, CVPR 2016.
    """
    classes = logits.shape[1]
    own = logits.argmax(dim=1)
    sample, other = _nearest(margins, x, own, classes, batch)
    state = Iteration.start(x, sample, own[sample], other, logits.new_zeros(classes, classes))
    start = x[sample].flatten(1)
    nearest = start.clone()
    for _ in range(steps):
        before = state.upper.clone()
        state.step(margins, batch)
        nearer = (state.upper < before)[:, None]
        nearest = torch.where(nearer, state.before, nearest)  # where the step was evaluated

    def seen(points: Tensor) -> Tensor:
        shaped = points.reshape(-1, *x.shape[1:])
        parts = zip(shaped.split(batch), state.own.split(batch), other.split(batch), strict=True)
        return torch.cat([_margin(values(part), *pair) <= 0 for part, *pair in parts])

    way = state.u - start
    length = way.norm(dim=1)

    def on_ray(factor: Tensor) -> Tensor:
        return seen(start + factor[:, None] * way) & torch.isfinite(length)

    far = torch.full_like(length, torch.inf)
    for factor in _RAY:
        found = on_ray(torch.full_like(length, factor))
        far = torch.where(found, far.clamp_max(factor), far)
    near = torch.zeros_like(far)
    for _ in range(_HALVINGS):
        middle = torch.where(torch.isfinite(far), (near + far) / 2.0, 0.0)
        found = on_ray(middle) & torch.isfinite(far)
        far, near = torch.where(found, middle, far), torch.where(found, near, middle)
    distance = torch.where(far < torch.inf, far * length, torch.inf)
    direct = torch.where(seen(nearest), (nearest - start).norm(dim=1), torch.inf)
    found = torch.full((*logits.shape, 2), torch.inf, dtype=logits.dtype, device=logits.device)
    found[sample, other] = torch.stack([distance, direct], dim=1)
    points = x.flatten(1).repeat_interleave(2 * classes, 0).reshape(len(x), classes, 2, -1)
    on_way = start + torch.where(far < torch.inf, far, 0.0)[:, None] * way
    points[sample, other] = torch.stack([on_way, nearest], dim=1)
    smallest, place = found.flatten(1).min(dim=1)
    rows = torch.arange(len(x), device=x.device)
    return smallest, points.flatten(1, 2)[rows, place].reshape(x.shape)


def broken(
    margins: Margins,
    values: Values,
    x: Tensor,
    logits: Tensor,
    radius: Tensor,
    *,
    steps: int = 20,
    batch: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Whether projected gradient descent finds another class within a radius of each input.

    For the nearest other classes, steps on the margin from the input and from a random point of the
    sphere, each projected onto it; the length of a step falls from twice the radius.

    Args:
        margins: as for `attack_distances`, and so are the next three.
        values: logits.
        x: inputs.
        logits: there.
        radius: ``(N,)``; where it is zero or infinite nothing is tried.
        steps: forward-backward passes for each class and start.
        batch: points in one pass at most.

    Returns:
        ``(N,)`` bool, and points of another class where there are any.

    References:
        A. Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    own = logits.argmax(dim=1)
    tried = (radius > 0) & torch.isfinite(radius)
    sample, other = _nearest(margins, x, own, logits.shape[1], batch)
    sample, other = sample[tried[sample]], other[tried[sample]]
    result, points_of = torch.zeros_like(tried), x.clone()
    generator = torch.Generator().manual_seed(0)
    for start in (False, True):
        for part in torch.arange(len(sample), device=x.device).split(batch):
            centre, size = x[sample[part]].flatten(1), radius[sample[part]][:, None]
            delta = torch.zeros_like(centre)
            if start:
                noise = torch.randn(centre.shape, generator=generator, dtype=centre.dtype)
                delta = _on_sphere(noise.to(centre), size)
            classes = own[sample[part]], other[part]
            least, best = torch.full_like(size[:, 0], torch.inf), delta
            for step in range(steps + 1):
                points = (centre + delta).reshape(-1, *x.shape[1:])
                value, gradient = margins(points, *classes)
                lower = value < least
                least, best = (
                    torch.where(lower, value, least),
                    torch.where(lower[:, None], delta, best),
                )
                length = 2.0 * size * (1.0 - step / (steps + 1))
                delta = _on_sphere(delta - _on_sphere(gradient.flatten(1), length), size)
            inside = best.norm(dim=1) <= size[:, 0]
            points = (centre + best).reshape(-1, *x.shape[1:])
            found = inside & (_margin(values(points), *classes) <= 0)
            result[sample[part][found]] = True
            points_of[sample[part][found]] = points[found]
    return result, points_of


def _nearest(
    margins: Margins, x: Tensor, own: Tensor, classes: int, batch: int
) -> tuple[Tensor, Tensor]:
    """Pairs ``(M,)`` of a sample and one of the classes that are nearest by its linear models."""
    distance = torch.full((len(x), classes), torch.inf, dtype=x.dtype, device=x.device)
    others = torch.arange(classes, device=x.device) != own[:, None]
    sample, other = torch.nonzero(others, as_tuple=True)
    for part in torch.arange(len(sample), device=x.device).split(batch):
        s, t = sample[part], other[part]
        value, gradient = margins(x[s], own[s], t)
        distance[s, t] = value / gradient.flatten(1).norm(dim=1)
    count = min(_CLASSES, classes - 1)
    near = distance.nan_to_num(nan=torch.inf).topk(count, dim=1, largest=False).indices
    rows = torch.arange(len(x), device=x.device)[:, None].expand_as(near)
    chosen = near.flatten() != own[rows.flatten()]
    return rows.flatten()[chosen], near.flatten()[chosen]


def _on_sphere(vectors: Tensor, radius: Tensor) -> Tensor:
    """Vectors scaled to a length below the radius by more than what rounding could hide."""
    length: Tensor = vectors.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return vectors / length * (radius * (1.0 - 1e-9))


def _margin(logits: Tensor, own: Tensor, other: Tensor) -> Tensor:
    return (logits.gather(1, own[:, None]) - logits.gather(1, other[:, None]))[:, 0]
