from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import nn

import models
from certify import CertifiedModel, TrainingConfig, UnsupportedModel, train
from certify.augmentation import shift
from certify.data import ImageData, load
from certify.training import Trainer, TrainingDiverged


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load("mnist-5k", train=True)


def small(digits: ImageData, count: int = 512) -> ImageData:
    chosen = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))[:count]
    return ImageData(digits.images[chosen], digits.labels[chosen], digits.classes)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def make(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("mlp", hidden=(32,))


def test_training_certifies_real_digits(digits: ImageData) -> None:
    model = make()
    config = TrainingConfig(epochs=4, batch_size=64, epsilon=0.3)
    metrics = train(model, digits, config)
    assert metrics[-1].clean_accuracy > 0.85
    assert metrics[-1].certified_accuracy_estimate > 0.5
    # The estimate that training follows is close to what is proven afterwards.
    proven = CertifiedModel(model, (1, 28, 28)).lipschitz().item()
    assert metrics[-1].lipschitz_estimate == pytest.approx(proven, rel=0.2)


def test_same_seed_same_weights(digits: ImageData) -> None:
    config = TrainingConfig(epochs=2, batch_size=100)
    first, second, other = make(), make(), make()
    train(first, small(digits), config, augment=[shift(1)])
    train(second, small(digits), config, augment=[shift(1)])
    train(other, small(digits), dataclasses.replace(config, seed=1), augment=[shift(1)])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not all(
        torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True)
    )


def test_resuming_from_a_state_continues_exactly(digits: ImageData) -> None:
    config = TrainingConfig(epochs=3, batch_size=100)
    straight = Trainer(make(), small(digits), config, [shift(1)])
    straight.run_epoch()
    state = copy.deepcopy(straight.state_dict())
    for _ in range(2):
        straight.run_epoch()

    resumed = Trainer(make(seed=5), small(digits), config, [shift(1)])
    resumed.load_state_dict(state)
    for _ in range(2):
        resumed.run_epoch()
    assert resumed.epoch == 3
    for a, b in zip(weights(straight.model).values(), weights(resumed.model).values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "penalty", [{"lipschitz_penalty": 0.1}, {"log_lipschitz_penalty": 0.3}], ids=str
)
def test_penalties_shrink_the_proven_constant(digits: ImageData, penalty: dict[str, float]) -> None:
    config = TrainingConfig(epochs=6, batch_size=64, loss="cross-entropy")
    plain, penalised = make(), make()
    train(plain, small(digits), config)
    train(penalised, small(digits), dataclasses.replace(config, **penalty))
    bounds = [CertifiedModel(m, (1, 28, 28)).lipschitz().item() for m in (plain, penalised)]
    assert bounds[1] < 0.8 * bounds[0]


def test_a_loss_that_is_not_finite_stops_before_the_step(digits: ImageData) -> None:
    trainer = Trainer(make(), small(digits), TrainingConfig(epochs=1))
    with torch.no_grad():
        next(trainer.model.parameters()).view(-1)[0] = math.nan
    before = weights(trainer.model)
    with pytest.raises(TrainingDiverged, match="the loss became nan in epoch 1"):
        trainer.run_epoch()
    for name, value in weights(trainer.model).items():
        assert torch.equal(value.nan_to_num(7.0), before[name].nan_to_num(7.0))


def test_batch_norm_trains_under_the_margin_loss() -> None:
    data = ImageData(
        torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8),
        torch.arange(24) % 10,
        tuple("0123456789"),
    )
    torch.manual_seed(0)
    model = models.build("resnet20", width=4, input_shape=(3, 8, 8))
    metrics = train(model, data, TrainingConfig(epochs=2, batch_size=12))
    assert math.isfinite(metrics[-1].loss)
    assert model.training
    CertifiedModel(model, (3, 8, 8)).margin_lipschitz()


def test_a_network_that_cannot_be_certified_is_refused_at_the_start(digits: ImageData) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.Softmax(dim=1))
    with pytest.raises(UnsupportedModel, match="Softmax"):
        Trainer(model, small(digits), TrainingConfig())


class TwoOutputs(nn.Module):
    """Auxiliary logits while it trains, as GoogLeNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.layer(x.flatten(1))
        return (logits, logits) if self.training else logits


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        (nn.Flatten(), UnsupportedModel, "no parameters to train"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).requires_grad_(False),
            UnsupportedModel,
            "no parameters to train",
        ),
        (nn.Sequential(nn.Flatten(), nn.Linear(784, 3)), ValueError, "3 classes, .* a label 9"),
        (nn.Conv2d(1, 10, 28), UnsupportedModel, r"expected logits \(N, C\), got .*1, 10, 1, 1"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double(),
            ValueError,
            "does not take images as torch.float32",
        ),
        (TwoOutputs(), UnsupportedModel, "in training mode, too"),
    ],
    ids=["empty", "frozen", "few", "map", "double", "two"],
)
def test_models_that_cannot_be_trained(
    digits: ImageData, model: nn.Module, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(model, small(digits, 100), TrainingConfig(epochs=1))


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"batch_size": 0},
        {"lr": 0.0},
        {"lr": math.nan},
        {"loss": "hinge"},
        {"epsilon": -0.1},
        {"lipschitz_penalty": math.nan},
        {"log_lipschitz_penalty": -1.0},
    ],
    ids=str,
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TrainingConfig(**wrong)  # type: ignore[arg-type]
