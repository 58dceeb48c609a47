"""From graphs of ATen operations, as ``torch.export`` makes them, to torch's functions with rules.

Most operations have a binding in torch that takes the very arguments of their schema; those with a
rule, or with a reason why there is none, are called by it. Others are spelled out here. What is not
known is refused before anything runs.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from certify.aten_operations import SPELLED, Given
from certify.pairs import PAIRING, source_of_pairs
from certify.rules import REFUSALS, RULES
from certify.signal import UnsupportedModel
from models import MaxMin

aten = torch.ops.aten

_SIZES = {operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg}
"""Of whole numbers: arithmetic with the size of a batch."""

_PYTHON: dict[str, Any] = {
    "adaptive_avg_pool2d": F.adaptive_avg_pool2d, "adaptive_avg_pool3d": F.adaptive_avg_pool3d,
    "_adaptive_avg_pool2d": F.adaptive_avg_pool2d, "_adaptive_avg_pool3d": F.adaptive_avg_pool3d,
    "leaky_relu": F.leaky_relu, "hardtanh": F.hardtanh, "relu6": F.relu6, "silu": F.silu,
    "mish": F.mish, "hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid,
}  # fmt: skip
"""Functions written in Python that take the schema's arguments in its order."""

_IN_PLACE = ("relu6_", "silu_", "mish_", "hardswish_", "hardsigmoid_")

_FACTORIES = ("full", "zeros", "ones", "arange", "scalar_tensor", "eye", "linspace")

_DROPPED = ("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size",
            "sym_constrain_range")  # fmt: skip


def refuse_unknown(graph: fx.Graph) -> None:
    """Refuse a graph with operations other than those that are known here; nothing is run.

    Raises:
        UnsupportedModel: naming the node and the operation.
    """
    for n in graph.nodes:
        if n.op in ("placeholder", "get_attr", "output") or n.target is operator.getitem:
            continue
        known = n.target in _SIZES
        if isinstance(n.target, torch._ops.OpOverload) and n.target.namespace == "aten":
            name = n.target._schema.name.removeprefix("aten::")
            known = name in _DROPPED or name in _FACTORIES or name in SPELLED
            known = known or _binding(name) is not None
            reason = REFUSALS.get(getattr(F, name, None)) if not known else None
            if reason is not None:
                raise UnsupportedModel(f"node {n.name!r}: {n.target}: {reason}")
            if any(argument.is_out for argument in n.target._schema.arguments):
                raise UnsupportedModel(f"node {n.name!r}: {n.target} writes into another tensor")
            random = torch.Tag.nondeterministic_seeded in n.target.tags
            if (
                random and known and name not in SPELLED
            ):  # a rule sees only what depends on the input
                raise UnsupportedModel(f"node {n.name!r}: {n.target} is random")
            if n.target._schema.is_mutable and getattr(n.args[0], "op", "") == "get_attr":
                raise UnsupportedModel(
                    f"node {n.name!r}: {n.target} changes the program's own tensors, as in "
                    "training mode; export model.eval()"
                )
        if n.op != "call_function" or not known:
            raise UnsupportedModel(
                f"node {n.name!r}: no Lipschitz rule for {n.target} of a program; certify it as it "
                "was before run_decompositions(), or the module that it was exported from"
            )


def converted(graph: fx.Graph, values: Mapping[fx.Node, Any], batch: int | None) -> Conversion:
    """Write a graph of ATen operations with torch's functions.

    Args:
        graph: with one placeholder, the input, and one tensor as output.
        values: of its nodes on an example: their types and shapes are all that counts.
        batch: the size of the batch that it was made for; ``None`` where it takes any.

    Raises:
        UnsupportedModel: naming the node and the operation.
    """
    conversion = Conversion(values, batch)
    for n in graph.nodes:
        conversion.convert(n)
    conversion.put_maxmin()
    conversion.refuse_batch_numbers()
    conversion.graph.lint()
    return conversion


