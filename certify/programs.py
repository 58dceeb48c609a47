"""Programs of ``torch.export`` as modules that can be traced.

A program is a graph of ATen operations. It is written again with the functions of torch that have
Lipschitz rules (`certify.aten`), and the two are compared on examples, in the program's own
precision and in float64.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from certify.aten import converted, is_about_types, refuse_unknown
from certify.signal import UnsupportedModel
from certify.tracing import BATCH, agree, example_of, without_tf32

_DYNAMIC = (
    "export it with a batch of any size: torch.export.export(model, (x,), "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))"
)


LARGEST_INPUT = 2**26
_LARGEST = 2**29
"""Entries of an example, and of all that a program computes and keeps at a time on examples.

A hostile file shall not ask for all memory.
"""

_ONE_SIZE = (
    "export it with a batch of any size, without limits, and all other sizes fixed: "
    "dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)"
)


@dataclass(frozen=True)
class Program:
    """A network as a graph of ATen operations.

    Attributes:
        graph: one placeholder, the input; ``get_attr`` for tensors; calls of operations; one tensor
            as output.
        tensors: parameters, buffers and constants, by the names that the graph has for them.
        shape: of the input, batch first; ``None`` for a size that may vary.
        dtype: of the input.
        reference: what else computes the program on a batch, to be compared with it.
        limits: by axis, the smallest and the largest size that one that may vary may have.
        batches: other sizes of a batch that the reference takes, where it takes any.
    """

    graph: fx.Graph
    tensors: Mapping[str, Tensor]
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    reference: Callable[[Tensor], Tensor] | None = None
    limits: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    batches: tuple[int, ...] = ()

    def input_shape(self, given: Sequence[int] | None = None) -> tuple[int, ...]:
        """Shape of one input, without the batch.

        Args:
            given: what the caller takes it for; needed where a size may vary.

        Raises:
            ValueError: another one than the program's, or none where it is needed.
        """
        sizes = self.shape[1:]
        if given is None:
            if None in sizes:
                raise ValueError(
                    f"pass the input shape: the program takes inputs {_listed(self.shape)}"
                )
            return tuple(size for size in sizes if size is not None)
        fits = len(given) == len(sizes) and all(
            size in (None, other) for size, other in zip(sizes, given, strict=True)
        )
        if not fits:
            raise ValueError(
                f"the program takes inputs {_listed(self.shape)}, not of shape {tuple(given)}"
            )
        for axis, (low, high) in self.limits.items():
            if axis and not low <= given[axis - 1] <= high:
                raise ValueError(
                    f"the program was exported for sizes of {low} to {high} along axis {axis}, "
                    f"not {given[axis - 1]}"
                )
        return tuple(given)


def refuse_size(shape: Sequence[int]) -> None:
    """Refuse inputs without entries, or with far too many.

    Raises:
        ValueError: so it is.
    """
    if min(shape) < 1 or math.prod(shape) > LARGEST_INPUT:
        raise ValueError(f"the program takes inputs of shape {tuple(shape)}")


def open_shape(
    sizes: Sequence[int | str], ranges: Mapping[str, tuple[float, float]], guards: Sequence[str]
) -> tuple[tuple[int | None, ...], dict[int, tuple[float, float]]]:
    """Shape and limits of a program.

    Args:
        sizes: of its input; names for those that may vary.
        ranges: of these names.
        guards: what else the program supposes about sizes.

    Raises:
        UnsupportedModel: it may compute something else than its model for some batches. The graph
            is one of several, for instance for batches of at least 4, but would run on others.
    """
    if not sizes:
        raise UnsupportedModel("the program takes a single number, not a batch")
    names = {axis: size for axis, size in enumerate(sizes) if isinstance(size, str)}
    limits = {axis: ranges[name] for axis, name in names.items() if name in ranges}
    low, high = limits.get(0, (0, math.inf))
    if low > 2 or high < 2**31:
        raise UnsupportedModel(
            f"the program takes batches of {low} to {high} only, in which its model may compute "
            f"something of its own; {_ONE_SIZE}"
        )
    if guards or len(limits) < len(names) or len(set(names.values())) < len(names):
        raise UnsupportedModel(f"the program supposes something about sizes; {_ONE_SIZE}")
    return tuple(size if isinstance(size, int) else None for size in sizes), limits


def read(program: ExportedProgram) -> Program:
    """Take a program of ``torch.export`` apart.

    Raises:
        UnsupportedModel: other than one tensor as input and one as result, or tensors that it
            changes.
    """
    signature = program.graph_signature
    outputs = [spec.kind for spec in signature.output_specs]
    refuse_signature(
        [spec.kind is InputKind.USER_INPUT for spec in signature.input_specs].count(True),
        [kind is OutputKind.USER_OUTPUT for kind in outputs],
    )
    graph, tensors, names = fx.Graph(), {}, Names()
    specs = {
        spec.arg.name: spec
        for spec in signature.input_specs
        if isinstance(spec.arg, TensorArgument)
    }
    listed = [(spec.arg.name, spec.kind) for spec in signature.input_specs]
    results = [spec.arg.name for spec in signature.output_specs]
    nodes = list(program.graph.nodes)
    found = [n.name for n in nodes if n.op == "placeholder"]
    returned = [getattr(n, "name", None) for n in nodes[-1].args[0]]
    if [name for name, _ in listed] != found or results != returned:
        raise UnsupportedModel("the graph has other inputs or results than its signature says")
    stored = {"weights": program.state_dict, "constants": program.constants}
    copies: dict[fx.Node, fx.Node] = {}
    example: Any = None
    for n in program.graph.nodes:
        if n.op == "placeholder":
            spec = specs.get(n.name)
            if spec is None or spec.kind is InputKind.USER_INPUT:
                copies[n] = graph.placeholder("x")
                example = n.meta["val"]
            elif n.users:
                place = place_of(spec.kind.name.lower(), spec.persistent)
                value = stored[place].get(str(spec.target))
                if not isinstance(value, Tensor):
                    raise UnsupportedModel(f"{spec.target!r} of the program is not a tensor")
                name = names.attribute(str(spec.target))
                tensors[name] = value.detach().clone()
                copies[n] = graph.get_attr(name)
        elif n.op == "output":
            graph.output(copies[n.args[0][0]])
        elif n.op == "get_attr":
            raise UnsupportedModel(f"node {n.name!r}: a part of the program with a mode of its own")
        else:
            copies[n] = graph.node_copy(n, copies.__getitem__)
    if not isinstance(example, Tensor):
        raise UnsupportedModel(_ONE_INPUT)
    shape, limits = open_shape(
        [size if isinstance(size, int) else str(size) for size in example.shape],
        {
            str(name): (_bound(values.lower, -math.inf), _bound(values.upper, math.inf))
            for name, values in program.range_constraints.items()
        },
        getattr(program, "_guards_code", None) or [],  # since torch 2.9
    )
    return Program(graph, tensors, shape, example.dtype, lambda x: program.module()(x), limits)


def _bound(bound: Any, infinite: float) -> float:
    """A number of sympy's, which torch extends by an infinite one of its own."""
    return int(bound) if bound.is_Integer else infinite


