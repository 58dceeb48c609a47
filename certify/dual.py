r"""The dual certificate: the largest ball that duality proves, and the attack that matches it.

Let ``f`` be a difference of logits, positive at ``x``, with ``Hess f >= -K`` everywhere. A point
``z`` with ``f(z) <= 0`` has, for every ``eta >= 0``,

    ``|z - x|^2 / 2 >= |z - x|^2 / 2 + eta f(z) >= d(eta) = min over all z of the middle``,

so ``f > 0`` on the open ball of radius ``sqrt(2 d(eta))``. For ``eta K < 1`` the middle is strongly
convex with modulus ``1 - eta K``, and its minimum is below its value at any point ``u`` by at most
``|gradient|^2 / (2 (1 - eta K))``:

    ``d(eta) >= |u - x|^2 / 2 + eta f(u) - |u - x + eta grad f(u)|^2 / (2 (1 - eta K))``.

That is a proof whatever ``u`` is. At ``u = x``, with the best ``eta``, it is the closed form of
`certify.second_order`; where it comes from the exact minimum with ``f(u) = 0``, ``u`` is a nearest
point of the other class and the certificate equals the attack.

The iteration: ``u`` moves towards ``x - eta grad f(u)``, with the ``eta`` for which the linear
model of ``f`` at ``u`` vanishes (as in DeepFool), but no more than ``1 / K`` allows; how far it
moves follows from the last two gradients (Barzilai and Borwein). Each step is one forward and one
backward pass, and its value and gradient prove a radius by the ``eta`` that is best for them, which
has a closed form. As ``d(eta) <= |u - x|^2 / 2 + eta f(u)`` for all ``eta < 1 / K``, it also tells
what radius further steps could prove at most.

References:
    S. Singla, S. Feizi, Second-Order Provable Defenses against Adversarial Attacks, ICML 2020,
    theorem 2 (curvature-based robustness certificate; there without the residual term).
    S.-M. Moosavi-Dezfooli, A. Fawzi, P. Frossard, DeepFool, CVPR 2016 (the direction).
    J. Barzilai, J. M. Borwein, Two-point step size gradient methods, IMA J. Numer. Anal. 1988.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certify.certificates import Certificate
from ff_bounds.rounding import UNIT_ROUNDOFF, gamma

Margins = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""From points ``(M, ...)`` and classes ``y, t (M,)`` to ``f = logit_y - logit_t`` and gradients."""

