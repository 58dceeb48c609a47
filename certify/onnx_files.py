"""ONNX files as programs.

An ONNX graph is written with ATen operations while their results' shapes are found, so that what it
computes from sizes is known. Then it is treated as a program of ``torch.export``, and compared with
the reference implementation that the package ``onnx`` has of every operation.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from certify.checkpoints import CheckpointError
from certify.programs import LARGEST_INPUT, Names, Program, refuse_signature, refuse_size
from certify.signal import UnsupportedModel

aten = torch.ops.aten

_BATCH = 5
"""Of the example, where a graph takes any."""

_DOMAINS = ("", "ai.onnx")
_OLDEST = 7  # before it, axes were aligned otherwise, and training was the default

_OTHER_BATCHES = (1, 2, 7)
"""On which it must compute the same."""

_REALS = {1: torch.float32, 10: torch.float16, 11: torch.float64}
_MOVES = {
    "Constant", "Identity", "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Slice",
    "Gather", "Concat", "ConstantOfShape",
}  # fmt: skip
_MOVES_OF_SIZES = _MOVES - {"Constant", "ConstantOfShape"} | {"Cast"}

_ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Cast", "Neg", "Range", "ReduceProd"}
"""On whole numbers, as sizes are."""


def is_onnx(path: str | Path) -> bool:
    """Whether a file's name says that it holds an ONNX graph."""
    return Path(path).suffix == ".onnx"


