"""The settings of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

from certify.losses import LOSSES

SECOND_ORDER_LOSSES = ("dual", "crt")
"""Losses that need bounds of second derivatives."""

ALL_LOSSES = (*LOSSES, *SECOND_ORDER_LOSSES)

PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; every field has the same name on the command line.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step.
        lr: peak learning rate of Adam; it warms up over a tenth of the steps and falls to zero
            along a cosine.
        loss: ``"margin"`` (uses ``epsilon`` and the network's Lipschitz constants), ``"dual"``
            (``epsilon`` and its second derivatives, see `certify.dual_training`), ``"crt"``
            (cross-entropy at the dual attack point, for use beside ``curvature_penalty``) or
            ``"cross-entropy"``.
        epsilon: L2 budget of the loss, in units of pixels in [0, 1].
        ramp: fraction of the training over which the budget grows from zero.
        temperature: what the margins of ``"dual"`` are divided by.
        attack_classes: for how many other classes of each image ``"dual"`` has attack points.
        attack_steps: gradients for each of them.
        lipschitz_penalty: weight of the sum of the layers' norms (Singla & Feizi 2021).
        log_lipschitz_penalty: weight of the logarithm of the network's Lipschitz constant.
        curvature_penalty: weight of the curvature bound of label against runner-up.
        precision: ``"bfloat16"`` to let the network's products be computed in that, which is
            several times faster where the machine has instructions for it.
        hold_out: so many of the last training images are left out, to choose settings on.
        seed: of the weights, the order of images, the augmentation and the power iteration.
    """

    epochs: int = 30
    batch_size: int = 256
    lr: float = 2e-3
    loss: str = "margin"
    epsilon: float = 0.5
    ramp: float = 0.5
    temperature: float = 1.0
    attack_classes: int = 2
    attack_steps: int = 2
    lipschitz_penalty: float = 0.0
    log_lipschitz_penalty: float = 0.0
    curvature_penalty: float = 0.0
    precision: str = "float32"
    hold_out: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise ValueError("expected at least one epoch and one image per batch")
        if self.loss not in ALL_LOSSES:
            known = ", ".join(ALL_LOSSES)
            raise ValueError(f"expected loss to be one of {known}, got {self.loss!r}")
        if self.precision not in PRECISIONS:
            known = ", ".join(PRECISIONS)
            raise ValueError(f"expected precision to be one of {known}, got {self.precision!r}")
        if min(self.attack_classes, self.attack_steps) < 1:
            raise ValueError("expected at least one class to attack and one step")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"expected ramp between 0 and 1, got {self.ramp}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} > 0, got {getattr(self, name)}")
        for name in (
            "epsilon",
            "lipschitz_penalty",
            "log_lipschitz_penalty",
            "curvature_penalty",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} >= 0, got {getattr(self, name)}")

    @property
    def needs_curvature(self) -> bool:
        """Whether second derivatives have to be estimated."""
        return self.loss in SECOND_ORDER_LOSSES or self.curvature_penalty > 0
