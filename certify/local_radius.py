"""Certified radii from local bounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from certify.certificates import Certificate, margin_radius
from certify.local import Ball
from certify.local_network import LocalNetwork
from certify.signal import Signal

_TRIALS = 3
_FIRST = 1000.0  # largest ratio of the first trial to the global radius
_CLOSE = 0.01  # relative width of what is left to be found
_ENTRIES = 2**20  # of the largest tensors of rows at a time, 8 MiB


@dataclass(frozen=True)
class _Batch:
    points: Mapping[Signal, Tensor]
    logits: Tensor
    prediction: Tensor
    global_bounds: Tensor

    def chosen(self, which: Tensor) -> _Batch:
        points = {signal: point[which] for signal, point in self.points.items()}
        parts = (self.logits, self.prediction, self.global_bounds)
        return _Batch(points, *(part[which] for part in parts))


def local_certificate(
    network: LocalNetwork, points: Mapping[Signal, Tensor], logits: Tensor, margins: Tensor
) -> Certificate:
    r"""Certify predictions by local bounds, where these prove more than the global ones.

    Claim: as that of `certify.certificate`. Bounds ``K`` of the falls of all margins in the ball of
    radius ``r`` prove the radius ``min(r, min_j margin_j / K_j)``: inside it no margin can vanish.
    That holds for every ``r``, so that the best of a few is taken. As ``K`` grows with ``r``, each
    trial bounds from both sides where the best lies, and the next interpolates. The bounds at
    ``r = 0`` say how far it may be worth looking; nothing rests on them.

    Args:
        network: the network.
        points: what enters its activations, one of each for each input.
        logits: ``(N, C)``, the network's values at the inputs.
        margins: ``(C, C)`` global bounds.
    """
    prediction = logits.argmax(dim=1)
    globally = margins[prediction]
    best = margin_radius(logits, prediction, globally)
    open_ = torch.nonzero((best > 0) & torch.isfinite(best))[:, 0]
    whole = _Batch(points, logits, prediction, globally)
    parts = [p for p in open_.split(max(1, _ENTRIES // network.entries)) if len(p)]

    def search(part: Tensor) -> Tensor:
        with torch.no_grad():  # which each thread has to say for itself
            return _search(network, whole.chosen(part), best[part])

    for part, radius in zip(parts, _in_parallel(search, parts), strict=True):
        best[part] = radius
    return Certificate(prediction, best)


def _in_parallel(function: Callable[[Tensor], Tensor], parts: list[Tensor]) -> list[Tensor]:
    """Work on parts of a batch at a time, each in one of torch's threads.

    Threads that wait for each other in every product and factorisation of small matrices can be
    slower than a single one, by far if the cores have other work.
    """
    threads = torch.get_num_threads()
    if len(parts) < 2 or threads < 2 or parts[0].device.type != "cpu":
        return [function(part) for part in parts]
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(function, parts))
    finally:
        torch.set_num_threads(threads)


def _search(network: LocalNetwork, batch: _Batch, best: Tensor) -> Tensor:
    """Improve on proven radii."""
    highest = _margin_radius(network, batch, torch.zeros_like(best))
    # A network that is flat here has no highest worth the name: not too far at first.
    reach, radius = highest.clone(), torch.minimum(0.5 * (best + highest), _FIRST * best)
    best, index = best.clone(), torch.arange(len(best), device=best.device)
    for _ in range(_TRIALS):
        worth = reach > best[index] * (1.0 + _CLOSE)
        if not bool(worth.any()):
            break
        index, batch = index[worth], batch.chosen(worth)
        highest, reach, radius = highest[worth], reach[worth], radius[worth]
        found = _margin_radius(network, batch, radius)
        best[index] = torch.maximum(best[index], torch.minimum(found, radius))
        reach = torch.minimum(torch.where(found < radius, radius, found), reach)
        radius = torch.minimum(_crossing(highest, radius, found), reach)
        radius = torch.where(radius > best[index], radius, 0.5 * (best[index] + reach))
    return best


def _crossing(highest: Tensor, radius: Tensor, found: Tensor) -> Tensor:
    """Where ``found(r) = r`` if ``1 / found`` is a line through its values at 0 and ``radius``."""
    start = 1.0 / highest
    slope = (1.0 / found - start) / radius
    return 2.0 / (start + (start.square() + 4.0 * slope).clamp_min(0.0).sqrt())


def _margin_radius(network: LocalNetwork, batch: _Batch, radius: Tensor) -> Tensor:
    """Smallest quotient of a margin and its bound on balls of these radii, rounded down."""
    bounds = Ball(network, batch.points, radius).margins(batch.prediction)
    bounds = torch.minimum(bounds, batch.global_bounds)
    return margin_radius(batch.logits, batch.prediction, bounds)
