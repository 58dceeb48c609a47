"""Operations that choose entries by constant indices or masks, or put constants in their place."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from certify.rules.arithmetic import broadcast
from certify.rules.registry import lipschitz_rule
from certify.rules.rounding import elementwise, exact, filled
from certify.signal import Signal, UnsupportedModel


def chosen(x: Signal, axis: int, index: Any) -> Signal:
    """Entries of an axis by their numbers: one that is there ``n`` times counts ``sqrt(n)``."""
    if axis == 0:
        raise UnsupportedModel("a choice of samples")
    if any(isinstance(i, Signal) for i in (index if isinstance(index, list) else [index])):
        raise UnsupportedModel("indices that depend on the input")
    index = torch.as_tensor(index)
    if index.dtype == torch.bool or index.ndim != 1:
        raise UnsupportedModel("indices other than a list of whole numbers")
    counts = torch.bincount(index.remainder(x.shape[axis]).cpu())
    most = int(counts.max()) if len(counts) else 0
    return x.scaled(math.sqrt(most) * (1 + 2**-50) if most != 1 else 1.0, linear=True)


@lipschitz_rule(torch.index_select, "index_select", rounding=exact)
def index_select(input: Signal, dim: int, index: Any) -> Signal:
    """See `chosen`."""
    return chosen(input, dim % len(input.shape), index)


@lipschitz_rule(torch.masked_fill, "masked_fill", "masked_fill_", rounding=filled)
def masked_fill(input: Signal, mask: Any, value: Any) -> Signal:
    """Entries become a constant, or stay."""
    if any(not isinstance(constant, (Tensor, float, int)) for constant in (mask, value)):
        raise UnsupportedModel("a mask or a value that depends on the input")
    input, _ = broadcast(input, mask)
    return input.scaled(linear=True)


@lipschitz_rule(torch.tril, torch.triu, "tril", "triu", rounding=exact)
def triangle(input: Signal, diagonal: int = 0) -> Signal:
    """Some entries of the last two axes become zero."""
    if len(input.shape) < 3:
        raise UnsupportedModel("a triangle of samples and entries")
    return input.scaled(linear=True)


@lipschitz_rule(torch.diagonal, "diagonal", rounding=exact)
def diagonal(input: Signal, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Signal:
    """Some entries of two axes behind the batch's."""
    if 0 in (dim1 % len(input.shape), dim2 % len(input.shape)):
        raise UnsupportedModel("a diagonal through samples")
    return input.scaled(linear=True)


@lipschitz_rule(
    torch.zeros_like, torch.ones_like, torch.full_like, "new_zeros", "new_ones", "new_full",
    rounding=elementwise,
)  # fmt: skip
def constant(input: Signal, *arguments: Any, **named: Any) -> Signal:
    """Of the input only the shape matters."""
    if any(isinstance(value, Signal) for value in (*arguments, *named.values())):
        raise UnsupportedModel("a constant that depends on the input")
    return input.scaled(0.0, linear=True)
