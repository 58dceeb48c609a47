"""Local bounds against sampled and adversarial points, exact Jacobians and the global bounds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import models
from certify import CertifiedModel
from certify.local import Ball
from certify.rules import RULES
from certify.signal import Signal


class Residual(nn.Module):
    """A skip, a concatenation, a shared layer, an offset before a kink, and one in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.shared = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.last = nn.Linear(6 * 16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu_(self.first(x))
        y = x + self.shared((self.shared(x) + 0.3).relu())
        return self.last(torch.cat([y.abs(), 0.5 * x], dim=1).flatten(1))


class Offset(nn.Module):
    """The argument of the activation is not the tensor of the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(16, 9), nn.Linear(9, 9), nn.Linear(9, 4)])

    def forward(self, x: Tensor) -> Tensor:
        x = (self.layers[0](x.flatten(1)) + 1.0).relu()
        x = x + nn.functional.leaky_relu(self.layers[1](x) - 0.5, 2.0)
        return self.layers[2](nn.functional.threshold(x, 0.7, 0.7))


def dense(activation: Callable[[], nn.Module], *widths: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    sizes = [16, *widths]
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), activation()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], 4))


def conv(*layers: nn.Module) -> nn.Module:
    features = nn.Sequential(*layers)
    width = features(torch.zeros(1, 1, 4, 4)).flatten(1).shape[1]
    return nn.Sequential(features, nn.Flatten(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 4))


BatchNorm = nn.BatchNorm2d
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)),
    "one layer": lambda: dense(nn.ReLU, 12),
    "wider than the input": lambda: dense(nn.ReLU, 24),
    "two layers": lambda: dense(nn.ReLU, 12, 10),
    "three layers": lambda: dense(nn.ReLU, 10, 9, 8),
    "leaky": lambda: dense(lambda: nn.LeakyReLU(0.1), 12, 10),
    "relu6": lambda: dense(lambda: nn.Hardtanh(-0.4, 0.3), 12, 10),
    "prelu": lambda: dense(lambda: nn.PReLU(init=-0.5), 8, 8),
    "tanh": lambda: nn.Sequential(dense(nn.Tanh, 9), nn.ReLU(), nn.Linear(4, 4)),
    "ends in relu": lambda: nn.Sequential(dense(nn.ReLU, 9), nn.ReLU()),
    "normalised": lambda: nn.Sequential(models.Normalize([0.5], [0.25]), dense(nn.ReLU, 9, 9)),
    "flat batch norm": lambda: nn.Sequential(
        nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 9), nn.BatchNorm1d(9), nn.ReLU(),
        nn.Linear(9, 4),
    ),
    "conv": lambda: conv(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU()),
    "strided": lambda: conv(
        nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(4, 4, 2, groups=2, padding=1, dilation=2), nn.ReLU(),
    ),
    "batch norm": lambda: conv(nn.Conv2d(1, 3, 3), BatchNorm(3), nn.ReLU(inplace=True)),
    "replicate": lambda: conv(nn.Conv2d(1, 3, 3, padding=1, padding_mode="replicate"), nn.ReLU()),
    "circular": lambda: conv(nn.Conv2d(1, 3, 3, padding=1, padding_mode="circular"), nn.ReLU()),
    "same": lambda: conv(nn.Conv2d(1, 3, 3, padding="same"), nn.ReLU()),
    "transposed": lambda: conv(nn.ConvTranspose2d(1, 2, 2, stride=2), nn.ReLU()),
    "pooled": lambda: conv(
        nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.AvgPool2d(2), nn.ReLU()
    ),
    "overlapping pools": lambda: conv(
        nn.MaxPool2d(2, 1), nn.Conv2d(1, 3, 2), nn.LeakyReLU(-0.5), nn.AvgPool2d(2, 1), nn.ReLU()
    ),
    "kinks first": lambda: nn.Sequential(nn.Softshrink(0.2), dense(lambda: nn.LeakyReLU(2.0), 9)),
    "smooth beside": lambda: nn.Sequential(dense(nn.GELU, 9), nn.ReLU(), nn.Linear(4, 4)),
    "sorted": lambda: dense(models.MaxMin, 8, 8),
    "residual": Residual,
    "offset": Offset,
}  # fmt: skip


def made(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = NETWORKS[name]()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.2, 2.0)
            nn.init.normal_(module.weight)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model.eval()


def ball(certified: CertifiedModel, x: Tensor, radius: Tensor) -> tuple[Ball, dict[Signal, Tensor]]:
    points = certified.arguments(x)
    return Ball(certified.local, points, radius), points


def nearby(certified: CertifiedModel, x: Tensor, radius: Tensor, seed: int) -> list[Tensor]:
    """Random points of the balls, on their spheres and inside, and ascents of the change."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for trial in range(12):
        step = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        step = step / step.flatten(1).norm(dim=1)[:, None, None, None]
        length = radius if trial % 2 else radius * torch.rand((), generator=generator)
        found.append(x + length[:, None, None, None] * step)
    logits = certified.logits(x)
    for target in range(logits.shape[1]):
        point = found[1].clone()
        for _ in range(10):
            point.requires_grad_(True)
            change = certified.logits(point) - logits
            goal = change.gather(1, logits.argmax(dim=1)[:, None]).sum() - change[:, target].sum()
            (gradient,) = torch.autograd.grad(goal, point)
            size = gradient.flatten(1).norm(dim=1).clamp_min(1e-30)[:, None, None, None]
            moved = point.detach() - x - 0.5 * radius[:, None, None, None] * gradient / size
            size = moved.flatten(1).norm(dim=1)[:, None, None, None]
            point = x + moved / (size / radius[:, None, None, None]).clamp_min(1.0)
            found.append(point)
    return found


SLACK = 1e-12  # rounding of the forward passes that are compared


@pytest.mark.parametrize("name", NETWORKS)
@settings(max_examples=6)
@given(seed=st.integers(0, 10_000), size=st.sampled_from([1e-3, 0.1, 0.5, 1.0, 3.0]))
def test_nothing_in_the_ball_changes_faster(name: str, seed: int, size: float) -> None:
    """Logits, margins, and what enters each activation; and each activation is in its cone."""
    certified = CertifiedModel(made(name, seed), (1, 4, 4))
    x = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    radius = size * torch.tensor([1.0, 0.5, 0.25, 2.0], dtype=torch.float64)
    found, points = ball(certified, x, radius)
    logits = certified.logits(x)
    predicted = logits.argmax(dim=1)
    falls = found.margins(predicted)
    whole = found.lipschitz[certified.local.bounding.output]
    for point in nearby(certified, x, radius, seed):
        length = (point - x).flatten(1).norm(dim=1) * (1 + 1e-12)
        change = certified.logits(point) - logits
        assert (change.norm(dim=1) <= whole * length + SLACK).all()
        fall = change - change.gather(1, predicted[:, None])
        assert (fall <= falls * length[:, None] + SLACK).all()
        for signal, moved in certified.arguments(point).items():
            reach = found.units[signal] * length.reshape(-1, *[1] * (moved.ndim - 1))
            assert ((moved - points[signal]).abs() <= reach + SLACK).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_with_all_units_decided_the_norm_is_exact(name: str) -> None:
    certified = CertifiedModel(made(name, 1), (1, 4, 4))
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64).requires_grad_(True)
    logits = certified.logits(x)
    predicted = logits.argmax(dim=1)
    found, _ = ball(certified, x.detach(), torch.full((3,), 1e-9, dtype=torch.float64))
    falls = found.margins(predicted)
    margins = logits.gather(1, predicted[:, None]) - logits
    not_followed = "tanh", "sorted", "pooled", "transposed", "replicate", "circular"
    followed = name not in (*not_followed, "overlapping pools", "smooth beside")
    for j in range(4):
        (gradient,) = torch.autograd.grad(margins[:, j].sum(), x, retain_graph=True)
        exact = gradient.flatten(1).norm(dim=1)
        assert (falls[:, j] >= exact * (1 - 1e-12)).all()
        if followed:
            assert (falls[:, j] <= exact * (1 + 1e-5) + 1e-5).all()


