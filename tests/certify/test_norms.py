"""Training-time estimates: below what is proven, converging to it, with gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import models
from certify import CertifiedModel, UnsupportedModel
from certify.bounding import Bounding, merged
from certify.graph import LipschitzGraph
from certify.norms import NetworkEstimator, margin_lipschitz, proven_norms


def trained(model: nn.Module) -> nn.Module:
    """Give every BatchNorm statistics and factors that are not zero and one."""
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            assert module.running_var is not None
            module.running_var.uniform_(0.2, 2.0)
            nn.init.normal_(module.weight, 1.0, 0.3)
    return model


def pooled() -> nn.Module:
    """Float64 constants (pooling) beside weights of the model's own type."""
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(2, 4, 3, stride=2, groups=2, padding=2, padding_mode="circular"),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 5),
        nn.BatchNorm1d(5),
        nn.Tanh(),
        nn.Linear(5, 3),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: models.build("mlp", hidden=(6, 8), input_shape=(1, 3, 3)), (1, 3, 3)),
    "2c2f": (lambda: models.build("2c2f", width=2, input_shape=(1, 8, 8)), (1, 8, 8)),
    "resnet": (lambda: models.resnet(depth=8, width=2, input_shape=(3, 8, 8)), (3, 8, 8)),
    "pooled": (pooled, (1, 6, 6)),
    "norm last": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.BatchNorm1d(3)),
        (4,),
    ),
    "sigmoid last": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Sigmoid()), (4,)),
}


def plain(model: nn.Module, shape: tuple[int, ...]) -> Bounding:
    """The bounds that training estimates: merged, each layer by itself."""
    return Bounding(merged(LipschitzGraph(model, shape).walk()))


