r"""Training for the dual certificate: margins as small as an attack in the budget makes them.

For a sample with label ``y`` and another class ``t``, how far ``f = logit_y - logit_t`` can fall on
the ball of radius ``rho`` follows from `certify.dual`: with ``z`` the minimum of
``|z - x|^2 / 2 + eta f(z)``, for ``eta < 1 / K``,

    ``f >= f(z) - (rho^2 - |z - x|^2) / (2 eta)`` on the ball.

Where the curvature allows an ``eta`` with ``|z - x| = rho`` the last term is zero, and ``f(z)`` is
the exact minimum: adversarial training that is certified. Elsewhere ``eta`` is a little below
``1 / K``, and the term is a penalty of the curvature of just the pairs of classes that need it.

References:
    S. Singla, S. Feizi, Second-Order Provable Defenses against Adversarial Attacks, ICML 2020,
    section 5 (curvature-based robust training: cross-entropy at the dual attack point).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.losses import own_class

Network = Callable[[Tensor], Tensor]
"""From inputs ``(N, ...)`` to logits ``(N, C)``."""

_NEAR = 0.95
"""How near ``eta K`` comes to one."""


@dataclass(frozen=True)
class DualPoints:
    """Dual attack points of a batch, for some other classes of each sample.

    Attributes:
        classes: ``(N, k)`` which classes, the nearest first.
        offsets: ``(N, k, ...)`` how far the points are from the inputs; no gradient.
        limited: ``(N, k)`` whether the curvature kept a point within the ball.
        shares: ``(N, k)`` radius of each ball as a share of the budget; no gradient.
    """

    classes: Tensor
    offsets: Tensor
    limited: Tensor
    shares: Tensor

    def moved(self, x: Tensor, epsilon: Tensor) -> Tensor:
        """The points ``(N, k, ...)`` as functions of inputs ``(N, ...)`` and of the budget."""
        axes = [1] * (self.offsets.ndim - 2)
        growth = torch.where(self.limited, 1.0, epsilon / epsilon.detach().clamp_min(1e-30))
        return x[:, None] + growth.reshape(*growth.shape, *axes) * self.offsets


def dual_points(
    model: Network,
    x: Tensor,
    logits: Tensor,
    labels: Tensor,
    curvature: Tensor,
    epsilon: Tensor,
    *,
    classes: int,
    steps: int,
    within_reach: bool = False,
) -> DualPoints:
    """Find dual attack points for the classes with the largest logits beside the label's.

    Each step sets the point to ``x - eta grad f(point)`` with ``eta = epsilon / |grad f|``, or less
    where the curvature asks for it.

    Args:
        model: the network.
        x: ``(N, ...)`` inputs that require a gradient.
        logits: ``(N, C)`` there, as the network's result.
        labels: ``(N,)``.
        curvature: ``(C, C)`` as from `certify.curvature`, here estimated.
        epsilon: radius of the ball, a scalar.
        classes: how many other classes of each sample.
        steps: gradients for each point.
        within_reach: end each ball at the boundary to its class, if that is nearer than ``epsilon``
            by the margin and its gradient at ``x``; as in `certify.losses.emma_loss`, no sample
            is then asked for more than it can give.
    """
    own = own_class(labels, logits)
    others = logits.detach().masked_fill(own, -torch.inf).topk(classes, dim=1).indices
    label, other = labels.repeat_interleave(classes), others.flatten()
    start = x.detach().repeat_interleave(classes, dim=0)
    limit = _NEAR / curvature.detach()[label, other].to(x.dtype).clamp_min(1e-12)
    slopes = [
        torch.autograd.grad(_margins(logits, labels, one).sum(), x, retain_graph=True)[0]
        for one in others.unbind(dim=1)
    ]
    gradient = torch.stack(slopes, dim=1).flatten(0, 1)
    budget = epsilon.detach()
    radii = budget.expand(len(gradient))
    if within_reach:
        repeated = logits.detach().repeat_interleave(classes, dim=0)
        reach = _margins(repeated, label, other) / _lengths(gradient)
        radii = torch.minimum(reach.to(radii.dtype).clamp_min(0.0), radii)
    eta, points = _moved(start, gradient, limit, radii)
    for _ in range(steps - 1):
        with torch.enable_grad():
            points = points.detach().requires_grad_()
            found = _margins(model(points), label, other)
            (gradient,) = torch.autograd.grad(found.sum(), points)
        eta, points = _moved(start, gradient, limit, radii)
    shape = (x.shape[0], classes)
    offsets = (points - start).detach().reshape(*shape, *x.shape[1:])
    shares = (radii / budget.clamp_min(1e-30)).reshape(shape)
    return DualPoints(others, offsets, (eta >= limit).reshape(shape), shares)


def worst_logits(
    model: Network,
    x: Tensor,
    logits: Tensor,
    labels: Tensor,
    curvature: Tensor,
    epsilon: Tensor,
    found: DualPoints,
) -> Tensor:
    """Logits ``(N, C)`` relative to the label's, at their certified largest for some classes.

    Args:
        model: as for `dual_points`, and so are the next three.
        x: inputs; those that are features of other layers have a gradient.
        logits: there.
        labels: of them.
        curvature: likewise, with a gradient.
        epsilon: radius of the ball.
        found: what that returned.

    Returns:
        Minus the margins, with a gradient: zero for the label.
    """
    count, classes = found.classes.shape
    label = labels.repeat_interleave(classes)
    other = found.classes.flatten()
    points = found.moved(x, epsilon).flatten(0, 1)
    margin = _margins(model(points).to(logits.dtype), label, other).reshape(count, classes)
    square = found.offsets.flatten(2).square().sum(dim=2)
    rest = ((found.shares * epsilon) ** 2 - square).clamp_min(0.0) / 2.0
    bend = curvature.to(logits.dtype)[label, other].reshape(count, classes) / _NEAR
    margin = margin - torch.where(found.limited, rest * bend, 0.0)
    relative = logits - logits.gather(1, labels[:, None])
    return relative.scatter(1, found.classes, -margin)


def _moved(start: Tensor, gradient: Tensor, limit: Tensor, radii: Tensor) -> tuple[Tensor, Tensor]:
    """Multipliers ``(M,)`` and the points ``start - eta gradient``."""
    eta = torch.minimum(radii / _lengths(gradient), limit)
    return eta, start - eta.reshape(-1, *[1] * (start.ndim - 1)) * gradient


def _lengths(gradient: Tensor) -> Tensor:
    lengths: Tensor = gradient.flatten(1).norm(dim=1)
    return lengths.clamp_min(1e-12)


def _margins(logits: Tensor, label: Tensor, other: Tensor) -> Tensor:
    return (logits.gather(1, label[:, None]) - logits.gather(1, other[:, None]))[:, 0]
