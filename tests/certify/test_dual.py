from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from certify import CertifiedModel
from certify.dual import dual_bounds, margins_of, proven_radius


class Quadratic(nn.Module):
    """Two logits with the difference ``c - g x - x^T A x / 2``."""

    def __init__(self, constant: float, slope: Tensor, matrix: Tensor) -> None:
        super().__init__()
        self.constant, self.slope, self.matrix = constant, slope, matrix

    def forward(self, x: Tensor) -> Tensor:
        bent = ((x @ self.matrix) * x).sum(dim=1) / 2
        return torch.stack([self.constant - x @ self.slope - bent, torch.zeros_like(bent)], dim=1)


def limits(curvature: float) -> Tensor:
    return torch.full((2, 2), curvature, dtype=torch.float64)


@given(
    seed=st.integers(0, 2**20),
    size=st.integers(1, 6),
    scale=st.sampled_from([1e-4, 1.0, 1e4]),
    constant=st.sampled_from([1e-3, 1.0, 100.0]),
)
def test_any_point_proves_a_radius_of_a_quadratic(
    seed: int, size: int, scale: float, constant: float
) -> None:
    """A ball around zero where the quadratic stays positive, with a point that has nothing to do
    with the problem; compared with the exact distance to its zeros on a fine search."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(size, size, generator=generator, dtype=torch.float64) * scale
    matrix = matrix + matrix.mT
    slope = torch.randn(size, generator=generator, dtype=torch.float64)
    model = Quadratic(constant, slope, matrix)
    curvature = torch.linalg.eigvalsh(matrix)[-1].clamp_min(0.0) * (1 + 1e-12)
    points = torch.randn(50, size, generator=generator, dtype=torch.float64)
    points *= torch.logspace(-6, 2, 50, dtype=torch.float64)[:, None]
    own, other = torch.zeros(50, dtype=torch.int64), torch.ones(50, dtype=torch.int64)
    value, gradient = margins_of(model)(points, own, other)
    found = proven_radius(
        points.square().sum(1),
        (points * gradient).sum(1),
        gradient.square().sum(1),
        value,
        curvature.expand(50),
        size,
    ).amax()
    directions = torch.randn(2000, size, generator=generator, dtype=torch.float64)
    directions = torch.cat([directions, torch.linalg.eigh(matrix)[1].mT, slope[None]])
    directions = directions / directions.norm(dim=1, keepdim=True)
    for sign in (-1.0, 1.0):
        assert bool((model(sign * found * directions)[:, 0] >= -1e-9 * constant).all())


def test_exact_for_a_linear_network() -> None:
    model = Quadratic(3.0, torch.tensor([3.0, 4.0]).double(), torch.zeros(2, 2).double())
    x = torch.zeros(1, 2, dtype=torch.float64)
    found = dual_bounds(margins_of(model), x, model(x), limits(0.0))
    assert found.lower[0, 1].item() == pytest.approx(0.6, rel=1e-6)
    assert found.lower[0, 1] <= 0.6
    assert found.lower[0, 0] == math.inf
    assert found.passes <= 3


def test_exact_where_the_curvature_allows_it() -> None:
    """A circle of radius 1 around (-2, 0): the nearest point is at distance 1."""
    model = Quadratic(1.5, torch.tensor([-2.0, 0.0]).double(), -torch.eye(2).double())
    x = torch.zeros(1, 2, dtype=torch.float64)
    found = dual_bounds(margins_of(model), x, model(x), limits(0.0), steps=40)
    assert found.upper[0, 1] == pytest.approx(1.0, rel=1e-3)
    assert 0.999 <= found.lower[0, 1] <= 1.0


@pytest.mark.parametrize("depth", [2, 3])
def test_bounds_and_attacks_of_networks(depth: int) -> None:
    torch.manual_seed(0)
    model = models.build(
        "mlp", hidden=(20,) * (depth - 1), input_shape=(1, 3, 3), activation="softplus"
    )
    certified = CertifiedModel(model, (1, 3, 3))
    x = torch.rand(30, 1, 3, 3)
    whole = certified.dual(x, steps=30, early_exit=False)
    found = certified.dual(x)
    assert found.passes < whole.passes
    for kind in certified.applicable():
        one = certified.certify(x, kind)
        assert torch.equal(one.prediction, whole.prediction)
        assert bool((one.radius <= whole.upper.amin(dim=1)).all())
        assert bool((one.radius <= certified.attack(x)).all())
        assert not certified.broken(x, one.radius).any()
    smallest = whole.lower.amin(dim=1)
    assert bool((found.certificate().radius >= 0.99 * smallest).all())
    if depth == 2:  # solved exactly: the attack is where the proof ends
        assert (smallest >= 0.999 * certified.attack(x)).double().mean() > 0.9
    closed = certified.certify(x, "curvature").radius
    assert bool((closed >= certified.certify(x).radius * (1 - 1e-9)).all())
    best = certified.certify(x, "best").radius
    assert bool((best >= torch.maximum(closed, found.certificate().radius)).all())


def test_attacks_break_what_is_not_certified() -> None:
    torch.manual_seed(0)
    model = models.build("mlp", hidden=(20,), input_shape=(1, 3, 3), activation="tanh")
    certified = CertifiedModel(model, (1, 3, 3))
    x = torch.rand(20, 1, 3, 3)
    distance = certified.attack(x)
    assert bool(torch.isfinite(distance).all())
    assert certified.broken(x, 1.05 * distance).double().mean() > 0.9
    assert not certified.broken(x, torch.zeros(20)).any()
    assert not certified.broken(x, torch.full((20,), torch.inf)).any()


def test_attacks_search_in_float32_and_see_in_float64() -> None:
    """In float32 the large biases leave no difference of the logits at all."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, dtype=torch.float64))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
        model[1].bias.fill_(1e12)
    certified = CertifiedModel(model, (1, 2, 2))
    x = torch.ones(3, 1, 2, 2)
    assert not certified.broken(x, torch.full((3,), 0.999)).any()
    assert bool((certified.attack(x) >= 1.0).all())
    with torch.no_grad():
        model[1].bias.zero_()
    certified = CertifiedModel(model, (1, 2, 2))
    assert certified.broken(x, torch.full((3,), 1.001)).all()
    torch.testing.assert_close(
        certified.attack(x), torch.ones(3, dtype=torch.float64), rtol=0.0, atol=1e-4
    )


