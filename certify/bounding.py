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

import torch
from torch import Tensor

from certify.composition import balanced, compose, masks, merge
from certify.joining import MOST_EXPANSIONS, Expanded, Joined, added, root_of_squares, times
from certify.operators import Operator, Scale, Weighted
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
from ff_bounds.rounding import product_bound, sum_bound

Norms = Callable[[Weighted], Tensor]
"""How the norm of a matrix or convolution is measured: proven, or estimated in training."""


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
        step, name = signal.step, signal.name
        if isinstance(step, Affine) and isinstance(parents[0].step, Affine):
            operator = merge(step.operator, parents[0].step.operator, len(parents[0].shape))
            if operator is not None:
                name = f"{parents[0].name} + {name}"
                step, parents = Affine(operator), parents[0].parents
        unchanged = step is signal.step and parents == signal.parents
        new[signal] = (
            signal if unchanged else replace(signal, step=step, parents=parents, name=name)
        )
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
        self.join = join
        self._scales = dict(scales or {})
        self._operators: dict[Signal, Operator] = {}
        self._composed: dict[tuple[Weighted, Weighted], Weighted | None] = {}
        self._sums: dict[Signal, Joined | None] = {}

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

    def operators(self) -> list[Weighted]:
        """All matrices and convolutions that the bounds measure, each once, in order."""
        found: dict[Weighted, None] = {}

        def note(operator: Weighted) -> Tensor:
            found.setdefault(operator)
            return torch.ones((), dtype=torch.float64)

        self.evaluate(note)
        return list(found)

    def evaluate(self, norms: Norms) -> dict[Signal, Tensor]:
        """Return the bound of each signal, as float64 scalars.

        Args:
            norms: measures the operators.
        """
        products = any(isinstance(signal.step, Product) for signal in self.order)
        return self._carried(norms, self._carried(norms, None) if products else {})

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
                start = 1.0 if reach is not None else radius(signal)
                device = signal.step.device
                values[signal] = torch.full((), start, dtype=torch.float64, device=device)
            else:
                values[signal] = self.value(signal, values, norms)
        return values

    def measured(
        self, signal: Signal, values: Mapping[Signal, Tensor], norms: Norms, measure: Norms
    ) -> Tensor:
        """Bound an affine step's signal, as in `evaluate` but with another measure of it.

        Args:
            signal: whose operator is a matrix or convolution.
            values: as `evaluate` returns them.
            norms: what they were measured by.
            measure: of the signal's operator, or a composition that ends in it: bounds of
                ``||V A||`` for some matrices ``V``, as `Matrix.row_difference_bound`; what
                `evaluate` says of norms holds for each of these.
        """
        operator = self.operator(signal)
        assert not isinstance(operator, Scale)
        return self._through(operator, signal.parents[0], values, norms, measure)

    def value(self, signal: Signal, values: Mapping[Signal, Tensor], norms: Norms) -> Tensor:
        """Bound a signal by what is known of its parents; not for products."""
        step, parents = signal.step, signal.parents
        bounds = [values[parent] for parent in parents]
        if isinstance(step, Affine):
            operator = self.operator(signal)
            if isinstance(operator, Scale):
                return product_bound(bounds[0], operator.bound())
            return self._through(operator, parents[0], values, norms, norms)
        if isinstance(step, Slopes):
            return times(bounds[0], step.steepest)
        if isinstance(step, Lipschitz):
            return times(bounds[0], step.constant)
        if isinstance(step, Flatten):
            return bounds[0]
        if isinstance(step, Concatenation):
            return root_of_squares(bounds)
        assert isinstance(step, Sum)
        plain = added(bounds)
        joined = self._joined(signal) if self.join else None
        if joined is None:
            return plain
        return torch.minimum(plain, joined.bound(values, norms, self.operator))

    def _through(
        self,
        operator: Weighted,
        source: Signal,
        values: Mapping[Signal, Tensor],
        norms: Norms,
        measure: Norms,
    ) -> Tensor:
        """Bound ``operator`` applied to ``source``."""
        bound = product_bound(values[source], measure(operator))
        if not self.join:
            return bound
        expansion = self._expand(operator, source)
        while expansion is not None:
            product, middle, earlier, center, spread = expansion
            joint = times(product_bound(values[earlier], measure(product)), abs(center))
            if spread > 0:
                rest = times(product_bound(values[middle], measure(operator)), spread)
                joint = sum_bound(joint, rest)
            bound = torch.minimum(bound, joint)
            # Affine maps that follow each other directly can be composed further.
            expansion = self._expand(product, earlier) if spread == 0 and center == 1 else None
            operator = product
        return bound

    def _expand(
        self, operator: Weighted, source: Signal
    ) -> tuple[Weighted, Signal, Signal, float, float] | None:
        """Compose ``operator`` with the affine step before ``source``, over slopes between them.

        Returns:
            ``(product, middle, earlier, m, r)``: the composition, the signal after the earlier
            affine step, the one before it, and the slopes ``m +- r`` between them.
        """
        middle, low, high = source, 1.0, 1.0
        if isinstance(middle.step, Flatten):
            middle = middle.parents[0]
        if isinstance(middle.step, Slopes):
            low, high = middle.step.low, middle.step.high
            middle = middle.parents[0]
        if isinstance(middle.step, Flatten):
            middle = middle.parents[0]
        if not isinstance(middle.step, Affine):
            return None
        before = self.operator(middle)
        if isinstance(before, Scale):
            return None
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

    def _joined(self, signal: Signal) -> Joined | None:
        if signal not in self._sums:
            self._sums[signal] = self._join_branches(signal.parents)
        return self._sums[signal]

    def _join_branches(self, parents: Sequence[Signal]) -> Joined | None:
        """Expand branches down to the first tensor that another branch comes from too."""
        branches = [self._expansions(parent) for parent in parents]
        result = Joined()
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

    def _expansions(self, branch: Signal) -> list[Expanded]:
        """A branch as it is, and expanded once, twice, ... over slopes."""
        operator = self.operator(branch) if isinstance(branch.step, Affine) else None
        if operator is None or isinstance(operator, Scale):
            return [Expanded(branch, None, 1.0, ())]
        states = [Expanded(branch.parents[0], operator, 1.0, ())]
        while len(states) <= MOST_EXPANSIONS:
            last = states[-1]
            assert last.operator is not None
            expansion = self._expand(last.operator, last.start)
            if expansion is None:
                break
            product, middle, start, center, spread = expansion
            rests = (*last.rests, (last.operator, middle, last.factor * spread))
            states.append(Expanded(start, product, last.factor * center, rests))
        return states
