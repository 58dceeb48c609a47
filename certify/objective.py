"""What a training makes small: the loss of a batch, with all bounds that it rests on."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from certify.curvature_estimate import HeadEstimate, HeadEstimator
from certify.dual_training import dual_points, worst_logits
from certify.losses import LOSSES, own_class
from certify.norms import NetworkEstimate, NetworkEstimator
from certify.signal import UnsupportedModel
from certify.statistics import followed, is_normalised
from certify.training_config import SECOND_ORDER_LOSSES, TrainingConfig


@dataclass(frozen=True)
class Outcome:
    """What a batch came to.

    Attributes:
        loss: scalar, with a gradient.
        logits: ``(N, C)``.
        worst: ``(N, C)``, logits that still favour the label where the sample would be certified
            at the whole budget, by estimated norms.
        lipschitz: estimate for the network.
    """

    loss: Tensor
    logits: Tensor
    worst: Tensor
    lipschitz: Tensor


class Objective:
    """The loss that a config names, and its penalties, for a model being trained.

    Args:
        model: in training; the current weights are used at each call.
        input_shape: shape of one sample.
        config: which loss, and its settings.

    Attributes:
        precision: of the network's products, that of ``config`` at first.

    Raises:
        UnsupportedModel: a network that could not be certified afterwards, or not for the loss.
    """

    def __init__(
        self, model: nn.Module, input_shape: tuple[int, ...], config: TrainingConfig
    ) -> None:
        self._model = model
        self._config = config
        self.precision = config.precision
        self._estimator = NetworkEstimator(
            model, input_shape, config.seed, config.method, warm_up=0
        )
        self._smooth: HeadEstimator | None = None
        if config.needs_curvature:
            self._smooth = HeadEstimator(model, input_shape, config.seed, config.method)
        # With a backbone, losses of the second order see it and the head apart.
        apart = self._smooth is not None and self._smooth.backbone is not None
        penalised = config.lipschitz_penalty or config.log_lipschitz_penalty
        self._needs_whole = bool(config.loss in LOSSES or penalised or not apart)
        with torch.no_grad():  # from a random start to usable estimates
            self._estimates(iterations=30)
        self._follows = config.rests_on_bounds and is_normalised(model)
        if self._follows and config.compile:
            raise UnsupportedModel(
                "bounds of batch normalisation cannot be followed in a compiled model; leave "
                "compile out, or the normalisation"
            )
        self._forward: Callable[[Tensor], Any] = torch.compile(model) if config.compile else model
        arguments = inspect.signature(LOSSES.get(config.loss, F.cross_entropy)).parameters
        own = {"temperature": config.temperature, "trade_off": config.trade_off}
        self._loss_arguments = {name: value for name, value in own.items() if name in arguments}

    def __call__(self, x: Tensor, labels: Tensor, epsilon: float | Tensor) -> Outcome:
        """Compute the loss of a batch.

        Args:
            x: ``(N, *input_shape)``.
            labels: ``(N,)``.
            epsilon: budget, now; a number or a tensor ``()``.

        Raises:
            UnsupportedModel: the model does not return a tensor in training mode.
        """
        config = self._config
        with followed(self._model) if self._follows else nullcontext():
            features = self._features(x)
            logits = self._logits(features)
            if not isinstance(logits, Tensor):
                raise UnsupportedModel("in training mode, too, the model must return one tensor")
            whole, smooth = self._estimates()
        if config.loss in LOSSES:
            assert whole is not None
            bounds = whole.margin_lipschitz()
            own = self._loss_arguments
            loss = LOSSES[config.loss](logits, labels, bounds, epsilon, **own)
            worst = logits + config.epsilon * bounds.to(logits.dtype)[labels]
        else:
            assert smooth is not None
            radius = epsilon * smooth.scale.to(logits.dtype)
            worst, loss = self._second_order(features, logits, labels, smooth.curvature, radius)
        if whole is not None:
            if config.lipschitz_penalty:
                loss = loss + config.lipschitz_penalty * whole.layers.sum()
            if config.log_lipschitz_penalty:
                loss = loss + config.log_lipschitz_penalty * whole.lipschitz().log()
        if config.curvature_penalty and smooth is not None:
            at_label = own_class(labels, logits)
            runner_up = logits.detach().masked_fill(at_label, -torch.inf).argmax(dim=1)
            pairs = smooth.curvature[labels, runner_up]
            loss = loss + config.curvature_penalty * pairs.mean()
        found = whole or smooth
        assert found is not None
        lipschitz = found.lipschitz if isinstance(found, HeadEstimate) else found.lipschitz()
        return Outcome(loss, logits, worst, lipschitz)

    def _estimates(self, iterations: int = 1) -> tuple[NetworkEstimate | None, HeadEstimate | None]:
        """Estimates of the whole network and of its smooth part, as far as they are needed."""
        whole = self._estimator(iterations) if self._needs_whole else None
        return whole, None if self._smooth is None else self._smooth(whole, iterations)

    def _features(self, x: Tensor) -> Tensor:
        """What enters the part of the network that attacks are about: inputs, or features."""
        if self._config.loss not in SECOND_ORDER_LOSSES:
            return x
        assert self._smooth is not None
        if self._smooth.backbone is None:
            return x.detach().requires_grad_()
        return cast(Tensor, self._computed(self._smooth.backbone, x))

    def _logits(self, features: Tensor) -> Any:
        """The network's result for what `_features` returned."""
        attacked = self._config.loss in SECOND_ORDER_LOSSES
        if attacked and self._smooth is not None and self._smooth.head is not self._model:
            return self._computed(self._smooth.head, features)
        return self._computed(self._forward, features)

    def _computed(self, module: Callable[[Tensor], Any], x: Tensor) -> Any:
        """A module's result, in float32 whatever it is computed in."""
        if self.precision == "float32":
            return module(x)
        with torch.autocast(x.device.type, torch.bfloat16):
            result = module(x)
        return result.float() if isinstance(result, Tensor) else result

    def _second_order(
        self, x: Tensor, logits: Tensor, labels: Tensor, curvature: Tensor, epsilon: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the worst logits that are certified in a ball of features, and the loss."""
        config = self._config
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
        own = own_class(labels, logits)
        return worst.masked_fill(own & short, -torch.inf), loss

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs beside the model's weights."""
        smooth = None if self._smooth is None else self._smooth.get_extra_state()
        return {"estimator": self._estimator.state_dict(), "smooth": smooth}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self._estimator.load_state_dict(state["estimator"])
        if self._smooth is not None:
            self._smooth.set_extra_state(state["smooth"])
