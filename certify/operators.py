"""The affine maps of a network, in the form in which ff_bounds measures them.

An operator is a map without its offset. Its weight may carry factors per output and per input
channel that stem from floating-point computations, and an absolute error; both are paid for in
`bound`, which is about the map in exact arithmetic.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ff_bounds import conv_bound, lattice_bound, spectral_norm_bound, unit_stride_kernel
from ff_bounds.padding import padded_bound, padding_effect
from ff_bounds.rounding import (
    SMALLEST_NORMAL,
    gamma,
    product_bound,
    round_up,
    scale_by_power_of_two,
    sum_bound,
    undo_scaling,
)

_LARGEST_FACTOR = 2.0**100
_MOST_MERGES = 4
_UNDERFLOW = 2.0**-600
"""Absolute error of a factor: that of one is ``2**-1022``, times at most four of ``2**100``."""


@dataclass(frozen=True, eq=False)
class Scale:
    """Each channel (axis 1) times a factor.

    Attributes:
        factors: ``(c,)`` float64, or one for all channels.
        roundings: relative rounding errors behind a factor; it may also have underflowed.
    """

    factors: Tensor
    roundings: int

    def bound(self, method: str = "", lattice: Tensor | None = None) -> Tensor:
        """Proven upper bound of the norm: the largest factor."""
        largest = round_up(self.factors.abs().amax(), self.roundings)
        return largest.clamp_min(SMALLEST_NORMAL) if self.roundings else largest


@dataclass(frozen=True, eq=False)
class _Weighted(ABC):
    """A weight with factors.

    Attributes:
        weight: rows are outputs, or inputs where the operator is the adjoint of a convolution.
        rows: factors of the rows, float64, or ``None`` for ones.
        columns: factors of the columns.
        roundings: relative rounding errors behind a product of two factors.
        merges: how often factors were merged.
        error: norm of what the weight itself is off by, or ``None`` for nothing.
    """

    weight: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    roundings: int = 0
    merges: int = 0
    error: Tensor | None = None

    def norm_error(self) -> Tensor:
        r"""Bound of the norm of the exact map less that of `effective_weight`, both float64.

        An entry of the computed weight ``W`` is off by ``gamma_k`` relative, with two more for the
        products, and by what underflowed. Split by taps, that error has norm at most
        ``sum_t gamma_k ||W_t||_F``, whatever the frequency. Rows and columns that are scaled
        scale the ``error`` by their largest factors.
        """
        largest = self.weight.detach().abs().amax().to(torch.float64)
        total = torch.zeros_like(largest)
        if self.roundings:
            weight = self.effective_weight().detach()
            unit = max(torch.finfo(weight.dtype).eps, 2.0**-52) * 2.0**52
            total = sum_of_tap_norms(weight) * (2.1 * gamma(self.roundings + 2) * unit)
            sizes = [1.0 + largest]
            sizes += [1.0 + f.abs().amax() for f in (self.rows, self.columns) if f is not None]
            total = total + math.prod(sizes[1:], start=sizes[0]) * (weight.numel() * _UNDERFLOW)
        if self.error is not None:
            scaled = self.error
            for factors in (self.rows, self.columns):
                if factors is not None:
                    most = round_up(factors.abs().amax(), self.roundings) + _UNDERFLOW
                    scaled = product_bound(scaled, most)
            total = sum_bound(total, scaled)
        return total

    @abstractmethod
    def effective_weight(self) -> Tensor:
        """Weight with its factors, in the weight's own dtype."""


