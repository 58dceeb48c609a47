r"""How far the gradients that a smooth network computes are from its true ones.

Let ``g_t`` be the true gradient of a difference of two logits by a tensor ``t`` of the network, and
``g^_t`` what autograd computes in float64, backwards from the logits, where both are the same. For
an operation from ``s`` to ``t`` two bounds are carried, ``|g_s|`` and ``e_s >= |g^_s - g_s|``:

* an affine one with matrix ``A``: ``g_s = A^T g_t``. What is computed is a sum of products, off by
  ``c || |A| || |g^_t|`` with ``c`` about ``gamma_{k+16}`` for ``k`` terms. So ``|A| e_t`` and that.
* a function of each entry with slopes up to ``L`` that change by at most ``C`` times the change of
  their argument: the slope is computed where the forward pass got to, off by ``C e`` where that is
  off by ``e`` (`certify.forward_error`), and rounds. Assumed of the libraries, as in
  `certify.rules.rounding`: an entry is off by at most 32 units of ``1 + L + (L + C) |x|``. So
  ``L e_t + d |g^_t|`` with ``d`` the sum of both, and the rounding of the product.
* where several operations use ``s``, the gradients are added, with rounding.

Units are taken twice where it is simpler.

References:
    N. J. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., 2002, chapter 3.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from certify.forward_error import ForwardError
from certify.nodes import Operation
from certify.operators import Matrix, Scale, Weighted
from certify.precision import PRECISIONS, Precision
from certify.rules.rounding import absolute_norm
from certify.signal import (
    Affine,
    Concatenation,
    Flatten,
    Input,
    Lipschitz,
    Signal,
    Slopes,
    Sum,
    UnknownRounding,
    Wrapping,
)
from ff_bounds.rounding import product_bound, round_up, sum_bound

_UNITS = 32.0
"""Of the slopes that libraries compute."""

_LOST = 2.0**-900
"""More than what a step can lose to underflow, relative to what it is applied to or absolutely."""

_LARGEST_GRADIENT, _LARGEST_WEIGHTS, _LARGEST_ARGUMENT = 2.0**400, 2.0**50, 2.0**40
"""Below these nothing overflows, and what underflows is as small as that."""


@dataclass(frozen=True)
class _Path:
    """A matrix, from a source of an operation to a tensor.

    Attributes:
        norm: bound of its norm.
        absolute: likewise with absolute entries.
        terms: products and sums for each entry of a gradient.
    """

    norm: Tensor
    absolute: Tensor
    terms: int

    def after(self, other: _Path) -> _Path:
        """The product with one that is applied first."""
        absolute = product_bound(self.absolute, other.absolute)
        return _Path(product_bound(self.norm, other.norm), absolute, self.terms + other.terms)

    def beside(self, other: _Path) -> _Path:
        """The sum."""
        absolute = sum_bound(self.absolute, other.absolute)
        return _Path(sum_bound(self.norm, other.norm), absolute, self.terms + other.terms + 1)


@dataclass(frozen=True)
class _Link:
    """From a tensor back to one that it is computed from.

    Attributes:
        result, source: both.
        bend: the function of each entry, or ``None`` for an affine operation.
        norm: Lipschitz constant.
        rounding: of an affine operation's adjoint, relative to what it is applied to.
    """

    result: Signal
    source: Signal
    bend: Slopes | None
    norm: Tensor
    rounding: Tensor


class GradientError:
    """Bounds of the rounding of values and gradients of a smooth network in float64.

    Args:
        forward: of its values.
        precision: another arithmetic, to be compared with this one.

    Raises:
        UnknownRounding: an operation of which it is not known how much its gradient can round.
    """

    def __init__(self, forward: ForwardError, precision: Precision = PRECISIONS["float64"]) -> None:
        self._forward = forward
        self._precision = precision
        self._uses = Counter(s for o in forward.operations.values() for s in set(o.sources))
        for operation in forward.operations.values():
            self._check(operation)

    def bounds(self, x: Tensor, radius: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Bound errors of float64 passes at all points of balls.

        Args:
            x: ``(N, *input_shape)`` float64, the centres.
            radius: ``(N,)``.
            classes: ``(N,)``.

        Returns:
            ``(N, C)`` for ``logit[class] - logit[j]``, and ``(N,)`` L2 for the gradient of any
            difference of two logits.
        """
        _, there = self._forward.walked(x, radius, self._precision)
        values = self._forward.margins((there,), classes)
        gradients = self._backwards(there.carried, there.computed)
        return _or_infinite(values), _or_infinite(gradients)

    def _backwards(self, errors: Mapping[Signal, Tensor], sizes: Mapping[Signal, Tensor]) -> Tensor:
        """Error ``(N,)`` of the gradient by the input."""
        output = self._forward.output
        zero = torch.zeros_like(errors[output])
        size = {output: zero + 2.0**0.5 * (1.0 + 2.0**-50)}
        off = {output: zero}
        for link in self._links:
            if link.result not in size:  # a part that is not used
                continue
            true, error = size[link.result], off[link.result]
            rounding = link.rounding
            if link.bend is not None:
                rounding = self._of_slopes(link.bend, errors[link.source], sizes[link.source])
            added = product_bound(rounding + _LOST, sum_bound(true, error)) + _LOST
            part = sum_bound(product_bound(link.norm, error), added)
            if link.source is link.result:  # as where a constant is added
                off[link.source] = part
                continue
            whole = product_bound(link.norm, true)
            if link.source in size:  # the sum of both is rounded
                whole = sum_bound(size[link.source], whole)
                part = sum_bound(off[link.source], part)
                part = sum_bound(part, 4.0 * self._precision.unit * (whole + part))
            size[link.source], off[link.source] = whole, part
        (found,) = (off[signal] for signal in off if isinstance(signal.step, Input))
        largest = torch.stack([*size.values(), *off.values()]).amax(dim=0)
        return torch.where(largest < _LARGEST_GRADIENT, round_up(found, 2), torch.inf)

    @cached_property
    def _links(self) -> list[_Link]:
        """Those of all operations, from the last one to the first."""
        links = []
        for operation in reversed(self._forward.operations.values()):
            sources = self._sources(operation)
            for _, result in operation.results:
                if isinstance(result.step, Input):
                    continue
                if _bends(result, sources):
                    assert isinstance(result.step, Slopes)
                    steepest = self._number(result.step.steepest)
                    links.append(_Link(result, result.parents[0], result.step, steepest, steepest))
                    continue
                for source, path in self._paths(result, sources).items():
                    terms = path.terms + 2 * (_entries(source) + _entries(result))
                    rounding = round_up(self._precision.products(terms + 16) * path.absolute, 4)
                    rounding = torch.where(path.absolute < _LARGEST_WEIGHTS, rounding, torch.inf)
                    links.append(_Link(result, source, None, path.norm, rounding))
        return links

    def _paths(self, signal: Signal, sources: Mapping[Signal, None]) -> dict[Signal, _Path]:
        """The affine map from each of an operation's sources to one of its tensors."""
        one = self._number(1.0)
        if signal in sources:
            return {signal: _Path(one, one, 0)}
        if signal.origin is not None:
            return self._paths(signal.origin, sources)
        own = self._of_step(signal)
        found: dict[Signal, _Path] = {}
        for parent in signal.parents:
            for source, path in self._paths(parent, sources).items():
                path = own.after(path)
                found[source] = found[source].beside(path) if source in found else path
        return found

    def _of_step(self, signal: Signal) -> _Path:
        """An affine step."""
        step, one = signal.step, self._number(1.0)
        if isinstance(step, Flatten | Sum | Concatenation):
            return _Path(one, one, len(signal.parents))
        if isinstance(step, Slopes):  # a straight line
            steepest = self._number(step.steepest)
            return _Path(steepest, steepest, 1)
        if isinstance(step, Lipschitz):
            constant = one * step.constant
            # With absolute entries a matrix is longer by the root of its number of columns at most.
            longer = round_up(constant * math.sqrt(_entries(signal.parents[0])), 2)
            return _Path(constant, longer, 0)
        assert isinstance(step, Affine)
        operator = step.operator
        if isinstance(operator, Scale):
            return _Path(operator.bound(), operator.bound(), 8)
        return _Path(
            self._forward.norms(operator), absolute_norm(operator), _terms_of_adjoint(operator)
        )

    def _sources(self, operation: Operation) -> dict[Signal, None]:
        """What enters an operation; a convolution may take what circular padding got.

        Its matrix is then that with the padding, which adds the gradients of copies.
        """
        found = dict.fromkeys(operation.sources)
        for signal in operation.sources:
            if isinstance(signal.step, Wrapping) and self._uses[signal] == 1:
                found[signal.parents[0]] = None
        return found

    def _check(self, operation: Operation) -> None:
        """Refuse an operation whose gradient is not known to be computed as the text says."""
        sources = self._sources(operation)
        for _, result in operation.results:
            if isinstance(result.step, Input) or _bends(result, sources):
                known = True
            else:
                known = _is_affine(result, sources, result)
            if not (known and operation.is_torchs):
                raise UnknownRounding(
                    f"{operation}: it is not known how much its gradient can round"
                )

    def _of_slopes(self, step: Slopes, error: Tensor, size: Tensor) -> Tensor:
        """Error of computed slopes at arguments that are off, with that of the product."""
        curvature = max(abs(end) for end in step.curvature or (math.inf,))
        steepest = step.steepest
        units = _UNITS * self._precision.unit
        own = units * (1.0 + steepest + (steepest + curvature) * size)
        slopes = sum_bound(round_up(curvature * error, 2), round_up(own, 8))
        found = sum_bound(slopes, 2.0 * self._precision.unit * (slopes + steepest))
        return torch.where(size < _LARGEST_ARGUMENT, found, torch.inf)

    def _number(self, value: float) -> Tensor:
        device = self._forward.output.input.device
        return torch.full((), value, dtype=torch.float64, device=device)


