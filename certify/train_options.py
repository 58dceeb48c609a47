"""The options of ``certify train`` that are fields of `certify.TrainingConfig`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import click

from certify.option_types import Epsilon
from certify.training_config import CHOICES, TrainingConfig

_HELP = {
    "epochs": "Passes over the training images.",
    "max_minutes": "End early and cleanly, with all schedules, after so much time.",
    "batch_size": "Images per step.",
    "lr": "Peak learning rate.",
    "warm_up": "Part of the training in which the learning rate rises.",
    "schedule": "How it falls afterwards.",
    "momentum": "Of the optimizer; the first beta of the Adams.",
    "clip_norm": "Largest norm of the gradient; 0 for any.",
    "ema": "Decay of an average of the weights; 0 for none.",
    "augment": "Such as shift:4,flip,randaugment:2:9, none, or auto.",
    "loss": "The last three are for smooth networks or heads.",
    "epsilon": "Budget of the loss.",
    "epsilon_start": "Where it starts.",
    "ramp": "Part of the training in which it grows.",
    "temperature": "Divides the worst logits.",
    "trade_off": "Weight of the second term of gloro-trades and crm.",
    "method": "Bound of convolutions that training follows.",
    "attack_classes": "Other classes that dual attacks.",
    "attack_steps": "Gradients for each attack point.",
    "lipschitz_penalty": "Weight of the sum of layer norms.",
    "log_lipschitz_penalty": "Weight of the log of the network's Lipschitz constant.",
    "curvature_penalty": "Weight of the curvature bound of label against runner-up.",
    "precision": "Of the network's products in training.",
    "compile": "Use torch.compile.",
    "cuda_graph": "On one GPU, launch all kernels of a step at once.",
    "channels_last": "Memory format.",
    "hold_out": "Leave out so many of the last training images.",
    "seed": "Of weights, order, augmentation and power iteration.",
}

OPTION_NAMES = {"epsilon": "eps", "epsilon_start": "eps-start"}
"""Of fields whose option is not called as they are."""


def option_name(field: str) -> str:
    """``--eps`` for ``epsilon``, and so on."""
    return "--" + OPTION_NAMES.get(field, field.replace("_", "-"))


def option_value(field: str, value: Any) -> str:
    """A setting as its option takes it; a budget as a part of 255 where that is shorter.

    Example:
        >>> option_value("epsilon", 0.5), option_value("epsilon", 36 / 255)
        ('0.5', '36/255')
    """
    plain = str(value)
    if not field.startswith("epsilon") or len(plain) < len("100/255"):
        return plain
    parts = round(255.0 * value)
    return f"{parts}/255" if parts / 255.0 == value else plain


def training_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for each field; what is not given arrives as ``None``."""
    for field in reversed(fields(TrainingConfig)):
        name, about = field.name, _HELP.get(field.name)
        kind: Any = {"int": int, "float": float}.get(str(field.type).split(" ")[0], str)
        if name in CHOICES:
            kind = click.Choice(CHOICES[name])
        if name.startswith("epsilon"):
            kind = Epsilon()
        declaration = [option_name(name), name]
        if field.type == "bool":
            declaration[0] += "/--no-" + option_name(name).removeprefix("--")
            kind = None
        command = click.option(*declaration, type=kind, default=None, help=about)(command)
    return command
