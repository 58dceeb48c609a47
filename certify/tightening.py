"""How far a network's bound is tightened beyond the product of its layers' norms."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from certify.balancing import balancing_scales
from certify.bounding import Bounding, Norms, merged
from certify.norms import Prove, margin_lipschitz, proven_norms
from certify.signal import Signal

TIGHTENINGS = ("none", "merge", "join", "balance")
"""Each includes those before it: the product of all norms; normalisation merged into its
neighbours; neighbours and skips bounded together; channels scaled between layers."""


@dataclass(frozen=True)
class NetworkBound:
    """Proven Lipschitz bounds of a network's tensors.

    Attributes:
        bounding: the steps and how they are combined.
        norms: proven norms of its operators.
        other: another bound of the same network, larger as a whole, but perhaps not for each pair
            of outputs.
    """

    bounding: Bounding
    norms: Norms
    other: NetworkBound | None = None

    @cached_property
    def values(self) -> dict[Signal, Tensor]:
        """Bound of each signal."""
        return self.bounding.evaluate(self.norms)

    @property
    def lipschitz(self) -> Tensor:
        """Bound of the output, a float64 scalar."""
        return self.values[self.bounding.output]

    @cached_property
    def margins(self) -> Tensor:
        """Bounds ``(C, C)`` of the differences of two outputs; see `margin_lipschitz`."""
        margins = margin_lipschitz(self.bounding, self.values, self.norms)
        return margins if self.other is None else torch.minimum(margins, self.other.margins)


def bound_network(
    output: Signal, method: str, tighten: str, prove: Prove = proven_norms
) -> NetworkBound:
    """Prove a network's bounds.

    Args:
        output: as `certify.graph.LipschitzGraph.walk` returns it.
        method: how convolutions are bounded, see `ff_bounds.conv_bound`.
        tighten: one of `TIGHTENINGS`.
        prove: proves the norms of operators.

    Raises:
        ValueError: an unknown method or tightening.
    """
    if tighten not in TIGHTENINGS:
        raise ValueError(f"expected tighten to be one of {', '.join(TIGHTENINGS)}, got {tighten!r}")
    if tighten == "none":
        return _proven(Bounding(output), method, prove)
    whole = merged(output)
    join = tighten != "merge"
    found = _proven(Bounding(whole, join=join), method, prove)
    if join and method == "best":  # norms on the layers' own inputs, which cannot be composed
        found = _smaller(found, _proven(Bounding(whole), method, prove))
    if tighten == "balance":
        scales = balancing_scales(whole)
        if scales:
            balanced = Bounding(whole, join=True, scales=scales)
            found = _smaller(found, _proven(balanced, method, prove))
    return found


def _smaller(first: NetworkBound, second: NetworkBound) -> NetworkBound:
    if bool(second.lipschitz < first.lipschitz):
        first, second = second, first
    return replace(first, other=second if first.other is None else _smaller(first.other, second))


def _proven(bounding: Bounding, method: str, prove: Prove) -> NetworkBound:
    norms = prove(bounding.operators(), method, any_size=bounding.join)
    return NetworkBound(bounding, norms)