def _bends(result: Signal, sources: Mapping[Signal, None]) -> bool:
    """Whether it is a smooth function of each entry of a source."""
    step = result.step
    if not isinstance(step, Slopes) or result.origin is not None or result in sources:
        return False
    return step.curvature is not None and step.low != step.high and result.parents[0] in sources


def _is_affine(
    signal: Signal, sources: Mapping[Signal, None], result: Signal, added: bool = True
) -> bool:
    """Whether it arises from sources by steps that `GradientError` knows as matrices.

    Args:
        signal: a tensor in an operation.
        sources: of the operation.
        result: of it.
        added: whether between them is nothing but sums and factors.
    """
    if signal in sources:
        return True
    if signal.origin is not None:
        return _is_affine(signal.origin, sources, result, added)
    step = signal.step
    if isinstance(step, Lipschitz):  # one step, or the repetition of what is added
        alone = signal is result or (added and isinstance(result.step, Sum))
        return step.linear and alone and signal.parents[0] in sources
    factor = isinstance(step, Affine) and isinstance(step.operator, Scale)
    added = added and (factor or isinstance(step, Sum))
    if isinstance(step, Slopes) and step.low != step.high:
        return False
    known = isinstance(step, Affine | Flatten | Sum | Concatenation | Slopes)
    return known and all(_is_affine(parent, sources, result, added) for parent in signal.parents)


def _terms_of_adjoint(operator: Weighted) -> int:
    """How many products are added in an entry of a gradient at most, and copies in padding."""
    if isinstance(operator, Matrix):
        return operator.weight.shape[0]
    outputs = operator.weight.shape[1] if operator.adjoint else operator.weight.shape[0]
    return math.prod(operator.weight.shape[2:]) * outputs + operator.repeats


def _entries(signal: Signal) -> int:
    """Of one sample; of a tensor of the network."""
    return math.prod(signal.shape[1:])


def _or_infinite(bound: Tensor) -> Tensor:
    return bound.nan_to_num(nan=math.inf, posinf=math.inf)