@pytest.mark.parametrize("name", NETWORKS)
def test_never_worse_than_the_global_radius(name: str) -> None:
    for tighten in ("join", "balance", "none"):
        certified = CertifiedModel(made(name, 2), (1, 4, 4), tighten=tighten)
        x = torch.randn(20, 1, 4, 4)
        globally, locally = certified.certify(x), certified.certify(x, "local")
        assert torch.equal(globally.prediction, locally.prediction)
        assert (locally.radius >= globally.radius).all()
        if name in ("one layer", "two layers", "conv", "residual"):
            assert (locally.radius > 1.1 * globally.radius).double().mean() > 0.5


@given(seed=st.integers(0, 10_000), width=st.integers(1, 6), inputs=st.integers(1, 3))
@settings(max_examples=20)
def test_a_margin_never_vanishes_inside_the_radius_of_a_small_network(
    seed: int, width: int, inputs: int
) -> None:
    """Against brute force: the nearest point of a fine grid with another prediction."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, 3))
    certified = CertifiedModel(model, (inputs,))
    x = torch.randn(6, inputs)
    found = certified.certify(x, "local")
    steps = torch.linspace(-1.0, 1.0, {1: 2001, 2: 101, 3: 25}[inputs], dtype=torch.float64)
    grid = torch.cartesian_prod(*[steps] * inputs).reshape(-1, inputs)
    for point, predicted, radius in zip(x.double(), found.prediction, found.radius, strict=True):
        span = min(2.0 * radius.item(), 50.0)
        points = point + span * grid
        other = certified.logits(points).argmax(dim=1) != predicted
        distance = (points - point).norm(dim=1)[other]
        assert (distance > radius * (1 - 1e-12)).all()


def trained(model: nn.Module) -> tuple[CertifiedModel, Tensor]:
    """Fit four noisy patterns; return the network and fresh samples."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(4, 1, 4, 4, generator=generator)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 4, (count,), generator=generator)
        noise = torch.randn(count, 1, 4, 4, generator=generator)
        return patterns[labels] + 0.7 * noise, labels

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        x, labels = samples(64)
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return CertifiedModel(model, (1, 4, 4)), samples(60)[0].double()


