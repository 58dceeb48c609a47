"""Rules of other libraries' operations, registered once these libraries are in use.

Their layers with weights need none: they are traced down to torch's functions, so that what counts
is the weight that they compute with, not what their names promise. Here are functions without
weights that a trace cannot follow, or for which it would give a larger bound.
"""

from __future__ import annotations

import math
import sys
from typing import Any

from certify.rules.registry import RULES, Rule, lipschitz_rule
from certify.rules.rounding import exact
from certify.signal import Signal, UnsupportedModel


def register_installed() -> None:
    """Register rules of operations of libraries that a program has imported."""
    for module, names, rule in _RULES:
        for name in names:
            operation = getattr(sys.modules.get(module), name, None)
            if operation is not None and operation not in RULES:
                rounding = exact if rule in _MOVING else None
                lipschitz_rule(operation, rounding=rounding)(rule)


def stochastic_depth(input: Signal, p: float, mode: str, training: bool = True) -> Signal:
    """Without ``training`` this returns its input."""
    if training:
        raise UnsupportedModel("stochastic_depth with training=True is random")
    return input


def stochastic_depth_module(module: Any, x: Signal) -> Signal:
    """In evaluation this returns its input."""
    return x


def sorting(module: Any, x: Signal) -> Signal:
    """Sorting within groups is everywhere a permutation, here times the module's coefficient."""
    return x.scaled(abs(float(module._coefficient_lip)))


def positive_and_negative_part(module: Any, x: Signal) -> Signal:
    """``|relu(a) - relu(b)|^2 + |relu(-a) - relu(-b)|^2 <= |a - b|^2``, times a coefficient."""
    return x.scaled(abs(float(module._coefficient_lip)))


def householder(module: Any, x: Signal) -> Signal:
    """Pairs are reflected on one side of a line through the origin, and on the line stay put.

    So the map is continuous, and an isometry on either side.
    """
    if x.shape[1] != 2 * module.theta.numel():
        raise UnsupportedModel(f"expected {2 * module.theta.numel()} channels, got {x.shape}")
    return x.scaled()


def maxmin_of_halves(module: Any, x: Signal) -> Signal:
    """Entry ``k`` and the one half of the axis further on become their maximum and minimum."""
    axes = len(x.shape)
    if module.axis % axes == 0 or x.shape[module.axis] % 2:
        raise UnsupportedModel(f"MaxMin along axis {module.axis} of {x.shape}")
    return x.scaled()


def scaled_householder(module: Any, x: Signal) -> Signal:
    """As `householder`, divided by the root of two."""
    if module.axis != 1 or len(x.shape) != 4:
        raise UnsupportedModel(f"HouseHolder along axis {module.axis} of {x.shape}")
    return householder(module, x).scaled(math.sqrt(0.5) * (1 + 2**-50))


_MOVING = (stochastic_depth, stochastic_depth_module)
"""Rules of operations that compute nothing."""

_RULES: tuple[tuple[str, tuple[str, ...], Rule], ...] = (
    ("torchvision.ops.stochastic_depth", ("stochastic_depth",), stochastic_depth),
    ("torchvision.ops.stochastic_depth", ("StochasticDepth",), stochastic_depth_module),
    ("deel.torchlip.modules", ("GroupSort", "GroupSort2", "FullSort"), sorting),
    ("deel.torchlip.modules", ("MaxMin",), positive_and_negative_part),
    ("deel.torchlip.modules", ("HouseHolder",), householder),
    ("orthogonium.layers.custom_activations", ("MaxMin",), maxmin_of_halves),
    ("orthogonium.layers.custom_activations", ("HouseHolder",), scaled_householder),
)
