r"""Bounds of the second derivatives of all differences of logits, at every input.

The Hessian of ``f = logit_y - logit_t`` is a sum over the activations ``phi_I`` of the network,

    ``Hess f (x) = sum_I J_I^T diag(s_I phi_I'') J_I``,

with the Jacobian ``J_I`` of what enters the activation and the derivative ``s_I`` of ``f`` with
respect to what leaves it (for any graph of affine maps and functions of each entry, by the chain
rule). Let ``n_I >= max(0, -s_I phi_I'')`` hold entry by entry at every input. Then
``Hess f >= -sum_I J_I^T diag(n_I) J_I``, and the norm of a term is at most each of

* ``||diag(n_I)^(1/2) J_I||^2``, where ``J_I`` ends in an affine map ``A`` by
  ``||diag(n_I)^(1/2) A||^2 Lip(what enters A)^2``, or sees the layers before it as well
  (`certify.bounding`); with one hidden layer it is the matrix inequality of Singla, Feizi;
* ``max(n_I) ||J_I||^2``, their bound for deep networks;
* ``||n_I||_2 ||J_I||_(2 to inf) ||J_I||``, as ``sum_j n_j u_j v_j <= ||n|| max|u| ||v||``: what
  the composition rule ``Lip(D(g f)) <= Lip(Dg) Lip(f)^2 + Lip(g) Lip(Df)`` gives, unrolled.

The smallest is taken for each activation. The same with ``max(0, s_I phi_I'')`` bounds the Hessian
from above, which is the bound from below for ``logit_t - logit_y``. Where the gradient has kinks
(ELU), all this is about the difference quotients of the gradient.

References:
    S. Singla, S. Feizi, Second-Order Provable Defenses against Adversarial Attacks, ICML 2020,
    theorems 3 and 4. T. Entesari, S. Sharifi, M. Fazlyab, Compositional Curvature Bounds for Deep
    Neural Networks, ICML 2024, theorem 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.bounding import Bounding, Norms
from certify.linear_maps import LinearMap, linear_map, norms
from certify.norms import proven_norms
from certify.operators import Convolution, Matrix, Scale, Weighted, may_scale, scaled
from certify.sensitivity import Sensitivity, is_twice_differentiable, pulled_back, seeds
from certify.signal import Affine, Signal, Slopes, UnsupportedModel
from certify.tightening import NetworkBound
from ff_bounds.rounding import product_bound, round_up, sum_bound

WeightedNorms = Callable[[Weighted, Tensor], Tensor]
"""From an operator ``A`` and roots ``a (k, channels)`` to norms ``(k,)`` of ``diag(a) A``."""

_LARGEST_BATCH = 2**24
"""Entries of the largest tensor while pairs of classes go back through the network."""

_MOST_PAIRS = 200
"""Ordered pairs of classes up to which each has weighted norms of its own."""


@dataclass(frozen=True)
class _Pulls:
    """What is kept of weights ``n_I (k, *shape)``.

    Attributes:
        largest, norm: ``(k,)`` the largest entries and the L2 norms.
        roots: ``(k, channels)`` roots of the largest entry of each channel, where these are known.
    """

    largest: Tensor
    norm: Tensor
    roots: Tensor | None

    @staticmethod
    def joined(parts: Sequence[_Pulls]) -> _Pulls:
        """All of several."""
        roots = [part.roots for part in parts if part.roots is not None]
        return _Pulls(
            torch.cat([part.largest for part in parts]),
            torch.cat([part.norm for part in parts]),
            torch.cat(roots) if len(roots) == len(parts) else None,
        )


class SecondOrder:
    """The second derivatives of a network's logit differences.

    Args:
        bounding: the network, without scales between its layers.
        norms: of its operators, proven or estimated.
        values: Lipschitz bounds of its tensors, from the same norms.

    Raises:
        UnsupportedModel: an activation without a bounded second derivative.
    """

    def __init__(self, bounding: Bounding, norms: Norms, values: Mapping[Signal, Tensor]) -> None:
        for signal in bounding.order:
            if not is_twice_differentiable(signal):
                raise UnsupportedModel(
                    f"no curvature bound for {signal.name!r}: it is not affine, and no bound of "
                    "its second derivative is known; use softplus, sigmoid, tanh, ELU or GELU"
                )
        self.bounding = bounding
        self._norms = norms
        self._values = values
        self.classes = bounding.output.shape[1]
        if self.classes < 2:
            raise ValueError("expected at least two logits")
        self._maps: dict[Signal, LinearMap] = {}
        self._operator_norms: dict[Signal, Tensor] = {}
        for signal in bounding.order:
            if isinstance(signal.step, Affine):
                operator = bounding.operator(signal)
                self._operator_norms[signal] = (
                    operator.bound() if isinstance(operator, Scale) else norms(operator)
                )
                found = linear_map(operator, signal.parents[0].shape[1:], signal.shape[1:])
                if found is not None:
                    self._maps[signal] = found

    def curvature(self, weighted: WeightedNorms) -> Tensor:
        """Bounds ``K (C, C)``: ``Hess(logit_y - logit_t) >= -K[y, t]`` at every input.

        Args:
            weighted: norms of operators with weighted rows, as ``norms`` measures those without.

        Returns:
            float64, zero on the diagonal. ``K[t, y]`` bounds the same Hessian from above.
        """
        device = self.bounding.output.input.device
        first, second = torch.triu_indices(self.classes, self.classes, 1, device=device)
        largest = max(math.prod(signal.shape[1:]) for signal in self.bounding.order)
        most = max(1, _LARGEST_BATCH // largest)
        activations: dict[Signal, list[tuple[_Pulls, _Pulls]]] = {}
        for y, t in zip(first.split(most), second.split(most), strict=True):
            found = pulled_back(
                self.bounding.order, seeds(y, t, self.classes), self._maps, self._operator_norms
            )
            for signal, sensitivity in found.items():
                down, up = _pulls(signal, sensitivity)
                kept = self._kept(signal, down), self._kept(signal, up)
                activations.setdefault(signal, []).append(kept)
        zero = torch.zeros(len(first), dtype=torch.float64, device=device)
        lower = upper = zero
        for signal, parts in activations.items():
            sides = [part for side in zip(*parts, strict=True) for part in side]
            term = self._term(signal, _Pulls.joined(sides), weighted)
            lower = sum_bound(lower, term[: len(first)])
            upper = sum_bound(upper, term[len(first) :])
        result = zero.new_zeros(self.classes, self.classes)
        result = result.index_put((first, second), lower)
        return result.index_put((second, first), upper)

    def _kept(self, signal: Signal, pull: Tensor) -> _Pulls:
        """What a term needs of weights ``n_I (k, *shape)``, which may be many."""
        before = signal.parents[0]
        flat = pull.flatten(1) if pull.ndim > 1 else pull[:, None]
        operator = self._operator(before)
        known = operator is not None and before.node and pull.ndim > 1
        return _Pulls(
            flat.amax(dim=1),
            norms(flat, 1),
            _by_channel(pull, operator) if operator is not None and known else None,
        )

    def _operator(self, signal: Signal) -> Weighted | None:
        """The matrix or convolution that a signal is the result of."""
        if not isinstance(signal.step, Affine):
            return None
        operator = self.bounding.operator(signal)
        return None if isinstance(operator, Scale) else operator

    def _term(self, signal: Signal, pulls: _Pulls, weighted: WeightedNorms) -> Tensor:
        """Bound one activation's term; ``(k,)``."""
        before = signal.parents[0]
        lipschitz = self._values[before]
        square = product_bound(lipschitz, lipschitz)
        bound = product_bound(torch.minimum(pulls.largest, pulls.norm), square)
        if self._operator(before) is None:
            return bound
        row = self.bounding.measured(before, self._values, self._norms, self._largest_row)
        bound = torch.minimum(bound, product_bound(pulls.norm, product_bound(row, lipschitz)))
        roots = pulls.roots
        if roots is None:
            return bound
        measured = self.bounding.measured(
            before, self._values, self._norms, lambda operator: weighted(operator, roots)
        )
        return torch.minimum(bound, product_bound(measured, measured))

    def _largest_row(self, operator: Weighted) -> Tensor:
        return torch.minimum(largest_row(operator), self._norms(operator))


