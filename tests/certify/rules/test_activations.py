"""Rules of functions of each entry by itself, and of sorting."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify import Signal, UnsupportedModel
from certify.graph import LipschitzGraph
from certify.rules import RULES
from certify.signal import Input, Slopes
from models import MaxMin
from tests.certify.rules.harness import Apply, Case, certify, check, on


class Shifted(nn.Module):
    """A function whose steepest place is moved to the origin, where the harness looks."""

    def __init__(self, function: Callable[[Tensor], Tensor], place: float) -> None:
        super().__init__()
        self.function = function
        self.place = place

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x + self.place)


class Leaky(nn.Module):
    """PReLU in one of its spellings."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *weights: float) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.tensor(weights))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def prelu(*weights: float) -> nn.PReLU:
    module = nn.PReLU(len(weights))
    module.weight.data = torch.tensor(weights)
    return module


def applied(key: Any, *args: Any, **kwargs: Any) -> Callable[[Any], Any]:
    """A function, or a tensor's method by name, with the arguments after the first."""
    if isinstance(key, str):
        return lambda x: getattr(x, key)(*args, **kwargs)
    return lambda x: key(x, *args, **kwargs)


def family(
    place: float,
    modules: tuple[nn.Module, ...],
    keys: tuple[Any, ...],
    *args: Any,
    **kwargs: Any,
) -> list[tuple[str, Any, Any, float]]:
    """Spellings of one function, and where it is steepest."""
    spelled = [(repr(module), type(module), module, place) for module in modules]
    for key in keys:
        name = key if isinstance(key, str) else f"{key.__module__}.{key.__name__}"
        spelled.append(
            (f"{name}{args or ''}{kwargs or ''}", key, applied(key, *args, **kwargs), place)
        )
    return spelled


def both(name: str) -> tuple[Any, ...]:
    """Function, method and their forms in place."""
    return getattr(torch, name), getattr(torch, f"{name}_"), name, f"{name}_"


def smooth(name: str) -> tuple[Any, ...]:
    """As `both`, and what `torch.special` adds."""
    return (*both(name), getattr(torch.special, name))


FUNCTIONS = [
    *family(1.0, (nn.ReLU(), nn.ReLU(inplace=True)), (F.relu, *both("relu"))),
    *family(1.0, (), (F.relu,), inplace=True),
    *family(1.0, (nn.LeakyReLU(0.2),), (F.leaky_relu, F.leaky_relu_), 0.2),
    *family(-1.0, (nn.LeakyReLU(-3.0),), (F.leaky_relu,), negative_slope=-3.0),
    *family(
        1.0, (nn.RReLU(0.1, 0.5), nn.RReLU(inplace=True)), (F.rrelu, torch.rrelu, torch.rrelu_)
    ),
    *family(-1.0, (nn.RReLU(2.0, 5.0),), (F.rrelu,), 2.0, 5.0, inplace=True),
    *family(1.0, (nn.Threshold(0.3, 0.3),), (F.threshold, torch.threshold, torch.threshold_), 0, 0),
    *family(0.5, (), (*both("clamp"), *both("clip")), -1, 2.0),
    *family(0.5, (), (torch.clamp, "clamp"), max=1.0),
    *family(0.5, (), both("clamp_min"), 0),
    *family(0.5, (), both("clamp_max"), max=1.0),
    *family(0.5, (nn.Hardtanh(0.0, 2.0), nn.ReLU6()), (F.hardtanh, F.hardtanh_, F.relu6)),
    *family(-2.5, (nn.Hardsigmoid(),), (F.hardsigmoid,)),
    *family(2.0, (nn.Softshrink(), nn.Softshrink(0.1)), (F.softshrink,), 1.5),
    *family(1.0, (), (operator.abs, *both("abs"), torch.absolute, "absolute", "absolute_")),
    *family(0.0, (nn.Tanh(),), both("tanh")),
    *family(0.0, (nn.Sigmoid(),), (*both("sigmoid"), torch.special.expit)),
    *family(0.0, (nn.Softsign(),), (F.softsign,)),
    *family(1.0, (nn.ELU(), nn.ELU(0.5, inplace=True)), (F.elu, F.elu_)),
    *family(-1e-9, (nn.ELU(2.5),), (F.elu, F.elu_), 3),
    *family(-1e-9, (nn.ELU(-2.5),), (F.elu,), alpha=-3.0),
    *family(-1e-9, (nn.SELU(),), (F.selu, torch.selu, torch.selu_)),
    *family(1.0, (nn.CELU(), nn.CELU(0.3)), (F.celu, torch.celu, torch.celu_), 2.0),
    *family(math.sqrt(2.0), (nn.GELU(),), (F.gelu,)),
    *family(1.4185040087908284, (nn.GELU("tanh"),), (F.gelu,), approximate="tanh"),
    *family(2.3993572805154677, (nn.SiLU(), nn.SiLU(inplace=True)), (F.silu,)),
    *family(1.4905711794854285, (nn.Mish(),), (F.mish,)),
    *family(3.0 - 1e-9, (nn.Hardswish(),), (F.hardswish,)),
    *family(0.0, (), both("sin")),
    *family(math.pi / 2, (), both("cos")),
    *family(0.6625862125821924, (), smooth("sinc")),
    *family(0.0, (), (*both("atan"), *both("arctan"), torch.asinh, "asinh")),
    *family(0.0, (), (torch.arcsinh, "arcsinh")),
    *family(0.0, (), (*smooth("erf"), *smooth("erfc"), torch.special.ndtr)),
]
STEEPEST_FAR_OUT = [  # where the rounding of a quotient is too large
    *family(0.0, (nn.Tanhshrink(),), (F.tanhshrink,)),
    *family(0.0, (nn.LogSigmoid(),), (F.logsigmoid,)),
    *family(0.0, (nn.Softplus(threshold=40.0), nn.Softplus(7.0, 34.0)), (F.softplus,), 1, 88.0),
]
ASINH_IN_PLACE = family(0.0, (), (torch.asinh_, torch.arcsinh_, "asinh_", "arcsinh_"))

