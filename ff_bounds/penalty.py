"""A cheap, warm-started stand-in for the four bounds, for use inside a training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ff_bounds.unfoldings import unfoldings


class PowerIterationPenalty(nn.Module):
    r"""Estimates of `fantastic_four_bound` for all layers of a network at once.

    **Not a bound.** Each call makes a step or two of power iteration on all four unfoldings of each
    kernel, starting from the vectors of the call before. The result is ``u^T A v`` with unit
    vectors, hence above the norm it estimates by no more than the rounding of the kernels' dtype;
    since weights change little between training steps, it soon follows that norm closely. The
    gradient is ``sqrt(h w) u v^T`` for the unfolding with the smallest estimate, in the group with
    the largest, and zero for a zero kernel.

    Kernels of equal shape are stacked, so that a deep network costs a few batched products.
    The vectors are buffers: they move with ``.to(...)`` and are saved with ``state_dict()``.

    Args:
        shapes: for each layer the shape ``(groups, c_out, c_in, h, w)`` of its
            `unit_stride_kernel`; a matrix ``(m, n)`` is ``(1, m, n, 1, 1)``.
        seed: seed of the random start.

    References:
        S. Singla, S. Feizi, Fantastic Four, ICLR 2021, section 4 (the regulariser).
        T. Miyato et al., Spectral Normalization for GANs, ICLR 2018 (the warm start).

    Example:
        >>> penalty = PowerIterationPenalty([(1, 2, 2, 1, 1)])
        >>> matrix = torch.diag(torch.tensor([3.0, 1.0])).reshape(1, 2, 2, 1, 1)
        >>> for _ in range(20):
        ...     estimate = penalty([matrix])
        >>> round(estimate.item(), 4)
        3.0
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], seed: int = 0) -> None:
        super().__init__()
        self._buckets: dict[tuple[int, ...], list[int]] = {}
        for layer, shape in enumerate(shapes):
            self._buckets.setdefault(tuple(shape), []).append(layer)
        generator = torch.Generator().manual_seed(seed)
        for bucket, (shape, layers) in enumerate(self._buckets.items()):
            matrices = _matrices(torch.empty(len(layers), *shape, device="meta"))
            for index, matrix in enumerate(matrices):
                start = torch.randn(*matrix.shape[:-2], matrix.shape[-1], 1, generator=generator)
                self.register_buffer(f"right_{bucket}_{index}", _unit(start))

    def forward(self, kernels: Sequence[Tensor], iterations: int = 1) -> Tensor:
        """Return ``(layers,)`` estimates, in the order and the dtype of ``kernels``.

        Args:
            kernels: the tensors ``(groups, c_out, c_in, h, w)`` whose shapes were declared.
            iterations: steps of power iteration, at least one.

        Raises:
            ValueError: kernels of other shapes than declared, or fewer than one iteration.
        """
        if iterations < 1:
            raise ValueError(f"expected at least one iteration, got {iterations}")
        found: dict[tuple[int, ...], list[int]] = {}
        for layer, kernel in enumerate(kernels):
            found.setdefault(tuple(kernel.shape), []).append(layer)
        if found != self._buckets:
            raise ValueError("expected kernels of the shapes that the penalty was made for")

        estimates: list[Tensor] = [torch.empty(0)] * len(kernels)
        for bucket, (shape, layers) in enumerate(self._buckets.items()):
            stacked = torch.stack([kernels[layer] for layer in layers])
            values = [
                self._norm(matrix, f"right_{bucket}_{index}", iterations)
                for index, matrix in enumerate(_matrices(stacked))
            ]
            smallest = torch.stack(values).amin(dim=0).amax(dim=-1) * math.sqrt(
                shape[-2] * shape[-1]
            )
            for position, layer in enumerate(layers):
                estimates[layer] = smallest[position]
        return torch.stack(estimates) if estimates else torch.zeros(0)

    def _norm(self, matrix: Tensor, name: str, iterations: int) -> Tensor:
        """Estimate the norm of matrices ``(layers, groups, m, n)``; refresh buffer ``name``."""
        with torch.no_grad():
            buffer = cast(Tensor, getattr(self, name))
            right = buffer.to(matrix.dtype)
            fixed = matrix.detach()
            # Where a step ends in zero, start afresh from (cos 0, cos 1, cos 2, ...). These are
            # polynomials of different degrees in cos 1, which is transcendental: no matrix of
            # floating-point numbers but zero has this null vector.
            steps = torch.arange(right.shape[-2], device=right.device, dtype=torch.float32)
            fresh = _unit(steps.cos()[:, None]).to(right.dtype)
            for _ in range(iterations):
                left = _unit(fixed @ right)
                image = _unit(fixed.mT @ left)
                alive = image.abs().amax(dim=-2, keepdim=True) > 0  # false for zero and for NaN
                right = torch.where(alive, image, fresh)
            buffer.copy_(right)
        # Sum of an elementwise product: its gradient is the outer product u v^T, nothing more.
        return (left * (matrix @ right)).sum(dim=(-2, -1))


def _matrices(stacked: Tensor) -> tuple[Tensor, ...]:
    """Return the unfoldings ``(layers, groups, m, n)``; just one where all four coincide."""
    if stacked.shape[-2:] == (1, 1):
        return (stacked[..., 0, 0],)
    return tuple(unfoldings(stacked))


def _unit(column: Tensor) -> Tensor:
    """Scale columns ``(..., n, 1)`` to length one; zero stays zero."""
    # Largest entry first: the squares of tiny or huge entries would underflow or overflow.
    largest = column.abs().amax(dim=-2, keepdim=True)
    column = column / torch.where(largest > 0, largest, torch.ones_like(largest))
    return nn.functional.normalize(column, dim=-2, eps=torch.finfo(column.dtype).tiny)
