"""Operations of ONNX, written with those of ATen.

What an operation gets is a `Call`; it writes to the graph of a `Writer` and returns its result, or
refuses what it does not do.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from certify.programs import Names
from certify.signal import UnsupportedModel

aten = torch.ops.aten

REALS = {1: torch.float32, 10: torch.float16, 11: torch.float64}
"""Types of ONNX that networks are computed in, by number."""


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the network: its node, and one of the shape and type that it has."""

    node: fx.Node
    value: Any


@dataclass(frozen=True, eq=False)
class Sizes:
    """Whole numbers, and which of them are the size of the batch: 1 where they are, else 0."""

    numbers: Any
    batch: Any


def plain(value: Any) -> Any:
    """A constant; its value on the example says nothing if it is the size of the batch."""
    if isinstance(value, Sizes):
        raise UnsupportedModel("it computes with the number of inputs in a batch")
    return value


class Writer:
    """A graph of ATen operations, and the shapes of its tensors.

    Attributes:
        graph: as written so far.
        tensors: that it reads, by name.
        names: of all that is in it.
    """

    def __init__(self) -> None:
        self.graph, self.tensors, self.names = fx.Graph(), dict[str, Tensor](), Names()

    def constant(self, value: Any) -> Value:
        """A constant as a tensor that is stored."""
        if np.asarray(value).dtype.kind not in "iubf":  # among others, bfloat16
            raise UnsupportedModel(f"constants of {np.asarray(value).dtype}")
        tensor = torch.from_numpy(np.array(value))
        name = self.names.attribute(f"constant_{len(self.tensors)}")
        self.tensors[name] = tensor
        return Value(self.graph.get_attr(name), tensor.to("meta"))

    def stored(self, value: Any) -> Value:
        """A value as a tensor."""
        return value if isinstance(value, Value) else self.constant(plain(value))

    def call(self, operation: Any, *args: Any) -> Value:
        """Write an operation, and find its result's shape."""
        nodes, values = (
            [_unwrapped(argument, part) for argument in args] for part in ("node", "value")
        )
        return Value(self.graph.call_function(operation, tuple(nodes)), operation(*values))


def _unwrapped(argument: Any, part: str) -> Any:
    if isinstance(argument, list):
        return [_unwrapped(each, part) for each in argument]
    return getattr(argument, part) if isinstance(argument, Value) else argument


class Call:
    """A node's arguments: ``x`` is the first, a tensor; others may be constants."""

    def __init__(
        self, writer: Writer, inputs: list[Any], options: dict[str, Any], results: int
    ) -> None:
        self._writer = writer
        self.inputs = inputs
        self._options = options
        self.results = results

    @property
    def x(self) -> Value:
        """The first input."""
        return self.tensor(0)

    @property
    def axes(self) -> int:
        """Number of axes of the first input."""
        found: int = self.x.value.ndim
        return found

    def tensor(self, index: int) -> Value:
        """An input as a tensor."""
        value = self.inputs[index]
        if value is None:
            raise UnsupportedModel(f"input {index} is missing")
        return self._writer.stored(value)

    def tensors(self) -> list[Value]:
        """All inputs as tensors."""
        return [self.tensor(index) for index in range(len(self.inputs))]

    def array(self, index: int) -> Any:
        """An input that must be a constant; ``None`` if it is left out."""
        value = self.inputs[index] if index < len(self.inputs) else None
        if isinstance(value, Value):
            raise UnsupportedModel(f"input {index} depends on the network's input")
        return plain(value)

    def sizes(self, index: int) -> list[int]:
        """An input that is the sizes of a result, the first of which may be the batch's."""
        value = self.inputs[index]
        if isinstance(value, Sizes) and not value.batch[1:].any():
            value = value.numbers
        found: list[int] = np.asarray(plain(value)).tolist()
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


Operation = Callable[[Writer, Call], Any]


def _simple(operation: Any, *options: tuple[str, float]) -> Operation:
    def written(r: Writer, c: Call) -> Value:
        return r.call(operation, *c.tensors(), *(c.option(*option) for option in options))

    return written


def _conv(r: Writer, c: Call) -> Value:
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


def _gemm(r: Writer, c: Call) -> Value:
    c.plain(alpha=1.0, beta=1.0, transA=0)
    weight = c.array(1)
    bias = c.array(2)
    weight = weight if c.option("transB", 0) else weight.T
    if bias is not None:
        bias = r.constant(np.broadcast_to(bias, (1, weight.shape[0])).reshape(-1))
    return r.call(aten.linear.default, c.x, r.constant(weight), bias)


def _matmul(r: Writer, c: Call) -> Value:
    weight = c.array(1)
    if np.ndim(weight) != 2:
        raise UnsupportedModel("a product other than with a constant matrix")
    return r.call(aten.linear.default, c.x, r.constant(weight.T))


def _batch_norm(r: Writer, c: Call) -> Value:
    c.plain(training_mode=0, spatial=1)
    x, scale, offset, mean, variance = c.tensors()
    epsilon = c.option("epsilon", 1e-5)
    return r.call(
        aten.batch_norm.default, x, scale, offset, mean, variance, False, 0.1, epsilon, False
    )


def _pool(r: Writer, c: Call) -> tuple[Any, ...]:
    c.plain(auto_pad="NOTSET", storage_order=0)
    axes = c.axes - 2
    pads = c.option("pads", [0] * 2 * axes)
    if pads[:axes] != pads[axes:]:
        raise UnsupportedModel(f"pads={pads}")
    return c.option("kernel_shape"), c.option("strides", [1] * axes), pads[:axes]


