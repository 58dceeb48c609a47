"""Bounds of second derivatives as training sees them: estimated, with a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from certify.curvature import SecondOrder
from certify.graph import LipschitzGraph
from certify.head import cut_before_head
from certify.norms import NetworkEstimate, NetworkEstimator
from certify.operators import Convolution, Matrix, Weighted
from certify.signal import Input
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
        kept = self._vectors[call] = self._vectors[call].to(factors)
        vectors = kept
        with torch.no_grad():
            for _ in range(iterations):
                image = pull(push(vectors) * factors.square())
                alive = image.flatten(1).norm(dim=1) > 0
                vectors = torch.where(alive.reshape(-1, *[1] * len(shape)), _unit(image), vectors)
            kept.copy_(vectors)  # in its place, for a step that is replayed
        gains: Tensor = (push(vectors) * factors).flatten(1).norm(dim=1)
        return gains.to(torch.float64)

    def get_extra_state(self) -> list[Tensor]:
        """The vectors, for a checkpoint."""
        return list(self._vectors)

    def set_extra_state(self, state: list[Tensor]) -> None:
        """Take over the vectors of a checkpoint."""
        self._vectors = [vectors.clone() for vectors in state]


@dataclass(frozen=True)
class HeadEstimate:
    """Estimates for the smooth part of a network and for what is before it.

    Attributes:
        curvature: ``K (C, C)`` of the smooth part.
        scale: Lipschitz constant of what is before it.
        lipschitz: of the whole network, as the product of both.
    """

    curvature: Tensor
    scale: Tensor
    lipschitz: Tensor


class HeadEstimator(nn.Module):
    """Follow the smooth part of a network through training: its curvature, and what is before it.

    **Not a bound.** See `certify.head` and `CurvatureEstimator`.

    Args:
        model: the module being trained.
        input_shape: shape of one sample.
        seed: of the random start.
        method: of the norms, see `certify.norms.NetworkEstimator`.

    Attributes:
        backbone: from inputs to features, with the model's own layers; ``None`` where the whole
            network is smooth.
        head: from features to logits, likewise.

    Raises:
        UnsupportedModel: there is no smooth activation behind all that is not smooth.
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        seed: int = 0,
        method: str = "fantastic_four",
    ) -> None:
        super().__init__()
        graph = LipschitzGraph(model, input_shape)
        cut = cut_before_head(graph.walk())
        self._curvature = CurvatureEstimator(seed)
        self.backbone: nn.Module | None = None
        self.head = model
        if not isinstance(cut.step, Input):
            self.backbone, self.head = graph.split(cut.node)
            self._before = NetworkEstimator(self.backbone, input_shape, seed, method, 0)
            self._behind = NetworkEstimator(self.head, cut.shape[1:], seed, method, 0)

    def forward(self, whole: NetworkEstimate | None, iterations: int = 1) -> HeadEstimate:
        """Estimate the norms of the model's current weights.

        Args:
            whole: estimate of the whole network; only a network without a backbone needs it.
            iterations: steps of power iteration.
        """
        if self.backbone is None:
            assert whole is not None
            one = torch.ones((), dtype=torch.float64, device=whole.layers.device)
            return HeadEstimate(self._curvature(whole, iterations), one, whole.lipschitz())
        behind = self._behind(iterations)
        scale = self._before(iterations).lipschitz()
        curvature = self._curvature(behind, iterations)
        return HeadEstimate(curvature, scale, scale * behind.lipschitz())

    def get_extra_state(self) -> dict[str, Any]:
        """What a checkpoint has to hold: no parameters, which are the model's."""
        state: dict[str, Any] = {"curvature": self._curvature.get_extra_state()}
        if self.backbone is not None:
            state["before"] = self._before.state_dict()
            state["behind"] = self._behind.state_dict()
        return state

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        self._curvature.set_extra_state(state["curvature"])
        if self.backbone is not None:
            self._before.load_state_dict(state["before"])
            self._behind.load_state_dict(state["behind"])


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
