"""Weights that a layer computes from others, for `torch.nn.utils.parametrize`.

Each is named after what it makes of a weight; none is believed to do so exactly: certificates
measure the weight that comes out. They compute in the weight's own precision, also under autocast.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

_Layer = TypeVar("_Layer", bound=nn.Module)


def parametrized(layer: _Layer, parametrization: nn.Module) -> _Layer:
    """Register a parametrization of a layer's weight, and return the layer.

    Example:
        >>> layer = parametrized(nn.Linear(3, 2), UnitRows())
        >>> bool((layer.weight.norm(dim=1) - 1).abs().max() < 1e-6)
        True
    """
    parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


_Method = TypeVar("_Method", bound=Callable[..., Tensor])


def in_own_precision(method: _Method) -> _Method:
    """Keep a module's method, which computes with its weights, out of autocast."""

    @wraps(method)
    def wrapped(self: nn.Module, *arguments: Any) -> Tensor:
        tensors = chain(self.parameters(), self.buffers(), filter(torch.is_tensor, arguments))
        kind = next((tensor.device.type for tensor in tensors), "cpu")
        if not torch.amp.is_autocast_available(kind):  # such as on the device "meta"
            kind = "cpu"
        with torch.autocast(kind, enabled=False):
            return method(self, *arguments)

    return cast(_Method, wrapped)


