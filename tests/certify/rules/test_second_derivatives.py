"""What rules say about second derivatives: bounds of those of activations, and what is affine."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify import Signal
from certify.bounding import in_order
from certify.graph import LipschitzGraph
from certify.rules import RULES
from certify.signal import Affine, Concatenation, Flatten, Input, Slopes, Step, Sum
from tests.certify.rules import test_activations as activations
from tests.certify.rules.harness import Case
from tests.certify.rules.test_activations import PI, family, interval, prove_largest
from tests.certify.rules.test_registry import FILES

NUMBER = torch.tensor([3.0], dtype=torch.float64)
LISTED = [  # spellings of all functions of each entry
    *(activations.FUNCTIONS + activations.STEEPEST_FAR_OUT + activations.ASINH_IN_PLACE),
    *family(0.0, (activations.prelu(-0.5),), (F.prelu, "prelu"), NUMBER),
    *family(0.0, (), (torch.maximum, torch.minimum, torch.fmax, torch.fmin), NUMBER),
    *family(0.0, (), (torch.max, torch.min, "maximum", "minimum", "max", "min"), NUMBER),
]
CASES: list[Case] = [case for file in FILES for case in file.CASES]
Second = Callable[[Decimal], Decimal]


def logistic(x: Decimal) -> Decimal:
    return 1 / (1 + (-x).exp())


def logistic_slope(x: Decimal) -> Decimal:
    return logistic(x) * logistic(-x)


def logistic_second(x: Decimal) -> Decimal:
    return logistic_slope(x) * (1 - 2 * logistic(x))


def scaled(function: Second, beta: float) -> Second:
    return lambda x: Decimal(beta) * function(Decimal(beta) * x)


def celu_second(alpha: float) -> Second:
    """Torch multiplies by ``1 / alpha``, rounded."""
    factor = Decimal(1.0 / alpha)
    return lambda x: Decimal(alpha) * factor**2 * (factor * x).exp() if x <= 0 else Decimal(0)


def normal(x: Decimal) -> Decimal:
    return (-x * x / 2).exp() / (2 * PI).sqrt()


def tanh_gelu_second(x: Decimal) -> Decimal:
    root, cubic = (2 / PI).sqrt(), Decimal.from_float(0.044715)
    t = 1 - 2 / ((2 * root * (x + cubic * x**3)).exp() + 1)
    first, second = root * (1 + 3 * cubic * x * x), root * 6 * cubic * x  # of t's argument
    return (1 - t * t) * (first + x * (second - 2 * t * first * first) / 2)


def mish_second(x: Decimal) -> Decimal:
    e = x.exp()
    w, first, second = e * e + 2 * e + 2, 2 * e * e + 2 * e, 4 * e * e + 2 * e
    return 4 * first / w**2 + x * (2 * second / w**2 - 4 * first**2 / w**3)


def cosine(x: Decimal, moment: int = 0) -> Decimal:
    """Its series; with ``moment=1`` the mean of ``t^2 cos(x t)`` over ``0 < t < 1``."""
    power, series = Decimal(1), Decimal(0)
    for k in range(0, 140, 2):  # power is x^k / k! with alternating signs
        series += power / (1 + moment * (k + 2))
        power *= -x * x / ((k + 1) * (k + 2))
    return series


SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Second]] = {
    "tanh": (torch.tanh, lambda x: 8 * logistic_second(2 * x)),
    "tanhshrink": (F.tanhshrink, lambda x: -8 * logistic_second(2 * x)),
    "sigmoid": (torch.sigmoid, logistic_second),
    "logsigmoid": (F.logsigmoid, lambda x: -logistic_slope(x)),
    **{f"softplus {b}": (nn.Softplus(b, 40.0), scaled(logistic_slope, b)) for b in (1.0, 2.7, 7.0)},
    "softsign": (F.softsign, lambda x: (2 if x <= 0 else -2) / (1 + abs(x)) ** 3),
    "elu": (F.elu, celu_second(1.0)),
    **{f"celu {a}": (nn.CELU(a), celu_second(a)) for a in (1.0, 0.125, 2.0, 64.0)},
    "gelu": (F.gelu, lambda x: normal(x) * (2 - x * x)),
    "tanh gelu": (nn.GELU("tanh"), tanh_gelu_second),
    "silu": (F.silu, lambda x: logistic_slope(x) * (2 + x * (1 - 2 * logistic(x)))),
    "mish": (F.mish, mish_second),
    "sin": (torch.sin, lambda x: cosine(x + PI / 2)),
    "cos": (torch.cos, lambda x: -cosine(x)),
    "atan": (torch.atan, lambda x: -2 * x / (1 + x * x) ** 2),
    "asinh": (torch.asinh, lambda x: -x / (1 + x * x) / (1 + x * x).sqrt()),
    "erf": (torch.erf, lambda x: -4 * x * (-x * x).exp() / PI.sqrt()),
    "erfc": (torch.erfc, lambda x: 4 * x * (-x * x).exp() / PI.sqrt()),
    "ndtr": (torch.special.ndtr, lambda x: -x * normal(x)),
}


def curvature(function: Callable[[Tensor], Tensor]) -> tuple[float, float]:
    found = interval(function).curvature
    assert found is not None
    return found


def largest(function: Second, reach: int) -> Decimal:
    """Largest value on a grid and about the grid's largest, with 70 digits."""
    with localcontext() as context:
        context.prec = 90
        grid = [Decimal(k) / 8 for k in range(-8 * reach, 8 * reach + 1)]
        best, place = max((function(x), x) for x in grid)
        low, high = place - Decimal("0.125"), place + Decimal("0.125")
        for _ in range(60):
            left, right = (2 * low + high) / 3, (low + 2 * high) / 3
            values = function(left), function(right)
            best = max(best, *values)
            low, high = (left, high) if values[0] < values[1] else (low, right)
        context.prec = 70
        return +best


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_extreme_second_derivatives(name: str) -> None:
    function, second = SMOOTH[name]
    low, high = map(Decimal, curvature(function))
    reach = 4 if name in ("sin", "cos") else 24  # where the series is good
    least, most = -largest(lambda x: -second(x), reach), largest(second, reach)
    assert low <= least <= most <= high
    assert least - low <= Decimal("1e-9") * (high - low)
    assert high - most <= Decimal("1e-9") * (high - low)


