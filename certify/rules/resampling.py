"""Interpolation and sliding windows, and the norm of linear maps that act on each axis alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify.rules.affine import per_axis
from certify.rules.registry import by_attributes, lipschitz_rule
from certify.rules.rounding import Call, exact
from certify.signal import Signal, UnknownRounding, UnsupportedModel
from ff_bounds import spectral_norm_bound
from ff_bounds.rounding import UNIT_ROUNDOFF, gamma, round_up

_LONGEST = 2048
"""Length of an axis up to which its matrix is formed."""

_UP = 1.0 + 2.0**-50
"""Pays for a few roundings of a constant."""


def check_axes(x: Signal, axes: int) -> None:
    """Refuse a signal that is not ``(N, C)`` and so many spatial axes."""
    if len(x.shape) != axes + 2:
        names = ("N", "C", *{1: "W", 2: "HW", 3: "DHW"}[axes])
        raise UnsupportedModel(f"expected input ({', '.join(names)}), got {x.shape}")


@functools.lru_cache(maxsize=1024)
def axis_norm(
    function: Callable[..., Tensor],
    length: int,
    axis: int,
    axes: int,
    entry_error: float = 0.0,
    /,
    **options: Any,
) -> float:
    r"""Proven upper bound of the norm of what a linear function does along one axis.

    A function that acts on each axis and each channel by itself is a Kronecker product of one
    matrix per axis, and its norm is the product of theirs. The matrix ``A`` is read off by
    applying the function to the identity, the other axes having length one. With eight roundings
    in each entry, and ``e`` more, it is off by ``gamma_8 ||A||_F + e sqrt(m n)`` at most.

    A matrix of more than 2048 columns is not formed. Its entries must not be negative; then
    ``||A||^2 = ||A A^T||`` is at most the largest entry of ``A A^T 1``, a sum of absolute values.

    Args:
        function: takes ``(N, C, ...)`` and the options.
        length: of the axis.
        axis: its number, from zero for the first spatial one.
        axes: number of spatial axes.
        entry_error: absolute error of each entry.
        **options: hashable arguments with which the function changes nothing along other axes of
            length one.
    """
    shape = [1] * axes
    shape[axis] = length
    if length > _LONGEST:
        with torch.inference_mode(False), torch.enable_grad():
            ones = torch.ones(1, 1, *shape, dtype=torch.float64, device="cpu", requires_grad=True)
            results = function(ones, **options)
            (columns,) = torch.autograd.grad(results.sum(), ones)
            square = function(columns, **options).amax()
        norm = round_up(square.sqrt(), results.numel() + length + 16)
        entries = length * results.numel()
    else:
        with torch.no_grad():
            identity = torch.eye(length, dtype=torch.float64, device="cpu")
            matrix = function(identity.reshape(length, 1, *shape), **options).flatten(1)
        norm = spectral_norm_bound(matrix) + gamma(8) * torch.linalg.matrix_norm(matrix)
        entries = matrix.numel()
    return (norm.item() + entry_error * math.sqrt(entries)) * _UP


def largest_coverage(
    size: int, taps: int, step: int, before: int, spacing: int, weights: Tensor
) -> float:
    """Largest sum of the weights of the windows that an entry of an axis is in.

    Args:
        size: length of the axis.
        taps: entries of a window.
        step: from one window to the next.
        before: padding in front.
        spacing: from one tap to the next.
        weights: one for each window, float64.
    """
    starts = step * torch.arange(len(weights), device=weights.device) - before
    places = starts[:, None] + spacing * torch.arange(taps, device=weights.device)
    inside = (places >= 0) & (places < size)
    sums = torch.bincount(places[inside], weights[:, None].expand_as(places)[inside], size)
    return sums.max().item()


_MODES = ("nearest", "nearest-exact", "area", "linear", "bilinear", "bicubic", "trilinear")


def _nearest(call: Call) -> Tensor:
    """Of the nearest entries, where it is sure which these are.

    Their places come from products with the ratio of two sizes, rounded in a precision that depends
    on the tensor's: exact for powers of two. The other modes compute weights, it is not known how.
    """
    names = ("size", "scale_factor", "mode")
    if call.module is None:
        given = dict(zip(names, call.arguments[1:], strict=False)) | call.options
    else:
        given = {name: getattr(call.module, name) for name in names}
    mode = given.get("mode", "nearest")
    if mode not in ("nearest", "nearest-exact"):
        raise UnknownRounding(f"it is not known how much the mode {mode!r} can round")
    source = call.arguments[0] if call.arguments else call.options["input"]
    before, after = tuple(source.shape[2:]), call.signal.shape[2:]
    ratios = [new / old for old, new in zip(before, after, strict=True)]
    factors: Any = given.get("scale_factor")
    factors = [factors] * len(ratios) if isinstance(factors, int | float) else factors
    known = factors is None or list(map(float, factors)) == ratios
    if not known or any(math.frexp(ratio)[0] != 0.5 for ratio in ratios):
        raise UnknownRounding("which entries are the nearest can depend on rounding")
    return exact(call)


@lipschitz_rule(F.interpolate, rounding=_nearest)
def interpolate(
    input: Signal,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Signal:
    """See `axis_norm`.

    A weight is a function of a place on the axis with slopes below two, and few roundings of its
    own; the place is off by a few roundings of numbers up to its length.
    """
    axes = len(input.shape) - 2
    if mode not in _MODES or not 1 <= axes <= 3:
        raise UnsupportedModel(f"interpolation with mode={mode!r} of shape {input.shape}")
    if mode == "bicubic" and max(input.shape[2:]) > _LONGEST:
        raise UnsupportedModel(f"bicubic interpolation of an axis longer than {_LONGEST}")
    if antialias and _result(input.shape, size, scale_factor) == 1:
        raise UnsupportedModel("antialias to width one, where torch's CPU kernel is wrong")
    exact = mode in ("nearest", "nearest-exact", "area")
    constant = 1.0
    for axis, length in enumerate(input.shape[2:]):
        wanted: dict[str, Any] = {}
        place = axes - 1 if antialias else axis  # not to width one, see above
        if size is not None:
            sizes = [1] * axes
            sizes[place] = per_axis(size, axes)[axis]
            wanted["size"] = tuple(sizes)
        else:
            factors = [1.0] * axes
            factors[place] = _factor(scale_factor, axis)
            wanted["scale_factor"] = tuple(factors)
            if not recompute_scale_factor and mode != "area":
                _check_factor(length, factors[place])
        constant *= _UP * axis_norm(
            F.interpolate,
            length,
            place,
            axes,
            0.0 if exact else 128 * UNIT_ROUNDOFF * (length + 2),
            mode=mode,
            align_corners=align_corners,
            recompute_scale_factor=recompute_scale_factor,
            antialias=antialias,
            **wanted,
        )
    return input.scaled(constant, channelwise=True, linear=True)


def _factor(scale_factor: Any, axis: int) -> float:
    return float(scale_factor[axis] if isinstance(scale_factor, (tuple, list)) else scale_factor)


def _result(shape: tuple[int, ...], size: Any, scale_factor: Any) -> int:
    """Length of the last axis of the result."""
    if size is not None:
        return int(per_axis(size, len(shape) - 2)[-1])
    return math.floor(shape[-1] * _factor(scale_factor, -1))


def _check_factor(length: int, factor: float) -> None:
    """Some of torch's kernels take equal and doubled lengths for factors of one and two."""
    result = math.floor(length * factor)
    if result in (length, 2 * length) and factor != result / length:
        raise UnsupportedModel(
            f"interpolation of {length} entries by {factor} to {result}: torch's CPU and CUDA "
            "kernels differ; give size, or recompute_scale_factor=True"
        )