def read_onnx(path: str | Path, input_shape: Sequence[int] | None = None) -> Program:
    """Read a network from an ONNX file; nothing in it is executed.

    Args:
        path: the file; tensors may be in others beside it.
        input_shape: shape of one input; needed where the file leaves sizes open.

    Raises:
        CheckpointError: no such file, or a damaged one, or the package ``onnx`` is missing.
        UnsupportedModel: operations other than those of plain networks.
        ValueError: an input shape that does not fit.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"no ONNX file at {path}")
    try:
        import onnx
    except ImportError as error:
        raise CheckpointError(
            f"reading {path} takes one more package: pip install onnx; or export the PyTorch "
            "model with torch.export.save(torch.export.export(model, ...), 'net.pt2')"
        ) from error
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # of protobuf, and of the checker
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} is not an ONNX file, or it is damaged: {reason}") from error
    if model.functions:  # they can replace any operation
        raise UnsupportedModel("the file has functions of its own; inline them when you export")
    versions = [e.version for e in model.opset_import if e.domain in _DOMAINS]
    if len(versions) != 1 or versions[0] < _OLDEST:
        raise UnsupportedModel(
            f"the file is of opset {versions} of ONNX; only {_OLDEST} and later are known"
        )
    reader = _Reader(model, input_shape)
    try:
        reader.load()
        for node in model.graph.node:
            reader.add(node)
        output = reader.tensor(model.graph.output[0].name)
    except UnsupportedModel:
        raise
    except Exception as error:  # of any operation on arguments that it does not take
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    reader.graph.output(output.node)
    shape, dtype = reader.shape, reader.example.dtype

    def reference(x: Tensor) -> Tensor:
        (found,) = _evaluator(model).run(None, {reader.input: x.cpu().numpy()})
        return torch.from_numpy(np.asarray(found)).to(x.device)

    others = _OTHER_BATCHES if reader.any_batch else ()
    return Program(reader.graph, reader.tensors, shape, dtype, reference, batches=others)


def _evaluator(model: Any) -> Any:
    """Make the reference implementation.

    Before opset 14, its normalisation goes by the batch, as in training: it is written anew.
    """
    from onnx.reference import ReferenceEvaluator
    from onnx.reference.op_run import OpRun

    class BatchNormalization(OpRun):
        op_domain = ""

        def _run(self, x: Any, *parameters: Any, epsilon: float, **others: Any) -> tuple[Any]:
            aligned = (p.reshape(-1, *[1] * (x.ndim - 2)) for p in parameters)
            scale, offset, mean, variance = aligned
            result = scale * (x - mean) / np.sqrt(variance + epsilon) + offset
            return (result.astype(x.dtype),)

    return ReferenceEvaluator(model, new_ops=[BatchNormalization])


@dataclass(frozen=True, eq=False)
class _Value:
    """A tensor of the network: its node, and one of the shape and type that it has."""

    node: fx.Node
    value: Any


@dataclass(frozen=True, eq=False)
class _Sizes:
    """Whole numbers, and which of them are the size of the batch: 1 where they are, else 0."""

    numbers: Any
    batch: Any


def _sizes(numbers: Any, batch: Any) -> Any:
    return _Sizes(numbers, batch) if np.any(batch) else numbers


def _any_sizes(values: Sequence[Any]) -> bool:
    return any(isinstance(value, _Sizes) for value in values)


def _size(kind: str, given: Sequence[Any]) -> int:
    """How many entries a constant may have at most."""
    if kind == "ConstantOfShape":
        return math.prod(int(size) for size in given[0].ravel())
    if kind == "Range":
        start, end, step = (int(each) for each in given)
        return abs(end - start) // abs(step)
    if kind == "Concat":
        return sum(int(each.size) for each in given)
    if kind == "Gather" or kind in _ARITHMETIC:
        return math.prod(int(each.size) for each in given)
    return 0  # the entries of one


def _plain(value: Any) -> Any:
    """A constant; its value on the example says nothing if it is the size of the batch."""
    if isinstance(value, _Sizes):
        raise UnsupportedModel("it computes with the number of inputs in a batch")
    return value


class _Reader:
    """Writes an ONNX graph with ATen operations."""

    def __init__(self, model: Any, input_shape: Sequence[int] | None) -> None:
        self.graph, self.tensors, self._names = fx.Graph(), dict[str, Tensor](), Names()
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._versions = {entry.domain: entry.version for entry in model.opset_import}
        given = [entry for entry in model.graph.input if entry.name not in self._stored]
        refuse_signature(len(given), [True] * len(model.graph.output))
        self.input: str = given[0].name
        kind = given[0].type.tensor_type
        sizes = tuple(d.dim_value or None for d in kind.shape.dim)
        dtype = _REALS.get(kind.elem_type)
        if dtype is None or not sizes:
            raise UnsupportedModel("expected a network that takes a batch of real numbers")
        self.any_batch = sizes[0] is None
        self.shape = (sizes[0] or _BATCH, *_filled(sizes, input_shape))
        refuse_size(self.shape)
        self.example = torch.zeros(self.shape, dtype=dtype, device="meta")  # no values are needed
        self._known: dict[str, Any] = {
            self.input: _Value(self.graph.placeholder("x"), self.example),
        }

    def load(self) -> None:
        """Take the tensors that are stored."""
        from onnx import numpy_helper

        for name, tensor in self._stored.items():
            self._known[name] = numpy_helper.to_array(tensor)

    def add(self, node: Any) -> None:
        """Write one node."""
        kind = node.op_type
        if node.domain not in _DOMAINS:
            raise UnsupportedModel(f"node {node.name!r}: {node.domain}.{kind}")
        inputs = [self._known[name] if name else None for name in node.input]
        if kind == "Shape" and isinstance(inputs[0], _Value) and not node.attribute:
            numbers = np.array(inputs[0].value.shape, dtype=np.int64)
            # A rule sees to it that only the first size of a tensor depends on the batch.
            results: Any = _sizes(numbers, (np.arange(len(numbers)) == 0).astype(np.int64))
        elif not any(isinstance(value, _Value) for value in inputs):
            results = self._constant(node, inputs)
        elif kind in _OPERATIONS:
            options = {a.name: _attribute(a) for a in node.attribute}
            try:
                results = _OPERATIONS[kind](self, _Call(self, inputs, options, len(node.output)))
            except UnsupportedModel as refusal:
                raise UnsupportedModel(f"node {node.name!r} ({kind}): {refusal}") from None
        else:
            raise UnsupportedModel(
                f"node {node.name!r}: {kind} of ONNX is not known here; export the PyTorch model "
                "with torch.export"
            )
        several = results if isinstance(results, list) else [results]
        self._known.update(zip(node.output, several, strict=False))

    def _constant(self, node: Any, inputs: list[Any]) -> Any:
        """What does not depend on the input: entries that are moved, and arithmetic of sizes."""
        from onnx.reference import ReferenceEvaluator

        if _any_sizes(inputs):
            return self._moved(node, inputs)
        feeds = {name: value for name, value in zip(node.input, inputs, strict=True) if name}
        whole = all(np.asarray(value).dtype.kind in "iub" for value in feeds.values())
        if node.op_type not in _MOVES and not (whole and node.op_type in _ARITHMETIC):
            raise UnsupportedModel(
                f"node {node.name!r}: {node.op_type} computes constants, which are rounded each "
                "time; fold them when you export"
            )
        if _size(node.op_type, [np.asarray(value) for value in feeds.values()]) > LARGEST_INPUT:
            raise UnsupportedModel(f"node {node.name!r}: {node.op_type} makes too large a tensor")
        found: Any = ReferenceEvaluator(node, opsets=self._versions).run(None, feeds)
        return found if len(found) > 1 else found[0]

    def _moved(self, node: Any, inputs: list[Any]) -> Any:
        """Sizes that are moved, and where that of the batch goes; nothing is computed with it."""
        others = [] if node.op_type == "Concat" else inputs[1:]
        whole = node.op_type != "Cast" or node.attribute[0].i == 7  # to int64
        if node.op_type not in _MOVES_OF_SIZES or not whole or _any_sizes(others):
            raise UnsupportedModel(
                f"node {node.name!r}: {node.op_type} computes with the number of inputs in a batch"
            )
        moved = inputs[: len(inputs) - len(others)]
        numbers = [value.numbers if isinstance(value, _Sizes) else value for value in moved]
        batch = [value.batch if isinstance(value, _Sizes) else value * 0 for value in moved]
        return _sizes(
            *(self._constant(node, [*values, *others]) for values in (numbers, batch)),
        )

    def constant(self, value: Any) -> _Value:
        """A constant as a tensor that is stored."""
        if np.asarray(value).dtype.kind not in "iubf":  # among others, bfloat16
            raise UnsupportedModel(f"constants of {np.asarray(value).dtype}")
        tensor = torch.from_numpy(np.array(value))
        name = self._names.attribute(f"constant_{len(self.tensors)}")
        self.tensors[name] = tensor
        return _Value(self.graph.get_attr(name), tensor.to("meta"))

    def tensor(self, name: str) -> _Value:
        """A tensor by its name."""
        return self.stored(self._known[name])

    def stored(self, value: Any) -> _Value:
        """A value as a tensor."""
        return value if isinstance(value, _Value) else self.constant(_plain(value))

    def call(self, operation: Any, *args: Any) -> _Value:
        """Write an operation, and find its result's shape."""
        nodes, values = (
            [_unwrapped(argument, part) for argument in args] for part in ("node", "value")
        )
        return _Value(self.graph.call_function(operation, tuple(nodes)), operation(*values))


