"""Every rule against sampled pairs and exact Jacobians of the operation itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import models
from certify import CertifiedModel, Signal, UnsupportedModel, lipschitz_rule
from certify.rules import RULES
from models import MaxMin, Normalize

BUILT_IN = set(RULES)  # read on import, before a doctest or a test registers more

# The bounds carry no tolerance. What is compared with them does: the SVD of a Jacobian, or a
# quotient of differences, is itself off by a few dozen roundings in float64.
NOISE = 1.0 + 1e-13


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def added_in_place(x: Tensor) -> Tensor:
    y = x[:, 1:]
    y += x[:, :-1] + 1.0
    return y


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Exact Jacobian ``(outputs, inputs)`` at one sample ``(1, ...)``, by a batch of copies."""
    outputs = model(x).shape[1]
    copies = x.expand(outputs, *x.shape[1:]).clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(copies.clone()).diagonal().sum(), copies)
    return gradient.flatten(1)


def gain(model: nn.Module, x: Tensor) -> float:
    return float(torch.linalg.matrix_norm(jacobian(model, x), ord=2))


def quotients(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """``|f(x) - f(y)| / |x - y|`` of pairs of samples."""
    distance = (x - y).flatten(1).norm(dim=1)
    return (model(x.clone()) - model(y.clone())).norm(dim=1) / distance


def ascend(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Move pairs uphill on their quotient, keeping their distance."""
    distance = (x - y).flatten(1).norm(dim=1).reshape(-1, *[1] * (x.ndim - 1))
    for _ in range(12):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        for point, slope in zip(
            (x, y), torch.autograd.grad(quotients(model, x, y).log().sum(), (x, y)), strict=True
        ):
            size = slope.flatten(1).norm(dim=1).clamp_min(1e-12).reshape(distance.shape)
            point.data += 0.2 * distance * slope / size
        middle, half = (x + y).detach() / 2, (x - y).detach() / 2
        half = half * distance / 2 / half.flatten(1).norm(dim=1).reshape(distance.shape)
        x, y = middle + half, middle - half
    return x, y


def points(shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Where to look at the Jacobian: the origin, random places, one bright pixel."""
    yield torch.zeros(1, *shape, dtype=torch.float64)
    for scale in (0.3, 1.0, 30.0):
        yield scale * torch.randn(1, *shape, dtype=torch.float64)
    bright = torch.zeros(math.prod(shape), dtype=torch.float64)
    bright[bright.numel() // 2] = 1.0
    yield bright.reshape(1, *shape)


def certify(module: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, float]:
    """The float64 model with flat output, and its proven bound."""
    certified = CertifiedModel(nn.Sequential(module, nn.Flatten()), shape)
    return certified.model, certified.lipschitz().item()


def trained(norm: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.BatchNorm1d | nn.BatchNorm2d:
    """Give a BatchNorm statistics and factors that are not zero and one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.05, 3.0)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@dataclass(frozen=True)
class Case:
    """A model that uses operations.

    Attributes:
        operations: keys of ``RULES`` that the walk must look up.
        make: builds the model.
        shape: of one sample.
        factor: the bound is at most this many times the largest gain found.
    """

    name: str
    operations: tuple[object, ...]
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    factor: float = 1.0 + 1e-6


def on(function: Callable[[Any], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Apply(function)


CASES = [
    Case("linear", (nn.Linear,), lambda: nn.Linear(5, 4), (5,)),
    Case("linear at each position", (nn.Linear,), lambda: nn.Linear(3, 4), (2, 3)),
    Case("conv", (nn.Conv2d,), lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5), 3.0),
    Case("conv 1x1", (nn.Conv2d,), lambda: nn.Conv2d(3, 4, 1), (3, 2, 2)),
    Case("strided conv", (nn.Conv2d,), lambda: nn.Conv2d(2, 3, 2, stride=2), (2, 4, 6)),
    Case("conv same", (nn.Conv2d,), lambda: nn.Conv2d(1, 2, (1, 3), padding="same"), (1, 5, 4), 3),
    Case(
        "grouped conv",
        (nn.Conv2d,),
        lambda: nn.Conv2d(4, 4, 3, groups=2, dilation=2, padding=2),
        (4, 6, 6),
        4.0,
    ),
    Case("norm 1d", (nn.BatchNorm1d,), lambda: trained(nn.BatchNorm1d(4)), (4,)),
    Case("norm 1d of series", (nn.BatchNorm1d,), lambda: trained(nn.BatchNorm1d(3)), (3, 4)),
    Case(
        "norm after linear",
        (nn.Linear, nn.BatchNorm1d),
        lambda: nn.Sequential(nn.Linear(5, 4), trained(nn.BatchNorm1d(4))),
        (5,),
    ),
    Case(
        "norm over positions after linear",  # the channels are not the rows: not merged
        (nn.Linear, nn.BatchNorm1d),
        lambda: nn.Sequential(nn.Linear(3, 4), trained(nn.BatchNorm1d(2))),
        (2, 3),
        2.0,
    ),
    Case(
        "two norms after linear",
        (nn.Linear, nn.BatchNorm1d),
        lambda: nn.Sequential(
            nn.Linear(5, 4), trained(nn.BatchNorm1d(4)), trained(nn.BatchNorm1d(4))
        ),
        (5,),
        20.0,
    ),
    Case("norm 2d", (nn.BatchNorm2d,), lambda: trained(nn.BatchNorm2d(3)), (3, 2, 2)),
    Case(
        "norm without factors",
        (nn.BatchNorm2d,),
        lambda: trained(nn.BatchNorm2d(3, affine=False)),
        (3, 2, 2),
    ),
    Case(
        "norm after conv",
        (nn.Conv2d, nn.BatchNorm2d),
        lambda: nn.Sequential(nn.Conv2d(2, 3, 2, stride=2), trained(nn.BatchNorm2d(3))),
        (2, 4, 4),
    ),
    Case(
        "norm after average pooling",
        (nn.AvgPool2d, nn.BatchNorm2d),
        lambda: nn.Sequential(nn.AvgPool2d(2), trained(nn.BatchNorm2d(2))),
        (2, 4, 4),
    ),
    Case("normalise", (Normalize,), lambda: Normalize([0.1, 0.2], [0.5, 0.2]), (2, 3, 3)),
    Case("normalise all", (Normalize,), lambda: Normalize([0.1], [0.25]), (3, 2, 2)),
    Case("x + x", (operator.add,), on(lambda x: x + x), (4,)),
    Case("x + constant", (operator.add,), on(lambda x: x + 3.0), (4,)),
    Case("constant + x", (operator.add,), on(lambda x: 3.0 + x), (4,)),
    Case("sum of a list", (operator.add,), on(lambda x: sum([x, x, x])), (4,)),
    Case("+=", (operator.add, operator.getitem), on(added_in_place), (5,), 1.2),
    Case("torch.add", (torch.add,), on(lambda x: torch.add(x, x)), (4,)),
    Case("add method", ("add",), on(lambda x: x.add(x)), (4,)),
    Case("add_ method", ("add_",), on(lambda x: (x + 0.0).add_(x)), (4,)),
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
    Case("max pooling", (nn.MaxPool2d,), lambda: nn.MaxPool2d(2), (2, 4, 4)),
    Case("overlapping max pooling", (nn.MaxPool2d,), lambda: nn.MaxPool2d(3, 1), (1, 5, 5)),
    Case("padded max pooling", (nn.MaxPool2d,), lambda: nn.MaxPool2d(3, 2, 1), (1, 5, 5), 2.1),
    Case("average pooling", (nn.AvgPool2d,), lambda: nn.AvgPool2d(2), (2, 4, 4)),
    Case("padded average", (nn.AvgPool2d,), lambda: nn.AvgPool2d(3, 2, 1), (1, 6, 6), 2.0),
    Case(
        "average with divisor",
        (nn.AvgPool2d,),
        lambda: nn.AvgPool2d(2, divisor_override=-3),
        (1, 4, 4),
    ),
    Case(
        "average of rows",
        (nn.AdaptiveAvgPool2d,),
        lambda: nn.AdaptiveAvgPool2d((None, 1)),
        (2, 3, 4),
    ),
    Case("global average", (nn.AdaptiveAvgPool2d,), lambda: nn.AdaptiveAvgPool2d(1), (2, 3, 3)),
    Case("identity", (nn.Identity,), nn.Identity, (4,)),
    Case("dropout", (nn.Dropout,), lambda: nn.Dropout(0.9), (4,)),
    Case("dropout 2d", (nn.Dropout2d,), lambda: nn.Dropout2d(0.9), (2, 2, 2)),
    Case(
        "dropout between linear and norm",
        (nn.Linear, nn.Dropout, nn.BatchNorm1d),
        lambda: nn.Sequential(nn.Linear(5, 4), nn.Dropout(), trained(nn.BatchNorm1d(4))),
        (5,),
    ),
    Case("flatten layer", (nn.Flatten,), nn.Flatten, (2, 2, 2)),
    Case("torch.flatten", (torch.flatten,), on(lambda x: torch.flatten(x, 1)), (2, 2, 2)),
    Case("flatten method", ("flatten",), on(lambda x: x.flatten(-2)), (2, 2, 2)),
    Case("torch.reshape", (torch.reshape,), on(lambda x: torch.reshape(x, (-1, 4))), (2, 2)),
    Case("reshape", ("reshape", "size"), on(lambda x: x.reshape(x.size(0), -1)), (2, 2)),
    Case("view", ("view", getattr), on(lambda x: x.view(x.shape[0], -1)), (2, 2)),
    Case("size", ("size", "view"), on(lambda x: x.view(x.size()[0], x.size(1) * 2)), (2, 2)),
    Case("slices", (operator.getitem,), on(lambda x: x[:, 1:, ::2]), (3, 4)),
    Case("ellipsis", (operator.getitem,), on(lambda x: x[..., 1]), (3, 4)),
    Case("pad", (F.pad,), on(lambda x: F.pad(x, (1, 2), value=5.0)), (3,)),
    Case("crop", (F.pad,), on(lambda x: F.pad(x, (-1, 1, 0, 2))), (3, 3)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rule(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    used = set()

    def noting(key: object, rule: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            used.add(key)
            return rule(*args, **kwargs)

        return call

    for key, rule in list(RULES.items()):
        monkeypatch.setitem(RULES, key, noting(key, rule))

    largest = 0.0
    for seed in range(2):
        torch.manual_seed(seed)
        model, bound = certify(case.make(), case.shape)
        for x in points(case.shape):
            largest = max(largest, gain(model, x) / bound)
        for scale, distance in [(1.0, 1.0), (0.3, 1e-2), (10.0, 3.0)]:
            x = scale * torch.randn(20, *case.shape, dtype=torch.float64)
            y = x + distance * torch.randn_like(x)
            largest = max(largest, quotients(model, x, y).max().item() / bound)
            largest = max(largest, quotients(model, *ascend(model, x, y)).max().item() / bound)
    assert largest <= NOISE
    assert largest >= 1.0 / case.factor
    assert set(case.operations) <= used


def test_every_rule_has_a_case() -> None:
    covered = {key for case in CASES for key in case.operations}
    assert covered >= BUILT_IN, f"no case for {BUILT_IN - covered}"


@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e30])
def test_bound_grows_with_the_weights(scale: float) -> None:
    torch.manual_seed(0)
    norm = trained(nn.BatchNorm2d(2))
    model = nn.Sequential(nn.Conv2d(1, 2, 3), norm, nn.Flatten(), nn.Linear(8, 3)).double()
    _, bound = certify(model, (1, 4, 4))
    with torch.no_grad():
        model[0].weight *= scale
        model[3].weight *= scale
    assert certify(model, (1, 4, 4))[1] == pytest.approx(bound * scale**2, rel=1e-9)


small = st.integers(1, 3)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch, of even kernels
@given(
    channels=st.tuples(small, small),
    groups=st.integers(1, 2),
    kernel=st.tuples(small, small),
    stride=st.tuples(small, small),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.one_of(
        st.tuples(st.integers(0, 3), st.integers(0, 3)), st.sampled_from(["same", "valid"])
    ),
    mode=st.sampled_from(["zeros", "circular", "reflect", "replicate"]),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
    norm=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_convolution_with_any_arguments(
    channels: tuple[int, int],
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int] | str,
    mode: str,
    size: tuple[int, int],
    norm: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    c_in, c_out = channels[0] * groups, channels[1] * groups
    if padding == "same":
        stride = (1, 1)
    conv = nn.Conv2d(
        c_in,
        c_out,
        kernel,
        stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        padding_mode=mode,
    )
    layer = nn.Sequential(conv, trained(nn.BatchNorm2d(c_out))) if norm else conv
    try:
        layer.eval()(torch.zeros(1, c_in, *size))
    except RuntimeError:
        assume(False)
    model, bound = certify(layer, (c_in, *size))
    exact = gain(model, torch.zeros(1, c_in, *size, dtype=torch.float64))
    assert exact <= bound * NOISE
    # The worst the method can do: sqrt(h w) <= 3, and pixels repeated at most 7 times an axis.
    # (Not a multiple of `exact`, which is zero where a strided kernel meets nothing but padding.)
    largest = (
        (layer[1].weight / (layer[1].running_var + 1e-5).sqrt()).abs().max().item() if norm else 1
    )
    assert bound <= 21.0 * conv.weight.norm().item() * largest * (1 + 1e-6)


@given(
    kernel=st.tuples(small, small),
    stride=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    dilation=st.tuples(small, small),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    ceil_mode=st.booleans(),
)
def test_max_pooling_counts_windows(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    ceil_mode: bool,
) -> None:
    assume(all(p <= k // 2 for p, k in zip(padding, kernel, strict=True)))
    pool = nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    size = (19, 19)  # large enough for a pixel in as many windows as any can be in
    _, bound = certify(pool, (1, *size))
    # One bright pixel at a time: it is the maximum of every window that it is in.
    images = torch.eye(361, dtype=torch.float64).reshape(361, 1, *size)
    windows = pool(images).flatten(1).sum(dim=1)
    assert windows.max().sqrt().item() <= bound
    assert bound <= windows.max().sqrt().item() * (1 + 1e-9)


@given(
    kernel=st.tuples(small, small),
    stride=st.tuples(small, small),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    divisor=st.sampled_from([None, 1, 5, -2]),
    size=st.tuples(st.integers(2, 6), st.integers(2, 6)),
)
def test_average_pooling_is_bounded(
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    divisor: int | None,
    size: tuple[int, int],
) -> None:
    assume(all(p <= k // 2 for p, k in zip(padding, kernel, strict=True)))
    assume(all(k <= s for k, s in zip(kernel, size, strict=True)))
    pool = nn.AvgPool2d(kernel, stride, padding, divisor_override=divisor)
    model, bound = certify(pool, (2, *size))
    exact = gain(model, torch.zeros(1, 2, *size, dtype=torch.float64))
    assert exact <= bound * NOISE
    assert bound <= 3.0 * exact * (1 + 1e-9)


@given(size=st.tuples(st.integers(1, 8), st.integers(1, 8)), wanted=st.tuples(small, small))
def test_adaptive_pooling_is_exact_or_refused(
    size: tuple[int, int], wanted: tuple[int, int]
) -> None:
    pool = nn.AdaptiveAvgPool2d(wanted)
    if any(s % w for s, w in zip(size, wanted, strict=True)):
        with pytest.raises(UnsupportedModel, match="windows overlap"):
            certify(pool, (1, *size))
        return
    model, bound = certify(pool, (1, *size))
    exact = gain(model, torch.zeros(1, 1, *size, dtype=torch.float64))
    assert exact <= bound * NOISE
    assert bound <= exact * (1 + 1e-12)


def random_network(seed: int) -> tuple[nn.Module, tuple[int, ...]]:
    """Layers in random order, as far as their shapes fit, with residual branches."""
    torch.manual_seed(seed)
    draw = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=draw))

    shape: tuple[int, ...] = (2, 6, 6)
    layers: list[nn.Module] = [Normalize([0.5], [0.25])]
    channels = 2
    for _ in range(4):
        kind = pick(7)
        if kind == 0:
            layers += [nn.Conv2d(channels, 4, 3, stride=1 + pick(2), padding=1)]
            channels = 4
        elif kind == 1:
            layers += [trained(nn.BatchNorm2d(channels))]
        elif kind == 2:
            layers += [nn.ReLU(), nn.Dropout()]
        elif kind == 3:
            layers += [models.BasicBlock(channels, channels + 2, 1, "tanh").eval()]
            channels += 2
        elif kind == 4:
            layers += [nn.MaxPool2d(2, stride=1, padding=1)]
        elif kind == 5:
            layers += [MaxMin()]
        else:
            layers += [nn.AvgPool2d(2, stride=1, padding=1)]
    features = nn.Sequential(*layers, nn.Flatten())
    width = features.eval()(torch.zeros(1, *shape)).shape[1]
    return nn.Sequential(features, nn.Linear(width, 3)), shape


@pytest.mark.parametrize("seed", range(25))
def test_random_networks(seed: int) -> None:
    network, shape = random_network(seed)
    certified = CertifiedModel(network, shape)
    bound = certified.lipschitz().item()
    margins = certified.margin_lipschitz()
    for x in points(shape):
        rows = jacobian(certified.model, x)
        assert torch.linalg.matrix_norm(rows, ord=2).item() <= bound * NOISE
        differences = (rows[:, None] - rows[None, :]).norm(dim=-1)
        assert bool((differences <= margins * NOISE).all())
    x = torch.rand(10, *shape, dtype=torch.float64)
    far = ascend(certified.model, x, x + torch.randn_like(x))
    assert quotients(certified.model, *far).max().item() <= bound * NOISE


@pytest.mark.parametrize(
    ("module", "shape", "reason"),
    [
        (nn.BatchNorm1d(3, track_running_stats=False), (3, 4), "other samples|statistics"),
        (nn.Softplus(), (3,), "threshold"),
        (nn.Softplus(threshold=1e6), (3,), "overflows"),
        (nn.Softplus(beta=-1.0, threshold=40.0), (3,), "beta"),
        (nn.LeakyReLU(math.nan), (3,), "NaN"),
        (nn.AvgPool2d(2, ceil_mode=True), (1, 5, 5), "border"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), (1, 6, 6), "border"),
        (nn.AvgPool2d(2), (4, 4), r"\(N, C, H, W\)"),
        (nn.Conv2d(3, 2, 1), (4, 4), r"\(N, C, H, W\)|does not fit"),
        (nn.AdaptiveAvgPool2d(2), (1, 5, 4), "windows overlap"),
        (nn.AdaptiveAvgPool2d(0), (1, 4, 4), "windows overlap"),
        (Apply(lambda x: torch.add(x, x, alpha=3)), (3,), "alpha"),
        (Apply(lambda x: x[:, :1] + x), (3,), "repeats entries"),
        (Apply(lambda x: x + torch.ones(2, 1, 3)), (3,), "other samples|repeats entries"),
        (Apply(lambda x: F.pad(x, (1, 1), mode="reflect")), (2, 3), "mode='reflect'"),
        (Apply(lambda x: F.pad(x, (0, 0, 0, 0))), (2,), "batch axis"),
        (Apply(lambda x: x[:, None]), (2,), "slices"),
        (Apply(lambda x: x[:, [0, 0, 0]]), (2,), "slices"),
        (Apply(lambda x: x[0:]), (2,), "slices"),
        (Apply(lambda x: x[..., 0:, :]), (2,), "slices"),
        (Apply(lambda x: x.view(torch.int64).view(torch.float64)), (2,), "dtype"),
        (Apply(lambda x: x + x.dtype.itemsize), (2,), "'dtype'|cannot be traced"),
    ],
    ids=str,
)
def test_rules_refuse(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises((UnsupportedModel, ValueError), match=reason):
        certify(module, shape)


def test_softplus_overflow_would_break_a_certificate() -> None:
    """Why a large threshold is refused: 709.7 and 709.8 are mapped to 709.7 and infinity."""
    x = torch.tensor([709.7, 709.8], dtype=torch.float64)
    assert F.softplus(x, threshold=1e6).isinf().tolist() == [False, True]


def test_max_pooling_with_indices_is_refused() -> None:
    pool = nn.MaxPool2d(2, return_indices=True)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool = pool

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(x)[0]

    with pytest.raises(UnsupportedModel, match="return_indices"):
        certify(First(), (1, 4, 4))


def test_padding_changed_after_construction_is_refused() -> None:
    """Torch keeps the padded amounts of the other modes from when the layer was made."""
    conv = nn.Conv2d(1, 1, 3, padding=3, padding_mode="replicate")
    conv.padding = (0, 0)
    with pytest.raises(UnsupportedModel, match="padding was changed"):
        certify(conv, (1, 4, 4))
    conv.padding = (3, 3)
    certify(conv, (1, 4, 4))


def test_normalize_must_not_make_channels() -> None:
    layer = Normalize([0.0], [1.0])
    layer.mean = torch.zeros(3, 1, 1)
    with pytest.raises(UnsupportedModel, match="channels to normalise"):
        certify(layer, (1, 2, 2))


def test_second_registration_is_an_error() -> None:
    class New(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"ReLU.* already has a Lipschitz rule"):
        lipschitz_rule(New, nn.ReLU)(lambda module, x: x)
    assert New not in RULES  # all or none


def test_users_can_add_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Triple(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3.0 * x

    with pytest.raises(UnsupportedModel, match=r"no Lipschitz rule for _operator.mul"):
        certify(Triple(), (2,))

    monkeypatch.setitem(RULES, Triple, None)  # restored after the test
    del RULES[Triple]

    @lipschitz_rule(Triple)
    def triple(module: nn.Module, x: Signal) -> Signal:
        return x.scaled(3.0)

    assert certify(Triple(), (2,))[1] == pytest.approx(3.0, rel=1e-12)
    assert certify(Triple(), (2,))[1] >= 3.0

    class Quadruple(Triple):
        def forward(self, x: Tensor) -> Tensor:
            return 4.0 * x

    with pytest.raises(UnsupportedModel, match="mul"):  # a rule is not inherited
        certify(Quadruple(), (2,))


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
