"""The settings of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

FIRST_ORDER_LOSSES = (
    "margin",
    "emma",
    "gloro",
    "gloro-trades",
    "annealing",
    "crm",
    "cross-entropy",
)
"""Losses that need Lipschitz constants; the keys of `certify.losses.LOSSES`."""

SECOND_ORDER_LOSSES = ("dual", "dual-emma", "crt")
"""Losses that need bounds of second derivatives."""

ALL_LOSSES = (*FIRST_ORDER_LOSSES, *SECOND_ORDER_LOSSES)

OPTIMIZERS = ("adam", "nadam", "adamw", "sgd", "muon")

SCHEDULES = ("cosine", "linear", "constant")

PRECISIONS = ("float32", "bfloat16", "auto")

METHODS = ("fantastic_four", "supremum")
"""Bounds of convolutions that training follows; keys of `certify.norms.PENALTIES`."""

CHOICES: dict[str, tuple[str, ...]] = {
    "loss": ALL_LOSSES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "precision": PRECISIONS,
    "method": METHODS,
}
"""What fields that are names can be."""

_POSITIVE = ("lr", "temperature")
_NOT_NEGATIVE = (
    "epsilon",
    "epsilon_start",
    "trade_off",
    "weight_decay",
    "clip_norm",
    "lipschitz_penalty",
    "log_lipschitz_penalty",
    "curvature_penalty",
)
_FRACTIONS = ("ramp", "warm_up", "momentum", "ema")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; every field has the same name on the command line.

    Attributes:
        epochs: passes over the training images.
        max_minutes: end the training, with all its schedules, after so much time if it has not
            ended by then; ``None`` for no limit. Schedules then follow the clock, so that two runs
            are not alike to the last bit.
        batch_size: images per step.
        optimizer: ``"adam"``, ``"nadam"``, ``"adamw"``, ``"sgd"`` (with Nesterov's momentum) or
            ``"muon"`` (`certify.muon`, for kernels; the rest by NAdam).
        lr: peak learning rate.
        warm_up: fraction of the training over which the learning rate rises.
        schedule: how it falls to zero after that: ``"cosine"``, ``"linear"``, or ``"constant"`` if
            it does not.
        momentum: of the optimizer; the first beta of the Adams.
        weight_decay: decoupled from the gradient but with ``"adam"`` and ``"sgd"``; of kernels
            only with ``"muon"``.
        clip_norm: largest norm of the gradient, beyond which it is scaled down; 0 for none.
        ema: decay by step of an exponential average of the weights, which is what the training
            returns then; 0 for none.
        augment: what is done to images, see `certify.augmentation.augmentations`; ``"auto"`` for
            what suits the data set.
        loss: ``"margin"``, ``"emma"``, ``"gloro"``, ``"gloro-trades"``, ``"annealing"``, ``"crm"``
            (they use ``epsilon`` and the network's Lipschitz constants, see `certify.losses`),
            ``"dual"`` (``epsilon`` and its second derivatives, see `certify.dual_training`),
            ``"dual-emma"`` (likewise, but no farther than the boundary),
            ``"crt"`` (cross-entropy at the dual attack point, for use beside
            ``curvature_penalty``) or ``"cross-entropy"``.
        epsilon: L2 budget of the loss, in units of pixels in [0, 1].
        epsilon_start: where it starts.
        ramp: fraction of the training over which the budget grows from there.
        temperature: what the worst logits are divided by, where a loss has it.
        trade_off: weight of the second term of ``"gloro-trades"`` and ``"crm"``.
        method: which bound of convolutions the training follows, ``"fantastic_four"`` or
            ``"supremum"``; certificates take their own ``--method``.
        attack_classes: for how many other classes of each image ``"dual"`` has attack points.
        attack_steps: gradients for each of them.
        lipschitz_penalty: weight of the sum of the layers' norms (Singla & Feizi 2021).
        log_lipschitz_penalty: weight of the logarithm of the network's Lipschitz constant.
        curvature_penalty: weight of the curvature bound of label against runner-up.
        precision: ``"bfloat16"`` to let the network's products be computed in that, which is
            several times faster where the machine has instructions for it, and far slower where it
            has none; ``"auto"`` for the faster one.
        compile: let `torch.compile` make the network's forward and backward pass.
        cuda_graph: on one GPU, launch all kernels of a step at once: faster where they are small.
            Not with ``"crm"`` or batch normalisation, where values decide what comes next.
        channels_last: store images and features with channels last, which some GPUs prefer.
        hold_out: so many of the last training images are left out, to choose settings on.
        seed: of the weights, the order of images, the augmentation and the power iteration.
    """

    epochs: int = 30
    max_minutes: float | None = None
    batch_size: int = 256
    optimizer: str = "adam"
    lr: float = 2e-3
    warm_up: float = 0.1
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 0.0
    clip_norm: float = 0.0
    ema: float = 0.0
    augment: str = "auto"
    loss: str = "margin"
    epsilon: float = 0.5
    epsilon_start: float = 0.0
    ramp: float = 0.5
    temperature: float = 1.0
    trade_off: float = 1.0
    method: str = "fantastic_four"
    attack_classes: int = 2
    attack_steps: int = 2
    lipschitz_penalty: float = 0.0
    log_lipschitz_penalty: float = 0.0
    curvature_penalty: float = 0.0
    precision: str = "float32"
    compile: bool = False
    cuda_graph: bool = False
    channels_last: bool = False
    hold_out: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("expected at least one epoch and one image per batch")
        for name, known in CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"expected {name} to be one of {', '.join(known)}, got {value!r}")
        if min(self.attack_classes, self.attack_steps) < 1:
            raise ValueError("expected at least one class to attack and one step")
        for name in _FRACTIONS:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        if max(self.momentum, self.ema) == 1:
            raise ValueError("expected momentum and ema below 1")
        if self.max_minutes is not None and not 0 < self.max_minutes < math.inf:
            raise ValueError(f"expected max_minutes > 0, got {self.max_minutes}")
        for name in _POSITIVE:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in _NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")

    @property
    def rests_on_bounds(self) -> bool:
        """Whether weights are changed by bounds, and not by the plain cross-entropy alone."""
        penalties = self.lipschitz_penalty, self.log_lipschitz_penalty, self.curvature_penalty
        return self.loss != "cross-entropy" or any(penalties)

    @property
    def needs_curvature(self) -> bool:
        """Whether second derivatives have to be estimated."""
        return self.loss in SECOND_ORDER_LOSSES or self.curvature_penalty > 0
