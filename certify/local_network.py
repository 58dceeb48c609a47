"""What local bounds need of a network, once for all inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from certify.bounding import in_order
from certify.joining import times
from certify.linear_maps import TINY, LinearMap, linear_map, norms
from certify.operators import Scale
from certify.signal import (
    Affine,
    Concatenation,
    Flatten,
    Input,
    Lipschitz,
    Signal,
    Slopes,
    Sum,
    UnsupportedModel,
)
from certify.tightening import NetworkBound
from ff_bounds.rounding import UNIT_ROUNDOFF, gamma, product_bound, round_up


class LocalNetwork:
    """What local bounds need of a network, once for all inputs.

    Args:
        bound: its global bounds, without scales between its layers.
    """

    def __init__(self, bound: NetworkBound) -> None:
        self.bounding = bound.bounding
        self.order = in_order(self.bounding.output)
        if sum(isinstance(signal.step, Input) for signal in self.order) != 1:
            raise UnsupportedModel("local bounds take a network with one input")
        self.place = {signal: index for index, signal in enumerate(self.order)}
        self.norms: dict[Signal, Tensor] = {}
        self.maps: dict[Signal, LinearMap] = {}
        for signal in self.order:
            if isinstance(signal.step, Affine):
                operator = self.bounding.operator(signal)
                norm = operator.bound() if isinstance(operator, Scale) else bound.norms(operator)
                self.norms[signal] = norm
                found = linear_map(operator, signal.parents[0].shape[1:], signal.shape[1:])
                if found is not None:
                    self.maps[signal] = found
        self.entries = self._largest_rows()
        self.first, self.root, self.lift = self._first_layer()
        self.values = self._lifted(bound.values)

    def activations(self) -> list[Signal]:
        """The activations for which it matters where in a ball their arguments lie."""
        return [s for s in self.order if isinstance(s.step, Slopes) and s.step.breaks]

    def _largest_rows(self) -> int:
        """Entries of the largest tensor of rows for one sample."""
        classes = self.bounding.output.shape[1]
        sizes = [classes * math.prod(signal.shape[1:]) for signal in self.order]
        for signal in self.maps:
            if len(signal.shape) == 2 and isinstance(signal.parents[0].step, Slopes):
                sizes.append(signal.shape[1] * math.prod(signal.parents[0].shape[1:]))
        return max(sizes)

    def _lifted(self, values: Mapping[Signal, Tensor]) -> Mapping[Signal, Tensor]:
        """Bounds of the network with the further inputs of `_first_layer`: ``Lip + e P``.

        ``P`` is the plain bound of a signal as a function of the first layer's result.
        """
        if self.first is None or not bool(self.lift > 0):
            return values
        behind: dict[Signal, Tensor] = {}
        lifted = dict(values)
        for signal in self.order:
            if signal is self.first:
                behind[signal] = torch.ones_like(self.lift)
            elif signal.parents and all(parent in behind for parent in signal.parents):
                slopes = signal.step.steepest if isinstance(signal.step, Slopes) else 0.0
                norm = self.norms.get(signal, torch.full_like(self.lift, slopes))
                behind[signal] = plain_value(signal, [behind[p] for p in signal.parents], norm)
            if signal in behind:
                lifted[signal] = round_up(values[signal] + self.lift * behind[signal], 2)
        return lifted

    def _first_layer(self) -> tuple[Signal | None, Tensor, Tensor]:
        r"""The first matrix if nothing but reshaping and scaling is before it, and a root of it.

        A root ``L`` with ``L L^T = J J^T + E``, ``E >= 0``, for the Jacobian ``J`` of the layer,
        may stand for it: the network is then taken to have further inputs ``w`` that enter
        the layer by ``E^(1/2) w``. It has ``[J, E^(1/2)] = L C``, the rows of ``C`` orthonormal, so
        that norms of rows and their inner products are those of ``L``. Bounds of this network at
        ``w = 0`` hold for the given one. ``L`` is small where the input is large.

        Returns:
            The layer or ``None``, ``L``, and a bound of ``||E||^(1/2)``.
        """
        nothing = None, torch.zeros(()), torch.zeros(())
        before: list[Signal] = []
        for signal in self.order:
            before.append(signal)
            step = signal.step
            if isinstance(step, Affine) and not isinstance(step.operator, Scale):
                if len(signal.shape) != 2 or signal not in self.maps:
                    return nothing
                break
            if not isinstance(step, (Input, Flatten, Affine)):
                return nothing
        else:
            return nothing
        children = [parent for signal in self.order for parent in signal.parents]
        if any(children.count(signal) > 1 for signal in before[:-1]) or any(
            s.parents != ((before[i],) if i >= 0 else ()) for i, s in enumerate(before, -1)
        ):
            return nothing
        rows = torch.eye(before[-1].shape[1], dtype=torch.float64).to(
            self.bounding.output.input.device
        )
        error = torch.zeros_like(rows[0, 0])  # of the rows so far, at the tensor where they are
        for signal in reversed(before):
            if isinstance(signal.step, Affine):
                size = norms(rows, rows.ndim)
                rows = self.maps[signal].pull(rows)
                passed = product_bound(error, self.norms[signal])
                error = round_up(passed + self.maps[signal].charge * size, 3)
            elif isinstance(signal.step, Flatten):
                rows = rows.reshape(-1, *signal.parents[0].shape[1:])
        found = _root(rows.flatten(1), error)
        return nothing if found is None else (before[-1], *found)


def _root(rows: Tensor, error: Tensor) -> tuple[Tensor, Tensor] | None:
    """``L`` with ``L L^T = J J^T + E``, ``E >= 0``, for each ``J`` within ``error`` of the rows.

    Returns:
        ``L`` and a bound of ``||E||^(1/2)``; ``None`` if that is not proven.
    """
    size = norms(rows, 2)
    count = rows.shape[0]
    gram = rows @ rows.mT
    off = round_up(gamma(rows.shape[1] + 2) * size.square() + (2.0 * size + error) * error, 6)
    lift = 16.0 * (count + 4) * UNIT_ROUNDOFF * size.square() + 2.0 * off + TINY
    lifted = 0.5 * (gram + gram.mT) + lift * torch.eye(count, dtype=gram.dtype).to(gram)
    root = torch.linalg.cholesky_ex(lifted)[0].tril()
    residual = torch.linalg.matrix_norm(root @ root.mT - gram - lift * torch.eye(count).to(gram))
    rounding = gamma(count + 4) * (norms(root, 2).square() + size.square() + count * lift)
    # E is the lift, up to what is compared with it here: it lies between zero and twice the lift.
    proven = bool(2.0 * (residual + rounding) + off <= lift)
    return (root, round_up((2.0 * lift).sqrt(), 2)) if proven else None


def plain_value(signal: Signal, bounds: list[Tensor], factor: Tensor) -> Tensor:
    """Lipschitz bound of a signal from those of its parents, one or one for each sample.

    Args:
        signal: whose step is not `Input`.
        bounds: of its parents.
        factor: norm of an affine step, largest slope of an activation; else of no meaning.
    """
    step = signal.step
    if isinstance(step, (Affine, Slopes)):
        return product_bound(bounds[0], factor)
    if isinstance(step, Lipschitz):
        return times(bounds[0], step.constant)
    if isinstance(step, Flatten):
        return bounds[0]
    if isinstance(step, Concatenation):
        return norms(torch.stack(bounds, dim=-1), 1)
    if isinstance(step, Sum):
        return round_up(torch.stack(bounds).sum(dim=0), len(bounds))
    return torch.full_like(bounds[0], torch.inf)
