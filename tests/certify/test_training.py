from __future__ import annotations

import copy
import dataclasses
import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import models
from certify import (
    CertifiedModel,
    NetworkEstimator,
    TrainingConfig,
    UnsupportedModel,
    evaluate,
    losses,
    optimisation,
    train,
    training,
    training_precision,
)
from certify.augmentation import augmentations, shift
from certify.checkpoints import Checkpoint
from certify.data import ImageData, load_data
from certify.optimisation import budget, learning_rate
from certify.run import RunConfig, run_training
from certify.statistics import followed
from certify.training import EpochMetrics, Trainer, TrainingDiverged
from certify.training_config import FIRST_ORDER_LOSSES, OPTIMIZERS


@pytest.fixture(scope="module")
def digits() -> ImageData:
    return load_data("mnist-5k", train=True)


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


@pytest.mark.parametrize(("slower", "expected"), [(100.0, "float32"), (0.4, "bfloat16")])
def test_the_faster_precision_is_taken(
    slower: float, expected: str, digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = {torch.float32: 1.0, torch.bfloat16: slower}
    monkeypatch.setattr(training_precision, "_seconds", seconds.__getitem__)
    found = []
    for precision in (expected, "auto"):
        config = TrainingConfig(epochs=1, batch_size=64, precision=precision)
        trainer = Trainer(make(), small(digits), config)
        assert trainer.precision == expected
        trainer.run_epoch()
        found.append(weights(trainer.model))
    for name, value in found[0].items():
        assert torch.equal(found[1][name], value)


def test_precisions_are_timed_where_there_is_no_gpu() -> None:
    cpu = torch.device("cpu")
    assert training_precision.chosen_precision("auto", cpu) in ("float32", "bfloat16")
    assert training_precision.chosen_precision("auto", torch.device("meta")) == "float32"


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


# --- averages, limits and choices -------------------------------------------------------------


def test_training_returns_the_average_of_the_weights(digits: ImageData) -> None:
    data, config = small(digits, 256), TrainingConfig(epochs=2, batch_size=64, ema=0.7)
    trainer = Trainer(make(), data, config)
    seen: list[dict[str, torch.Tensor]] = []
    metrics = [
        trainer.run_epoch(lambda _: seen.append(weights(trainer.model)))
        for _ in range(config.epochs)
    ]
    assert len(seen) == 8
    average = {name: value.double() for name, value in seen[0].items()}
    for step in seen[1:]:
        average = {name: 0.7 * average[name] + 0.3 * value for name, value in step.items()}
    found = weights(trainer.result)
    for name, value in average.items():
        torch.testing.assert_close(found[name].double(), value, rtol=0.0, atol=1e-6)
    assert trainer.result is not trainer.model
    assert any(not torch.equal(found[name], value) for name, value in seen[-1].items())

    model = make()
    again = train(model, data, config)
    assert [one.loss for one in again] == [one.loss for one in metrics]
    for name, value in weights(model).items():
        assert torch.equal(value, found[name])
    CertifiedModel(model, (1, 28, 28)).margin_lipschitz()


def test_without_an_average_the_model_is_the_result(digits: ImageData) -> None:
    trainer = Trainer(make(), small(digits, 64), TrainingConfig(epochs=1))
    assert trainer.result is trainer.model
    assert trainer.state_dict()["average"] is None


def test_an_average_of_computed_and_of_normalised_weights(digits: ImageData) -> None:
    """Of what they are computed from: the result is orthonormal all the same."""
    model = tiny_liresnet()
    train(model, shrunk(digits, 128), TrainingConfig(epochs=1, batch_size=32, ema=0.5))
    last = model[-3].weight.detach()  # type: ignore[operator, union-attr, index]
    torch.testing.assert_close(last @ last.T, torch.eye(len(last)), rtol=0.0, atol=1e-4)
    torch.manual_seed(0)
    normalised = models.build("resnet20", width=2, input_shape=(1, 8, 8), mean=[0.5], std=[0.25])
    train(normalised, shrunk(digits, 64), TrainingConfig(epochs=1, batch_size=16, ema=0.5))
    assert all(bool(value.isfinite().all()) for value in weights(normalised).values())
    CertifiedModel(normalised, (1, 8, 8)).lipschitz()


@pytest.mark.parametrize(
    "settings",
    [
        {"ema": 0.8},
        {"ema": 0.8, "optimizer": "sgd", "method": "supremum"},
        {"optimizer": "muon", "clip_norm": 0.5},
        {"ema": 0.5, "precision": "bfloat16", "augment": "randaugment:1:9"},
    ],
    ids=str,
)
def test_resuming_continues_exactly_with(digits: ImageData, settings: dict[str, Any]) -> None:
    config = TrainingConfig(epochs=2, batch_size=32, **settings)
    augment = augmentations(config.augment, "mnist-5k")
    torch.manual_seed(4)  # which randaugment draws from
    straight = Trainer(small_conv(), small(digits, 128), config, augment)
    straight.run_epoch()
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    straight.run_epoch()

    resumed = Trainer(small_conv(seed=5), small(digits, 128), config, augment)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.epoch == 1
    assert not resumed.finished
    resumed.run_epoch()
    assert resumed.finished
    for one, other in ((straight.model, resumed.model), (straight.result, resumed.result)):
        for name, value in weights(one).items():
            assert torch.equal(value, weights(other)[name])


def test_a_run_with_an_average_resumes_exactly(tmp_path: Path) -> None:
    training = TrainingConfig(epochs=2, batch_size=500, ema=0.8, augment="randaugment:1:9")
    run = RunConfig("mlp", {"hidden": [8]}, "mnist-5k", None, training, "cpu")
    straight = run_training(run, tmp_path / "straight").state_dict

    def stop(metrics: EpochMetrics) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_training(run, tmp_path / "stopped", on_epoch=stop)
    resumed = run_training(run, tmp_path / "stopped", resume=True).state_dict
    for name, value in straight.items():
        assert torch.equal(value, resumed[name])
    rows = [(tmp_path / name / "metrics.csv").read_text() for name in ("straight", "stopped")]
    assert [len(text.splitlines()) for text in rows] == [3, 3]


def test_checkpoints_that_take_long_are_not_written_after_every_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With epochs of one second and checkpoints of half a second, 25 seconds lie between two."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr("certify.run.time.monotonic", lambda: now.seconds)
    saved: list[float] = []

    def save(checkpoint: Checkpoint, path: Path) -> None:
        saved.append(now.seconds)
        now.seconds += 0.5
        torch.save(checkpoint.__dict__, path)

    def pass_time(metrics: EpochMetrics) -> None:
        now.seconds += 1.0

    monkeypatch.setattr("certify.run.Checkpoint.save", save)
    monkeypatch.setattr("certify.run.load_checkpoint", lambda path: None)
    training = TrainingConfig(epochs=40, batch_size=1000)
    run = RunConfig("mlp", {"hidden": [2]}, "mnist-5k", None, training, "cpu")
    run_training(run, tmp_path, on_epoch=pass_time)
    assert saved == [0.0, 25.5, 40.0]
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 41


def test_a_limit_of_time_ends_training_with_its_schedules(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = SimpleNamespace(seconds=50.0)
    monkeypatch.setattr(optimisation, "time", SimpleNamespace(monotonic=lambda: now.seconds))
    rates, budgets = [], []

    def noted_rate(config: TrainingConfig, done: float) -> float:
        rates.append((done, learning_rate(config, done)))
        return rates[-1][1]

    def noted_budget(config: TrainingConfig, done: float) -> float:
        budgets.append(budget(config, done))
        return budgets[-1]

    monkeypatch.setattr(training, "learning_rate", noted_rate)
    monkeypatch.setattr(training, "budget", noted_budget)

    def tick(metrics: EpochMetrics) -> None:
        now.seconds += 1.0

    config = TrainingConfig(
        epochs=100, batch_size=64, max_minutes=10 / 60, warm_up=0.2, ramp=0.5, epsilon=0.3
    )
    trainer = Trainer(make(), small(digits, 256), config)
    metrics = []
    while not trainer.finished:
        metrics.append(trainer.run_epoch(tick))
    assert [one.seconds for one in metrics] == [3.0, 7.0, 9.0]  # of four steps and of two
    assert [done for done, _ in rates] == pytest.approx([k / 10 for k in range(10)], abs=1e-12)
    found = [rate for _, rate in rates]
    assert max(found) == found[2] == config.lr
    assert found[2:] == sorted(found[2:], reverse=True)
    assert 0.0 < found[-1] < 0.05 * config.lr
    assert budgets[0] == 0.0
    assert budgets[5:] == [0.3] * 5

    late = Trainer(make(), small(digits, 256), config)
    late.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert late.finished  # the time of the sessions before counts


def test_steps_end_training_before_a_limit_of_time_does(digits: ImageData) -> None:
    config = TrainingConfig(epochs=2, batch_size=64, max_minutes=1e6)
    assert len(train(make(), small(digits, 128), config)) == 2


def test_training_makes_a_step_however_short_the_time(digits: ImageData) -> None:
    config = TrainingConfig(epochs=3, batch_size=64, max_minutes=1e-9)
    (metrics,) = train(make(), small(digits, 256), config)
    assert math.isfinite(metrics.loss)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch, clip_norm: float
) -> None:
    def steep(
        logits: torch.Tensor, labels: torch.Tensor, bounds: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        return (0.0 * logits).sum().sqrt()  # zero, with an infinite slope

    monkeypatch.setitem(losses.LOSSES, "margin", steep)
    config = TrainingConfig(epochs=1, clip_norm=clip_norm)
    trainer = Trainer(make(), small(digits, 64), config)
    before = weights(trainer.model)
    with pytest.raises(TrainingDiverged, match="the gradient became nan in epoch 1"):
        trainer.run_epoch()
    for name, value in weights(trainer.model).items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("clip_norm", [0.0, 0.02])
def test_clipping_bounds_the_gradient_of_a_step(digits: ImageData, clip_norm: float) -> None:
    config = TrainingConfig(
        epochs=1,
        batch_size=64,
        optimizer="sgd",
        momentum=0.0,
        lr=0.1,
        warm_up=0.0,
        schedule="constant",
        clip_norm=clip_norm,
    )
    trainer = Trainer(make(), small(digits, 64), config)  # one step
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.run_epoch()
    pairs = zip(trainer.model.parameters(), before, strict=True)
    step = math.sqrt(sum((p.detach() - old).square().sum().item() for p, old in pairs)) / config.lr
    if clip_norm:
        assert step == pytest.approx(clip_norm, rel=1e-3, abs=0.0)
    else:
        assert step > 0.1


def small_conv(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return models.build("2c2f", width=2, activation="maxmin")


@pytest.mark.parametrize(
    "settings",
    [{"loss": loss} for loss in FIRST_ORDER_LOSSES]
    + [{"optimizer": optimizer} for optimizer in OPTIMIZERS],
    ids=str,
)
def test_every_loss_and_optimizer_trains(digits: ImageData, settings: dict[str, Any]) -> None:
    model = small_conv()
    before = weights(model)
    config = TrainingConfig(epochs=1, batch_size=32, epsilon=0.1, epsilon_start=0.1, **settings)
    (metrics,) = train(model, small(digits, 64), config)
    assert math.isfinite(metrics.loss)
    for name, _ in model.named_parameters():
        after = weights(model)[name]
        assert bool(after.isfinite().all())
        assert not torch.equal(after, before[name]), name


def test_losses_get_their_settings(digits: ImageData, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def noting(
        logits: torch.Tensor,
        labels: torch.Tensor,
        margin_lipschitz: torch.Tensor,
        epsilon: float,
        *,
        trade_off: float = 1.0,
    ) -> torch.Tensor:
        assert margin_lipschitz.shape == (10, 10)
        seen.append((epsilon, trade_off))
        return nn.functional.cross_entropy(logits, labels)

    monkeypatch.setitem(losses.LOSSES, "gloro-trades", noting)
    config = TrainingConfig(
        epochs=1,
        batch_size=32,
        loss="gloro-trades",
        temperature=5.0,
        trade_off=2.5,
        epsilon=0.4,
        epsilon_start=0.2,
        ramp=1.0,
    )
    train(make(), small(digits, 64), config)
    assert seen == [(0.2, 2.5), (pytest.approx(0.3, rel=1e-12, abs=0.0), 2.5)]


# --- linear residual networks -----------------------------------------------------------------


def shrunk(digits: ImageData, count: int = 512) -> ImageData:
    """Images of 8 x 8 pixels."""
    data = small(digits, count)
    return ImageData(data.images[:, :, 2:26:3, 2:26:3], data.labels, data.classes)


def tiny_liresnet(**settings: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return models.liresnet(input_shape=(1, 8, 8), width=8, depth=(1, 1), dense=(16,), **settings)


@pytest.mark.parametrize("block", ["residual", "aol", "sll", "plain"])
def test_the_method_that_training_follows_is_the_one_of_the_certificate(
    digits: ImageData, block: str
) -> None:
    config = TrainingConfig(
        epochs=4, batch_size=128, method="supremum", loss="emma", epsilon=0.1, ramp=0.0
    )
    model = tiny_liresnet(block=block)
    metrics = train(model, shrunk(digits), config)
    assert metrics[-1].clean_accuracy > metrics[0].clean_accuracy
    certified = CertifiedModel(model, (1, 8, 8), method="supremum").lipschitz().item()
    # The learning rate has nearly fallen to zero: the last epoch's mean is of the last weights.
    assert metrics[-1].lipschitz_estimate == pytest.approx(certified, rel=0.05, abs=0.0)
    other = CertifiedModel(model, (1, 8, 8)).lipschitz().item()
    if block != "sll":
        assert other > 1.1 * certified


def test_bfloat16_leaves_orthonormal_weights_in_float32(
    digits: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = set()
    rows = models.parametrizations._orthonormal_rows

    def noted(matrix: torch.Tensor) -> torch.Tensor:
        result = rows(matrix)
        computed.add((matrix.dtype, result.dtype, torch.is_autocast_enabled("cpu")))
        return result

    monkeypatch.setattr(models.parametrizations, "_orthonormal_rows", noted)
    model = tiny_liresnet()
    config = TrainingConfig(
        epochs=2, batch_size=64, precision="bfloat16", method="supremum", epsilon=0.05, ramp=0.0
    )
    trainer = Trainer(model, shrunk(digits), config)
    results = set()
    model[-1].register_forward_hook(lambda _, __, result: results.add(result.dtype))
    first, second = trainer.run_epoch(), trainer.run_epoch()
    assert second.loss < first.loss
    assert results == {torch.bfloat16}  # the products were computed in it
    assert computed == {(torch.float32, torch.float32, False)}
    orthonormal = [
        module.weight.detach().flatten(1)
        for module in model.modules()
        if "Orthonormal" in str(getattr(module, "parametrizations", ""))
        and isinstance(module, nn.Conv2d | nn.Linear)
    ]
    assert len(orthonormal) == 2
    for weight in orthonormal:
        gram = weight @ weight.T if len(weight) <= weight.shape[1] else weight.T @ weight
        torch.testing.assert_close(gram, torch.eye(len(gram)), rtol=0.0, atol=1e-4)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


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
        {"epsilon_start": -0.1},
        {"trade_off": math.nan},
        {"weight_decay": math.inf},
        {"clip_norm": -1.0},
        {"warm_up": 1.5},
        {"momentum": 1.0},
        {"ema": 1.0},
        {"ema": -0.1},
        {"max_minutes": 0.0},
        {"max_minutes": math.nan},
        {"max_minutes": math.inf},
        {"optimizer": "lion"},
        {"schedule": "step"},
        {"method": "best"},
    ],
    ids=str,
)
def test_settings_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TrainingConfig(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps", [0, 1, 3, 4, 7, 9])
def test_a_run_that_is_stopped_anywhere_goes_on_exactly(tmp_path: Path, steps: int) -> None:
    """Four steps an epoch, of three epochs; stopped a second time after two more."""
    training = TrainingConfig(
        epochs=3, batch_size=512, lr=1e-3, optimizer="nadam", ema=0.9, augment="shift:1"
    )
    run = RunConfig("mlp", {"hidden": (8,)}, "mnist-5k", None, training, "cpu")
    straight = run_training(run, tmp_path / "straight")
    for more in (steps, 2):
        left = iter(range(more))
        stopped = run_training(
            run, tmp_path / "stopped", resume=True, stop=lambda left=left: next(left, None) is None
        )
        assert stopped.progress is not None or steps + 2 >= 24
    resumed = run_training(run, tmp_path / "stopped", resume=True)
    assert resumed.progress is None
    for name, value in straight.state_dict.items():
        assert torch.equal(value, resumed.state_dict[name]), name
    rows = [
        (tmp_path / run / "metrics.csv").read_text().splitlines() for run in ("straight", "stopped")
    ]
    without_seconds = [[line.rsplit(",", 1)[0] for line in lines] for lines in rows]
    assert without_seconds[0] == without_seconds[1]


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 4, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 4, stride=2, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )


@pytest.mark.slow
def test_bounds_follow_batch_normalisation() -> None:
    """Without that, weights vanish in front of it, and nothing is certified."""
    torch.manual_seed(0)
    model = normalised()
    train(model, load_data("mnist-5k", train=True), TrainingConfig(epochs=4, epsilon=0.3))
    report = evaluate(CertifiedModel(model, (1, 28, 28)), load_data("mnist-5k", train=False), 0.3)
    assert report.clean_accuracy > 0.75
    assert report.certified_accuracy[0.3] > 0.3


def test_the_gradient_of_a_normalised_layer_is_that_of_its_direction() -> None:
    """Larger weights before a normalisation change nothing; values are the running ones."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).train()
    estimator = NetworkEstimator(model, (6,))
    x = torch.rand(50, 6)
    model(x)
    plain = estimator(300).lipschitz()
    with followed(model):
        model(x)
        found = estimator(300).lipschitz()
    assert torch.allclose(found, estimator(300).lipschitz(), rtol=0, atol=1e-5)
    weight = model[0].weight
    (gradient,) = torch.autograd.grad(found.log(), weight)
    (constant,) = torch.autograd.grad(plain.log(), weight)
    radial, before = ((g * weight.detach()).sum().item() for g in (gradient, constant))
    assert abs(radial) < 1e-3
    assert before > 0.9
    assert not list(model.named_modules())[2][1]._forward_pre_hooks


def test_compiled_normalisation_is_refused_with_a_loss_by_bounds() -> None:
    data = load_data("mnist-5k", train=True).head(10)
    with pytest.raises(UnsupportedModel, match="leave compile out"):
        Trainer(normalised(), data, TrainingConfig(compile=True))
    Trainer(normalised(), data, TrainingConfig(compile=True, loss="cross-entropy"))


def run_config(**training: Any) -> RunConfig:
    config = TrainingConfig(batch_size=500, **training)
    return RunConfig("mlp", {"hidden": (8,)}, "mnist-5k", None, config)


def test_a_run_whose_time_is_over_is_finished_when_it_goes_on(tmp_path: Path) -> None:
    """It was stopped in its second epoch, and the limit passed while it was saved."""
    asked = iter([False] * 10 + [True])
    config = run_config(epochs=3, max_minutes=60.0)
    stopped = run_training(config, tmp_path, stop=lambda: next(asked))
    assert stopped.progress is not None
    late = {**stopped.progress, "seconds": 3601.0}
    dataclasses.replace(stopped, progress=late).save(tmp_path / "ckpt.pt")
    found = run_training(config, tmp_path, resume=True)
    assert found.progress is None
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 3  # two epochs
    after_epoch = {**late, "part": None}
    dataclasses.replace(stopped, progress=after_epoch).save(tmp_path / "ckpt.pt")
    assert run_training(config, tmp_path, resume=True).progress is None


def test_a_checkpoint_is_not_lost_before_its_successor_can_start(tmp_path: Path) -> None:
    run_training(run_config(epochs=1), tmp_path)

    def fails(trainer: Trainer) -> None:
        raise OSError("no room for events")

    with pytest.raises(OSError, match="no room"):
        run_training(run_config(epochs=1), tmp_path, overwrite=True, on_start=fails)
    assert (tmp_path / "ckpt.pt").exists()
