"""Operations of ATen that torch has no binding for with the same arguments, or no rule."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.nn import functional as F

from certify.signal import UnsupportedModel

if TYPE_CHECKING:
    from certify.aten import Conversion

aten = torch.ops.aten

Given = Mapping[str, Any]
"""Arguments by the names of the schema."""

Spelled = Callable[["Conversion", fx.Node, Given], Any]
"""Writes a node's operation."""

_TRAINED = "the program was exported in training mode; export model.eval()"


def _batch_norm(c: Conversion, n: fx.Node, given: Given) -> Any:
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


def _convolution(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
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


def _addmm(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    """A linear layer, which a rule of rounding knows."""
    if given["beta"] != 1 or given["alpha"] != 1:
        raise UnsupportedModel("a matrix product with beta or alpha")
    weight = c.call(torch.permute, given["mat2"], (1, 0))
    return c.call(F.linear, given["mat1"], weight, given["self"])


def _first_of(function: Any) -> Spelled:
    def spelled(c: Conversion, n: fx.Node, given: Given) -> Any:
        """A pool whose other result says where the maxima are."""
        return c.call(function, *given.values()), None

    return spelled


def _dropout(c: Conversion, n: fx.Node, given: Given) -> Any:
    if given["train"]:
        raise UnsupportedModel(_TRAINED)
    return c.same(n)


def _rrelu(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    if given["training"]:
        raise UnsupportedModel(_TRAINED)
    return c.call(F.rrelu, given["self"], given["lower"], given["upper"])


def _same(c: Conversion, n: fx.Node, given: Given) -> Any:
    return c.same(n)


def _cast(c: Conversion, n: fx.Node, given: Given) -> Any:
    """To the type that the tensor has already; whatever rounds, or jumps, is refused."""
    found, wanted = c.value(n).dtype, given.get("dtype")
    if isinstance(given.get("other"), fx.Node):  # to.other
        raise UnsupportedModel("a conversion to the type of another tensor")
    if wanted not in (None, found):
        raise UnsupportedModel(
            f"it converts {found} to {wanted}, which is not certified: take it out of the model"
        )
    return c.same(n) if n.target is not aten._to_copy.default else _clone(c, n, given)


def _slice(c: Conversion, n: fx.Node, given: Given) -> Any:
    axis = given["dim"] % c.axes(n)
    start, end, step = given["start"], given["end"], given["step"]
    size = c.value(n).shape[axis]
    if start in (None, 0) and step == 1 and (end is None or end == 2**63 - 1):
        return c.same(n)
    if isinstance(end, int) and end >= size and axis > 0:
        end = size
    whole = [slice(None)] * axis
    return c.call(operator.getitem, given["self"], (*whole, slice(start, end, step)))


def _reshape(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    if n.target is aten.view.dtype:
        raise UnsupportedModel("a view as another type")
    sizes = c.sizes(n, given["shape"] if "shape" in given else given["size"])
    method = "view" if n.target is aten.view.default else "reshape"
    return c.call(method, given["self"], sizes)


def _expand(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    return c.call("expand", given["self"], c.sizes(n, given["size"]))


def _transpose(c: Conversion, n: fx.Node, given: Given) -> Any:
    if c.axes(n) != 2 and n.target is not aten.mT.default:
        raise UnsupportedModel(f"a transpose of {c.axes(n)} axes")
    return c.call(torch.transpose, given["self"], -2, -1)


def _split(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    sizes = given["split_sizes"] if "split_sizes" in given else given["split_size"]
    return c.call(torch.split, given["self"], sizes, given["dim"])


def _padded(mode: str) -> Spelled:
    def spelled(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
        return c.call(F.pad, given["self"], given["padding"], mode)

    return spelled


def _pad(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    mode = given.get("mode", "constant")
    return c.call(F.pad, given["self"], given["pad"], mode, given["value"])


def _size(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    return c.call("size", given["self"], given["dim"])


def _elu(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    if given["scale"] != 1 or given["input_scale"] != 1:
        raise UnsupportedModel("an ELU with scales; nn.SELU is known")
    return c.call(F.elu, given["self"], given["alpha"])


def _clone(c: Conversion, n: fx.Node, given: Given) -> fx.Node:
    form = given.get("memory_format")
    return c.call(torch.clone, given["self"], **({} if form is None else {"memory_format": form}))


SPELLED: dict[str, Spelled] = {
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
