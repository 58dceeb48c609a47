"""What estimates of the norms of a network's kernels have in common: buckets and warm starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class KernelEstimates(nn.Module, ABC):
    """Estimates for many kernels, those of equal shape stacked, going on from call to call.

    Args:
        shapes: for each kernel ``(groups, c_out, c_in, *taps)``.
        seed: seed of the random start.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> None:
        super().__init__()
        self._buckets = _by_shape(shapes)
        generator = torch.Generator().manual_seed(seed)
        for bucket, (shape, layers) in enumerate(self._buckets.items()):
            self._start(bucket, len(layers), shape, generator)

    def forward(self, kernels: Sequence[Tensor], iterations: int = 1) -> Tensor:
        """Return ``(kernels,)`` estimates, in the order and the dtype of ``kernels``.

        Args:
            kernels: the tensors ``(groups, c_out, c_in, *taps)`` whose shapes were declared.
            iterations: steps of power iteration, at least one.

        Raises:
            ValueError: kernels of other shapes than declared, or fewer than one iteration.
        """
        if iterations < 1:
            raise ValueError(f"expected at least one iteration, got {iterations}")
        if _by_shape([kernel.shape for kernel in kernels]) != self._buckets:
            raise ValueError("expected kernels of the shapes that the penalty was made for")
        estimates: list[Tensor] = [torch.empty(0)] * len(kernels)
        for bucket, layers in enumerate(self._buckets.values()):
            some = [kernels[layer] for layer in layers]
            one = len(some) == 1  # perhaps a large one: not copied
            values = self._values(some[0][None] if one else torch.stack(some), bucket, iterations)
            for layer, value in zip(layers, values.unbind(), strict=True):
                estimates[layer] = value
        return torch.stack(estimates) if estimates else torch.zeros(0)

    @abstractmethod
    def _start(
        self, bucket: int, layers: int, shape: tuple[int, ...], generator: torch.Generator
    ) -> None:
        """Register the buffers of a bucket of so many kernels of a shape."""

    @abstractmethod
    def _values(self, kernels: Tensor, bucket: int, iterations: int) -> Tensor:
        """Estimates ``(layers,)`` of a bucket's kernels ``(layers, groups, c_out, c_in, *taps)``.

        With a gradient, in the kernels' dtype; the bucket's buffers go on by so many steps.
        """


def _by_shape(shapes: Sequence[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    buckets: dict[tuple[int, ...], list[int]] = {}
    for layer, shape in enumerate(shapes):
        buckets.setdefault(tuple(shape), []).append(layer)
    return buckets
