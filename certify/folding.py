"""Copies of models in which weights that are computed from others are plain."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from certify.signal import UnsupportedModel
from certify.tracing import kind_of


def copy_with_plain_weights(model: nn.Module) -> nn.Module:
    """Copy a model; parametrised weights become parameters.

    In the copy a weight is what the model computes with in evaluation, in the model's own dtype:
    with any parametrisation of ``torch.nn.utils.parametrize``, and with the older functions of
    ``torch.nn.utils`` (``weight_norm``, ``spectral_norm``, ``prune``) that set it in a hook before
    each forward.

    Raises:
        UnsupportedModel: a model that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        for name in _hooked(module):
            value = vars(module).get(name)  # a result of the last forward, with its history
            if isinstance(value, Tensor):
                memo[id(value)] = value.detach().clone()
    try:
        copied = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedModel(
            f"{type(model).__name__} cannot be copied; does it keep tensors of a forward pass? "
            "Delete or detach them"
        ) from error
    copied.eval()
    for module in list(copied.modules()):
        _fold_parametrizations(module)
        for name, hook in _hooked(module).items():
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, name)
            else:
                prune.remove(module, name)
    return copied


def _fold_parametrizations(module: nn.Module) -> None:
    """Put computed weights in the place of their parametrisations.

    The class that ``parametrize`` made for the module is shared by copies, so that
    ``remove_parametrizations`` would take the weights of the original away.
    """
    original = kind_of(module)
    if original is type(module):
        return
    parametrizations = module._modules.pop("parametrizations")
    assert isinstance(parametrizations, nn.ModuleDict)
    values = {name: parametrizations[name]().detach() for name in parametrizations}
    module.__class__ = original
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _hooked(module: nn.Module) -> dict[str, Any]:
    """Names of the weights that hooks of torch's own set, with these hooks."""
    found: dict[str, Any] = {}
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    for hook in hooks:
        if type(hook) in (WeightNorm, SpectralNorm):
            found[hook.name] = hook
        elif isinstance(hook, prune.BasePruningMethod):
            found[hook._tensor_name] = hook
    return found