class IdentityPlus(nn.Module):
    """The identity plus ``scale`` times a kernel: the linear residual convolution of LiResNet.

    ``x + scale conv(x)`` is one convolution, so that its norm can be bounded as a whole, instead of
    by one plus the norm of the branch. Kernels are ``(c, c, *taps)`` with odd taps, for a padding
    that keeps the size, or matrices ``(c, c)``.

    Args:
        scale: factor of the kernel; ``depth**-0.5`` keeps a network of so many layers near the
            identity at the start.

    References:
        K. Hu, A. Zou, Z. Wang, K. Leino, M. Fredrikson, Unlocking Deterministic Robustness
        Certification on ImageNet, NeurIPS 2023, section 3 (LiResNet).

    Example:
        >>> conv = parametrized(nn.Conv2d(2, 2, 3, padding=1, bias=False), IdentityPlus(0.0))
        >>> x = torch.rand(1, 2, 4, 4)
        >>> torch.equal(conv(x), x)
        True
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, weight: Tensor) -> Tensor:
        """Return the whole kernel; raise ``ValueError`` if there is no identity of its shape."""
        rows, columns, *taps = weight.shape
        if rows != columns or any(count % 2 == 0 for count in taps):
            raise ValueError(f"expected a kernel (c, c, odd, ...), got {tuple(weight.shape)}")
        identity = torch.eye(rows, dtype=weight.dtype, device=weight.device)
        around = [amount for count in reversed(taps) for amount in (count // 2, count // 2)]
        identity = F.pad(identity.reshape(rows, rows, *[1] * len(taps)), around)
        return identity + self.scale * weight


class Orthonormal(nn.Module):
    r"""Orthonormal rows of a matrix, or columns where there are fewer of these.

    ``L^{-1} W`` with the Cholesky factor ``L L^T = W W^T``: Gram-Schmidt from the first row on, as
    matrix products, done twice for nearly square matrices, as their condition can be bad. A kernel
    of one tap is taken as a matrix. Rows that depend on those before them come out shorter.

    References:
        K. Hu et al., A Recipe for Improved Certifiable Robustness, ICLR 2024 (orthogonal dense
        layers by Cholesky, "CHORD").

    Example:
        >>> layer = parametrized(nn.Linear(5, 3), Orthonormal())
        >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(3), atol=1e-5)
        True
    """

    @in_own_precision
    def forward(self, weight: Tensor) -> Tensor:
        """Return the orthonormal matrix; raise ``ValueError`` for a kernel of several taps."""
        matrix = weight.flatten(1)
        if matrix.shape[1] != weight.shape[1]:
            raise ValueError(f"expected a matrix or kernel of one tap, got {tuple(weight.shape)}")
        if matrix.shape[0] > matrix.shape[1]:
            return _orthonormal_rows(matrix.mT).mT.reshape(weight.shape)
        return _orthonormal_rows(matrix).reshape(weight.shape)


def _orthonormal_rows(matrix: Tensor) -> Tensor:
    rows = _largest_one(matrix.to(torch.promote_types(matrix.dtype, torch.float32)))
    count, width = rows.shape
    gram = rows @ rows.mT
    squares = gram.diagonal()
    lengths = torch.where(squares == 0, 1.0, squares).sqrt()
    rows = _triangular(gram / (lengths[:, None] * lengths), 1.0 / lengths) @ rows
    if width < 4 * count:
        # As they are: rows that depended on others are short now, and nothing but rounding.
        rows = _triangular(rows @ rows.mT, torch.ones_like(lengths)) @ rows
    return rows.to(matrix.dtype)


def _triangular(gram: Tensor, factors: Tensor) -> Tensor:
    """``L^{-1} diag(factors)`` with the Cholesky factor of a Gram matrix of rows up to one."""
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    # Positive definite in rounded arithmetic too, for rows of length one that depend.
    jitter = 8.0 * len(gram) * torch.finfo(gram.dtype).eps
    # A device is not waited for: of what cannot be factorised all becomes NaN.
    factor, failed = torch.linalg.cholesky_ex(gram + jitter * identity)
    factor = torch.where(failed == 0, factor, torch.nan)
    result: Tensor = torch.linalg.solve_triangular(factor, torch.diag(factors), upper=False)
    return result


def _largest_one(matrix: Tensor) -> Tensor:
    """Divide rows by their largest entries, whose squares could under- or overflow."""
    largest = matrix.detach().abs().amax(dim=1, keepdim=True)
    return matrix / torch.where(largest == 0, 1.0, largest)


def _unit_rows(matrix: Tensor) -> Tensor:
    """Divide rows by their lengths; a zero row stays zero."""
    matrix = _largest_one(matrix)
    norms = torch.linalg.vector_norm(matrix, dim=1, keepdim=True)
    return matrix / torch.where(norms == 0, 1.0, norms)


class AlmostOrthogonal(nn.Module):
    r"""Rescaled input channels that make a kernel a contraction (AOL).

    With ``t_i = sum_j sum_s |(W * W^T)_{ij, s}|``, the sum of the absolute entries of row ``i`` of
    the kernel of ``W^T W``, ``W diag(t)^{-1/2}`` has norm at most one on the infinite lattice and
    under zero padding: ``diag(t) - W^T W`` is diagonally dominant.

    References:
        B. Prach, C. Lampert, Almost-Orthogonal Layers for Efficient General-Purpose Lipschitz
        Networks, ECCV 2022, theorems 1 and 2.

    Example:
        >>> layer = parametrized(nn.Linear(5, 3), AlmostOrthogonal())
        >>> bool(torch.linalg.matrix_norm(layer.weight, ord=2) <= 1 + 1e-6)
        True
    """

    @in_own_precision
    def forward(self, weight: Tensor) -> Tensor:
        """Return the rescaled matrix, or kernel with one to three axes of taps."""
        largest = weight.detach().abs().amax()  # the result does not depend on the scale
        weight = weight / torch.where(largest == 0, 1.0, largest)
        return weight * almost_orthogonal_scale(weight).reshape(1, -1, *[1] * (weight.ndim - 2))


def almost_orthogonal_scale(weight: Tensor) -> Tensor:
    """``t^{-1/2}`` of `AlmostOrthogonal`, ``(c_in,)``; one for a channel without weights."""
    taps = weight.shape[2:]
    if taps:
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(taps) - 1]
        columns = weight.transpose(0, 1)
        gram = convolve(columns, columns, padding=[count - 1 for count in taps])
    else:
        gram = weight.mT @ weight
    sums = gram.abs().flatten(1).sum(dim=1)
    return torch.where(sums == 0, 1.0, sums).rsqrt()


class UnitRows(nn.Module):
    """Rows of length one: the normalised last layer of a classifier.

    Between normalised rows the differences of two logits have Lipschitz constants of at most twice
    that of the features, and no class can win margins by the length of its row.

    References:
        S. Singla, S. Singla, S. Feizi, Improved deterministic l2 robustness on CIFAR-10 and
        CIFAR-100, ICLR 2022, section 4 (last layer normalization).
    """

    @in_own_precision
    def forward(self, weight: Tensor) -> Tensor:
        """Divide each row ``weight[i]`` by its L2 norm; a zero row stays zero."""
        return _unit_rows(weight.flatten(1)).reshape(weight.shape)
