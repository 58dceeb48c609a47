"""Rounding of values and gradients of smooth networks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from certify import CertifiedModel, UnsupportedModel, lipschitz_rule
from certify.dual import proven_radius
from certify.forward_error import ForwardError
from certify.gradient_error import GradientError
from certify.graph import LipschitzGraph
from certify.norms import proven_norms
from certify.precision import PRECISIONS
from certify.rules.rounding import exact
from certify.signal import Signal, Slopes, UnknownRounding

UNIT = 2.0**-53


def sigma(x: Any) -> Any:
    return 1 / (1 + mpmath.exp(-x))


def gelu_slope(x: Any) -> Any:
    return mpmath.ncdf(x) + x * mpmath.npdf(x)


def gelu_tanh_slope(x: Any) -> Any:
    inner = mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf("0.044715") * x**3)
    bend = mpmath.sqrt(2 / mpmath.pi) * (1 + 3 * mpmath.mpf("0.044715") * x**2)
    t = mpmath.tanh(inner)
    return (1 + t) / 2 + x * (1 - t**2) * bend / 2


def mish_slope(x: Any) -> Any:
    t = mpmath.tanh(mpmath.log1p(mpmath.exp(x)))
    return t + x * (1 - t**2) * sigma(x)


SLOPES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "tanh": (torch.tanh, lambda x: mpmath.sech(x) ** 2),
    "tanhshrink": (F.tanhshrink, lambda x: mpmath.tanh(x) ** 2),
    "sigmoid": (torch.sigmoid, lambda x: sigma(x) * sigma(-x)),
    "logsigmoid": (F.logsigmoid, lambda x: sigma(-x)),
    "softplus": (lambda x: F.softplus(x, threshold=40.0), sigma),
    "softplus, 8": (lambda x: F.softplus(x, beta=8.0, threshold=34.0), lambda x: sigma(8 * x)),
    "softsign": (F.softsign, lambda x: 1 / (1 + abs(x)) ** 2),
    "elu": (F.elu, lambda x: mpmath.exp(x) if x < 0 else mpmath.mpf(1)),
    "celu": (lambda x: F.celu(x, 2.0), lambda x: mpmath.exp(x / 2) if x < 0 else mpmath.mpf(1)),
    "gelu": (F.gelu, gelu_slope),
    "gelu, tanh": (lambda x: F.gelu(x, approximate="tanh"), gelu_tanh_slope),
    "silu": (F.silu, lambda x: sigma(x) + x * sigma(x) * sigma(-x)),
    "mish": (F.mish, mish_slope),
    "sin": (torch.sin, mpmath.cos),
    "atan": (torch.atan, lambda x: 1 / (1 + x**2)),
    "asinh": (torch.asinh, lambda x: 1 / mpmath.sqrt(1 + x**2)),
    "erf": (torch.erf, lambda x: 2 * mpmath.exp(-(x**2)) / mpmath.sqrt(mpmath.pi)),
    "erfc": (torch.erfc, lambda x: -2 * mpmath.exp(-(x**2)) / mpmath.sqrt(mpmath.pi)),
    "ndtr": (torch.special.ndtr, mpmath.npdf),
}


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_round_by_no_more_than_is_assumed(name: str) -> None:
    function, slope = SLOPES[name]
    step = LipschitzGraph(Function(function), (1,)).walk().step
    assert isinstance(step, Slopes)
    assert step.curvature is not None
    steepest, bend = step.steepest, max(map(abs, step.curvature))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, generator=generator, dtype=torch.float64)
    x = torch.cat([x * 10.0**k for k in (-9, -1, 0, 1, 2, 6)] + [torch.zeros(1)])
    x.requires_grad_()
    (found,) = torch.autograd.grad(function(x).sum(), x)
    with mpmath.workdps(60):
        for place, value in zip(x.tolist(), found.tolist(), strict=True):
            off = abs(mpmath.mpf(value) - slope(mpmath.mpf(place)))
            assert off <= 32.0 * UNIT * (1.0 + steepest + (steepest + bend) * abs(place))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Branches(nn.Module):
    """What is used twice, added, joined, repeated, moved and shifted by constants."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)
        self.last = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.first(x)) + 0.25
        y = torch.tanh(self.second(x)) * 1.5 - x
        one, two = y.chunk(2, 1)
        z = torch.cat([two, one, x.flip(1), y.reshape(-1, 2, 4).transpose(1, 2).flatten(1)], 1)
        return self.last(F.gelu(z)) + x.mean(1, keepdim=True)


