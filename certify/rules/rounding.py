r"""How much each kind of operation can round.

A rounding rule bounds, for one sample each, how far the result that a machine computes is from the
exact result on the same arguments, in L2. What it knows is a `Call`. The rules assume what
`certify.precision.Precision` says, and of functions such as softplus (`of_library`) that each entry
is off by at most 32 units of ``|y| + L |x| + 1``, which is far more than what the libraries that
compute them claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from certify.operators import Convolution, Matrix, Scale, Weighted
from certify.precision import Precision
from certify.signal import Affine, Signal, Slopes, UnknownRounding
from ff_bounds import spectral_norm_bound
from ff_bounds.padding import padded_bound
from ff_bounds.rounding import round_up


@dataclass(frozen=True)
class Call:
    """An operation on a batch of samples.

    Attributes:
        precision: what it is computed in.
        module: that does it, or ``None`` for a function or a method.
        arguments, options: as it is called with; tensors that depend on the input are those of the
            float64 pass, at the samples.
        signal: its result, as the Lipschitz rules see it.
        entering: ``(N,)``, bounds of the L2 norm of what it really gets, all arguments together.
        leaving: ``(N,)``, of the exact result on that. Rules may grow by at most half of what it
            does.
        lipschitz: of the operation, a float64 scalar.
        entries: of its arguments and its result, for one sample.
        fixed: tensors among the arguments that do not depend on the input.
        repeats: how much longer an argument can become by being broadcast.
    """

    precision: Precision
    module: nn.Module | None
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    signal: Signal
    entering: Tensor
    leaving: Tensor
    lipschitz: Tensor
    entries: tuple[int, int]
    fixed: tuple[Tensor, ...] = ()
    repeats: float = 1.0

    def underflow(self, operations: int = 1) -> Tensor:
        """L2 norm of what so many operations for each entry of the result lose to underflow.

        Arguments can be flushed to zero as well, which the operation enlarges.
        """
        lost = 2.0 * operations * self.precision.smallest
        entries = math.sqrt(self.entries[1]) + math.sqrt(self.entries[0])
        return round_up(lost * entries * (1.0 + self.lipschitz + self.entering), 6)

    @property
    def constants(self) -> list[Tensor]:
        """Numbers and tensors among the arguments that do not depend on the input, and weights.

        Those of a module are all that it has.
        """
        module = self.module
        own = [*module.parameters(False), *module.buffers(False)] if module else []
        kept = list(vars(module).values()) if module else []
        leaves = pytree.tree_leaves((self.arguments, self.options, kept))
        numbers = [leaf for leaf in leaves if isinstance(leaf, int | float)]
        found = [torch.tensor(_float(number), dtype=torch.float64) for number in numbers]
        tensors = [*self.fixed, *own]
        return [*found, *(t.to(torch.float64) for t in tensors if t.is_floating_point())]

    def within(self, smallest: float, largest: float) -> Tensor:
        """Whether all constants are zero, infinite, or of a size between two numbers."""
        result = torch.ones((), dtype=torch.bool, device=self.leaving.device)
        for constant in self.constants:
            result = result & _is_within(constant, smallest, largest).to(result.device)
        return result


def _float(number: int | float) -> float:
    """A number, or the largest of its sign."""
    try:
        return float(number)
    except OverflowError:
        return math.copysign(torch.finfo(torch.float64).max, number)


def _is_within(constant: Tensor, smallest: float, largest: float) -> Tensor:
    """Whether all entries are zero, infinite, or of a size between two numbers."""
    size = constant.abs()
    return (((size >= smallest) & (size <= largest)) | (size == 0) | size.isinf()).all()


Rounding = Callable[[Call], Tensor]
"""A rounding rule; returns ``(N,)``."""


def exact(call: Call) -> Tensor:
    """Entries are moved, compared or dropped."""
    return torch.zeros_like(call.leaving) + call.underflow(1)


def elementwise(call: Call) -> Tensor:
    """Up to four additions, multiplications and divisions, by constants too, which are rounded.

    What is multiplied before an addition is at most ``L`` times what enters, and a constant that is
    added that more than what leaves. It must not be so small or large that it, or its reciprocal,
    underflows.
    """
    steps = call.precision.gamma(6)
    entering = call.repeats * call.entering * (1.0 + 2.0 * call.lipschitz)
    found = steps * (call.leaving + entering)
    found = round_up(found, 4) + call.underflow(4)
    return torch.where(_all_moderate(call), found, torch.inf)


def filled(call: Call) -> Tensor:
    """Entries stay, or become a constant, which is rounded unless it is a number of float32."""
    found = exact(call)
    for constant in call.constants:
        exactly = constant.to(torch.float32).to(torch.float64) == constant
        off = torch.where(exactly & (call.precision.unit <= 2.0**-24), 0.0, constant.abs())
        largest = off.amax().to(found.device) if off.numel() else 0.0
        found = found + 2.0 * call.precision.unit * largest * math.sqrt(call.entries[1])
    return round_up(found, 8)


def multiplied(call: Call) -> Tensor:
    """One multiplication or division, by constants too, which are rounded, or inverted first."""
    found = round_up(call.precision.gamma(6) * call.leaving, 4) + call.underflow(4)
    return torch.where(_all_moderate(call), found, torch.inf)


def _all_moderate(call: Call) -> Tensor:
    """Whether constants are zero, infinite, or such that they and their reciprocals are normal."""
    smallest = 4.0 * call.precision.smallest
    return call.within(smallest, 1.0 / smallest)


def piecewise(call: Call) -> Tensor:
    """As `elementwise`, between breaks that are rounded as well."""
    step = call.signal.step
    breaks = step.breaks if isinstance(step, Slopes) else ()
    farthest = max((abs(place) for place in breaks), default=0.0)
    moved = 2.0 * call.precision.unit * farthest * math.sqrt(call.entries[1])
    return round_up(elementwise(call) + moved * (1.0 + call.lipschitz), 4)


_LARGEST = 2.0**40
"""Of the constants of a library's functions, and of their reciprocals."""


