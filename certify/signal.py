"""What flows through the graph walk: a shape and a Lipschitz bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from certify.operators import Operator
from ff_bounds.rounding import product_bound

Norms = Callable[[Operator], Tensor | None]
"""How the norm of an operator is measured: proven, or estimated in training (`certify.norms`).

``None`` stands for 1, and saves the arithmetic while operators are only being collected.
"""


class UnsupportedModel(Exception):  # noqa: N818 - the name says what is wrong, not that it is
    """The model cannot be certified; the message names the node, the reason and what to do."""


@dataclass(frozen=True)
class Signal:
    """A tensor of the network, seen as a function of the network's input.

    Attributes:
        shape: its shape, the batch first.
        source: float64 scalar; Lipschitz bound (L2 to L2, per sample) of the input of ``operator``.
        norms: measures operators.
        operator: the affine map that was applied last, kept unmeasured so that what follows can
            be merged into it; ``None`` for none.
    """

    shape: tuple[int, ...]
    source: Tensor
    norms: Norms
    operator: Operator | None = None

    @cached_property
    def lipschitz(self) -> Tensor:
        """Lipschitz bound of the map from the network's input to this tensor."""
        if self.operator is None:
            return self.source
        norm = self.norms(self.operator)
        return self.source if norm is None else product_bound(self.source, norm)

    def through(self, operator: Operator) -> Signal:
        """Apply an affine map."""
        return Signal(self.shape, self.lipschitz, self.norms, operator)

    def replacing_operator(self, operator: Operator) -> Signal:
        """Put ``operator`` (the last operator and what followed it, in one) in its place."""
        return replace(self, operator=operator)

    def scaled(self, lipschitz: float | Tensor = 1.0) -> Signal:
        """Apply a map with this Lipschitz bound."""
        bound = self.lipschitz
        if not (isinstance(lipschitz, float) and lipschitz == 1.0):
            factor = torch.as_tensor(lipschitz, dtype=bound.dtype, device=bound.device)
            bound = product_bound(bound, factor)
        return Signal(self.shape, bound, self.norms)