def proven_layers(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """Proven norms of the layers, in the order of execution."""
    operators = plain(model, shape).operators()
    norms = proven_norms(operators, "fantastic_four")
    return torch.stack([norms(operator) for operator in operators]).detach()


def proven(model: nn.Module, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Lipschitz bound and margins, without joining neighbours."""
    bounding = plain(model, shape)
    norms = proven_norms(bounding.operators(), "fantastic_four")
    values = bounding.evaluate(norms)
    return values[bounding.output], margin_lipschitz(bounding, values, norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NETWORKS)
def test_estimates_approach_the_proven_bounds_from_below(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = trained(make()).to(dtype)
    model.eval().double()
    layers = proven_layers(model, shape)
    lipschitz, margins = proven(model, shape)
    model.to(dtype)
    # Estimates are exact up to the rounding of their dtype; sums of many terms lose a bit more.
    noise = 1.0 + 100 * torch.finfo(dtype).eps

    estimator = NetworkEstimator(model, shape)
    for iterations in (1, 1, 3, 300):
        estimate = estimator(iterations)
        assert estimate.layers.shape == layers.shape
        assert bool((estimate.layers <= layers * noise).all())
        depth = len(layers)
        limit = lipschitz * noise**depth
        assert estimate.lipschitz().item() <= limit.item()
        assert bool((estimate.margin_lipschitz() <= margins * noise**depth).all())
    torch.testing.assert_close(estimate.layers.double(), layers, rtol=1e-3, atol=0.0)
    torch.testing.assert_close(estimate.lipschitz(), lipschitz, rtol=5e-3, atol=0.0)
    torch.testing.assert_close(estimate.margin_lipschitz(), margins, rtol=5e-3, atol=1e-9)


def test_layers_are_in_the_order_of_execution() -> None:
    """Not in the order of registration, and a shared layer counts each time."""

    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 3, bias=False)
            self.first = nn.Linear(3, 3, bias=False)
            with torch.no_grad():
                self.last.weight.copy_(2.0 * torch.eye(3))
                self.first.weight.copy_(5.0 * torch.eye(3))

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(torch.relu(self.first(torch.relu(self.first(x)))))
            return result

    estimate = NetworkEstimator(Backwards(), (3,))(5)
    assert estimate.layers.tolist() == pytest.approx([5.0, 5.0, 2.0])
    assert estimate.lipschitz().item() == pytest.approx(50.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_reach_every_weight_in_training(name: str) -> None:
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    model = trained(make()).train()
    modes = [module.training for module in model.modules()]
    estimator = NetworkEstimator(model, shape)
    estimate = estimator(2)
    assert [module.training for module in model.modules()] == modes
    estimate.margin_lipschitz().sum().backward()
    for key, parameter in model.named_parameters():
        if key.endswith("bias"):
            continue  # constants do not matter
        assert parameter.grad is not None, key
        assert bool(parameter.grad.isfinite().all()), key
        assert bool(parameter.grad.any()), key


def test_gradient_is_that_of_the_proven_bound() -> None:
    torch.manual_seed(0)
    model = pooled().double()
    NetworkEstimator(model, (1, 6, 6))(500).margin_lipschitz().sum().backward()
    estimated = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    proven(model, (1, 6, 6))[1].sum().backward()
    for key, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(estimated[key], parameter.grad, rtol=1e-3, atol=1e-3)


def test_estimates_follow_weights_and_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    estimator = NetworkEstimator(model, (4,))
    before = estimator(50).lipschitz().item()
    with torch.no_grad():
        model[0].weight *= 2.0
    assert estimator(50).lipschitz().item() == pytest.approx(2.0 * before, rel=1e-4)
    model.train()
    model(100.0 * torch.randn(64, 4))  # moves the running variance
    now = estimator(50).lipschitz().item()
    assert now < before
    assert now == pytest.approx(proven(model.eval().double(), (4,))[0].item(), rel=1e-3)


def test_state_is_saved_and_continues() -> None:
    torch.manual_seed(0)
    model = models.build("2c2f", width=2, input_shape=(1, 8, 8))
    estimator = NetworkEstimator(model, (1, 8, 8), seed=1)
    estimator(3)
    again = NetworkEstimator(model, (1, 8, 8), seed=2)
    assert not torch.equal(again(1).layers, estimator(1).layers)
    again.load_state_dict(estimator.state_dict())
    assert torch.equal(again(1).layers, estimator(1).layers)
    # The model is not the estimator's own: its weights are not saved twice.
    assert not any("weight" in key for key in estimator.state_dict())
    assert not list(estimator.parameters())


def test_zero_weights_have_zero_gradients() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    nn.init.zeros_(model[0].weight)
    nn.init.zeros_(model[2].weight)
    estimate = NetworkEstimator(model, (3,))(2)
    assert estimate.lipschitz().item() == 0.0
    (estimate.lipschitz() + estimate.margin_lipschitz().sum()).backward()
    for layer in (model[0], model[2]):
        assert layer.weight.grad is None or bool(layer.weight.grad.isfinite().all())


def test_what_cannot_be_certified_cannot_be_estimated() -> None:
    with pytest.raises(UnsupportedModel, match="Softmax"):
        NetworkEstimator(nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)), (3,))
    with pytest.raises(UnsupportedModel, match="no convolution or linear layer"):
        NetworkEstimator(nn.Sequential(nn.ReLU()), (3,))


def test_unknown_methods_are_refused_even_without_a_convolution() -> None:
    with pytest.raises(ValueError, match="method"):
        CertifiedModel(nn.Linear(2, 2), (2,), method="guess")


def test_margins_without_a_last_linear_layer() -> None:
    """``sqrt(2)`` times the Lipschitz bound, zero on the diagonal, for infinite bounds too."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double()
    certified = CertifiedModel(model, (3,))
    expected = 2.0**0.5 * certified.lipschitz() * (1.0 - torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(certified.margin_lipschitz(), expected, rtol=1e-12, atol=0.0)

    huge = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU()).double()
    with torch.no_grad():
        for layer in (huge[0], huge[2]):
            layer.weight.copy_(1e200 * torch.eye(3, dtype=torch.float64))
            layer.bias.zero_()
    margins = CertifiedModel(huge, (3,)).margin_lipschitz()
    assert margins.diagonal().tolist() == [0.0, 0.0, 0.0]
    assert bool(margins[0, 1:].isinf().all())


def test_convolutions_searched_together_are_measured_as_one_by_one() -> None:
    torch.manual_seed(0)
    model = trained(models.build("resnet20", width=4, input_shape=(3, 8, 8))).double().eval()
    operators = plain(model, (3, 8, 8)).operators()
    together = proven_norms(operators, "supremum")
    four = proven_norms(operators, "fantastic_four")
    for operator in operators:
        alone = proven_norms([operator], "supremum")(operator)
        assert together(operator).item() == pytest.approx(alone.item(), rel=2e-3)
        assert together(operator).item() <= four(operator).item() * (1 + 1e-3)
