"""The number of samples in a batch: where it may appear in a graph.

A network whose arithmetic uses that number is another one for each size of the batch, which
examples of a few sizes do not show. It may be the first size of a result, as in ``x.view(n, -1)``,
and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from certify.signal import UnsupportedModel

_METHODS = {
    "view", "reshape", "expand", "new_zeros", "new_ones", "new_full", "new_empty", "repeat",
}  # fmt: skip
"""Methods of tensors whose arguments are sizes, or begin with them."""

_FUNCTIONS = {
    torch.reshape: 1, torch.broadcast_to: 1,
    torch.zeros: 0, torch.ones: 0, torch.full: 0, torch.empty: 0,
}  # fmt: skip
"""Functions, and the place where their sizes begin."""


def refuse_batch_numbers(
    graph: fx.Graph, shapes: Mapping[fx.Node, Sequence[tuple[int, ...]]]
) -> None:
    """Refuse a graph that uses the number of samples but as the first size of a result.

    Args:
        graph: traced.
        shapes: of the tensors at its nodes.

    Raises:
        UnsupportedModel: naming the node.
    """
    numbers: set[fx.Node] = set()
    whole: set[fx.Node] = set()  # shapes, of which it is the first entry
    varying: set[fx.Node] = set()  # what depends on the input
    for n in graph.nodes:
        if n.op != "placeholder" and not varying.intersection(n.all_input_nodes):
            continue
        varying.add(n)
        kind = _kind(n, shapes, whole)
        if _is_size_of_samples(n):
            continue
        if kind is not None:
            (numbers if kind == "number" else whole).add(n)
        elif not _fits(n, numbers, whole):
            raise UnsupportedModel(
                f"node {n.name!r} computes with the number of samples in a batch; it may only be "
                "the first size of a result"
            )


def _kind(
    n: fx.Node, shapes: Mapping[fx.Node, Sequence[tuple[int, ...]]], whole: set[fx.Node]
) -> str | None:
    """Whether a node is the number itself, or a shape that begins with it."""
    if n.op == "call_method" and n.target in ("size", "numel", "nelement", "__len__"):
        axis = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else None)
        if n.target == "size" and axis is None:
            return "whole"
        (tensor,) = n.all_input_nodes
        behind = isinstance(axis, int) and axis % max(1, len(shapes[tensor][0])) != 0
        return None if behind else "number"
    if n.target is torch.numel:
        return "number"
    if n.target is getattr:
        return "whole" if n.args[1] == "shape" else None
    source = n.args[0] if n.op == "call_function" and n.args else None
    if not isinstance(source, fx.Node) or source not in whole:
        return None
    if n.target is operator.getitem:
        length = len(_items(source, shapes))
        index = n.args[1]
        if isinstance(index, int):
            return "number" if index % length == 0 else None
        if isinstance(index, slice) and not any(isinstance(e, fx.Node) for e in _ends(index)):
            places = range(length)[index]
            if 0 not in places:
                return None
            return "whole" if places[0] == 0 else "number"
        return "number"  # whose use is refused
    added = n.target is operator.add and not _mentions(n.args[1], whole)
    return "whole" if added else None


def _is_size_of_samples(n: fx.Node) -> bool:
    """Whether a node divides the number of a tensor's entries by that of its samples."""
    if n.target is not operator.floordiv or len(n.all_input_nodes) != 2:
        return False
    entries, samples = n.all_input_nodes
    shape = samples.args[0] if samples.target is operator.getitem else samples
    first = samples.args[1:] == (0,) and isinstance(shape, fx.Node)
    counted = entries.target in ("numel", torch.numel)
    same = isinstance(shape, fx.Node) and shape.args[:1] == entries.args[:1]
    return first and counted and same and n.args == (entries, samples)


def _items(n: fx.Node, shapes: Mapping[fx.Node, Sequence[tuple[int, ...]]]) -> Sequence[Any]:
    """As many entries as a shape has; a sum of shapes is given enough."""
    source: Any = n
    while source.target is operator.getitem:
        source = source.args[0]
    return shapes[source.args[0]][0] if source.target is not operator.add else range(64)


def _ends(index: slice) -> tuple[Any, Any, Any]:
    return index.start, index.stop, index.step


def _mentions(value: Any, nodes: set[fx.Node]) -> bool:
    found: list[bool] = []
    fx.node.map_arg(value, lambda used: found.append(used in nodes))
    return any(found)


def _fits(n: fx.Node, numbers: set[fx.Node], whole: set[fx.Node]) -> bool:
    """Whether a node uses the number as the first size of its result, if at all."""
    either = numbers | whole
    if not either.intersection(n.all_input_nodes):
        return True
    if n.op == "call_function" and n.target is operator.getitem and n.args[0] in whole:
        return not _mentions(n.args[1], either)  # a size behind the batch's
    if n.op == "call_method" and n.target in _METHODS:
        begin = 1
    elif n.op == "call_function" and n.target in _FUNCTIONS:
        begin = _FUNCTIONS[n.target]
    else:
        return False
    named = [value for name, value in n.kwargs.items() if name in ("size", "shape")]
    others = [value for name, value in n.kwargs.items() if name not in ("size", "shape")]
    sizes = [*n.args[begin:], *named]
    if _mentions([*n.args[:begin], *others], either) or not sizes:
        return False
    first, rest = sizes[0], sizes[1:]
    if isinstance(first, (tuple, list)):
        first, rest = first[0], [*first[1:], *rest]
    return not _mentions(rest, either) and isinstance(first, fx.Node)
