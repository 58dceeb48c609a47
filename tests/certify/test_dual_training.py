from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import models
from certify import CertifiedModel, TrainingConfig, UnsupportedModel, train
from certify.data import ImageData, load_data, pixels
from certify.dual_training import dual_points, worst_logits
from certify.training import Trainer


@pytest.fixture(scope="module")
def digits() -> ImageData:
    data = load_data("mnist-5k", train=True)
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:1000]
    return ImageData(data.images[chosen], data.labels[chosen], data.classes)


def make(**settings: object) -> nn.Module:
    torch.manual_seed(0)
    return models.build("mlp", **{"hidden": (64,), "activation": "softplus", **settings})


CONFIG = TrainingConfig(epochs=4, batch_size=50, epsilon=1.0, ramp=0.25, loss="dual")


def certified_accuracy(model: nn.Module, certificate: str, epsilon: float) -> float:
    data = load_data("mnist-5k", train=False)
    every = slice(None, None, 5)
    found = CertifiedModel(model, (1, 28, 28)).certify(pixels(data.images[every]), certificate)
    return found.certified(data.labels[every], epsilon).double().mean().item()


def test_dual_training_certifies_real_digits(digits: ImageData) -> None:
    model = make()
    metrics = train(model, digits, CONFIG)
    assert metrics[-1].clean_accuracy > 0.8
    by_dual = certified_accuracy(model, "dual", 1.0)
    assert by_dual > 0.45
    assert by_dual > certified_accuracy(model, "lipschitz", 1.0) + 0.1
    # What training showed is close to what is proven afterwards.
    assert metrics[-1].certified_accuracy_estimate == pytest.approx(by_dual, abs=0.2)


def test_a_curvature_penalty_lowers_curvature(digits: ImageData) -> None:
    largest = []
    for penalty in (0.0, 10.0):
        model = make()
        config = dataclasses.replace(CONFIG, loss="crt", curvature_penalty=penalty, epochs=2)
        assert train(model, digits, config)[-1].clean_accuracy > 0.5
        largest.append(CertifiedModel(model, (1, 28, 28)).curvature().max().item())
    assert largest[1] < 0.7 * largest[0]


@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
def test_the_penalty_goes_with_every_loss(digits: ImageData, loss: str) -> None:
    config = dataclasses.replace(CONFIG, loss=loss, curvature_penalty=0.1, epochs=1)
    assert train(make(), digits, config)[-1].clean_accuracy > 0.25


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["3x1024", "conv3"])
def test_deeper_networks_train(digits: ImageData, name: str, precision: str) -> None:
    torch.manual_seed(0)
    small = {"hidden": (32, 32)} if name == "3x1024" else {"width": 4}
    model = models.build(name, **small)
    config = dataclasses.replace(
        CONFIG, epochs=2, batch_size=20, lr=1e-2, precision=precision, epsilon=0.1, ramp=1.0
    )
    metrics = train(model, digits, config)
    assert metrics[1].loss < metrics[0].loss
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def with_a_head() -> nn.Module:
    torch.manual_seed(0)
    return models.build("2c2f", width=4, head="softplus")


@pytest.mark.parametrize("loss", ["dual", "crt"])
def test_a_smooth_head_trains_its_backbone(digits: ImageData, loss: str) -> None:
    model = with_a_head()
    config = dataclasses.replace(CONFIG, loss=loss, epsilon=0.3, lr=4e-3, curvature_penalty=0.1)
    assert train(model, digits, config)[-1].clean_accuracy > 0.7
    assert all(parameter.grad is not None for parameter in model.parameters())
    if loss == "dual":
        assert certified_accuracy(model, "dual", 0.3) > 0.5


