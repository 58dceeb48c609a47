"""Operations that move, drop, join or repeat entries."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify.rules.registry import by_attributes, lipschitz_rule
from certify.rules.rounding import elementwise, exact
from certify.rules.selection import chosen
from certify.signal import Flatten, Signal, UnsupportedModel, Wrapping, side_by_side
from ff_bounds.padding import duplication


@lipschitz_rule(
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout,
    nn.FeatureAlphaDropout, rounding=exact,
)  # fmt: skip
def identity(module: nn.Module, x: Signal) -> Signal:
    """In evaluation these return their input."""
    return x


@lipschitz_rule(
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, rounding=exact,
)  # fmt: skip
def dropout(input: Signal, p: float = 0.5, training: bool = True, inplace: bool = False) -> Signal:
    """Without ``training`` this returns its input."""
    if training:
        raise UnsupportedModel("dropout with training=True is random")
    return input


@lipschitz_rule("to", "type_as", rounding=exact)
def converted(x: Any, *arguments: Any, **named: Any) -> Any:
    """The same numbers, as all are of one dtype; wherever they are."""
    given = (x, *arguments, *named.values())
    like = next(value.input for value in given if isinstance(value, Signal))
    if not isinstance(x, Signal):
        return x.to(like.device, like.dtype)  # a constant, made like what depends on the input
    for value in (*arguments, *named.values()):
        kind = value if isinstance(value, torch.dtype) else getattr(value, "dtype", like.dtype)
        if not isinstance(value, Signal) and kind != like.dtype:
            raise UnsupportedModel(f"a conversion to {kind}")
    return x


@lipschitz_rule("contiguous", "clone", "double", "detach", torch.clone, rounding=exact)
def unchanged(x: Signal, *, memory_format: Any = None) -> Signal:
    """The same numbers: the certified network computes in float64 already."""
    return x


@lipschitz_rule(torch.flatten, "flatten", rounding=exact)
def flatten(x: Signal, start_dim: int = 0, end_dim: int = -1) -> Signal:
    """A reshape within each sample."""
    axes = len(x.shape)
    if start_dim % axes == 0:
        raise UnsupportedModel(
            "flattening from dimension 0 mixes the samples of a batch; use start_dim=1"
        )
    if start_dim % axes == 1 and end_dim % axes == axes - 1:
        return Signal(x.shape, Flatten(), (x,))
    return x.scaled(linear=True)


by_attributes(flatten, nn.Flatten, attributes="start_dim end_dim", rounding=exact)


@lipschitz_rule(torch.reshape, "reshape", "view", rounding=exact)
def reshape(x: Signal, *shape: Any) -> Signal:
    """A reshape that keeps the batch axis keeps samples apart (the walker checks that axis)."""
    if any(isinstance(s, torch.dtype) for s in shape):
        raise UnsupportedModel("a view as another dtype")
    sizes = tuple(shape[0]) if shape and isinstance(shape[0], (tuple, list)) else shape
    if len(sizes) == 2 and len(x.shape) > 2:
        return Signal(x.shape, Flatten(), (x,))
    return x.scaled(linear=True)


@lipschitz_rule("view_as", "reshape_as", rounding=exact)
def reshape_as(x: Any, other: Any) -> Signal:
    """As `reshape`; of the other tensor only the shape matters."""
    if not isinstance(x, Signal):
        raise UnsupportedModel("a constant with the shape of a batch")
    return reshape(x, *other.shape)


@lipschitz_rule(nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, rounding=exact)
def rearrange(module: nn.Module, x: Signal) -> Signal:
    """A permutation of a sample's entries, or another shape (the walker checks the batch axis)."""
    if isinstance(module, nn.Unflatten) and module.dim in (0, -len(x.shape)):
        raise UnsupportedModel("unflattening the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, rounding=exact)
def shuffle(input: Signal, factor: Any = None, **named: Any) -> Signal:
    """A permutation of a sample's entries."""
    return input.scaled(linear=True)


@lipschitz_rule(torch.unflatten, "unflatten", rounding=exact)
def unflatten(x: Signal, dim: int, sizes: Any) -> Signal:
    """One axis becomes several."""
    if dim % len(x.shape) == 0:
        raise UnsupportedModel("unflattening the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(torch.squeeze, "squeeze", "squeeze_", rounding=exact)
def squeeze(x: Signal, dim: Any = None) -> Signal:
    """Drop axes of length one."""
    if dim is None:
        raise UnsupportedModel("squeeze without dim drops the batch axis of a single sample")
    return x.scaled(linear=True)


@lipschitz_rule(torch.unsqueeze, "unsqueeze", "unsqueeze_", rounding=exact)
def unsqueeze(x: Signal, dim: int) -> Signal:
    """Add an axis of length one."""
    if dim % (len(x.shape) + 1) == 0:
        raise UnsupportedModel("a new axis before the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(torch.permute, "permute", rounding=exact)
def permute(x: Signal, *dims: Any) -> Signal:
    """Permute the axes, the batch's staying first."""
    order = _listed(dims)
    if order[0] % len(x.shape) != 0:
        raise UnsupportedModel("moving the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(
    torch.transpose, torch.swapaxes, "transpose", "transpose_", "swapaxes", rounding=exact
)
def transpose(x: Signal, dim0: int, dim1: int) -> Signal:
    """Swap two axes behind the batch's."""
    if dim0 % len(x.shape) == 0 or dim1 % len(x.shape) == 0:
        raise UnsupportedModel("moving the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(torch.movedim, torch.moveaxis, "movedim", "moveaxis", rounding=exact)
def movedim(x: Signal, source: Any, destination: Any) -> Signal:
    """Move axes behind the batch's to places behind it."""
    if any(axis % len(x.shape) == 0 for axis in (*_listed((source,)), *_listed((destination,)))):
        raise UnsupportedModel("moving the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(torch.roll, "roll", rounding=exact)
def roll(x: Signal, shifts: Any, dims: Any = None) -> Signal:
    """As `flip`; without dims, all samples of a batch are rolled as one."""
    return flip(x, () if dims is None else dims)


@lipschitz_rule(torch.flip, "flip", rounding=exact)
def flip(x: Signal, *arguments: Any, **named: Any) -> Signal:
    """A permutation along axes behind the batch's."""
    given = arguments[0] if len(arguments) == 1 else arguments
    axes = named.get("dims", given)
    listed = axes if isinstance(axes, (tuple, list)) else (axes,)
    if not listed or any(axis is None or axis % len(x.shape) == 0 for axis in listed):
        raise UnsupportedModel("flipping or rolling the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(operator.getitem, rounding=exact)
def getitem(x: Any, index: Any) -> Any:
    """A slice drops entries; the batch axis must stay whole. For lists see `chosen`."""
    if isinstance(x, (tuple, list)):
        return x[index]
    indices = index if isinstance(index, tuple) else (index,)
    listed = [place for place, i in enumerate(indices) if isinstance(i, (list, Tensor))]
    if len(listed) == 1 and indices[0] == slice(None) and isinstance(x, Signal):
        # One list among slices stays where it is; beside other integers it would move.
        (place,) = listed
        others = (*indices[:place], *indices[place + 1 :])
        if all(isinstance(i, slice) for i in others):
            return chosen(x, place, indices[place])
    selects = all(i is Ellipsis or i is None or isinstance(i, (int, slice)) for i in indices)
    used = sum(i is not None and i is not Ellipsis for i in indices)
    whole = selects and (
        indices[0] == slice(None) or (indices[0] is Ellipsis and used < len(x.shape))
    )
    if not isinstance(x, Signal) or not whole:
        raise UnsupportedModel("indexing other than by slices and integers behind the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(torch.narrow, "narrow", rounding=exact)
def narrow(x: Signal, dim: int, start: int, length: int) -> Signal:
    """A slice."""
    if dim % len(x.shape) == 0:
        raise UnsupportedModel("a slice of the batch axis")
    return x.scaled(linear=True)


@lipschitz_rule(torch.select, "select", rounding=exact)
def select(x: Signal, dim: int, index: int) -> Signal:
    """One entry of an axis."""
    return narrow(x, dim, index, 1)


@lipschitz_rule(torch.chunk, "chunk", rounding=exact)
def chunk(x: Signal, chunks: int, dim: int = 0) -> tuple[Signal, ...]:
    """Slices."""
    if dim % len(x.shape) == 0:
        raise UnsupportedModel("chunks of the batch axis")
    length = math.ceil(x.shape[dim] / chunks)
    return tuple(x.scaled(linear=True) for _ in range(math.ceil(x.shape[dim] / length)))


@lipschitz_rule(torch.split, "split", rounding=exact)
def split(x: Signal, split_size: Any, dim: int = 0) -> tuple[Signal, ...]:
    """Slices."""
    if dim % len(x.shape) == 0:
        raise UnsupportedModel("parts of the batch axis")
    if isinstance(split_size, int):
        return tuple(x.scaled(linear=True) for _ in range(math.ceil(x.shape[dim] / split_size)))
    return tuple(x.scaled(linear=True) for _ in split_size)


@lipschitz_rule(torch.unbind, "unbind", rounding=exact)
def unbind(x: Signal, dim: int = 0) -> tuple[Signal, ...]:
    """Slices."""
    if dim % len(x.shape) == 0:
        raise UnsupportedModel("the samples of a batch one by one")
    return tuple(x.scaled(linear=True) for _ in range(x.shape[dim]))


@lipschitz_rule(torch.cat, torch.concat, torch.concatenate, rounding=elementwise)
def concatenate(tensors: Sequence[Any], dim: int = 0) -> Signal:
    """``Lip(f, g)^2 <= Lip(f)^2 + Lip(g)^2``; constants change nothing."""
    signals = [tensor for tensor in tensors if isinstance(tensor, Signal)]
    axis = dim % len(signals[0].shape)
    if axis == 0:
        raise UnsupportedModel("concatenating along the batch axis")
    whole = len(signals) == len(tensors)
    return side_by_side(signals, channels=whole and axis == 1)


@lipschitz_rule(torch.stack, rounding=elementwise)
def stack(tensors: Sequence[Any], dim: int = 0) -> Signal:
    """As `concatenate`."""
    signals = [tensor for tensor in tensors if isinstance(tensor, Signal)]
    if dim % (len(signals[0].shape) + 1) == 0:
        raise UnsupportedModel("stacking before the batch axis")
    return side_by_side(signals)


@lipschitz_rule(F.pad, rounding=elementwise)
def pad(input: Signal, pad: Any, mode: str = "constant", value: float | None = None) -> Signal:
    """Constants (or cropping, by a negative amount), or copies of entries: see `duplication`."""
    x = input
    pairs = [(int(a), int(b)) for a, b in zip(pad[::2], pad[1::2], strict=True)]
    if len(pairs) >= len(x.shape):
        raise UnsupportedModel("padding the batch axis")
    repeats = 1
    if mode != "constant":
        for axis, (before, after) in enumerate(pairs):
            size = x.shape[-1 - axis]
            if min(before, after) < 0:
                raise UnsupportedModel(f"F.pad with mode={mode!r} and negative amounts")
            if mode == "circular":
                repeats *= 1 + math.ceil((before + after) / size)
            elif mode in ("reflect", "replicate"):
                repeats *= duplication(mode, before, after, size)
            else:
                raise UnsupportedModel(f"F.pad with mode={mode!r}")
    root = math.sqrt(repeats) * (1 + 2**-50) if repeats > 1 else 1.0
    channelwise = len(pairs) < len(x.shape) - 1
    if mode == "circular" and len(pairs) == len(x.shape) - 2 and all(a == b for a, b in pairs):
        amounts = tuple(before for before, _ in reversed(pairs))
        return Signal(x.shape, Wrapping(root, channelwise, linear=True, amounts=amounts), (x,))
    return x.scaled(root, channelwise=channelwise, linear=True)


def _pad_by(mode: str, *modules: type) -> None:
    @lipschitz_rule(*modules, rounding=elementwise)
    def padded(module: Any, x: Signal) -> Signal:
        """As `pad`."""
        return pad(x, module.padding, mode)


_pad_by(
    "constant", nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ZeroPad1d, nn.ZeroPad2d,
    nn.ZeroPad3d,
)  # fmt: skip
_pad_by("reflect", nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d)
_pad_by("replicate", nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d)
_pad_by("circular", nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d)


@lipschitz_rule(torch.repeat_interleave, "repeat_interleave", rounding=exact)
def repeat_interleave(x: Signal, repeats: Any, dim: Any = None) -> Signal:
    """Each entry so many times."""
    if not isinstance(repeats, int) or dim is None or dim % len(x.shape) == 0:
        raise UnsupportedModel("repeat_interleave other than by a number along an axis of a sample")
    return _repeated(x, repeats)


@lipschitz_rule("expand", rounding=exact)
def expand(x: Signal, *sizes: Any) -> Signal:
    """Axes of length one are repeated; each entry so many times."""
    wanted = _listed(sizes)
    missing = len(wanted) - len(x.shape)
    if missing or wanted[0] not in (-1, x.shape[0]):
        raise UnsupportedModel("expanding the batch axis, or in front of it")
    pairs = list(zip(x.shape, wanted, strict=True))[1:]
    return _repeated(x, math.prod(new for old, new in pairs if old == 1 and new > 1))


@lipschitz_rule("expand_as", rounding=exact)
def expand_as(x: Any, other: Any) -> Signal:
    """As `expand`; of the other tensor only the shape matters."""
    if not isinstance(x, Signal):
        raise UnsupportedModel("a constant with the shape of a batch; sums repeat it by themselves")
    return expand(x, *other.shape)


@lipschitz_rule("repeat", "tile", torch.tile, rounding=exact)
def repeat(x: Signal, *repeats: Any) -> Signal:
    """Each entry the product of the repeats times."""
    counts = _listed(repeats)
    if len(counts) > len(x.shape) or (len(counts) == len(x.shape) and counts[0] != 1):
        raise UnsupportedModel("repeating the batch axis, or in front of it")
    return _repeated(x, math.prod(counts))


def _repeated(x: Signal, times: int) -> Signal:
    return x.scaled(math.sqrt(times) * (1 + 2**-50) if times > 1 else 1.0, linear=True)


def _listed(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """Integers given one by one, or as one sequence."""
    one = arguments[0] if len(arguments) == 1 else arguments
    return tuple(one) if isinstance(one, (tuple, list)) else (one,)


@lipschitz_rule("size")
def size(x: Signal, dim: int | None = None) -> Any:
    """A shape, not a tensor."""
    return torch.Size(x.shape) if dim is None else x.shape[dim]


@lipschitz_rule("dim", "ndimension")
def dim(x: Signal) -> int:
    """A number of axes."""
    return len(x.shape)


@lipschitz_rule("numel", torch.numel)
def numel(x: Signal) -> int:
    """A number of entries."""
    return math.prod(x.shape)


@lipschitz_rule(getattr, rounding=exact)
def attribute(x: Any, name: str) -> Any:
    """Shapes and types are known; anything else of a tensor is not."""
    if not isinstance(x, Signal):
        return getattr(x, name)
    known = {
        "shape": torch.Size(x.shape),
        "ndim": len(x.shape),
        "requires_grad": False,
        "device": x.input.device,
        "dtype": x.input.dtype,
    }
    if name in known:
        return known[name]
    if name == "mT" and len(x.shape) > 2:
        return x.scaled(linear=True)
    raise UnsupportedModel(f"attribute {name!r} of a tensor that depends on the input")