CASES = [
    *(
        Case(name, (key,), lambda f=function, at=place: Shifted(f, at), (4,))
        for name, key, function, place in FUNCTIONS
    ),
    *(
        Case(name, (key,), lambda f=function: Shifted(f, 0.0), (4,), 1.01)
        for name, key, function, _ in STEEPEST_FAR_OUT
    ),
    Case("prelu", (nn.PReLU,), lambda: prelu(-0.5), (4,)),
    Case("prelu of channels", (nn.PReLU,), lambda: prelu(0.5, -3.0), (2, 2)),
    Case("F.prelu", (F.prelu,), lambda: Leaky(F.prelu, 0.1, 1.5), (2, 2)),
    Case("prelu method", ("prelu",), lambda: Leaky(lambda x, w: x.prelu(w), -2.0), (4,)),
    Case("maxmin", (MaxMin,), MaxMin, (4,)),
    Case("maxmin of images", (MaxMin,), MaxMin, (4, 2, 2)),
    *(  # torch has no derivative of these
        Case(
            str(key),
            (key,),
            on(lambda x, f=function: x.asinh() + f(x.detach().clone())),
            (1,),
            1.01,
        )
        for _, key, function, _ in ASINH_IN_PLACE
    ),
    Case("torch.sort", (torch.sort,), on(lambda x: torch.sort(x, descending=True)[0]), (4,)),
    Case("sort method", ("sort",), on(lambda x: x.sort(stable=True, dim=1).values), (3, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    check(case, monkeypatch)


def interval(function: Callable[[Any], Any], shape: tuple[int, ...] = (1,)) -> Slopes:
    """What the rule of a function says."""
    module = nn.Sequential(function) if isinstance(function, nn.Module) else Apply(function)
    step = LipschitzGraph(module, shape).walk().step
    assert isinstance(step, Slopes)
    return step


@pytest.mark.parametrize(
    "function",
    [
        *(
            pytest.param(function, id=name)
            for name, _, function, _ in FUNCTIONS + STEEPEST_FAR_OUT + ASINH_IN_PLACE
        ),
        pytest.param(prelu(-2.0), id="prelu"),
        pytest.param(prelu(3.0), id="steep prelu"),
    ],
)
def test_quotients_fill_the_interval(function: Callable[[Tensor], Tensor]) -> None:
    """Neighbours on a grid suffice: the quotient of any pair is a mean of theirs."""
    slopes = interval(function)
    if isinstance(function, nn.Module):
        function = function.double().eval()
    far = torch.logspace(math.log10(30.0), 6.0, 200, dtype=torch.float64)[1:]
    near = torch.linspace(-30.0, 30.0, 120001, dtype=torch.float64)
    x = torch.cat([-far.flip(0), near, far])[:, None]
    with torch.no_grad():
        quotients = function(x.clone()).diff(dim=0) / x.diff(dim=0)
    rounding = 1e-10  # of values up to 90, over the grid's width
    assert slopes.low - rounding <= quotients.min().item() <= slopes.low + 2e-3
    assert slopes.high - 2e-3 <= quotients.max().item() <= slopes.high + rounding


def test_prelu_takes_the_extreme_channels() -> None:
    slopes = interval(prelu(0.5, -0.25, 1.5), (3, 2))
    assert (slopes.low, slopes.high) == (-0.25, 1.5)


def test_order_of_sorting_has_no_bound() -> None:
    assert certify(Apply(lambda x: torch.sort(x, 1).indices.double()), (3,))[1] == math.inf


PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459")


def prove_largest(
    slope: Callable[[Decimal], Decimal], curvature: int, reach: int, bound: float
) -> None:
    """Prove ``slope <= bound`` on ``[-reach, reach]``, with 50 digits, and the bound tight.

    Between the ends of a cell of width ``h`` a function is at most ``h^2 / 8`` times the largest
    ``|second derivative|`` above the larger end; a cell for which that is too much is halved.
    """
    with localcontext() as context:
        context.prec = 50
        top, largest = Decimal(bound), Decimal(-10)
        knots = [Decimal(k) / 8 for k in range(-8 * reach, 8 * reach + 1)]
        values = [slope(knot) for knot in knots]
        cells = list(zip(knots, knots[1:], values, values[1:], strict=False))
        while cells:
            left, right, *ends = cells.pop()
            width = right - left
            largest = max(largest, *ends)
            if max(ends) + curvature * width * width / 8 > top:
                assert width > Decimal("1e-11"), f"{bound} is not a bound near {left}"
                middle = (left + right) / 2
                value = slope(middle)
                cells += [(left, middle, ends[0], value), (middle, right, value, ends[1])]
        assert largest > top - Decimal("4e-16")


def silu_slope(x: Decimal) -> Decimal:
    s = 1 / (1 + (-x).exp())
    return s + x * s * (1 - s)


def mish_slope(x: Decimal) -> Decimal:
    e = x.exp()
    w = e * e + 2 * e + 2
    return 1 - 2 / w + 4 * x * (e * e + e) / (w * w)


def tanh_gelu_slope(x: Decimal) -> Decimal:
    root, cubic = (2 / PI).sqrt(), Decimal.from_float(0.044715)
    t = 1 - 2 / ((2 * root * (x + cubic * x**3)).exp() + 1)
    return (1 + t) / 2 + x * (1 - t * t) * root * (1 + 3 * cubic * x * x) / 2


def sinc_slope(z: Decimal) -> Decimal:
    """``pi`` times the derivative of ``sin(z) / z``, by its series."""
    power, series = z, Decimal(0)
    for k in range(1, 60, 2):  # power is z^k / k! with alternating signs
        series -= power / (k + 2)
        power *= -z * z / ((k + 1) * (k + 2))
    return PI * series


@pytest.mark.parametrize(
    ("function", "slope", "curvature", "reach"),
    [
        # With s' = s (1 - s) <= 1/4, |s''| <= 1/10 and |s'''| <= s' the slope's second derivative
        # 3 s'' + x s''' is below 0.3 + 1/e. Beyond 10 the slope is within |x| exp(-|x|) of [0, 1].
        (F.silu, silu_slope, 1, 10),
        # r = t' <= min(exp(x), 4 exp(-2x), 1). With e = exp(x) the derivative of log r is
        # q = (2e + 1) / (e + 1) - 2 w' / w, |q| <= 3 and |q'| <= 8.25: as t'' = r q and
        # t''' = r (q^2 + q'), the slope's second derivative 3 t'' + x t''' is at most
        # 9 + 17.25 |x| r, and |x| r <= 2/e. Beyond 10 the slope is within |x| exp(-|x|) of [0, 1].
        (F.mish, mish_slope, 22, 10),
        # On [-4, 4] u' < 2.52, |u''| < 0.86 and u''' < 0.22: t'' = (1 - t^2) (u'' - 2 t u'^2) and
        # t''' = (1 - t^2) (u''' - 6 t u' u'' + (6 t^2 - 2) u'^3) are below 13.6 and 77.3, so that
        # (3 t'' + x t''') / 2 is below 180. From 4 on x (1 - t^2) u' / 2 <= 2 x exp(-2u) u'
        # decreases, and is below 1e-3.
        (lambda x: F.gelu(x, approximate="tanh"), tanh_gelu_slope, 180, 4),
        # sin(z) / z is the mean of cos(tz) over t in [0, 1]: its third derivative is below 1/4.
        # From 4 on the first is at most 1 / z + 1 / z^2 < 0.32.
        (torch.sinc, sinc_slope, 1, 4),
    ],
    ids=["silu", "mish", "tanh gelu", "sinc"],
)
def test_constants_without_closed_form(
    function: Callable[[Tensor], Tensor],
    slope: Callable[[Decimal], Decimal],
    curvature: int,
    reach: int,
) -> None:
    slopes = interval(function)
    prove_largest(slope, curvature, reach, slopes.high)
    prove_largest(lambda x: -slope(x), curvature, reach, -slopes.low)


def test_constants_with_closed_form() -> None:
    with localcontext() as context:
        context.prec = 50
        root, factorial, series = PI.sqrt(), Decimal(1), Decimal(0)
        for n in range(40):
            series += (-1) ** n / (factorial * (2 * n + 1))
            factorial *= n + 1
        gelu = (1 + 2 / root * series) / 2 + Decimal(-1).exp() / root
        alpha, scale = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946
        selu = Decimal(alpha) * Decimal(scale)
        for function, low, high in [
            (F.gelu, 1 - gelu, gelu),
            (F.selu, Decimal(0), max(selu, Decimal(alpha * scale))),
            (torch.erf, Decimal(0), 2 / root),
            (torch.erfc, -2 / root, Decimal(0)),
            (torch.special.ndtr, Decimal(0), 1 / (2 * PI).sqrt()),
        ]:
            slopes = interval(function)
            assert low - Decimal("4e-16") < Decimal(slopes.low) <= low
            assert high <= Decimal(slopes.high) < high + Decimal("4e-16")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Softplus(), "threshold"),
        (nn.Softplus(beta=math.inf, threshold=40.0), "beta"),
        (nn.LeakyReLU(math.nan), "NaN"),
        (nn.LeakyReLU(math.inf), "not bounded"),
        (nn.ELU(-math.inf), "not bounded"),
        (nn.ELU(math.nan), "NaN"),
        (nn.CELU(-1.0), "alpha"),
        (nn.CELU(math.inf), "alpha"),
        (nn.CELU(1e-310), "alpha"),
        (nn.Threshold(0.1, 0.0), "not continuous"),
        (nn.Threshold(math.inf, math.inf), "not continuous"),
        (nn.Hardshrink(), "not continuous"),
        (Apply(lambda x: F.elu_(x + 0, 1.0, 2.0)), "argument"),
        (Apply(lambda x: F.rrelu(x, 0.1, 0.1, training=True)), "random"),
        (Apply(lambda x: x.clamp(1.0, -1.0)), "min <= max"),
        (Apply(lambda x: x.clamp_min(math.inf)), "min <= max"),
        (Apply(lambda x: x.clamp_max(math.nan)), "NaN"),
        (Apply(lambda x: x.clamp(max=torch.ones(3))), "expected a number"),
        (Apply(lambda x: torch.clamp(x, min=x.flip(1))), "expected a number"),
        (Apply(lambda x: torch.sort(x, 0)[0]), "batch"),
    ],
    ids=str,
)
def test_refusals(module: nn.Module, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        certify(module, (3,))


def test_rules_refuse_what_torch_may_let_pass() -> None:
    """Torch refuses these when it runs, at least in some versions."""
    x = Signal((1, 1), Input(torch.device("cpu")))
    for rule, arguments, reason in [
        (F.softshrink, (-0.5,), "not continuous"),
        (F.gelu, ("fast",), "approximate"),
        (F.prelu, (x,), "depend on the input"),
        (F.prelu, (torch.tensor([math.nan]),), "NaN"),
    ]:
        with pytest.raises(UnsupportedModel, match=reason):
            RULES[rule](x, *arguments)


def test_softplus_overflow_would_break_a_certificate() -> None:
    """Why a large threshold is refused: 709.7 and 709.8 are mapped to 709.7 and infinity."""
    x = torch.tensor([709.7, 709.8], dtype=torch.float64)
    assert F.softplus(x, threshold=1e6).isinf().tolist() == [False, True]


def test_sixth_of_single_precision() -> None:
    """On CUDA torch multiplies by this where it divides by six on the CPU."""
    sixth = torch.tensor(1 / 6, dtype=torch.float32).item()
    assert sixth == interval(F.hardsigmoid).high
    slopes = interval(F.hardswish)
    assert (slopes.low, slopes.high) == (-3 * sixth, 9 * sixth)


def test_mish_has_no_threshold() -> None:
    """Torch's value is the exact one but for rounding, also where its softplus would jump."""
    x = torch.cat([torch.linspace(-40, 40, 4001), torch.tensor([700.0, 710.0, 1e3, 1e30])])
    for value, result in zip(x.tolist(), F.mish(x.double()).tolist(), strict=True):
        e = Decimal(min(value, 100.0)).exp()
        exact = Decimal(value) * (e * e + 2 * e) / (e * e + 2 * e + 2)
        assert abs(Decimal(result) - exact) <= abs(exact) * Decimal(2) ** -50
