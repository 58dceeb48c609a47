"""Sizes of tensors as numbers while a module is traced.

``torch.fx`` traces with symbols, which no ``if``, ``assert``, ``len`` or ``range`` can use. What
follows from the sizes of tensors alone is known here, because the input shape is: it is worked out
on the example. Values of tensors stay unknown, and control flow that depends on them is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, Proxy, TraceError

_SIZES = {"shape", "ndim", "size", "dim", "ndimension", "numel", "dtype", "device", "is_cuda"}


class SizeTracer(fx.Tracer):
    """A tracer that knows the sizes of tensors.

    Args:
        example: a batch of inputs for the module that will be traced.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self._example = example
        self._known: dict[fx.Node, Any] = {}

    def proxy(self, node: fx.Node) -> Proxy:
        """Return a symbol for a node."""
        return _Symbol(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        """Decide a condition on sizes; refuse one on values."""
        return bool(self.known(obj))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Loop over sizes; refuse to loop over values."""
        if not _is_about_sizes(obj.node):
            return super().iter(obj)
        return iter(self._value(obj.node))

    def known(self, obj: Proxy) -> Any:
        """Return the value of a symbol that follows from sizes.

        Raises:
            TraceError: it depends on the values of tensors.
        """
        if not _is_about_sizes(obj.node):
            raise TraceError("symbolically traced variables cannot be used in control flow")
        return self._value(obj.node)

    def _value(self, node: fx.Node) -> Any:
        """Run a node on the example, and what it needs."""
        stack = [node]
        while stack:
            last = stack[-1]
            missing = [used for used in last.all_input_nodes if used not in self._known]
            if missing and last not in self._known:
                stack += missing
            else:
                stack.pop()
                if last not in self._known:
                    with torch.no_grad():
                        self._known[last] = self._run(last)
        return self._known[node]

    def _run(self, node: fx.Node) -> Any:
        args = fx.node.map_arg(node.args, self._known.__getitem__)
        kwargs = fx.node.map_arg(node.kwargs, self._known.__getitem__)
        assert isinstance(self.root, nn.Module)
        if node.op == "placeholder":
            return self._example.clone()
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(self.root)
        if node.op == "call_module":
            return self.root.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _is_about_sizes(node: fx.Node) -> bool:
    """Whether a node follows from the sizes of tensors, not from their values."""
    stack, seen = [node], {node}
    while stack:
        last = stack.pop()
        names = (last.target, last.args[1] if len(last.args) > 1 else None)
        if last.op == "call_method" and names[0] in _SIZES:
            continue
        if last.op == "call_function" and last.target is getattr and names[1] in _SIZES:
            continue
        if last.op != "call_function" or not last.all_input_nodes:
            return False
        stack += [used for used in last.all_input_nodes if used not in seen]
        seen.update(last.all_input_nodes)
    return True


class _Numbers:
    """What Python asks of a number or a sequence, answered from sizes."""

    def __len__(self) -> int:
        assert isinstance(self, Proxy)
        return len(_tracer(self).known(self))

    def __index__(self) -> int:
        assert isinstance(self, Proxy)
        return operator.index(_tracer(self).known(self))

    def __int__(self) -> int:
        return self.__index__()


class _Symbol(_Numbers, Proxy):
    def __getattr__(self, name: str) -> Attribute:
        return _SymbolAttribute(self, name)


class _SymbolAttribute(_Numbers, Attribute):
    def __getattr__(self, name: str) -> Attribute:
        return _SymbolAttribute(self, name)


def _tracer(obj: Proxy) -> SizeTracer:
    assert isinstance(obj.tracer, SizeTracer)
    return obj.tracer
