"""Training with bound-based losses and penalties."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from certify.augmentation import Augmentation
from certify.data import ImageData, pixels
from certify.objective import Objective, Outcome
from certify.optimisation import Clock, budget, learning_rate, make_optimizers
from certify.ranks import ALONE, Ranks
from certify.signal import UnsupportedModel
from certify.statistics import is_normalised
from certify.step_graph import StepGraph
from certify.training_config import TrainingConfig
from certify.training_precision import chosen_precision


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


@dataclass
class _Part:
    """An epoch that is under way.

    Attributes:
        order: of the images.
        step: the next one.
        sums: of four metrics, over the images that were seen.
        seen: their number.
    """

    order: Tensor
    step: int = 0
    sums: Tensor = field(default_factory=lambda: torch.zeros(4, dtype=torch.float64))
    seen: int = 0

    def metrics(self, epoch: int, seconds: float) -> EpochMetrics:
        """The means so far."""
        loss, clean, safe, lipschitz = (self.sums / self.seen).tolist()
        return EpochMetrics(epoch, loss, clean, safe, lipschitz, seconds)


class Trainer:
    """Everything that a training run carries from step to step.

    Args:
        model: classifier with input ``(N, *input_shape)``; trained in place on its device.
        data: training images.
        config: how to train.
        augment: applied to each batch in turn.
        ranks: processes that train the same network on the same data, each with a share of every
            batch; ``run_epoch`` and ``load_state_dict`` are calls that all have to make.

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
        ranks: Ranks = ALONE,
    ) -> None:
        if not isinstance(data, ImageData):
            raise ValueError(
                f"expected ImageData(images, labels, classes), got {type(data).__name__}"
            )
        self.model = model
        self.config = config
        self.epoch = 0
        self._part: _Part | None = None
        self._over = False
        self._augment = augment
        self._ranks = ranks
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise UnsupportedModel("the model has no parameters to train")
        self._device = trained[0].device
        self._images = data.images.to(self._device)
        self._labels = data.labels.to(self._device)
        self._objective = Objective(model, data.input_shape, config)
        slow = chosen_precision(config.precision, self._device) == "float32"
        (any_slow,) = ranks.largest(float(slow))
        self._objective.precision = "float32" if any_slow else "bfloat16"
        _check_logits(model, pixels(self._images[:1]), self._labels)
        if config.channels_last:
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._outcome: Callable[[Tensor, Tensor, float | Tensor], Outcome] = self._objective
        if ranks.count > 1:
            unused = _any_unused(model, pixels(self._images[:8]))
            self._outcome = DistributedDataParallel(
                _Whole(model, self._objective),
                find_unused_parameters=unused,
                gradient_as_bucket_view=True,
                process_group=None if ranks.own_gpus else distributed.new_group(backend="gloo"),
            )
        self._optimizers = make_optimizers(config, trained)
        self._trained = trained
        self._graph = self._new_graph()
        self._average: AveragedModel | None = None
        if config.ema:
            average = get_ema_multi_avg_fn(config.ema)
            self._average = AveragedModel(model, multi_avg_fn=average)
        self._generator = torch.Generator().manual_seed(config.seed)
        self._clock = Clock(config.epochs * self.steps_per_epoch, config.max_minutes)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches; a last incomplete one counts."""
        return math.ceil(len(self._labels) / self.config.batch_size)

    @property
    def steps(self) -> int:
        """Number of steps that are done."""
        return self.epoch * self.steps_per_epoch + (self._part.step if self._part else 0)

    @property
    def precision(self) -> str:
        """In which the network's products are computed, ``"float32"`` or ``"bfloat16"``."""
        return self._objective.precision

    @property
    def finished(self) -> bool:
        """Whether all epochs are done, or the time is over after one at least."""
        over = self.epoch > 0 and self._over and self._part is None
        return self.epoch >= self.config.epochs or over

    @property
    def result(self) -> nn.Module:
        """The trained network: the model, or the average of its weights."""
        return self.model if self._average is None else self._average.module

    def run_epoch(
        self,
        on_step: Callable[[EpochMetrics], None] | None = None,
        stop: Callable[[], bool] | None = None,
    ) -> EpochMetrics | None:
        """Train for one epoch, or for what is left of one, or until the time is over.

        Args:
            on_step: called after each step with the means so far.
            stop: asked before each step whether to return, with ``None``; the next call, of this
                trainer or of one that has its state, goes on from there.

        Raises:
            TrainingDiverged: the loss is NaN or infinite; the step is not taken.
        """
        self.model.train()
        part = self._part or _Part(torch.randperm(len(self._labels), generator=self._generator))
        self._part = part
        batches = part.order.to(self._device).split(self.config.batch_size)
        metrics = EpochMetrics(self.epoch, math.nan, 0.0, 0.0, 0.0)
        for index in range(part.step, len(batches)):
            done, stopped = self._agree(self.epoch * self.steps_per_epoch + index, stop)
            if done >= 1.0 and part.seen:
                break
            if stopped:
                return None
            chosen = batches[index]
            if not self._ranks.first:  # whose own draws shall not be those of the first
                torch.manual_seed(hash((self.config.seed, self.epoch, index, self._ranks.rank)))
            found = self._step(chosen, done)
            part.step = index + 1
            part.sums += torch.tensor(found, dtype=torch.float64) * len(chosen)
            part.seen += len(chosen)
            metrics = part.metrics(self.epoch, self._clock.seconds)
            if on_step is not None:
                on_step(metrics)
        if part.seen and math.isnan(metrics.loss):  # stopped behind the last step
            metrics = part.metrics(self.epoch, self._clock.seconds)
        self.epoch += 1
        self._part = None
        self._agree(self.epoch * self.steps_per_epoch)
        return metrics

    def _agree(self, step: int, stop: Callable[[], bool] | None = None) -> tuple[float, bool]:
        """Which fraction is done before a step, and whether any process is to stop."""
        stopped = stop is not None and stop()
        done, any_stopped = self._ranks.largest(self._clock.done(step), float(stopped))
        self._over = done >= 1.0
        return done, any_stopped > 0

    def _step(self, chosen: Tensor, done: float) -> list[float]:
        """Make one step at fraction ``done`` of the run; return the batch's four metrics."""
        config = self.config
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, done)
        epsilon = budget(config, done)

        x, labels, share = self._batch(chosen)
        if self._graph is not None:
            means = self._graph(x, labels, epsilon)
        else:  # the gradients of several processes are averaged
            means = self._gradients(x, labels, epsilon, share * self._ranks.count)
        # Here, and nowhere else in a step, a device is waited for.
        *metrics, size = self._ranks.total(means * share).tolist()
        for name, value in (("loss", metrics[0]), ("gradient", size)):
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"the {name} became {value} in epoch {self.epoch + 1}; try a smaller --lr"
                )
        self._update()
        return metrics

    def _new_graph(self) -> StepGraph | None:
        """A graph to be captured, where steps can be; see `TrainingConfig.cuda_graph`."""
        on_one_gpu = self._device.type == "cuda" and self._ranks.count == 1
        waits = self.config.loss == "crm" or is_normalised(self.model)
        if not (self.config.cuda_graph and on_one_gpu) or waits:
            return None
        return StepGraph(self._gradients, self._trained, self.config.batch_size)

    def _gradients(
        self, x: Tensor, labels: Tensor, epsilon: float | Tensor, weight: float = 1.0
    ) -> Tensor:
        """Leave gradients of the weighted loss; return four metrics and the gradients' norm."""
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)
        with parametrize.cached():  # weights that are computed from others, once a step
            found = self._outcome(x, labels, epsilon)
            (found.loss * weight).backward()
        norm = nn.utils.clip_grad_norm_(self._trained, self.config.clip_norm or math.inf)
        with torch.no_grad():
            right = found.logits.argmax(dim=1) == labels
            safe = right & (found.worst.argmax(dim=1) == labels)
            means = found.loss, right.double().mean(), safe.double().mean(), found.lipschitz, norm
            return torch.stack([mean.double() for mean in means])

    def _batch(self, chosen: Tensor) -> tuple[Tensor, Tensor, float]:
        """Own images and labels of a batch, and which share of it they are."""
        x, labels = pixels(self._images[chosen]), self._labels[chosen]
        for augmentation in self._augment:  # of the whole batch, so that all draw the same
            x = augmentation(x, self._generator)
        own = labels[self._ranks.own]
        share = len(own) / len(labels)
        if share:
            x, labels = x[self._ranks.own], own
        else:  # a batch with fewer images than processes
            x, labels = x[:1], labels[:1]
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, labels, share

    def _update(self) -> None:
        """Change the weights by their gradients."""
        for optimizer in self._optimizers:
            optimizer.step()
        if self._average is not None:
            self._average.update_parameters(self.model)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on as if nothing had happened."""
        on_cuda = self._device.type == "cuda"
        return {
            "epoch": self.epoch,
            "part": None if self._part is None else asdict(self._part),
            "seconds": self._clock.seconds,
            "model": self.model.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "objective": self._objective.state_dict(),
            "precision": self.precision,
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
        self._objective.load_state_dict(state["objective"])
        self._objective.precision = state.get("precision", self.precision)
        self._graph = self._new_graph()
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self._generator.set_state(state["generator"])
        torch.set_rng_state(state["torch_generator"])
        if state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], self._device)
        self.epoch = state["epoch"]
        self._part = None if state.get("part") is None else _Part(**state["part"])
        self._clock.restart(state["seconds"])
        self._agree(self.epoch * self.steps_per_epoch)


class _Whole(nn.Module):
    """A loss together with the weights that it depends on, for `DistributedDataParallel`."""

    def __init__(self, model: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self._objective = objective

    def forward(self, x: Tensor, labels: Tensor, epsilon: float | Tensor) -> Outcome:
        """The outcome; only its loss has a gradient."""
        found = self._objective(x, labels, epsilon)
        rest = found.logits.detach(), found.worst.detach(), found.lipschitz.detach()
        return Outcome(found.loss, *rest)


def _any_unused(model: nn.Module, x: Tensor) -> bool:
    """Whether some weights have no part in the logits of inputs, in training or in evaluation."""
    twin = copy.deepcopy(model)
    trained = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    with torch.random.fork_rng():
        for mode in (True, False):
            logits = twin.train(mode)(x)
            gradients = torch.autograd.grad(logits.sum(), trained, allow_unused=True)
            if any(gradient is None for gradient in gradients):
                return True
    return False


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
        done = trainer.run_epoch()
        assert done is not None  # nothing stops it
        metrics.append(done)
    if trainer.result is not model:
        model.load_state_dict(trainer.result.state_dict())
    return metrics


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    mode = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(mode)


def _check_logits(model: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Refuse a model that could be traced, but whose logits are not for these labels."""
    try:
        with _evaluating(model), torch.no_grad():
            logits: Tensor = model(x)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"the model does not take images as {x.dtype}: {reason}") from error
    if logits.ndim != 2:
        raise UnsupportedModel(f"expected logits (N, C), got shape {tuple(logits.shape)}")
    if int(labels.max()) >= logits.shape[1]:
        raise ValueError(
            f"the model has {logits.shape[1]} classes, the data has a label {int(labels.max())}"
        )
