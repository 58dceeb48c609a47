"""The small convolutional networks of the certified-robustness literature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.activations import make_activation
from models.normalize import Normalize


def _convnet(
    convolutions: Sequence[tuple[int, int, int]],
    dense: Sequence[int],
    input_shape: Sequence[int],
    num_classes: int,
    activation: str,
    mean: Sequence[float],
    std: Sequence[float],
    head: str | None = None,
) -> nn.Sequential:
    """Convolutions ``(channels, kernel, stride)`` with padding 1, then dense layers.

    With ``head`` the last activation is another one.
    """
    layers: list[nn.Module] = [Normalize(mean, std)]
    channels = input_shape[0]
    for next_channels, kernel, stride in convolutions:
        layers += [nn.Conv2d(channels, next_channels, kernel, stride, padding=1)]
        layers += [make_activation(activation)]
        channels = next_channels
    layers += [nn.Flatten()]
    with torch.no_grad():  # the number of features, by asking the layers themselves
        try:
            width = nn.Sequential(*layers)(torch.zeros(1, *input_shape)).shape[1]
        except RuntimeError as error:
            raise ValueError(f"input_shape {tuple(input_shape)} does not fit: {error}") from None
    for next_width in dense:
        layers += [nn.Linear(width, next_width), make_activation(activation)]
        width = next_width
    if head is not None:
        layers[-1] = make_activation(head)
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def convnet(
    *,
    depth: int,
    input_shape: Sequence[int] = (1, 28, 28),
    num_classes: int = 10,
    activation: str = "softplus",
    width: int = 32,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
) -> nn.Sequential:
    """Strided convolutions and a linear layer, as small as those of the curvature papers.

    Args:
        depth: number of layers; all but the last are convolutions with kernels 5x5 (the first) and
            3x3, stride 2 and padding 1.
        input_shape: ``(channels, height, width)``.
        num_classes: number of logits.
        activation: a key of `models.ACTIVATIONS`.
        width: channels of the first convolution; each further one has twice as many.
        mean: per channel, for the first layer `Normalize`.
        std: per channel, likewise.

    Raises:
        ValueError: fewer than two layers, or an input too small for the kernels.

    References:
        S. Singla, S. Feizi, Fantastic Four, ICLR 2021, section 6 (convolutional networks of few
        layers with softplus; widths and kernels here are our own).

    Example:
        >>> convnet(depth=3, width=4)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    if depth < 2:
        raise ValueError(f"expected at least two layers, got depth={depth}")
    convolutions = [(width * 2**i, 5 if i == 0 else 3, 2) for i in range(depth - 1)]
    return _convnet(convolutions, [], input_shape, num_classes, activation, mean, std)


def conv_2c2f(
    *,
    input_shape: Sequence[int] = (1, 28, 28),
    num_classes: int = 10,
    activation: str = "maxmin",
    width: int = 16,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    head: str | None = None,
) -> nn.Sequential:
    """Two strided convolutions and two linear layers.

    Args:
        input_shape: ``(channels, height, width)``.
        num_classes: number of logits.
        activation: a key of `models.ACTIVATIONS`.
        width: channels of the first convolution; the second has twice as many.
        mean: per channel, for the first layer `Normalize`.
        std: per channel, likewise.
        head: another activation for the last hidden layer, e.g. ``"softplus"``: a smooth head on
            the layers before it, with certificates by its second derivatives.

    Raises:
        ValueError: an input too small for the kernels.

    References:
        E. Wong, J. Z. Kolter, Provable defenses via the convex outer adversarial polytope, ICML
        2018 (their MNIST network, at ``width=16``).

    Example:
        >>> sum(p.numel() for p in conv_2c2f().parameters())
        166406
    """
    convolutions = [(width, 4, 2), (2 * width, 4, 2)]
    return _convnet(convolutions, [100], input_shape, num_classes, activation, mean, std, head)


def conv_4c3f(
    *,
    input_shape: Sequence[int] = (1, 28, 28),
    num_classes: int = 10,
    activation: str = "maxmin",
    width: int = 32,
    mean: Sequence[float] = (0.0,),
    std: Sequence[float] = (1.0,),
    head: str | None = None,
) -> nn.Sequential:
    """Four convolutions and three linear layers: the 4C3F network of the certified-MNIST papers.

    Args:
        input_shape: ``(channels, height, width)``.
        num_classes: number of logits.
        activation: a key of `models.ACTIVATIONS`.
        width: channels of the first two convolutions; the last two have twice as many.
        mean: per channel, for the first layer `Normalize`.
        std: per channel, likewise.
        head: another activation for the last hidden layer, e.g. ``"softplus"``: a smooth head on
            the layers before it, with certificates by its second derivatives.

    Raises:
        ValueError: an input too small for the kernels.

    References:
        E. Wong et al., Scaling provable adversarial defenses, NeurIPS 2018 ("large");
        K. Leino, Z. Wang, M. Fredrikson, Globally-robust neural networks, ICML 2021 ("4C3F").

    Example:
        >>> conv_4c3f(width=4)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """
    convolutions = [(width, 3, 1), (width, 4, 2), (2 * width, 3, 1), (2 * width, 4, 2)]
    return _convnet(convolutions, [512, 512], input_shape, num_classes, activation, mean, std, head)
