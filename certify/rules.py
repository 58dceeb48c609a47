"""The trusted base: what each operation does to a Lipschitz bound.

A rule takes the operation's own arguments, with a `Signal` wherever the network has a tensor that
depends on its input, and returns the `Signal` of the result. (The walker fills in the shape.) A
module's rule gets the module first. Everything here is about one sample: the L2 Lipschitz constant
of the map from one input to one output. A rule therefore has to refuse whatever lets samples of a
batch touch each other.

Operations are looked up by identity, a module by its exact type: a subclass may override
``forward``, so it needs a rule of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from certify.operators import Convolution, Matrix
from certify.signal import Signal, UnsupportedModel
from ff_bounds.padding import padding_amounts
from ff_bounds.rounding import SMALLEST_NORMAL, round_up, sum_bound
from models import MaxMin, Normalize

Rule = Callable[..., Any]
_Rule = TypeVar("_Rule", bound=Rule)

RULES: dict[object, Rule] = {}
"""Rule of each operation: a module type, a function, or the name of a tensor's method."""


def lipschitz_rule(*operations: object) -> Callable[[_Rule], _Rule]:
    """Register a rule for module types, functions or names of tensor methods.

    Raises:
        ValueError: an operation that already has a rule.

    Example:
        >>> import torch
        >>> class Halve(torch.nn.Module):
        ...     def forward(self, x):
        ...         return x / 2
        >>> @lipschitz_rule(Halve)
        ... def halve(module, x):
        ...     return x.scaled(0.5)
    """

    def register(rule: _Rule) -> _Rule:
        for operation in operations:
            if operation in RULES:
                raise ValueError(f"{operation!r} already has a Lipschitz rule")
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return register


def _refuse(reason: str) -> UnsupportedModel:
    return UnsupportedModel(reason)


# --- affine layers ----------------------------------------------------------------------------


@lipschitz_rule(nn.Linear)
def linear(module: nn.Linear, x: Signal) -> Signal:
    """Weight on the last axis; positions are separate blocks, so the norm is the weight's."""
    return x.through(Matrix(module.weight))


@lipschitz_rule(nn.Conv2d)
def conv2d(module: nn.Conv2d, x: Signal) -> Signal:
    """See `ff_bounds.conv2d_bound`."""
    if len(x.shape) != 4:
        raise _refuse(f"expected input (N, C, H, W), got {x.shape}")
    padding = module.padding if isinstance(module.padding, str) else _two(module.padding)
    if module.padding_mode != "zeros":  # torch pads by amounts that it noted when it was made
        vertical, horizontal = padding_amounts(
            padding, _two(module.kernel_size), _two(module.stride), _two(module.dilation)
        )
        if list(module._reversed_padding_repeated_twice) != [*horizontal, *vertical]:
            raise _refuse("Conv2d whose padding was changed after it was made; make a new one")
    return x.through(
        Convolution(
            module.weight,
            stride=_two(module.stride),
            padding=padding,
            dilation=_two(module.dilation),
            groups=module.groups,
            padding_mode=module.padding_mode,
            input_size=(x.shape[2], x.shape[3]),
        )
    )


@lipschitz_rule(nn.BatchNorm1d, nn.BatchNorm2d)
def batch_norm(module: nn.BatchNorm1d | nn.BatchNorm2d, x: Signal) -> Signal:
    """In evaluation, channel ``i`` times ``gamma_i / sqrt(var_i + eps)``; merged if that can be.

    Five roundings at most lie behind each factor, or it underflows.
    """
    if module.running_var is None:
        raise _refuse("BatchNorm without running statistics mixes the samples of a batch")
    deviation = (module.running_var.to(torch.float64) + module.eps).sqrt()
    gain = torch.ones_like(deviation) if module.weight is None else module.weight
    scale = gain.to(torch.float64) / deviation
    mergeable = isinstance(x.operator, Convolution) or len(x.shape) == 2
    if x.operator is not None and x.operator.scale is None and mergeable:
        return x.replacing_operator(x.operator.scale_outputs(scale, roundings=5))
    return x.scaled(round_up(scale.abs().amax(), 5).clamp_min(SMALLEST_NORMAL))