class Mixed(nn.Module):
    """Circular padding, seen and unseen by a convolution, and what is repeated and scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")
        self.second, self.last = nn.Conv2d(3, 3, 3), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.first(x))
        z = F.pad(y, (1, 1, 1, 1), mode="circular")
        y = F.softplus(self.second(z), threshold=40.0) - y.mean(1, keepdim=True)
        wide = F.pad(y, (2, 2, 2, 2), mode="circular")
        return self.last((torch.rsub(wide[:, :, 2:-2, 2:-2], y) + y).flatten(1))


def networks() -> dict[str, tuple[nn.Module, tuple[int, ...]]]:
    torch.manual_seed(0)
    return {
        "mlp": (models.build("mlp", hidden=(16, 16), activation="softplus"), (1, 28, 28)),
        "branches": (Branches(), (6,)),
        "mixed": (Mixed(), (2, 4, 4)),
        "convolutions": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"),
                nn.BatchNorm2d(4),
                nn.Softplus(threshold=40),
                nn.AvgPool2d(2),
                nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1),
                nn.GELU(),
                nn.Conv2d(4, 4, 3, stride=2, groups=2, dilation=2, padding=2),
                nn.Tanh(),
                nn.AdaptiveAvgPool2d(2),
                nn.Flatten(),
                nn.Dropout(),
                nn.Linear(16, 5),
            ),
            (2, 8, 8),
        ),
    }


def single_error(model: nn.Module, shape: tuple[int, ...]) -> GradientError:
    """Of a network in float32, whose rounding can be measured; by the same rules."""
    graph = LipschitzGraph(model, shape)
    forward = ForwardError(graph, graph.walk(), lambda some: proven_norms(some, "fantastic_four"))
    return GradientError(forward, PRECISIONS["float32"])


def margins_in(model: nn.Module, points: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The first logit minus the second, and its gradient, computed in a precision."""
    x = points.to(dtype).requires_grad_()
    logits = model.to(dtype)(x)
    margin = logits[:, 0] - logits[:, 1]
    (gradient,) = torch.autograd.grad(margin.sum(), x)
    return margin.detach().double(), gradient.double().flatten(1)


@pytest.mark.parametrize("name", networks())
@pytest.mark.parametrize("radius", [0.0, 0.5])
def test_float32_is_no_farther_from_float64_than_is_claimed(name: str, radius: float) -> None:
    model, shape = networks()[name]
    model = model.eval().double()  # of float32 weights
    generator = torch.Generator().manual_seed(1)
    centre = torch.randn(40, *shape, generator=generator).double()
    move = torch.randn(40, *shape, generator=generator).double()
    move = radius * move / move.flatten(1).norm(dim=1).reshape(-1, *[1] * len(shape))
    points = (centre + 0.999 * move).float()
    own = torch.zeros(40, dtype=torch.int64)
    error = single_error(model, shape)
    values, gradients = error.bounds(centre, torch.full((40,), radius).double(), own)
    truth, rounded = (margins_in(model, points, dtype) for dtype in (torch.float64, torch.float32))
    off = (rounded[1] - truth[1]).norm(dim=1)
    assert bool((off <= gradients).all())
    assert bool(((rounded[0] - truth[0]).abs() <= values[:, 1]).all())
    assert bool(off.max() > 0)
    assert bool(gradients.max() < 1e-1)


