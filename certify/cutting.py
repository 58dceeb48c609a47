"""Traced graphs cut in two, for gradients."""

from __future__ import annotations

import operator

from torch import fx, nn

from certify.signal import UnsupportedModel


def cut(root: nn.Module, graph: fx.Graph, node: str) -> tuple[nn.Module, nn.Module]:
    """Cut a network at a tensor that all paths go through; see `LipschitzGraph.split`.

    Args:
        root: the module that the graph was traced from.
        graph: checked to compute what the module does.
        node: name of the tensor's node.
    """
    where = next((n for n in graph.nodes if n.name == node), None)
    if where is None:
        raise UnsupportedModel(f"node {node!r} is one of several results")
    before, after = fx.Graph(), fx.Graph()
    copied: dict[fx.Node, fx.Node] = {}
    for n in graph.nodes:
        copied[n] = _attached(root, before, n, copied)
        if n is where:
            break
    before.output(copied[where])
    needed = _needed(graph, where)
    features = after.placeholder("features")
    copied = {where: features}
    for n in graph.nodes:
        if n in needed and _is_batch_size(n):
            copied[n] = after.call_method("size", (features, 0))
        elif n in needed:
            if n.op == "placeholder":
                raise UnsupportedModel("the last layers use the network's input as well")
            copied[n] = _attached(root, after, n, copied)
    return fx.GraphModule(root, before), fx.GraphModule(root, after)


def _attached(
    root: nn.Module, graph: fx.Graph, n: fx.Node, copied: dict[fx.Node, fx.Node]
) -> fx.Node:
    """Copy a node into a graph for gradients.

    Nothing is cut off, and nothing overwritten: what works in place gets a copy. (That a tensor
    which was overwritten is used once more has been refused.)
    """
    if n.op == "call_method" and n.target == "detach":
        return copied[n.all_input_nodes[0]]
    if not _works_in_place(root, n):
        return graph.node_copy(n, copied.__getitem__)
    clones = {used: graph.call_method("clone", (copied[used],)) for used in n.all_input_nodes[:1]}
    return graph.node_copy(n, lambda used: clones.get(used, copied[used]))


def _works_in_place(root: nn.Module, n: fx.Node) -> bool:
    if n.op == "call_module":
        return bool(getattr(root.get_submodule(str(n.target)), "inplace", False))
    if n.op not in ("call_method", "call_function") or not n.all_input_nodes:
        return False
    name = n.target if isinstance(n.target, str) else getattr(n.target, "__name__", "")
    operators = n.target in (operator.iadd, operator.isub, operator.imul, operator.itruediv)
    named = name.endswith("_") and not name.endswith("__")
    # Among positional arguments True may be ``inplace``; one copy too many does no harm.
    flagged = any(argument is True for argument in n.args[1:]) or n.kwargs.get("inplace", False)
    return operators or named or bool(flagged)


def _needed(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    """The nodes that the output is computed from, up to one where that ends."""
    found: set[fx.Node] = set()
    stack = [n for n in graph.nodes if n.op == "output"]
    while stack:
        n = stack.pop()
        if n not in found and n is not start:
            found.add(n)
            stack += [] if _is_batch_size(n) else n.all_input_nodes
    return found


def _is_batch_size(n: fx.Node) -> bool:
    """Whether a node asks for the number of samples, which is that of any tensor."""
    if n.op == "call_method":
        return n.target == "size" and n.args[1:] == (0,)
    shape = n.args[0] if n.target is operator.getitem and n.args[1:] == (0,) else None
    return isinstance(shape, fx.Node) and shape.target is getattr and shape.args[1:] == ("shape",)
