"""Rules of operations that move, drop, join or repeat entries."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from certify import CertifiedModel, UnsupportedModel
from tests.certify.rules.harness import Apply, Case, check, on, trained

PLACES = torch.tensor([2, 0, 2])

CASES = [
    Case("identity", (nn.Identity,), nn.Identity, (4,)),
    Case("dropout", (nn.Dropout,), lambda: nn.Dropout(0.9), (4,)),
    Case("dropout 2d", (nn.Dropout2d,), lambda: nn.Dropout2d(0.9), (2, 2, 2)),
    Case(
        "dropout between linear and norm",
        (nn.Linear, nn.Dropout, nn.BatchNorm1d),
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(), trained(nn.BatchNorm1d(4))),
        (5,),
    ),
    Case("flatten layer", (nn.Flatten,), nn.Flatten, (2, 2, 2)),
    Case("torch.flatten", (torch.flatten,), on(lambda x: torch.flatten(x, 1)), (2, 2, 2)),
    Case("flatten method", ("flatten",), on(lambda x: x.flatten(-2)), (2, 2, 2)),
    Case("torch.reshape", (torch.reshape,), on(lambda x: torch.reshape(x, (-1, 4))), (2, 2)),
    Case("reshape", ("reshape", "size"), on(lambda x: x.reshape(x.size(0), -1)), (2, 2)),
    Case("view", ("view", getattr), on(lambda x: x.view(x.shape[0], -1)), (2, 2)),
    Case("size", ("size", "view"), on(lambda x: x.view(x.size()[0], x.size(1) * 2)), (2, 2)),
    Case("slices", (operator.getitem,), on(lambda x: x[:, 1:, ::2]), (3, 4)),
    Case("ellipsis", (operator.getitem,), on(lambda x: x[..., 1]), (3, 4)),
    Case("pad", (F.pad,), on(lambda x: F.pad(x, (1, 2), value=5.0)), (3,)),
    Case("crop", (F.pad,), on(lambda x: F.pad(x, (-1, 1, 0, 2))), (3, 3)),
    *[
        Case(
            f"{kind.__name__} in evaluation",
            (kind,),
            lambda kind=kind: kind(0.9),
            (2, *(2,) * axes),
        )
        for kind, axes in (
            (nn.Dropout1d, 1),
            (nn.Dropout3d, 3),
            (nn.AlphaDropout, 1),
            (nn.FeatureAlphaDropout, 1),
        )
    ],
    *[
        Case(
            f"F.{function.__name__}",
            (function,),
            on(lambda x, function=function: function(x, 0.5, False)),
            (2, *(2,) * axes),
        )
        for function, axes in (
            (F.dropout, 0),
            (F.dropout1d, 1),
            (F.dropout2d, 2),
            (F.dropout3d, 3),
            (F.alpha_dropout, 1),
            (F.feature_alpha_dropout, 1),
        )
    ],
    Case("torch.dropout", (torch.dropout,), on(lambda x: torch.dropout(x, 0.5, False)), (3,)),
    Case("contiguous", ("contiguous",), on(lambda x: x.contiguous()), (3,)),
    Case("clone", ("clone",), on(lambda x: x.clone()), (3,)),
    Case("detach", ("detach",), on(lambda x: x + x.detach()), (3,)),
    Case("torch.clone", (torch.clone,), on(lambda x: torch.clone(x)), (3,)),
    Case("double", ("double",), on(lambda x: x.double()), (3,)),
    Case("unflatten layer", (nn.Unflatten,), lambda: nn.Unflatten(1, (2, 3)), (6,)),
    Case("torch.unflatten", (torch.unflatten,), on(lambda x: torch.unflatten(x, 1, (2, 3))), (6,)),
    Case("unflatten", ("unflatten",), on(lambda x: x.unflatten(1, (2, 3))), (6,)),
    Case("pixel shuffle layer", (nn.PixelShuffle,), lambda: nn.PixelShuffle(2), (4, 2, 2)),
    Case("pixel unshuffle layer", (nn.PixelUnshuffle,), lambda: nn.PixelUnshuffle(2), (1, 4, 4)),
    Case("channel shuffle layer", (nn.ChannelShuffle,), lambda: nn.ChannelShuffle(2), (4, 2, 2)),
    Case("pixel shuffle", (F.pixel_shuffle,), on(lambda x: F.pixel_shuffle(x, 2)), (4, 2, 2)),
    Case("pixel unshuffle", (F.pixel_unshuffle,), on(lambda x: F.pixel_unshuffle(x, 2)), (1, 4, 4)),
    Case("channel shuffle", (F.channel_shuffle,), on(lambda x: F.channel_shuffle(x, 2)), (4, 2, 2)),
    Case("view as", ("view_as",), on(lambda x: (2.0 * x).view_as(x)), (2, 3)),
    Case("reshape as", ("reshape_as",), on(lambda x: x.flip(1).reshape_as(x)), (2, 3)),
    Case("expand as", ("expand_as",), on(lambda x: x[:, :1].expand_as(x)), (3, 2)),
    Case("torch.movedim", (torch.movedim,), on(lambda x: torch.movedim(x, 1, 2)), (2, 3)),
    Case("torch.moveaxis", (torch.moveaxis,), on(lambda x: torch.moveaxis(x, -1, 1)), (2, 3)),
    Case("movedim", ("movedim",), on(lambda x: x.movedim((1, 2), (2, 1))), (2, 3)),
    Case("moveaxis", ("moveaxis",), on(lambda x: x.moveaxis(1, 2)), (2, 3)),
    Case("type as", ("type_as",), on(lambda x: (2.0 * x).type_as(x)), (3,)),
    Case("to", ("to", getattr), on(lambda x: x.to(x.dtype).to(x.device)), (3,)),
    Case("constant to", ("to",), on(lambda x: x + torch.ones(1, 3).to(x)), (3,)),
    Case("constant type", ("type_as",), on(lambda x: x * PLACES.type_as(x)), (3,)),
    Case("to another", ("to",), on(lambda x: (x + 1.0).to(x)), (3,)),
    Case("list of entries", (operator.getitem,), on(lambda x: x[:, [2, 0, 2, -1]]), (3, 2)),
    Case("list of columns", (operator.getitem,), on(lambda x: x[:, 1:, [1, 1, 1]]), (3, 2)),
    Case("indices", (operator.getitem,), on(lambda x: x[:, torch.tensor([0, 0])]), (3,)),
    Case(
        "torch.index_select",
        (torch.index_select,),
        on(lambda x: torch.index_select(x, -1, torch.tensor([1, 1, 0]))),
        (2, 3),
    ),
    Case("index_select", ("index_select",), on(lambda x: x.index_select(1, PLACES)), (3,)),
    Case(
        "torch.masked_fill",
        (torch.masked_fill,),
        on(lambda x: torch.masked_fill(x, torch.arange(3) == 1, 7.0)),
        (3,),
    ),
    Case("masked_fill", ("masked_fill",), on(lambda x: x.masked_fill(PLACES == 2, -1.0)), (2, 3)),
    Case(
        "masked_fill_",
        ("masked_fill_",),
        on(lambda x: (x + 0.0).masked_fill_(PLACES == 2, torch.tensor(0.3))),
        (3,),
    ),
    Case("torch.tril", (torch.tril,), on(lambda x: torch.tril(x)), (3, 3)),
    Case("torch.triu", (torch.triu,), on(lambda x: torch.triu(x, diagonal=-1)), (3, 3)),
    Case("tril", ("tril",), on(lambda x: x.tril(1)), (2, 3)),
    Case("triu", ("triu",), on(lambda x: x.triu()), (2, 3)),
    Case(
        "torch.diagonal",
        (torch.diagonal,),
        on(lambda x: torch.diagonal(x, dim1=1, dim2=2)),
        (3, 3),
    ),
    Case("diagonal", ("diagonal",), on(lambda x: x.diagonal(1, -2, -1)), (3, 3)),
    *[
        Case(
            f"{name} beside it",
            (key,),
            on(lambda x, make=make: torch.cat([x, make(x)], 1)),
            (3,),
        )
        for name, key, make in (
            ("zeros_like", torch.zeros_like, torch.zeros_like),
            ("ones_like", torch.ones_like, torch.ones_like),
            ("full_like", torch.full_like, lambda x: torch.full_like(x, 0.1)),
            ("new_zeros", "new_zeros", lambda x: x.new_zeros(x.shape[0], 2)),
            ("new_ones", "new_ones", lambda x: x.new_ones((x.shape[0], 2))),
            ("new_full", "new_full", lambda x: x.new_full((x.shape[0], 2), 0.1)),
        )
    ],
    Case("sizes", ("view",), on(lambda x: x.view(*x.shape[:2], -1).view(*x.shape)), (2, 2, 2)),
    Case("torch.squeeze", (torch.squeeze,), on(lambda x: torch.squeeze(x, 2)), (3, 1)),
    Case("squeeze", ("squeeze",), on(lambda x: x.squeeze(-1)), (3, 1)),
    Case("squeeze_", ("squeeze_",), on(lambda x: (x + 0.0).squeeze_(-1)), (3, 1)),
    Case("torch.unsqueeze", (torch.unsqueeze,), on(lambda x: torch.unsqueeze(x, -1)), (3,)),
    Case("unsqueeze", ("unsqueeze",), on(lambda x: x.unsqueeze(1)), (3,)),
    Case("unsqueeze_", ("unsqueeze_",), on(lambda x: (x + 0.0).unsqueeze_(1)), (3,)),
    Case("torch.permute", (torch.permute,), on(lambda x: torch.permute(x, (0, 2, 1))), (2, 3)),
    Case("permute", ("permute",), on(lambda x: x.permute(0, 2, 1)), (2, 3)),
    Case("torch.transpose", (torch.transpose,), on(lambda x: torch.transpose(x, 1, 2)), (2, 3)),
    Case("transpose", ("transpose",), on(lambda x: x.transpose(-1, 1)), (2, 3)),
    Case("transpose_", ("transpose_",), on(lambda x: x.clone().transpose_(-1, 1)), (2, 3)),
    Case("torch.swapaxes", (torch.swapaxes,), on(lambda x: torch.swapaxes(x, 1, 2)), (2, 3)),
    Case("swapaxes", ("swapaxes",), on(lambda x: x.swapaxes(1, 2)), (2, 3)),
    Case("torch.flip", (torch.flip,), on(lambda x: torch.flip(x, (1, 2))), (2, 3)),
    Case("flip", ("flip",), on(lambda x: x.flip(1)), (2, 3)),
    Case("torch.roll", (torch.roll,), on(lambda x: torch.roll(x, 1, 2)), (2, 3)),
    Case("roll", ("roll",), on(lambda x: x.roll(shifts=1, dims=1)), (2, 3)),
    Case("index of a new axis", (operator.getitem,), on(lambda x: x[:, None, 1:]), (3,)),
    Case("torch.narrow", (torch.narrow,), on(lambda x: torch.narrow(x, 1, 1, 2)), (4,)),
    Case("narrow", ("narrow",), on(lambda x: x.narrow(1, 1, 2)), (4,)),
    Case("torch.select", (torch.select,), on(lambda x: torch.select(x, 1, 0)), (4, 2)),
    Case("select", ("select",), on(lambda x: x.select(1, 0)), (4, 2)),
    Case("torch.chunk", (torch.chunk,), on(lambda x: torch.chunk(x, 3, 1)[1]), (5,)),
    Case("chunk", ("chunk",), on(lambda x: x.chunk(4, dim=1)[2]), (5,)),
    Case("torch.split", (torch.split,), on(lambda x: torch.split(x, 2, 1)[2]), (5,)),
    Case("split", ("split",), on(lambda x: x.split([1, 4], dim=1)[1]), (5,)),
    Case("torch.unbind", (torch.unbind,), on(lambda x: torch.unbind(x, 1)[1]), (3, 2)),
    Case("unbind", ("unbind",), on(lambda x: x.unbind(-1)[1]), (2, 3)),
    Case("cat", (torch.cat,), on(lambda x: torch.cat([x, 2.0 * x], 1)), (3,)),
    Case("cat with constants", (torch.cat,), on(lambda x: torch.cat([x, 0.0 * x + 1], 1)), (3,)),
    Case("concat", (torch.concat,), on(lambda x: torch.concat((x, x), -1)), (2, 2)),
    Case("concatenate", (torch.concatenate,), on(lambda x: torch.concatenate((x, x), 2)), (2, 2)),
    Case("stack", (torch.stack,), on(lambda x: torch.stack([x, 3.0 * x], 1)), (3,)),
    Case("reflect", (F.pad,), on(lambda x: F.pad(x, (2, 2), mode="reflect")), (1, 3)),
    Case("replicate", (F.pad,), on(lambda x: F.pad(x, (0, 3), mode="replicate")), (1, 3)),
    Case("circular", (F.pad,), on(lambda x: F.pad(x, (2, 1), mode="circular")), (1, 3)),
    *[
        Case(kind.__name__, (kind,), lambda kind=kind: kind(1, 0.5), (2, *size))
        for kind, size in (
            (nn.ConstantPad1d, (3,)),
            (nn.ConstantPad2d, (3, 2)),
            (nn.ConstantPad3d, (2, 1, 2)),
        )
    ],
    *[
        Case(kind.__name__, (kind,), lambda kind=kind: kind(1), (1, *(3,) * axes))
        for axes, kinds in enumerate(
            (
                (nn.ZeroPad1d, nn.ReflectionPad1d, nn.ReplicationPad1d, nn.CircularPad1d),
                (nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.CircularPad2d),
                (nn.ZeroPad3d, nn.ReflectionPad3d, nn.ReplicationPad3d, nn.CircularPad3d),
            ),
            start=1,
        )
        for kind in kinds
    ],
    Case(
        "torch.repeat_interleave",
        (torch.repeat_interleave,),
        on(lambda x: torch.repeat_interleave(x, 3, dim=1)),
        (2, 2),
    ),
    Case(
        "repeat_interleave", ("repeat_interleave",), on(lambda x: x.repeat_interleave(2, 2)), (2, 2)
    ),
    Case("expand", ("expand",), on(lambda x: x.expand(-1, 3, 4)), (3, 1)),
    Case("repeat", ("repeat",), on(lambda x: x.repeat(1, 2, 3)), (2, 2)),
    Case("tile", ("tile",), on(lambda x: x.tile(2, 3)), (2, 2)),
    Case("torch.tile", (torch.tile,), on(lambda x: torch.tile(x, (1, 2, 1))), (2, 2)),
    Case("axes", ("dim",), on(lambda x: x.flatten(1 - x.dim())), (2, 2)),
    Case("ndimension", ("ndimension",), on(lambda x: x.flatten(1 - x.ndimension())), (2, 2)),
    Case("numel", ("numel",), on(lambda x: x / (x.numel() // x.shape[0])), (2, 2)),
    Case("torch.numel", (torch.numel,), on(lambda x: x / (torch.numel(x) // x.shape[0])), (2, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[[0, 1, 2, 3, 4]],
        lambda x: x[:, 0, [0, 1]],
        lambda x: x[:, [0, x[0, 0].max(-1).indices]],
        lambda x: x[:, x.max(1).indices],
        lambda x: x[:, [0, 1], [0, 1]],
        lambda x: x[:, PLACES == 2],
        lambda x: x.index_select(0, torch.tensor([0, 1, 2, 3, 4])),
        lambda x: x.movedim(0, 1),
        lambda x: x.moveaxis(2, 0),
        lambda x: x.masked_fill(torch.eye(5, 3)[:, :, None] > 0, 0.0),
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: x[:, :, 0].tril(),
        lambda x: x.diagonal(),
        lambda x: x.diagonal(dim1=0, dim2=2),
        lambda x: x.new_zeros(3, 3),
        lambda x: x.to(torch.float32),
        lambda x: x.type_as(torch.zeros(1, dtype=torch.float32)),
        lambda x: torch.zeros_like(x) / torch.zeros_like(x),
        lambda x: torch.eye(5, dtype=x.dtype) @ x[:, :, 0],
    ],
)
def test_samples_are_kept_apart(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises((UnsupportedModel, ValueError)):
        CertifiedModel(nn.Sequential(Apply(function), nn.Flatten()), (3, 3))


def test_entries_that_are_chosen_twice_count() -> None:
    """As often as they are there, by negative numbers too, and a network goes through."""

    def shuffled(x: torch.Tensor) -> torch.Tensor:
        return F.relu(x[:, [0, 1, 1, -2]])

    model = nn.Sequential(Apply(shuffled), nn.Linear(4, 2, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(1.0)
    found = CertifiedModel(model, (3,), tighten="none").lipschitz().item()
    norm = (4.0 * 2.0) ** 0.5  # of the matrix
    assert found == pytest.approx(3.0**0.5 * norm, rel=1e-6)
