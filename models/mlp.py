"""Multilayer perceptron."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from models.activations import make_activation
from models.normalize import Normalize


def mlp(
    *,
    input_shape: Sequence[int] = (1, 28, 28),
    num_classes: int = 10,
    hidden: Sequence[int] = (512, 512),
    activation: str = "maxmin",
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Fully connected network on flattened images.

    Args:
        input_shape: ``(channels, height, width)``.
        num_classes: number of logits.
        hidden: widths of the hidden layers.
        activation: a key of `models.ACTIVATIONS`.
        mean: per channel, for the first layer `Normalize`.
        std: per channel, likewise.

    Example:
        >>> import torch
        >>> mlp(hidden=(16,))(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    layers: list[nn.Module] = [Normalize(mean, std), nn.Flatten()]
    width = math.prod(input_shape)
    for next_width in hidden:
        layers += [nn.Linear(width, next_width), make_activation(activation)]
        width = next_width
    return nn.Sequential(*layers, nn.Linear(width, num_classes))