def _unwrapped(argument: Any, part: str) -> Any:
    if isinstance(argument, list):
        return [_unwrapped(each, part) for each in argument]
    return getattr(argument, part) if isinstance(argument, _Value) else argument


def _filled(sizes: Sequence[int | None], given: Sequence[int] | None) -> tuple[int, ...]:
    """Sizes behind the batch's, those that are open as the caller says."""
    wanted = sizes[1:] if given is None else given
    fits = len(wanted) == len(sizes) - 1 and all(
        size in (None, other) for size, other in zip(sizes[1:], wanted, strict=True)
    )
    listed = tuple("any" if size is None else size for size in sizes)
    if not fits:
        raise ValueError(f"the network takes inputs {listed}, not of shape {tuple(wanted)}")
    found = tuple(size for size in wanted if size is not None)
    if len(found) < len(wanted):
        raise ValueError(f"pass the input shape: the network takes inputs {listed}")
    return found


def _attribute(attribute: Any) -> Any:
    from onnx import helper

    value = helper.get_attribute_value(attribute)
    return value.decode() if isinstance(value, bytes) else value


class _Call:
    """A node's arguments: ``x`` is the first, a tensor; others may be constants."""

    def __init__(
        self, reader: _Reader, inputs: list[Any], options: dict[str, Any], results: int
    ) -> None:
        self._reader = reader
        self.inputs = inputs
        self._options = options
        self.results = results

    @property
    def x(self) -> _Value:
        """The first input."""
        return self.tensor(0)

    @property
    def axes(self) -> int:
        """Number of axes of the first input."""
        found: int = self.x.value.ndim
        return found

    def tensor(self, index: int) -> _Value:
        """An input as a tensor."""
        value = self.inputs[index]
        if value is None:
            raise UnsupportedModel(f"input {index} is missing")
        return self._reader.stored(value)

    def tensors(self) -> list[_Value]:
        """All inputs as tensors."""
        return [self.tensor(index) for index in range(len(self.inputs))]

    def array(self, index: int) -> Any:
        """An input that must be a constant; ``None`` if it is left out."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if isinstance(value, _Value):
            raise UnsupportedModel(f"input {index} depends on the network's input")
        return _plain(value)

    def sizes(self, index: int) -> list[int]:
        """An input that is the sizes of a result, the first of which may be the batch's."""
        value = self.inputs[index]
        if isinstance(value, _Sizes) and not value.batch[1:].any():
            value = value.numbers
        found: list[int] = np.asarray(_plain(value)).tolist()
        return found

    def option(self, name: str, default: Any = None, index: int | None = None) -> Any:
        """An attribute, or the input that stands for it in newer versions of ONNX."""
        value = None if index is None else self.array(index)
        if value is not None:
            return np.asarray(value).tolist()
        return self._options.get(name, default)

    def plain(self, **expected: Any) -> None:
        """Refuse attributes other than these."""
        for name, value in expected.items():
            found = self._options.get(name, value)
            if found != value:
                raise UnsupportedModel(f"{name}={found}")


