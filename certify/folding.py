"""Copies of models in which weights that are computed from others are plain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from certify.signal import UnsupportedModel
from certify.tracing import agree, example_of, kind_of, without_tf32


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
        _fold_hooks(module)
    return copied


def any_folded(model: nn.Module) -> bool:
    """Whether some weights of a model are computed from others, and plain in its copy."""
    return any(kind_of(m) is not type(m) or _hooked(m) for m in model.modules())


def refuse_other_results(model: nn.Module, copied: nn.Module, input_shape: Sequence[int]) -> None:
    """Refuse a copy in float64 that does not compute what the model does.

    So it is where a weight is random, where another's hook does more than torch's, and where an
    operation depends on the precision that it is made in.

    Raises:
        UnsupportedModel: it differs by more than rounding on an example.
    """
    floating = next((t for t in model.parameters() if t.is_floating_point()), torch.zeros(()))
    example = example_of(input_shape).to(floating)
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad(), without_tf32():
            expected, found = model(example.clone()), copied(example.to(torch.float64))
    except Exception:  # the shape, or anything else, is refused in words elsewhere
        return
    finally:
        for module, mode in training.items():
            module.training = mode
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        return
    # Beyond the range of its dtype: what is certified is the model in float64.
    within = expected.isfinite()
    if found.shape != expected.shape or not agree(
        *(x.to(expected.dtype).masked_fill(~within, 0.0) for x in (found, expected))
    ):
        raise UnsupportedModel(
            "the model gives other results in float64: weights that are computed are not the same "
            "each time, or not what torch computes there, or an operation depends on the precision"
        )


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


def _fold_hooks(module: nn.Module) -> None:
    """Put weights that torch's hooks set in the place of what they are computed from."""
    hooked = _hooked(module)
    if len(hooked) < len(module._forward_pre_hooks):
        return  # with hooks of others among them, which are refused
    for hook in list(module._forward_pre_hooks.values()):
        hook(module, ())
    module._forward_pre_hooks.clear()
    for name in hooked:
        value = getattr(module, name).detach().clone()  # not shared with tied weights
        vars(module).pop(name, None)
        module.register_parameter(name, nn.Parameter(value, requires_grad=False))


def _hooked(module: nn.Module) -> dict[str, Any]:
    """Names of the weights that hooks of torch's own set, with these hooks."""
    found: dict[str, Any] = {}
    hooks: list[Any] = list(module._forward_pre_hooks.values())
    for hook in hooks:
        if type(hook) in (WeightNorm, SpectralNorm):
            found[hook.name] = hook
        elif (
            isinstance(hook, prune.BasePruningMethod)
            and type(hook).__call__ is prune.BasePruningMethod.__call__
        ):
            found[hook._tensor_name] = hook
    return found