@pytest.mark.parametrize("name", SMOOTH)
def test_second_derivatives_are_those_of_torch(name: str) -> None:
    function, second = SMOOTH[name]
    x = torch.linspace(-6.0, 6.0, 98, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    (found,) = torch.autograd.grad(slope.sum(), x)
    exact = [float(second(Decimal(place))) for place in x.tolist()]
    # The gradient of CELU takes 1 / alpha in float32, so that others have no bound.
    assert found.tolist() == pytest.approx(exact, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    ("name", "fourth", "reach"),
    [
        # With s' = s (1 - s) the slope's third derivative is 4 s''' + x s'''' with |s'''| <= 1/8
        # and |s''''| <= s' <= exp(-|x|): below 1/2 + 1/e. Beyond 10 the second derivative is below
        # (2 + |x|) exp(-|x|) < 1e-3. (Its upper end is s'(0) (2 - 0) = 1/2 exactly.)
        ("silu", 1, 10),
        # See `test_constants_without_closed_form`: r = t', q = r' / r, |q| <= 3, |q'| <= 8.25. With
        # v = w' / w, |v| <= 2 and |v'| <= 4, v'' is within 8 + 16 of zero and q'' within 49. As
        # t''' = r (q^2 + q') and t'''' = r (q^3 + 3 q q' + q''), 4 t''' + x t'''' is below
        # 4 * 17.25 + 151 * 2 / e. Beyond 10 the second derivative is below
        # (2 + 3 |x|) exp(-|x|) < 2e-3.
        ("mish", 181, 10),
        # On [-4, 4] u' < 2.52, |u''| < 0.86, u''' < 0.22 and |t'''| < 77.3 as there. Derivatives of
        # tanh are below 1, 0.77, 2 and 8: |t''''| <= 8 u'^4 + 12 u'^2 |u''| + 0.77 (3 u''^2 +
        # 4 u' u''') < 393, so that 2 t''' + x t'''' / 2 is below 941. From 4 on (1 - t^2)
        # (u' + x u'' / 2 + x u'^2) with 1 - t^2 <= 4 exp(-2u) decreases, and is below 3e-3.
        ("tanh gelu", 941, 4),
    ],
)
def test_constants_without_closed_form(name: str, fourth: int, reach: int) -> None:
    function, second = SMOOTH[name]
    low, high = curvature(function)
    prove_largest(lambda x: -second(x), fourth, reach, -low)
    if name != "silu":
        prove_largest(second, fourth, reach, high)


def test_parameters_are_rounded_outward() -> None:
    x = Signal((1, 1), Input(torch.device("cpu")))
    for value in torch.logspace(-2.0, 2.0, 500, dtype=torch.float64).tolist():
        celu, softplus = RULES[F.celu](x, value), RULES[F.softplus](x, value, 40.0)
        if celu.step.curvature is not None:
            assert celu.step.curvature[1] >= Fraction(value) * Fraction(1.0 / value) ** 2
        assert softplus.step.curvature[1] >= Fraction(value) / 4


GRID = torch.arange(-8000, 8001, dtype=torch.float64)[:, None] / 1000


@functools.cache
def proven() -> list[tuple[Tensor, tuple[float, float]]]:
    """Values of all smooth functions on the grid, and their curvature."""
    return [(function(GRID), curvature(function)) for function, _ in SMOOTH.values()]


@pytest.mark.parametrize("function", [f for _, _, f, _ in LISTED], ids=[n for n, *_ in LISTED])
def test_slopes_jump_or_their_own_are_proven(function: Callable[[Tensor], Tensor]) -> None:
    found = interval(function).curvature
    if isinstance(function, nn.Module):
        function = function.double().eval()
    with torch.no_grad():
        values = function(GRID.clone())
    jump = values.diff(n=2, dim=0).abs().max().item() * 1000  # at least half of it
    same = [limits for known, limits in proven() if torch.allclose(known, values, 0.0, 1e-12)]
    inaccurate = torch.stack([nn.functional.celu(GRID, 0.3), torch.sinc(GRID)])
    if any(torch.allclose(values, known, 0.0, 1e-12) for known in inaccurate):
        assert found is None  # smooth, but torch's gradient is not accurate enough
        return
    assert jump > 0.05 if found is None else jump < 0.01
    assert not same if found is None else found in same


@functools.cache
def walked(case: Case) -> tuple[nn.Module, list[Step]]:
    torch.manual_seed(0)
    model = nn.Sequential(case.make()).double().eval()
    output = LipschitzGraph(model, case.shape).walk()
    return model, [signal.step for signal in in_order(output)]


def test_every_rule_of_slopes_is_listed() -> None:
    """Each has a case, see `test_every_rule_has_a_case`."""
    listed = {key for _, key, _, _ in LISTED} | {torch.sub}  # of a tanh
    with_slopes = [c for c in CASES if any(isinstance(step, Slopes) for step in walked(c)[1])]
    assert not [case.name for case in with_slopes if not listed.intersection(case.operations)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_marked_as_linear_if_and_only_if_affine(case: Case) -> None:
    model, steps = walked(case)
    affine = Input | Affine | Flatten | Sum | Concatenation
    marked = all(getattr(step, "linear", isinstance(step, affine)) for step in steps)
    x, y = 5.0 * torch.randn(2, 100, *case.shape, dtype=torch.float64)
    with torch.no_grad():
        terms = [model(z.clone()) for z in (x + y, x, y, 0.0 * x)]
    size = max(term.abs().max().item() for term in terms)
    residual = (terms[0] - terms[1] - terms[2] + terms[3]).abs().max().item()
    if "(1, 2) {'ceil_mode': True}" in case.name:  # LPPool, affine but for torch's gradient
        assert not marked
    else:
        assert marked == (residual <= 1e-13 * size)
        assert marked or residual > 1e-4 * size


def test_curvature_must_be_finite_and_hold_zero() -> None:
    x = Signal((1, 1), Input(torch.device("cpu")))
    good = ((-1.0, 2.0), (0.0, 0.0))
    bad = ((-math.inf, 0.0), (0.0, math.inf), (math.nan, 1.0), (-1.0, math.nan))
    for given in (*good, *bad, (1.0, 2.0), (-2.0, -1.0)):
        step = x.elementwise(0.0, 1.0, curvature=given).step
        assert isinstance(step, Slopes)
        assert step.curvature == (given if given in good else None)
