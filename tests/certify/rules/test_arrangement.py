"""Rules of operations that move, drop, join or repeat entries."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.certify.rules.harness import Case, check, on, trained

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
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)
