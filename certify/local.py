r"""Lipschitz bounds about a point: how much a network changes from its value at ``x`` in a ball.

``f`` has the *local* bound ``K`` on a ball around ``x`` if ``||f(x') - f(x)|| <= K ||x' - x||`` for
all ``x'`` in it. One end is fixed, which is all that a certificate of ``x`` needs and less than
a Lipschitz constant on the ball: from its value at ``x`` each unit moves within a cone
(`certify.cones`) that is narrow where the unit is far from its kink, and a single line where it
cannot reach it.

**Rows.** For rows ``v`` the change of ``v s`` is followed back through the network. At an
activation of ``z`` the centres of the cones go on, ``v m``, and the spreads leave a remainder
``sum_i b_i |dz_i|`` with ``b_i = |v_i| s_i``. Its bound ``rho`` is the smaller of
``sum_i b_i k_i``, with bounds ``k_i`` of single units (of their gradients, for any slopes within
the cones), and of ``||b / S|| ||S dz||`` with ``S^2``
the spreads. What arrives at the input is a row ``a``. At ``x'`` each ``dz_i`` is a gradient ``g_i``
times the step, for slopes within the cones. So with all remainders ``l`` the change is at most the
length of ``a + sum_li +-b_li g_li``, whose square is at most

    ``||a||^2 + 2 sum_l min(||a|| rho_l, sum_i b_li |<a, g_li>|) + (sum_l rho_l)^2``.

The inner products are bounded by following the direction ``a`` forwards, as intervals. (They are
what matters: gradients of units are mostly not along ``a``.) A row may also stop at any tensor that
everything passes through: ``||v||`` times that one's bound, and the remainders so far.

**Norms.** ``||U dz||`` is followed back in the same way, ``||U m W|| + ||U S|| ||S dz'||``.

All roundings are paid for: a row that is computed is what is followed on, and how far it may be
from the exact one, times the local bound of where it is, goes to the remainders. Values of the
network at ``x`` are those of the float64 forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from certify.cones import Cones, cones
from certify.linear_maps import TINY, norms
from certify.local_network import LocalNetwork, plain_value
from certify.local_steps import ONE_ROUNDING, interval_behind, rows_before
from certify.signal import Affine, Input, Signal, Slopes
from ff_bounds.batched_norm import batched_norm_bound
from ff_bounds.rounding import gamma, round_up


class Ball:
    """Local bounds for a batch of points, each with a ball of its own.

    Args:
        network: the network.
        points: the arguments ``(batch, *shape)`` of its `LocalNetwork.activations` at the centres.
        radius: ``(batch,)`` float64.

    Attributes:
        lipschitz: ``(batch,)`` local bounds of each signal.
        units: ``(batch, *shape)`` those of the entries that enter each activation.
        cones: of each activation.
    """

    def __init__(
        self, network: LocalNetwork, points: Mapping[Signal, Tensor], radius: Tensor
    ) -> None:
        self._network = network
        self._radius = radius
        self.lipschitz: dict[Signal, Tensor] = {}
        self.units: dict[Signal, Tensor] = {}
        self.cones: dict[Signal, Cones] = {}
        self._spreads: dict[Signal, tuple[Tensor, Tensor]] = {}
        for signal in network.order:
            if isinstance(signal.step, Slopes):
                units = self._unit_bounds(signal.parents[0])
                reach = round_up(units * _over(radius, units), 1) + TINY
                self.units[signal] = units
                self.cones[signal] = cones(signal.step, points.get(signal), reach)
            value = network.values[signal].expand_as(radius)
            if signal is not network.first:
                value = torch.minimum(value, self._value(signal))
            self.lipschitz[signal] = value

    def margins(self, classes: Tensor) -> Tensor:
        """Bound how fast ``f_y - f_j`` falls, ``(batch, C)``, for a class ``y`` of each point."""
        count = self._network.bounding.output.shape[1]
        eye = torch.eye(count, dtype=torch.float64, device=classes.device)
        return self.rows(eye[classes][:, None] - eye, self._network.bounding.output, falls=True)

    def rows(self, rows: Tensor, signal: Signal, *, falls: bool = False) -> Tensor:
        """Bound how fast rows times a signal change; see the module's text.

        Args:
            rows: ``(batch, k, *shape)`` float64, taken as exact.
            signal: what they are applied to.
            falls: only decreases count, and convolutions are followed through: a few rows.

        Returns:
            ``(batch, k)`` float64.
        """
        network = self._network
        pending = {signal: rows}
        rest = rows.new_zeros(rows.shape[:2])
        terms: list[tuple[Signal, Tensor, Tensor]] = []
        best = torch.full_like(rest, torch.inf)
        start: tuple[Signal, Tensor] | None = None
        for at in reversed(network.order[: network.place[signal] + 1]):
            if at not in pending:
                continue
            row = pending.pop(at)
            size = norms(row, row.ndim - 2)
            here = self.lipschitz[at][:, None]
            if not pending:
                left = sum((rho for _, _, rho in terms), rest)
                best = torch.minimum(best, round_up(size * here + left, len(terms) + 2))
            if at is network.first or isinstance(at.step, Input):
                assert not pending  # everything passes through here
                if at is network.first:
                    rest = round_up(rest + _charge(network.root, size), 1)
                    row = row @ network.root
                start = at, row.flatten(2)
                break
            if isinstance(at.step, Slopes):
                row, weights = _through(row, self.cones[at], falls)
                rho = self._remainder(at, weights)
                terms.append((at, weights, rho))
                passed: list[Tensor] | None = [row]
                charge: Tensor | float = ONE_ROUNDING
                size = norms(row, row.ndim - 2)
            else:
                passed = rows_before(at, network.maps.get(at), row, falls)
                charge = network.maps[at].charge if isinstance(at.step, Affine) and passed else 0.0
            if passed is None:
                rest = round_up(rest + size * here, 2)
                continue
            for parent, part in zip(at.parents, passed, strict=True):
                slack = charge * size + TINY
                if parent in pending:
                    part = pending[parent] + part
                    slack = slack + ONE_ROUNDING * norms(part, part.ndim - 2)
                rest = round_up(rest + slack * self.lipschitz[parent][:, None], 5)
                pending[parent] = part
        if start is None:
            whole = sum((rho for _, _, rho in terms), rest)
            return torch.minimum(best, round_up(whole, len(terms) + 1))
        return torch.minimum(best, self._assembled(start, terms, rest))

    def _assembled(
        self, start: tuple[Signal, Tensor], terms: list[tuple[Signal, Tensor, Tensor]], rest: Tensor
    ) -> Tensor:
        """Combine what arrived at the start with the remainders: the formula of the module."""
        row = start[1]
        size = norms(row, 1)
        moved = self._responses(start, [signal for signal, _, _ in terms])
        total, cross = rest, size * rest
        for signal, weights, rho in terms:
            part = size * rho
            if signal in moved:
                along = (weights * moved[signal]).flatten(2).sum(dim=2)
                part = torch.minimum(part, round_up(along, weights[0, 0].numel() + 2) + TINY)
            total, cross = total + rho, cross + part
        square = size.square() + 2.0 * cross + total.square()
        return round_up(square.sqrt() + TINY, 2 * len(terms) + 12)

    def _responses(
        self, start: tuple[Signal, Tensor], wanted: list[Signal]
    ) -> dict[Signal, Tensor]:
        """How far the arguments of activations move for a step along the row at the start."""
        network, (first, row) = self._network, start
        moved: dict[Signal, Tensor] = {}
        if not wanted:
            return moved
        states: dict[Signal, tuple[Tensor, Tensor]] = {}
        last = max(network.place[signal] for signal in wanted)
        for at in network.order[network.place[first] : last + 1]:
            if at is first:
                if at is network.first:
                    size = norms(row, 1)[..., None]
                    slack = _charge(network.root.mT, size).expand(*row.shape[:2], len(network.root))
                    states[at] = row @ network.root.mT, slack
                else:
                    shaped = row.reshape(*row.shape[:2], *at.shape[1:])
                    states[at] = shaped, torch.zeros_like(shaped)
                continue
            if any(parent not in states for parent in at.parents):
                continue
            if at in wanted:
                centre, spread = states[at.parents[0]]
                moved[at] = round_up(centre.abs() + spread, 1)
            if network.place[at] == last:
                break
            cone = self.cones[at].both if at in self.cones else None
            parents = [states[parent] for parent in at.parents]
            state = interval_behind(at, network.maps.get(at), cone, parents)
            if state is not None:
                states[at] = state
        return moved

    def _remainder(self, at: Signal, weights: Tensor) -> Tensor:
        """Bound ``sum_i b_i |dz_i|`` for an activation of ``z``; ``(batch, k)``."""
        flat = weights.flatten(2)
        single = (flat @ self.units[at].expand_as(weights[:, 0]).flatten(1)[..., None])[..., 0]
        single = round_up(single + TINY, flat.shape[2] + 2)
        if bool((weights == 0).all()):
            return torch.zeros_like(single)
        scale, bound = self._spread(at)
        scale = scale.flatten(1)[:, None]
        shares = torch.where(flat > 0, flat / scale, 0.0)
        return torch.minimum(single, round_up(norms(shares, 1) * bound[:, None], 3))

    def _spread(self, at: Signal) -> tuple[Tensor, Tensor]:
        """Factors ``S (batch, *shape)`` for an activation of ``z``, and a bound of ``||S dz||``."""
        if at not in self._spreads:
            before, network = at.parents[0], self._network
            scale = self.cones[at].both.spread.sqrt()
            axes = scale.ndim - 1
            bound = scale.flatten(1).amax(dim=1) * self.lipschitz[before]
            bound = torch.minimum(bound, norms(scale * self.units[at], axes))
            if before is network.first:
                bound = torch.minimum(bound, self._first_norm(scale[..., None]))
            elif self._is_dense(before):
                rows = scale[..., None] * network.maps[before].pull(_eye(scale))
                bound = torch.minimum(bound, self._pulled(rows, before, norms(scale, 1)))
            self._spreads[at] = scale, round_up(bound, 3)
        return self._spreads[at]

    def _norm(self, rows: Tensor, signal: Signal) -> Tensor:
        """Bound ``||U ds||`` for matrices ``(batch, k, n)``."""
        before = signal.parents[0] if signal.parents else signal
        network = self._network
        if not isinstance(signal.step, Slopes) or not (
            before is network.first or self._is_dense(before)
        ):
            return round_up(_norm_bound(rows) * self.lipschitz[signal], 1)
        cone = self.cones[signal].both
        scale, bound = self._spread(signal)
        spread = rows * scale[:, None]  # a root's square is the spread up to two roundings
        rest = round_up((_norm_bound(spread) + ONE_ROUNDING * norms(spread, 2)) * bound, 6)
        rows = rows * cone.centre[:, None]
        size = norms(rows, 2)
        rest = round_up(rest + (ONE_ROUNDING * size + TINY) * self.lipschitz[before], 4)
        if before is network.first:
            main = self._first_norm(rows)
        else:
            main = self._pulled(network.maps[before].pull(rows), before, size)
        return round_up(main + rest, 1)

    def _first_norm(self, rows: Tensor) -> Tensor:
        """``||U L||`` for the root of the first layer; ``U`` may be the diagonal ``(.., 1)``."""
        root = self._network.root
        diagonal = rows.shape[-1] == 1 and len(root) > 1
        product = rows * root if diagonal else rows @ root
        slack = _charge(root, norms(rows, 2)) if not diagonal else ONE_ROUNDING * norms(product, 2)
        return round_up(_norm_bound(product) + slack + TINY, 3)

    def _pulled(self, rows: Tensor, before: Signal, size: Tensor) -> Tensor:
        """As `_norm`, for rows of the size that were pulled through the affine step ``before``."""
        source = before.parents[0]
        slack = (
            (self._network.maps[before].charge + ONE_ROUNDING) * size
            + ONE_ROUNDING * norms(rows, 2)
            + TINY
        )
        return round_up(self._norm(rows, source) + slack * self.lipschitz[source], 6)

    def _is_dense(self, signal: Signal) -> bool:
        affine = isinstance(signal.step, Affine) and signal in self._network.maps
        return affine and len(signal.shape) == 2

    def _unit_bounds(self, signal: Signal) -> Tensor:
        """Local bounds of a tensor's entries, ``(batch, *shape)``."""
        network, whole = self._network, self.lipschitz[signal]
        batch = len(whole)
        shape = (batch, *signal.shape[1:])
        bound = whole.reshape(-1, *[1] * (len(shape) - 1)).expand(shape)
        layer = network.maps.get(signal)
        if not bool((self._radius > 0).any()):
            return bound  # which no cone depends on
        if signal is network.first:
            return torch.minimum(bound, norms(network.root, 1))
        if layer is None:
            return bound
        source = signal.parents[0]
        single = layer.unit_norms() * _over(self.lipschitz[source], bound)
        bound = torch.minimum(bound, round_up(single, 1))
        if len(shape) == 2 and isinstance(source.step, Slopes):
            weight = layer.pull(_eye(bound))  # the rows of the stored matrix
            found = self.rows(weight.expand(batch, -1, -1), source)
            off = layer.error * self.lipschitz[source]
            bound = torch.minimum(bound, round_up(found + off[:, None], 2))
        return bound

    def _value(self, signal: Signal) -> Tensor:
        """Local bound of a signal from those of its parents."""
        if isinstance(signal.step, Input):
            return torch.ones_like(self._radius)
        factor = self._network.norms.get(signal, self._radius)
        if isinstance(signal.step, Slopes):
            cone = self.cones[signal].both
            steepest = round_up(cone.centre.abs() + cone.spread, 1)
            factor = steepest.flatten(1).amax(dim=1)
        return plain_value(signal, [self.lipschitz[parent] for parent in signal.parents], factor)


