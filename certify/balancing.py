r"""Factors of channels, chosen so that the product of the norms becomes small.

The Lipschitz constant of ``A2 f A1`` is that of ``(A2 S) (S^-1 f S) (S^-1 A1)`` for every diagonal
matrix ``S`` of positive factors, one for each channel, but the product of the norms is not. Where
``f`` is a function of each entry by itself, with difference quotients in ``[l, h]``, so is
``S^-1 f S``; pooling by channel commutes with ``S``. So the constants of all these stay what they
are, and only the norms of the matrices and convolutions change. Branches that are added share their
factors. Whatever mixes channels in another way keeps factors of one, and so do the input and the
output.

The factors are found by descent on estimated norms, and mean nothing until the norms of the scaled
operators are proven.

References:
    M. Fazlyab et al., Efficient and Accurate Estimation of Lipschitz Constants for Deep Neural
    Networks, NeurIPS 2019 (diagonal multipliers, of which these are a cheap form).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from certify.bounding import Bounding, in_order
from certify.operators import Convolution, Matrix, Scale
from certify.signal import Affine, Concatenation, Flatten, Input, Lipschitz, Signal, Slopes, Sum

_LARGEST = 40.0  # of the logarithm of a factor
_GRID = 8  # points an axis on which the norms of convolutions are estimated


@dataclass
class _Part:
    """Channels whose factors are free: a representative in a union-find forest.

    Attributes:
        size: number of channels.
        parent: another part that it shares its factors with.
        fixed: whether the factors have to be one.
    """

    size: int
    parent: _Part | None = None
    fixed: bool = False

    def root(self) -> _Part:
        part = self
        while part.parent is not None:
            part = part.parent
        return part


_Layout = tuple[tuple[_Part, int], ...]
"""Factors of a signal's channels: parts side by side, each entry repeated so many times."""


def scale_layouts(output: Signal) -> dict[Signal, _Layout]:
    """Find which channels may have factors of their own, and which have to share them."""
    layouts: dict[Signal, _Layout] = {}
    for signal in in_order(output):
        layouts[signal] = _layout(signal, [layouts[parent] for parent in signal.parents])
    _fix(layouts[output])
    return layouts


def free_parts(layouts: Mapping[Signal, _Layout]) -> list[_Part]:
    """Return the parts whose factors may be chosen."""
    roots = (part.root() for layout in layouts.values() for part, _ in layout)
    return list({id(root): root for root in roots if not root.fixed}.values())


def _layout(signal: Signal, before: list[_Layout]) -> _Layout:
    step = signal.step
    channels = signal.shape[1] if len(signal.shape) > 1 else 1
    if isinstance(step, Affine):
        operator = step.operator
        if isinstance(operator, Scale):
            return before[0]
        if isinstance(operator, Convolution):
            return ((_Part(operator.outputs), 1),)
        if len(signal.shape) == 2:
            return ((_Part(operator.weight.shape[0]), 1),)
    elif isinstance(step, Slopes) or (isinstance(step, Lipschitz) and step.channelwise):
        return before[0]
    elif isinstance(step, Flatten):
        positions = math.prod(signal.parents[0].shape[2:])
        return tuple((part, repeats * positions) for part, repeats in before[0])
    elif isinstance(step, Concatenation) and step.channels:
        return tuple(piece for layout in before for piece in layout)
    elif isinstance(step, Sum):
        first = before[0]
        if all(_sizes(layout) == _sizes(first) for layout in before):
            for layout in before[1:]:
                for (one, _), (other, _) in zip(first, layout, strict=True):
                    _unite(one.root(), other.root())
            return first
    for layout in before:
        _fix(layout)
    return ((_Part(channels, fixed=True), 1),)


def _sizes(layout: _Layout) -> list[tuple[int, int]]:
    return [(part.size, repeats) for part, repeats in layout]


def _unite(one: _Part, other: _Part) -> None:
    if one is not other:
        other.parent = one
        one.fixed = one.fixed or other.fixed


def _fix(layout: _Layout) -> None:
    for part, _ in layout:
        part.root().fixed = True


