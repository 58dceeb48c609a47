"""Plain PyTorch classifiers of the certified-robustness literature.

Ordinary ``nn.Module``s that know nothing of certificates. `build` makes one by name.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from models.activations import ACTIVATIONS, MaxMin, make_activation
from models.block_reflector import BlockReflectorConv2d
from models.convnets import conv_2c2f, conv_4c3f, convnet
from models.liresnet import liresnet
from models.mlp import mlp
from models.normalize import Normalize
from models.parametrizations import (
    AlmostOrthogonal,
    IdentityPlus,
    Orthonormal,
    UnitRows,
    parametrized,
)
from models.resnet import BasicBlock, resnet, resnet18
from models.sll import SLLConv2d

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    **{
        f"{depth}x1024": partial(mlp, hidden=(1024,) * (depth - 1), activation="softplus")
        for depth in (2, 3, 4)
    },
    **{f"conv{depth}": partial(convnet, depth=depth) for depth in (2, 3, 4)},
    "2c2f": conv_2c2f,
    "4c3f": conv_4c3f,
    "liresnet": liresnet,
    "resnet18": resnet18,
    "resnet20": partial(resnet, depth=20),
    "resnet32": partial(resnet, depth=32),
    "resnet56": partial(resnet, depth=56),
}


def build(name: str, **hyperparameters: Any) -> nn.Module:
    """Build a model by name, with fresh random weights from torch's global generator.

    Args:
        name: a key of `MODELS`.
        **hyperparameters: keyword arguments of the model's function.

    Raises:
        ValueError: an unknown name (the message lists all) or hyperparameter, or values that do
            not fit together.

    Example:
        >>> build("mlp", hidden=(8,), num_classes=3)[-1]
        Linear(in_features=8, out_features=3, bias=True)
        >>> build("resnet17")
        Traceback (most recent call last):
        ...
        ValueError: expected model to be one of mlp, 2x1024, 3x1024, 4x1024, conv2, conv3, conv4, \
2c2f, 4c3f, liresnet, resnet18, resnet20, resnet32, resnet56, got 'resnet17'
    """
    if name not in MODELS:
        raise ValueError(f"expected model to be one of {', '.join(MODELS)}, got {name!r}")
    known = inspect.signature(MODELS[name]).parameters
    unknown = sorted(set(hyperparameters) - set(known))
    if unknown:
        raise ValueError(
            f"model {name!r} has no hyperparameter {', '.join(unknown)}; it has {', '.join(known)}"
        )
    return MODELS[name](**hyperparameters)


__all__ = [
    "ACTIVATIONS",
    "MODELS",
    "AlmostOrthogonal",
    "BasicBlock",
    "BlockReflectorConv2d",
    "IdentityPlus",
    "MaxMin",
    "Normalize",
    "Orthonormal",
    "SLLConv2d",
    "UnitRows",
    "build",
    "conv_2c2f",
    "conv_4c3f",
    "convnet",
    "liresnet",
    "make_activation",
    "mlp",
    "parametrized",
    "resnet",
    "resnet18",
]