def sum_of_tap_norms(weight: Tensor) -> Tensor:
    """Proven upper bound of ``sum_t ||W_t||_F``, float64, without a gradient.

    Args:
        weight: ``(m, n, *taps)``.
    """
    weight = weight.detach().to(torch.float64)
    # Scaled to entries of size one, by a power of two, as squares underflow; what still does is
    # paid for by the tiny constant.
    largest = weight.abs().amax()
    exponent = torch.frexp(largest).exponent
    taps = scale_by_power_of_two(weight, -exponent).reshape(*weight.shape[:2], -1)
    norms = torch.linalg.vector_norm(taps, dim=(0, 1)).sum() + weight.numel() * 2.0**-500
    bound = undo_scaling(round_up(norms, weight.numel() + 9), exponent)
    return torch.where(largest > 0, bound, 0.0)


_Any = TypeVar("_Any", bound="_Weighted")


def scaled(operator: _Any, rows: Tensor | None, columns: Tensor | None, roundings: int) -> _Any:
    """Multiply rows and columns of the weight by factors with so many roundings behind them."""
    return replace(
        operator,
        rows=_product(operator.rows, rows),
        columns=_product(operator.columns, columns),
        roundings=operator.roundings + roundings + 1,
        merges=operator.merges + 1,
    )


def _product(old: Tensor | None, new: Tensor | None) -> Tensor | None:
    if old is None or new is None:
        return old if new is None else new
    return old * new


def may_scale(operator: _Weighted, factors: Tensor) -> bool:
    """Whether `scaled` may be used: underflow stays within what is paid for."""
    return operator.merges < _MOST_MERGES and bool(factors.detach().abs().amax() < _LARGEST_FACTOR)


@dataclass(frozen=True, eq=False)
class Matrix(_Weighted):
    """``weight (m, n)``, with its factors, applied to the last axis."""

    def effective_weight(self) -> Tensor:
        """``(m, n)``, in the weight's own dtype."""
        weight = self.weight
        if self.rows is not None:
            weight = weight * self.rows.to(weight.dtype)[:, None]
        if self.columns is not None:
            weight = weight * self.columns.to(weight.dtype)
        return weight

    def kernel(self) -> Tensor:
        """The matrix as a kernel ``(1, m, n, 1, 1)``, for `ff_bounds.PowerIterationPenalty`."""
        return self.effective_weight()[None, :, :, None, None]

    def gain(self) -> float:
        """Factor between the norms of the kernel and of the map."""
        return 1.0

    def bound(
        self, method: str, lattice: Tensor | None = None, *, any_size: bool = False
    ) -> Tensor:
        """Proven upper bound of the norm; the arguments are those of `Convolution.bound`."""
        bound = spectral_norm_bound(self.effective_weight())
        return sum_bound(bound, self.norm_error())

    def row_difference_bound(self) -> Tensor:
        r"""Proven upper bounds ``(m, m)`` of ``||w_i - w_j||``, zero on the diagonal.

        Differences and norms are taken in float64; the sum of ``n`` squares under a root carries
        fewer than ``n + 4`` roundings. An error of norm ``e`` in the matrix moves a difference of
        two rows by at most ``sqrt(2) e``.
        """
        weight = self.effective_weight().to(torch.float64)
        rows, columns = weight.shape
        # Scaled to entries of size one, by a power of two; what still underflows in a square
        # is paid for by the tiny constant.
        exponent = torch.frexp(weight.detach().abs().amax()).exponent
        weight = scale_by_power_of_two(weight, -exponent)
        distance = torch.stack([_row_norms(weight - row) for row in weight]) + columns * 2.0**-500
        distance = round_up(distance, columns + 8)
        others = 1.0 - torch.eye(rows, dtype=distance.dtype, device=distance.device)
        unit = scale_by_power_of_two(torch.ones_like(distance), exponent)
        return sum_bound(product_bound(distance * others, unit), 1.5 * self.norm_error() * others)


