"""The affine steps of a network as maps that can be applied to batches, with their rounding paid.

`certify.operators` measures operators; here they act: forwards on directions, backwards on rows.
Axes in front of a tensor's own (batch, rows) are carried along.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from certify.operators import Convolution, Matrix, Operator, Scale
from ff_bounds.padding import padding_amounts
from ff_bounds.rounding import gamma, round_up

TINY = 2.0**-500
"""More than what underflow can take from a norm, or from a sum of products of numbers that are not
themselves extreme; nothing beside any norm that matters."""


class LinearMap(Protocol):
    """What `linear_map` returns."""

    @property
    def charge(self) -> Tensor:
        """For rows ``v``, how far ``pull(v)`` is from ``v A`` at most, over ``||v||``.

        Each entry of ``pull(v, absolute=True)`` is at most as far from ``v |A|``.
        """

    @property
    def error(self) -> Tensor:
        """Bound of the norm of the exact ``A`` less that of the stored weights."""

    @property
    def terms(self) -> int:
        """How many products are added in an entry of `push` at most."""

    def pull(self, rows: Tensor, *, absolute: bool = False) -> Tensor:
        """``v A``, or ``v |A|``, for rows ``(..., *output)``, rounded; ``(..., *input)``."""

    def push(self, vectors: Tensor, *, absolute: bool = False) -> Tensor:
        """``A x``, or ``|A| x``, for vectors ``(..., *input)``, rounded."""

    def unit_norms(self) -> Tensor:
        """Upper bounds of the norms of the rows of ``A``, of the output's shape or broadcast."""

    def column_norms(self) -> Tensor:
        """Upper bounds of the norms of the columns of ``A``, of the input's shape or broadcast."""