@lipschitz_rule(Normalize)
def normalize(module: Normalize, x: Signal) -> Signal:
    """Channel ``i`` divided by ``std_i``."""
    shapes = (x.shape, module.mean.shape, module.std.shape)
    if len(x.shape) != 4 or torch.broadcast_shapes(*shapes) != x.shape:
        raise _refuse(f"expected {module.std.numel()} channels to normalise, got shape {x.shape}")
    largest = module.std.to(torch.float64).reciprocal().abs().amax()
    return x.scaled(round_up(largest, 1).clamp_min(SMALLEST_NORMAL))


@lipschitz_rule(operator.add, torch.add, "add", "add_")
def add(x: Any, y: Any) -> Signal:
    """``Lip(f + g) <= Lip f + Lip g``; a constant changes nothing."""
    shapes = [tuple(getattr(term, "shape", ())) for term in (x, y)]
    if shapes[0] != shapes[1]:
        joint = tuple(torch.broadcast_shapes(*shapes))
        for term, shape in zip((x, y), shapes, strict=True):
            if isinstance(term, Signal) and shape != joint:
                raise _refuse(f"broadcasting {shape} to {joint} repeats entries")
    if isinstance(x, Signal) and isinstance(y, Signal):
        return Signal(x.shape, sum_bound(x.lipschitz, y.lipschitz), x.norms)
    signal: Signal = (x if isinstance(x, Signal) else y).scaled()
    return signal


# --- activations ------------------------------------------------------------------------------


@lipschitz_rule(nn.ReLU, nn.Tanh)
def non_expansive(module: nn.Module, x: Signal) -> Signal:
    """Slopes in [0, 1]."""
    return x.scaled()


@lipschitz_rule(F.relu, torch.relu, torch.tanh, "relu", "relu_", "tanh")
def non_expansive_function(x: Signal, inplace: bool = False) -> Signal:
    """Slopes in [0, 1]."""
    return x.scaled()


@lipschitz_rule(nn.LeakyReLU)
def leaky_relu(module: nn.LeakyReLU, x: Signal) -> Signal:
    """Slopes 1 and ``negative_slope``."""
    if math.isnan(module.negative_slope):
        raise _refuse("LeakyReLU with slope NaN")
    return x.scaled(max(1.0, abs(module.negative_slope)))


@lipschitz_rule(nn.Sigmoid)
def sigmoid(module: nn.Sigmoid, x: Signal) -> Signal:
    """The slope ``s (1 - s)`` is at most 1/4."""
    return x.scaled(0.25)


@lipschitz_rule(nn.Softplus)
def softplus(module: nn.Softplus, x: Signal) -> Signal:
    """The slope is a sigmoid, at most 1.

    Above ``threshold`` torch returns ``beta x`` itself: a jump by ``log(1 + exp(-threshold))``,
    which is below float64's rounding of a number of that size only from 34 on. Below the threshold
    it takes ``exp(beta x)``, which from 88 on is infinite in float32.
    """
    if not (module.beta > 0 and 34 <= module.threshold <= 88):
        raise _refuse(
            f"Softplus(beta={module.beta}, threshold={module.threshold}) jumps or overflows at its "
            "threshold; use beta > 0 and threshold=40, the same function without that"
        )
    return x.scaled()


@lipschitz_rule(MaxMin)
def maxmin(module: MaxMin, x: Signal) -> Signal:
    """Everywhere a permutation of the entries."""
    return x.scaled()


# --- pooling ----------------------------------------------------------------------------------