@pytest.mark.parametrize("make", [make, with_a_head])
def test_resuming_continues_exactly(digits: ImageData, make: Callable[[], nn.Module]) -> None:
    straight, again = Trainer(make(), digits, CONFIG), Trainer(make(), digits, CONFIG)
    straight.run_epoch()
    state = copy.deepcopy(straight.state_dict())
    straight.run_epoch()
    again.load_state_dict(state)
    again.run_epoch()
    for a, b in zip(straight.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("loss", ["dual", "crt"])
def test_refuses_networks_without_second_derivatives(digits: ImageData, loss: str) -> None:
    config = dataclasses.replace(CONFIG, loss=loss)
    with pytest.raises(UnsupportedModel, match="have to be smooth"):
        Trainer(make(activation="relu"), digits, config)


@pytest.mark.parametrize(
    "setting",
    [
        {"ramp": -0.1},
        {"ramp": 1.5},
        {"temperature": 0.0},
        {"precision": "float16"},
        {"attack_classes": 0},
        {"attack_steps": 0},
        {"curvature_penalty": -1.0},
        {"loss": "triple"},
    ],
)
def test_bad_settings(setting: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        dataclasses.replace(CONFIG, **setting)


@pytest.mark.parametrize("curvature", [1e-3, 1.0, 30.0])
def test_worst_logits_are_below_what_attacks_reach(curvature: float) -> None:
    """Of a quadratic with that curvature; the minimum on the ball is known."""
    torch.manual_seed(0)

    def model(x: Tensor) -> Tensor:
        first = 5.0 - x[:, 0] - curvature * x.square().sum(dim=1) / 2
        return torch.stack([first, 0.5 * x[:, 1]], dim=1)

    x = (0.1 * torch.randn(40, 3)).requires_grad_()
    labels, epsilon = torch.zeros(40, dtype=torch.int64), torch.tensor(0.4)
    bounds = torch.full((2, 2), curvature, requires_grad=True)
    logits = model(x)
    found = dual_points(model, x, logits, labels, bounds, epsilon, classes=1, steps=60)
    assert bool((found.offsets[:, 0].norm(dim=1) <= epsilon * (1 + 1e-5)).all())
    worst = worst_logits(model, x, logits, labels, bounds, epsilon, found)
    assert torch.equal(worst[:, 0], torch.zeros(40))
    noise = torch.nn.functional.normalize(torch.randn(500, 40, 3), dim=2) * epsilon
    seen = model((x[None] + noise).flatten(0, 1)).reshape(500, 40, 2)
    lowest = (seen[..., 0] - seen[..., 1]).amin(dim=0)
    assert bool((-worst[:, 1] <= lowest + 1e-4).all())
    assert bool((-worst[:, 1] >= lowest - 0.3 - 0.5 * curvature * epsilon**2).all())
    worst[:, 1].sum().backward()
    assert bounds.grad is not None
    assert bool((bounds.grad >= 0).all())  # more curvature, larger logits of others


def test_within_reach_a_ball_ends_at_the_boundary() -> None:
    """Of linear logits, for which the distance to a boundary is margin over gradient."""
    torch.manual_seed(0)
    rows = torch.randn(4, 6, dtype=torch.float64)
    x = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)

    def model(x: Tensor) -> Tensor:
        return x @ rows.T

    logits = model(x)
    labels = logits.argmax(dim=1)
    labels[::4] = (labels[::4] + 1) % 4  # some are wrong
    budget = torch.tensor(0.4, dtype=torch.float64)
    flat = torch.full((4, 4), 1e-9, dtype=torch.float64)
    arguments = (model, x, logits, labels, flat, budget)
    found = dual_points(*arguments, classes=3, steps=2, within_reach=True)

    margins = (logits.gather(1, labels[:, None]) - logits).gather(1, found.classes)
    distances = margins / (rows[labels][:, None] - rows[found.classes]).norm(dim=2)
    expected = distances.clamp(0.0, 0.4)
    assert torch.allclose(found.shares * 0.4, expected, rtol=0.0, atol=1e-9)
    assert torch.allclose(found.offsets.norm(dim=2), expected, rtol=0.0, atol=1e-9)
    worst = worst_logits(*arguments, found).gather(1, found.classes)
    raised = torch.where(
        distances > 0.4, (0.4 / distances - 1.0) * margins, (-margins).clamp_min(0)
    )
    assert torch.allclose(worst, raised, rtol=0.0, atol=1e-6)

    whole = dual_points(*arguments, classes=3, steps=2)
    assert bool((whole.shares == 1.0).all())
    assert torch.allclose(
        whole.offsets.norm(dim=2), torch.full_like(distances, 0.4), rtol=0.0, atol=1e-9
    )


def test_training_within_reach(digits: ImageData) -> None:
    model = with_a_head()
    config = dataclasses.replace(CONFIG, loss="dual-emma", epsilon=0.5, lr=4e-3)
    metrics = train(model, digits, config)
    assert metrics[-1].clean_accuracy > 0.8
    assert certified_accuracy(model, "dual", 0.3) > 0.5
    # No sample whose ball ended before the budget counts as certified at it.
    by_dual = certified_accuracy(model, "dual", 0.5)
    assert metrics[-1].certified_accuracy_estimate == pytest.approx(by_dual, abs=0.2)