def _pulls(signal: Signal, found: Sensitivity) -> tuple[Tensor, Tensor]:
    """Bounds of ``max(0, -s phi'')`` and ``max(0, s phi'')``, entry by entry."""
    step = signal.step
    assert isinstance(step, Slopes)
    ends = step.curvature or (0.0, 0.0)
    low, high = found.ends()
    negative, positive = (-low).clamp_min(0.0), high.clamp_min(0.0)
    least, most = -low.new_full((), ends[0]), low.new_full((), ends[1])
    down = torch.maximum(product_bound(negative, most), product_bound(positive, least))
    up = torch.maximum(product_bound(positive, most), product_bound(negative, least))
    return down, up


def _by_channel(pull: Tensor, operator: Weighted) -> Tensor:
    """Roots ``(k, rows)`` of the largest weight that each row can meet."""
    if isinstance(operator, Matrix):
        largest = pull.flatten(1, -2).amax(dim=1) if pull.ndim > 2 else pull
    else:
        largest = pull.flatten(2).amax(dim=2)
    positive = largest > 0
    root = round_up(largest.where(positive, 1.0).sqrt(), 1)
    return root.where(positive, 0.0)


def largest_row(operator: Weighted) -> Tensor:
    """Proven upper bound of the L2 norm of each row of a map, the largest of all."""
    weight = operator.effective_weight().to(torch.float64)
    if isinstance(operator, Convolution):
        if operator.padding_mode != "zeros":
            return torch.full_like(operator.norm_error(), torch.inf)
        if operator.adjoint:
            weight = weight.reshape(operator.groups, -1, *weight.shape[1:])
            weight = weight.transpose(1, 2).flatten(0, 1)
    rows = norms(weight.flatten(1), 1)
    return sum_bound(rows.amax(), operator.norm_error())


