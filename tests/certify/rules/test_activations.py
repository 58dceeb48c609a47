"""Rules of functions of each entry by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from models import MaxMin
from tests.certify.rules.harness import Case, check, on

CASES = [
    Case("relu", (nn.ReLU,), nn.ReLU, (4,)),
    Case("relu in place", (nn.ReLU,), lambda: nn.ReLU(inplace=True), (4,)),
    Case("tanh", (nn.Tanh,), nn.Tanh, (4,)),
    Case("F.relu", (F.relu,), on(F.relu), (4,)),
    Case("F.relu in place", (F.relu,), on(lambda x: F.relu(x, inplace=True)), (4,)),
    Case("torch.relu", (torch.relu,), on(torch.relu), (4,)),
    Case("torch.tanh", (torch.tanh,), on(torch.tanh), (4,)),
    Case("relu method", ("relu",), on(lambda x: x.relu()), (4,)),
    Case("relu_ method", ("relu_",), on(lambda x: x.relu_()), (4,)),
    Case("tanh method", ("tanh",), on(lambda x: x.tanh()), (4,)),
    Case("leaky relu", (nn.LeakyReLU,), lambda: nn.LeakyReLU(0.2), (4,)),
    Case("steep leaky relu", (nn.LeakyReLU,), lambda: nn.LeakyReLU(-3.0), (4,)),
    Case("sigmoid", (nn.Sigmoid,), nn.Sigmoid, (4,)),
    Case("softplus", (nn.Softplus,), lambda: nn.Softplus(threshold=40.0), (4,), 1.01),
    Case("sharp softplus", (nn.Softplus,), lambda: nn.Softplus(beta=7.0, threshold=34.0), (4,)),
    Case("maxmin", (MaxMin,), MaxMin, (4,)),
    Case("maxmin of images", (MaxMin,), MaxMin, (4, 2, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


def test_softplus_overflow_would_break_a_certificate() -> None:
    """Why a large threshold is refused: 709.7 and 709.8 are mapped to 709.7 and infinity."""
    x = torch.tensor([709.7, 709.8], dtype=torch.float64)
    assert F.softplus(x, threshold=1e6).isinf().tolist() == [False, True]
