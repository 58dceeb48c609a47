r"""What the derivative of a difference of logits can be at each tensor of a network.

Carried backwards from the logits, for many pairs of classes at once: an interval of each entry and
a bound of the L2 norm. Both hold at every input, and each makes the other smaller.

References:
    S. Singla, S. Feizi, Second-Order Provable Defenses against Adversarial Attacks, ICML 2020,
    section 4 (the absolute backward pass; here intervals with two ends, through any affine maps).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.linear_maps import TINY, LinearMap, norms
from certify.signal import (
    Affine,
    Concatenation,
    Flatten,
    Input,
    Lipschitz,
    Signal,
    Slopes,
    Sum,
)
from ff_bounds.rounding import UNIT_ROUNDOFF, product_bound, round_up


@dataclass(frozen=True)
class Sensitivity:
    """Derivatives with respect to one tensor lie within ``centre +- radius`` and within ``norm``.

    Attributes:
        centre, radius: ``(pairs, *shape)`` float64, of the tensor's shape for one sample.
        norm: ``(pairs,)`` float64, of the L2 norm.
    """

    centre: Tensor
    radius: Tensor
    norm: Tensor

    @property
    def axes(self) -> int:
        """Number of axes of the tensor."""
        return self.centre.ndim - 1

    def largest(self) -> Tensor:
        """Upper bounds of the absolute values."""
        return round_up(self.centre.abs() + self.radius, 1)

    def ends(self) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, rounded outward."""
        slack = 4.0 * UNIT_ROUNDOFF * (self.centre.abs() + self.radius)
        return self.centre - self.radius - slack, self.centre + self.radius + slack


def seeds(first: Tensor, second: Tensor, classes: int) -> Sensitivity:
    """Of ``logit_first - logit_second`` at the logits, for classes ``(pairs,)``."""
    one = torch.eye(classes, dtype=torch.float64, device=first.device)
    centre = one[first] - one[second]
    root = torch.full_like(first, 2.0**0.5, dtype=torch.float64)
    return Sensitivity(centre, torch.zeros_like(centre), round_up(root, 2))


def ball(norm: Tensor, shape: Sequence[int]) -> Sensitivity:
    """Nothing known but the norm."""
    radius = norm.reshape(-1, *[1] * len(shape)).expand(-1, *shape)
    return Sensitivity(torch.zeros_like(radius), radius, norm)


def between(low: Tensor, high: Tensor, norm: Tensor) -> Sensitivity:
    """Intervals given by their ends, cut to what the norm allows."""
    limit = norm.reshape(-1, *[1] * (low.ndim - 1))
    low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    slack = 4.0 * UNIT_ROUNDOFF * (low.abs() + high.abs())
    centre = (low + high) / 2.0
    found = Sensitivity(centre, ((high - low) / 2.0).clamp_min(0.0) + slack, norm)
    return Sensitivity(
        found.centre, found.radius, torch.minimum(norm, norms(found.largest(), found.axes))
    )


def added(parts: Sequence[Sensitivity]) -> Sensitivity:
    """Of a tensor that is used several times."""
    if len(parts) == 1:
        return parts[0]
    lows, highs = zip(*(part.ends() for part in parts), strict=True)
    sizes = torch.stack([part.largest() for part in parts]).sum(dim=0)
    slack = 2.0 * len(parts) * UNIT_ROUNDOFF * sizes
    norm = round_up(torch.stack([part.norm for part in parts]).sum(dim=0), len(parts))
    return between(torch.stack(lows).sum(0) - slack, torch.stack(highs).sum(0) + slack, norm)


def through_slopes(found: Sensitivity, low: float, high: float) -> Sensitivity:
    """Before a function of each entry with slopes between two numbers."""
    least, most = found.ends()
    products = torch.stack([low * least, low * most, high * least, high * most])
    steepest = max(abs(low), abs(high))
    slack = 2.0 * UNIT_ROUNDOFF * products.abs().amax(dim=0) + TINY
    norm = product_bound(found.norm, found.norm.new_full((), steepest))
    return between(products.amin(dim=0) - slack, products.amax(dim=0) + slack, norm)


