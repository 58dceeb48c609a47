"""The copy of a network that is certified."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from certify.folding import any_folded, copy_with_plain_weights, refuse_other_results
from certify.signal import UnsupportedModel
from certify.tracing import refuse_what_tracing_misses


def exact_copy(model: nn.Module, input_shape: Sequence[int]) -> nn.Module:
    """Copy a model into float64, in evaluation mode, without gradients.

    Args:
        model: any module.
        input_shape: shape of one sample.

    Raises:
        UnsupportedModel: a model that cannot be copied, or does what a graph does not show.
        ValueError: NaN or infinite parameters.
    """
    original, model = model, copy_with_plain_weights(model)
    refuse_what_tracing_misses(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_complex() or tensor.is_meta:
            raise UnsupportedModel(f"{name!r} is complex or has no data")
        if not bool(torch.isfinite(tensor.detach()).all()):
            raise ValueError(f"expected finite parameters, got NaN or infinity in {name!r}")
    exact = model.to(torch.float64).requires_grad_(False)
    if any_folded(original):
        refuse_other_results(original, exact, input_shape)
    return exact
