"""Bounds of second derivatives as training sees them: estimated, with a gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from certify.curvature import SecondOrder
from certify.norms import NetworkEstimate
from certify.operators import Convolution, Matrix, Weighted
from ff_bounds.padding import padding_amounts


class CurvatureEstimator(nn.Module):
    """Follow the curvature bounds of a network through training, by power iteration.

    **Not a bound.** The formulas are those of `certify.curvature`; the norm of a layer with
    weighted rows is the gain of a unit vector for each pair of classes, which a step of power
    iteration improves at each call, so that it is at most the norm.

    Args:
        seed: of the random start.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._vectors: list[Tensor] = []

    def forward(self, estimate: NetworkEstimate, iterations: int = 1) -> Tensor:
        """Estimate ``K (C, C)`` for the weights behind an estimate of the norms; float64.

        Raises:
            UnsupportedModel: an activation without a bounded second derivative.
        """
        calls = iter(range(1000))
        second = SecondOrder(estimate.bounding, estimate.norms, estimate.values)

        def weighted(operator: Weighted, factors: Tensor) -> Tensor:
            return self._gains(operator, factors.to(operator.weight.dtype), next(calls), iterations)

        return second.curvature(weighted)

    def _gains(self, operator: Weighted, factors: Tensor, call: int, iterations: int) -> Tensor:
        """Estimate norms ``(k,)`` of ``diag(factors) A``."""
        push, pull, shape = _actions(operator)
        factors = factors.reshape(*factors.shape, *[1] * (len(shape) - 1))
        if call == len(self._vectors):
            start = torch.randn(len(factors), *shape, generator=self._generator)
            self._vectors.append(_unit(start.to(factors)))
        vectors = self._vectors[call]
        with torch.no_grad():
            for _ in range(iterations):
                image = pull(push(vectors) * factors.square())
                alive = image.flatten(1).norm(dim=1) > 0
                vectors = torch.where(alive.reshape(-1, *[1] * len(shape)), _unit(image), vectors)
            self._vectors[call] = vectors
        gains: Tensor = (push(vectors) * factors).flatten(1).norm(dim=1)
        return gains.to(torch.float64)

    def get_extra_state(self) -> list[Tensor]:
        """The vectors, for a checkpoint."""
        return list(self._vectors)

    def set_extra_state(self, state: list[Tensor]) -> None:
        """Take over the vectors of a checkpoint."""
        self._vectors = list(state)


Action = Callable[[Tensor], Tensor]


def _actions(operator: Weighted) -> tuple[Action, Action, tuple[int, ...]]:
    """The operator on batches, its adjoint, and the shape of what it is applied to."""
    weight = operator.effective_weight()
    if isinstance(operator, Matrix):
        return (lambda x: x @ weight.mT), (lambda x: x @ weight), (weight.shape[1],)
    return _convolution(operator, weight)


def _convolution(operator: Convolution, weight: Tensor) -> tuple[Action, Action, tuple[int, ...]]:
    """A convolution with zero padding, or a transposed one."""
    axes = weight.ndim - 2
    amounts = padding_amounts(
        operator.padding, tuple(weight.shape[2:]), operator.stride, operator.dilation
    )
    padding = [max(pair) for pair in amounts]
    options = (operator.stride, padding, operator.dilation, operator.adjoint, [0] * axes)
    shape = (operator.inputs, *(operator.input_size or [4 * taps for taps in weight.shape[2:]]))

    def push(x: Tensor) -> Tensor:
        result: Tensor = torch.ops.aten.convolution(x, weight, None, *options, operator.groups)
        return result

    def pull(y: Tensor) -> Tensor:
        with torch.enable_grad():
            x = y.new_zeros(len(y), *shape).requires_grad_()
            gradient: Tensor
            (gradient,) = torch.autograd.grad(push(x), x, y)
        return gradient

    return push, pull, shape


def _unit(vectors: Tensor) -> Tensor:
    length: Tensor = vectors.flatten(1).norm(dim=1).reshape(-1, *[1] * (vectors.ndim - 1))
    return vectors / length.clamp_min(torch.finfo(vectors.dtype).tiny)
