r"""Products of two tensors that depend on the input, on a bounded domain.

On all inputs ``x g(x)`` has no Lipschitz constant. On a box ``[low, high]^d``, with centre ``c``,

    ``x g - y h = (x - y) g + y (g - h)``

gives ``Lip(x g) <= sup|g| Lip(x) + sup|x| Lip(g)``, with the largest entry of ``g``; and of ``x``
the largest entry too, or its L2 norm where an entry of ``g`` meets many of ``x`` (a gate for a
whole channel: the difference is at most ``|g_i - h_i| ||y_i||`` in channel ``i``). Both follow from
how far a tensor can get from its value at ``c``: its *reach*. That of a product is at most the
smaller of ``sup|g| reach(x) + sup|x(c)| reach(g)`` and ``sup||x|| sup|g| + ||x(c) g(c)||``.

The values at the centre are those of a forward pass in float64, and what `certify.centres` adds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from certify.signal import Input, Product, Signal, Slopes
from ff_bounds.rounding import SMALLEST_NORMAL, product_bound, round_up, sum_bound


def radius(signal: Signal) -> float:
    """Largest L2 distance of an input from the centre of its domain."""
    assert isinstance(signal.step, Input)
    assert signal.step.domain is not None
    low, high = signal.step.domain
    middle = (low + high) / 2.0
    furthest = max(high - middle, middle - low)
    return furthest * math.sqrt(math.prod(signal.shape[1:])) * (1.0 + 2**-40) + SMALLEST_NORMAL


def product_value(
    signal: Signal, values: Mapping[Signal, Tensor], reach: Mapping[Signal, Tensor] | None
) -> Tensor:
    """Bound the Lipschitz constant of a product or, without ``reach``, its own reach.

    Args:
        signal: of a `Product` step.
        values: Lipschitz bounds of all signals before it, or their reaches.
        reach: their reaches, where ``values`` are Lipschitz bounds.
    """
    assert isinstance(signal.step, Product)
    first, second = signal.parents
    known = values if reach is None else reach
    gate = _largest(second, known[second])
    spread = signal.step.spread
    if reach is not None:
        size = _norm(first, known[first]) if spread else _largest(first, known[first])
        return sum_bound(product_bound(gate, values[first]), product_bound(size, values[second]))
    at_centre = gate.new_tensor(_centre(first)[0 if spread else 1])
    through = sum_bound(product_bound(gate, known[first]), product_bound(at_centre, known[second]))
    whole = product_bound(_norm(first, known[first]), gate)
    return torch.minimum(through, sum_bound(whole, gate.new_tensor(_centre(signal)[0])))


def _norm(signal: Signal, reach: Tensor) -> Tensor:
    """Bound the L2 norm of a signal on the domain."""
    bound = round_up(reach + _centre(signal)[0], 2)
    return bound.clamp_max(_limit(signal) * math.sqrt(math.prod(signal.shape[1:])) * (1.0 + 2**-40))


def _largest(signal: Signal, reach: Tensor) -> Tensor:
    """Bound the entries of a signal on the domain."""
    return round_up(reach + _centre(signal)[1], 2).clamp_max(_limit(signal))


def _limit(signal: Signal) -> float:
    return signal.step.largest if isinstance(signal.step, Slopes) else math.inf


def _centre(signal: Signal) -> tuple[float, float]:
    assert signal.centre is not None
    return signal.centre
