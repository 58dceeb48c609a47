"""The number of samples in a batch: where it may appear in a graph.

A network whose arithmetic uses that number is another one for each size of the batch, which
examples of a few sizes do not show. It may be the first size of a result, as in ``x.view(n, -1)``,
and nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping, Sequence
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


_BESIDE = {
    torch.cat, torch.concat, torch.concatenate, operator.add, operator.sub, torch.add, torch.sub,
    "to", "type_as", "contiguous", "clone", "double", "float", "add", "sub",
}  # fmt: skip
"""Where a constant with an entry for each sample may go: beside what depends on the input."""


def refuse_batch_numbers(
    graph: fx.Graph, shapes: Mapping[fx.Node, Sequence[tuple[int, ...]]]
) -> None:
    """Refuse a graph that uses the number of samples but as the first size of a result.

    A constant of such a size may be put beside what depends on the input, or added to it, and
    nothing else: its sum, or a size of what it becomes, would be that number again.

    Args:
        graph: traced.
        shapes: of the tensors at its nodes.

    Raises:
        UnsupportedModel: naming the node.
    """
    marks: dict[fx.Node, list[bool]] = {}  # of shapes, which of their entries are the number
    numbers: set[fx.Node] = set()
    signals: set[fx.Node] = set()  # what depends on the input's values
    made: set[fx.Node] = set()  # constants with an entry for each sample
    for n in graph.nodes:
        if n.op == "placeholder":
            signals.add(n)
            continue
        used = set(n.all_input_nodes)
        if not used & (signals | made | numbers | marks.keys()):
            continue
        if used & made and n.op != "output":
            fits = n.target in _BESIDE and not used & (numbers | marks.keys())
        else:
            found = None if _is_size_of_samples(n) else _marks(n, shapes, marks, numbers)
            if isinstance(found, list):
                marks[n] = found
            elif found:
                numbers.add(n)
            if found is not None or _is_size_of_samples(n):
                continue
            fits = _fits(n, numbers, marks)
        if not fits:
            raise UnsupportedModel(
                f"node {n.name!r} computes with the number of samples in a batch; it may only be "
                "the first size of a result"
            )
        (signals if used & signals else made).add(n)


def _marks(
    n: fx.Node,
    shapes: Mapping[fx.Node, Sequence[tuple[int, ...]]],
    marks: Mapping[fx.Node, list[bool]],
    numbers: set[fx.Node],
) -> list[bool] | bool | None:
    """Of a shape, which entries are the number; of a size, whether it is; of others ``None``."""
    source: Any = n.args[0] if n.args else None
    if n.op == "call_method" and n.target in ("size", "numel", "nelement", "__len__"):
        if source in marks:  # the product of a shape, or its length
            return n.target != "__len__" and any(marks[source])
        axes = len(shapes[source][0])
        axis = n.kwargs.get("dim", n.args[1] if len(n.args) > 1 else None)
        if n.target == "size" and axis is None:
            return [place == 0 for place in range(axes)]
        return not (n.target == "size" and isinstance(axis, int) and axis % max(1, axes) != 0)
    if n.target is torch.numel:
        return True
    if n.target is getattr:
        if n.args[1] == "shape":
            return [place == 0 for place in range(len(shapes[source][0]))]
        return False if n.args[1] in ("ndim", "dtype", "device") else None
    if not isinstance(source, fx.Node) or source not in marks or n.op != "call_function":
        return None
    if n.target is operator.getitem:
        index: Any = n.args[1]
        if isinstance(index, slice) and any(isinstance(end, fx.Node) for end in _ends(index)):
            return True  # whose use is refused
        return marks[source][index] if isinstance(index, int | slice) else True
    if n.target is operator.add:
        other: Any = n.args[1]
        if isinstance(other, fx.Node):
            return [*marks[source], *marks[other]] if other in marks else True
        return [*marks[source], *(e in numbers or e in marks for e in _nodes_or_none(other))]
    return None


def _nodes_or_none(values: Any) -> list[Any]:
    """The nodes of a sequence, and ``None`` for its numbers."""
    if not isinstance(values, (tuple, list)):
        return []
    return [value if isinstance(value, fx.Node) else None for value in values]


def _is_size_of_samples(n: fx.Node) -> bool:
    """Whether a node divides the number of a tensor's entries by that of its samples."""
    if n.target is not operator.floordiv or len(n.args) != 2 or len(n.all_input_nodes) != 2:
        return False
    entries, samples = n.all_input_nodes
    if n.args != (entries, samples) or entries.target not in ("numel", torch.numel):
        return False
    shape: Any = samples.args[0] if samples.target is operator.getitem else samples
    whole = shape.target is getattr and shape.args[1] == "shape"
    whole = whole or (shape.target == "size" and len(shape.args) == 1 and not shape.kwargs)
    first = samples.target is operator.getitem and samples.args[1] == 0 and whole
    first = first or (samples.target == "size" and samples.args[1:] == (0,))
    return bool(first and shape.args[:1] == entries.args[:1])


def _ends(index: slice) -> tuple[Any, Any, Any]:
    return index.start, index.stop, index.step


def _mentions(value: Any, nodes: Collection[fx.Node]) -> bool:
    found: list[bool] = []
    fx.node.map_arg(value, lambda used: found.append(used in nodes))
    return any(found)


def _fits(n: fx.Node, numbers: set[fx.Node], marks: Mapping[fx.Node, list[bool]]) -> bool:
    """Whether a node uses the number as the first size of its result, if at all."""
    marked = {shape for shape, found in marks.items() if any(found)}
    either = numbers | marked
    if not either.intersection(n.all_input_nodes):
        return True
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
    if _mentions(rest, either) or not isinstance(first, fx.Node):
        return False
    return first in numbers or (
        first in marked and marks[first].index(True) == 0 and not any(marks[first][1:])
    )