Rounding = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From distances ``(N,)`` to bounds of what rounding can do to all ``f (N, C)`` and their gradients
``(N,)`` at points that are no farther from the samples."""

STEPS = 11
"""Of the iteration, for each class: 99 forward-backward passes for ten classes."""

_NEAR = 0.98
"""How near ``eta K`` comes to one in the iteration; the proof may go nearer."""

_SOLVED = 1e-4
"""Relative gap between what is proven and what could be below which a class is left alone."""

_SHORTEST, _LONGEST = 0.1, 20.0
"""Limits of a step, over that of the plain iteration."""


@dataclass(frozen=True)
class DualResult:
    """What is known about the distance to the nearest point of another class.

    Attributes:
        prediction: ``(N,)`` the predicted classes.
        lower: ``(N, C)`` proven radii, one for each other class; infinite for the own one.
        upper: ``(N, C)`` distances at which a point of that class was seen, or infinity.
        passes: forward-backward passes, one for each point.
        exact: ``(N,)``, the smallest radii in exact arithmetic, where ``lower`` is about a machine
            that rounds.
    """

    prediction: Tensor
    lower: Tensor
    upper: Tensor
    passes: int
    exact: Tensor | None = None

    def certificate(self) -> Certificate:
        """Certify by the smallest radius."""
        return Certificate(self.prediction, self.lower.amin(dim=1), self.exact)


def margins_of(model: nn.Module, dtype: torch.dtype = torch.float64) -> Margins:
    """Differences of two logits of a network, and their gradients; computed in ``dtype``."""

    def margins(x: Tensor, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            x, own, other = x.detach().clone(), own.clone(), other.clone()
            x.requires_grad_()
            entering = x.clone() if x.dtype == dtype else x.to(dtype)  # may be changed in place
            logits: Tensor = model(entering).to(x.dtype)
            found = logits.gather(1, own[:, None]) - logits.gather(1, other[:, None])
            (gradient,) = torch.autograd.grad(found.sum(), x)
        return found[:, 0].detach(), gradient

    return margins


def proven_radius(
    square: Tensor,
    inner: Tensor,
    slope: Tensor,
    margin: Tensor,
    curvature: Tensor,
    entries: int,
    error: Tensor | float = 0.0,
) -> Tensor:
    r"""Radius that one point proves, by the best ``eta``.

    Claim: the module's text. With ``s = 1 - eta K`` and ``c = |g|^2`` the bound is
    ``const - (f / K + c / (2 K^2)) s - |delta + g / K|^2 / (2 s)``, largest at
    ``s = |delta + g / K| / sqrt(2 f / K + |g|^2 / K^2)``. A larger ``K`` holds as well; those that
    are tiny beside ``|g|^2 / f`` are raised. Any ``eta`` would do, so that only the evaluation
    has to be rounded: each inner product of vectors with ``n`` entries, themselves rounded
    once, is off by at most ``gamma_{n+4}`` times the product of the norms. What underflows is below
    ``n 2^-1000``, and enters times ``eta^2 / (1 - eta K)`` at most, which is kept below ``2^810``.
    Where ``g`` is off by ``e`` at most, ``|delta + eta g|`` is larger by ``eta e`` at most.

    Args:
        square: ``|u - x|^2``.
        inner: ``(u - x) . grad f(u)``.
        slope: ``|grad f(u)|^2``.
        margin: ``f(u)``.
        curvature: ``K >= 0``, may be infinite.
        entries: number of entries of ``x``.
        error: bound of the L2 error of ``grad f(u)``.

    Returns:
        Radii of the same shape, zero where nothing is proven.
    """
    scale = (margin.abs() + inner.abs() + square.sqrt() * slope.sqrt()).clamp_min(2.0**-500)
    most = curvature.clamp_min(0.0) + 1e-10 * slope / scale
    shift = 1.0 / most
    distance = (square + 2.0 * inner * shift + slope * shift.square()).clamp_min(0.0).sqrt()
    best = distance / (2.0 * margin * shift + slope * shift.square()).clamp_min(2.0**-500).sqrt()
    room = best.nan_to_num(nan=1.0).clamp(1e-3, 1.0)
    eta = (1.0 - room) * shift
    left = (1.0 - eta * most) - 4.0 * UNIT_ROUNDOFF
    residual = (square + 2.0 * eta * inner + eta * slope * eta).clamp_min(0.0)
    off = 2.0 * gamma(entries + 8) * (square.sqrt() + eta * slope.sqrt()).square()
    length = (residual + off).sqrt() + eta * error
    parts = (0.5 * square, eta * margin, length.square() / (2.0 * left))
    sizes = parts[0] + parts[1].abs() + parts[2]
    underflow = entries * 2.0**-180
    value = parts[0] + parts[1] - parts[2] - (gamma(entries + 16) * sizes + off + underflow)
    radius = (2.0 * value.clamp_min(0.0)).sqrt() * (1.0 - 8.0 * UNIT_ROUNDOFF)
    sound = torch.isfinite(radius) & torch.isfinite(curvature) & (left > 0) & (eta < 2.0**400)
    return torch.where(sound, radius, 0.0)


def dual_bounds(
    margins: Margins,
    x: Tensor,
    logits: Tensor,
    curvature: Tensor,
    *,
    allowance: Tensor | None = None,
    rounding: Rounding | None = None,
    steps: int = STEPS,
    early_exit: bool = True,
    batch: int = 1024,
) -> DualResult:
    """Bound from both sides how far the nearest point of each other class is.

    Args:
        margins: differences of logits and their gradients.
        x: ``(N, ...)`` float64.
        logits: ``(N, C)`` at ``x``.
        curvature: ``(C, C)``, see `certify.curvature.curvature_bound`.
        allowance: ``(N, C)``, by how much the margins that count are smaller than these.
        rounding: of the values and gradients that ``margins`` computes; ``None`` for none.
        steps: most forward-backward passes for each class.
        early_exit: stop with a class that cannot have the smallest radius, as what is proven for it
            already is above all that could be proven for another one.
        batch: points in one pass at most.
    """
    prediction = logits.argmax(dim=1)
    top = logits.gather(1, prediction[:, None])
    less = torch.zeros_like(logits) if allowance is None else allowance
    lower = torch.where(top - less > logits, 0.0, -torch.inf).to(logits)
    lower.scatter_(1, prediction[:, None], torch.inf)
    upper = torch.full_like(lower, torch.inf)
    reach = upper.clone()
    sample, other = torch.nonzero(lower == 0.0, as_tuple=True)
    lower.clamp_(min=0.0)
    state = Iteration.start(x, sample, prediction[sample], other, curvature)
    state.allowance = less[sample, other]
    passes = 0
    for _ in range(steps):
        if not len(state.sample):
            break
        passes += len(state.sample)
        state.step(margins, batch, rounding)
        where = (state.sample, state.other)
        lower[where] = state.lower
        upper[where] = state.upper
        reach[where] = state.reach
        done = state.lower >= (1.0 - _SOLVED) * state.reach
        if early_exit:
            done |= state.lower >= reach.amin(dim=1)[state.sample]
        state = state.chosen(~done)
    return DualResult(prediction, lower, upper, passes)


@dataclass
class Iteration:
    """Pairs of a sample and another class, each with the point where its iteration is."""

    x: Tensor
    sample: Tensor
    own: Tensor
    other: Tensor
    curvature: Tensor
    u: Tensor
    lower: Tensor
    upper: Tensor
    reach: Tensor
    before: Tensor
    gradient: Tensor
    allowance: Tensor
    off: Tensor
    error: Tensor

    @staticmethod
    def start(
        x: Tensor, sample: Tensor, own: Tensor, other: Tensor, curvature: Tensor
    ) -> Iteration:
        """Begin at the samples themselves; see `dual_bounds` for ``curvature``."""
        zero = x.new_zeros(len(sample))
        far = torch.full_like(zero, torch.inf)
        u = x[sample].flatten(1)
        nothing = torch.full_like(u, torch.nan)
        limits = curvature[own, other]
        return Iteration(
            x,
            sample,
            own,
            other,
            limits,
            u,
            lower=zero,
            upper=far,
            reach=far.clone(),
            before=nothing,
            gradient=nothing.clone(),
            allowance=zero.clone(),
            off=zero.clone(),
            error=zero.clone(),
        )

    def chosen(self, which: Tensor) -> Iteration:
        """Some of the pairs."""
        if bool(which.all()):
            return self
        names = [name for name in self.__dataclass_fields__ if name != "x"]
        return Iteration(self.x, **{name: getattr(self, name)[which] for name in names})

    def step(self, margins: Margins, batch: int, rounding: Rounding | None = None) -> None:
        """Evaluate all points, prove what they prove and move them."""
        self.error = torch.zeros_like(self.lower)
        self.off = torch.zeros_like(self.lower)
        if rounding is not None:
            moved = (self.u - self.x[self.sample].flatten(1)).norm(dim=1) * (1.0 + 1e-9)
            farthest = moved.new_zeros(len(self.x)).scatter_reduce(0, self.sample, moved, "amax")
            farthest = farthest + 2.0**-400  # squares that underflow
            values, gradients = rounding(farthest)
            self.off, self.error = values[self.sample, self.other], gradients[self.sample]
        for part in torch.arange(len(self.sample), device=self.x.device).split(batch):
            self._step(part, margins)

    def _step(self, part: Tensor, margins: Margins) -> None:
        x = self.x[self.sample[part]].flatten(1)
        u = self.u[part]
        value, gradient = margins(
            u.reshape(-1, *self.x.shape[1:]), self.own[part], self.other[part]
        )
        gradient = gradient.flatten(1)
        delta = u - x
        square, slope = delta.square().sum(dim=1), gradient.square().sum(dim=1)
        inner = (delta * gradient).sum(dim=1)
        curvature = self.curvature[part]
        counted = value - self.allowance[part] - self.off[part]
        found = proven_radius(
            square, inner, slope, counted, curvature, x.shape[1], self.error[part]
        )
        self.lower[part] = torch.maximum(self.lower[part], found)
        seen = torch.where(value <= 0, square.sqrt(), torch.inf)
        self.upper[part] = torch.minimum(self.upper[part], seen)
        reach = (square + 2.0 * counted.clamp_min(0.0) / curvature).sqrt() * (1.0 + 1e-9)
        reach = torch.minimum(self.upper[part], reach.nan_to_num(nan=torch.inf))
        self.reach[part] = torch.minimum(self.reach[part], reach)
        # The linear model of f at u vanishes at x - eta g; a little beyond, so that f does.
        eta = ((value - inner) / slope * (1.0 + 1e-6)).clamp_min(0.0)
        eta = torch.minimum(eta, _NEAR / curvature)[:, None]
        residual = delta + eta * gradient
        moved, turned = u - self.before[part], residual - eta * self.gradient[part]
        turned = turned - (self.before[part] - x)
        size = moved.square().sum(dim=1) / (moved * turned).sum(dim=1)
        step = torch.where(size > 0, size, 1.0).clamp(_SHORTEST, _LONGEST)
        self.before[part], self.gradient[part] = u, gradient
        following = u - step[:, None] * residual
        sound = torch.isfinite(following).all(dim=1, keepdim=True)
        self.u[part] = torch.where(sound, following, u)
