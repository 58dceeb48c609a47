"""Linear layers, convolutions and normalisation by constants."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify.operators import Convolution, Matrix, Scale
from certify.rules.registry import lipschitz_rule
from certify.rules.rounding import normalisation, of_products
from certify.signal import Signal, UnsupportedModel, Wrapping
from certify.statistics import running_variance
from ff_bounds import spectral_norm_bound
from ff_bounds.padding import padding_amounts
from models import Normalize


@lipschitz_rule(F.linear, rounding=of_products)
def linear(input: Any, weight: Any, bias: Any = None) -> Signal:
    """Weight on the last axis; positions are separate blocks, so the norm is the weight's."""
    x = _only_input(input, weight, bias)
    if weight.ndim != 2:
        raise UnsupportedModel(f"expected a matrix as weight, got shape {tuple(weight.shape)}")
    return x.through(Matrix(weight))


@lipschitz_rule(nn.Linear, rounding=of_products)
def linear_module(module: nn.Linear, x: Signal) -> Signal:
    """As `linear`, with the weight that the module computes with."""
    return linear(x, module.weight)


@lipschitz_rule(torch.einsum)
def einsum(equation: Any, *operands: Any) -> Signal:
    """A tensor times a constant one: a matrix from the axes that are summed over to the new ones.

    On the axes that the tensor keeps alone it acts alike; for indices that it shares with the
    constant the largest matrix counts.
    """
    if not isinstance(equation, str) or "." in equation or len(operands) != 2:
        raise UnsupportedModel("einsum other than of two tensors and an equation without dots")
    terms, arrow, result = equation.replace(" ", "").partition("->")
    names = terms.split(",")
    signals = [place for place, value in enumerate(operands) if isinstance(value, Signal)]
    if len(signals) != 1:
        raise UnsupportedModel(
            "einsum multiplies tensors that depend on the input: not Lipschitz on unbounded inputs"
        )
    (place,) = signals
    x: Signal = operands[place]
    weight, own, other = operands[1 - place], names[place], names[1 - place]
    if not arrow or any(len(set(letters)) < len(letters) for letters in (own, other, result)):
        raise UnsupportedModel("einsum without a result, or with a diagonal")
    if result[:1] != own[0] or own[0] in other:
        raise UnsupportedModel("einsum that does not keep the batch axis first")
    if not (set(own) <= set(result) | set(other) and set(other) <= set(result) | set(own)):
        raise UnsupportedModel("einsum that sums over an axis of one tensor alone")
    shared = [name for name in other if name in own and name in result]
    summed = [name for name in other if name in own and name not in result]
    new = [name for name in other if name not in own and name in result]
    order = [other.index(name) for name in (*shared, *new, *summed)]
    matrices = weight.to(torch.float64).permute(order)
    columns = math.prod(matrices.shape[len(shared) + len(new) :])
    matrices = matrices.reshape(math.prod(matrices.shape[: len(shared)]), -1, columns)
    bounds = [spectral_norm_bound(matrix) for matrix in matrices.unbind()]
    return x.scaled(torch.stack(bounds).amax(), linear=True)


def convolution(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
) -> Signal:
    """See `ff_bounds.conv_bound`."""
    x = _only_input(input, weight, bias)
    axes = weight.ndim - 2
    _check_axes(x, axes)
    if not isinstance(padding, str):
        padding = per_axis(padding, axes)
        if isinstance(x.step, Wrapping) and not any(padding):
            padding, padding_mode, x = x.step.amounts, "circular", x.parents[0]
    return x.through(
        Convolution(
            weight,
            stride=per_axis(stride, axes),
            padding=padding,
            dilation=per_axis(dilation, axes),
            groups=groups,
            padding_mode=padding_mode,
            input_size=x.shape[2:],
        )
    )


lipschitz_rule(F.conv1d, F.conv2d, F.conv3d, rounding=of_products)(convolution)