def through_map(
    found: Sensitivity, linear: LinearMap, norm: Tensor, shape: Sequence[int]
) -> Sensitivity:
    """Before an affine map.

    Args:
        found: behind it.
        linear: the map; see `LinearMap.pull` for its rounding.
        norm: bound of its norm.
        shape: of one sample before it.
    """
    size = round_up(norms(found.centre, found.axes) + norms(found.radius, found.axes), 2)
    error = round_up(linear.charge * size, 1) + TINY
    error = error.reshape(-1, *[1] * len(shape))
    centre = linear.pull(found.centre)
    radius = round_up(linear.pull(found.radius, absolute=True) + 2.0 * error, 2)
    exact = Sensitivity(centre, radius, found.norm)
    low, high = exact.ends()
    # Each entry is an inner product with a column.
    columns = linear.column_norms()
    limit = product_bound(found.norm.reshape(-1, *[1] * len(shape)), columns.expand(shape)[None])
    low, high = torch.maximum(low, -limit), torch.minimum(high, limit)
    return between(low, high, product_bound(found.norm, norm))


def pulled_back(
    order: Sequence[Signal],
    start: Sensitivity,
    maps: Mapping[Signal, LinearMap],
    operator_norms: Mapping[Signal, Tensor],
) -> dict[Signal, Sensitivity]:
    """Carry sensitivities from the last signal to all others.

    Args:
        order: signals, parents first.
        start: at the last of them.
        maps: those of the affine steps whose action is known.
        operator_norms: of all affine steps.

    Returns:
        The sensitivity at the activations (`Slopes`), behind them.

    Raises:
        UnsupportedModel: a step that is not affine and has no second derivative.
    """
    waiting: dict[Signal, list[Sensitivity]] = {order[-1]: [start]}
    result: dict[Signal, Sensitivity] = {}
    for signal in reversed(order):
        if isinstance(signal.step, Input):
            continue
        found = added(waiting.pop(signal))
        if isinstance(signal.step, Slopes):
            result[signal] = found
        for parent, part in zip(
            signal.parents, _before(signal, found, maps, operator_norms), strict=True
        ):
            if not isinstance(parent.step, Input):
                waiting.setdefault(parent, []).append(part)
    return result


def _before(
    signal: Signal,
    found: Sensitivity,
    maps: Mapping[Signal, LinearMap],
    operator_norms: Mapping[Signal, Tensor],
) -> list[Sensitivity]:
    """Sensitivities at the parents of a signal.

    Only a tensor of the network itself has a known shape; one inside of a rule gets a ball.
    """
    step = signal.step
    shapes = [parent.shape[1:] if parent.node else () for parent in signal.parents]
    placed = signal.node != "" and len(signal.shape) > 1 and all(shapes)
    if isinstance(step, Slopes):
        return [through_slopes(found, step.low, step.high)]
    if isinstance(step, Affine):
        if placed and signal in maps:
            return [through_map(found, maps[signal], operator_norms[signal], shapes[0])]
        return [ball(product_bound(found.norm, operator_norms[signal]), shapes[0])]
    if not placed and isinstance(step, (Flatten, Sum, Concatenation)):
        return [ball(found.norm, shape) for shape in shapes]
    if isinstance(step, Flatten):
        centre, radius = (t.reshape(-1, *shapes[0]) for t in (found.centre, found.radius))
        return [Sensitivity(centre, radius, found.norm)]
    if isinstance(step, Sum):
        return [found] * len(shapes)
    if isinstance(step, Concatenation):
        if not step.channels:
            return [ball(found.norm, shape) for shape in shapes]
        sizes = [shape[0] for shape in shapes]
        pieces = zip(found.centre.split(sizes, 1), found.radius.split(sizes, 1), strict=True)
        return [between(c - r, c + r, found.norm) for c, r in map(_widened, pieces)]
    assert isinstance(step, Lipschitz)
    constant = torch.as_tensor(step.constant, dtype=torch.float64, device=found.norm.device)
    return [ball(product_bound(found.norm, constant), shapes[0])]


def _widened(piece: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    centre, radius = piece
    return centre, round_up(radius + 4.0 * UNIT_ROUNDOFF * centre.abs(), 2)


def is_twice_differentiable(signal: Signal) -> bool:
    """Whether a step is affine, or smooth with a known bound of its second derivative."""
    step = signal.step
    if isinstance(step, Slopes):
        return step.curvature is not None or step.low == step.high
    if isinstance(step, Lipschitz):
        return step.linear
    return isinstance(step, (Affine, Flatten, Sum, Concatenation, Input))