class Conversion:
    """A graph that is being written.

    Attributes:
        graph: of torch's functions; it reads the same attributes.
        made: by attribute, what is not the original's: constants that it makes each time, modules.
    """

    def __init__(self, values: Mapping[fx.Node, Any], batch: int | None) -> None:
        self.graph = fx.Graph()
        self.made: dict[str, Tensor | nn.Module] = {}
        self._values = values
        self._batch = batch
        self._written: dict[fx.Node, Any] = {}
        self._depends: set[fx.Node] = set()
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._input: fx.Node

    def convert(self, n: fx.Node) -> None:
        """Write one more node."""
        if n.op == "placeholder":
            self._input = self._written[n] = self.graph.placeholder("x")
            self._shapes[self._input] = tuple(self._values[n].shape)
            self._depends.add(n)
            return
        if any(used in self._depends for used in n.all_input_nodes):
            self._depends.add(n)
        if n.target is operator.getitem and not n.users:
            return
        args = fx.node.map_arg(n.args, self._of)
        kwargs = fx.node.map_arg(n.kwargs, self._of)
        if n.op == "get_attr":
            self._written[n] = self.graph.get_attr(str(n.target))
        elif n.op == "output":
            self.graph.output(args[0])
        elif n.target is operator.getitem and isinstance(args[0], tuple):
            index: Any = args[1]
            if args[0][index] is None:
                raise UnsupportedModel(f"node {n.name!r} uses where the maxima of a pool are")
            self._written[n] = args[0][index]
        elif not isinstance(n.target, torch._ops.OpOverload):
            function: Any = n.target
            self._written[n] = self.graph.call_function(function, args, kwargs)
        else:
            self._written[n] = self._operation(n, n.target, args, kwargs)
        written = self._written.get(n)
        if isinstance(written, fx.Node) and isinstance(self._values[n], Tensor):
            self._shapes[written] = tuple(self._values[n].shape)

    def _of(self, n: fx.Node) -> Any:
        return self._written[n]

    def _operation(self, n: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
        name = target._schema.name.removeprefix("aten::")
        if name in _DROPPED:
            return None
        if name in _FACTORIES:
            return self._factory(n, target, name)
        given = _bound(target, args, kwargs)
        if name in SPELLED:
            try:
                return SPELLED[name](self, n, given)
            except UnsupportedModel as refusal:
                raise UnsupportedModel(f"node {n.name!r} ({target}): {refusal}") from None
        binding = _binding(name)
        positional, named = _passed(target, args, kwargs)
        if name in _IN_PLACE:
            named["inplace"] = True
        if isinstance(binding, str):
            return self.graph.call_method(binding, positional, named)
        assert callable(binding)
        return self.graph.call_function(binding, positional, named)

    def _factory(self, n: fx.Node, target: Any, name: str) -> fx.Node:
        """A constant that is the same each time becomes one that is stored."""
        if n.all_input_nodes:
            raise UnsupportedModel(
                f"node {n.name!r}: {target} makes a tensor whose size depends on the batch"
            )
        attribute = f"made_{len(self.made)}"
        self.made[attribute] = target(*n.args, **n.kwargs)
        return self.graph.get_attr(attribute)

    def put_maxmin(self) -> None:
        """Write the sorting of pairs of channels, which is one operation to a rule, as one."""
        erased = set()
        for n in list(self.graph.nodes)[::-1]:  # the last of several reshapes first
            source = None if n in erased else source_of_pairs(n, self._shapes)
            if source is None:
                continue
            self.made["maxmin"] = MaxMin()
            with self.graph.inserting_before(n):
                whole = self.graph.call_module("maxmin", (source,))
                if self._shapes[source] != self._shapes[n]:
                    whole = self.graph.call_method("reshape", (whole, *n.args[1:]))
            n.replace_all_uses_with(whole)
            idle = [n]
            while idle:
                last = idle.pop()
                pure = last.op != "call_function" or last.target in PAIRING
                pure = pure and (last.op != "call_method" or last.target in ("view", "reshape"))
                if pure and not last.users and last is not source and last not in erased:
                    idle += last.all_input_nodes
                    self.graph.erase_node(last)
                    erased.add(last)

    def refuse_batch_numbers(self) -> None:
        """Refuse the size of the batch other than as the first size of a result.

        A program could compute something else for each size, which no example shows.
        """
        for n in reversed(self.graph.nodes):
            if n.target in _SIZES and not n.users:  # decompositions leave such
                self.graph.erase_node(n)
        for n in self.graph.nodes:
            if n.op != "call_method" or n.target != "size" or n.args[1] % self._axes(n.args[0]):
                continue
            for user in n.users:
                sizes = user.args[1] if len(user.args) == 2 else ()
                fits = user.op == "call_method" and user.target in ("view", "reshape", "expand")
                if not (fits and isinstance(sizes, (list, tuple)) and n not in sizes[1:]):
                    raise UnsupportedModel(
                        f"node {user.name!r} computes with the number of inputs in a batch"
                    )

    def _axes(self, n: fx.Node) -> int:
        return len(self._shapes[n])

    # What the spelled operations ask for.

    def call(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Write a call of a function, or of a method by its name."""
        if isinstance(function, str):
            return self.graph.call_method(function, args, kwargs)
        return self.graph.call_function(function, args, kwargs)

    def same(self, n: fx.Node) -> Any:
        """Write nothing: the node gives back its first argument."""
        source = n.args[0]
        assert isinstance(source, fx.Node)
        return self._written[source]

    def axes(self, n: fx.Node) -> int:
        """Number of axes of a node's first argument."""
        found: int = self.value(n).ndim
        return found

    def value(self, n: fx.Node) -> Tensor:
        """A node's first argument on the example."""
        source = n.args[0]
        assert isinstance(source, fx.Node)
        value = self._values[source]
        assert isinstance(value, Tensor)
        return value

    def sizes(self, n: fx.Node, sizes: Sequence[Any]) -> list[Any]:
        """Sizes of a result, the first of which may be that of the only batch it was made for."""
        first, *others = sizes
        if n in self._depends and self._batch is not None and first == self._batch:
            first = self.graph.call_method("size", (self._input, 0))
        return [first, *others]


def _bound(target: Any, args: Sequence[Any], kwargs: Given) -> dict[str, Any]:
    """Arguments by the names of the schema, defaults included."""
    schema = target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema}
    given.update(zip((argument.name for argument in schema), args, strict=False))
    given.update(kwargs)
    return given


def _passed(
    target: Any, args: Sequence[Any], kwargs: Given
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in the schema's order, as far as they are given, and those that need a name."""
    schema = target._schema.arguments
    given = _bound(target, args, kwargs)
    ordered = [argument.name for argument in schema if not argument.kwarg_only]
    last = max([len(args), *(ordered.index(name) + 1 for name in kwargs if name in ordered)])
    named = {name: value for name, value in kwargs.items() if name not in ordered}
    return (
        tuple(given[name] for name in ordered[:last]),
        {name: value for name, value in named.items() if value is not None},
    )


def _binding(name: str) -> object | None:
    """What torch has for an operation, if it has a rule or a refusal: a function, or a method."""
    if name in _IN_PLACE:
        return _PYTHON[name[:-1]]  # type: ignore[no-any-return]
    if name in _PYTHON:
        return _PYTHON[name]  # type: ignore[no-any-return]
    for home in (torch, torch._C._nn):
        function = getattr(home, name, None)
        plain = isinstance(function, types.BuiltinFunctionType)
        if plain and (function in RULES or function in REFUSALS):
            return function
    return name if name in RULES or name in REFUSALS else None


def is_about_types(target: Any) -> bool:
    """Whether an operation converts a tensor to a type, which is refused unless it has it already.

    Or it asserts what it is.
    """
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
    return name.removeprefix("aten::") in ("to", "_to_copy", "_assert_tensor_metadata")