def _through(row: Tensor, found: Cones, falls: bool) -> tuple[Tensor, Tensor]:
    """Rows before an activation, and the weights of the remainder."""
    if not falls:
        spread = found.both.spread[:, None]
        return row * found.both.centre[:, None], round_up(row.abs() * spread, 1)
    rising = row > 0
    centre = torch.where(rising, found.below.centre[:, None], found.above.centre[:, None])
    spread = torch.where(rising, found.below.spread[:, None], found.above.spread[:, None])
    return row * centre, round_up(row.abs() * spread, 1)


def _norm_bound(matrices: Tensor) -> Tensor:
    """Infinite where there is an entry that is not finite."""
    finite = torch.isfinite(matrices.abs().amax(dim=(1, 2)))
    if bool(finite.all()):
        return batched_norm_bound(matrices)
    bound = batched_norm_bound(torch.where(finite[:, None, None], matrices, 0.0))
    return torch.where(finite, bound, torch.inf)


def _charge(root: Tensor, size: Tensor) -> Tensor:
    """How far a computed ``v L`` may be from the exact one, for rows of this size."""
    return round_up(gamma(len(root) + 2) * norms(root, 2) * size + TINY, 3)


def _eye(like: Tensor) -> Tensor:
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)


def _over(values: Tensor, like: Tensor) -> Tensor:
    """One value for each sample, in the shape of a batch of tensors."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