def linear_map(
    operator: Operator, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> LinearMap | None:
    """The map of an operator, or ``None`` where its action is not known from its norm's data.

    Args:
        operator: of an affine step.
        inputs: shape of one sample before it.
        outputs: shape of one sample behind it.
    """
    if isinstance(operator, Scale):
        return _Scaling.of(operator, inputs)
    error = operator.norm_error()
    if isinstance(operator, Matrix):
        weight = operator.effective_weight().to(torch.float64)
        fits = (*outputs, *inputs) == tuple(weight.shape)
        return _Dense.of(weight, error) if fits else None
    if operator.adjoint or operator.input_size is None or operator.padding_mode != "zeros":
        return None
    amounts = padding_amounts(
        operator.padding, tuple(operator.weight.shape[2:]), operator.stride, operator.dilation
    )
    if any(before != after for before, after in amounts):
        return None
    found = _Convolving.of(operator, error, tuple(a for a, _ in amounts), inputs, outputs)
    fits = all(0 <= left < step for left, step in zip(found.left, found.stride, strict=True))
    return found if fits else None


def norms(tensor: Tensor, axes: int) -> Tensor:
    """Upper bounds of the L2 norms over the last so many axes."""
    flat = tensor.flatten(-axes) if axes > 1 else tensor
    size = flat.shape[-1]
    return round_up(torch.linalg.vector_norm(flat, dim=-1) + size * TINY, size + 5)


@dataclass(frozen=True)
class _Dense:
    weight: Tensor
    charge: Tensor
    error: Tensor
    terms: int

    @staticmethod
    def of(weight: Tensor, error: Tensor) -> _Dense:
        size = norms(weight, 2)
        charge = round_up(gamma(weight.shape[0] + 2) * size + error, 3)
        return _Dense(weight, charge, error, weight.shape[1])

    def pull(self, rows: Tensor, *, absolute: bool = False) -> Tensor:
        return rows @ (self.weight.abs() if absolute else self.weight)

    def push(self, vectors: Tensor, *, absolute: bool = False) -> Tensor:
        return vectors @ (self.weight.abs() if absolute else self.weight).mT

    def unit_norms(self) -> Tensor:
        return round_up(norms(self.weight, 1) + self.error, 1)

    def column_norms(self) -> Tensor:
        return round_up(norms(self.weight.mT, 1) + self.error, 1)


@dataclass(frozen=True)
class _Scaling:
    factors: Tensor  # broadcasts over one sample
    charge: Tensor
    error: Tensor
    terms: int = 1

    @staticmethod
    def of(operator: Scale, inputs: tuple[int, ...]) -> _Scaling:
        factors = operator.factors.to(torch.float64)
        largest = operator.bound()
        error = round_up(largest * gamma(2 * operator.roundings + 2) + 2.0**-1000, 3)
        shape = (-1,) if factors.numel() == 1 else (-1, *[1] * (len(inputs) - 1))
        return _Scaling(factors.reshape(shape), round_up(2.0 * error, 1), error)

    def pull(self, rows: Tensor, *, absolute: bool = False) -> Tensor:
        return rows * (self.factors.abs() if absolute else self.factors)

    def push(self, vectors: Tensor, *, absolute: bool = False) -> Tensor:
        return vectors * (self.factors.abs() if absolute else self.factors)

    def unit_norms(self) -> Tensor:
        return round_up(self.factors.abs() + self.error, 1)

    def column_norms(self) -> Tensor:
        return self.unit_norms()


@dataclass(frozen=True)
class _Convolving:
    weight: Tensor
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    charge: Tensor
    error: Tensor
    terms: int

    @staticmethod
    def of(
        operator: Convolution,
        error: Tensor,
        padding: tuple[int, ...],
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
    ) -> _Convolving:
        """The taps' norms add up to a bound of the norm of the map with absolute weights."""
        weight = operator.effective_weight().to(torch.float64)
        taps = math.prod(weight.shape[2:])
        size = round_up(norms(weight.flatten(2).permute(2, 0, 1), 2).sum(), taps)
        terms = taps * max(weight.shape[:2])
        charge = round_up(gamma(terms + 2) * size + error, 3)
        return _Convolving(
            weight,
            operator.stride,
            padding,
            operator.dilation,
            operator.groups,
            inputs,
            outputs,
            charge,
            error,
            terms,
        )

    @property
    def left(self) -> list[int]:
        """How many entries at the end of each axis no window reaches."""
        return [
            size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
            for size, out, s, p, d, k in zip(
                self.inputs[1:],
                self.outputs[1:],
                self.stride,
                self.padding,
                self.dilation,
                self.weight.shape[2:],
                strict=True,
            )
        ]

    def pull(self, rows: Tensor, *, absolute: bool = False) -> Tensor:
        weight = self.weight.abs() if absolute else self.weight
        return self._apply(rows, weight, self.inputs, self.left)

    def push(self, vectors: Tensor, *, absolute: bool = False) -> Tensor:
        weight = self.weight.abs() if absolute else self.weight
        return self._apply(vectors, weight, self.outputs, None)

    def _apply(
        self, x: Tensor, weight: Tensor, shape: tuple[int, ...], left: list[int] | None
    ) -> Tensor:
        """Convolve, or apply the adjoint. cuDNN may choose algorithms that round otherwise."""
        lead = x.shape[: x.ndim - len(shape)]
        with torch.backends.cudnn.flags(enabled=False):
            result = torch.ops.aten.convolution(
                x.flatten(0, len(lead) - 1),
                weight,
                None,
                self.stride,
                self.padding,
                self.dilation,
                left is not None,
                left or [0] * len(self.stride),
                self.groups,
            )
        reshaped: Tensor = result.reshape(*lead, *shape)
        return reshaped

    def unit_norms(self) -> Tensor:
        """All taps of an output channel; at the border zero padding leaves some out."""
        rows = round_up(norms(self.weight, self.weight.ndim - 1) + self.error, 1)
        return rows.reshape(-1, *[1] * (self.weight.ndim - 2))

    def column_norms(self) -> Tensor:
        """All taps that an input channel can meet, which a stride keeps from meeting at once."""
        grouped = self.weight.reshape(self.groups, -1, *self.weight.shape[1:])
        columns = grouped.transpose(1, 2).flatten(0, 1)
        found = round_up(norms(columns, columns.ndim - 1) + self.error, 1)
        return found.reshape(-1, *[1] * (self.weight.ndim - 2))
