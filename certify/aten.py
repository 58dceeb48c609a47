"""From graphs of ATen operations, as ``torch.export`` makes them, to torch's functions with rules.

Most operations have a binding in torch that takes the very arguments of their schema; those with a
rule, or with a reason why there is none, are called by it. Others are spelled out here. What is not
known is refused before anything runs.
"""

from __future__ import annotations

import operator
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

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

_TRAINED = "the program was exported in training mode; export model.eval()"


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
            known = name in _DROPPED or name in _FACTORIES or name in _SPELLED
            known = known or _binding(name) is not None
            reason = REFUSALS.get(getattr(F, name, None)) if not known else None
            if reason is not None:
                raise UnsupportedModel(f"node {n.name!r}: {n.target}: {reason}")
            if any(argument.is_out for argument in n.target._schema.arguments):
                raise UnsupportedModel(f"node {n.name!r}: {n.target} writes into another tensor")
            random = torch.Tag.nondeterministic_seeded in n.target.tags
            if (
                random and known and name not in _SPELLED
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
        if name in _SPELLED:
            try:
                return _SPELLED[name](self, n, given)
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
            source = None if n in erased else _source_of_pairs(n, self._shapes)
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
                pure = last.op != "call_function" or last.target in _PAIRING
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


_Given = Mapping[str, Any]
_Spelled = Callable[[Conversion, fx.Node, _Given], Any]


def _bound(target: Any, args: Sequence[Any], kwargs: _Given) -> dict[str, Any]:
    """Arguments by the names of the schema, defaults included."""
    schema = target._schema.arguments
    given = {argument.name: argument.default_value for argument in schema}
    given.update(zip((argument.name for argument in schema), args, strict=False))
    given.update(kwargs)
    return given


def _passed(
    target: Any, args: Sequence[Any], kwargs: _Given
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


# The spelled operations.


def _batch_norm(c: Conversion, n: fx.Node, given: _Given) -> Any:
    """Also those of decompositions, whose other results are about training."""
    if given.get("training", False):
        raise UnsupportedModel(_TRAINED)
    result = c.call(
        F.batch_norm,
        given["input"],
        given["running_mean"],
        given["running_var"],
        given["weight"],
        given["bias"],
        False,
        given["momentum"],
        given["eps"],
    )
    return result if n.target is aten.batch_norm.default else (result, None, None)


def _convolution(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    axes = len(given["stride"])
    transposed = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
    plain = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
    if axes + 2 != c.axes(n):
        raise UnsupportedModel(f"stride {given['stride']} for {c.axes(n)} axes")
    first = (given["input"], given["weight"], given["bias"], given["stride"], given["padding"])
    if given["transposed"]:
        more = (given["output_padding"], given["groups"], given["dilation"])
        return c.call(transposed[axes], *first, *more)
    return c.call(plain[axes], *first, given["dilation"], given["groups"])


def _addmm(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    """A linear layer, which a rule of rounding knows."""
    if given["beta"] != 1 or given["alpha"] != 1:
        raise UnsupportedModel("a matrix product with beta or alpha")
    weight = c.call(torch.permute, given["mat2"], (1, 0))
    return c.call(F.linear, given["mat1"], weight, given["self"])


def _first_of(function: Any) -> _Spelled:
    def spelled(c: Conversion, n: fx.Node, given: _Given) -> Any:
        """A pool whose other result says where the maxima are."""
        return c.call(function, *given.values()), None

    return spelled


def _dropout(c: Conversion, n: fx.Node, given: _Given) -> Any:
    if given["train"]:
        raise UnsupportedModel(_TRAINED)
    return c.same(n)


def _rrelu(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    if given["training"]:
        raise UnsupportedModel(_TRAINED)
    return c.call(F.rrelu, given["self"], given["lower"], given["upper"])


def _same(c: Conversion, n: fx.Node, given: _Given) -> Any:
    return c.same(n)


def _cast(c: Conversion, n: fx.Node, given: _Given) -> Any:
    """To the type that the tensor has already; whatever rounds, or jumps, is refused."""
    found, wanted = c.value(n).dtype, given.get("dtype")
    if isinstance(given.get("other"), fx.Node):  # to.other
        raise UnsupportedModel("a conversion to the type of another tensor")
    if wanted not in (None, found):
        raise UnsupportedModel(
            f"it converts {found} to {wanted}, which is not certified: take it out of the model"
        )
    return c.same(n) if n.target is not aten._to_copy.default else _clone(c, n, given)


def is_about_types(target: Any) -> bool:
    """Whether an operation converts a tensor to a type, which is refused unless it has it already.

    Or it asserts what it is.
    """
    name = target._schema.name if isinstance(target, torch._ops.OpOverload) else ""
    return name.removeprefix("aten::") in ("to", "_to_copy", "_assert_tensor_metadata")


def _slice(c: Conversion, n: fx.Node, given: _Given) -> Any:
    axis = given["dim"] % c.axes(n)
    start, end, step = given["start"], given["end"], given["step"]
    size = c.value(n).shape[axis]
    if start in (None, 0) and step == 1 and (end is None or end == 2**63 - 1):
        return c.same(n)
    if isinstance(end, int) and end >= size and axis > 0:
        end = size
    whole = [slice(None)] * axis
    return c.call(operator.getitem, given["self"], (*whole, slice(start, end, step)))


def _reshape(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    if n.target is aten.view.dtype:
        raise UnsupportedModel("a view as another type")
    sizes = c.sizes(n, given["shape"] if "shape" in given else given["size"])
    method = "view" if n.target is aten.view.default else "reshape"
    return c.call(method, given["self"], sizes)


def _expand(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    return c.call("expand", given["self"], c.sizes(n, given["size"]))


def _transpose(c: Conversion, n: fx.Node, given: _Given) -> Any:
    if c.axes(n) != 2 and n.target is not aten.mT.default:
        raise UnsupportedModel(f"a transpose of {c.axes(n)} axes")
    return c.call(torch.transpose, given["self"], -2, -1)


def _split(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    sizes = given["split_sizes"] if "split_sizes" in given else given["split_size"]
    return c.call(torch.split, given["self"], sizes, given["dim"])


def _padded(mode: str) -> _Spelled:
    def spelled(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
        return c.call(F.pad, given["self"], given["padding"], mode)

    return spelled


def _pad(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    mode = given.get("mode", "constant")
    return c.call(F.pad, given["self"], given["pad"], mode, given["value"])


def _size(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    return c.call("size", given["self"], given["dim"])


def _elu(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    if given["scale"] != 1 or given["input_scale"] != 1:
        raise UnsupportedModel("an ELU with scales; nn.SELU is known")
    return c.call(F.elu, given["self"], given["alpha"])


def _clone(c: Conversion, n: fx.Node, given: _Given) -> fx.Node:
    form = given.get("memory_format")
    return c.call(torch.clone, given["self"], **({} if form is None else {"memory_format": form}))


_SPELLED: dict[str, _Spelled] = {
    "batch_norm": _batch_norm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "convolution": _convolution,
    "addmm": _addmm,
    "max_pool2d_with_indices": _first_of(torch.max_pool2d),
    "max_pool3d_with_indices": _first_of(torch.max_pool3d),
    "adaptive_max_pool1d": _first_of(F.adaptive_max_pool1d),
    "adaptive_max_pool2d": _first_of(F.adaptive_max_pool2d),
    "adaptive_max_pool3d": _first_of(F.adaptive_max_pool3d),
    "slice": _slice,
    "view": _reshape,
    "reshape": _reshape,
    "_unsafe_view": _reshape,
    "expand": _expand,
    **dict.fromkeys(("t", "mT", "numpy_T"), _transpose),
    "split": _split,
    "split_with_sizes": _split,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "sym_size": _size,
    "elu": _elu,
    "rrelu": _rrelu,
    "clone": _clone,
    "lift_fresh_copy": _clone,
    "to": _cast,
    "_to_copy": _cast,
    **dict.fromkeys(("detach", "detach_", "alias", "lift_fresh", "contiguous"), _same),
    **{
        name + end: _dropout
        for name in ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout")
        for end in ("", "_")
    },
    **{f"reflection_pad{axes}d": _padded("reflect") for axes in (1, 2, 3)},
    **{f"replication_pad{axes}d": _padded("replicate") for axes in (1, 2, 3)},
}


def _source_of_pairs(n: fx.Node, shapes: Mapping[fx.Node, tuple[int, ...]]) -> fx.Node | None:
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


_PAIRING = (torch.stack, torch.cat, torch.unsqueeze, torch.maximum, torch.minimum, torch.select)
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
