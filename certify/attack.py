"""Attacks: what no certificate may contradict. Nothing is proven by them."""

from __future__ import annotations

import torch
from torch import Tensor

from certify.dual import Iteration, Margins

_RAY = (1.0, 1.001, 1.02, 1.2, 2.0)
"""Where is looked on the ray through the last point."""

_HALVINGS = 8

_CLASSES = 4
"""How many other classes of each input are attacked: the nearest by the linear model there."""


def attack_distances(
    margins: Margins, x: Tensor, logits: Tensor, *, steps: int = 20, batch: int = 1024
) -> Tensor:
    """Distances ``(N, C)`` at which a point of another class was seen, or infinity.

    Only the nearest classes are tried, by the linear models at the inputs.

    The steps of `certify.dual.dual_bounds` without their limit, each to where the linear model of
    the margin vanishes; then the ray through the last point is searched for the nearest place where
    the other class wins.

    Args:
        margins: differences of logits and their gradients.
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
    for _ in range(steps):
        state.step(margins, batch)
    start = x[sample].flatten(1)
    way = state.u - start
    length = way.norm(dim=1)

    def seen(factor: Tensor) -> Tensor:
        points = (start + factor[:, None] * way).reshape(-1, *x.shape[1:])
        return _values(margins, points, state.own, other, batch) <= 0

    far = torch.full_like(length, torch.inf)
    for factor in _RAY:
        found = seen(torch.full_like(length, factor)) & torch.isfinite(length)
        far = torch.where(found, far.clamp_max(factor), far)
    near = torch.zeros_like(far)
    for _ in range(_HALVINGS):
        middle = torch.where(torch.isfinite(far), (near + far) / 2.0, 0.0)
        found = seen(middle) & torch.isfinite(far)
        far, near = torch.where(found, middle, far), torch.where(found, near, middle)
    distance = torch.minimum(state.upper, torch.where(far < torch.inf, far * length, torch.inf))
    result = torch.full_like(logits, torch.inf)
    result[sample, other] = distance
    return result


def broken(
    margins: Margins,
    x: Tensor,
    logits: Tensor,
    radius: Tensor,
    *,
    steps: int = 20,
    batch: int = 1024,
) -> Tensor:
    """Whether projected gradient descent finds another class within a radius of each input.

    For the nearest other classes, steps on the margin from the input and from a random point of the
    sphere, each projected onto it; the length of a step falls from twice the radius.

    Args:
        margins: as for `attack_distances`, and so are the next two.
        x: inputs.
        logits: there.
        radius: ``(N,)``; where it is zero or infinite nothing is tried.
        steps: forward-backward passes for each class and start.
        batch: points in one pass at most.

    Returns:
        ``(N,)`` bool.

    References:
        A. Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018.
    """
    own = logits.argmax(dim=1)
    tried = (radius > 0) & torch.isfinite(radius)
    sample, other = _nearest(margins, x, own, logits.shape[1], batch)
    sample, other = sample[tried[sample]], other[tried[sample]]
    result = torch.zeros_like(tried)
    generator = torch.Generator().manual_seed(0)
    for start in (False, True):
        for part in torch.arange(len(sample), device=x.device).split(batch):
            centre, size = x[sample[part]].flatten(1), radius[sample[part]][:, None]
            delta = torch.zeros_like(centre)
            if start:
                noise = torch.randn(centre.shape, generator=generator, dtype=centre.dtype)
                delta = _on_sphere(noise.to(centre), size)
            classes = own[sample[part]], other[part]
            for step in range(steps + 1):
                points = (centre + delta).reshape(-1, *x.shape[1:])
                value, gradient = margins(points, *classes)
                hit = (value <= 0) & (delta.norm(dim=1) <= size[:, 0])
                result[sample[part][hit]] = True
                length = 2.0 * size * (1.0 - step / (steps + 1))
                delta = _on_sphere(delta - _on_sphere(gradient.flatten(1), length), size)
    return result


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


def _values(margins: Margins, x: Tensor, own: Tensor, other: Tensor, batch: int) -> Tensor:
    parts = zip(x.split(batch), own.split(batch), other.split(batch), strict=True)
    return torch.cat([margins(*part)[0] for part in parts])