def _max_pool(r: Writer, c: Call) -> Value:
    operation = {3: aten.max_pool1d, 4: aten.max_pool2d, 5: aten.max_pool3d}[c.axes].default
    dilations = c.option("dilations", [1] * (c.axes - 2))
    if c.results > 1:
        raise UnsupportedModel("indices")
    return r.call(operation, c.x, *_pool(r, c), dilations, bool(c.option("ceil_mode", 0)))


def _average_pool(r: Writer, c: Call) -> Value:
    c.plain(dilations=[1] * (c.axes - 2))
    operation = {3: aten.avg_pool1d, 4: aten.avg_pool2d, 5: aten.avg_pool3d}[c.axes].default
    rest = bool(c.option("ceil_mode", 0)), bool(c.option("count_include_pad", 0))
    return r.call(operation, c.x, *_pool(r, c), *rest)


def _over_all(operation: Any) -> Operation:
    def written(r: Writer, c: Call) -> Value:
        return r.call(operation, c.x, list(range(2, c.axes)), True)

    return written


def _reduction(operation: Any) -> Operation:
    def written(r: Writer, c: Call) -> Value:
        axes = c.option("axes", index=1)
        if axes is None:
            raise UnsupportedModel("without axes")
        return r.call(operation, c.x, axes, bool(c.option("keepdims", 1)))

    return written


def _clip(r: Writer, c: Call) -> Value:
    return r.call(aten.clamp.default, c.x, c.option("min", index=1), c.option("max", index=2))


def _pairwise(operation: Any) -> Operation:
    def written(r: Writer, c: Call) -> Value:
        first, *others = c.tensors()
        for other in others:
            first = r.call(operation, first, other)
        return first

    return written


def _prelu(r: Writer, c: Call) -> Value:
    slopes = c.array(1)
    aligned = (1,) * (c.axes - slopes.ndim) + slopes.shape  # as ONNX does: the last axis first
    if math.prod(aligned) not in (1, aligned[1] if len(aligned) > 1 else 1):
        raise UnsupportedModel("slopes that differ within a channel")
    return r.call(aten.prelu.default, c.x, r.constant(slopes.reshape(-1)))


def _same(r: Writer, c: Call) -> Value:
    return c.x


def _dropout(r: Writer, c: Call) -> Value:
    if len(c.inputs) > 2 and bool(c.array(2)):
        raise UnsupportedModel("it is in training mode")
    return c.x


def _cast(r: Writer, c: Call) -> Value:
    if REALS.get(c.option("to")) != c.x.value.dtype:
        raise UnsupportedModel("a conversion to another type")
    return c.x


def _flatten(r: Writer, c: Call) -> Value:
    if c.option("axis", 1) % c.axes != 1:
        raise UnsupportedModel(f"axis={c.option('axis')}")
    return r.call(aten.flatten.using_ints, c.x, 1)


def _reshape(r: Writer, c: Call) -> Value:
    sizes = c.sizes(1)
    if not c.option("allowzero", 0):
        sizes = [s or c.x.value.shape[axis] for axis, s in enumerate(sizes)]
    return r.call(aten.reshape.default, c.x, sizes)


def _transpose(r: Writer, c: Call) -> Value:
    return r.call(aten.permute.default, c.x, c.option("perm", list(range(c.axes))[::-1]))


def _squeeze(r: Writer, c: Call) -> Value:
    axes = c.option("axes", index=1)
    if axes is None:
        raise UnsupportedModel("without axes")
    return r.call(aten.squeeze.dims, c.x, axes)


def _unsqueeze(r: Writer, c: Call) -> Value:
    axes = c.option("axes", index=1)
    x, count = c.x, c.axes + len(axes)
    for axis in sorted(axis % count for axis in axes):
        x = r.call(aten.unsqueeze.default, x, axis)
    return x


def _concat(r: Writer, c: Call) -> Value:
    return r.call(aten.cat.default, c.tensors(), c.option("axis"))


def _split(r: Writer, c: Call) -> list[Value]:
    axis = c.option("axis", 0)
    sizes, size = c.option("split", index=1), c.x.value.shape[axis]
    if sizes is None:
        part = -(-size // c.results)
        sizes = [min(part, size - start) for start in range(0, size, part)]
    parts = r.call(aten.split_with_sizes.default, c.x, sizes, axis)
    return [r.call(operator.getitem, parts, index) for index in range(c.results)]


def _slice(r: Writer, c: Call) -> Value:
    starts, ends = c.option("starts", index=1), c.option("ends", index=2)
    axes = c.option("axes", list(range(len(starts))), index=3)
    steps, x = c.option("steps", [1] * len(starts), index=4), c.x
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = r.call(aten.slice.Tensor, x, axis, start, end, step)
    return x


def _gather(r: Writer, c: Call) -> Value:
    index = c.array(1)
    if np.ndim(index):
        raise UnsupportedModel("several indices")
    return r.call(aten.select.int, c.x, c.option("axis", 0), int(index))


def _pad(r: Writer, c: Call) -> Value:
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


def _gelu(r: Writer, c: Call) -> Value:
    c.plain(approximate="none")
    return r.call(aten.gelu.default, c.x)


# Softplus is not among them: torch replaces it by its argument above a threshold.
OPERATIONS: dict[str, Operation] = {
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