@lipschitz_rule(nn.Conv1d, nn.Conv2d, nn.Conv3d, rounding=of_products)
def convolution_module(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Signal) -> Signal:
    """As `convolution`, with every padding mode."""
    axes = module.weight.ndim - 2
    padding = module.padding if isinstance(module.padding, str) else per_axis(module.padding, axes)
    hyperparameters = [per_axis(v, axes) for v in (module.stride, module.dilation)]
    if module.padding_mode != "zeros":  # torch pads by amounts that it noted when it was made
        amounts = padding_amounts(padding, per_axis(module.kernel_size, axes), *hyperparameters)
        noted = [amount for pair in reversed(amounts) for amount in pair]
        if list(module._reversed_padding_repeated_twice) != noted:
            kind = type(module).__name__
            raise UnsupportedModel(f"{kind} whose padding was changed after it was made")
    return convolution(
        x,
        module.weight,
        None,
        module.stride,
        padding,
        module.dilation,
        module.groups,
        module.padding_mode,
    )


def transposed_convolution(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Signal:
    """See `ff_bounds.conv_transpose2d_bound`: padding on either side only drops or adds zeros."""
    x = _only_input(input, weight, bias)
    axes = weight.ndim - 2
    _check_axes(x, axes)
    return x.through(
        Convolution(
            weight,
            stride=per_axis(stride, axes),
            padding=(0,) * axes,
            dilation=per_axis(dilation, axes),
            groups=groups,
            adjoint=True,
        )
    )


lipschitz_rule(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d, rounding=of_products)(
    transposed_convolution
)


@lipschitz_rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, rounding=of_products)
def transposed_convolution_module(module: Any, x: Signal) -> Signal:
    """As `transposed_convolution`."""
    return transposed_convolution(
        x, module.weight, None, module.stride, groups=module.groups, dilation=module.dilation
    )


@lipschitz_rule(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, rounding=normalisation)
def batch_norm(module: Any, x: Signal) -> Signal:
    """In evaluation, channel ``i`` times ``gamma_i / sqrt(var_i + eps)``."""
    return _normalised(x, running_variance(module), module.weight, module.eps)


@lipschitz_rule(F.batch_norm, rounding=normalisation)
def batch_norm_function(
    input: Signal,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Signal:
    """As `batch_norm`."""
    if training:
        raise UnsupportedModel("batch_norm with training=True mixes the samples of a batch")
    _only_input(input, running_mean, running_var, weight, bias)
    return _normalised(input, running_var, weight, eps)


def _normalised(x: Signal, variance: Tensor | None, weight: Tensor | None, eps: float) -> Signal:
    """Five roundings at most lie behind each factor, or it underflows."""
    if variance is None:
        raise UnsupportedModel("BatchNorm without running statistics mixes the samples of a batch")
    deviation = (variance.to(torch.float64) + eps).sqrt()
    gain = torch.ones_like(deviation) if weight is None else weight
    return x.through(Scale(gain.to(torch.float64) / deviation, 5))


@lipschitz_rule(Normalize, rounding=normalisation)
def normalize(module: Normalize, x: Signal) -> Signal:
    """Channel ``i`` divided by ``std_i``."""
    shapes = (x.shape, module.mean.shape, module.std.shape)
    if len(x.shape) != 4 or torch.broadcast_shapes(*shapes) != x.shape:
        raise UnsupportedModel(
            f"expected {module.std.numel()} channels to normalise, got shape {x.shape}"
        )
    return x.through(Scale(module.std.to(torch.float64).reciprocal().flatten(), 1))


def per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """Return a module's hyperparameter as one value for each spatial axis."""
    if isinstance(value, (int, type(None))):
        return (value,) * axes
    values = tuple(value)
    return values * axes if len(values) == 1 else values


def _check_axes(x: Signal, axes: int) -> None:
    if len(x.shape) != axes + 2:
        wanted = ", ".join(
            ["N", "C", "T", "H", "W"][: 2 + axes] if axes == 3 else ["N", "C", *["H", "W"][:axes]]
        )
        raise UnsupportedModel(f"expected input ({wanted}), got {x.shape}")


def _only_input(x: Any, *constants: Any) -> Signal:
    """Return ``x`` if it alone depends on the network's input."""
    if not isinstance(x, Signal) or any(isinstance(value, Signal) for value in constants):
        raise UnsupportedModel("a weight that depends on the input is not Lipschitz")
    return x
