"""Radii against exact rational arithmetic, and what is not certified."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from certify import Certificate, CertifiedModel, certificate

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0.0, allow_nan=False, allow_infinity=False)


def tensor(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@given(
    logits=st.lists(finite, min_size=3, max_size=3),
    constants=st.lists(positive, min_size=3, max_size=3),
)
@example(logits=[1.7e308, -1.7e308, -1.7e308], constants=[1e300] * 3)  # the margin overflows
@example(logits=[1.0, 0.0, 0.0], constants=[1e-320] * 3)  # the quotient overflows
@example(logits=[3 * 5e-324, 0.0, 0.0], constants=[2.0] * 3)  # the quotient is rounded up
@example(logits=[1.0, 1.0 / 3.0, 0.0], constants=[0.0, 1.0, 0.0])
def test_radius_is_never_above_the_exact_quotient(
    logits: list[float], constants: list[float]
) -> None:
    """Over the whole range of float64: overflow and underflow are rounded down too."""
    a, b, c = constants
    bounds = tensor([[0.0, a, b], [a, 0.0, c], [b, c, 0.0]])
    found = certificate(tensor([logits]), bounds)
    y = int(found.prediction)
    assert logits[y] == max(logits)
    radius = found.radius.item()
    assert radius >= 0.0
    exact = math.inf
    for j in {0, 1, 2} - {y}:
        margin, constant = Fraction(logits[y]) - Fraction(logits[j]), bounds[y, j].item()
        if margin <= 0:
            exact = 0.0
        elif constant > 0:
            quotient = margin / Fraction(constant)
            assert Fraction(min(radius, 1.7e308)) <= quotient
            if radius == math.inf:
                pytest.fail("an infinite radius although a difference is not constant")
            exact = min(exact, float(min(quotient, Fraction(1.7e308))))
    # A difference of logits that overflows is rounded down to the largest number.
    overflows = max(logits) - min(logits) == math.inf
    if 1e-300 < exact < 1e300 and not overflows:
        assert radius >= exact * (1 - 1e-14)
    if exact == 0.0:
        assert radius == 0.0


@given(classes=st.integers(2, 5), inputs=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_linear_models_have_their_exact_radius(classes: int, inputs: int, seed: int) -> None:
    """The distance to the nearest decision boundary, ``min_j (f_y - f_j) / |w_y - w_j|``."""
    torch.manual_seed(seed)
    model = nn.Linear(inputs, classes).double()
    with torch.no_grad():  # numbers of few bits: the logits are computed without rounding
        model.weight.mul_(64).round_()
        model.bias.mul_(64).round_()
    x = torch.randint(-32, 33, (4, inputs)).double()
    found = CertifiedModel(model, (inputs,)).certify(x)
    for logits, y, radius in zip(model(x).tolist(), found.prediction, found.radius, strict=True):
        squares = []
        for j in range(classes):
            difference = [Fraction(e) for e in (model.weight[y] - model.weight[j]).tolist()]
            length = sum(d * d for d in difference)
            margin = Fraction(logits[y]) - Fraction(logits[j])
            if j != int(y) and (length or not margin):
                squares.append(margin**2 / length if length else Fraction())
        if not squares:
            continue
        exact_square = min(squares)
        assert Fraction(radius.item()) ** 2 <= exact_square
        assert radius.item() >= math.sqrt(exact_square) * (1 - 1e-12) - 1e-11


def test_a_step_of_the_radius_reaches_the_boundary() -> None:
    torch.manual_seed(1)
    model = nn.Linear(6, 4).double()
    certified = CertifiedModel(model, (6,))
    x = torch.randn(50, 6, dtype=torch.float64)
    found = certified.certify(x)
    weight = model.weight.detach()
    for point, y, radius in zip(x, found.prediction, found.radius, strict=True):
        for j in range(4):
            if j == y:
                continue
            direction = weight[j] - weight[y]
            step = radius * direction / direction.norm()
            assert model(point + 0.999999 * step).argmax() == y
        closest = min(
            (model(point)[y] - model(point)[j]).item() / (weight[y] - weight[j]).norm().item()
            for j in range(4)
            if j != y
        )
        assert radius.item() == pytest.approx(closest, rel=1e-12)


def test_every_class_counts_not_only_the_runner_up() -> None:
    """Class 2 has the lowest logit, and is the nearest in terms of its own constant."""
    bounds = tensor([[0.0, 1.0, 100.0], [1.0, 0.0, 1.0], [100.0, 1.0, 0.0]])
    assert certificate(tensor([[5.0, 4.0, 0.0]]), bounds).radius.item() == pytest.approx(0.05)


def test_rows_of_the_prediction_are_used() -> None:
    bounds = tensor([[0.0, 1.0], [4.0, 0.0]])
    found = certificate(tensor([[2.0, 0.0], [0.0, 2.0]]), bounds)
    assert found.prediction.tolist() == [0, 1]
    assert found.radius.tolist() == pytest.approx([2.0, 0.5])
    assert found.radius.dtype == torch.float64
    assert found.prediction.dtype == torch.int64


@pytest.mark.parametrize(
    "logits",
    [
        [1.0, 1.0, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, -0.0, -1.0],
        [math.nan, 0.0, 1.0],
        [3.0, 0.0, math.nan],
        [math.inf, 0.0, 0.0],
        [math.inf, math.inf, 0.0],
        [1.0, 0.0, -math.inf],
    ],
)
@pytest.mark.parametrize("constant", [0.0, 1.0, math.inf])
def test_ties_and_unusable_logits_prove_nothing(logits: list[float], constant: float) -> None:
    assert certificate(tensor([logits]), torch.full((3, 3), constant)).radius.item() == 0.0


def test_bounds_that_say_nothing_or_everything() -> None:
    logits = tensor([[1.0, 0.0]])
    for constant, radius in [(math.nan, 0.0), (math.inf, 0.0), (0.0, math.inf), (-0.0, math.inf)]:
        assert certificate(logits, torch.full((2, 2), constant)).radius.item() == radius
    # The diagonal does not matter.
    bounds = tensor([[math.inf, 2.0], [2.0, 0.0]])
    assert certificate(logits, bounds).radius.item() == pytest.approx(0.5)
    assert certificate(logits, bounds.fill_diagonal_(math.nan)).radius.item() == pytest.approx(0.5)


def test_one_bad_sample_does_not_touch_the_others() -> None:
    logits = tensor([[1.0, 0.0], [math.nan, 0.0], [0.0, 3.0]])
    assert certificate(logits, torch.ones(2, 2)).radius.tolist() == pytest.approx([1.0, 0.0, 3.0])
    assert certificate(logits[:0], torch.ones(2, 2)).radius.shape == (0,)


def test_certified() -> None:
    found = Certificate(torch.tensor([0, 0, 1, 1]), tensor([0.5, 0.25, 0.0, 1.0]))
    labels = torch.tensor([0, 0, 1, 0])
    assert found.certified(labels, 0.0).tolist() == [True, True, True, False]
    assert found.certified(labels, 0.25).tolist() == [True, False, False, False]  # strictly more
    assert found.certified(labels, 0.5).tolist() == [False, False, False, False]
    for epsilon in (-0.1, math.nan):
        with pytest.raises(ValueError, match="epsilon >= 0"):
            found.certified(labels, epsilon)


@pytest.mark.parametrize(
    ("logits", "bounds", "reason"),
    [
        ((3,), (3, 3), r"\(N, C\)"),
        ((2, 3, 3), (3, 3), r"\(N, C\)"),
        ((2, 1), (1, 1), "C >= 2"),
        ((2, 3), (2, 2), r"\(3, 3\)"),
        ((2, 3), (), r"\(3, 3\)"),
    ],
)
def test_shapes(logits: tuple[int, ...], bounds: tuple[int, ...], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        certificate(torch.zeros(logits), torch.ones(bounds))


def test_negative_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match=">= 0"):
        certificate(torch.zeros(1, 2), tensor([[0.0, -1.0], [1.0, 0.0]]))


def test_gradients_do_not_flow() -> None:
    logits = torch.tensor([[1.0, 0.0]], requires_grad=True)
    bounds = torch.ones(2, 2, requires_grad=True)
    found = certificate(logits, bounds)
    assert not found.radius.requires_grad
    assert not found.certified(torch.tensor([0]), 0.1).requires_grad