_Operation = Callable[[_Reader, _Call], Any]


def _simple(operation: Any, *options: tuple[str, float]) -> _Operation:
    def written(r: _Reader, c: _Call) -> _Value:
        return r.call(operation, *c.tensors(), *(c.option(*option) for option in options))

    return written


def _conv(r: _Reader, c: _Call) -> _Value:
    c.plain(auto_pad="NOTSET")
    axes, x = c.axes - 2, c.x
    ones = [1] * axes
    pads = c.option("pads", [0] * 2 * axes)
    if pads[:axes] != pads[axes:]:
        x = r.call(aten.constant_pad_nd.default, x, _reversed(pads), 0.0)
        pads = [0] * 2 * axes
    bias = c.tensor(2) if len(c.inputs) > 2 and c.inputs[2] is not None else None
    operation = {1: aten.conv1d, 2: aten.conv2d, 3: aten.conv3d}[axes].default
    strides, dilations = c.option("strides", ones), c.option("dilations", ones)
    return r.call(
        operation, x, c.tensor(1), bias, strides, pads[:axes], dilations, c.option("group", 1)
    )


def _reversed(pads: Sequence[int]) -> list[int]:
    """Amounts before all axes and behind them, as torch takes them: the last axis first."""
    half = len(pads) // 2
    pairs = list(zip(pads[:half], pads[half:], strict=True))
    return list(itertools.chain.from_iterable(reversed(pairs)))


def _gemm(r: _Reader, c: _Call) -> _Value:
    c.plain(alpha=1.0, beta=1.0, transA=0)
    weight = c.array(1)
    bias = c.array(2)
    weight = weight if c.option("transB", 0) else weight.T
    if bias is not None:
        bias = r.constant(np.broadcast_to(bias, (1, weight.shape[0])).reshape(-1))
    return r.call(aten.linear.default, c.x, r.constant(weight), bias)


def _matmul(r: _Reader, c: _Call) -> _Value:
    weight = c.array(1)
    if np.ndim(weight) != 2:
        raise UnsupportedModel("a product other than with a constant matrix")
    return r.call(aten.linear.default, c.x, r.constant(weight.T))


