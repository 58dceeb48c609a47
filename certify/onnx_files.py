"""ONNX files as programs.

An ONNX graph is written with ATen operations while their results' shapes are found, so that what it
computes from sizes is known. Then it is treated as a program of ``torch.export``, and compared with
the reference implementation that the package ``onnx`` has of every operation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from certify.checkpoints import CheckpointError
from certify.onnx_operations import OPERATIONS, REALS, Call, Sizes, Value, Writer
from certify.programs import LARGEST_INPUT, Program, refuse_signature, refuse_size
from certify.signal import UnsupportedModel

aten = torch.ops.aten

_BATCH = 5
"""Of the example, where a graph takes any."""

_DOMAINS = ("", "ai.onnx")
_OLDEST = 7  # before it, axes were aligned otherwise, and training was the default

_OTHER_BATCHES = (1, 2, 7)
"""On which it must compute the same."""

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


def _sizes(numbers: Any, batch: Any) -> Any:
    return Sizes(numbers, batch) if np.any(batch) else numbers


def _any_sizes(values: Sequence[Any]) -> bool:
    return any(isinstance(value, Sizes) for value in values)


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


class _Reader(Writer):
    """Writes an ONNX graph with ATen operations."""

    def __init__(self, model: Any, input_shape: Sequence[int] | None) -> None:
        super().__init__()
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._versions = {entry.domain: entry.version for entry in model.opset_import}
        given = [entry for entry in model.graph.input if entry.name not in self._stored]
        refuse_signature(len(given), [True] * len(model.graph.output))
        self.input: str = given[0].name
        kind = given[0].type.tensor_type
        sizes = tuple(d.dim_value or None for d in kind.shape.dim)
        dtype = REALS.get(kind.elem_type)
        if dtype is None or not sizes:
            raise UnsupportedModel("expected a network that takes a batch of real numbers")
        self.any_batch = sizes[0] is None
        self.shape = (sizes[0] or _BATCH, *_filled(sizes, input_shape))
        refuse_size(self.shape)
        self.example = torch.zeros(self.shape, dtype=dtype, device="meta")  # no values are needed
        self._known: dict[str, Any] = {
            self.input: Value(self.graph.placeholder("x"), self.example),
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
        if kind == "Shape" and isinstance(inputs[0], Value) and not node.attribute:
            numbers = np.array(inputs[0].value.shape, dtype=np.int64)
            # A rule sees to it that only the first size of a tensor depends on the batch.
            results: Any = _sizes(numbers, (np.arange(len(numbers)) == 0).astype(np.int64))
        elif not any(isinstance(value, Value) for value in inputs):
            results = self._constant(node, inputs)
        elif kind in OPERATIONS:
            options = {a.name: _attribute(a) for a in node.attribute}
            try:
                results = OPERATIONS[kind](self, Call(self, inputs, options, len(node.output)))
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
        numbers = [value.numbers if isinstance(value, Sizes) else value for value in moved]
        batch = [value.batch if isinstance(value, Sizes) else value * 0 for value in moved]
        return _sizes(
            *(self._constant(node, [*values, *others]) for values in (numbers, batch)),
        )

    def tensor(self, name: str) -> Value:
        """A tensor by its name."""
        return self.stored(self._known[name])


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