@lipschitz_rule(nn.MaxPool2d)
def max_pool2d(module: nn.MaxPool2d, x: Signal) -> Signal:
    r"""``|max a - max b| <= ||a - b||`` per window; a pixel is in so many windows at most.

    Along an axis the windows that hold a pixel differ in the tap that meets it, and taps that do
    belong to the same stride are ``s / gcd(s, d)`` apart: at most ``ceil(k / that)`` of them.
    """
    if module.return_indices:
        raise _refuse("return_indices=True")
    kernel, stride = _two(module.kernel_size), _two(module.stride)
    windows = 1
    for taps, step, spacing in zip(kernel, stride, _two(module.dilation), strict=True):
        windows *= math.ceil(taps / (step // math.gcd(step, spacing)))
    return x.scaled(math.sqrt(windows) * (1 + 2**-50) if windows > 1 else 1.0)


@lipschitz_rule(nn.AvgPool2d)
def avg_pool2d(module: nn.AvgPool2d, x: Signal) -> Signal:
    """A depthwise convolution with constant taps."""
    if len(x.shape) != 4:
        raise _refuse(f"expected input (N, C, H, W), got {x.shape}")
    kernel, padding = _two(module.kernel_size), _two(module.padding)
    if module.ceil_mode or (any(padding) and not module.count_include_pad):
        raise _refuse("AvgPool2d whose windows at the border differ (ceil_mode, count_include_pad)")
    channels = x.shape[1]
    divisor = module.divisor_override or math.prod(kernel)
    weight = torch.full(
        (channels, 1, *kernel), 1.0 / divisor, dtype=torch.float64, device=x.source.device
    )
    pool = Convolution(
        weight,
        stride=_two(module.stride),
        padding=padding,
        dilation=(1, 1),
        groups=channels,
        padding_mode="zeros",
        input_size=(x.shape[2], x.shape[3]),
        roundings=1,
    )
    return x.through(pool)


@lipschitz_rule(nn.AdaptiveAvgPool2d)
def adaptive_avg_pool2d(module: nn.AdaptiveAvgPool2d, x: Signal) -> Signal:
    """Means over disjoint windows of ``n`` pixels: norm ``1 / sqrt(n)``."""
    pixels = 1
    for size, wanted in zip(x.shape[-2:], _two(module.output_size), strict=True):
        if wanted is not None:
            if wanted == 0 or size % wanted:
                raise _refuse(f"AdaptiveAvgPool2d from {size} to {wanted}: windows overlap")
            pixels *= size // wanted
    return x.scaled(1.0 / math.sqrt(pixels) * (1 + 2**-50))


# --- rearrangements ---------------------------------------------------------------------------


@lipschitz_rule(nn.Identity, nn.Dropout, nn.Dropout2d)
def identity(module: nn.Module, x: Signal) -> Signal:
    """In evaluation these return their input."""
    return x


@lipschitz_rule(nn.Flatten)
def flatten_module(module: nn.Flatten, x: Signal) -> Signal:
    """A reshape within each sample."""
    return flatten(x, module.start_dim, module.end_dim)


@lipschitz_rule(torch.flatten, "flatten")
def flatten(x: Signal, start_dim: int = 0, end_dim: int = -1) -> Signal:
    """A reshape within each sample."""
    if start_dim % len(x.shape) == 0:
        raise _refuse("flattening from dimension 0 mixes the samples of a batch; use start_dim=1")
    return x.scaled()


@lipschitz_rule(torch.reshape, "reshape", "view")
def reshape(x: Signal, *shape: Any) -> Signal:
    """A reshape that keeps the batch axis keeps samples apart (the walker checks that axis)."""
    if any(isinstance(s, torch.dtype) for s in shape):
        raise _refuse("a view as another dtype")
    return x.scaled()


@lipschitz_rule(operator.getitem)
def getitem(x: Any, index: Any) -> Any:
    """A slice drops entries; the batch axis must stay whole."""
    if isinstance(x, (tuple, list)):
        return x[index]
    indices = index if isinstance(index, tuple) else (index,)
    selects = all(i is Ellipsis or isinstance(i, (int, slice)) for i in indices)
    whole = selects and (
        indices[0] == slice(None) or (indices[0] is Ellipsis and len(indices) <= len(x.shape))
    )
    if not isinstance(x, Signal) or not whole:
        raise _refuse("indexing other than by slices and integers behind the batch axis")
    return x.scaled()


@lipschitz_rule(F.pad)
def pad(x: Signal, pad: Any, mode: str = "constant", value: float | None = None) -> Signal:
    """Padding by a constant (or cropping, by a negative amount) inside each sample."""
    if mode != "constant":
        raise _refuse(f"F.pad with mode={mode!r}; use the convolution's padding_mode")
    if len(pad) // 2 >= len(x.shape):
        raise _refuse("padding the batch axis")
    return x.scaled()


@lipschitz_rule("size")
def size(x: Signal, dim: int | None = None) -> Any:
    """A shape, not a tensor."""
    return torch.Size(x.shape) if dim is None else x.shape[dim]


@lipschitz_rule(getattr)
def attribute(x: Any, name: str) -> Any:
    """Shapes are known; anything else of a tensor is not."""
    if not isinstance(x, Signal):
        return getattr(x, name)
    if name == "shape":
        return torch.Size(x.shape)
    raise _refuse(f"attribute {name!r} of a tensor that depends on the input")


def _two(value: Any) -> Any:
    """Return a module's hyperparameter as a pair."""
    return (value, value) if isinstance(value, (int, type(None))) else tuple(value)