def cancelling() -> nn.Module:
    """Arguments that are off by much more than their own units."""
    first = nn.Linear(2, 8, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([1e4, -1e4]) + torch.randn(8, 2))
    return nn.Sequential(first, nn.SiLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("make", "points"),
    [
        (lambda: nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 3)), lambda: torch.randn(40, 50)),
        (nn.SiLU, lambda: torch.rand(400, 8) * 30.0 - 15.0),
        (cancelling, lambda: torch.rand(400, 1) + 1e-4 * torch.randn(400, 2)),
    ],
    ids=["products", "slopes", "arguments"],
)
def test_each_kind_of_rounding_is_needed(
    make: Callable[[], nn.Module], points: Callable[[], Tensor]
) -> None:
    """Networks in which one of them is nearly all there is."""
    torch.manual_seed(0)
    model, x = make().double(), points()
    error = single_error(model, tuple(x.shape[1:]))
    none = torch.zeros(len(x), dtype=torch.float64)
    _, gradients = error.bounds(x.double(), none, none.long())
    truth, rounded = (margins_in(model, x, dtype)[1] for dtype in (torch.float64, torch.float32))
    share = (rounded - truth).norm(dim=1) / gradients
    assert 1e-4 < share.max().item() <= 1.0


def test_a_gradient_that_is_off_proves_no_more_than_there_is() -> None:
    """For ``m + g z - K |z|^2 / 2``, whose nearest zero is known."""
    generator = torch.Generator().manual_seed(0)
    count, entries, error = 4000, 3, 1e-3
    direction = torch.randn(count, entries, generator=generator, dtype=torch.float64)
    slope = torch.rand(count, generator=generator, dtype=torch.float64) * 3.0
    slopes = direction / direction.norm(dim=1, keepdim=True) * slope[:, None]
    margin = torch.rand(count, generator=generator, dtype=torch.float64) + 0.1
    curvature = torch.rand(count, generator=generator, dtype=torch.float64) * 2.0
    truth = 2.0 * margin / (slope + (slope.square() + 2.0 * curvature * margin).sqrt())
    nearest = -slopes / slope[:, None] * truth[:, None]
    for share in (0.0, 0.5, 1.0):
        u = nearest * share
        value = margin + (slopes * u).sum(dim=1) - curvature * u.square().sum(dim=1) / 2.0
        gradient = slopes - curvature[:, None] * u
        shift = torch.randn(count, entries, generator=generator, dtype=torch.float64)
        shift[: count // 2] = gradient[: count // 2]  # a shorter gradient claims most
        seen = gradient - shift * (error / shift.norm(dim=1, keepdim=True))
        parts = u.square().sum(dim=1), (u * seen).sum(dim=1), seen.square().sum(dim=1)
        paid = proven_radius(*parts, value, curvature, entries, torch.full_like(value, error))
        unpaid = proven_radius(*parts, value, curvature, entries)
        assert bool((paid <= truth).all())
        assert share > 0.0 or bool((unpaid > truth).any())
        assert bool((paid > 0.9 * unpaid - 1e-3).all())
    lost = proven_radius(*parts, value, curvature, entries, torch.full_like(value, torch.inf))
    assert bool((lost == 0).all())


class Doubled(nn.Module):
    """With a rule, and with rounding that is known, but not that of its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x


@lipschitz_rule(Doubled, rounding=exact)
def doubled(module: Doubled, x: Signal) -> Signal:
    return x.scaled(2.0, linear=True)


def test_gradients_of_the_users_operations_are_not_known() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Softplus(threshold=40), Doubled(), nn.Linear(6, 3))
    x = torch.randn(5, 4, dtype=torch.float64)
    plain, machine = CertifiedModel(model, (4,)), CertifiedModel(model, (4,), precision="float64")
    assert plain.rounding_is_known
    assert bool((plain.certify(x, "dual").radius > 0).all())
    with pytest.raises(UnknownRounding, match=r"node '2' .*Doubled.* its gradient can round"):
        plain.check_rounding("dual")
    for certificate in ("curvature", "dual"):
        with pytest.raises(UnsupportedModel, match="its gradient can round"):
            machine.certify(x, certificate)
    for model_like in (plain, machine):
        with pytest.raises(UnknownRounding, match="its gradient can round"):
            model_like.check_rounding("best")
    assert machine.applicable() == ("lipschitz",)
    assert bool((machine.certify(x, "best").radius > 0).all())


def test_a_custom_operation_is_the_users_whatever_its_name() -> None:
    """``torch.library`` gives it the name of a module of torch's."""

    @torch.library.custom_op("certify_tests::negative", mutates_args=())
    def negative(x: Tensor) -> Tensor:
        return -x

    def backward(context: Any, gradient: Tensor) -> Tensor:
        return 0.01 * gradient

    negative.register_autograd(backward)
    operation = torch.ops.certify_tests.negative
    lipschitz_rule(operation, rounding=exact)(lambda x: x.scaled(linear=True))
    torch.manual_seed(0)
    ends = nn.Linear(4, 8), nn.Softplus(threshold=40)
    model = nn.Sequential(*ends, Function(operation), nn.Linear(8, 3))
    with pytest.raises(UnknownRounding, match="its gradient can round"):
        CertifiedModel(model, (4,)).check_rounding("dual")


def test_hooks_that_may_change_gradients_are_refused() -> None:
    def smaller(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        return tuple(g * 0.01 for g in inputs)

    def smooth() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 8), nn.Softplus(threshold=40), nn.Linear(8, 3))

    model = smooth()
    handle = model[1].register_full_backward_hook(smaller)
    with pytest.raises(UnsupportedModel, match=r"'1' \(Softplus\) has backward hooks"):
        CertifiedModel(model, (4,))
    handle.remove()
    CertifiedModel(model, (4,))
    handle = model[1].register_full_backward_pre_hook(lambda module, outputs: None)
    with pytest.raises(UnsupportedModel, match="has backward hooks"):
        CertifiedModel(model, (4,))
    handle = nn.modules.module.register_module_full_backward_hook(smaller)
    try:
        with pytest.raises(UnsupportedModel, match="global backward hooks"):
            CertifiedModel(smooth(), (4,))
    finally:
        handle.remove()


