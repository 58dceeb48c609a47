"""Rules of sums, and of arithmetic with constants."""

from __future__ import annotations

import operator
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn

from tests.certify.rules.harness import Apply, Case, certify, check, on


def added_in_place(x: Tensor) -> Tensor:
    y = x[:, 1:]
    y += x[:, :-1] + 1.0
    return y


CHANNELS = torch.tensor([[0.5], [-3.0]], dtype=torch.float64)
ENTRIES = torch.tensor([[0.5, 2.0, -3.0], [1.0, 0.25, 0.125]], dtype=torch.float64)
COLUMNS = torch.tensor([[0.5, 2.0], [-3.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
ZERO = torch.zeros((), dtype=torch.float64)


CASES = [
    Case("x + x", (operator.add,), on(lambda x: x + x), (4,)),
    Case("x + constant", (operator.add,), on(lambda x: x + 3.0), (4,)),
    Case("constant + x", (operator.add,), on(lambda x: 3.0 + x), (4,)),
    Case("sum of a list", (operator.add,), on(lambda x: sum([x, x, x])), (4,)),
    Case("+=", (operator.add, operator.getitem), on(added_in_place), (5,), 1.2),
    Case("torch.add", (torch.add,), on(lambda x: torch.add(x, x)), (4,)),
    Case("add method", ("add",), on(lambda x: x.add(x)), (4,)),
    Case("add_ method", ("add_",), on(lambda x: (x + 0.0).add_(x)), (4,)),
    *[
        Case(f"{name} of a constant", (key,), on(lambda x, f=f: f(x, CHANNELS)), (2, 3))
        for name, key, f in (
            ("-", operator.sub, lambda x, c: x - c),
            ("torch.sub", torch.sub, lambda x, c: torch.sub(x, c)),
            ("torch.subtract", torch.subtract, lambda x, c: torch.subtract(x, c)),
            ("sub", "sub", lambda x, c: x.sub(c)),
            ("sub_", "sub_", lambda x, c: (x + 0).sub_(c)),
            ("subtract", "subtract", lambda x, c: x.subtract(c)),
            ("subtract_", "subtract_", lambda x, c: (x + 0).subtract_(c)),
            ("torch.rsub", torch.rsub, lambda x, c: torch.rsub(x, c)),
            ("*", operator.mul, lambda x, c: x * c),
            ("torch.mul", torch.mul, lambda x, c: torch.mul(c, x)),
            ("torch.multiply", torch.multiply, lambda x, c: torch.multiply(x, c)),
            ("mul", "mul", lambda x, c: x.mul(c)),
            ("mul_", "mul_", lambda x, c: (x + 0).mul_(c)),
            ("multiply", "multiply", lambda x, c: x.multiply(c)),
            ("multiply_", "multiply_", lambda x, c: (x + 0).multiply_(c)),
            ("/", operator.truediv, lambda x, c: x / c),
            ("torch.div", torch.div, lambda x, c: torch.div(x, c)),
            ("torch.divide", torch.divide, lambda x, c: torch.divide(x, c)),
            ("torch.true_divide", torch.true_divide, lambda x, c: torch.true_divide(x, c)),
            ("div", "div", lambda x, c: x.div(c)),
            ("div_", "div_", lambda x, c: (x + 0).div_(c)),
            ("divide", "divide", lambda x, c: x.divide(c)),
            ("true_divide", "true_divide", lambda x, c: x.true_divide(c)),
        )
    ],
    Case("entries that are repeated", (operator.add,), on(lambda x: x[:, :1] + x), (3,), 1.2),
    Case("less its mean", (operator.sub,), on(lambda x: x - x.mean(1, keepdim=True)), (4,), 2.1),
    Case("constant - x", (operator.sub,), on(lambda x: 1.0 - x), (3,)),
    Case("constant * x", (operator.mul,), on(lambda x: -3 * x), (3,)),
    Case("x + alpha x", (torch.add,), on(lambda x: torch.add(x, x, alpha=-3)), (3,), 2.1),
    Case("x - alpha x", (torch.sub,), on(lambda x: torch.sub(x, torch.tanh(x), alpha=-2)), (3,)),
    Case("factors by entry", (operator.mul,), on(lambda x: x * ENTRIES), (2, 3)),
    Case("divisors by entry", (operator.truediv,), on(lambda x: x / ENTRIES), (2, 3)),
    *[
        Case(name, (key,), on(f), (3,))
        for name, key, f in (
            ("-x", operator.neg, lambda x: -x),
            ("torch.neg", torch.neg, lambda x: torch.neg(x)),
            ("torch.negative", torch.negative, lambda x: torch.negative(x)),
            ("neg", "neg", lambda x: x.neg()),
            ("neg_", "neg_", lambda x: (x + 0).neg_()),
            ("negative", "negative", lambda x: x.negative()),
        )
    ],
    *[
        Case(name, (key,), on(f), (3,), 1.5)
        for name, key, f in (
            ("torch.maximum", torch.maximum, lambda x: torch.maximum(x, 2 * x)),
            ("torch.minimum", torch.minimum, lambda x: torch.minimum(x, x.flip(1))),
            ("torch.fmax", torch.fmax, lambda x: torch.fmax(x, -x)),
            ("torch.fmin", torch.fmin, lambda x: torch.fmin(-x, x)),
            ("maximum", "maximum", lambda x: x.maximum(-x)),
            ("minimum", "minimum", lambda x: x.minimum(-x)),
            ("maximum with a constant", torch.maximum, lambda x: torch.maximum(x, ZERO)),
        )
    ],
    Case("matrix from the left", (torch.matmul,), on(lambda x: torch.matmul(COLUMNS.T, x)), (3, 2)),
    *[
        Case(name, (key,), on(f), (3,))
        for name, key, f in (
            ("torch.matmul", torch.matmul, lambda x: torch.matmul(x, COLUMNS)),
            ("@", operator.matmul, lambda x: x @ COLUMNS),
            ("mm", "mm", lambda x: x.mm(COLUMNS)),
            ("torch.mm", torch.mm, lambda x: torch.mm(x, COLUMNS)),
            ("matmul", "matmul", lambda x: x.matmul(COLUMNS)),
            ("addmm", torch.addmm, lambda x: torch.addmm(ZERO, x, COLUMNS, alpha=-2.5)),
        )
    ],
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
    square = nn.Linear(3, 3)
    square.weight.data = linear.weight.data.double() @ linear.weight.data.double()
    twice = certify(square, (3,))[1]  # half the norm of the square, half the square of the norm
    assert certify(Twice(), (3,))[1] == pytest.approx((twice + once**2) / 2, rel=1e-6)


@pytest.mark.parametrize("factor", [0.7, -0.9, 1e-3, 1e39, 3, 2**53 + 1])
def test_numbers_are_not_rounded_to_single_precision(factor: float) -> None:
    for function in (
        lambda x: x * factor,
        lambda x: torch.sub(0.0 * x, x, alpha=factor) if abs(factor) < 1e30 else factor * x,
        lambda x: x / (1.0 / factor),
    ):
        bound = certify(Apply(function), (2,))[1]
        assert abs(factor) * (1 - 1e-15) <= bound <= abs(factor) * (1 + 1e-12)
    assert Fraction(certify(Apply(lambda x: x * factor), (2,))[1]) >= abs(Fraction(factor))


@pytest.mark.parametrize(
    ("factors", "truth"),
    [
        ((1e-300, 1.3e-20, 1e29, 1e28), 1.3e-263),
        ((1e-308, 1 / 1.3e10, 1e29), 1e-308 / 1.3e10 * 1e20 * 1e9),
        ((1e-310, 1e-5, 1e29), 1e-286),
    ],
)
def test_factors_that_underflow_together(factors: tuple[float, ...], truth: float) -> None:
    def scaled(x: Tensor) -> Tensor:
        for factor in factors:
            x = x * factor
        return x

    assert certify(Apply(scaled), (1,))[1] >= truth * (1 - 1e-12)


def test_an_empty_slice_is_no_division_by_zero() -> None:
    assert certify(Apply(lambda x: torch.cat([x, x[:, :0] + 1.0], 1)), (2,))[1] >= 1.0
