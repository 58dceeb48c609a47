"""Pooling."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from certify.operators import Convolution
from certify.rules.affine import per_axis
from certify.rules.registry import by_attributes, lipschitz_rule
from certify.signal import Signal, UnsupportedModel


def max_pool(
    input: Signal,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Signal:
    r"""``|max a - max b| <= ||a - b||`` per window; a pixel is in so many windows at most.

    Along an axis the windows that hold a pixel differ in the tap that meets it, and taps that do
    belong to the same stride are ``s / gcd(s, d)`` apart: at most ``ceil(k / that)`` of them.
    """
    if return_indices:
        raise UnsupportedModel("return_indices=True")
    axes = len(input.shape) - 2
    kernel = per_axis(kernel_size, axes)
    steps = kernel if stride is None or stride == [] else per_axis(stride, axes)
    windows = 1
    for taps, step, spacing in zip(kernel, steps, per_axis(dilation, axes), strict=True):
        windows *= math.ceil(taps / (step // math.gcd(step, spacing)))
    constant = math.sqrt(windows) * (1 + 2**-50) if windows > 1 else 1.0
    return input.scaled(constant, channelwise=True)


lipschitz_rule(F.max_pool1d, F.max_pool2d, F.max_pool3d)(max_pool)
by_attributes(
    max_pool,
    nn.MaxPool1d,
    nn.MaxPool2d,
    nn.MaxPool3d,
    attributes="kernel_size stride padding dilation ceil_mode return_indices",
)


@lipschitz_rule(nn.AvgPool2d)
def avg_pool2d(module: nn.AvgPool2d, x: Signal) -> Signal:
    """A depthwise convolution with constant taps."""
    if len(x.shape) != 4:
        raise UnsupportedModel(f"expected input (N, C, H, W), got {x.shape}")
    kernel, padding = per_axis(module.kernel_size, 2), per_axis(module.padding, 2)
    if module.ceil_mode or (any(padding) and not module.count_include_pad):
        raise UnsupportedModel(
            "AvgPool2d whose windows at the border differ (ceil_mode, count_include_pad)"
        )
    channels = x.shape[1]
    divisor = module.divisor_override or math.prod(kernel)
    device = torch.device("cpu")
    weight = torch.full((channels, 1, *kernel), 1.0 / divisor, dtype=torch.float64, device=device)
    pool = Convolution(
        weight,
        stride=per_axis(module.stride, 2),
        padding=padding,
        dilation=(1, 1),
        groups=channels,
        input_size=x.shape[2:],
        roundings=1,
    )
    return x.through(pool)


@lipschitz_rule(nn.AdaptiveAvgPool2d)
def adaptive_avg_pool2d(module: nn.AdaptiveAvgPool2d, x: Signal) -> Signal:
    """Means over disjoint windows of ``n`` pixels: norm ``1 / sqrt(n)``."""
    pixels = 1
    for size, wanted in zip(x.shape[-2:], per_axis(module.output_size, 2), strict=True):
        if wanted is not None:
            if wanted == 0 or size % wanted:
                raise UnsupportedModel(
                    f"AdaptiveAvgPool2d from {size} to {wanted}: windows overlap"
                )
            pixels *= size // wanted
    return x.scaled(1.0 / math.sqrt(pixels) * (1 + 2**-50), channelwise=True)
