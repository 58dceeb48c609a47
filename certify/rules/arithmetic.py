"""Sums of signals, and arithmetic with constants."""

from __future__ import annotations

import math
import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from certify.operators import Matrix, Scale
from certify.rules.registry import lipschitz_rule
from certify.rules.rounding import elementwise, exact, multiplied, of_products
from certify.signal import Product, Signal, Slopes, UnsupportedModel, side_by_side, total
from ff_bounds import spectral_norm_bound


@lipschitz_rule(operator.add, torch.add, "add", "add_", rounding=elementwise)
def add(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    """``Lip(f + g) <= Lip f + Lip g``; a constant changes nothing."""
    x, y = broadcast(x, y)
    if not isinstance(y, Signal):
        return _shifted(signal_of(x))
    if alpha != 1:
        y = multiply(y, alpha)
    return total([x, y]) if isinstance(x, Signal) else _shifted(y)


def _shifted(x: Signal) -> Signal:
    """The same map up to a constant, which is nothing to a bound but for the size of values."""
    if isinstance(x.step, Slopes) and x.step.largest < math.inf:
        return replace(x, step=replace(x.step, largest=math.inf), node="", origin=x)
    return x


@lipschitz_rule(
    operator.sub,
    torch.sub,
    torch.subtract,
    "sub",
    "sub_",
    "subtract",
    "subtract_",
    rounding=elementwise,
)
def subtract(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    """As `add`, of ``-y``."""
    return add(x, y, alpha=-alpha)


@lipschitz_rule(torch.rsub, rounding=elementwise)
def subtract_from(x: Any, y: Any, *, alpha: float = 1) -> Signal:
    """``y - alpha x``."""
    return add(y, x, alpha=-alpha)


@lipschitz_rule(operator.neg, torch.neg, torch.negative, "neg", "neg_", "negative", rounding=exact)
def negate(x: Signal) -> Signal:
    """Times -1."""
    return multiply(x, -1)


@lipschitz_rule(
    operator.mul,
    torch.mul,
    torch.multiply,
    "mul",
    "mul_",
    "multiply",
    "multiply_",
    rounding=multiplied,
)
def multiply(x: Any, y: Any) -> Signal:
    """By a constant: the largest of its entries. A product of two signals: see `Product`."""
    if isinstance(x, Signal) and isinstance(y, Signal):
        return _product(x, y)
    x, y = broadcast(x, y)
    signal, factors = (x, y) if isinstance(x, Signal) else (signal_of(y), x)
    return _times(signal, factors, roundings=0)


@lipschitz_rule(
    operator.truediv, torch.div, torch.divide, torch.true_divide,
    "div", "div_", "divide", "true_divide", rounding=multiplied,
)  # fmt: skip
def divide(x: Any, y: Any, *, rounding_mode: None = None) -> Signal:
    """By a constant."""
    if rounding_mode is not None:
        raise UnsupportedModel(f"division with rounding_mode={rounding_mode!r} is not continuous")
    if isinstance(y, Signal):
        raise UnsupportedModel("division by a tensor that depends on the input is not Lipschitz")
    x, y = broadcast(x, y)
    divisor = torch.as_tensor(y, dtype=torch.float64)
    return _times(signal_of(x), divisor.reciprocal(), roundings=1)


def _product(x: Signal, y: Signal) -> Signal:
    """Lipschitz where both factors are bounded, which takes a bounded domain."""
    if x.input.domain is None:
        raise UnsupportedModel(
            "a product of two tensors that depend on the input is not Lipschitz: its slope grows "
            "with its factors; give the range of the input, domain=(0, 1) or --domain 0,1, to "
            "bound it there"
        )
    if x.centre is None or y.centre is None:
        raise UnsupportedModel("a product with whole numbers that depend on the input")
    joint = tuple(torch.broadcast_shapes(x.shape, y.shape))
    if x.shape != joint:
        x, y = y, x
    if x.shape != joint:
        raise UnsupportedModel(f"a product of shapes {x.shape} and {y.shape} repeats both")
    return Signal(x.shape, Product(spread=y.shape != joint), (x, y))


def _times(x: Signal, factors: Any, roundings: int) -> Signal:
    """Multiply by constants; by channel where all other axes have one entry."""
    if not isinstance(factors, (Tensor, float, int)):
        raise UnsupportedModel(f"a factor of type {type(factors).__name__}")
    if isinstance(factors, Tensor) and factors.is_complex():
        raise UnsupportedModel("a complex factor")
    # torch.as_tensor would round a number to the default dtype.
    if not isinstance(factors, Tensor):
        factors = torch.tensor(float(factors), dtype=torch.float64)
    constant = factors
    if not bool(constant.detach().isfinite().all()):
        raise UnsupportedModel("a factor that is infinite or NaN")
    constant = constant.to(torch.float64)
    aligned = (1,) * (len(x.shape) - constant.ndim) + tuple(constant.shape)
    channels = aligned[1] if len(aligned) > 1 else 1
    if math.prod(aligned) == channels:
        return x.through(Scale(constant.flatten(), roundings))
    largest = Scale(constant.flatten(), roundings).bound()
    return x.scaled(largest, channelwise=True, linear=True)


@lipschitz_rule(
    torch.maximum, torch.minimum, torch.fmax, torch.fmin, "maximum", "minimum", rounding=elementwise
)
def larger(x: Any, y: Any) -> Signal:
    """Entry by entry ``|max(a, b) - max(c, d)| <= ||(a, b) - (c, d)||``; the same for min."""
    x, y = broadcast(x, y)
    if isinstance(x, Signal) and isinstance(y, Signal):
        return side_by_side([x, y]).scaled()
    return signal_of(x if isinstance(x, Signal) else y).elementwise(0.0, 1.0)


@lipschitz_rule(torch.matmul, operator.matmul, torch.mm, "matmul", "mm", rounding=of_products)
def matrix_product(x: Any, y: Any) -> Signal:
    """By a constant matrix: ``x W`` is `certify.rules.affine.linear` with its transpose."""
    if isinstance(x, Signal) and isinstance(y, Signal):
        raise UnsupportedModel(
            "a product of two tensors that depend on the input (as in attention) is not Lipschitz"
        )
    if isinstance(x, Tensor) and x.ndim == 2 and isinstance(y, Signal) and len(y.shape) > 2:
        return y.scaled(spectral_norm_bound(x), linear=True)  # along the axis before the last
    if not isinstance(x, Signal) or not isinstance(y, Tensor) or y.ndim != 2:
        raise UnsupportedModel("a matrix product other than of a tensor and a constant matrix")
    return x.through(Matrix(y.mT))


@lipschitz_rule(torch.addmm)
def matrix_product_with_offset(
    input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1
) -> Signal:
    """``beta * input + alpha * mat1 mat2``."""
    if isinstance(input, Signal):
        raise UnsupportedModel("addmm with an offset that depends on the input")
    return multiply(matrix_product(mat1, mat2), alpha)


def signal_of(x: Any) -> Signal:
    """Return ``x`` if it depends on the network's input."""
    if not isinstance(x, Signal):
        raise UnsupportedModel("expected a tensor that depends on the input")
    return x


def broadcast(x: Any, y: Any) -> tuple[Any, Any]:
    """Repeat the entries of signals as broadcasting does; refuse what brings samples together."""
    shapes = [tuple(getattr(term, "shape", ())) for term in (x, y)]
    joint = tuple(torch.broadcast_shapes(*shapes))
    found = []
    for term, shape in zip((x, y), shapes, strict=True):
        if not isinstance(term, Signal):
            if len(shape) == len(joint) and shape[:1] not in ((), (1,)):
                raise UnsupportedModel("a constant with one entry for each sample of a batch")
            found.append(term)
            continue
        if len(shape) != len(joint) or shape[0] != joint[0]:
            raise UnsupportedModel(f"broadcasting {shape} to {joint} moves the batch axis")
        times = math.prod(joint) // max(1, math.prod(shape))
        repeated = term
        if times > 1:
            repeated = term.scaled(math.sqrt(times) * (1 + 2**-50), linear=True)
        found.append(replace(repeated, shape=joint) if times > 1 else term)
    return found[0], found[1]
