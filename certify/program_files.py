"""Files of ``torch.export.save``, read without executing anything in them.

``torch.export.load`` unpickles and evaluates what a file says, so it is for files that one trusts.
A file is an archive of a graph as JSON and of tensors, in one of three layouts that torch has had
since 2.6; that is all that is needed.

References:
    The schema of the graph: ``torch/_export/serde/schema.py``, version 8.
"""

from __future__ import annotations

import io
import json
import math
import operator
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from certify.checkpoints import CheckpointError, check_archive
from certify.programs import (
    KINDS,
    Names,
    Program,
    open_shape,
    place_of,
    refuse_signature,
)
from certify.signal import UnsupportedModel

_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64,
    6: torch.float16, 7: torch.float32, 8: torch.float64, 12: torch.bool, 13: torch.bfloat16,
}  # fmt: skip
_FORMATS = {
    1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d,
    4: torch.preserve_format,
}  # fmt: skip
_STRIDED = 7
_SCHEMA = 8
_ROOM = 2**28
"""Bytes that tensors of which entries are stored once for several may take."""


def is_program(path: str | Path) -> bool:
    """Whether a file's name says that it holds a program."""
    return Path(path).suffix == ".pt2"


def read_program(path: str | Path) -> Program:
    """Read a program that ``torch.export.save`` wrote; nothing in the file is executed.

    Raises:
        CheckpointError: no such file, or not a whole one.
        UnsupportedModel: operations or arguments other than those of plain networks.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"no program at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the error says it
            check_archive(path)
            with zipfile.ZipFile(path) as archive:
                return _program(_Archive(archive))
    except UnsupportedModel:
        raise
    except Exception as error:  # a damaged file can fail anywhere
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise CheckpointError(
            f"{path} is not a program, or it is damaged ({reason}); expected what "
            "torch.export.save(torch.export.export(model, ...), ...) writes"
        ) from error


class _Archive:
    """A file's entries, by their paths behind the folder that all of them may be in."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        names = archive.namelist()
        (self._graph,) = (
            name
            for name in names
            if name == "serialized_exported_program.json" or name.endswith("models/model.json")
        )
        self._folder = self._graph.removesuffix("models/model.json")
        self._old = self._graph == self._folder
        if self._old:
            self._folder = ""
        self._room = _ROOM + 4 * sum(entry.file_size for entry in archive.infolist())
        if "byteorder" in self and self._read("byteorder").decode() != sys.byteorder:
            raise ValueError("it is from a machine with another order of bytes")

    def __contains__(self, name: str) -> bool:
        return self._folder + name in self._archive.namelist()

    def _read(self, name: str) -> bytes:
        return self._archive.read(self._folder + name)

    def graph(self) -> Any:
        """The graph with all that belongs to it, as JSON."""
        return json.loads(self._archive.read(self._graph))

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Tensors by name, those of the two places that they can be in."""
        tensors = {}
        for kind, old in (("weights", "state_dict"), ("constants", "constants")):
            found: dict[str, Any] = {}
            whole = f"serialized_{old}.pt" if self._old else f"data/{kind}/model.pt"
            if whole in self:
                found.update(self._pickled(whole))
            else:
                entries = json.loads(self._read(f"data/{kind}/model_{kind}_config.json"))
                for name, entry in entries["config"].items():
                    found[name] = self._tensor(f"data/{kind}/{entry['path_name']}", entry)
            tensors[kind] = {
                name: self._own(name, value)
                for name, value in found.items()
                if isinstance(value, Tensor)
            }
        return tensors

    def _pickled(self, name: str) -> Any:
        content = self._read(name)
        if not content:
            return {}
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise ValueError(f"{name} is not an archive")
        check_archive(io.BytesIO(content))
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def _own(self, name: str, tensor: Tensor) -> Tensor:
        """A copy; a hostile file could name an entry often, or few entries a large tensor."""
        if tensor.is_meta or tensor.layout != torch.strided:
            raise ValueError(f"{name} is not a plain tensor")
        self._room -= math.prod(tensor.shape) * tensor.element_size()
        if self._room < 0:
            raise ValueError(f"{name} is not stored entry by entry")
        return tensor.detach().clone()

    def _tensor(self, name: str, entry: Any) -> Any:
        if entry["use_pickle"]:
            return self._pickled(name)
        meta, content = entry["tensor_meta"], self._read(name)
        if meta["layout"] != _STRIDED:
            raise ValueError(f"{name} is not a plain tensor")
        dtype = _DTYPES[meta["dtype"]]
        sizes, strides = ([_number(n) for n in meta[key]] for key in ("sizes", "strides"))
        if not content:
            return torch.zeros(sizes, dtype=dtype) if 0 in sizes else None
        values = torch.frombuffer(bytearray(content), dtype=dtype)
        return values.as_strided(sizes, strides, _number(meta["storage_offset"]))


def _number(size: Mapping[str, Any]) -> int:
    number = size["as_int"]
    if type(number) is not int:
        raise ValueError(f"{number!r} is not a number")
    return number


def _symbol(size: Mapping[str, Any]) -> str:
    """Name of a size that may vary; torch writes an expression for it, and evaluates that."""
    expression = size["as_expr"]["expr_str"]
    found = re.match(r"Symbol\('(\w+)'[^()]*\)$", expression)
    return found[1] if found else f"({expression})"


def _or(value: Any, default: float) -> float:
    if value is None:
        return default
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a number")
    return value


def _program(archive: _Archive) -> Program:
    content = archive.graph()
    if content["schema_version"]["major"] != _SCHEMA:
        raise ValueError(f"schema {content['schema_version']['major']}, not {_SCHEMA}")
    graph, signature = content["graph_module"]["graph"], content["graph_module"]["signature"]
    inputs = [next(iter(spec.items())) for spec in signature["input_specs"]]
    outputs = [next(iter(spec.items())) for spec in signature["output_specs"]]
    refuse_signature(
        sum(kind == "user_input" for kind, _ in inputs),
        [kind == "user_output" for kind, _ in outputs],
    )
    given = [spec["arg"].get("as_tensor", spec["arg"])["name"] for _, spec in inputs]
    if (
        given != [each["as_tensor"]["name"] for each in graph["inputs"]]
        or [spec["arg"] for _, spec in outputs] != graph["outputs"]
    ):
        raise ValueError("the graph has other inputs or results than its signature says")
    stored, places = archive.tensors(), dict[str, tuple[str, str]]()
    reader, names, tensors = _Reader(), Names(), {}
    for kind, spec in inputs:
        if kind == "user_input":
            entered = spec["arg"]["as_tensor"]["name"]
            reader.name(entered, reader.graph.placeholder("x"))
            continue
        if kind not in KINDS:
            raise UnsupportedModel(f"the program has an input of another kind: {kind}")
        target = spec[f"{kind}_name"]
        place = place_of(kind, spec.get("persistent"))
        if places.setdefault(target, (kind, place)) != (kind, place):
            raise ValueError(f"{target!r} is of two kinds")
        if target in stored[place]:  # what is not, may be without use
            name = names.attribute(target)
            tensors[name] = stored[place][target]
            reader.name(spec["arg"]["name"], reader.graph.get_attr(name))
    for node in graph["nodes"]:
        reader.add(node)
    reader.graph.output(reader.nodes[outputs[0][1]["arg"]["as_tensor"]["name"]])
    for n in reversed(reader.graph.nodes):
        if n.op == "get_attr" and not n.users:
            del tensors[str(n.target)]
            reader.graph.erase_node(n)
    meta = graph["tensor_values"][entered]
    shape, limits = open_shape(
        [_number(size) if "as_int" in size else _symbol(size) for size in meta["sizes"]],
        {
            name: (_or(values["min_val"], -math.inf), _or(values["max_val"], math.inf))
            for name, values in content["range_constraints"].items()
        },
        content.get("guards_code") or [],
    )
    return Program(reader.graph, tensors, shape, _DTYPES[meta["dtype"]], limits=limits)


class _Reader:
    """Makes a graph from the nodes of a file."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}

    def name(self, name: str, node: fx.Node) -> None:
        """Give a node its name in the file."""
        if name in self.nodes:
            raise ValueError(f"two results {name!r}")
        self.nodes[name] = node

    def add(self, node: Any) -> None:
        """Add a node, and one for each of its results where there are several."""
        target = self._target(node["target"])
        given = {entry["name"]: self._argument(entry["arg"], node) for entry in node["inputs"]}
        if isinstance(target, torch._ops.OpOverload):
            ordered = [a.name for a in target._schema.arguments if not a.kwarg_only]
            defaults = {a.name: a.default_value for a in target._schema.arguments}
            if not given.keys() <= defaults.keys():  # names of arguments become code
                raise ValueError(f"{target} takes no such arguments")
            last = max((ordered.index(name) + 1 for name in given if name in ordered), default=0)
            args = tuple(given.pop(name, defaults[name]) for name in ordered[:last])
        else:
            args, given = tuple(given.values()), {}
        made = self.graph.call_function(target, args, given)
        outputs = node["outputs"]
        if len(outputs) == 1 and "as_tensors" in outputs[0]:
            results = [{"as_tensor": each} for each in outputs[0]["as_tensors"]]
        elif len(outputs) > 1:
            results = outputs
        else:
            for output in outputs:
                self.name(_name(output), made)
            return
        for index, output in enumerate(results):
            if "as_none" not in output:
                part = self.graph.call_function(operator.getitem, (made, index))
                self.name(_name(output), part)

    def _target(self, name: str) -> Any:
        """An operation by its name; only torch's core and arithmetic of sizes are looked up."""
        if name.startswith("_operator."):
            found = getattr(operator, name.removeprefix("_operator."), None)
            if found in (operator.add, operator.sub, operator.mul, operator.floordiv, operator.neg):
                return found
        parts = name.split(".")
        if parts[:3] == ["torch", "ops", "aten"] and len(parts) == 5:
            found = getattr(getattr(torch.ops.aten, parts[3], None), parts[4], None)
            if isinstance(found, torch._ops.OpOverload):
                return found
        raise UnsupportedModel(f"no Lipschitz rule for {name!r} of a program")

    def _argument(self, argument: Any, node: Any) -> Any:
        ((kind, value),) = argument.items()
        if kind in ("as_int", "as_bool", "as_string", "as_ints", "as_bools"):
            return value
        if kind == "as_none":
            return None
        if kind == "as_float":
            return float(value)
        if kind == "as_floats":
            return [float(each) for each in value]
        if kind == "as_tensor":
            return self.nodes[value["name"]]
        if kind in ("as_tensors", "as_sym_ints", "as_optional_tensors"):
            return [self._named(each) for each in value]
        if kind in ("as_optional_tensor", "as_sym_int"):
            return self._named(value)
        if kind == "as_scalar_type":
            return _DTYPES[value]
        if kind == "as_memory_format":
            return _FORMATS[value]
        if kind == "as_layout" and value == _STRIDED:
            return torch.strided
        if kind == "as_device":
            return torch.device("cpu")  # where it is read
        raise UnsupportedModel(f"{node['target']} with an argument {kind!r}")

    def _named(self, value: Any) -> Any:
        """A tensor or a size in a list."""
        if "as_int" in value:
            return _number(value)
        if "as_none" in value:
            return None
        inner = value.get("as_tensor", value)
        return self.nodes[inner["as_name"] if "as_name" in inner else inner["name"]]


def _name(output: Any) -> str:
    """Name of a result: of a tensor or of a size."""
    ((_, value),) = output.items()
    name = value["as_name"] if "as_name" in value else value["name"]
    assert isinstance(name, str)
    return name
