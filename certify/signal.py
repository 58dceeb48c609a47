"""What flows through the graph walk: how each tensor of a network arises from the input.

A `Signal` is a node of a graph of *steps*. A rule appends a step that is at least as large as the
operation it is about; nothing is multiplied yet. What the steps amount to is worked out later
(`certify.bounding`), where neighbours can be seen together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from certify.operators import Operator


class UnsupportedModel(Exception):  # noqa: N818 - the name says what is wrong, not that it is
    """The model cannot be certified; the message names the node, the reason and what to do."""


class UnknownRounding(UnsupportedModel):
    """It is not known how much an operation can round; in exact arithmetic it has a bound."""


@dataclass(frozen=True, eq=False)
class Input:
    """The network's input.

    Attributes:
        device: where its bounds are computed.
        domain: smallest and largest entry of an input, or ``None`` if there is no limit.
        dtype: of the network's tensors.
    """

    device: torch.device
    domain: tuple[float, float] | None = None
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True, eq=False)
class Affine:
    """``A x`` plus a constant."""

    operator: Operator


@dataclass(frozen=True, eq=False)
class Slopes:
    """A function of each entry by itself.

    Attributes:
        low, high: what its difference quotients lie between.
        largest: bound of its absolute value.
        breaks: ascending, where straight pieces meet; none where it is not made of any.
        slopes: of the pieces, from left to right, one more than there are breaks.
        curvature: what the difference quotients of its slope lie between; ``None`` where the slope
            jumps, or nothing is known.
    """

    low: float
    high: float
    largest: float = math.inf
    breaks: tuple[float, ...] = ()
    slopes: tuple[float, ...] = ()
    curvature: tuple[float, float] | None = None

    @property
    def steepest(self) -> float:
        """Lipschitz constant."""
        return max(abs(self.low), abs(self.high))


@dataclass(frozen=True, eq=False)
class Lipschitz:
    """Any map with this Lipschitz constant, L2 to L2.

    Attributes:
        constant: proven upper bound.
        channelwise: whether scaling the channels (axis 1) of its input by any positive factors
            scales those of its output by the same.
        linear: whether it is affine, so that its second derivative is zero.
    """

    constant: float | Tensor = 1.0
    channelwise: bool = False
    linear: bool = False


@dataclass(frozen=True, eq=False)
class Wrapping(Lipschitz):
    """Circular padding, which a convolution right behind it can take for its own.

    Attributes:
        amounts: entries added at both ends of each spatial axis.
    """

    amounts: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Flatten:
    """``(N, C, ...)`` to ``(N, C * ...)``."""


@dataclass(frozen=True, eq=False)
class Sum:
    """The sum of all parents."""


@dataclass(frozen=True, eq=False)
class Concatenation:
    """All parents side by side.

    Attributes:
        channels: whether they are joined along the channels (axis 1).
    """

    channels: bool = False


@dataclass(frozen=True, eq=False)
class Product:
    """The first parent times the second, entry by entry, on a bounded domain.

    Attributes:
        spread: whether entries of the second meet many of the first.
    """

    spread: bool = False


Step = Input | Affine | Slopes | Lipschitz | Flatten | Sum | Concatenation | Product


@dataclass(frozen=True, eq=False)
class Signal:
    """A tensor of the network, seen as a function of the network's input, for one sample.

    Attributes:
        shape: its shape, the batch first.
        step: how it arises from its parents.
        parents: the signals that it arises from.
        name: the module or operation, for people.
        node: its place in the network's graph, see `certify.graph.LipschitzGraph.tensors`.
        centre: its L2 norm and its largest absolute entry where the input is the centre of its
            domain, if it has one.
        origin: the signal that it equals up to a constant and the shape, if it is not that itself.
    """

    shape: tuple[int, ...]
    step: Step
    parents: tuple[Signal, ...] = ()
    name: str = ""
    node: str = ""
    centre: tuple[float, float] | None = None
    origin: Signal | None = None

    @property
    def input(self) -> Input:
        """The step that everything starts from."""
        signal = self
        while signal.parents:
            signal = signal.parents[0]
        assert isinstance(signal.step, Input)
        return signal.step

    def through(self, operator: Operator) -> Signal:
        """Apply an affine map."""
        return Signal(self.shape, Affine(operator), (self,))

    def elementwise(
        self,
        low: float,
        high: float,
        *,
        largest: float = math.inf,
        curvature: tuple[float, float] | None = None,
    ) -> Signal:
        """Apply a function of each entry; see `Slopes`."""
        if not -math.inf < low <= high < math.inf:
            raise UnsupportedModel(f"slopes between {low} and {high} are not bounded")
        if curvature is not None and not -math.inf < curvature[0] <= 0 <= curvature[1] < math.inf:
            curvature = None  # not bounded
        return Signal(self.shape, Slopes(low, high, largest, curvature=curvature), (self,))

    def piecewise(
        self, breaks: Sequence[float], slopes: Sequence[float], *, largest: float = math.inf
    ) -> Signal:
        """Apply a continuous function of each entry made of straight pieces; see `Slopes`."""
        if len(slopes) != len(breaks) + 1 or list(breaks) != sorted(breaks):
            raise ValueError(f"expected ascending breaks between slopes, got {breaks}, {slopes}")
        result = self.elementwise(min(slopes), max(slopes), largest=largest)
        assert isinstance(result.step, Slopes)
        if not all(map(math.isfinite, breaks)):
            return result
        step = replace(result.step, breaks=tuple(breaks), slopes=tuple(slopes))
        return replace(result, step=step)

    def scaled(
        self,
        lipschitz: float | Tensor = 1.0,
        *,
        channelwise: bool = False,
        linear: bool = False,
    ) -> Signal:
        """Apply a map with this Lipschitz constant; see `Lipschitz`."""
        return Signal(self.shape, Lipschitz(lipschitz, channelwise, linear), (self,))


def total(signals: Sequence[Signal]) -> Signal:
    """Add signals of equal shape."""
    return Signal(signals[0].shape, Sum(), tuple(signals))


def side_by_side(signals: Sequence[Signal], *, channels: bool = False) -> Signal:
    """Put signals beside each other; see `Concatenation`."""
    return Signal(signals[0].shape, Concatenation(channels), tuple(signals))


def checked_domain(domain: Sequence[float] | None) -> tuple[float, float] | None:
    """Return the smallest and the largest entry of an input as floats, or ``None`` for no limit.

    Raises:
        ValueError: not two finite numbers, the smaller one first.
    """
    if domain is None:
        return None
    if len(domain) != 2 or not -math.inf < domain[0] < domain[1] < math.inf:
        raise ValueError(f"expected a domain (low, high) with low < high, got {domain}")
    return float(domain[0]), float(domain[1])
