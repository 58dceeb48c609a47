"""Pooling over windows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from certify.operators import Convolution
from certify.rules.affine import per_axis
from certify.rules.registry import by_attributes, lipschitz_rule
from certify.rules.resampling import axis_norm, check_axes, largest_coverage
from certify.rules.rounding import averages, exact
from certify.signal import Signal, UnsupportedModel

_UP = 1.0 + 2.0**-50
"""Pays for a few roundings of a constant."""


def _max_pooling(axes: int, *operations: object) -> None:
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

        Counted along each axis; a pixel that is in most along every axis is in the product.
        """
        if return_indices:
            raise UnsupportedModel("return_indices=True")
        check_axes(input, axes)
        windows = 1.0
        for size, taps, step, before, spacing in zip(
            input.shape[2:], *_options(axes, kernel_size, stride, padding, dilation), strict=True
        ):
            weights = _windows(size, taps, step, before, spacing, ceil_mode)
            windows *= largest_coverage(size, taps, step, before, spacing, weights)
        return input.scaled(_root(windows), channelwise=True)

    lipschitz_rule(*operations, rounding=exact)(max_pool)
    by_attributes(
        max_pool,
        (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[axes - 1],
        attributes="kernel_size stride padding dilation ceil_mode return_indices",
        rounding=exact,
    )


_max_pooling(1, F.max_pool1d, torch.max_pool1d)
_max_pooling(2, F.max_pool2d, torch.max_pool2d)
_max_pooling(3, F.max_pool3d, torch.max_pool3d)


def _adaptive_max_pooling(axes: int, module: type, function: object) -> None:
    def adaptive_max_pool(input: Signal, output_size: Any, return_indices: bool = False) -> Signal:
        """As max pooling: windows of ``floor(i n / m)`` to ``ceil((i + 1) n / m)``."""
        if return_indices:
            raise UnsupportedModel("return_indices=True")
        check_axes(input, axes)
        windows = 1
        for size, wanted in zip(input.shape[2:], _wanted(input, output_size), strict=True):
            change = [0] * (size + 1)
            for index in range(wanted):
                change[index * size // wanted] += 1
                change[-(-(index + 1) * size // wanted)] -= 1
            windows *= max(sum(change[:end]) for end in range(1, size + 1))
        return input.scaled(_root(windows), channelwise=True)

    lipschitz_rule(function, rounding=exact)(adaptive_max_pool)
    by_attributes(
        adaptive_max_pool, module, attributes="output_size return_indices", rounding=exact
    )


_adaptive_max_pooling(1, nn.AdaptiveMaxPool1d, F.adaptive_max_pool1d)
_adaptive_max_pooling(2, nn.AdaptiveMaxPool2d, F.adaptive_max_pool2d)
_adaptive_max_pooling(3, nn.AdaptiveMaxPool3d, F.adaptive_max_pool3d)


_AVERAGES: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _average_pooling(axes: int, module: type) -> None:
    def avg_pool(
        input: Signal,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Signal:
        """A depthwise convolution with equal taps; if those at the border differ, see `axis_norm`.

        (A divisor for the whole window leaves a product of sums over each axis.)
        """
        check_axes(input, axes)
        kernel, steps, padded = _options(axes, kernel_size, stride, padding)
        if not ceil_mode and (count_include_pad or divisor_override is not None or not any(padded)):
            # The stride of a single window moves nothing; a long one says that no windows overlap.
            steps = tuple(
                step if (size + 2 * before - taps) // step else max(step, size + 2 * before)
                for size, taps, step, before in zip(
                    input.shape[2:], kernel, steps, padded, strict=True
                )
            )
            weight = 1.0 / (math.prod(kernel) if divisor_override is None else divisor_override)
            shape = (input.shape[1], 1, *kernel)
            pool = Convolution(
                torch.full(shape, weight, dtype=torch.float64, device=input.input.device),
                stride=steps,
                padding=padded,
                dilation=(1,) * axes,
                groups=input.shape[1],
                input_size=input.shape[2:],
                roundings=1,
            )
            return input.through(pool)
        sums = {} if divisor_override is None else {"divisor_override": 1}
        constant = _averages(
            input, kernel, steps, padded, ceil_mode, count_include_pad=count_include_pad, **sums
        )
        return input.scaled(
            constant / abs(divisor_override or 1) * _UP, channelwise=True, linear=True
        )

    options = "kernel_size stride padding ceil_mode count_include_pad"
    lipschitz_rule(_AVERAGES[axes - 1], rounding=averages)(avg_pool)
    options += " divisor_override" if axes > 1 else ""
    by_attributes(avg_pool, module, attributes=options, rounding=averages)


def _averages(
    x: Signal,
    kernel: tuple[int, ...],
    steps: tuple[int, ...],
    padded: tuple[int, ...],
    ceil_mode: bool,
    **options: Any,
) -> float:
    """Product of the norms of averages over windows along each axis."""
    axes = len(kernel)
    constant = 1.0
    for axis, size in enumerate(x.shape[2:]):
        own = [1 if other != axis else None for other in range(axes)]
        constant *= _UP * axis_norm(
            _AVERAGES[axes - 1],
            size,
            axis,
            axes,
            kernel_size=tuple(alone or kernel[axis] for alone in own),
            stride=tuple(alone or steps[axis] for alone in own),
            padding=tuple(0 if alone else padded[axis] for alone in own),
            ceil_mode=ceil_mode,
            **options,
        )
    return constant


_average_pooling(1, nn.AvgPool1d)
_average_pooling(2, nn.AvgPool2d)
_average_pooling(3, nn.AvgPool3d)


def _adaptive_average_pooling(axes: int, module: type, function: Any) -> None:
    def adaptive_avg_pool(input: Signal, output_size: Any) -> Signal:
        """Disjoint windows of ``n`` entries: ``1 / sqrt(n)``; else see `axis_norm`."""
        check_axes(input, axes)
        constant, entries = 1.0, 1
        for axis, (size, wanted) in enumerate(
            zip(input.shape[2:], _wanted(input, output_size), strict=True)
        ):
            if size % wanted == 0:
                entries *= size // wanted
            else:
                sizes = tuple(wanted if other == axis else 1 for other in range(axes))
                constant *= _UP * axis_norm(function, size, axis, axes, output_size=sizes)
        return input.scaled(constant / math.sqrt(entries) * _UP, channelwise=True, linear=True)

    lipschitz_rule(function, rounding=averages)(adaptive_avg_pool)
    by_attributes(adaptive_avg_pool, module, attributes="output_size", rounding=averages)


_adaptive_average_pooling(1, nn.AdaptiveAvgPool1d, F.adaptive_avg_pool1d)
_adaptive_average_pooling(2, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool2d)
_adaptive_average_pooling(3, nn.AdaptiveAvgPool3d, F.adaptive_avg_pool3d)


def _power_pooling(axes: int, module: type, function: object) -> None:
    def lp_pool(
        input: Signal,
        norm_type: float,
        kernel_size: Any,
        stride: Any = None,
        ceil_mode: bool = False,
    ) -> Signal:
        """``(K / c sum x^p)^(1 / p)``, for windows of ``K`` entries cut down to ``c``.

        With ``p`` even it is a norm below ``(K / c)^(1 / p)`` times the L2 norm, and ``K / c`` is
        a product over the axes. So the square of the constant is at most the sum of
        ``(K / c)^(2 / p)`` over the windows that a pixel is in; that pixel alone attains it at
        zero. With ``p = 1`` it is a signed sum, whose gradient torch takes for zero at zero: it is
        not marked as linear.
        """
        check_axes(input, axes)
        kernel, steps, padded = _options(axes, kernel_size, stride, 0)
        if norm_type == 1:
            constant = _averages(input, kernel, steps, padded, ceil_mode)
            return input.scaled(constant * math.prod(kernel) * _UP, channelwise=True)
        if norm_type not in range(2, 17, 2):
            raise UnsupportedModel(
                f"pooling with norm_type={norm_type}; expected 1 or an even number up to 16: roots "
                "of negative sums are not numbers, and larger powers overflow"
            )
        square = 1.0
        for size, taps, step in zip(input.shape[2:], kernel, steps, strict=True):
            weights = _windows(size, taps, step, 0, 1, ceil_mode)
            ends = step * torch.arange(len(weights), device="cpu") + taps
            kept = taps - (ends - size).clamp_min(0)
            weights = (taps / kept.to(torch.float64)) ** (2.0 / norm_type)
            square *= largest_coverage(size, taps, step, 0, 1, weights) * (1 + 2**-50 * (taps + 9))
        return input.scaled(math.sqrt(square) * _UP, channelwise=True)

    lipschitz_rule(function)(lp_pool)
    by_attributes(lp_pool, module, attributes="norm_type kernel_size stride ceil_mode")


_power_pooling(1, nn.LPPool1d, F.lp_pool1d)
_power_pooling(2, nn.LPPool2d, F.lp_pool2d)
_power_pooling(3, nn.LPPool3d, F.lp_pool3d)


def _options(axes: int, kernel: Any, stride: Any, *others: Any) -> list[tuple[int, ...]]:
    """Kernel, stride (where there is none, the kernel) and others as numbers for each axis."""
    steps = kernel if stride is None or stride in ([], ()) else stride
    return [per_axis(option, axes) for option in (kernel, steps, *others)]


def _windows(
    size: int, taps: int, step: int, before: int, spacing: int, ceil_mode: bool
) -> torch.Tensor:
    """A one, float64, for each window that torch pools along an axis."""
    line = torch.zeros(1, 1, size, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        pooled: torch.Tensor = F.max_pool1d(line, taps, step, before, spacing, ceil_mode)
    return torch.ones_like(pooled.flatten())


def _wanted(x: Signal, output_size: Any) -> list[int]:
    """Sizes that an adaptive pool shall give, ``None`` standing for that of the input."""
    sizes = x.shape[2:]
    wanted = per_axis(output_size, len(sizes))
    result = [size if w is None else w for size, w in zip(sizes, wanted, strict=True)]
    if 0 in result:
        raise UnsupportedModel(f"pooling to size {tuple(result)}, without any windows")
    return result


def _root(windows: float) -> float:
    return 1.0 if windows == 1 else math.sqrt(windows) * _UP
