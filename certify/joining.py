"""Branches of a sum that come from the same tensor, as one; and how bounds are combined."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from certify.composition import add, identity
from certify.operators import Convolution, Operator, Scale, Weighted
from certify.signal import Signal
from ff_bounds.rounding import product_bound, round_up, sum_bound

MOST_EXPANSIONS = 3


class Expanded(NamedTuple):
    """``factor * operator`` (``None``: the identity) applied to ``start``, and remainders."""

    start: Signal
    operator: Weighted | None
    factor: float
    rests: tuple[tuple[Weighted, Signal, float], ...]


class Joined:
    """``sum of ||joint operator|| Lip(source) + remainders`` of a sum of branches."""

    def __init__(self) -> None:
        self.terms: dict[Signal, list[tuple[Weighted | None, float]]] = {}
        self.rests: list[tuple[Weighted, Signal, float]] = []
        self.alone: list[Signal] = []
        self.joint: list[tuple[Signal, Weighted]] = []

    def close(self) -> bool:
        """Form the joint operators; false if there is nothing to join."""
        for source, terms in self.terms.items():
            like = next((operator for operator, _ in terms if operator is not None), None)
            if len(terms) == 1 or like is None:
                for operator, factor in terms:
                    if operator is not None or factor != 1.0:
                        return False
                    self.alone.append(source)
                continue
            channels = like.inputs if isinstance(like, Convolution) else like.weight.shape[1]
            total: Weighted | None = None
            for operator, factor in sorted(terms, key=lambda term: term[1] != 1.0):
                if operator is None:
                    operator = identity(like, channels, like.weight.device)
                if total is None:  # the skip: a branch that was not expanded
                    total = operator if factor == 1.0 else None
                elif operator is not None:
                    total = add(total, operator, factor)
                if total is None or operator is None:
                    return False
            assert total is not None
            self.joint.append((source, total))
        return bool(self.joint)

    def bound(
        self,
        values: Mapping[Signal, Tensor],
        norms: Callable[[Weighted], Tensor],
        operator_of: Callable[[Signal], Operator],
    ) -> Tensor:
        """Add up.

        In a remainder ``r ||A|| ||B x||`` the earlier map ``B`` acts on the lattice: the bound of
        its restriction to the layer's outputs, which ``values`` may have, could be smaller. (In
        a chain either will do, since all terms may use the same values beyond the outputs; here
        a skip needs zeros there.)
        """
        parts = [values[signal] for signal in self.alone]
        parts += [product_bound(values[source], norms(operator)) for source, operator in self.joint]
        for operator, middle, factor in self.rests:
            earlier = operator_of(middle)
            if factor != 0 and not isinstance(earlier, Scale):
                inner = product_bound(values[middle.parents[0]], norms(earlier))
                parts.append(
                    times(product_bound(inner, norms(operator)), abs(factor) * (1 + 2**-48))
                )
        return added(parts)


def root_of_squares(bounds: Sequence[Tensor]) -> Tensor:
    """Proven upper bound of ``sqrt(sum of squares)``, without overflow or underflow."""
    largest = torch.stack(torch.broadcast_tensors(*bounds)).amax(dim=0)
    if largest.ndim == 0:
        if bool(largest.detach() == 0) or not bool(largest.detach().isfinite()):
            return largest
        scale = largest
    else:
        scale = torch.where((largest == 0) | largest.isinf(), 1.0, largest)
    total = sum(((bound / scale) ** 2 for bound in bounds), torch.zeros_like(largest))
    return product_bound(largest, round_up(total.sqrt(), 2 * len(bounds) + 3) + 2.0**-500)


def times(bound: Tensor, constant: float | Tensor) -> Tensor:
    """Proven upper bound of a bound times a constant of at least zero."""
    if isinstance(constant, float) and constant == 1.0:
        return bound
    factor = torch.as_tensor(constant, dtype=bound.dtype, device=bound.device)
    return product_bound(bound, factor)


def added(bounds: Sequence[Tensor]) -> Tensor:
    """Proven upper bound of the sum of bounds."""
    total = bounds[0]
    for bound in bounds[1:]:
        total = sum_bound(total, bound)
    return total
