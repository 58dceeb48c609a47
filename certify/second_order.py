r"""Radii from a margin, its gradient and bounds of first and second derivatives.

Let ``f`` be a difference of logits with ``f(x) = D > 0``, ``|grad f(x)| = G``, ``Hess f >= -K`` and
Lipschitz constant ``L``. On a ray from ``x`` the slope at distance ``t`` is at least
``-min(L, G + K t)``, so ``f`` stays positive up to the radius ``r`` with

    ``integral_0^r min(L, G + K t) dt = D``.

Without ``L`` that is ``r = 2 D / (G + sqrt(G^2 + 2 K D))``, the closed form of Singla and Feizi;
without ``K`` it is ``D / L``. Up to ``t = (L - G) / K`` the second-order term is the smaller, then
the first-order one, so that the combined radius is at least as large as both.

References:
    S. Singla, S. Feizi, Second-Order Provable Defenses against Adversarial Attacks, ICML 2020,
    theorem 1; the combination as in T. Entesari, S. Sharifi, M. Fazlyab, Compositional Curvature
    Bounds for Deep Neural Networks, ICML 2024, section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ff_bounds.rounding import round_up

_SHORTER = 1.0 - 1e-12
"""A radius is shortened by this before it is checked."""


def second_order_radius(
    margin: Tensor, gradient: Tensor, curvature: Tensor, lipschitz: Tensor
) -> Tensor:
    r"""Largest radius within which a margin is proven to stay positive.

    Claim: as the module's text. The radius is computed, then checked: for any ``s`` in ``[0, r]``
    the integral is at most ``G s + K s^2 / 2 + L (r - s)``, which is evaluated with rounding up.
    Where the check fails, the first-order radius ``D / L`` is returned, rounded down.

    Args:
        margin: ``D``, float64, any shape.
        gradient: ``G >= 0``, of that shape.
        curvature: ``K >= 0``, may be infinite.
        lipschitz: ``L >= 0``, may be infinite.

    Returns:
        Radii of the same shape: zero where the margin is not positive or anything is NaN, infinite
        where the margin cannot change.

    Example:
        >>> one = torch.ones(1, dtype=torch.float64)
        >>> round(second_order_radius(1.5 * one, one, one, torch.inf * one).item(), 9)
        1.0
    """
    quadratic = 2.0 * margin / (gradient + (gradient.square() + 2.0 * curvature * margin).sqrt())
    length = ((lipschitz - gradient) / curvature).clamp_min(0.0)  # up to where slopes are equal
    drop = gradient * length + 0.5 * curvature * length * length
    beyond = length + (margin - drop) / lipschitz
    within = torch.isnan(beyond) | (drop >= margin)
    radius = torch.where(within, quadratic, beyond) * _SHORTER
    split = torch.minimum(length, radius).nan_to_num(nan=0.0)
    split = torch.where(within, radius, split)
    proven = _falls_less(margin, gradient, curvature, lipschitz, radius, split)
    first_order = (margin / lipschitz * _SHORTER).nan_to_num(nan=0.0, posinf=0.0)
    result = torch.where(proven, torch.maximum(radius, first_order), first_order)
    result = torch.where(result > 2.0**-900, result, 0.0)  # what underflows may be rounded up
    usable = (margin > 0) & torch.isfinite(margin)
    result = torch.where(usable, result, 0.0)
    return torch.where(usable & (lipschitz == 0), torch.inf, result)


def _falls_less(
    margin: Tensor,
    gradient: Tensor,
    curvature: Tensor,
    lipschitz: Tensor,
    radius: Tensor,
    split: Tensor,
) -> Tensor:
    """Whether the margin falls by less than itself, with rounding up."""
    rest = radius - split
    # Where nothing is left an infinite constant plays no part.
    linear = torch.where(rest > 0, lipschitz * rest, 0.0)
    bend = torch.where(split > 0, 0.5 * curvature * split * split, 0.0)
    fall = round_up(gradient * split + bend + linear, 8) + 2.0**-600  # for what underflows
    return (radius >= 0) & (radius < 2.0**400) & (fall < margin)
