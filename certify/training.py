"""Training with bound-based losses and penalties."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from certify.augmentation import Augmentation
from certify.curvature_estimate import HeadEstimator
from certify.data import ImageData, pixels
from certify.dual_training import dual_points, worst_logits
from certify.losses import LOSSES
from certify.norms import NetworkEstimator
from certify.optimisation import Clock, budget, learning_rate, make_optimizers
from certify.signal import UnsupportedModel
from certify.training_config import SECOND_ORDER_LOSSES, TrainingConfig


class TrainingDiverged(RuntimeError):  # noqa: N818 - the name says what happened
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class EpochMetrics:
    """Means over the batches of one epoch, as the network was while it learned.

    Certified accuracy and Lipschitz constant rest on estimated norms: indications for whoever
    watches, not certificates. The seconds are those since the training's start.
    """

    epoch: int
    loss: float
    clean_accuracy: float
    certified_accuracy_estimate: float
    lipschitz_estimate: float
    seconds: float = 0.0


class Trainer:
    """Everything that a training run carries from step to step.

    Args:
        model: classifier with input ``(N, *input_shape)``; trained in place on its device.
        data: training images.
        config: how to train.
        augment: applied to each batch in turn.

    Raises:
        UnsupportedModel: a network that could not be certified afterwards.
        ValueError: an image size that does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        data: ImageData,
        config: TrainingConfig,
        augment: Sequence[Augmentation] = (),
    ) -> None:
        self.model = model
        self.config = config
        self.epoch = 0
        self._augment = augment
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise UnsupportedModel("the model has no parameters to train")
        self._device = trained[0].device
        self._images = data.images.to(self._device)
        self._labels = data.labels.to(self._device)
        shape, seed, method = data.input_shape, config.seed, config.method
        self._estimator = NetworkEstimator(model, shape, seed, method)
        _check_logits(model, pixels(self._images[:1]), self._labels)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._forward = torch.compile(model) if config.compile else model
        self._optimizers = make_optimizers(config, trained)
        self._trained = trained
        self._average: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self._average = AveragedModel(model, multi_avg_fn=average)
        self._generator = torch.Generator().manual_seed(seed)
        self._smooth: HeadEstimator | None = None
        if config.needs_curvature:
            self._smooth = HeadEstimator(model, shape, seed, method)
        with torch.no_grad():  # from a random start to usable estimates
            estimate = self._estimator(iterations=30)
            if self._smooth is not None:
                self._smooth(estimate, iterations=30)
        arguments = inspect.signature(LOSSES.get(config.loss, F.cross_entropy)).parameters
        own = {"temperature": config.temperature, "trade_off": config.trade_off}
        self._loss_arguments = {name: value for name, value in own.items() if name in arguments}
        self._clock = Clock(config.epochs * self.steps_per_epoch, config.max_minutes)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches; a last incomplete one counts."""
        return math.ceil(len(self._labels) / self.config.batch_size)

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the time is over after one at least."""
        return self.epoch > 0 and self._clock.done(self.epoch * self.steps_per_epoch) >= 1.0

    @property
    def result(self) -> nn.Module:
        """The trained network: the model, or the average of its weights."""
        return self.model if self._average is None else self._average.module

    def run_epoch(self, on_step: Callable[[EpochMetrics], None] | None = None) -> EpochMetrics:
        """Train for one epoch, or until the time is over.

        Args:
            on_step: called after each step with the means so far.

        Raises:
            TrainingDiverged: the loss is NaN or infinite; the step is not taken.
        """
        self.model.train()
        order = torch.randperm(len(self._labels), generator=self._generator).to(self._device)
        sums = torch.zeros(4, dtype=torch.float64)
        seen = 0
        metrics = EpochMetrics(self.epoch, math.nan, 0.0, 0.0, 0.0)
        for index, chosen in enumerate(order.split(self.config.batch_size)):
            done = self._clock.done(self.epoch * self.steps_per_epoch + index)
            if done >= 1.0 and seen:
                break
            with parametrize.cached():  # weights that are computed from others, once a step
                found = self._step(chosen, done)
            sums += torch.tensor(found, dtype=torch.float64) * len(chosen)
            seen += len(chosen)
            loss, clean, safe, lipschitz = (sums / seen).tolist()
            seconds = self._clock.seconds
            metrics = EpochMetrics(self.epoch, loss, clean, safe, lipschitz, seconds)
            if on_step is not None:
                on_step(metrics)
        self.epoch += 1
        return metrics

    def _step(self, chosen: Tensor, done: float) -> tuple[float, float, float, float]:
        """Make one step at fraction ``done`` of the run; return the batch's metrics."""
        config = self.config
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, done)
        epsilon = budget(config, done)

        x, labels = pixels(self._images[chosen]), self._labels[chosen]
        for augmentation in self._augment:
            x = augmentation(x, self._generator)
        if config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        features = self._features(x)
        logits = self._logits(features)
        if not isinstance(logits, Tensor):
            raise UnsupportedModel("in training mode, too, the model must return one tensor")
        estimate = self._estimator()
        curvature, scale = None, None
        if self._smooth is not None:
            curvature, scale = self._smooth(estimate)
        if config.loss in LOSSES:
            bounds = estimate.margin_lipschitz()
            own = self._loss_arguments
            loss = LOSSES[config.loss](logits, labels, bounds, epsilon, **own)
            worst = logits + config.epsilon * bounds.to(logits.dtype)[labels]
        else:
            assert curvature is not None
            assert scale is not None
            radius = epsilon * scale.to(logits.dtype)
            worst, loss = self._second_order(features, logits, labels, curvature, radius)
        lipschitz = estimate.lipschitz()
        if config.lipschitz_penalty:
            loss = loss + config.lipschitz_penalty * estimate.layers.sum()
        if config.log_lipschitz_penalty:
            loss = loss + config.log_lipschitz_penalty * lipschitz.log()
        if config.curvature_penalty and curvature is not None:
            own_class = F.one_hot(labels, logits.shape[1]).bool()
            runner_up = logits.detach().masked_fill(own_class, -torch.inf).argmax(dim=1)
            loss = loss + config.curvature_penalty * curvature[labels, runner_up].mean()
        self._update(loss)

        with torch.no_grad():
            right = logits.argmax(dim=1) == labels
            safe = right & (worst.argmax(dim=1) == labels)
            return (
                loss.item(),
                right.double().mean().item(),
                safe.double().mean().item(),
                lipschitz.item(),
            )

    def _update(self, loss: Tensor) -> None:
        """Change the weights by the gradient of the loss."""
        if not bool(torch.isfinite(loss)):
            raise TrainingDiverged(
                f"the loss became {loss.item()} in epoch {self.epoch + 1}; try a smaller --lr"
            )
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._trained, self.config.clip_norm or math.inf)
        if not bool(torch.isfinite(norm)):
            raise TrainingDiverged(
                f"the gradient became {norm.item()} in epoch {self.epoch + 1}; try a smaller --lr"
            )
        for optimizer in self._optimizers:
            optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)

    def _features(self, x: Tensor) -> Tensor:
        """What enters the part of the network that attacks are about: inputs, or features."""
        if self.config.loss not in SECOND_ORDER_LOSSES:
            return x
        assert self._smooth is not None
        if self._smooth.backbone is None:
            return x.requires_grad_()
        return cast(Tensor, self._computed(self._smooth.backbone, x))

    def _logits(self, features: Tensor) -> Any:
        """The network's result for what `_features` returned."""
        attacked = self.config.loss in SECOND_ORDER_LOSSES
        if attacked and self._smooth is not None and self._smooth.head is not self.model:
            return self._computed(self._smooth.head, features)
        return self._computed(self._forward, features)

    def _computed(self, module: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A module's result, in float32 whatever it is computed in."""
        if self.config.precision == "float32":
            return module(x)
        with torch.autocast(self._device.type, torch.bfloat16):
            result = module(x)
        return result.float() if isinstance(result, Tensor) else result

    def _second_order(
        self, x: Tensor, logits: Tensor, labels: Tensor, curvature: Tensor, epsilon: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the worst logits that are certified in a ball of features, and the loss."""
        config = self.config
        attacked_classes = 1 if config.loss == "crt" else config.attack_classes
        classes = min(attacked_classes, logits.shape[1] - 1)
        found = dual_points(
            self._logits,
            x,
            logits,
            labels,
            curvature,
            epsilon,
            classes=classes,
            steps=config.attack_steps,
            within_reach=config.loss == "dual-emma",
        )
        x = x.detach() if x.is_leaf else x  # no gradient of inputs, but of features
        if config.loss == "crt":
            attacked = self._logits(found.moved(x, epsilon)[:, 0])
            return attacked, F.cross_entropy(attacked, labels)
        worst = worst_logits(self._logits, x, logits, labels, curvature, epsilon, found)
        loss = F.cross_entropy(worst / config.temperature, labels)
        short = (found.shares < 1.0).any(dim=1, keepdim=True)  # of the budget: not certified
        own = F.one_hot(labels, logits.shape[1]).bool()
        return worst.masked_fill(own & short, -torch.inf), loss

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on as if nothing had happened."""
        on_cuda = self._device.type == "cuda"
        return {
            "epoch": self.epoch,
            "seconds": self._clock.seconds,
            "model": self.model.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "estimator": self._estimator.state_dict(),
            "smooth": None if self._smooth is None else self._smooth.get_extra_state(),
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "generator": self._generator.get_state(),
            "torch_generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(self._device) if on_cuda else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue a run from what `state_dict` returned."""
        self.model.load_state_dict(state["model"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._estimator.load_state_dict(state["estimator"])
        if self._smooth is not None:
            self._smooth.set_extra_state(state["smooth"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        if state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], self._device)
        self.epoch = state["epoch"]
        self._clock.restart(state["seconds"])


def train(
    model: nn.Module,
    data: ImageData,
    config: TrainingConfig,
    *,
    augment: Sequence[Augmentation] = (),
) -> list[EpochMetrics]:
    """Train ``model`` in place and return the metrics of each epoch; see `Trainer`."""
    trainer = Trainer(model, data, config, augment)
    metrics = []
    while not trainer.finished:
        metrics.append(trainer.run_epoch())
    if trainer.result is not model:
        model.load_state_dict(trainer.result.state_dict())
    return metrics


def _check_logits(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Refuse a model that could be traced, but whose logits are not for these labels."""
    mode = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits: Tensor = model(x)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the model does not take images as {x.dtype}: {reason}") from error
    finally:
        model.train(mode)
    if logits.ndim != 2:
        raise UnsupportedModel(f"expected logits (N, C), got shape {tuple(logits.shape)}")
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"the model has {logits.shape[1]} classes, the data has a label {int(labels.max())}"
        )
