"""Activations by name, and MaxMin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class MaxMin(nn.Module):
    """Sort pairs of channels: channels ``2k`` and ``2k+1`` become their maximum and minimum.

    A permutation of the entries at every point, so it preserves norms and gradient norms. The
    channel axis is 1 and its size must be even; input ``(N, C, ...)``, output of the same shape.

    References:
        C. Anil, J. Lucas, R. Grosse, Sorting out Lipschitz function approximation, ICML 2019.

    Example:
        >>> MaxMin()(torch.tensor([[1.0, 2.0, 4.0, 3.0]])).tolist()
        [[2.0, 1.0, 4.0, 3.0]]
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the sorting to ``x``; raise ``ValueError`` for an odd number of channels."""
        if x.shape[1] % 2:
            raise ValueError(f"expected an even number of channels for MaxMin, got {x.shape[1]}")
        if torch.compiler.is_compiling():  # which makes a fast gradient of its own
            return _sorted(x)
        if _channels_last(x):  # and so they remain
            last = x.permute(0, 2, 3, 1)
            pixels: Tensor = _Sort.apply(last.flatten(0, 2))
            return pixels.reshape(last.shape).permute(0, 3, 1, 2)
        result: Tensor = _Sort.apply(x)
        return result


def _sorted(x: Tensor) -> Tensor:
    first, second = _pairs(x)
    return _joined(torch.maximum(first, second), torch.minimum(first, second))


class _Exchange(torch.autograd.Function):
    """Exchange the two entries of each pair where ``keep`` is zero; its own adjoint."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, keep: Tensor) -> Tensor:
        first, second = _pairs(x)
        return _joined(torch.lerp(second, first, keep), torch.lerp(first, second, keep))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchanged(gradient, *ctx.saved_tensors), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: Any) -> Tensor:
        return _exchanged(tangent, *ctx.saved_tensors)


class _Sort(torch.autograd.Function):
    """Maxima and minima; the gradient is three times as fast as that of torch's own functions.

    Where both entries are equal, it is that of the exchange.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _sorted(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        first, second = _pairs(inputs[0])
        keep = torch.gt(first, second).to(output.dtype)
        ctx.save_for_backward(keep)
        ctx.save_for_forward(keep)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _exchanged(gradient, *ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _exchanged(tangent, *ctx.saved_tensors)


def _exchanged(x: Tensor, keep: Tensor) -> Tensor:
    result: Tensor = _Exchange.apply(x, keep.to(x.dtype))
    return result


def _channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel are stored beside each other, but not also in planes."""
    return x.ndim == 4 and x.stride(1) == 1 and not x.is_contiguous()


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    pairs = x.reshape(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:])
    return pairs[:, :, 0], pairs[:, :, 1]


def _joined(first: Tensor, second: Tensor) -> Tensor:
    shape = (first.shape[0], 2 * first.shape[1], *first.shape[2:])
    return torch.stack((first, second), 2).reshape(shape)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    # torch's default threshold of 20 makes softplus jump by 2e-9; at 40 the jump is below rounding.
    "softplus": partial(nn.Softplus, threshold=40.0),
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "maxmin": MaxMin,
}


def make_activation(name: str) -> nn.Module:
    """Return a new activation module; raise ``ValueError`` listing the names for an unknown one."""
    if name not in ACTIVATIONS:
        raise ValueError(f"expected activation to be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]()
