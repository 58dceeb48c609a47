"""The optimizer, and how learning rate and budget change while a network is trained."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from certify.muon import Muon
from certify.training_config import TrainingConfig


def make_optimizers(
    config: TrainingConfig, parameters: Sequence[nn.Parameter]
) -> list[torch.optim.Optimizer]:
    """Return the optimizer that ``config`` names; with ``"muon"`` NAdam beside it.

    Muon is for the kernels of convolutions: for orthogonal and normalised matrices, whose lengths
    mean nothing, NAdam certified more.
    """
    betas = (config.momentum, 0.999)
    decay = config.weight_decay
    if config.optimizer == "muon":
        kernels = [parameter for parameter in parameters if parameter.ndim > 2]
        others = [parameter for parameter in parameters if parameter.ndim < 3]
        found: list[torch.optim.Optimizer] = []
        if kernels:
            found.append(Muon(kernels, config.lr, config.momentum, decay))
        if others:
            found.append(torch.optim.NAdam(others, config.lr))
        return found
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(
            parameters,
            config.lr,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=decay,
        )
        return [sgd]
    if config.optimizer == "nadam":
        nadam = torch.optim.NAdam(
            parameters, config.lr, betas, weight_decay=decay, decoupled_weight_decay=True
        )
        return [nadam]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return [kind(parameters, config.lr, betas, weight_decay=decay)]


class Clock:
    """Tells which fraction of a training is done: of its steps, or of its time if that ends first.

    Args:
        steps: of the whole training.
        minutes: that it may take; ``None`` for as long as it does.
    """

    def __init__(self, steps: int, minutes: float | None = None) -> None:
        self._steps = steps
        self._minutes = minutes
        self._before = 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        """Time spent, in sessions before a resumption too."""
        return self._before + time.monotonic() - self._start

    def restart(self, seconds: float) -> None:
        """Go on after so much time spent before."""
        self._before = seconds
        self._start = time.monotonic()

    def done(self, step: int) -> float:
        """Fraction of the training that lies before a step; one or more where it is over.

        Steps and time both pass evenly, so that the schedules end as planned in either case.
        """
        by_steps = step / self._steps
        if self._minutes is None:
            return by_steps
        return max(by_steps, self.seconds / (60.0 * self._minutes))


def learning_rate(config: TrainingConfig, done: float) -> float:
    """Learning rate after a fraction of the training: a linear rise, then a fall to zero."""
    done = min(done, 1.0)
    if done < config.warm_up:
        return config.lr * (done + 0.01) / (config.warm_up + 0.01)
    rest = (done - config.warm_up) / (1.0 - config.warm_up) if config.warm_up < 1 else 1.0
    if config.schedule == "linear":
        return config.lr * (1.0 - rest)
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1.0 + math.cos(math.pi * rest))


def budget(config: TrainingConfig, done: float) -> float:
    """Budget of the loss after a fraction of the training."""
    risen = min(1.0, done / config.ramp) if config.ramp else 1.0
    return config.epsilon_start + (config.epsilon - config.epsilon_start) * risen
