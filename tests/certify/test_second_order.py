from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from certify.second_order import second_order_radius

Number = st.floats(1e-6, 1e6)


def radius(margin: float, gradient: float, curvature: float, lipschitz: float) -> float:
    numbers = (margin, gradient, curvature, lipschitz)
    found = second_order_radius(*(torch.tensor([n], dtype=torch.float64) for n in numbers))
    return found.item()


def fall(r: float, gradient: float, curvature: float, lipschitz: float) -> float:
    """Integral of the smaller slope, in closed form."""
    length = min(r, max(0.0, (lipschitz - gradient) / curvature)) if curvature else r
    if curvature == 0:
        return min(gradient, lipschitz) * r
    return gradient * length + curvature * length**2 / 2 + lipschitz * (r - length)


@given(margin=Number, gradient=Number, curvature=Number, lipschitz=Number)
def test_the_fall_is_the_margin(
    margin: float, gradient: float, curvature: float, lipschitz: float
) -> None:
    gradient = min(gradient, lipschitz)
    found = radius(margin, gradient, curvature, lipschitz)
    assert fall(found, gradient, curvature, lipschitz) <= margin * (1 - 1e-14)
    assert fall(found, gradient, curvature, lipschitz) >= margin * (1 - 1e-9)
    assert found >= radius(margin, gradient, math.inf, lipschitz) * (1 - 1e-11)
    assert found >= radius(margin, gradient, curvature, math.inf) * (1 - 1e-11)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((1.5, 1.0, 1.0, math.inf), 1.0),
        ((1.0, 0.0, 2.0, math.inf), 1.0),
        ((3.0, 1.0, 0.0, 5.0), 3.0),  # no curvature: the gradient is the slope everywhere
        ((3.0, 9.0, 1.0, 2.0), 1.5),  # a computed gradient above the Lipschitz constant
        ((2.0, 1.0, math.inf, 4.0), 0.5),
        ((1.0, 0.0, 0.0, 0.0), math.inf),
        ((0.0, 1.0, 1.0, 1.0), 0.0),
        ((-1.0, 1.0, 1.0, 1.0), 0.0),
        ((math.nan, 1.0, 1.0, 1.0), 0.0),
        ((1.0, math.nan, 1.0, 2.0), 0.5),
        ((1.0, 1.0, math.nan, 2.0), 0.5),
        ((1.0, 1.0, math.inf, math.inf), 0.0),
        ((math.inf, 1.0, 1.0, 1.0), 0.0),
        ((1e-300, 1.0, 1.0, 1.0), 0.0),
        ((2.0e-105, 0.0, 5.7e257, 7.9e84), 2.0e-105 / 7.9e84),  # K r^2 underflows on the way
    ],
)
def test_ends(numbers: tuple[float, float, float, float], expected: float) -> None:
    assert radius(*numbers) == pytest.approx(expected, rel=1e-9)
