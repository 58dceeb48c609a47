r"""From the steps of a network to Lipschitz bounds of its tensors.

The plain bound multiplies: ``Lip(g f) <= Lip(g) Lip(f)``, adds where branches meet, and takes the
root of the sum of squares where they are concatenated. With ``join`` it is the smaller of that and
of bounds that see neighbours together.

Let ``A2 D A1`` be two affine maps with a function of each entry between them whose difference
quotients lie in ``[m - r, m + r]``. For two inputs, the difference of its outputs is ``D`` times
that of its inputs, with a diagonal matrix ``D = m I + r E`` and ``||E|| <= 1``, so that

    ``||A2 D A1|| <= |m| ||A2 A1|| + r ||A2|| ||A1||``,

for ReLU half the product of the norms and half the norm of the product. A parallel branch
``S`` from the same tensor, the skip of a residual block, joins the first term:

    ``||S + A2 D A1|| <= ||S + m A2 A1|| + r ||A2|| ||A1||``.

Convolutions are composed on the infinite lattice; the places where the first has no output are
zeros of ``D``, so that ``[m - r, m + r]`` is widened to hold zero (see `certify.composition`).

References:
    P. L. Combettes, J.-C. Pesquet, Lipschitz Certificates for Layered Network Structures Driven by
    Averaged Activation Operators, SIAM J. Math. Data Sci. 2020 (the expansion for chains).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from certify.composition import add, balanced, compose, identity, masks, merge
from certify.operators import Convolution, Matrix, Operator, Scale
from certify.products import product_value, radius
from certify.signal import (
    Affine,
    Concatenation,
    Flatten,
    Input,
    Lipschitz,
    Product,
    Signal,
    Slopes,
    Sum,
)
from ff_bounds.rounding import product_bound, round_up, sum_bound

Norms = Callable[[Operator], Tensor]
"""How the norm of a matrix or convolution is measured: proven, or estimated in training."""

Measure = Callable[[Operator], Tensor]


def in_order(output: Signal) -> list[Signal]:
    """All signals that ``output`` arises from, parents first, ``output`` last."""
    order: list[Signal] = []
    seen: set[Signal] = set()
    stack = [(output, False)]
    while stack:
        signal, ready = stack.pop()
        if ready:
            order.append(signal)
        elif signal not in seen:
            seen.add(signal)
            stack.append((signal, True))
            stack += [(parent, False) for parent in reversed(signal.parents)]
    return order


def merged(output: Signal) -> Signal:
    """The same map with factors of channels (BatchNorm, Normalize, ...) put into their neighbours.

    The norm of the merged map is at most the product of the norms, and so is each of its bounds: a
    row or column of a matrix that grows by at most a factor lets its norm grow by no more. Matrices
    that follow each other become one where that is not larger than both.
    """
    new: dict[Signal, Signal] = {}
    for signal in in_order(output):
        parents = tuple(new[parent] for parent in signal.parents)
        step = signal.step
        if isinstance(step, Affine) and isinstance(parents[0].step, Affine):
            operator = merge(step.operator, parents[0].step.operator, len(parents[0].shape))
            if operator is not None:
                step, parents = Affine(operator), parents[0].parents
        unchanged = step is signal.step and parents == signal.parents
        new[signal] = signal if unchanged else replace(signal, step=step, parents=parents)
    return new[output]


class Bounding:
    """Lipschitz bounds of an output and of all that it arises from.

    Args:
        output: the signal to bound.
        join: whether neighbours are also bounded together, see the module's text.
        scales: positive factors ``(channels,)`` of signals: the bound of such a signal is that of
            the signal with each channel divided by its factor (`certify.balancing`).
    """

    def __init__(
        self,
        output: Signal,
        *,
        join: bool = False,
        scales: Mapping[Signal, Tensor] | None = None,
    ) -> None:
        self.output = output
        self.order = in_order(output)
        self._join = join
        self._scales = dict(scales or {})
        self._operators: dict[Signal, Operator] = {}
        self._composed: dict[tuple[Operator, ...], Operator | None] = {}
        self._sums: dict[Signal, _Joined | None] = {}

    def operator(self, signal: Signal) -> Operator:
        """The operator of an affine step, between the scales of its input and its output."""
        if signal not in self._operators:
            assert isinstance(signal.step, Affine)
            operator = signal.step.operator
            outputs, inputs = self._scales.get(signal), self._scales.get(signal.parents[0])
            if outputs is not None or inputs is not None:
                operator = balanced(operator, outputs, inputs)
            self._operators[signal] = operator
        return self._operators[signal]

    def layers(self) -> list[Signal]:
        """The affine steps that are matrices or convolutions, in the order of execution."""
        return [
            signal
            for signal in self.order
            if isinstance(signal.step, Affine) and not isinstance(signal.step.operator, Scale)
        ]

    def operators(self) -> list[Operator]:
        """All matrices and convolutions that the bounds measure, each once, in order."""
        found: dict[Operator, None] = {}

        def note(operator: Operator) -> Tensor:
            found.setdefault(operator)
            return torch.ones((), dtype=torch.float64)

        self.evaluate(note)
        if isinstance(self.output.step, Affine):
            self.last(self.evaluate(note), note, note)
        return list(found)

    def evaluate(self, norms: Norms) -> dict[Signal, Tensor]:
        """Return the bound of each signal, as float64 scalars.

        Args:
            norms: measures the operators.
        """
        reach: dict[Signal, Tensor] | None = None
        if any(isinstance(signal.step, Product) for signal in self.order):
            reach = self._carried(norms, None)
        return self._carried(norms, reach)

    def _carried(self, norms: Norms, reach: dict[Signal, Tensor] | None) -> dict[Signal, Tensor]:
        """Carry Lipschitz bounds, or (without ``reach``) how far signals get from their centres.

        Both obey the same inequalities but for products: if ``|f(x) - f(y)| <= L |x - y|`` follows
        from the steps, it does so for the centre of the domain in place of ``y``.
        """
        values: dict[Signal, Tensor] = {}
        for signal in self.order:
            if isinstance(signal.step, Product):
                values[signal] = product_value(signal, values, reach)
            elif isinstance(signal.step, Input):
                start = 1.0 if reach is not None or signal.step.domain is None else radius(signal)
                device = signal.step.device
                values[signal] = torch.tensor(start, dtype=torch.float64, device=device)
            else:
                values[signal] = self._value(signal, values, norms)
        return values

    def last(self, values: Mapping[Signal, Tensor], norms: Norms, measure: Measure) -> Tensor:
        """Bound the output, an affine step, as in `evaluate` but with another measure of it.

        Args:
            values: as `evaluate` returns them.
            norms: what they were measured by.
            measure: of the output's operator, or a composition that ends in it: any function that
                is a norm of ``B A`` whenever ``|| . ||`` is one of ``A``.
        """
        return self._through(
            self.operator(self.output), self.output.parents[0], values, norms, measure
        )

    def _value(self, signal: Signal, values: dict[Signal, Tensor], norms: Norms) -> Tensor:
        step, parents = signal.step, signal.parents
        bounds = [values[parent] for parent in parents]
        if isinstance(step, Affine):
            operator = self.operator(signal)
            if isinstance(operator, Scale):
                return product_bound(bounds[0], operator.bound())
            return self._through(operator, parents[0], values, norms, norms)
        if isinstance(step, Slopes):
            return _times(bounds[0], step.steepest)
        if isinstance(step, Lipschitz):
            return _times(bounds[0], step.constant)
        if isinstance(step, Flatten):
            return bounds[0]
        if isinstance(step, Concatenation):
            return root_of_squares(bounds)
        assert isinstance(step, Sum)
        plain = _added(bounds)
        joined = self._joined(signal) if self._join else None
        if joined is None:
            return plain
        return torch.minimum(plain, joined.bound(values, norms))

    def _through(
        self,
        operator: Operator,
        source: Signal,
        values: Mapping[Signal, Tensor],
        norms: Norms,
        measure: Measure,
    ) -> Tensor:
        """Bound ``operator`` applied to ``source``."""
        bound = product_bound(values[source], measure(operator))
        if not self._join:
            return bound
        expansion = self._expand(operator, source)
        while expansion is not None:
            product, middle, earlier, center, spread = expansion
            joint = _times(product_bound(values[earlier], measure(product)), abs(center))
            if spread > 0:
                rest = _times(product_bound(values[middle], measure(operator)), spread)
                joint = sum_bound(joint, rest)
            bound = torch.minimum(bound, joint)
            # Affine maps that follow each other directly can be composed further.
            expansion = self._expand(product, earlier) if spread == 0 and center == 1 else None
            operator = product
        return bound

    def _expand(
        self, operator: Operator, source: Signal
    ) -> tuple[Operator, Signal, Signal, float, float] | None:
        """Compose ``operator`` with the affine step before ``source``, over slopes between them.

        Returns:
            ``(product, middle, earlier, m, r)``: the composition, the signal after the earlier
            affine step, the one before it, and the slopes ``m +- r`` between them.
        """
        middle = source.parents[0] if isinstance(source.step, Slopes) else source
        if not isinstance(middle.step, Affine):
            return None
        before = self.operator(middle)
        if isinstance(before, Scale):
            return None
        low, high = 1.0, 1.0
        if isinstance(source.step, Slopes):
            low, high = source.step.low, source.step.high
        if masks(operator, before):
            low, high = min(low, 0.0), max(high, 0.0)
        key = (operator, before)
        if key not in self._composed:
            self._composed[key] = compose(operator, before)
        product = self._composed[key]
        if product is None:
            return None
        center = (low + high) / 2.0
        spread = max(high - center, center - low)
        if low != high:
            spread = math.nextafter(spread, math.inf)
        return product, middle, middle.parents[0], center, spread

    def _joined(self, signal: Signal) -> _Joined | None:
        if signal not in self._sums:
            self._sums[signal] = self._join_branches(signal.parents)
        return self._sums[signal]

    def _join_branches(self, parents: Sequence[Signal]) -> _Joined | None:
        """Expand branches down to the first tensor that another branch comes from too."""
        branches = [self._expansions(parent) for parent in parents]
        result = _Joined()
        for index, (parent, states) in enumerate(zip(parents, branches, strict=True)):
            others = {
                state.start
                for other, found in enumerate(branches)
                if other != index
                for state in found
            }
            chosen = next((state for state in states if state.start in others), None)
            if chosen is None:
                result.alone.append(parent)
            else:
                result.terms.setdefault(chosen.start, []).append((chosen.operator, chosen.factor))
                result.rests += chosen.rests
        return result if result.close() else None

    def _expansions(self, branch: Signal) -> list[_Expanded]:
        """A branch as it is, and expanded once, twice, ... over slopes."""
        if not isinstance(branch.step, Affine) or isinstance(self.operator(branch), Scale):
            return [_Expanded(branch, None, 1.0, ())]
        states = [_Expanded(branch.parents[0], self.operator(branch), 1.0, ())]
        while len(states) <= _MOST_EXPANSIONS:
            last = states[-1]
            assert last.operator is not None
            expansion = self._expand(last.operator, last.start)
            if expansion is None:
                break
            product, middle, start, center, spread = expansion
            rests = (*last.rests, (last.operator, middle, last.factor * spread))
            states.append(_Expanded(start, product, last.factor * center, rests))
        return states


_MOST_EXPANSIONS = 3


class _Expanded(NamedTuple):
    """``factor * operator`` (``None``: the identity) applied to ``start``, and remainders."""

    start: Signal
    operator: Operator | None
    factor: float
    rests: tuple[tuple[Operator, Signal, float], ...]


class _Joined:
    """``sum of ||joint operator|| Lip(source) + remainders`` of a sum of branches."""

    def __init__(self) -> None:
        self.terms: dict[Signal, list[tuple[Operator | None, float]]] = {}
        self.rests: list[tuple[Operator, Signal, float]] = []
        self.alone: list[Signal] = []
        self.joint: list[tuple[Signal, Operator]] = []

    def close(self) -> bool:
        """Form the joint operators; false if there is nothing to join."""
        for source, terms in self.terms.items():
            like = next((operator for operator, _ in terms if operator is not None), None)
            if len(terms) == 1 or not isinstance(like, (Matrix, Convolution)):
                for operator, factor in terms:
                    if operator is not None or factor != 1.0:
                        return False
                    self.alone.append(source)
                continue
            channels = like.inputs if isinstance(like, Convolution) else like.weight.shape[1]
            total: Operator | None = None
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

    def bound(self, values: Mapping[Signal, Tensor], norms: Norms) -> Tensor:
        """Add up."""
        parts = [values[signal] for signal in self.alone]
        parts += [product_bound(values[source], norms(operator)) for source, operator in self.joint]
        parts += [
            _times(product_bound(values[middle], norms(operator)), abs(factor) * (1 + 2**-48))
            for operator, middle, factor in self.rests
            if factor != 0
        ]
        return _added(parts)


def root_of_squares(bounds: Sequence[Tensor]) -> Tensor:
    """Proven upper bound of ``sqrt(sum of squares)``, without overflow or underflow."""
    largest = torch.stack(list(bounds)).amax()
    if bool(largest.detach() == 0) or not bool(largest.detach().isfinite()):
        return largest
    total = sum(((bound / largest) ** 2 for bound in bounds), largest.new_zeros(()))
    return product_bound(largest, round_up(total.sqrt(), 2 * len(bounds) + 3) + 2.0**-500)


def _times(bound: Tensor, constant: float | Tensor) -> Tensor:
    if isinstance(constant, float) and constant == 1.0:
        return bound
    factor = torch.as_tensor(constant, dtype=bound.dtype, device=bound.device)
    return product_bound(bound, factor)


def _added(bounds: Sequence[Tensor]) -> Tensor:
    total = bounds[0]
    for bound in bounds[1:]:
        total = sum_bound(total, bound)
    return total