def with_rows(operator: Weighted, factors: Tensor) -> Weighted | None:
    """``diag(factors) A``, or ``None`` where that is not safe from underflow."""
    if not may_scale(operator, factors):
        return None
    if isinstance(operator, Convolution) and operator.adjoint:
        return scaled(operator, None, factors, 0)
    return scaled(operator, factors, None, 0)


def proven_weighted_norms(method: str) -> WeightedNorms:
    """Prove norms of operators with weighted rows; ``method`` as in `ff_bounds.conv_bound`."""

    def prove(operator: Weighted, factors: Tensor) -> Tensor:
        if len(factors) > _MOST_PAIRS:
            return prove(operator, factors.amax(dim=0, keepdim=True)).expand(len(factors))
        rows = [with_rows(operator, row) for row in factors]
        bounds = proven_norms([row for row in rows if row is not None], method, any_size=True)
        found = [factors.new_full((), torch.inf) if row is None else bounds(row) for row in rows]
        return torch.stack(found).where(factors.any(dim=1), 0.0)

    return prove


def curvature_bound(bound: NetworkBound, method: str) -> Tensor:
    """Proven bounds ``(C, C)`` of the second derivatives of all differences of logits.

    Claim: ``K[y, t] |u|^2 + u^T Hess(logit_y - logit_t)(x) u >= 0`` for all ``x`` and ``u``, all
    rounding of the bound included.

    Args:
        bound: the network's Lipschitz bounds, without scales between its layers.
        method: how convolutions are bounded, see `ff_bounds.conv_bound`.

    Raises:
        UnsupportedModel: an activation without a bounded second derivative.
    """
    second = SecondOrder(bound.bounding, bound.norms, bound.values)
    return second.curvature(proven_weighted_norms(method))