@pytest.mark.parametrize("name", ["two layers", "conv", "residual"])
def test_no_attack_succeeds_inside_a_radius_of_a_trained_network(name: str) -> None:
    certified, x = trained(made(name, 3).train())
    found = certified.certify(x, "local")
    globally = certified.certify(x)
    assert (found.radius / globally.radius).median() > 1.3
    radius = (found.radius * (1 - 1e-9)).clamp_min(1e-12)
    for point in nearby(certified, x, radius, 0):
        assert torch.equal(certified.logits(point).argmax(dim=1), found.prediction)


def test_samples_do_not_depend_on_their_batch() -> None:
    certified = CertifiedModel(made("two layers", 4), (1, 4, 4))
    x = torch.randn(9, 1, 4, 4)
    together = certified.certify(x, "local").radius
    alone = torch.cat([certified.certify(one, "local").radius for one in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=2e-2, atol=0.0)
    assert certified.certify(x[:0], "local").radius.shape == (0,)


def test_unusable_inputs_prove_nothing_and_touch_no_others() -> None:
    certified = CertifiedModel(made("two layers", 5), (1, 4, 4))
    x = torch.randn(4, 1, 4, 4)
    x[1] = math.nan
    x[2] = math.inf
    found = certified.certify(x, "local").radius
    assert found[1:3].tolist() == [0.0, 0.0]
    assert (found[[0, 3]] > 0).all()


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_weights(scale: float) -> None:
    model = made("two layers", 6).double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(scale)
                module.bias.zero_()
    certified = CertifiedModel(model, (1, 4, 4))
    x = torch.randn(5, 1, 4, 4)
    globally, locally = certified.certify(x).radius, certified.certify(x, "local").radius
    assert (locally >= globally).all()
    assert locally.isfinite().all()


def test_dead_networks_keep_the_global_radius() -> None:
    model = made("two layers", 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    certified = CertifiedModel(model, (1, 4, 4))
    assert certified.certify(torch.randn(3, 1, 4, 4), "local").radius.tolist() == [0.0] * 3


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (2.0 * x - 1.0).relu()


def test_a_rule_with_a_step_of_its_own_is_not_known_closer(monkeypatch: pytest.MonkeyPatch) -> None:
    """What enters the module is not what enters its activation."""
    monkeypatch.setitem(
        RULES, Doubled, lambda module, x: x.scaled(2.0).piecewise((0.0,), (0.0, 1.0))
    )
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), Doubled(), nn.Linear(8, 4))
    certified = CertifiedModel(model, (1, 4, 4))
    x = torch.randn(30, 1, 4, 4, dtype=torch.float64)
    assert certified.arguments(x) == {}
    found = certified.certify(x, "local")
    radius = found.radius * (1 - 1e-9)
    for point in nearby(certified, x, radius, 0):
        assert torch.equal(certified.logits(point).argmax(dim=1), found.prediction)


