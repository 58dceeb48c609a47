"""Functions of each entry made of straight pieces, and sorting; others are in `smooth`."""

from __future__ import annotations

import builtins
import math
import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify.rules.registry import by_attributes, lipschitz_rule
from certify.rules.rounding import elementwise, exact, piecewise, sixths
from certify.signal import Signal, UnsupportedModel
from models import MaxMin

SINGLE_SIXTH = (2**26 + 2) / 6 / 2**26
"""1/6 rounded (up) to float32, exactly."""


def number(value: Any) -> float:
    """A parameter of a function, which must be a plain number.

    Raises:
        UnsupportedModel: NaN, a tensor, or a signal.
    """
    if not isinstance(value, (int, float)):
        raise UnsupportedModel(f"expected a number as parameter, got {type(value).__name__}")
    if math.isnan(value):
        raise UnsupportedModel("a parameter is NaN")
    return value


@lipschitz_rule(F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_", rounding=exact)
def relu(input: Signal, inplace: bool = False) -> Signal:
    """Slopes 0 and 1."""
    return input.piecewise((0.0,), (0.0, 1.0))


by_attributes(relu, nn.ReLU, rounding=exact)


@lipschitz_rule(F.leaky_relu, F.leaky_relu_, rounding=piecewise)
def leaky_relu(input: Signal, negative_slope: float = 0.01, inplace: bool = False) -> Signal:
    """Slopes 1 and ``negative_slope``."""
    slope = number(negative_slope)
    return input.piecewise((0.0,), (slope, 1.0))


by_attributes(leaky_relu, nn.LeakyReLU, attributes="negative_slope", rounding=piecewise)


@lipschitz_rule(F.prelu, "prelu", rounding=elementwise)
def prelu(input: Signal, weight: Tensor) -> Signal:
    """Slopes 1 and the weights, one for all channels or one each."""
    if not isinstance(weight, Tensor):
        raise UnsupportedModel("a PReLU whose weights depend on the input")
    low, high = number(weight.min().item()), number(weight.max().item())
    if low == high:
        return input.piecewise((0.0,), (low, 1.0))
    return input.elementwise(min(1.0, low), max(1.0, high))


by_attributes(prelu, nn.PReLU, attributes="weight", rounding=elementwise)


@lipschitz_rule(F.rrelu, torch.rrelu, torch.rrelu_, rounding=piecewise)
def rrelu(
    input: Signal,
    lower: float = 1 / 8,
    upper: float = 1 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Signal:
    """In evaluation a leaky ReLU with the mean of its slopes, which torch rounds as we do."""
    if training:
        raise UnsupportedModel("rrelu with training=True is random")
    return leaky_relu(input, (number(lower) + number(upper)) / 2)


by_attributes(rrelu, nn.RReLU, attributes="lower upper", rounding=piecewise)


@lipschitz_rule(F.threshold, torch.threshold, torch.threshold_, rounding=piecewise)
def threshold(input: Signal, threshold: float, value: float, inplace: bool = False) -> Signal:
    """``x`` above the threshold, else ``value``: with the two equal, ``max(x, value)``."""
    if not number(threshold) == number(value) < math.inf:
        raise UnsupportedModel(
            f"threshold={threshold} with another value={value} is not continuous"
        )
    return clamp(input, min=threshold)


by_attributes(threshold, nn.Threshold, attributes="threshold value", rounding=piecewise)


@lipschitz_rule(
    torch.clamp,
    torch.clamp_,
    torch.clip,
    torch.clip_,
    "clamp",
    "clamp_",
    "clip",
    "clip_",
    rounding=piecewise,
)
def clamp(input: Signal, min: float | None = None, max: float | None = None) -> Signal:
    """Slopes 1 between the ends, 0 outside."""
    low = -math.inf if min is None else number(min)
    high = math.inf if max is None else number(max)
    if low > high or low == math.inf or high == -math.inf:
        raise UnsupportedModel(f"expected min <= max to clamp between, got {low} and {high}")
    breaks = [end for end in (low, high) if math.isfinite(end)]
    slopes = [0.0] * math.isfinite(low) + [1.0] + [0.0] * math.isfinite(high)
    return input.piecewise(breaks, slopes, largest=builtins.max(abs(low), abs(high)))


@lipschitz_rule(torch.clamp_min, torch.clamp_min_, "clamp_min", "clamp_min_", rounding=piecewise)
def clamp_min(input: Signal, min: float) -> Signal:
    """As `clamp`."""
    return clamp(input, min=min)


@lipschitz_rule(torch.clamp_max, torch.clamp_max_, "clamp_max", "clamp_max_", rounding=piecewise)
def clamp_max(input: Signal, max: float) -> Signal:
    """As `clamp`."""
    return clamp(input, max=max)


@lipschitz_rule(F.hardtanh, F.hardtanh_, rounding=piecewise)
def hardtanh(
    input: Signal, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Signal:
    """As `clamp`."""
    return clamp(input, min_val, max_val)


by_attributes(hardtanh, nn.Hardtanh, nn.ReLU6, attributes="min_val max_val", rounding=piecewise)


@lipschitz_rule(F.relu6, rounding=piecewise)
def relu6(input: Signal, inplace: bool = False) -> Signal:
    """As `clamp`."""
    return clamp(input, 0.0, 6.0)


@lipschitz_rule(F.hardsigmoid, rounding=sixths)
def hardsigmoid(input: Signal, inplace: bool = False) -> Signal:
    """``relu6(x + 3) / 6``, slopes 0 and 1/6, times ``1 + 2^-25``.

    On CUDA torch multiplies by 1/6 as a float32, also in float64.
    """
    return input.elementwise(0.0, SINGLE_SIXTH, largest=6.0 * SINGLE_SIXTH)


by_attributes(hardsigmoid, nn.Hardsigmoid, rounding=sixths)


@lipschitz_rule(F.softshrink, rounding=piecewise)
def softshrink(input: Signal, lambd: float = 0.5) -> Signal:
    """Slopes 0 around the origin and 1 beyond; it jumps where ``lambd`` is negative."""
    if number(lambd) < 0:
        raise UnsupportedModel(f"Softshrink with lambd={lambd} is not continuous")
    return input.piecewise((-lambd, lambd), (1.0, 0.0, 1.0))


by_attributes(softshrink, nn.Softshrink, attributes="lambd", rounding=piecewise)


@lipschitz_rule(
    operator.abs,
    torch.abs,
    torch.abs_,
    torch.absolute,
    "abs",
    "abs_",
    "absolute",
    "absolute_",
    rounding=exact,
)
def absolute(input: Signal) -> Signal:
    """Slopes -1 and 1."""
    return input.piecewise((0.0,), (-1.0, 1.0))


@lipschitz_rule(MaxMin, rounding=exact)
def maxmin(module: MaxMin, x: Signal) -> Signal:
    """Everywhere a permutation of the entries."""
    return x.scaled()


@lipschitz_rule(torch.sort, "sort", rounding=exact)
def sort(input: Signal, dim: int = -1, descending: bool = False, *, stable: bool = False) -> Any:
    """Everywhere a permutation of the entries; where each came from is not continuous."""
    if dim % len(input.shape) == 0:
        raise UnsupportedModel("sorting the samples of a batch")
    pair: Any = (input.scaled(), input.scaled(math.inf))
    return torch.return_types.sort(pair)
