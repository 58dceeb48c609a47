"""The one place where floating-point rounding is paid for.

Everything that the other files promise is proven for the standard model of arithmetic: each
operation returns the exact result times ``1 + d`` with ``|d| <= u``, plus at most the smallest
normal number where the result underflows. The model holds for IEEE float64 on CPU and CUDA in
any order of summation, with or without fused multiply-add, and with subnormal results flushed
to zero (`torch.set_flush_denormal` also reads subnormal *weights* as zeros: the bound is then that
of the flushed weights, which are what the layer computes with). It does not hold for Strassen-like
matrix products, complex ones of three real products included, nor for the emulated float64 that
cuBLAS 13 offers to those who switch it on.

Two more things are assumed where they are used: that sines, cosines, the arc cosine and the complex
exponential are off by ``4 u`` at most (`ff_bounds.symbol`, `frequency_grid`, `circular`, `peak`,
`certify.grid_proofs`), and on CPUs that LAPACK's Cholesky solves triangular systems by
substitution (`ff_bounds.positive`).

References:
    N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, chapters 2 and 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNIT_ROUNDOFF = 2.0**-53
"""Largest relative error of one float64 operation."""

SMALLEST_NORMAL = 2.0**-1022
"""Largest absolute error of one float64 operation whose result underflows."""


def gamma(operations: int) -> float:
    """Upper bound of ``k u / (1 - k u)``: relative error of ``k`` chained operations.

    Example:
        >>> gamma(1) >= UNIT_ROUNDOFF
        True
    """
    product = operations * UNIT_ROUNDOFF
    return product / (1.0 - product) * (1.0 + 4.0 * UNIT_ROUNDOFF)


def round_up(value: Tensor, operations: int) -> Tensor:
    """Upper bound of a non-negative quantity that was computed with rounding.

    Claim: if ``value`` is the computed result of an expression of non-negative terms with at
    most ``operations`` roundings on any path and no underflow, the exact result is at most
    ``round_up(value, operations)``: ``(1-u)**k (1 + 2(k+2)u) (1-u) >= 1`` for ``k u <= 1/8``.

    Args:
        value: float64 tensor, any shape, entries ``>= 0``.
        operations: number ``k`` of roundings behind each entry.

    Returns:
        float64 tensor of the same shape; differentiable.
    """
    return value * (1.0 + 2.0 * (operations + 2) * UNIT_ROUNDOFF)


def product_bound(first: Tensor, second: Tensor) -> Tensor:
    """Upper bound of the product of two non-negative numbers, underflow included.

    An exact zero stays zero; a product that underflows becomes the smallest normal number, so
    that a chain of tiny norms never claims to be a constant function.

    Example:
        >>> tiny = torch.tensor(1e-200, dtype=torch.float64)
        >>> bool(product_bound(tiny, tiny) > 0)
        True
    """
    product = round_up(first * second, 1).clamp_min(SMALLEST_NORMAL)
    return torch.where((first == 0) | (second == 0), torch.zeros_like(product), product)


def sum_bound(first: Tensor, second: Tensor) -> Tensor:
    """Upper bound of the sum of two non-negative numbers (a float sum never underflows)."""
    return round_up(first + second, 1)


def power_of_two(exponent: Tensor) -> Tensor:
    """``2.0 ** exponent`` without rounding, for integer exponents in ``[-1022, 1023]``.

    Built from the bits: the vectorised ``pow`` of some backends is not exact.

    Example:
        >>> power_of_two(torch.tensor([-3, 10])).tolist()
        [0.125, 1024.0]
    """
    return ((exponent.to(torch.int64) + 1023) << 52).view(torch.float64)


def scale_by_power_of_two(value: Tensor, exponent: Tensor) -> Tensor:
    """``value * 2.0 ** exponent`` for exponents in ``[-2044, 2044]``.

    Exact unless the result underflows; done in two steps because ``2.0 ** exponent`` itself may
    be out of range.
    """
    # Other devices are not asked: the answer would have to be waited for.
    if exponent.device.type == "cpu" and bool((exponent.abs() < 1000).all()):
        return value * power_of_two(exponent)
    half = torch.div(exponent, 2, rounding_mode="floor")
    return value * power_of_two(half) * power_of_two(exponent - half)


def undo_scaling(bound: Tensor, exponent: Tensor) -> Tensor:
    """Upper bound of ``value * 2.0 ** exponent`` from an upper bound of ``value``.

    Exact, or infinite on overflow, or one smallest normal number more where the result underflows.

    Args:
        bound: float64, non-negative.
        exponent: integers in ``[-1074, 1024]``, as from ``torch.frexp``.
    """
    scaled = scale_by_power_of_two(bound, exponent)
    return torch.where(scaled < 2.0 * SMALLEST_NORMAL, scaled + SMALLEST_NORMAL, scaled)
