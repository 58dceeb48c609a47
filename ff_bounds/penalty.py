"""A cheap, warm-started stand-in for the four bounds, for use inside a training loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ff_bounds.kernel_estimates import KernelEstimates


class PowerIterationPenalty(KernelEstimates):
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

    def _start(
        self, bucket: int, layers: int, shape: tuple[int, ...], generator: torch.Generator
    ) -> None:
        groups, _, c_in, height, width = shape
        kinds = _KEPT_BY_ROWS if height * width > 1 else ((False, False),)
        start = torch.randn(layers, groups, height, width, len(kinds), c_in, generator=generator)
        # Where a step ends in zero, go on from (cos 0, cos 1, cos 2, ...): polynomials of
        # different degrees in cos 1, which is transcendental, so this is in the null space of
        # no matrix of floating-point numbers but zero.
        count = height * width * c_in
        fresh = torch.arange(count, dtype=torch.float64).cos().reshape(height, width, 1, c_in)
        columns = [(not a, not b) for a, b in kinds]
        # As a buffer: a device would wait for a tensor that is made of numbers in each step.
        copies = torch.tensor([_copies(kept, height, width) for kept in (kinds, columns)])
        self.register_buffer(f"copies_{bucket}", copies, persistent=False)
        for name, vectors in (("right", start), ("restart", fresh.to(start).expand_as(start))):
            _, unit = _normalized(vectors, columns, copies[1])
            self.register_buffer(f"{name}_{bucket}", unit, persistent=name == "right")

    def _values(self, kernels: Tensor, bucket: int, iterations: int) -> Tensor:
        taps = kernels.permute(0, 1, 4, 5, 2, 3)  # (layers, groups, h, w, c_out, c_in)
        with torch.no_grad():
            direction = self._direction(taps.detach(), bucket, iterations).to(taps.dtype)
        # The gradient of this product is the direction.
        return (taps * direction).flatten(1).sum(dim=1)

    def _direction(self, taps: Tensor, bucket: int, iterations: int) -> Tensor:
        """Return ``sqrt(h w) u v^T`` of the chosen unfolding and group, folded like ``taps``.

        A product with an unfolding is a product with each tap: the vector's blocks are repeated
        over the taps that share them, and the results are summed over the taps that share a row
        block. So one batched product serves all four unfoldings, without copies of the kernel.

        Args:
            taps: ``(layers, groups, h, w, c_out, c_in)``.
            bucket: index of these layers' buffers.
            iterations: steps of power iteration.
        """
        right_buffer = cast(Tensor, getattr(self, f"right_{bucket}"))
        precision = torch.promote_types(taps.dtype, torch.float32)  # squares overflow in float16
        taps = taps.to(precision)
        right = right_buffer.to(precision)  # (layers, groups, h, w, unfoldings, c_in)
        restart = cast(Tensor, getattr(self, f"restart_{bucket}")).to(precision)
        rows = _KEPT_BY_ROWS[: right.shape[-2]]
        columns = [(not a, not b) for a, b in rows]
        copies = cast(Tensor, getattr(self, f"copies_{bucket}"))
        for _ in range(iterations):
            _, left = _normalized(right @ taps.mT, rows, copies[0])
            norms, image = _normalized(left @ taps, columns, copies[1])
            right = torch.where(norms > 0, image, restart)
        right_buffer.copy_(right)

        smallest, unfolding = norms[:, :, 0, 0, :, 0].min(dim=-1)
        group = smallest.argmax(dim=1, keepdim=True)
        chosen = torch.zeros_like(norms[:, :, 0, 0, :, 0]).scatter_(2, unfolding[..., None], 1.0)
        chosen *= torch.zeros_like(smallest).scatter_(1, group, 1.0)[..., None]
        chosen = chosen[:, :, None, None, :, None]
        root = math.sqrt(taps.shape[2] * taps.shape[3])
        left, right = (root * chosen * left).sum(dim=-2), (chosen * right).sum(dim=-2)
        return left[..., :, None] * right[..., None, :]


# Whether the rows of T, R, S, U keep the kernel's axes (a, b) apart, or sum over them. The columns
# do the opposite. T comes first: where h = w = 1 it is the only one.
_KEPT_BY_ROWS = ((False, False), (True, False), (False, True), (True, True))


def _copies(kept: Sequence[tuple[bool, bool]], height: int, width: int) -> list[int]:
    """Over how many taps a block is repeated, for each unfolding."""
    return [(1 if a else height) * (1 if b else width) for a, b in kept]


def _normalized(
    products: Tensor, kept: Sequence[tuple[bool, bool]], copies: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum tap products into the vectors of each unfolding, and scale those to length one.

    Args:
        products: ``(layers, groups, h, w, unfoldings, n)``.
        kept: for each unfolding, whether its blocks keep the axes ``h`` and ``w`` apart.
        copies: `_copies` of these.

    Returns:
        Norms ``(layers, groups, 1, 1, unfoldings, 1)``, and unit vectors with their blocks repeated
        over the taps, of the shape of ``products``. A vector that is zero or NaN gives zeros.
    """
    blocks = []
    for vector, (keep_a, keep_b) in zip(products.unbind(dim=-2), kept, strict=True):
        summed = [axis for axis, keep in ((2, keep_a), (3, keep_b)) if not keep]
        blocks.append(vector.sum(dim=summed, keepdim=True).expand_as(vector) if summed else vector)
    repeated = torch.stack(blocks, dim=-2)
    # Largest entry first: the squares of tiny or huge entries would underflow or overflow.
    largest = repeated.abs().amax(dim=(2, 3, 5), keepdim=True)
    repeated = repeated / torch.where(largest > 0, largest, 1.0)
    root = copies.to(repeated.dtype).sqrt()[:, None]
    norm = torch.linalg.vector_norm(repeated, dim=(2, 3, 5), keepdim=True) / root
    alive = largest > 0  # false for zero and for NaN
    return torch.where(alive, largest * norm, 0.0), torch.where(alive, repeated / norm, 0.0)
