"""Cells that cover the frequency torus, for `ff_bounds.branch_and_bound`."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def first_cells(
    taps: tuple[int, ...], largest: float, device: torch.device
) -> tuple[Tensor, Tensor, float]:
    """Cover half of the torus with cells of one angle ``max sum_j r_j |w_j - c_j|``.

    Half is enough, as ``K(-w)`` is the conjugate of ``K(w)`` for a real kernel. In two dimensions
    the cells are diamonds, balls of ``sum_j r_j |w_j|``, of which it takes half as many as boxes of
    the same angle; else they are boxes. Either kind splits into parts of half the size, whose
    centres are the cell's centre plus fixed offsets.

    Args:
        taps: kernel size per axis, each at least 2; ``r_j = (taps_j - 1) / 2``.
        largest: upper limit of the angle.
        device: of the result.

    Returns:
        Centres ``(cells, d)`` float64, offsets ``(parts, d)`` to the parts of a cell, the angle.

    Example:
        >>> centres, offsets, angle = first_cells((3,), 0.8, torch.device("cpu"))
        >>> centres[:, 0].tolist(), angle <= 0.8  # intervals of half-width pi / 4 cover [0, pi]
        ([0.7853981633974483, 2.356194490192345], True)
    """
    radii = [(t - 1) / 2 for t in taps]
    parts: list[tuple[float, ...]]
    places: list[tuple[float, ...]]
    if len(taps) == 2:
        counts = [math.ceil(r * math.pi / largest) for r in radii]
        steps = [math.pi / count for count in counts]
        places = [
            (i * steps[0], j * steps[1])
            for i in range(counts[0] + 1)
            for j in range(2 * counts[1])
            if (i + j) % 2 == 0
        ]
        parts = [(s * steps[0] / 2, 0.0) for s in (-1, 1)]
        parts += [(0.0, s * steps[1] / 2) for s in (-1, 1)]
        angle = max(r * step for r, step in zip(radii, steps, strict=True))
    elif not taps:
        places, parts, angle = [()], [()], 0.0
    else:
        share = largest / len(taps)
        counts = [math.ceil(r * math.pi / share) for r in radii]
        counts[0] = math.ceil(counts[0] / 2)
        spans = [math.pi] + [2 * math.pi] * (len(taps) - 1)
        halves = [span / count / 2 for span, count in zip(spans, counts, strict=True)]
        lines = [
            [(2 * i + 1) * half for i in range(count)]
            for half, count in zip(halves, counts, strict=True)
        ]
        places = list(itertools.product(*lines))
        parts = list(itertools.product(*((-half / 2, half / 2) for half in halves)))
        angle = sum(r * half for r, half in zip(radii, halves, strict=True))

    def tensor(rows: list[tuple[float, ...]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.float64, device=device).reshape(len(rows), len(taps))

    return tensor(places), tensor(parts), angle
