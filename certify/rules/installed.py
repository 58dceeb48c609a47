"""Rules of other libraries' operations, registered once these libraries are in use."""

from __future__ import annotations

import sys
from typing import Any

from certify.rules.registry import RULES, lipschitz_rule
from certify.signal import Signal, UnsupportedModel


def register_installed() -> None:
    """Register rules of operations of libraries that a program has imported."""
    torchvision_ops = sys.modules.get("torchvision.ops.stochastic_depth")
    if torchvision_ops is not None and torchvision_ops.StochasticDepth not in RULES:
        lipschitz_rule(torchvision_ops.stochastic_depth)(stochastic_depth)
        lipschitz_rule(torchvision_ops.StochasticDepth)(stochastic_depth_module)


def stochastic_depth(input: Signal, p: float, mode: str, training: bool = True) -> Signal:
    """Without ``training`` this returns its input."""
    if training:
        raise UnsupportedModel("stochastic_depth with training=True is random")
    return input


def stochastic_depth_module(module: Any, x: Signal) -> Signal:
    """In evaluation this returns its input."""
    return x
