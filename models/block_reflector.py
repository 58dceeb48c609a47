"""Orthogonal convolutions of periodic images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.parametrizations import in_own_precision

_SHARE, _LEAST = 1e-5, 1e-12
"""``d``: this share of the mean square of the columns, and this for a kernel of zeros."""


class BlockReflectorConv2d(nn.Module):
    r"""A convolution with periodic boundary that is orthogonal: a block reflector by frequency.

    At frequency ``f`` the channels are multiplied by ``I - 2 V (V^H V + d I)^{-1} V^H`` with ``V``
    the Fourier transform of a kernel, which reflects its range and leaves the rest. In space that
    is a convolution with a kernel as large as the image. The small ``d`` keeps it well defined
    where columns of ``V`` are nearly dependent; what these span is then reflected in part, so that
    the norm is at most one in any case.

    Args:
        channels: of input and output.
        rank: dimension of what is reflected; a quarter of the channels by default.
        kernel_size: of the kernel behind ``V``.
        bias: whether to add one.

    Raises:
        ValueError: a rank that is not between one and the channels.

    References:
        B. Lai, P.-H. Huang, B.-H. Kung, S.-T. Chen, Enhancing Certified Robustness via Block
        Reflector Orthogonal Layers and Logit Annealing Loss, ICML 2025, section 4 (BRO);
        A. Trockman, J. Z. Kolter, Orthogonalizing Convolutional Layers with the Cayley Transform,
        ICLR 2021 (orthogonality by frequencies).

    Example:
        >>> layer, x = BlockReflectorConv2d(4, bias=False), torch.rand(1, 4, 6, 6)
        >>> bool((layer(x).norm() / x.norm() - 1).abs() < 1e-5)
        True
    """

    def __init__(
        self, channels: int, rank: int | None = None, kernel_size: int = 3, *, bias: bool = True
    ) -> None:
        super().__init__()
        rank = max(1, channels // 4) if rank is None else rank
        if not 0 < rank <= channels:
            raise ValueError(f"expected a rank between 1 and {channels}, got {rank}")
        self.weight = nn.Parameter(torch.empty(channels, rank, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        nn.init.normal_(self.weight, std=self.weight[0].numel() ** -0.5)

    @in_own_precision
    def reflectors(self, height: int, width: int) -> Tensor:
        """Matrices ``(frequencies, channels, channels)`` of those that `torch.fft.rfft2` keeps.

        Raises:
            ValueError: an image smaller than the kernel.
        """
        size = max(self.weight.shape[2:])
        if min(height, width) < size:
            raise ValueError(f"expected images of at least {size} x {size}, got {height} x {width}")
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        largest = weight.detach().abs().amax()
        weight = weight / torch.where(largest > 0, largest, 1.0)
        spectrum = torch.fft.rfft2(weight, s=(height, width)).flatten(2).permute(2, 0, 1)
        gram = spectrum.mH @ spectrum
        mean = gram.diagonal(dim1=1, dim2=2).real.mean()
        identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
        # A device is not waited for: of what cannot be factorised all becomes NaN.
        factor, failed = torch.linalg.cholesky_ex(gram + (_SHARE * mean + _LEAST) * identity)
        factor = torch.where(failed[:, None, None] == 0, factor, torch.nan)
        rows = torch.linalg.solve_triangular(factor, spectrum.mH, upper=False)
        identity = torch.eye(spectrum.shape[1], dtype=gram.dtype, device=gram.device)
        reflectors: Tensor = identity - 2.0 * rows.mH @ rows
        return reflectors

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, channels, H, W)`` to the same shape."""
        with torch.autocast(x.device.type, enabled=False):
            height, width = x.shape[2:]
            precision = torch.promote_types(self.weight.dtype, torch.float32)
            spectrum = torch.fft.rfft2(x.to(precision))
            frequencies = spectrum.flatten(2).permute(2, 1, 0)  # (f, channels, N)
            reflected = self.reflectors(height, width) @ frequencies
            spectrum = reflected.permute(2, 1, 0).reshape(spectrum.shape)
            result: Tensor = torch.fft.irfft2(spectrum, s=(height, width)).to(self.weight.dtype)
        if self.bias is not None:
            result = result + self.bias[:, None, None]
        return result