KINDS = ("parameter", "buffer", "tensor_constant")
"""Of tensors that a program brings."""


def place_of(kind: str, persistent: bool | None) -> str:
    """Where torch keeps a tensor of a program: a name may be in both places."""
    weight = kind == "parameter" or (kind == "buffer" and persistent)
    return "weights" if weight else "constants"


_ONE_INPUT = "expected a program with one tensor as input and one as result"


def refuse_signature(inputs: int, plain: Sequence[bool]) -> None:
    """Refuse programs with other than one input and one result.

    Args:
        inputs: how many the caller gives.
        plain: of each result, whether the caller gets it; others are assigned to buffers.

    Raises:
        UnsupportedModel: so it is.
    """
    if not all(plain):
        raise UnsupportedModel(
            "the program changes its own tensors, as in training mode; export model.eval()"
        )
    if inputs != 1 or len(plain) != 1:
        raise UnsupportedModel(_ONE_INPUT)


class Names:
    """Names of attributes, none twice, in which nothing of a file is code."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def attribute(self, name: str) -> str:
        """A name like this one for an attribute of a module."""
        plain = found = "stored_" + re.sub(r"[^0-9A-Za-z_]", "_", name)
        count = 1
        while found in self._used:
            count += 1
            found = f"{plain}__{count}"
        self._used.add(found)
        return found


def module_of(
    program: ExportedProgram | Program, input_shape: Sequence[int] | None = None
) -> nn.Module:
    """Write a program as a module that can be traced and certified.

    Args:
        program: in evaluation mode, that maps one tensor ``(N, *input_shape)`` to one tensor.
        input_shape: shape of one input; not needed unless the program takes several.

    Returns:
        A module in evaluation mode for batches of any size. It has the program's own tensors.

    Raises:
        UnsupportedModel: an operation that is not known here, or a program that computes something
            else for several inputs than for each.
        ValueError: an input shape that does not fit.
    """
    if not isinstance(program, Program):
        program = read(program)
    shape = program.input_shape(input_shape)
    if not program.dtype.is_floating_point:
        raise UnsupportedModel(f"the program takes inputs of {program.dtype}")
    refuse_unknown(program.graph)
    batch = program.shape[0]
    refuse_size((BATCH if batch is None else batch, *shape))
    device = next((t.device for t in program.tensors.values()), torch.device("cpu"))
    example = _whole(example_of(shape).to(device, program.dtype), batch)
    with torch.no_grad(), without_tf32():
        shapes = _Shapes(program)
        _run(shapes.run, example[:batch].to("meta"))
        expected = _run(_Interpreter(program).in_parts, example)
        conversion = converted(program.graph, shapes.values, batch)
        module = _module({**program.tensors, **conversion.made}, conversion.graph)
        exact = example.to(torch.float64)
        doubled = _module(
            {name: _doubled(t) for name, t in {**program.tensors, **conversion.made}.items()},
            conversion.graph,
        )
        run = program.reference
        others = [
            (_try(module, part), _try(run, part))
            for part in (_cycled(example.flip(0), size) for size in program.batches)
            if run is not None
        ]
        alone = _try(module, example[-1:])
        for found, wanted in (
            (_try(module, example), expected),
            (alone, alone),  # that it runs; what it computes is compared once it is traced
            (_try(doubled, exact), _try(_Interpreter(program, torch.float64).in_parts, exact)),
            *others,
        ):
            if found is None or wanted is None or not agree(found, wanted):
                raise UnsupportedModel(
                    "the program does not compute for a batch what it does for each input"
                    + ("" if batch is None or program.batches else f": {_DYNAMIC}")
                )
        if run is not None:
            other = _run(lambda x: _in_parts(run, x, batch), example)
            if not agree(expected, other):
                raise UnsupportedModel("what was read of the program computes something else")
    return module


def _whole(example: Tensor, batch: int | None) -> Tensor:
    """Repeat samples, so that they come in batches of the only size that a program takes."""
    if batch is None:
        return example
    return _cycled(example, -(-len(example) // max(1, batch)) * batch)


def _cycled(example: Tensor, count: int) -> Tensor:
    return example[torch.arange(count, device=example.device) % len(example)]


def _in_parts(run: Any, x: Tensor, batch: int | None) -> Any:
    """Run a program, on batches of the only size that it takes."""
    if batch is None:
        return run(x.clone())
    return torch.cat([run(part.clone()) for part in x.split(batch)])


def _run(run: Any, x: Tensor) -> Tensor:
    try:
        result = run(x)
    except UnsupportedModel:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"the program does not run on inputs of shape {tuple(x.shape[1:])}: {reason}"
        ) from error
    if not isinstance(result, Tensor) or not result.is_floating_point():
        raise UnsupportedModel("the program must return one tensor of real numbers")
    return result


def _try(run: Any, x: Tensor) -> Tensor | None:
    """Run on a copy; ``None`` where that fails."""
    if isinstance(run, fx.GraphModule):  # which would print where in its code
        interpreter = fx.Interpreter(run)
        interpreter.extra_traceback = False
        run = interpreter.run
    try:
        result = run(x.clone())
    except Exception:  # of any of torch's operations
        return None
    return result if isinstance(result, Tensor) else None


def _module(attributes: Mapping[str, Tensor | nn.Module], graph: fx.Graph) -> nn.Module:
    """A module of a graph; tensors of real numbers are its parameters."""
    named = {
        name: nn.Parameter(value, requires_grad=False)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in attributes.items()
    }
    return fx.GraphModule(named, graph, class_name="ExportedProgram").eval()


def _doubled(value: Tensor | nn.Module) -> Tensor | nn.Module:
    return value.double() if isinstance(value, nn.Module) or value.is_floating_point() else value


class _Shapes(fx.Interpreter):
    """Runs a program without values, and notes the types and shapes of its nodes."""

    def __init__(self, program: Program) -> None:
        holder = nn.Module()
        for name, tensor in program.tensors.items():
            holder.register_buffer(name, tensor.to("meta"))
        super().__init__(holder, graph=program.graph)
        self.extra_traceback = False
        self.values: dict[fx.Node, Any] = {}
        self._made = 0

    def run_node(self, n: fx.Node) -> Any:
        """Note the value; refuse to keep too many of them."""
        self.values[n] = result = super().run_node(n)
        computed = [value for m, value in self.env.items() if m.op == "call_function"]
        if n.op == "call_function" and not n.all_input_nodes:
            self._made += _entries(result)  # and is kept
        if self._made + _entries([*computed, result]) > _LARGEST:
            raise UnsupportedModel(
                f"node {n.name!r}: {n.target} of a program that takes too much memory"
            )
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation where there are no values."""
        meta = torch.device("meta")
        args = tuple(meta if isinstance(each, torch.device) else each for each in args)
        schema = target._schema.arguments if isinstance(target, torch._ops.OpOverload) else ()
        if any(each.name == "device" and each.kwarg_only for each in schema):
            kwargs = {**kwargs, "device": meta}
        return super().call_function(target, args, kwargs)


def _entries(values: Any) -> int:
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(math.prod(tensor.shape) for tensor in tensors)


class _Interpreter(fx.Interpreter):
    """Runs a program's own operations.

    Args:
        program: whose tensors are copied, as they could be written to.
        dtype: what real numbers are converted to, if not left as they are. Conversions between
            types, which may then only be those that do nothing in the program, do nothing.
    """

    def __init__(self, program: Program, dtype: torch.dtype | None = None) -> None:
        holder = nn.Module()
        for name, tensor in program.tensors.items():
            real = tensor.is_floating_point()
            holder.register_buffer(name, tensor.to(dtype if real else None, copy=True))
        super().__init__(holder, graph=program.graph)
        self.extra_traceback = False
        self._batch = program.shape[0]
        self._converted = dtype is not None

    def in_parts(self, x: Tensor) -> Any:
        """Run on the batches that the program takes."""
        return _in_parts(self.run, x, self._batch)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Run an operation."""
        if self._converted and is_about_types(target):
            return args[0].clone() if target is torch.ops.aten._to_copy.default else args[0]
        return super().call_function(target, args, kwargs)


def _listed(shape: Sequence[int | None]) -> str:
    return f"({', '.join('any' if size is None else str(size) for size in shape)})"
