"""Cones against exact rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from certify.cones import cones
from certify.signal import Slopes

ACTIVATIONS = {
    "relu": Slopes(0.0, 1.0, breaks=(0.0,), slopes=(0.0, 1.0)),
    "leaky": Slopes(0.01, 1.0, breaks=(0.0,), slopes=(0.01, 1.0)),
    "steep leaky": Slopes(1.0, 3.0, breaks=(0.0,), slopes=(3.0, 1.0)),
    "relu6": Slopes(0.0, 1.0, breaks=(0.0, 6.0), slopes=(0.0, 1.0, 0.0)),
    "abs": Slopes(-1.0, 1.0, breaks=(0.0,), slopes=(-1.0, 1.0)),
    "shrink": Slopes(0.0, 1.0, breaks=(-0.5, 0.5), slopes=(1.0, 0.0, 1.0)),
    "empty middle": Slopes(0.0, 1.0, breaks=(0.0, 0.0), slopes=(1.0, 0.0, 1.0)),
}


def value(slopes: Slopes, x: Fraction) -> Fraction:
    """The function, up to a constant."""
    total = Fraction(slopes.slopes[0]) * x
    for start, before, after in zip(slopes.breaks, slopes.slopes, slopes.slopes[1:], strict=False):
        total += (Fraction(after) - Fraction(before)) * max(x - Fraction(start), Fraction(0))
    return total


number = st.floats(-10, 10)


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(point=number, reach=st.floats(0, 10), share=st.floats(-1, 1))
@example(point=-0.0, reach=1.0, share=-1.0)
@example(point=1e-9, reach=1e-9, share=-1.0)
@example(point=-1.0, reach=math.nextafter(1.0, 2.0), share=1.0)
@example(point=6.0, reach=1e-15, share=1.0)
def test_the_function_stays_in_its_cones(
    name: str, point: float, reach: float, share: float
) -> None:
    slopes = ACTIVATIONS[name]
    tensor = torch.tensor([point], dtype=torch.float64)
    found = cones(slopes, tensor, torch.tensor([reach], dtype=torch.float64))
    ends = [Fraction(share) * Fraction(reach)]
    ends += [Fraction(b) - Fraction(point) for b in slopes.breaks]
    ends += [Fraction(reach), -Fraction(reach), Fraction(reach) / 1024, -Fraction(reach) / 1024]
    for step in ends:
        if abs(step) > Fraction(reach):
            continue
        change = value(slopes, Fraction(point) + step) - value(slopes, Fraction(point))
        below, above, both = (
            (Fraction(c.centre.item()) * step, Fraction(c.spread.item()) * abs(step))
            for c in (found.below, found.above, found.both)
        )
        assert below[0] - below[1] <= change <= above[0] + above[1]
        assert abs(change - both[0]) <= both[1]
    for cone in (found.below, found.above, found.both):
        assert (cone.spread >= 0).all()
        assert cone.spread.item() <= (slopes.high - slopes.low) / 2 + 1e-12


@given(point=number, reach=st.floats(1e-6, 10))
def test_relu_is_exact_where_it_is_decided_and_narrow_elsewhere(point: float, reach: float) -> None:
    tensor = torch.tensor([point], dtype=torch.float64)
    found = cones(ACTIVATIONS["relu"], tensor, torch.tensor([reach], dtype=torch.float64))
    if abs(point) >= reach * (1 + 1e-12):
        for cone in (found.below, found.above, found.both):
            assert cone.centre.item() == float(point > 0)
            assert cone.spread.item() == 0.0
    elif abs(point) < reach * (1 - 1e-12):
        # Quotients from a point at distance p of the kink: between 0 and 1 - p / r, or p / r and 1.
        assert found.both.spread.item() == pytest.approx(0.5 * (1 - abs(point) / reach), abs=1e-12)
        if point != 0.0:
            assert found.below.spread.item() < 1e-12  # above its tangents


def test_what_is_not_known_is_between_all_slopes() -> None:
    reach = torch.ones(2, 3, dtype=torch.float64)
    for slopes, point in ((Slopes(-0.2, 1.1), reach), (ACTIVATIONS["relu"], None)):
        both = cones(slopes, point, reach).both
        assert (both.centre - both.spread <= slopes.low).all()
        assert (both.centre + both.spread >= slopes.high).all()
    constant = cones(Slopes(1.0, 1.0), None, reach).both
    assert (constant.spread == 0).all()


def test_nan_is_passed_on() -> None:
    point = torch.tensor([math.nan, math.inf, 0.0, 0.0], dtype=torch.float64)
    reach = torch.tensor([1.0, 1.0, math.nan, math.inf], dtype=torch.float64)
    found = cones(ACTIVATIONS["relu"], point, reach).both
    assert torch.isnan(found.centre + found.spread).tolist() == [True, True, True, True]
