"""The affine maps of a network, in the form in which ff_bounds measures them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ff_bounds import conv2d_bound, spectral_norm_bound, unit_stride_kernel
from ff_bounds.padding import padded_bound, padding_effect
from ff_bounds.rounding import gamma, product_bound, round_up, scale_by_power_of_two, sum_bound


@dataclass(frozen=True)
class Matrix:
    """Rows of ``weight`` scaled by ``scale``, applied to the last axis.

    Attributes:
        weight: ``(m, n)``.
        scale: ``(m,)`` float64 or ``None`` for ones.
        roundings: relative rounding errors behind an entry of ``scale``.
    """

    weight: Tensor
    scale: Tensor | None = None
    roundings: int = 0

    def scale_outputs(self, factors: Tensor, roundings: int) -> Matrix:
        """Multiply output ``i`` by ``factors[i]``, itself computed with so many roundings."""
        # One more for the product with the weight.
        return replace(self, scale=factors, roundings=self.roundings + roundings + 1)

    def effective_weight(self) -> Tensor:
        """``(m, n)``: float64 where rows are scaled, else the stored weight."""
        return _scaled(_exact(self.weight, self.scale), self.scale)

    def kernel(self) -> Tensor:
        """The matrix as a kernel ``(1, m, n, 1, 1)``, for `ff_bounds.PowerIterationPenalty`."""
        return _scaled(self.weight, self.scale)[None, :, :, None, None]

    def gain(self) -> float:
        """Factor between the norms of the kernel and of the map."""
        return 1.0

    def bound(self, method: str, lattice: Tensor | None = None) -> Tensor:
        """Proven upper bound of the norm; the arguments are those of `Convolution.bound`."""
        bound = spectral_norm_bound(self.effective_weight())
        return _pay_for_scaling(self, bound, self.weight.shape[0])

    def row_difference_bound(self) -> Tensor:
        r"""Proven upper bounds ``(m, m)`` of ``||w_i - w_j||``, zero on the diagonal.

        Differences and norms are taken in float64; the sum of ``n`` squares under a root carries
        fewer than ``n + 4`` roundings. With scaled rows, ``|w_i - w_j|`` is only known up to the
        rounding of both scales, so ``gamma_k (||w_i|| + ||w_j||)`` is added, and `_underflow`.
        """
        weight = self.effective_weight().to(torch.float64)
        rows, columns = weight.shape
        # Scaled to entries of size one, by a power of two; what still underflows in a square
        # is paid for by the tiny constant.
        exponent = torch.frexp(weight.detach().abs().amax()).exponent
        weight = scale_by_power_of_two(weight, -exponent)
        distance = torch.stack([_row_norms(weight - row) for row in weight]) + columns * 2.0**-500
        if self.roundings:
            norms = _row_norms(weight)
            distance = distance + 2.0 * gamma(self.roundings) * (norms[:, None] + norms[None, :])
        distance = round_up(distance, columns + 8)
        others = 1.0 - torch.eye(rows, dtype=distance.dtype, device=distance.device)
        unit = scale_by_power_of_two(torch.ones_like(distance), exponent)
        return sum_bound(product_bound(distance * others, unit), _underflow(self) * others)


@dataclass(frozen=True)
class Convolution:
    """A 2-D convolution layer without its bias, each output channel scaled by ``scale``.

    Attributes:
        weight: ``(c_out, c_in // groups, h, w)``.
        stride, padding, dilation, groups, padding_mode: as in ``torch.nn.Conv2d``.
        input_size: ``(height, width)``.
        scale: ``(c_out,)`` float64 or ``None`` for ones.
        roundings: relative rounding errors behind an entry of ``scale``.
    """

    weight: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    input_size: tuple[int, int]
    scale: Tensor | None = None
    roundings: int = 0

    def scale_outputs(self, factors: Tensor, roundings: int) -> Convolution:
        """Multiply channel ``i`` by ``factors[i]``, itself computed with so many roundings."""
        # One more for the product with the weight.
        return replace(self, scale=factors, roundings=self.roundings + roundings + 1)

    def effective_weight(self) -> Tensor:
        """``(c_out, c_in // groups, h, w)``: float64 where scaled, else the stored weight."""
        return _scaled(_exact(self.weight, self.scale), self.scale)

    def kernel(self) -> Tensor:
        """The unit-stride kernel whose norm, times `gain`, is that of the layer."""
        stride, _ = self._padding_effect()
        return unit_stride_kernel(
            _scaled(self.weight, self.scale),
            stride=stride,
            dilation=self.dilation,
            groups=self.groups,
        )

    def gain(self) -> float:
        """Factor that padding by copies of the input can add."""
        return math.sqrt(self._padding_effect()[1])

    def exact_kernel(self) -> Tensor:
        """As `kernel`, float64 where scaled: what `bound` is about."""
        stride, _ = self._padding_effect()
        return unit_stride_kernel(
            self.effective_weight(), stride=stride, dilation=self.dilation, groups=self.groups
        )

    def bound(self, method: str, lattice: Tensor | None = None) -> Tensor:
        """Proven upper bound of the norm of the layer's Jacobian.

        Args:
            method: as in `ff_bounds.conv2d_bound`.
            lattice: a proven bound of the norm of `exact_kernel` on the infinite lattice, if there
                is one already.
        """
        if lattice is None:
            bound = conv2d_bound(
                self.effective_weight(),
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                padding_mode=self.padding_mode,
                input_size=self.input_size,
                method=method,
            )
        else:
            bound = padded_bound(lattice, self._padding_effect()[1])
        c_out, _, height, width = self.weight.shape
        return _pay_for_scaling(self, bound, c_out * height * width)

    def _padding_effect(self) -> tuple[tuple[int, ...], int]:
        return padding_effect(
            (self.weight.shape[2], self.weight.shape[3]),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
            input_size=self.input_size,
        )


Operator = Matrix | Convolution


def _scaled(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Scale the first axis of ``weight``, in its own dtype."""
    if scale is None:
        return weight
    return weight * scale.to(weight.dtype).reshape(-1, *[1] * (weight.ndim - 1))


def _exact(weight: Tensor, scale: Tensor | None) -> Tensor:
    """Return the weight as float64 if it is about to be scaled."""
    return weight if scale is None else weight.to(torch.float64)


def _pay_for_scaling(operator: Operator, bound: Tensor, size: int) -> Tensor:
    r"""Raise the bound of a computed scaled weight to one of the exact scaled weight.

    Each entry of the computed weight ``W`` is off by at most ``gamma_k`` relative. That error is a
    kernel ``E`` with ``||E(w)|| <= sqrt(h w) ||E||_F <= sqrt(h w) gamma_k ||W||_F``, and
    ``||W||_F <= sqrt(c_out) ||T|| <= sqrt(c_out) sigma*``. With ``size = c_out h w`` the exact
    norm is thus at most ``bound (1 + gamma_k sqrt(size))``, plus what underflowed.
    """
    if operator.roundings == 0:
        return bound
    factor = 1.0 + 2.0 * gamma(operator.roundings) * math.sqrt(size)
    raised = product_bound(bound, torch.tensor(factor, dtype=bound.dtype, device=bound.device))
    return sum_bound(raised, _underflow(operator))


def _underflow(operator: Operator) -> Tensor:
    """Bound of what underflow in the scale, and in its product with the weight, can take away.

    Each of the two is off by ``2**-1022`` at most, hence each entry of the weight by that much
    times ``1 + max |weight|``; the number of entries bounds all sums over them.
    """
    largest = operator.weight.detach().abs().amax().to(torch.float64)
    if operator.scale is None:
        return torch.zeros_like(largest)
    return (1.0 + largest) * (operator.weight.numel() * 2.0**-1000)


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return norms
