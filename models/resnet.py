"""Residual networks with BatchNorm."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from models.activations import make_activation
from models.normalize import Normalize


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to a shortcut.

    Where the block changes the shape, the shortcut takes every other pixel and fills the new
    channels with zeros (He et al.'s option A) or, as a projection, is a strided 1x1 convolution
    with BatchNorm (option B).

    Args:
        c_in: input channels.
        c_out: output channels, at least ``c_in``.
        stride: of the first convolution, 1 or 2.
        activation: a key of `models.ACTIVATIONS`.
        projection: option B.
    """

    def __init__(
        self, c_in: int, c_out: int, stride: int, activation: str, *, projection: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.activation1 = make_activation(activation)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.activation2 = make_activation(activation)
        self.stride = stride
        self.new_channels = c_out - c_in
        self.projection: nn.Module | None = None
        if projection and (stride > 1 or self.new_channels):
            self.projection = nn.Sequential(
                nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, c_in, H, W)`` to ``(N, c_out, ceil(H/stride), ceil(W/stride))``."""
        out = self.norm2(self.conv2(self.activation1(self.norm1(self.conv1(x)))))
        result: Tensor = self.activation2(out + self._shortcut(x))
        return result

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.projection is not None:
            projected: Tensor = self.projection(x)
            return projected
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.new_channels:
            before = self.new_channels // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.new_channels - before))
        return x


def resnet(
    *,
    depth: int,
    input_shape: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    activation: str = "relu",
    width: int = 16,
    mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
    std: Sequence[float] = (0.2470, 0.2435, 0.2616),
) -> nn.Sequential:
    """Residual network of ``depth = 6n + 2`` layers, as He et al. built for CIFAR-10.

    Args:
        depth: 20, 32, 44, 56, ...
        input_shape: ``(channels, height, width)``; any height and width.
        num_classes: number of logits.
        activation: a key of `models.ACTIVATIONS`.
        width: channels of the first of three stages; each stage doubles them.
        mean: per channel, for the first layer `Normalize`.
        std: per channel, likewise.

    Raises:
        ValueError: a depth that is not ``6n + 2``.

    References:
        K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, CVPR 2016,
        section 4.2 (shortcuts of option A).

    Example:
        >>> sum(p.numel() for p in resnet(depth=20).parameters())
        269722
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"expected depth = 6n + 2 (20, 32, 56, ...), got {depth}")
    layers: list[nn.Module] = [
        Normalize(mean, std),
        nn.Conv2d(input_shape[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        make_activation(activation),
    ]
    channels = width
    for stage in range(3):
        for block in range((depth - 2) // 6):
            stride = 2 if stage > 0 and block == 0 else 1
            c_out = width * 2**stage
            layers.append(BasicBlock(channels, c_out, stride, activation))
            channels = c_out
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )


def resnet18(
    *,
    input_shape: Sequence[int] = (3, 224, 224),
    num_classes: int = 1000,
    activation: str = "relu",
    width: int = 64,
    max_pool: bool = True,
    mean: Sequence[float] = (0.485, 0.456, 0.406),
    std: Sequence[float] = (0.229, 0.224, 0.225),
) -> nn.Sequential:
    """Residual network of 18 layers, as He et al. built for ImageNet.

    Args:
        input_shape: ``(channels, height, width)``; any height and width.
        num_classes: number of logits.
        activation: a key of `models.ACTIVATIONS`.
        width: channels of the first of four stages; each stage doubles them.
        max_pool: the 3x3 maximum behind the first layer; better left out for small images.
        mean: per channel, for the first layer `Normalize`.
        std: per channel, likewise.

    References:
        K. He, X. Zhang, S. Ren, J. Sun, Deep Residual Learning for Image Recognition, CVPR 2016,
        table 1 (shortcuts of option B).

    Example:
        >>> sum(p.numel() for p in resnet18().parameters())
        11689512
    """
    layers: list[nn.Module] = [
        Normalize(mean, std),
        nn.Conv2d(input_shape[0], width, 7, 2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        make_activation(activation),
    ]
    if max_pool:
        layers.append(nn.MaxPool2d(3, 2, padding=1))
    channels = width
    for stage in range(4):
        for block in range(2):
            stride = 2 if stage > 0 and block == 0 else 1
            c_out = width * 2**stage
            layers.append(BasicBlock(channels, c_out, stride, activation, projection=True))
            channels = c_out
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)
    )
