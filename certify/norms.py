"""The norms of a network's operators: proven ones for certificates, estimates for training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from certify.graph import LipschitzGraph
from certify.operators import Convolution, Matrix, Operator
from certify.signal import Norms, Signal, UnsupportedModel
from ff_bounds import PowerIterationPenalty, conv2d_bound, supremum_bounds
from ff_bounds.rounding import product_bound, round_up


def proven_norms(method: str, expected: Sequence[Operator] = ()) -> Norms:
    """Measure operators by their proven bounds, convolutions by this ``method``.

    Args:
        method: as in `ff_bounds.conv2d_bound`.
        expected: what will be measured, as `collect_operators` returns it. With ``"supremum"`` the
            kernels of equal shape among them are searched together, at once; an operator that
            turns out to be another is measured by itself.

    Raises:
        ValueError: an unknown method.
    """
    conv2d_bound(torch.ones(1, 1, 1, 1), method=method)  # also where there is no convolution
    searched = method == "supremum"
    convolutions = [o for o in expected if searched and isinstance(o, Convolution)]
    kernels = [convolution.exact_kernel() for convolution in convolutions]
    known = list(zip(kernels, supremum_bounds(kernels), strict=True))

    def measure(operator: Operator) -> Tensor:
        if known and isinstance(operator, Convolution):
            kernel = operator.exact_kernel()
            for index, (candidate, bound) in enumerate(known):
                if kernel.shape == candidate.shape and torch.equal(kernel, candidate):
                    del known[index]
                    return operator.bound(method, lattice=bound)
        return operator.bound(method)

    return measure


def collect_operators(graph: LipschitzGraph) -> list[Operator]:
    """All operators of a graph, in the order in which a walk measures them."""
    operators: list[Operator] = []

    def collect(operator: Operator) -> None:
        operators.append(operator)

    _ = graph.walk(collect).lipschitz  # the last operator is measured only when asked for
    return operators


def margin_lipschitz(logits: Signal) -> Tensor:
    r"""Bounds ``K[i, j]`` of the Lipschitz constants of ``logit_i - logit_j``.

    If the last operation is linear with rows ``w_i``, the difference is ``(w_i - w_j)^T features``
    plus a constant, so ``K[i, j] = Lip(features) ||w_i - w_j||``. Otherwise
    ``|(a_i - a_j) - (b_i - b_j)| <= sqrt(2) ||a - b||`` gives ``sqrt(2) Lip(logits)``.

    Args:
        logits: output of the walk, of shape ``(batch, classes)``.

    Returns:
        ``(classes, classes)`` float64, symmetric, zero on the diagonal.
    """
    if isinstance(logits.operator, Matrix):
        return product_bound(logits.source, logits.operator.row_difference_bound())
    classes = logits.shape[1]
    lipschitz = round_up(logits.lipschitz * 2.0**0.5, 2)
    same = torch.eye(classes, dtype=torch.bool, device=lipschitz.device)
    return torch.where(same, 0.0, lipschitz)


@dataclass(frozen=True)
class NetworkEstimate:
    """Training-time estimates of a network's norms. Not bounds; differentiable.

    Attributes:
        layers: ``(layers,)`` estimated norms of the affine layers, in order of execution.
    """

    layers: Tensor
    _logits: Callable[[], Signal]

    def lipschitz(self) -> Tensor:
        """Estimate the Lipschitz constant of the network."""
        return self._logits().lipschitz

    def margin_lipschitz(self) -> Tensor:
        """Estimate `margin_lipschitz`."""
        return margin_lipschitz(self._logits())


class NetworkEstimator(nn.Module):
    """Follow the norms of a network through training, one power iteration a call.

    The rules are the same as for certificates; only the norm of each operator is replaced by the
    estimate of `ff_bounds.PowerIterationPenalty`. A first walk collects the operators, all norms
    are estimated together, and a second walk, made only where it is asked for, combines them.

    Args:
        model: the module being trained; its current parameters are used at each call.
        input_shape: shape of one sample.
        seed: seed of the power iteration's start.

    Raises:
        UnsupportedModel: a model that cannot be certified cannot be trained for it either.
    """

    def __init__(self, model: nn.Module, input_shape: tuple[int, ...], seed: int = 0) -> None:
        super().__init__()
        self._graph = LipschitzGraph(model, input_shape)
        with torch.no_grad():
            shapes = [tuple(operator.kernel().shape) for operator in self._operators()]
        if not shapes:
            raise UnsupportedModel("no convolution or linear layer to estimate the norm of")
        self._penalty = PowerIterationPenalty(shapes, seed).to(self._graph.device)

    def forward(self, iterations: int = 1) -> NetworkEstimate:
        """Estimate the norms of the model's current weights.

        Args:
            iterations: steps of power iteration; more than one only before the first update.
        """
        operators = self._operators()
        norms = self._penalty([operator.kernel() for operator in operators], iterations)
        gains = [operator.gain() for operator in operators]
        if any(gain != 1.0 for gain in gains):
            norms = norms * torch.tensor(gains, dtype=norms.dtype, device=norms.device)

        def logits() -> Signal:
            remaining = iter(norms.to(torch.float64))
            return self._graph.walk(lambda operator: next(remaining))

        return NetworkEstimate(norms, logits)

    def _operators(self) -> list[Operator]:
        """All operators, in the order in which a walk measures them."""
        return collect_operators(self._graph)
