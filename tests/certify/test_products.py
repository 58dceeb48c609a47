"""Products of signals: bounded on a domain, refused without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from certify import CertifiedModel, UnsupportedModel
from tests.certify.rules.harness import NOISE, Apply, jacobian

UNIT = (0.0, 1.0)


class SqueezeExcitation(nn.Module):
    """A gate for each channel, from the channels' means, behind a convolution."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.narrow = nn.Conv2d(4, 2, 1)
        self.wide = nn.Conv2d(2, 4, 1)
        self.gate = gate
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        x = x * self.gate(self.wide(torch.relu(self.narrow(self.pool(x)))))
        x = self.gate(self.wide(torch.relu(self.narrow(self.pool(x))))) * x
        result: Tensor = self.head(torch.flatten(self.pool(x), 1))
        return result


def largest_gain(model: nn.Module, shape: tuple[int, ...], low: float, high: float) -> float:
    """Largest norm of a Jacobian at corners, random points and points moved uphill."""
    largest = 0.0
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        x = torch.rand(1, *shape, generator=generator, dtype=torch.float64)
        if seed % 2:
            x = x.round()
        x = low + (high - low) * x
        for _ in range(10):
            x.requires_grad_()
            rows = model(x)[0]
            matrix = torch.stack(
                [torch.autograd.grad(row, x, create_graph=True)[0].flatten() for row in rows]
            )
            gain = torch.linalg.matrix_norm(matrix, ord=2)
            largest = max(largest, gain.item())
            try:
                (slope,) = torch.autograd.grad(gain, x, allow_unused=True)
            except RuntimeError:  # torch has no second derivative of hardsigmoid
                break
            if slope is None:
                break
            x = (x + 0.2 * (high - low) * slope.sign()).clamp(low, high).detach()
    return largest


@pytest.mark.parametrize("join", ["merge", "balance"])
@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid, nn.ReLU6, nn.Identity])
def test_gates(gate: type[nn.Module], join: str) -> None:
    torch.manual_seed(0)
    model = SqueezeExcitation(gate())
    certified = CertifiedModel(model, (2, 5, 5), domain=UNIT, tighten=join)
    bound = certified.lipschitz().item()
    found = largest_gain(certified.model, (2, 5, 5), *UNIT)
    assert found <= bound * NOISE
    limit = 1e3 if gate in (nn.Sigmoid, nn.Hardsigmoid) else 1e9
    assert bound < limit * found


@pytest.mark.parametrize("domain", [(0.0, 1.0), (-2.0, 1.0), (3.0, 3.5)])
def test_a_square_has_twice_its_largest_entry(domain: tuple[float, float]) -> None:
    certified = CertifiedModel(Apply(lambda x: x * x), (1,), domain=domain)
    exact = 2 * max(map(abs, domain))
    assert exact <= certified.lipschitz().item() <= exact * (1 + 1e-8)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * torch.tanh(x),
        lambda x: (x + 1.0) * x,
        lambda x: x * (x * x),
        lambda x: x.sum(1, keepdim=True) * x,
        lambda x: x * (1.0 + x[:, :1]),
        lambda x: torch.cat([x * x, x], 1) * torch.cat([x, x], 1),
    ],
)
def test_products_of_all_kinds(function: object) -> None:
    assert callable(function)
    for domain in (UNIT, (-3.0, 0.5)):
        model = nn.Sequential(Apply(function), nn.Flatten())
        certified = CertifiedModel(model, (3,), domain=domain)
        found = largest_gain(certified.model, (3,), *domain)
        assert found <= certified.lipschitz().item() * NOISE
        assert certified.lipschitz().item() <= 30 * found


def test_products_need_a_domain() -> None:
    with pytest.raises(UnsupportedModel, match=r"node 'mul': .*give the range"):
        CertifiedModel(Apply(lambda x: x * x), (3,))
    with pytest.raises(UnsupportedModel, match="repeats both"):
        CertifiedModel(Apply(lambda x: x[:, :1] * x[:, :, :1]), (3, 3), domain=UNIT)


@pytest.mark.parametrize("domain", [(1.0, 0.0), (0.0, float("inf")), (float("nan"), 1.0)])
def test_domains_that_are_none(domain: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="domain"):
        CertifiedModel(nn.Linear(2, 2), (2,), domain=domain)


