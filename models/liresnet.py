"""Residual networks whose every layer has a small Lipschitz constant."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import nn

from models.activations import make_activation
from models.block_reflector import BlockReflectorConv2d
from models.normalize import Normalize
from models.parametrizations import (
    AlmostOrthogonal,
    IdentityPlus,
    Orthonormal,
    UnitRows,
    parametrized,
)
from models.sll import SLLConv2d

BLOCKS = ("residual", "aol", "sll", "reflector", "plain")
"""What `liresnet` can be made of."""


def liresnet(
    *,
    input_shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    activation: str = "maxmin",
    width: int = 48,
    depth: Sequence[int] = (2, 5),
    dense: Sequence[int] = (256,),
    block: str = "residual",
    head: str | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> nn.Sequential:
    """Linear residual convolutions between rearrangements of pixels.

    Each stage halves height and width by putting 2x2 pixels into channels (``nn.PixelUnshuffle``,
    an isometry); the first one goes on with a 3x3 convolution, the others with an orthogonal 1x1
    convolution. Then come the blocks of the stage, in the end orthogonal dense layers, and a last
    layer with rows of length one.

    Args:
        input_shape: ``(channels, height, width)``; both sizes divisible by ``2 ** len(depth)``.
        num_classes: number of logits.
        activation: a key of `models.ACTIVATIONS`, behind each layer but the last.
        width: channels of the first stage; each further one has twice as many.
        depth: blocks of each stage.
        dense: widths of the dense layers.
        block: ``"residual"``: 3x3 convolutions `IdentityPlus`; ``"aol"``: `AlmostOrthogonal`;
            ``"plain"``: as torch makes them; ``"reflector"``: `BlockReflectorConv2d`; ``"sll"``:
            `SLLConv2d`, which have their own activation.
        head: another activation for the last hidden layer, e.g. ``"softplus"``: a smooth head on
            the layers before it, with certificates by its second derivatives.
        mean: per channel, for the first layer `Normalize`; a half by default.
        std: per channel, likewise; one by default, which leaves the unit of distances as it is.

    Raises:
        ValueError: sizes that do not fit, or an unknown block.

    References:
        K. Hu, A. Zou, Z. Wang, K. Leino, M. Fredrikson, Unlocking Deterministic Robustness
        Certification on ImageNet, NeurIPS 2023 (LiResNet); K. Hu et al., A Recipe for Improved
        Certifiable Robustness, ICLR 2024 (dense layers). Sizes and down-sampling are our own.

    Example:
        >>> import torch
        >>> liresnet(width=8, depth=(1, 1), dense=(16,))(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """
    if block not in BLOCKS:
        raise ValueError(f"expected block to be one of {', '.join(BLOCKS)}, got {block!r}")
    channels, *size = input_shape
    if not depth or any(length % 2 ** len(depth) for length in size):
        raise ValueError(
            f"input_shape {tuple(input_shape)} does not fit: expected height and width divisible "
            f"by {2 ** len(depth)} for {len(depth)} stages"
        )
    mean = [0.5] * channels if mean is None else mean
    std = [1.0] * channels if std is None else std
    layers: list[nn.Module] = [Normalize(mean, std)]
    for stage, count in enumerate(depth):
        wide = width * 2**stage
        layers.append(nn.PixelUnshuffle(2))
        if stage == 0:
            layers.append(_started(nn.Conv2d(4 * channels, wide, 3, padding=1)))
        else:
            down = _started(nn.Conv2d(4 * channels, wide, 1))
            layers.append(parametrized(down, Orthonormal()))
        layers.append(make_activation(activation))
        channels = wide
        for _ in range(count):
            layers.append(_block(block, wide, sum(depth)))
            if block != "sll":
                layers.append(make_activation(activation))
    layers.append(nn.Flatten())
    features = channels * math.prod(length // 2 ** len(depth) for length in size)
    for wide in dense:
        layers.append(parametrized(_started(nn.Linear(features, wide)), Orthonormal()))
        layers.append(make_activation(activation))
        features = wide
    if head is not None:
        layers[-1] = make_activation(head)
    last = _started(nn.Linear(features, num_classes))
    return nn.Sequential(*layers, parametrized(last, UnitRows()))


def _block(kind: str, channels: int, depth: int) -> nn.Module:
    if kind == "sll":
        return SLLConv2d(channels)
    if kind == "reflector":
        return BlockReflectorConv2d(channels)
    conv = _started(nn.Conv2d(channels, channels, 3, padding=1))
    if kind == "residual":
        return parametrized(conv, IdentityPlus(depth**-0.5))
    return parametrized(conv, AlmostOrthogonal()) if kind == "aol" else conv


def _started(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    """Rows of expected length one, and no bias."""
    nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