@dataclass(frozen=True, eq=False, kw_only=True)
class Convolution(_Weighted):
    """A convolution layer with one to three spatial axes, or the adjoint of one.

    Attributes:
        weight: ``(c_out, c_in // groups, *taps)``; of an adjoint, that of the convolution whose
            adjoint it is, so that its rows are inputs.
        stride, padding, dilation: one number for each spatial axis; padding may be a string.
        groups, padding_mode: as in ``torch.nn.Conv2d``.
        input_size: one number for each spatial axis; ``None`` where zero padding is only an offset
            on the infinite lattice.
        adjoint: whether this is the transposed convolution.
        padded: without an ``input_size``, whether it may read places beyond its input.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1
    padding_mode: str = "zeros"
    input_size: tuple[int, ...] | None = None
    adjoint: bool = False
    padded: bool = True

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.weight.shape[1] * self.groups if self.adjoint else self.weight.shape[0]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.weight.shape[0] if self.adjoint else self.weight.shape[1] * self.groups

    def effective_weight(self) -> Tensor:
        """Same shape as ``weight``, in its own dtype."""
        weight = self.weight
        spatial = (1,) * (weight.ndim - 2)
        if self.rows is not None:
            weight = weight * self.rows.to(weight.dtype).reshape(-1, 1, *spatial)
        if self.columns is not None:
            grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
            factors = self.columns.to(weight.dtype).expand(self.groups * weight.shape[1])
            weight = (grouped * factors.reshape(self.groups, 1, -1, *spatial)).flatten(0, 1)
        return weight

    def kernel(self) -> Tensor:
        """The unit-stride kernel whose norm, times `gain`, is that of the layer.

        Always with two spatial axes, for `ff_bounds.PowerIterationPenalty`: one is added to a
        kernel with one, and the first two of three are read as one, which leaves four of its
        eight unfoldings.
        """
        kernel = self.exact_kernel()
        return kernel[..., None] if kernel.ndim == 4 else kernel.flatten(3, kernel.ndim - 2)

    def exact_kernel(self) -> Tensor:
        """The unit-stride kernel ``(groups, m, n, *taps)`` that `bound` is about."""
        stride, _ = self._padding_effect()
        return unit_stride_kernel(
            self.effective_weight(), stride=stride, dilation=self.dilation, groups=self.groups
        )

    def gain(self) -> float:
        """Factor that padding by copies of the input can add."""
        return math.sqrt(self._padding_effect()[1])

    def bound(
        self, method: str, lattice: Tensor | None = None, *, any_size: bool = False
    ) -> Tensor:
        """Proven upper bound of the norm of the layer's Jacobian.

        Args:
            method: as in `ff_bounds.conv_bound`.
            lattice: a proven bound of the norm of `exact_kernel` on the infinite lattice, if there
                is one already.
            any_size: whether the bound has to hold beyond the layer's own input, as where layers
                are composed on the lattice.
        """
        stride, repeats = self._padding_effect()
        weight = self.effective_weight()
        fixed = method == "best" and not any_size and not self.adjoint and self.input_size
        if lattice is None and (self.padding_mode == "circular" or fixed):
            bound = conv_bound(
                weight,
                stride=self.stride,
                padding=self.padding,
                dilation=self.dilation,
                groups=self.groups,
                padding_mode=self.padding_mode,
                input_size=self.input_size,
                method=method,
            )
        else:
            if lattice is None:
                lattice = lattice_bound(
                    weight,
                    stride=stride,
                    dilation=self.dilation,
                    groups=self.groups,
                    method=method,
                    tol=1e-3,
                )
            bound = padded_bound(lattice, repeats)
        return sum_bound(bound, padded_bound(self.norm_error(), repeats))

    @property
    def repeats(self) -> int:
        """How many copies of an entry padding can make."""
        return self._padding_effect()[1]

    def _padding_effect(self) -> tuple[tuple[int, ...], int]:
        if self.adjoint or self.input_size is None:
            return self.stride, 1
        return padding_effect(
            tuple(self.weight.shape[2:]),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            padding_mode=self.padding_mode,
            input_size=self.input_size,
        )


Weighted = Matrix | Convolution
"""Operators whose norm has to be measured."""

Operator = Weighted | Scale


def _row_norms(matrix: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=-1)
    return norms