@pytest.mark.parametrize("head", [None, "softplus"])
@pytest.mark.parametrize("certificate", ["curvature", "dual"])
def test_radii_pay_for_all_rounding(head: str | None, certificate: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = models.build(
        "liresnet", input_shape=(1, 8, 8), width=4, depth=(1,), dense=(8,), head=head
    )
    if head is None:
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10))
    certified = CertifiedModel(model, (1, 8, 8))
    certified.check_rounding(certificate)
    x = torch.rand(20, 1, 8, 8, dtype=torch.float64)
    found = certified.certify(x, certificate).radius
    smooth = certified.smooth
    smooth._error = smooth._forward = None
    free = certified.certify(x, certificate).radius
    assert bool((found < free).all())
    assert bool((found > free * (1.0 - 1e-6)).all())


@pytest.mark.parametrize("certificate", ["curvature", "dual"])
def test_features_that_are_off_shorten_radii(
    certificate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.Softplus(threshold=40), nn.Linear(8, 3)
    )
    certified = CertifiedModel(model, (4,))
    x, off = torch.randn(50, 4, dtype=torch.float64), 1e-3
    before = certified.certify(x, certificate).radius
    monkeypatch.setattr(ForwardError, "error_of", lambda self, signal, x: x.new_full((50,), off))
    after = certified.certify(x, certificate).radius
    if certificate == "dual":
        lost = off / certified.smooth.head.lipschitz * (1.0 - 1e-9)
        assert bool((after <= (before - lost).clamp_min(0.0)).all())
    by_lipschitz = certified.certify(x).radius
    assert bool(((after < before) | (after == by_lipschitz)).all())
    assert bool((after < before).any())
