"""The rounding lemmas, checked in rational arithmetic: Python's fractions do not round."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ff_bounds.rounding import (
    SMALLEST_NORMAL,
    UNIT_ROUNDOFF,
    gamma,
    power_of_two,
    product_bound,
    round_up,
    scale_by_power_of_two,
    sum_bound,
    undo_scaling,
)

U = Fraction(UNIT_ROUNDOFF)
NON_NEGATIVE = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_constants_are_those_of_float64() -> None:
    info = torch.finfo(torch.float64)
    assert info.eps / 2 == UNIT_ROUNDOFF
    assert info.tiny == SMALLEST_NORMAL


@pytest.mark.parametrize("k", [1, 2, 3, 10, 1000, 10**6, 10**12, 2**50])
def test_gamma_is_never_below_its_definition(k: int) -> None:
    exact = k * U / (1 - k * U)
    assert exact <= Fraction(gamma(k)) <= exact * (1 + 10 * U)


@pytest.mark.parametrize("k", [0, 1, 2, 5, 100, 1000])
def test_round_up_pays_for_the_worst_case_of_k_roundings(k: int) -> None:
    worst = (1 - U) ** k  # every rounding went down by a full unit
    factor = Fraction(round_up(scalar(1.0), k).item())
    assert worst * factor * (1 - U) >= 1  # its own multiplication rounds once more


@pytest.mark.parametrize("k", [10**6, 10**9, 2**40, 2**50])
def test_round_up_pays_for_very_many_roundings(k: int) -> None:
    factor = Fraction(round_up(scalar(1.0), k).item())
    assert (1 - (k + 1) * U) * factor >= 1  # Bernoulli: (1-u)^(k+1) >= 1 - (k+1) u
    assert factor <= 1 + 3 * (k + 2) * U


@given(values=st.lists(NON_NEGATIVE.filter(lambda v: v < 1e300), min_size=1, max_size=20))
def test_round_up_bounds_a_computed_sum(values: list[float]) -> None:
    computed = torch.tensor(values, dtype=torch.float64).sum()
    assert Fraction(round_up(computed, len(values)).item()) >= sum(map(Fraction, values))


def test_round_up_is_differentiable() -> None:
    value = scalar(2.0).requires_grad_()
    (gradient,) = torch.autograd.grad(round_up(value, 3), value)
    assert gradient.item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("bound", "exact"),
    [(product_bound, Fraction.__mul__), (sum_bound, Fraction.__add__)],
)
@given(first=NON_NEGATIVE, second=NON_NEGATIVE)
def test_sums_and_products_are_bounded(
    bound: Callable[[Tensor, Tensor], Tensor],
    exact: Callable[[Fraction, Fraction], Fraction],
    first: float,
    second: float,
) -> None:
    result = bound(scalar(first), scalar(second)).item()
    true = exact(Fraction(first), Fraction(second))
    if math.isinf(result):
        assert true > Fraction(torch.finfo(torch.float64).max) * (1 - 100 * U)
    else:
        # The second side would let neither inf nor a sloppy factor pass.
        assert true <= Fraction(result) <= true * (1 + 20 * U) + Fraction(SMALLEST_NORMAL)


def test_product_underflow_never_reads_as_zero() -> None:
    tiny = scalar(1e-200)
    assert product_bound(tiny, tiny).item() == SMALLEST_NORMAL
    assert product_bound(tiny, scalar(0.0)).item() == 0.0
    assert product_bound(scalar(0.0), scalar(math.inf)).item() == 0.0  # zero times any true norm


def test_powers_of_two_are_exact_over_the_whole_range() -> None:
    exponents = torch.arange(-1022, 1024)
    expected = torch.tensor([math.ldexp(1.0, int(e)) for e in exponents], dtype=torch.float64)
    assert torch.equal(power_of_two(exponents), expected)


@given(
    value=st.floats(allow_nan=False, allow_infinity=False),
    exponent=st.integers(-2044, 2044),
)
def test_scaling_is_exact_unless_it_underflows(value: float, exponent: int) -> None:
    scaled = scale_by_power_of_two(scalar(value), torch.tensor(exponent)).item()
    exact = Fraction(value) * Fraction(2) ** exponent
    if math.isinf(scaled):
        assert abs(exact) > Fraction(torch.finfo(torch.float64).max)
    elif abs(exact) >= Fraction(SMALLEST_NORMAL):
        assert Fraction(scaled) == exact
    else:
        assert abs(Fraction(scaled) - exact) <= Fraction(SMALLEST_NORMAL)


@given(
    value=st.floats(min_value=0.0, max_value=1e9),
    exponent=st.integers(-1074, 1024),
)
def test_undoing_a_scaling_never_falls_below(value: float, exponent: int) -> None:
    result = undo_scaling(scalar(value), torch.tensor(exponent)).item()
    exact = Fraction(value) * Fraction(2) ** exponent
    if math.isinf(result):
        assert exact > Fraction(torch.finfo(torch.float64).max)
    else:
        assert exact <= Fraction(result) <= exact + 2 * Fraction(SMALLEST_NORMAL)
        assert result == exact or exact < 2 * Fraction(SMALLEST_NORMAL)