by_attributes(
    interpolate,
    nn.Upsample,
    nn.UpsamplingNearest2d,
    nn.UpsamplingBilinear2d,
    attributes="size scale_factor mode align_corners recompute_scale_factor",
    rounding=_nearest,
)


@lipschitz_rule(F.unfold)
def unfold(
    input: Signal, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1
) -> Signal:
    """Copies of entries: the root of how often one occurs, a product over the axes."""
    check_axes(input, 2)
    return input.scaled(
        _copies(input.shape[2:], kernel_size, dilation, padding, stride), linear=True
    )


by_attributes(unfold, nn.Unfold, attributes="kernel_size dilation padding stride")


@lipschitz_rule(F.fold)
def fold(
    input: Signal,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Signal:
    """The adjoint of `unfold`."""
    if len(input.shape) != 3:
        raise UnsupportedModel(f"expected input (N, C * kernel, windows), got {input.shape}")
    sizes = per_axis(output_size, 2)
    return input.scaled(_copies(sizes, kernel_size, dilation, padding, stride), linear=True)


by_attributes(fold, nn.Fold, attributes="output_size kernel_size dilation padding stride")


def _copies(sizes: tuple[int, ...], *options: Any) -> float:
    """Root of the number of windows that a pixel of an image is in at most."""
    copies = 1.0
    for size, taps, spacing, before, step in zip(
        sizes, *(per_axis(option, 2) for option in options), strict=True
    ):
        windows = (size + 2 * before - spacing * (taps - 1) - 1) // step + 1
        weights = torch.ones(windows, dtype=torch.float64, device="cpu")
        copies *= largest_coverage(size, taps, step, before, spacing, weights)
    return 1.0 if copies == 1 else math.sqrt(copies) * _UP
