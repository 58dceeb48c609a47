"""Functions of each entry by itself."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional as F

from certify.rules.registry import by_attributes, lipschitz_rule
from certify.signal import Signal, UnsupportedModel
from models import MaxMin


@lipschitz_rule(F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_")
def relu(input: Signal, inplace: bool = False) -> Signal:
    """Slopes 0 and 1."""
    return input.elementwise(0.0, 1.0)


by_attributes(relu, nn.ReLU)


@lipschitz_rule(F.tanh, torch.tanh, "tanh", "tanh_")
def tanh(input: Signal) -> Signal:
    """The slope is ``1 - tanh(x)^2``."""
    return input.elementwise(0.0, 1.0)


by_attributes(tanh, nn.Tanh)


@lipschitz_rule(F.leaky_relu, F.leaky_relu_)
def leaky_relu(input: Signal, negative_slope: float = 0.01, inplace: bool = False) -> Signal:
    """Slopes 1 and ``negative_slope``."""
    if math.isnan(negative_slope):
        raise UnsupportedModel("LeakyReLU with slope NaN")
    return input.elementwise(min(1.0, negative_slope), max(1.0, negative_slope))


by_attributes(leaky_relu, nn.LeakyReLU, attributes="negative_slope")


@lipschitz_rule(F.sigmoid, torch.sigmoid, "sigmoid", "sigmoid_")
def sigmoid(input: Signal) -> Signal:
    """The slope ``s (1 - s)`` is at most 1/4."""
    return input.elementwise(0.0, 0.25)


by_attributes(sigmoid, nn.Sigmoid)


@lipschitz_rule(F.softplus)
def softplus(input: Signal, beta: float = 1.0, threshold: float = 20.0) -> Signal:
    """The slope is a sigmoid, at most 1.

    Above ``threshold`` torch returns ``x`` itself: a jump by ``log(1 + exp(-threshold)) / beta``,
    which is below float64's rounding of a number of that size only from 34 on. Below the threshold
    it takes ``exp(beta x)``, which from 88 on is infinite in float32.
    """
    if not (beta > 0 and 34 <= threshold <= 88):
        raise UnsupportedModel(
            f"Softplus(beta={beta}, threshold={threshold}) jumps or overflows at its "
            "threshold; use beta > 0 and threshold=40, the same function without that"
        )
    return input.elementwise(0.0, 1.0)


by_attributes(softplus, nn.Softplus, attributes="beta threshold")


@lipschitz_rule(MaxMin)
def maxmin(module: MaxMin, x: Signal) -> Signal:
    """Everywhere a permutation of the entries."""
    return x.scaled()
