"""The registry, what has no rule, and random networks of everything that has one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import models
from certify import CertifiedModel, Signal, UnsupportedModel, lipschitz_rule
from certify.rules import RULES
from models import MaxMin, Normalize
from tests.certify.rules import (
    test_activations,
    test_affine,
    test_arithmetic,
    test_arrangement,
    test_contractions,
    test_pooling,
)
from tests.certify.rules.harness import (
    BUILT_IN,
    NOISE,
    Apply,
    ascend,
    certify,
    jacobian,
    points,
    quotients,
    trained,
)

FILES = (
    test_activations,
    test_affine,
    test_arithmetic,
    test_arrangement,
    test_contractions,
    test_pooling,
)


def test_every_rule_has_a_case() -> None:
    covered = {key for file in FILES for case in file.CASES for key in case.operations}
    missing = sorted(str(key) for key in BUILT_IN - covered)
    assert not missing, f"no case for {missing}"


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
        (nn.AvgPool2d(2), (4, 4), r"\(N, C, H, W\)"),
        (nn.Conv2d(3, 2, 1), (4, 4), r"\(N, C, H, W\)|does not fit"),
        (nn.AdaptiveAvgPool2d(0), (1, 4, 4), "without any windows"),
        (Apply(lambda x: x + torch.ones(2, 1, 3)), (3,), "other samples|repeats entries"),
        (Apply(lambda x: F.pad(x, (0, 0, 0, 0))), (2,), "batch axis"),
        (Apply(lambda x: x[None, :, 0]), (2,), "slices|other samples"),
        (Apply(lambda x: x[0:]), (2,), "slices"),
        (Apply(lambda x: x[..., 0:, :]), (2,), "slices"),
        (Apply(lambda x: x.view(torch.int64).view(torch.float64)), (2,), "dtype|precision"),
        (Apply(lambda x: x + x.dtype.itemsize), (2,), "'dtype'|cannot be traced|precision"),
    ],
    ids=str,
)
def test_rules_refuse(module: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    with pytest.raises((UnsupportedModel, ValueError), match=reason):
        certify(module, shape)


def test_second_registration_is_an_error() -> None:
    class New(nn.Module):
        pass

    with pytest.raises(ValueError, match=r"ReLU.* already has a Lipschitz rule"):
        lipschitz_rule(New, nn.ReLU)(lambda module, x: x)
    assert New not in RULES  # all or none


def test_users_can_add_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    class Triple(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3.0 * x.cumsum(1) / x.cumsum(1) * x

    with pytest.raises(UnsupportedModel, match=r"no Lipschitz rule for tensor method 'cumsum'"):
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
            return 4.0 * x.cumsum(1)

    with pytest.raises(UnsupportedModel, match="cumsum"):  # a rule is not inherited
        certify(Quadruple(), (2,))