def _batch_norm(r: _Reader, c: _Call) -> _Value:
    c.plain(training_mode=0, spatial=1)
    x, scale, offset, mean, variance = c.tensors()
    epsilon = c.option("epsilon", 1e-5)
    return r.call(
        aten.batch_norm.default, x, scale, offset, mean, variance, False, 0.1, epsilon, False
    )


def _pool(r: _Reader, c: _Call) -> tuple[Any, ...]:
    c.plain(auto_pad="NOTSET", storage_order=0)
    axes = c.axes - 2
    pads = c.option("pads", [0] * 2 * axes)
    if pads[:axes] != pads[axes:]:
        raise UnsupportedModel(f"pads={pads}")
    return c.option("kernel_shape"), c.option("strides", [1] * axes), pads[:axes]


def _max_pool(r: _Reader, c: _Call) -> _Value:
    operation = {3: aten.max_pool1d, 4: aten.max_pool2d, 5: aten.max_pool3d}[c.axes].default
    dilations = c.option("dilations", [1] * (c.axes - 2))
    if c.results > 1:
        raise UnsupportedModel("indices")
    return r.call(operation, c.x, *_pool(r, c), dilations, bool(c.option("ceil_mode", 0)))


def _average_pool(r: _Reader, c: _Call) -> _Value:
    c.plain(dilations=[1] * (c.axes - 2))
    operation = {3: aten.avg_pool1d, 4: aten.avg_pool2d, 5: aten.avg_pool3d}[c.axes].default
    rest = bool(c.option("ceil_mode", 0)), bool(c.option("count_include_pad", 0))
    return r.call(operation, c.x, *_pool(r, c), *rest)


def _over_all(operation: Any) -> _Operation:
    def written(r: _Reader, c: _Call) -> _Value:
        return r.call(operation, c.x, list(range(2, c.axes)), True)

    return written


def _reduction(operation: Any) -> _Operation:
    def written(r: _Reader, c: _Call) -> _Value:
        axes = c.option("axes", index=1)
        if axes is None:
            raise UnsupportedModel("without axes")
        return r.call(operation, c.x, axes, bool(c.option("keepdims", 1)))

    return written


def _clip(r: _Reader, c: _Call) -> _Value:
    return r.call(aten.clamp.default, c.x, c.option("min", index=1), c.option("max", index=2))


def _pairwise(operation: Any) -> _Operation:
    def written(r: _Reader, c: _Call) -> _Value:
        first, *others = c.tensors()
        for other in others:
            first = r.call(operation, first, other)
        return first

    return written


def _prelu(r: _Reader, c: _Call) -> _Value:
    slopes = c.array(1)
    aligned = (1,) * (c.axes - slopes.ndim) + slopes.shape  # as ONNX does: the last axis first
    if math.prod(aligned) not in (1, aligned[1] if len(aligned) > 1 else 1):
        raise UnsupportedModel("slopes that differ within a channel")
    return r.call(aten.prelu.default, c.x, r.constant(slopes.reshape(-1)))


def _same(r: _Reader, c: _Call) -> _Value:
    return c.x


def _dropout(r: _Reader, c: _Call) -> _Value:
    if len(c.inputs) > 2 and bool(c.array(2)):
        raise UnsupportedModel("it is in training mode")
    return c.x


def _cast(r: _Reader, c: _Call) -> _Value:
    if _REALS.get(c.option("to")) != c.x.value.dtype:
        raise UnsupportedModel("a conversion to another type")
    return c.x


def _flatten(r: _Reader, c: _Call) -> _Value:
    if c.option("axis", 1) % c.axes != 1:
        raise UnsupportedModel(f"axis={c.option('axis')}")
    return r.call(aten.flatten.using_ints, c.x, 1)


def _reshape(r: _Reader, c: _Call) -> _Value:
    sizes = c.sizes(1)
    if not c.option("allowzero", 0):
        sizes = [s or c.x.value.shape[axis] for axis, s in enumerate(sizes)]
    return r.call(aten.reshape.default, c.x, sizes)


