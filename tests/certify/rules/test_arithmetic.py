"""Rules of sums, and of arithmetic with constants."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, nn

from tests.certify.rules.harness import Apply, Case, certify, check, on


def added_in_place(x: Tensor) -> Tensor:
    y = x[:, 1:]
    y += x[:, :-1] + 1.0
    return y


CASES = [
    Case("x + x", (operator.add,), on(lambda x: x + x), (4,)),
    Case("x + constant", (operator.add,), on(lambda x: x + 3.0), (4,)),
    Case("constant + x", (operator.add,), on(lambda x: 3.0 + x), (4,)),
    Case("sum of a list", (operator.add,), on(lambda x: sum([x, x, x])), (4,)),
    Case("+=", (operator.add, operator.getitem), on(added_in_place), (5,), 1.2),
    Case("torch.add", (torch.add,), on(lambda x: torch.add(x, x)), (4,)),
    Case("add method", ("add",), on(lambda x: x.add(x)), (4,)),
    Case("add_ method", ("add_",), on(lambda x: (x + 0.0).add_(x)), (4,)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


def test_sums_of_signals_and_repeated_use() -> None:
    """``x + x`` is 2, ``(x + x) + x`` is 3: no use of a tensor is lost."""
    assert certify(Apply(lambda x: (x + x) + x), (2,))[1] == pytest.approx(3.0)
    linear = nn.Linear(3, 3)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = linear

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.tanh(self.linear(x)))

    once = certify(linear, (3,))[1]
    assert certify(Twice(), (3,))[1] == pytest.approx(once**2, rel=1e-9)
