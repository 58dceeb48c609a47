"""Sizes of tensors as numbers while a module is traced.

``torch.fx`` traces with symbols, which no ``if``, ``assert``, ``len`` or ``range`` can use. What
follows from the sizes of tensors alone is known here, because the input shape is: it is worked out
on the example. Values of tensors stay unknown, and control flow that depends on them is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Attribute, Proxy, TraceError

_SIZES = {"shape", "ndim", "size", "dim", "ndimension", "numel", "dtype", "device", "is_cuda"}


_PLAIN = {name: getattr(nn.Module, name) for name in ("__call__", "__getattr__")}


@contextmanager
def _untraced() -> Iterator[None]:
    """Run modules as they are, though a trace is under way, which patches their methods."""
    patched = {name: getattr(nn.Module, name) for name in _PLAIN}
    try:
        for name, method in _PLAIN.items():
            setattr(nn.Module, name, method)
        yield
    finally:
        for name, method in patched.items():
            setattr(nn.Module, name, method)


class SizeTracer(fx.Tracer):
    """A tracer that knows the sizes of tensors.

    Args:
        example: a batch of inputs for the module that will be traced.

    Attributes:
        aside: what is entered around computations that are not the module's own.
    """

    def __init__(self, example: Tensor) -> None:
        super().__init__()
        self._example = example
        self._known: dict[fx.Node, Any] = {}
        self.aside: Callable[[], AbstractContextManager[None]] = nullcontext

    def proxy(self, node: fx.Node) -> Proxy:
        """Return a symbol for a node."""
        return _Symbol(node, self)

    def to_bool(self, obj: Proxy) -> bool:
        """Decide a condition on sizes; refuse one on values."""
        return bool(self.known(obj))

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """Loop over sizes; refuse to loop over values."""
        if not (self._is_about_samples(obj.node) or _is_part_of_shape(obj.node)):
            return super().iter(obj)
        symbols: Any = obj
        return iter([symbols[index] for index in range(self.length(obj))])

    def length(self, obj: Proxy) -> int:
        """How long something is that follows from sizes; of a shape, with the batch's."""
        known = self._value(obj.node) if _is_part_of_shape(obj.node) else self.known(obj)
        return len(known)

    def known(self, obj: Proxy) -> Any:
        """Return the value of a symbol that follows from sizes.

        Raises:
            TraceError: it depends on the values of tensors, or on the size of the batch.
        """
        if not self._is_about_samples(obj.node):
            raise TraceError("symbolically traced variables cannot be used in control flow")
        return self._value(obj.node)

    def _is_about_samples(self, node: fx.Node) -> bool:
        """Whether a node follows from sizes of samples: not from values, nor the batch's size."""
        stack = [node]
        while stack:
            last = stack.pop()
            if _is_size(last):
                if _is_shape(last) and last is not node:
                    return False  # only its length may be used, or a size behind the batch's
                if last.target == "numel":
                    return False
                if last.target == "size" and not _is_shape(last):
                    axis = last.kwargs.get("dim", last.args[1] if len(last.args) > 1 else None)
                    tensor = last.args[0]
                    assert isinstance(tensor, fx.Node)
                    if not _is_behind(axis, self._value(tensor).ndim):
                        return False
                continue
            if last.op != "call_function" or not last.all_input_nodes:
                return False
            if last.target is operator.getitem and _is_size(last.args[0]):
                shape = last.args[0]
                assert isinstance(shape, fx.Node)
                if not _is_shape(shape) or not _is_behind(last.args[1], len(self._value(shape))):
                    return False
                continue
            stack += last.all_input_nodes
        return True

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
                    with torch.no_grad(), _untraced(), self.aside():
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


def _is_size(node: Any) -> bool:
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target in _SIZES
    return node.target is getattr and str(node.args[1]) in _SIZES


def _is_shape(node: fx.Node) -> bool:
    """Whether a size is that of all axes."""
    if node.op == "call_method":
        return bool(node.target == "size" and len(node.args) + len(node.kwargs) == 1)
    return bool(node.args[1] == "shape")


def _is_part_of_shape(node: Any) -> bool:
    """Whether it is a shape, or a slice of one, whose length is the same for all batches."""
    if _is_size(node):
        return _is_shape(node)
    if not isinstance(node, fx.Node) or node.target is not operator.getitem:
        return False
    index = node.args[1]
    ends = (index.start, index.stop, index.step) if isinstance(index, slice) else (node,)
    plain = all(isinstance(end, (int, type(None))) for end in ends)
    return plain and _is_part_of_shape(node.args[0])


def _is_behind(index: Any, axes: int) -> bool:
    """Whether an index of a shape does not reach its first axis, the batch's."""
    if isinstance(index, slice):
        plain = all(isinstance(end, (int, type(None))) for end in (index.start, index.stop))
        return plain and 0 not in range(axes)[index]
    return isinstance(index, int) and index % axes != 0


class _Numbers:
    """What Python asks of a number or a sequence, answered from sizes."""

    def __len__(self) -> int:
        assert isinstance(self, Proxy)
        return _tracer(self).length(self)

    def __index__(self) -> int:
        assert isinstance(self, Proxy)
        return operator.index(_tracer(self).known(self))

    def __int__(self) -> int:
        return self.__index__()

    def __hash__(self) -> int:  # or a dict would decide by the symbol's identity
        assert isinstance(self, Proxy)
        return hash(_tracer(self).known(self))


class _Symbol(_Numbers, Proxy):
    def __getattr__(self, name: str) -> Attribute:
        return _SymbolAttribute(self, name)


class _SymbolAttribute(_Numbers, Attribute):
    def __getattr__(self, name: str) -> Attribute:
        return _SymbolAttribute(self, name)


def _tracer(obj: Proxy) -> SizeTracer:
    assert isinstance(obj.tracer, SizeTracer)
    return obj.tracer
