"""Activations by name, and MaxMin."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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
        return _maxmin(x)


def _maxmin(x: Tensor) -> Tensor:
    pairs = x.reshape(x.shape[0], x.shape[1] // 2, 2, *x.shape[2:])
    first, second = pairs[:, :, 0], pairs[:, :, 1]
    return torch.stack((torch.maximum(first, second), torch.minimum(first, second)), 2).flatten(
        1, 2
    )


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