class Doubled(nn.Module):
    """Goes on in float64 whatever it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x).double())
        return result


def test_attacks_on_what_cannot_be_computed_in_float32() -> None:
    torch.manual_seed(0)
    certified = CertifiedModel(Doubled().double(), (4,))
    x = torch.rand(5, 4)
    radius = certified.certify(x).radius
    found = certified.attack(x)
    torch.testing.assert_close(found, radius, rtol=1e-3, atol=0.0)


def test_early_exit_keeps_the_smallest_radius() -> None:
    torch.manual_seed(0)
    model = models.build("mlp", hidden=(16,), input_shape=(1, 3, 3), activation="tanh")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    certified = CertifiedModel(model, (1, 3, 3))
    x = torch.rand(50, 1, 3, 3)
    early, full = certified.dual(x), certified.dual(x, early_exit=False)
    assert early.passes < full.passes <= 50 * 99
    smallest = full.lower.amin(dim=1)
    assert smallest.min() > 1e-6
    # Points of other classes are farther away, and pay for more rounding.
    assert torch.allclose(early.lower.amin(dim=1), smallest, rtol=1e-9, atol=0.0)


def test_ties_and_numbers_that_are_none() -> None:
    model = Quadratic(1.0, torch.ones(2).double(), torch.zeros(2, 2).double())
    x = torch.zeros(4, 2, dtype=torch.float64)
    logits = torch.tensor([[1.0, 1.0], [math.nan, 0.0], [math.inf, 0.0], [2.0, 1.0]]).double()
    found = dual_bounds(margins_of(model), x, logits, limits(0.0))
    assert found.certificate().radius[:2].tolist() == [0.0, 0.0]
    for bad in (math.inf, math.nan):
        assert dual_bounds(margins_of(model), x, logits, limits(bad)).lower[3, 1] == 0.0


class Detached(nn.Module):
    """A function whose gradient autograd does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x)
        with torch.no_grad():
            frozen = torch.tanh(2.0 * x)
        result: Tensor = self.layer(hidden + 9.0 * hidden.detach() + 9.0 * frozen)
        return result


def test_gradients_are_those_of_the_function() -> None:
    torch.manual_seed(0)
    certified = CertifiedModel(Detached(), (4,))
    x = torch.randn(30, 4)
    for kind in ("curvature", "dual"):
        assert not certified.broken(x, certified.certify(x, kind).radius).any()


@pytest.mark.parametrize(
    ("first", "last", "offset"),
    [(1e60, 1e43, 5e16), (1e104, 1.0, 1e-4), (1e-20, 1e135, 1e60), (1e-170, 1e-150, 1e-190)],
)
def test_what_underflows_proves_nothing(first: float, last: float, offset: float) -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Softsign(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model[0].weight.fill_(first)
        model[2].weight[0] = last
        model[2].bias[0] = offset
    certified = CertifiedModel(model, (1,))
    share = offset / last
    flips = share / (1.0 - share) / first if share < 1 else math.inf
    x = torch.zeros(1, 1, dtype=torch.float64)
    for kind in certified.applicable():
        assert certified.certify(x, kind).radius.item() <= flips * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_never_worse_than_lipschitz_bounds_when_balanced(seed: int) -> None:
    torch.manual_seed(seed)
    model = models.build("mlp", hidden=(9, 7), input_shape=(1, 2, 2), activation="tanh")
    certified = CertifiedModel(model, (1, 2, 2), tighten="balance")
    x = torch.rand(20, 1, 2, 2)
    plain = certified.certify(x).radius
    assert bool((certified.certify(x, "curvature").radius >= plain).all())
    assert bool((certified.certify(x, "best").radius >= plain).all())


class InPlace(nn.Module):
    """Operations that overwrite what autograd would need."""

    def __init__(self, kink: bool) -> None:
        super().__init__()
        self.first, self.last, self.kink = nn.Linear(4, 6), nn.Linear(6, 3), kink

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = torch.relu(x).mul_(2.0).tanh_() if self.kink else torch.tanh(x).mul_(2.0)
        x = torch.sigmoid(x).add_(1.0)
        x *= 3.0
        result: Tensor = self.last(nn.functional.silu(x, True))
        return result


@pytest.mark.parametrize("kink", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_networks_that_work_in_place(kink: bool, inference: bool) -> None:
    torch.manual_seed(0)
    certified = CertifiedModel(InPlace(kink), (4,))
    with torch.inference_mode(inference):
        x = torch.randn(10, 4)
        for kind in ("curvature", "dual", "best"):
            found = certified.certify(x, kind).radius
            assert bool((found > 0).all())
            assert not certified.broken(x, found).any()


def test_torch_gradients_that_are_not_derivatives() -> None:
    """LPPool of power one is a sum, but torch's gradient is zero where a sum is."""
    model = nn.Sequential(
        nn.LPPool1d(1, 2), nn.Flatten(), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)
    )
    certified = CertifiedModel(model, (2, 4))
    x = torch.zeros(1, 2, 4)
    for kind in certified.applicable():
        assert not certified.broken(x, certified.certify(x, kind).radius).any()
    assert certified.smooth.head.backbone is not None
