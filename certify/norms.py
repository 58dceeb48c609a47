"""The norms of a network's operators: proven ones for certificates, estimates for training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from certify.bounding import Bounding, Norms, merged
from certify.graph import LipschitzGraph
from certify.hashes import hash_of_tensors
from certify.operators import Convolution, Matrix, Weighted
from certify.ranks import ALONE, Ranks
from certify.signal import Affine, Signal, UnsupportedModel
from ff_bounds import PowerIterationPenalty, SupremumPenalty, conv2d_bound, supremum_bounds
from ff_bounds.rounding import round_up


def check_method(method: str) -> None:
    """Refuse an unknown name of a bound, with a ``ValueError`` that lists the known ones."""
    conv2d_bound(torch.ones(1, 1, 1, 1), method=method)


class Prove(Protocol):
    """How the norms of operators are proven; see `proven_norms`."""

    def __call__(
        self, operators: Sequence[Weighted], method: str, *, any_size: bool = False
    ) -> Norms:
        """Return what maps each of the operators to a bound of its norm."""


def proven_norms(
    operators: Sequence[Weighted], method: str, *, any_size: bool = False, ranks: Ranks = ALONE
) -> Norms:
    """Prove bounds of the norms of all operators.

    Args:
        operators: what will be measured.
        method: how convolutions are bounded, see `ff_bounds.conv_bound`. With ``"supremum"``
            kernels of equal shape are searched together.
        any_size: whether the norms have to hold beyond the layers' own inputs.
        ranks: processes that share the operators; each gets all bounds.

    Raises:
        ValueError: an unknown method, or NaN or infinite weights.
    """
    check_method(method)
    together: dict[object, list[Weighted]] = {}
    for operator in dict.fromkeys(operators):
        key = _shape_searched(operator) if method == "supremum" else operator
        together.setdefault(key, []).append(operator)
    # The largest first, so that processes have about as much to do.
    groups = sorted(together.values(), key=lambda group: -sum(o.weight.numel() for o in group))
    if ranks.count > 1:  # or one's bounds would be taken for another's
        ranks.agree(hash_of_tensors(o.effective_weight() for o in operators), "weights")
    found = [_bounds(group, method, any_size) for group in ranks.share(groups)]
    if ranks.count > 1:
        found = [[bound.detach().cpu() for bound in bounds] for bounds in found]
    bound_of: dict[Weighted, Tensor] = {}
    for group, bounds in zip(groups, ranks.joined(found), strict=True):
        for operator, bound in zip(group, bounds, strict=True):
            bound_of[operator] = bound.to(operator.weight.device)
    return bound_of.__getitem__


def _shape_searched(operator: Weighted) -> object:
    """What those have in common that one search is for; itself if it is alone."""
    if not isinstance(operator, Convolution) or operator.padding_mode == "circular":
        return operator
    return operator.exact_kernel().shape


def _bounds(operators: Sequence[Weighted], method: str, any_size: bool) -> list[Tensor]:
    """Bounds of operators, by one search where there is one."""
    finite = [o for o in operators if bool(o.effective_weight().detach().isfinite().all())]
    lattice: dict[Weighted, Tensor] = {}
    searched = [o for o in finite if _shape_searched(o) is not o]
    if method == "supremum" and searched:
        kernels = [o.exact_kernel() for o in searched if isinstance(o, Convolution)]
        lattice = dict(zip(searched, supremum_bounds(kernels), strict=True))
    return [
        operator.bound(method, lattice=lattice.get(operator), any_size=any_size)
        if operator in finite
        else torch.full_like(operator.norm_error(), torch.inf)  # merged factors that overflow
        for operator in operators
    ]


def margin_lipschitz(bounding: Bounding, values: Mapping[Signal, Tensor], norms: Norms) -> Tensor:
    r"""Bounds ``K[i, j]`` of the Lipschitz constants of ``logit_i - logit_j``.

    If the last operation is linear with rows ``w_i``, the difference is ``(w_i - w_j)^T features``
    plus a constant, so ``K[i, j] = Lip(features) ||w_i - w_j||``. Otherwise
    ``|(a_i - a_j) - (b_i - b_j)| <= sqrt(2) ||a - b||`` gives ``sqrt(2) Lip(logits)``.

    Args:
        bounding: of the logits, of shape ``(batch, classes)``.
        values: its bounds.
        norms: what they were measured by.

    Returns:
        ``(classes, classes)`` float64, symmetric, zero on the diagonal.
    """
    step = bounding.output.step
    if isinstance(step, Affine) and isinstance(step.operator, Matrix):
        return bounding.measured(bounding.output, values, norms, _row_differences)
    lipschitz = values[bounding.output]
    classes = bounding.output.shape[1]
    lipschitz = round_up(lipschitz * 2.0**0.5, 2)
    same = torch.eye(classes, dtype=torch.bool, device=lipschitz.device)
    return torch.where(same, 0.0, lipschitz)


def _row_differences(operator: Weighted) -> Tensor:
    assert isinstance(operator, Matrix)
    return operator.row_difference_bound()


@dataclass(frozen=True)
class NetworkEstimate:
    """Training-time estimates of a network's norms. Not bounds; differentiable.

    Attributes:
        layers: ``(layers,)`` estimated norms of the affine layers, in order of execution.
        bounding: the network.
        norms: the estimate of each of its operators.
    """

    layers: Tensor
    bounding: Bounding
    norms: Norms

    @cached_property
    def values(self) -> dict[Signal, Tensor]:
        """Estimated Lipschitz constant of each tensor."""
        return self.bounding.evaluate(self.norms)

    def lipschitz(self) -> Tensor:
        """Estimate the Lipschitz constant of the network."""
        return self.values[self.bounding.output]

    def margin_lipschitz(self) -> Tensor:
        """Estimate `margin_lipschitz`."""
        return margin_lipschitz(self.bounding, self.values, self.norms)


PENALTIES: dict[str, type[PowerIterationPenalty | SupremumPenalty]] = {
    "fantastic_four": PowerIterationPenalty,
    "supremum": SupremumPenalty,
}
"""What follows the bounds of a method through training."""


class NetworkEstimator(nn.Module):
    """Follow the norms of a network through training, one power iteration a call.

    The rules are the same as for certificates; only the norm of each operator is replaced by an
    estimate.

    Args:
        model: the module being trained; its current parameters are used at each call.
        input_shape: shape of one sample.
        seed: seed of the power iteration's start.
        method: a key of `PENALTIES`.
        warm_up: iterations from the random start.

    Raises:
        UnsupportedModel: a model that cannot be certified cannot be trained for it either.

    Example:
        >>> from certify import margin_loss
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> estimator = NetworkEstimator(model, (4,))
        >>> x, labels = torch.rand(5, 4), torch.arange(5) % 3
        >>> bounds = estimator().margin_lipschitz()  # once a step, of the current weights
        >>> margin_loss(model(x), labels, bounds, epsilon=0.5).backward()
    """

    def __init__(
        self,
        model: nn.Module,
        input_shape: tuple[int, ...],
        seed: int = 0,
        method: str = "fantastic_four",
        warm_up: int = 30,
    ) -> None:
        super().__init__()
        self._method = method
        self._graph = LipschitzGraph(model, input_shape)
        with torch.no_grad():
            operators = self._bounding().operators()
            shapes = [tuple(kernel.shape) for kernel in self._kernels(operators)]
        if not shapes:
            raise UnsupportedModel("no convolution or linear layer to estimate the norm of")
        self._penalty = PENALTIES[method](shapes, seed).to(self._graph.device)
        if warm_up:
            with torch.no_grad():
                self(warm_up)

    def forward(self, iterations: int = 1) -> NetworkEstimate:
        """Estimate the norms of the model's current weights.

        Args:
            iterations: steps of power iteration.
        """
        bounding = self._bounding()
        operators = bounding.operators()
        norms: Tensor = self._penalty(self._kernels(operators), iterations)
        gains = [operator.gain() for operator in operators]
        if any(gain != 1.0 for gain in gains):  # as numbers: a device would wait for a tensor
            norms = torch.stack([norm * gain for norm, gain in zip(norms, gains, strict=True)])
        known = dict(zip(operators, norms.to(torch.float64), strict=True))
        # A layer that is used twice is one operator a use.
        return NetworkEstimate(norms, bounding, known.__getitem__)

    def _bounding(self) -> Bounding:
        return Bounding(merged(self._graph.walk()))

    def _kernels(self, operators: Sequence[Weighted]) -> list[Tensor]:
        if self._method == "fantastic_four":
            return [operator.kernel() for operator in operators]
        return [
            operator.exact_kernel() if isinstance(operator, Convolution) else operator.kernel()
            for operator in operators
        ]
