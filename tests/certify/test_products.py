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