def balancing_scales(
    output: Signal, *, steps: int = 150, rate: float = 0.05
) -> dict[Signal, Tensor]:
    """Choose factors of channels that make the product of the norms small.

    Args:
        output: the network, as `certify.bounding.merged` returns it.
        steps: of descent (Adam on the logarithms), a power iteration each.
        rate: its step size at the start; it falls to zero along a cosine.

    Returns:
        Positive float64 factors ``(channels,)`` of signals, for `Bounding`; empty if there is
        nothing to choose.
    """
    layouts = scale_layouts(output)
    free = free_parts(layouts)
    if not free:
        return {}
    light = _in_single_precision(output)
    images = dict(zip(in_order(output), in_order(light), strict=True))
    device = next(s.step.device for s in layouts if isinstance(s.step, Input))
    logs = {id(part): torch.zeros(part.size, device=device, requires_grad=True) for part in free}
    optimizer = torch.optim.Adam(logs.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    estimator: _Estimator | None = None
    with torch.enable_grad():
        for _ in range(steps):
            scales = {
                images[signal]: factors for signal, factors in signal_scales(layouts, logs).items()
            }
            bounding = Bounding(light, scales=scales)
            operators = bounding.operators()
            kernels = [operator.kernel() for operator in operators]
            if estimator is None:
                estimator = _Estimator([kernel.detach() for kernel in kernels])
            norms = estimator(kernels)
            known = dict(zip(operators, norms, strict=True))
            loss = bounding.evaluate(known.__getitem__)[light].log()
            if not bool(loss.isfinite()):
                return {}
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for log in logs.values():
                    log.clamp_(-_LARGEST, _LARGEST)
    found = {key: log.detach().to(torch.float64) for key, log in logs.items()}
    return signal_scales(layouts, found)


def signal_scales(
    layouts: Mapping[Signal, _Layout], logs: Mapping[int, Tensor]
) -> dict[Signal, Tensor]:
    """Factors of all signals that have a free part."""
    scales = {}
    some = next(iter(logs.values()))
    factors = {key: log.exp() for key, log in logs.items()}
    for signal, layout in layouts.items():
        roots = [(part.root(), repeats) for part, repeats in layout]
        if all(root.fixed for root, _ in roots):
            continue
        pieces = [
            (some.new_ones(root.size) if root.fixed else factors[id(root)]).repeat_interleave(
                repeats
            )
            for root, repeats in roots
        ]
        scales[signal] = torch.cat(pieces)
    return scales


class _Estimator:
    """Estimates of the norms of unit-stride kernels, a step of power iteration a call.

    Convolutions are applied on a small periodic grid. A little noise keeps the iteration from
    staying with a direction that is no longer the largest.
    """

    def __init__(self, kernels: Sequence[Tensor]) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._vectors = []
        for kernel in kernels:
            groups, _, inputs, *taps = kernel.shape
            grid = [1 if size == 1 else max(_GRID, size) for size in taps]
            self._vectors.append(self._noise((1, groups * inputs, *grid), kernel))

    def __call__(self, kernels: Sequence[Tensor]) -> list[Tensor]:
        return [self._step(index, kernel) for index, kernel in enumerate(kernels)]

    def _step(self, index: int, kernel: Tensor) -> Tensor:
        weight, groups = kernel.flatten(0, 1), kernel.shape[0]
        pads = [amount for size in reversed(kernel.shape[3:]) for amount in (size - 1, 0)]

        def apply(x: Tensor, weight: Tensor) -> Tensor:
            return F.conv2d(F.pad(x, pads, mode="circular"), weight, groups=groups)

        right = self._vectors[index]
        right = _unit(right + 0.03 * self._noise(tuple(right.shape), right)).requires_grad_()
        image = apply(right, weight.detach())
        left = _unit(image.detach())
        (back,) = torch.autograd.grad(image, right, left)
        self._vectors[index] = _unit(back)
        return (apply(self._vectors[index], weight) * left).sum().to(torch.float64)

    def _noise(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return _unit(torch.randn(shape, generator=self._generator)).to(like)


def _unit(vector: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(vector)
    return vector / length.clamp_min(1e-30)


def _in_single_precision(output: Signal) -> Signal:
    """The same steps with float32 weights, for estimates."""
    new: dict[Signal, Signal] = {}
    for signal in in_order(output):
        step = signal.step
        if isinstance(step, Affine) and isinstance(step.operator, (Matrix, Convolution)):
            weight = step.operator.effective_weight().detach().float()
            step = Affine(
                replace(step.operator, weight=weight, rows=None, columns=None, error=None)
            )
        parents = tuple(new[parent] for parent in signal.parents)
        new[signal] = replace(signal, step=step, parents=parents)
    return new[output]