def of_library(call: Call) -> Tensor:
    """A function of each entry, from a library: see the module's text."""
    entering = call.lipschitz * call.entering
    sizes = call.leaving + entering + math.sqrt(call.entries[1])
    found = 32.0 * call.precision.sum_unit * sizes
    found = found + 2.0 * call.precision.unit * (call.leaving + entering)
    # A function may divide by a constant, or multiply what has vanished by one.
    found = round_up(found, 8) + _LARGEST * call.underflow(8)
    # Nothing overflows inside, cubes not either.
    fits = call.within(1.0 / _LARGEST, _LARGEST) & _all_moderate(call)
    return torch.where((call.entering < 2.0**40) & fits, found, torch.inf)


def sixths(call: Call) -> Tensor:
    """Times 1/6, which torch rounds to float32 on some devices."""
    return round_up(of_library(call) + 2.0**-24 * call.leaving, 2)


def averages(call: Call) -> Tensor:
    """Sums over windows, times positive constants."""
    if isinstance(call.signal.step, Affine):
        return of_products(call)
    given = call.arguments[0] if call.arguments else call.options["input"]
    return _sums(call, math.prod(given.shape[2:]))


def reductions(call: Call) -> Tensor:
    """Sums and means over axes: each entry is in one of them."""
    return _sums(call, call.entries[0] // max(1, call.entries[1]))


def _sums(call: Call, terms: int) -> Tensor:
    """The map with absolute weights is the map itself."""
    off = call.precision.sums(max(1, terms))
    return round_up(off * call.lipschitz * call.entering, 3) + call.underflow(terms + 4)


def euclidean(call: Call) -> Tensor:
    """Roots of sums of squares; a square that underflows is that of a tiny number."""
    terms = max(1, call.entries[0] // max(1, call.entries[1]))
    tiny = 2.0 * math.sqrt(call.precision.smallest * call.entries[0])
    found = call.precision.sums(terms + 2) * call.leaving + tiny
    fits = call.entering < math.sqrt(call.precision.largest) / 8.0
    return torch.where(fits, round_up(found, 6) + call.underflow(2), torch.inf)


def of_products(call: Call) -> Tensor:
    r"""``W x + b``: an entry is off by ``c (|W| |x| + |b|)`` at most, see `Precision.products`.

    Hence in L2 by ``c (|| |W| || |x| + |b|)``. Underflow takes at most the smallest number from
    each product, and as much from each argument and each weight.
    """
    step = call.signal.step
    if not isinstance(step, Affine):
        raise UnknownRounding("it is not known how much its products can round")
    operator = step.operator
    bias = _bias(call)
    offset: float | Tensor = 0.0
    if bias is not None:
        offset = _size_of(bias, call.entries[1])
    if isinstance(operator, Scale):
        size, terms, weights = operator.bound(), 1, operator.factors.numel()
    else:
        size, terms, weights = absolute_norm(operator), terms_of(operator), operator.weight.numel()
    magnitude = round_up(size * call.entering + offset, 3)
    lost = call.precision.smallest * (1.0 + call.entering + size) * (weights + 2 * terms + 8)
    sums = call.precision.products if isinstance(operator, Matrix) else _sums_of(call, operator)
    found = sums(terms) * magnitude + lost * sum(call.entries)
    fits = (magnitude < call.precision.largest / 8.0) & call.within(0.0, call.precision.largest / 8)
    return torch.where(fits, round_up(found, 8), torch.inf)


def _bias(call: Call) -> Tensor | None:
    """What is added to a matrix product or convolution."""
    if call.module is not None:
        bias = getattr(call.module, "bias", None)
    else:
        bias = call.options.get("bias", call.arguments[2] if len(call.arguments) > 2 else None)
    return bias if isinstance(bias, Tensor) else None


def terms_of(operator: Weighted) -> int:
    """How many products are added in an entry of the result at most."""
    if isinstance(operator, Matrix):
        return operator.weight.shape[1]
    taps = math.prod(operator.weight.shape[2:])
    inputs = operator.weight.shape[0] // operator.groups if operator.adjoint else 0
    return taps * (inputs or operator.weight.shape[1])


def absolute_norm(operator: Weighted) -> Tensor:
    r"""Proven upper bound of the norm of the map with absolute weights.

    Of a convolution on the infinite lattice it is that of the sum of its absolute taps: at every
    frequency an entry of the symbol is at most that in absolute value, and the norm of a matrix is
    at most that of one with larger entries of no other sign.
    """
    if isinstance(operator, Matrix):
        return spectral_norm_bound(operator.effective_weight().abs())
    positive = replace(operator, weight=operator.effective_weight().abs(), rows=None, columns=None)
    assert isinstance(positive, Convolution)
    kernel = positive.exact_kernel().to(torch.float64).flatten(3)
    sums = round_up(kernel.sum(dim=3), kernel.shape[3])
    _, repeats = positive._padding_effect()
    return padded_bound(spectral_norm_bound(sums).amax(), repeats)


def normalisation(call: Call) -> Tensor:
    """``(x - m) a + b`` by channel, or ``a x + (b - a m)``; ``a`` from up to six operations."""
    step, module = call.signal.step, call.module
    assert isinstance(step, Affine)
    assert isinstance(step.operator, Scale)
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given: dict[str, Any] = {}
    if module is None:
        given = dict(zip(("input", *names), call.arguments, strict=False)) | call.options
        mean, bias = given.get("running_mean"), given.get("bias")
        weight = given.get("weight")
    else:
        mean = getattr(module, "running_mean", getattr(module, "mean", None))
        bias, weight = getattr(module, "bias", None), getattr(module, "weight", None)
    largest = step.operator.bound()
    offset = torch.zeros_like(largest)
    for constant, factor in ((mean, largest), (bias, 1.0)):
        if isinstance(constant, Tensor):
            offset = offset + _size_of(constant, call.entries[1]) * factor
    magnitude = round_up(largest * call.entering + offset, 5)
    found = round_up(call.precision.gamma(16) * magnitude, 8) + call.underflow(16)
    # Neither epsilon nor a weight or factor vanishes or overflows in the machine's precision.
    factors = step.operator.factors.abs()
    moderate = ((factors == 0) | ((factors > 2.0**-100) & (factors < 2.0**60))).all()
    variance = given.get("running_var") if module is None else getattr(module, "running_var", None)
    if isinstance(variance, Tensor):
        moderate = moderate & ((variance >= 0) & (variance < 2.0**60)).all()
        epsilon: Any = given.get("eps", 1e-5) if module is None else module.eps
        moderate = moderate & (2.0**-60 < float(epsilon) < 2.0**60)
    for constant, smallest in ((mean, 0.0), (bias, 0.0), (weight, 2.0**-60)):
        if isinstance(constant, Tensor):
            moderate = moderate & _is_within(constant, smallest, 2.0**60)
    fits = magnitude < call.precision.largest / 8.0
    return torch.where(moderate & fits, found, torch.inf)


def logsumexp(call: Call) -> Tensor:
    """``m + log(sum(exp(x - m)))`` with the maximum ``m``, which is at most what enters."""
    terms = max(1, -(-call.entries[0] // max(1, call.entries[1])))
    unit = call.precision.products(terms + 32) + 2.0 * call.precision.unit
    sizes = call.entering + call.leaving + math.sqrt(call.entries[1]) * (1.0 + math.log(terms))
    return round_up(unit * sizes, 6) + call.underflow(terms + 8)


def _sums_of(call: Call, operator: Scale | Weighted) -> Callable[[int], float]:
    """Convolutions of one channel each may be pooling, whose sums are rounded as results are."""
    pools = isinstance(operator, Convolution) and operator.roundings > 0
    return call.precision.sums if pools else call.precision.products


def _size_of(constant: Tensor, entries: int) -> Tensor:
    """Norm of a constant for each channel, repeated to so many entries."""
    repeats = math.sqrt(entries / max(1, constant.numel()))
    return round_up(norms_of(constant.to(torch.float64)[None], 1)[0] * max(1.0, repeats), 4)


def norms_of(values: Tensor, axis: int) -> Tensor:
    """Upper bounds of L2 norms over all axes from one on, whose squares may leave the range."""
    flat = values.reshape(*values.shape[:axis], math.prod(values.shape[axis:]))
    if not flat.shape[-1]:
        return flat.new_zeros(flat.shape[:-1])
    largest = flat.abs().amax(dim=-1, keepdim=True)
    scale = torch.where((largest == 0) | largest.isinf(), 1.0, largest)
    norms = torch.linalg.vector_norm(flat / scale, dim=-1) * scale[..., 0]
    return round_up(norms, flat.shape[-1] + 8) + flat.shape[-1] * 2.0**-1070


def sum_of(sizes: Sequence[Tensor]) -> Tensor:
    """Upper bound of a sum."""
    total = sizes[0]
    for size in sizes[1:]:
        total = round_up(total + size, 1)
    return total


BY_OPERATOR = (of_products, normalisation, averages)
"""Rules that are about the operator of the result's step."""
