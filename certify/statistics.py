"""Batch normalisation in training: variances that the bounds' gradients follow.

A bound of a network in evaluation mode divides by the running deviations. Where they are taken as
constants, its gradient asks for smaller weights in front of a normalisation, which changes neither
what the network computes in training nor, once the running variances have followed, the bound: the
weights vanish, and training with them. The running variance follows the batch's, so that its
relative change is taken to be that of the batch's variance, which depends on all weights before it.
Its value stays what it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

_NOTED: ContextVar[dict[nn.Module, Tensor] | None] = ContextVar("noted", default=None)


def is_normalised(model: nn.Module) -> bool:
    """Whether there is batch normalisation in a model."""
    return any(isinstance(module, _BatchNorm) for module in model.modules())


@contextmanager
def followed(model: nn.Module) -> Iterator[None]:
    """Within this, bounds follow the variances of the forward passes that are made within it.

    Args:
        model: what is trained, as modules; nothing is noted of one that is compiled.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    noted: dict[nn.Module, Tensor] = {}

    def note(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        if layer.training and torch.is_grad_enabled() and layer not in noted:
            noted[layer] = x.float().var((0, *range(2, x.ndim)), unbiased=False)

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    token = _NOTED.set(noted)
    try:
        yield
    finally:
        _NOTED.reset(token)
        for hook in hooks:
            hook.remove()


def running_variance(layer: Any) -> Tensor | None:
    """The running variance of a normalisation, with the gradient of `followed`, if within that."""
    variance: Tensor | None = getattr(layer, "running_var", None)
    batch = (_NOTED.get() or {}).get(layer)
    if variance is None or batch is None:
        return variance
    known = batch.detach()
    relative = 1.0 + (batch - known) / (known + layer.eps)  # ones, with a gradient
    result: Tensor = variance * relative.to(variance.dtype)
    return result