def _transpose(r: _Reader, c: _Call) -> _Value:
    return r.call(aten.permute.default, c.x, c.option("perm", list(range(c.axes))[::-1]))


def _squeeze(r: _Reader, c: _Call) -> _Value:
    axes = c.option("axes", index=1)
    if axes is None:
        raise UnsupportedModel("without axes")
    return r.call(aten.squeeze.dims, c.x, axes)


def _unsqueeze(r: _Reader, c: _Call) -> _Value:
    axes = c.option("axes", index=1)
    x, count = c.x, c.axes + len(axes)
    for axis in sorted(axis % count for axis in axes):
        x = r.call(aten.unsqueeze.default, x, axis)
    return x


def _concat(r: _Reader, c: _Call) -> _Value:
    return r.call(aten.cat.default, c.tensors(), c.option("axis"))


def _split(r: _Reader, c: _Call) -> list[_Value]:
    axis = c.option("axis", 0)
    sizes, size = c.option("split", index=1), c.x.value.shape[axis]
    if sizes is None:
        part = -(-size // c.results)
        sizes = [min(part, size - start) for start in range(0, size, part)]
    parts = r.call(aten.split_with_sizes.default, c.x, sizes, axis)
    return [r.call(operator.getitem, parts, index) for index in range(c.results)]


def _slice(r: _Reader, c: _Call) -> _Value:
    starts, ends = c.option("starts", index=1), c.option("ends", index=2)
    axes = c.option("axes", list(range(len(starts))), index=3)
    steps, x = c.option("steps", [1] * len(starts), index=4), c.x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = r.call(aten.slice.Tensor, x, axis, start, end, step)
    return x


def _gather(r: _Reader, c: _Call) -> _Value:
    index = c.array(1)
    if np.ndim(index):
        raise UnsupportedModel("several indices")
    return r.call(aten.select.int, c.x, c.option("axis", 0), int(index))


def _pad(r: _Reader, c: _Call) -> _Value:
    mode = c.option("mode", "constant")
    pads, value = c.option("pads", index=1), c.option("value", 0.0, index=2)
    if len(c.inputs) > 3 and c.inputs[3] is not None:
        raise UnsupportedModel("axes")
    amounts = _reversed(pads)
    while amounts and amounts[-2:] == [0, 0]:
        amounts = amounts[:-2]
    if mode == "constant":
        return r.call(aten.constant_pad_nd.default, c.x, amounts, value)
    name = {"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode]
    return r.call(aten.pad.default, c.x, amounts, name)


def _gelu(r: _Reader, c: _Call) -> _Value:
    c.plain(approximate="none")
    return r.call(aten.gelu.default, c.x)


# Softplus is not among them: torch replaces it by its argument above a threshold.
_OPERATIONS: dict[str, _Operation] = {
    "Add": _simple(aten.add.Tensor),
    "Sub": _simple(aten.sub.Tensor),
    "Mul": _simple(aten.mul.Tensor),
    "Div": _simple(aten.div.Tensor),
    "Neg": _simple(aten.neg.default),
    "Abs": _simple(aten.abs.default),
    "Relu": _simple(aten.relu.default),
    "Sigmoid": _simple(aten.sigmoid.default),
    "Tanh": _simple(aten.tanh.default),
    "HardSwish": _simple(aten.hardswish.default),
    "LeakyRelu": _simple(aten.leaky_relu.default, ("alpha", 0.01)),
    "Elu": _simple(aten.elu.default, ("alpha", 1.0)),
    "Max": _pairwise(aten.maximum.default),
    "Min": _pairwise(aten.minimum.default),
    "GlobalAveragePool": _over_all(aten.mean.dim),
    "GlobalMaxPool": _over_all(aten.amax.default),
    "ReduceMean": _reduction(aten.mean.dim),
    "ReduceSum": _reduction(aten.sum.dim_IntList),
    "ReduceMax": _reduction(aten.amax.default),
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "BatchNormalization": _batch_norm,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "Clip": _clip,
    "PRelu": _prelu,
    "Gelu": _gelu,
    "Identity": _same,
    "Dropout": _dropout,
    "Cast": _cast,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "Pad": _pad,
}
