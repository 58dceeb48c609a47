"""The sorting of pairs of channels in graphs of torch's functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx


def source_of_pairs(n: fx.Node, shapes: Mapping[fx.Node, tuple[int, ...]]) -> fx.Node | None:
    """What a node sorts in pairs of channels, as `models.MaxMin` does; ``None`` if it does not.

    It is ``y.reshape(...)`` with ``y = stack([maximum(a, b), minimum(a, b)], 2)``, where ``a`` and
    ``b`` are the two entries along axis 2 of ``x`` as ``(N, C / 2, 2, ...)``: the entries of the
    sorted ``x`` in their order, in any shape. Concatenated along axis 2, wherever they have one,
    the extrema come in the same order.
    """
    both = _stacked(n)
    extrema = [(m.target, m.args) for m in both]
    if [target for target, _ in extrema] != [torch.maximum, torch.minimum]:
        return None
    (_, pair), (_, other) = extrema
    if pair != other or not all(isinstance(m, fx.Node) for m in pair):
        return None
    chosen = [(m.target, *m.args[1:]) for m in pair if isinstance(m, fx.Node)]
    if chosen != [(torch.select, 2, 0), (torch.select, 2, 1)]:
        return None
    grouped = {m.args[0] for m in pair if isinstance(m, fx.Node)}
    group = grouped.pop()
    if grouped or not isinstance(group, fx.Node):
        return None
    source = _reshaped(group)
    if source is None or len(shapes[source]) < 2:
        return None
    batch, channels, *others = shapes[source]
    fits = shapes[group] == (batch, channels // 2, 2, *others) and channels % 2 == 0
    return source if fits else None


def _reshaped(n: fx.Node) -> fx.Node | None:
    """What a node gives another shape."""
    if (n.op, n.target) not in _RESHAPES:
        return None
    source = n.args[0]
    return source if isinstance(source, fx.Node) else None


PAIRING = (torch.stack, torch.cat, torch.unsqueeze, torch.maximum, torch.minimum, torch.select)
"""Functions of which the sorting of pairs is made: they write into nothing."""

_RESHAPES = (("call_method", "view"), ("call_method", "reshape"))


def _stacked(n: fx.Node) -> list[fx.Node]:
    """Tensors put beside each other along axis 2, of which a node then changes the shape only."""
    inner = _reshaped(n)
    while inner is not None and (inner.op, inner.target) in _RESHAPES:
        inner = _reshaped(inner)
    if inner is None or inner.target not in (torch.stack, torch.cat) or inner.args[1:] != (2,):
        return []
    parts: Any = inner.args[0]
    if inner.target is torch.stack:
        return list(parts)
    return [m.args[0] if (m.target, *m.args[1:]) == (torch.unsqueeze, 2) else m for m in parts]