def test_inputs_outside_the_domain_are_refused() -> None:
    certified = CertifiedModel(nn.Linear(2, 2), (2,), domain=UNIT)
    certified.certify(torch.tensor([[0.0, 1.0]]))
    for x in ([0.0, 1.1], [-0.1, 1.0], [float("nan"), 0.5]):
        with pytest.raises(ValueError, match=r"entries in \[0.0, 1.0\]"):
            certified.certify(torch.tensor([x]))


def test_the_jacobian_of_a_bounded_square() -> None:
    """The helper of these tests sees what it should."""
    model = Apply(lambda x: x * x)
    assert jacobian(model, torch.tensor([[3.0]])).item() == pytest.approx(6.0)
    assert largest_gain(model, (1,), 0.0, 1.0) == pytest.approx(2.0)


@pytest.mark.parametrize("domain", [(0.0, 1.0), (0.0, 0.1), (0.0, 10.0), (3.0, 4.0)])
def test_a_domain_changes_nothing_without_products(domain: tuple[float, float]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    free, limited = CertifiedModel(model, (3,)), CertifiedModel(model, (3,), domain=domain)
    assert torch.equal(free.lipschitz(), limited.lipschitz())
    assert torch.equal(free.margin_lipschitz(), limited.margin_lipschitz())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * (torch.sigmoid(x) + 5.0),
        lambda x: (5.0 + torch.clamp(x, 0, 0.1)) * x,
        lambda x: x * (torch.tanh(x) - 3.0),
        lambda x: x * (2.0 - torch.tanh(x)),
    ],
)
def test_a_gate_with_a_constant_is_larger_than_its_function(function: object) -> None:
    assert callable(function)
    certified = CertifiedModel(Apply(function), (2,), domain=UNIT)
    assert largest_gain(certified.model, (2,), *UNIT) <= certified.lipschitz().item() * NOISE


class Overwrites(nn.Module):
    """A factor is overwritten after its use; its value at the centre is the former one."""

    def __init__(self, bias: float, relu: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1).double()
        nn.init.ones_(self.linear.weight)
        nn.init.constant_(self.linear.bias, bias)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.relu:
            product = y * torch.sin(100 * (x - 0.5))
            return product + torch.relu_(y)
        return y.mul_(torch.sin(100 * (x - 0.5)))


@pytest.mark.parametrize(("bias", "relu"), [(10.0, False), (-10.0, True)])
def test_centres_are_read_before_they_are_overwritten(bias: float, relu: bool) -> None:
    certified = CertifiedModel(Overwrites(bias, relu), (1,), domain=UNIT)
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)[:, None]
    y = certified.logits(x)
    slope = ((y[1:] - y[:-1]) / (x[1:] - x[:-1])).abs().max().item()
    assert slope <= certified.lipschitz().item()


def test_tiny_and_narrow_domains() -> None:
    certified = CertifiedModel(Apply(lambda x: x * x), (1,), domain=(0.0, 5e-324))
    assert certified.lipschitz().item() >= 1e-323
    narrow = (1.0, 1.0 + 2.0**-52)
    certified = CertifiedModel(Apply(lambda x: (x - 1.0) * (x - 1.0) * 1e16), (1,), domain=narrow)
    assert certified.lipschitz().item() >= 2 * 2.0**-52 * 1e16


@pytest.mark.parametrize(
    "function", [lambda x: x * torch.sort(x, 1)[1], lambda x: x * x.max(1, keepdim=True)[1]]
)
def test_products_with_indices_are_refused_or_infinite(function: object) -> None:
    assert callable(function)
    with pytest.raises(UnsupportedModel, match="whole numbers"):
        CertifiedModel(Apply(function), (3,), domain=UNIT)


def test_a_value_at_the_centre_that_rounding_lost_is_paid_for() -> None:
    """The gate is computed as zero and is a hundred."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 1), nn.Linear(1, 1)
            for parameter in self.parameters():
                nn.init.zeros_(parameter)
            nn.init.constant_(self.first.bias, 2.0**60)
            nn.init.ones_(self.second.weight)
            nn.init.constant_(self.second.bias, -(2.0**60))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.second(self.first(x) + 100.0)

    certified = CertifiedModel(Net().double(), (4,), domain=UNIT)
    assert certified.lipschitz() >= 100.0
