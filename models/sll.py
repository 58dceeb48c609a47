"""Residual layers that are contractions by construction."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.parametrizations import in_own_precision


class SLLConv2d(nn.Module):
    r"""``x - 2 V^T T^{-1} relu(V x + b)``: an SDP-based Lipschitz layer.

    ``V`` is a convolution with zero padding, ``T`` a diagonal matrix with ``T >= V V^T``, here

        ``t_i = sum_j sum_s |(V V^T)_{ij, s}| q_j / q_i``,

    so that the layer has Lipschitz constant one (see `certify.rules.contractions` for the proof,
    and for what is left after rounding). With ``q = 1`` this is a residual layer with the rescaling
    of AOL, with ``t`` constant a convex potential layer.

    Args:
        channels: of input and output.
        inner: of ``V x``; as many by default.
        kernel_size: odd.

    Raises:
        ValueError: an even kernel size.

    References:
        A. Araujo, A. Havens, B. Delattre, A. Allauzen, B. Hu, A Unified Algebraic Perspective on
        Lipschitz Neural Networks, ICLR 2023, theorem 3; L. Meunier et al., A Dynamical System
        Perspective for Lipschitz Neural Networks, ICML 2022 (convex potential layers).

    Example:
        >>> layer, x = SLLConv2d(4), torch.rand(2, 1, 4, 8, 8)
        >>> bool((layer(x[0]) - layer(x[1])).norm() <= (x[0] - x[1]).norm())
        True
    """

    def __init__(self, channels: int, inner: int | None = None, kernel_size: int = 3) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"expected an odd kernel size, got {kernel_size}")
        inner = channels if inner is None else inner
        self.weight = nn.Parameter(torch.empty(inner, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(inner))
        self.log_q = nn.Parameter(torch.zeros(inner))
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)

    @property
    def q(self) -> Tensor:
        """The positive numbers ``q``, ``(inner,)``."""
        return self.log_q.exp()

    @in_own_precision
    def divisors(self) -> Tensor:
        """The diagonal ``t``, ``(inner,)``; one for a channel without weights."""
        size = self.weight.shape[-1]
        gram = F.conv2d(self.weight, self.weight, padding=size - 1)
        sums = gram.abs().sum(dim=(2, 3)) @ self.q / self.q
        return torch.where(sums == 0, 1.0, sums)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        padding = self.weight.shape[-1] // 2
        inner = F.relu(F.conv2d(x, self.weight, self.bias, padding=padding))
        inner = inner * (2.0 / self.divisors())[:, None, None]
        return x - F.conv_transpose2d(inner, self.weight, padding=padding)