def test_an_unknown_certificate_is_refused() -> None:
    certified = CertifiedModel(made("linear", 0), (1, 4, 4))
    with pytest.raises(ValueError, match="lipschitz, local"):
        certified.certify(torch.zeros(1, 1, 4, 4), "exact")


# --- what an audit found ----------------------------------------------------------------------


class Shifted(nn.Module):
    """The input beside the input less a constant: with a domain, two values at its centre."""

    def __init__(self, kind: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.layers
        if self.kind == 0:
            return a(x) + b(x - 0.5)
        if self.kind == 1:
            return c((a(x) + b(x - 0.5)).relu())
        if self.kind == 2:
            return c(a(torch.relu(x - 0.3) + x).relu())
        if self.kind == 3:
            return c((a(x - 0.1) + b(x - 0.5) + x).relu())
        return c((a(x) * torch.sigmoid(b(x + 0.2))).relu())


@pytest.mark.parametrize("kind", range(5))
def test_shifted_inputs_and_products_on_a_domain(kind: int) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        certified = CertifiedModel(Shifted(kind), (3,), domain=(0, 1))
        x = torch.rand(60, 3, dtype=torch.float64)
        found = certified.certify(x, certificate="local")
        globally = certified.certify(x)
        assert bool((found.radius >= globally.radius).all())
        for _ in range(400):
            step = torch.randn_like(x)
            step = step / step.norm(dim=1, keepdim=True) * found.radius.clamp_max(2.0)[:, None]
            y = (x + 0.999 * torch.rand(60, 1, dtype=torch.float64) * step).clamp(0, 1)
            assert torch.equal(certified.logits(y).argmax(dim=1), found.prediction)


@pytest.mark.parametrize(
    "first", [lambda: nn.LeakyReLU(-3.0, inplace=True), lambda: nn.ReLU6(inplace=True)]
)
def test_a_first_operation_in_place(first: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(first(), nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    certified = CertifiedModel(model, (3,))
    x = torch.randn(50, 3)
    doubles = x.double()
    for certificate in ("lipschitz", "local"):
        single = certified.certify(x, certificate=certificate)
        double = certified.certify(doubles, certificate=certificate)
        torch.testing.assert_close(single.radius, double.radius)
        assert torch.equal(doubles, x.double())


def test_constants_that_are_no_float32_numbers() -> None:
    """The root of two of overlapping pools, exactly attained by one bright pixel."""
    model = nn.Sequential(
        nn.MaxPool1d(2, 1), nn.Flatten(), nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)
    ).double()
    with torch.no_grad():
        model[2].weight.copy_(torch.eye(2))
        model[2].bias.zero_()
        model[4].weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
        model[4].bias.zero_()
    certified = CertifiedModel(model, (1, 3))
    x = torch.tensor([[[-9.0, 1.0, -9.0]]], dtype=torch.float64)
    found, _ = ball(certified, x, torch.tensor([0.5], dtype=torch.float64))
    pool = next(s for s in certified.local.order if s.name == "0")
    assert found.lipschitz[pool].item() >= 2.0**0.5 * (1 - 1e-15)
    assert certified.certify(x, certificate="local").radius.item() <= 1.0


def test_decided_samples_do_not_depend_on_their_batch() -> None:
    """Where the network is linear all the way, the first bound says where the radius lies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        model[0].bias.add_(30.0)
    certified = CertifiedModel(model, (3,))
    x = torch.randn(200, 3, dtype=torch.float64)
    together = certified.certify(x, certificate="local").radius
    alone = torch.cat([certified.certify(p, certificate="local").radius for p in x.split(1)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=0.0)
    rows = certified.model[2].weight @ certified.model[0].weight
    logits = certified.logits(x)
    top = logits.argmax(dim=1)
    margins = logits.gather(1, top[:, None]) - logits
    lengths = (rows[top][:, None] - rows).norm(dim=2)
    exact = torch.where(lengths > 0, margins / lengths, torch.inf).amin(dim=1)
    torch.testing.assert_close(together, exact, rtol=1e-9, atol=0.0)


def test_a_network_that_is_flat_nearby_gains() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(-50.0)
        model[2].bias.copy_(torch.tensor([1.0, 0.0]))
    certified = CertifiedModel(model, (2,))
    x = torch.zeros(1, 2, dtype=torch.float64)
    found = certified.certify(x, certificate="local").radius
    assert found.item() > 5 * certified.certify(x).radius.item()
